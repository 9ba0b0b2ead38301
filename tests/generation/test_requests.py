import hashlib

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
from vqdm.generation.requests import (
    SETTINGS,
    Request,
    alike,
    call_settings,
    generate,
    generate_in_batches,
    make_requests,
    overrides,
    prompt_ids,
    seed_of,
    unused_columns,
)
from vqdm.images import GeneratedImage, generated_image
from vqdm.prompts import load_rows

NONE = dict.fromkeys(SETTINGS)


def test_seed_is_sha256_of_base_id_and_sample():
    plain = int(hashlib.sha256(b"7|cat|2").hexdigest()[:16], 16) % 2**63
    assert seed_of(7, "cat", 2) == plain
    assert len({seed_of(base, name, k) for base in range(3) for name in "ab" for k in range(5)}) == 30


def test_ids_come_from_a_column_where_they_tell_rows_apart():
    assert prompt_ids([{"id": 5}, {"id": "x"}]) == ["5", "x"]
    assert prompt_ids([{"item_id": "p1"}, {"item_id": "p2"}]) == ["p1", "p2"]
    assert (
        prompt_ids([{"id": 5}, {"id": 5}]) == prompt_ids([{}, {}]) == prompt_ids([{"id": ""}, {"id": 1}]) == ["0", "1"]
    )
    assert prompt_ids([{"ID": 5}, {"ID": 6}]) == ["5", "6"]
    assert prompt_ids([{"id": None}, {"id": 6}]) == ["0", "1"]


def test_requests_of_a_row_do_not_depend_on_the_other_rows():
    rows = [{"prompt": f"p{i}", "id": f"name{i}"} for i in range(4)]
    every = make_requests(rows, 2, 3, None, NONE, "file")
    assert [request.key for request in every] == [(i, k) for i in range(4) for k in range(2)]
    turned = make_requests(rows[::-1], 2, 3, None, NONE, "file")
    assert {(r.id, r.sample): r.seed for r in every} == {(r.id, r.sample): r.seed for r in turned}


def test_cells_overrule_settings_and_empty_ones_do_not():
    rows = [
        {"prompt": "a", "Seed": "9", "height": " 64 ", "guidance_scale": "", "negative_prompt": None, "note": "x"},
        {"prompt": "b", "Seed": None, "height": 32.0, "guidance_scale": 0, "negative_prompt": "blurry"},
    ]
    first, again, second, _ = make_requests(rows, 2, 0, "bad", NONE | {"guidance_scale": 5.0, "width": 16}, "file")
    assert (first.seed, again.seed, second.seed) == (9, 10, seed_of(0, "1", 0))
    assert (first.negative_prompt, second.negative_prompt) == ("bad", "blurry")
    assert first.settings == {"guidance_scale": 5.0, "num_inference_steps": None, "height": 64, "width": 16}
    assert second.settings == {"guidance_scale": 0.0, "num_inference_steps": None, "height": 32, "width": 16}


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"Negative Prompt": "blurry"}, {"negative_prompt": "blurry"}),
        ({"num-inference-steps": "20"}, {"num_inference_steps": 20}),
        ({"seed": "42.0"}, {"seed": 42}),  # as data frames write a column with empty cells
        ({"height": " 64 "}, {"height": 64}),
    ],
)
def test_cells_as_other_programs_write_them(row, expected):
    assert overrides(row, "row 1") == expected


def test_bad_cells_name_the_line_of_the_file(tmp_path):
    path = tmp_path / "p.csv"
    path.write_text('prompt,seed\n,\n"a\nb",1\nc,many\n')
    with pytest.raises(UserError, match=r"p\.csv: line 5: seed is 'many'"):
        make_requests(load_rows(str(path), "PROMPTS"), 1, 0, None, NONE, str(path))


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([{"steps": 3}], "column steps is not used; rename it to num_inference_steps"),
        ([{"CFG scale": 3}], "column CFG scale is not used; rename it to guidance_scale"),
        ([{"guidanceScale": 3}], "column guidanceScale is not used"),
        ([{"id": 1}, {"id": 1}], "ids are not used, since 2 rows share '1'"),
        ([{"id": 1}, {}, {"id": ""}], "ids are not used, since 2 rows have none"),
    ],
)
def test_columns_that_are_not_used_are_named(rows, words):
    (line,) = unused_columns(rows)
    assert words in line


def test_columns_that_act_and_those_of_others_are_not():
    assert unused_columns([{"prompt": "a", "Seed": 1, "id": "x", "note": 1}, {"id": "y"}]) == []


def test_large_seeds_keep_every_bit():
    assert overrides({"seed": str(2**62 + 1)}, "row 1") == {"seed": 2**62 + 1}


