import numpy as np
import pytest
import torch
from conftest import tiny_pipeline
from diffusers import DiffusionPipeline
from diffusers.image_processor import VaeImageProcessor
from PIL import Image

from vqdm.config import SamplingConfig
from vqdm.diffusion.sampling import predicted_bytes
from vqdm.errors import RunError, UserError
from vqdm.generation.drawing import alike, call_settings, draw, drawn_in_batches
from vqdm.generation.requests import SETTINGS, Request
from vqdm.images import GeneratedImage, generated_image

NONE = dict.fromkeys(SETTINGS)


def request(index: int, negative: str | None = None, **settings) -> Request:
    return Request(index, 0, str(index), f"a red star {index}", negative, 1000 + index, NONE | settings)


def blank(batch):
    return [GeneratedImage(Image.new("RGB", (1, 1)), None) for _ in batch]


def test_groups_hold_what_one_call_can_draw():
    mixed = [request(0), request(1, height=8), request(2, "bad"), request(3), request(4, "", guidance_scale=0.0)]
    groups = [[one.index for one in group] for group in alike(mixed)]
    assert sorted(groups) == [[0, 3], [1], [2], [4]]


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("not enough memory")])
def test_batch_halves_for_good_where_memory_ends(error, caplog):
    tried, held = [], 3

    def limited(batch):
        tried.append(len(batch))
        if len(batch) > held:
            raise error
        return blank(batch)

    with caplog.at_level("INFO", "vqdm"):
        drawn = list(drawn_in_batches(limited, [[request(i) for i in range(7)], [request(7)]], 8))
    assert [one.index for batch, _ in drawn for one in batch] == list(range(8))
    assert tried == [7, 3, 3, 1, 1]
    assert "out of memory with 7 pictures at once; going on with 3" in caplog.text


def test_one_picture_too_many_is_an_error_and_others_pass_through():
    def fail(error):
        def raising(batch):
            raise error

        return raising

    with pytest.raises(RunError, match="does not suffice for one picture"):
        list(drawn_in_batches(fail(torch.OutOfMemoryError("x")), [[request(0), request(1)]], 2))
    with pytest.raises(RuntimeError, match="shapes"):
        list(drawn_in_batches(fail(RuntimeError("shapes do not match")), [[request(0)]], 2))


SIZES = [
    (8, {}, {}),
    (8, {"height": 24}, {"height": 24, "width": 16}),
    ([8, 12], {"width": 8}, {"height": 16, "width": 8}),
    (None, {"height": 24, "width": 8}, {"height": 24, "width": 8}),
]


@pytest.mark.parametrize(("own", "given", "expected"), SIZES)
def test_one_side_alone_gets_the_other_from_the_unet(own, given, expected):
    """Its sample_size may be a number, two, or nothing, in which case both sides are given."""
    pipeline = tiny_pipeline("sdxl")
    pipeline.unet.register_to_config(sample_size=own)
    assert call_settings(pipeline, NONE | given) == expected
    sampling = SamplingConfig(height=expected.get("height"), width=expected.get("width"), num_inference_steps=2)
    height, width = expected.get("height", 16), expected.get("width", 16)
    points = [predicted_bytes(pipeline, sampling, count, 0) for count in (0, 1)]
    assert points[1] - points[0] == 4 * 4 * 2 * height * width // 4  # float32, 4 channels, 2 steps, 2×2 pixels a latent


def test_a_size_that_nobody_names_is_asked_for():
    pipeline = tiny_pipeline("sdxl")
    pipeline.unet.register_to_config(sample_size=None)
    for given in ({}, {"height": 16}):
        with pytest.raises(UserError, match="names no size of its pictures; give --height and --width"):
            call_settings(pipeline, NONE | given)
    with pytest.raises(UserError, match="give --height and --width"):
        predicted_bytes(pipeline, SamplingConfig(), 1, 1)


def test_pixels_are_those_of_diffusers():
    values = torch.rand(3, 8, 6, generator=torch.Generator().manual_seed(0))
    plain = VaeImageProcessor.numpy_to_pil(values.permute(1, 2, 0)[None].numpy())[0]
    picture = generated_image(values)
    assert np.array_equal(np.asarray(picture.image), np.asarray(plain)) and picture.problem is None


def test_problems_are_seen():
    values = torch.zeros(3, 2, 2)
    assert generated_image(values).problem == "black"
    assert generated_image(values, replaced=True).problem == "safety_checker"
    values[0, 0, 0] = float("nan")
    assert generated_image(values).problem == "nan"
    assert np.asarray(generated_image(values).image).max() == 0


@pytest.mark.parametrize("scheduler", ["EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler", "DDPMScheduler"])
def test_noise_and_picture_do_not_depend_on_the_batch(pipelines, monkeypatch, scheduler):
    import diffusers

    pipeline = DiffusionPipeline.from_pretrained(pipelines["sdxl"])
    pipeline.set_progress_bar_config(disable=True)
    pipeline.scheduler = getattr(diffusers, scheduler).from_config(pipeline.scheduler.config)
    noise, prepare = [], pipeline.prepare_latents
    monkeypatch.setattr(pipeline, "prepare_latents", lambda *a, **k: noise.append(prepare(*a, **k)) or noise[-1])
    requests = [request(i, num_inference_steps=3) for i in range(3)]
    together = draw(pipeline, requests)
    alone = [draw(pipeline, [one])[0] for one in requests[::-1]][::-1]
    assert torch.equal(noise[0], torch.cat(noise[:0:-1]))
    for one, other in zip(together, alone, strict=True):
        gap = np.asarray(one.image).astype(int) - np.asarray(other.image)
        assert np.abs(gap).max() <= 1