@pytest.mark.parametrize(
    ("cell", "words"),
    [
        ({"seed": "many"}, "row 3: seed is 'many'; allowed are whole numbers from 0$"),
        ({"seed": -1}, "seed is -1; allowed are whole numbers from 0$"),
        ({"seed": 1.5}, "seed is 1.5; allowed are whole numbers from 0$"),
        ({"seed": float("nan")}, "seed is nan; allowed are whole numbers from 0$"),
        ({"seed": "NaN"}, "seed is 'NaN'; allowed are whole numbers from 0$"),
        ({"seed": 2**63}, f"allowed are whole numbers from 0 to {2**63 - 1}$"),
        ({"seed": True}, "seed is true or false; allowed"),
        ({"negative_prompt": ["a"]}, r"negative_prompt is \['a'\], a list; expected text"),
        ({"negative_prompt": False}, "negative_prompt is true or false; expected text"),
        ({"seed": 1, "Seed": 2}, "has two columns seed"),
        ({"guidance_scale": "7,5"}, "guidance_scale is '7,5'; allowed are numbers"),
        ({"seed": 0.5}, "seed is 0.5"),
        ({"height": 20}, "height is 20; allowed are multiples of 8"),
        ({"guidance_scale": "nan"}, "guidance_scale is nan"),
        ({"num_inference_steps": 0}, "num_inference_steps is 0; allowed are whole numbers from 1 to 1000"),
    ],
)
def test_bad_cells_are_named(cell, words):
    with pytest.raises(UserError, match=words):
        overrides(cell, "row 3")


# ------------------------------------------------------------------------------------------- batches


def request(index: int, negative: str | None = None, **settings) -> Request:
    return Request(index, 0, str(index), f"a red star {index}", negative, 1000 + index, NONE | settings)


def blank(batch):
    return [GeneratedImage(Image.new("RGB", (1, 1)), None) for _ in batch]


def test_groups_hold_what_one_call_can_generate():
    mixed = [request(0), request(1, height=8), request(2, "bad"), request(3), request(4, "", guidance_scale=0.0)]
    groups = [[one.index for one in group] for group in alike(mixed)]
    assert sorted(groups) == [[0, 3], [1], [2], [4]]


def test_the_batch_size_is_halved_for_all_groups():
    tried = []

    def limited(batch):
        tried.append(len(batch))
        if len(batch) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return blank(batch)

    found = list(generate_in_batches(limited, [[request(i) for i in range(5)], [request(k) for k in (5, 6, 7)]], 8))
    assert [one.index for batch, _ in found for one in batch] == list(range(8))
    assert tried == [5, 2, 2, 1, 2, 1]


def test_out_of_memory_at_batch_size_1_advises_to_offload():
    def fail(_):
        raise torch.OutOfMemoryError("x")

    with pytest.raises(RunError, match="out of memory at batch size 1; try --offload"):
        list(generate_in_batches(fail, [[request(0), request(1)]], 2))


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
    assert call_settings(pipeline, NONE | given, 1) == expected
    sampling = SamplingConfig(height=expected.get("height"), width=expected.get("width"), num_inference_steps=2)
    height, width = expected.get("height", 16), expected.get("width", 16)
    points = [predicted_bytes(pipeline, sampling, count, 0) for count in (0, 1)]
    assert points[1] - points[0] == 4 * 4 * 2 * height * width // 4  # float32, 4 channels, 2 steps, 2×2 pixels a latent


def test_a_size_that_nobody_names_is_asked_for():
    pipeline = tiny_pipeline("sdxl")
    pipeline.unet.register_to_config(sample_size=None)
    for given in ({}, {"height": 16}):
        with pytest.raises(UserError, match="names no size of its images; give --height and --width"):
            call_settings(pipeline, NONE | given, 1)
    with pytest.raises(UserError, match="give --height and --width"):
        predicted_bytes(pipeline, SamplingConfig(), 1, 1)


def test_pixels_are_those_of_diffusers():
    values = torch.rand(3, 8, 6, generator=torch.Generator().manual_seed(0))
    plain = VaeImageProcessor.numpy_to_pil(values.permute(1, 2, 0)[None].numpy())[0]
    found = generated_image(values)
    assert np.array_equal(np.asarray(found.image), np.asarray(plain)) and found.problem is None


def test_problems_are_seen():
    values = torch.zeros(3, 2, 2)
    assert generated_image(values).problem == "black"
    assert generated_image(values, replaced=True).problem == "safety_checker"
    values[0, 0, 0] = float("nan")
    assert generated_image(values).problem == "nan"
    assert np.asarray(generated_image(values).image).max() == 0


@pytest.mark.parametrize("scheduler", ["EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler", "DDPMScheduler"])
def test_noise_and_image_do_not_depend_on_the_batch(pipelines, monkeypatch, scheduler):
    import diffusers

    pipeline = DiffusionPipeline.from_pretrained(pipelines["sdxl"])
    pipeline.set_progress_bar_config(disable=True)
    pipeline.scheduler = getattr(diffusers, scheduler).from_config(pipeline.scheduler.config)
    noise, prepare = [], pipeline.prepare_latents
    monkeypatch.setattr(pipeline, "prepare_latents", lambda *a, **k: noise.append(prepare(*a, **k)) or noise[-1])
    requests = [request(i, num_inference_steps=3) for i in range(3)]
    together = generate(pipeline, requests)
    alone = [generate(pipeline, [one])[0] for one in requests[::-1]][::-1]
    assert torch.equal(noise[0], torch.cat(noise[:0:-1]))
    for one, other in zip(together, alone, strict=True):
        gap = np.asarray(one.image).astype(int) - np.asarray(other.image)
        assert np.abs(gap).max() <= 1
