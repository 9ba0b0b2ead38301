from functools import wraps

import pytest
import recorded
import torch
from conftest import tiny_unet
from diffusers import AutoencoderKL, StableDiffusionXLPAGPipeline, UNet2DConditionModel
from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput
from test_compatibility import ip_adapter

from vqdm.devices import BatchSize
from vqdm.diffusion.pipelines import load_pipeline, parts_in_use, sample
from vqdm.diffusion.sampling import (
    check_timestep_range,
    error_spread,
    generate_images,
    output_error,
    point_errors,
    record_evaluation,
    record_trajectories,
)
from vqdm.diffusion.trajectories import CallRecorder, Trajectories, held_out, join, spread_points
from vqdm.errors import RunError, UserError
from vqdm.fidelity import to_tensor

PROMPTS = ["a red circle", "a blue star", "a big green heart"]


def load(folder):
    return load_pipeline(str(folder), torch.device("cpu"), torch.float32)


@pytest.mark.parametrize(("family", "guidance", "branches"), [("sdxl", 5.0, 2), ("turbo", 0.0, 1), ("sd15", 5.0, 2)])
def test_replaying_recorded_points_gives_the_recorded_outputs(pipelines, family, guidance, branches):
    pipeline = load(pipelines[family])
    settings = {"guidance_scale": guidance, "num_inference_steps": 3}
    trajectories, images = record_evaluation(pipeline, PROMPTS, 0, settings, size=2)
    assert len(images) == 3 and recorded.outputs(trajectories).shape[:3] == (3, 3, branches)
    points = [(2, 0), (0, 2), (1, 1)]
    with torch.no_grad():
        again = pipeline.unet(**trajectories.inputs(points, "cpu", torch.float32)).sample
    torch.testing.assert_close(again, trajectories.expected(points, "cpu"), rtol=1e-4, atol=1e-5)
    assert output_error(pipeline.unet, trajectories, size=4) < -80
    errors, energies = point_errors(pipeline.unet, trajectories, size=4)
    assert len(errors) == len(energies) == 9 * branches
    assert sum(energies) == pytest.approx(recorded.outputs(trajectories).double().square().sum().item())


def moved(whole: Trajectories) -> Trajectories:
    found = recorded.outputs(whole) + 0.1
    return whole.with_outputs({(n, s): found[n, s] for n, s in whole.points()})


def test_batches_are_halved_where_memory_ends(pipelines, monkeypatch):
    """Wherever a pipeline samples or is evaluated; results are those of the batch size that fits."""
    pipeline, settings = load(pipelines["sdxl"]), {"num_inference_steps": 2}

    def results(size) -> list:
        whole, images = record_evaluation(pipeline, PROMPTS, 0, settings, size)
        part = record_trajectories(pipeline, ["unet"], PROMPTS, 0, settings, size, 0, 1000)["unet"]
        again = generate_images(pipeline, PROMPTS, 0, settings, size)
        errors = point_errors(pipeline.unet, moved(whole), size)
        pixels = to_tensor([*images, *again])
        held = [recorded.latents(whole), recorded.outputs(whole), recorded.latents(part)]
        return [*held, pixels, *map(torch.tensor, errors)]

    wanted, forward = results(1), UNet2DConditionModel.forward

    @wraps(forward)  # the recorder reads its signature
    def limited(unet, sample, *args, **kwargs):
        if len(sample) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(unet, sample, *args, **kwargs)

    monkeypatch.setattr(UNet2DConditionModel, "forward", limited)
    size = BatchSize(3)
    for one, other in zip(wanted, results(size), strict=True):
        torch.testing.assert_close(other, one, rtol=1e-3, atol=1e-2)
    assert size.value == 1
    results(3)  # a plain number is halved in each call


@pytest.mark.parametrize("family", ["sdxl", "sd15"])
def test_images_are_decoded_one_at_a_time(pipelines, family, monkeypatch):
    """And what a failing call changes about the VAE is undone."""
    pipeline, decode, sizes = load(pipelines[family]), AutoencoderKL._decode, []

    def decoded(vae, z, *args, **kwargs):
        sizes.append(len(z))
        return decode(vae, z, *args, **kwargs)

    monkeypatch.setattr(AutoencoderKL, "_decode", decoded)
    generate_images(pipeline, PROMPTS, 0, {"num_inference_steps": 1}, 3)
    pipeline.vae.use_slicing = False  # a pipeline that a user gives
    generate_images(pipeline, PROMPTS, 0, {"num_inference_steps": 1}, 3)
    assert sizes == [1] * 6 and not pipeline.vae.use_slicing
    with pytest.raises(KeyError), parts_in_use(pipeline):
        pipeline.vae.to(torch.float64)
        raise KeyError
    assert pipeline.vae.dtype == torch.float32


def test_the_spread_of_errors_is_that_of_single_points():
    spread = error_spread([1.0, 0.1, 0.01], [100.0, 100.0, 100.0])
    assert (spread["median"], spread["worst"]) == pytest.approx((-30, -20))
    assert spread["95%"] == pytest.approx(-21)


def test_images_do_not_depend_on_the_batch(pipelines):
    pipeline, settings = load(pipelines["sdxl"]), {"num_inference_steps": 2, "output_type": "latent"}
    together = sample(pipeline, PROMPTS, 7, 0, settings)
    alone = sample(pipeline, PROMPTS[2:], 7, 2, settings)
    torch.testing.assert_close(together[2:], alone, rtol=1e-3, atol=1e-4)


def test_timestep_range(pipelines):
    pipeline, settings = load(pipelines["sdxl"]), {"num_inference_steps": 5}
    whole = record_trajectories(pipeline, ["unet"], PROMPTS, 0, settings, 3, 0, 1000)["unet"]
    part = record_trajectories(pipeline, ["unet"], PROMPTS, 0, settings, 3, 300, 700)["unet"]
    keep = (whole.timesteps >= 300) & (whole.timesteps <= 700)
    assert 0 < keep.sum() < 5
    assert torch.equal(recorded.latents(part), recorded.latents(whole)[:, keep])
    assert torch.equal(part.timesteps, whole.timesteps[keep])
    with pytest.raises(UserError, match="--min_timestep"):
        check_timestep_range(pipeline.scheduler, 5, 2, 3)


def random_trajectories() -> Trajectories:
    torch.manual_seed(0)
    conditioning = {"encoder_hidden_states": torch.randn(12, 2, 4, 8), "text_embeds": torch.randn(12, 2, 6)}
    return recorded.made(torch.randn(12, 5, 4, 2, 2), torch.arange(5.0), conditioning, torch.randn(12, 5, 2, 4, 2, 2))


def test_save_load_and_join(tmp_path):
    whole = random_trajectories()
    whole.save(tmp_path / "t.safetensors")
    again = Trajectories.load(tmp_path / "t.safetensors")
    assert torch.equal(recorded.latents(again), recorded.latents(whole))
    assert torch.equal(recorded.outputs(again), recorded.outputs(whole))
    assert again.groups[0].calls == whole.groups[0].calls
    assert join([whole, again]).shape == (24, 5) and len(join([whole, again]).groups) == 1


def test_branches_are_outermost():
    whole = random_trajectories()
    call = whole.inputs([(3, 1), (5, 4)], "cpu", torch.float32)
    tokens = recorded.conditioning(whole, "encoder_hidden_states")
    expected = torch.stack([tokens[3, 0], tokens[5, 0], tokens[3, 1], tokens[5, 1]])
    assert torch.equal(call["encoder_hidden_states"], expected)
    assert torch.equal(call["sample"][2], recorded.latents(whole)[3, 1])
    assert call["added_cond_kwargs"]["text_embeds"].shape == (4, 6)


def test_a_tenth_is_held_out_by_prompt():
    points = random_trajectories().points()
    kept, apart = held_out(points)
    assert {n for n, _ in apart} == {9} and not {n for n, _ in apart} & {n for n, _ in kept}
    assert len(kept) + len(apart) == 60
    kept, apart = held_out([(0, s) for s in range(30)])
    assert len(apart) == 3


def test_points_are_spread_over_the_trajectory():
    points = spread_points(random_trajectories(), 2)
    assert len(points) == len(set(points)) == 24
    assert {s for _, s in points} == set(range(5))
    assert len(spread_points(random_trajectories(), 0)) == 60


def rich_unet() -> UNet2DConditionModel:
    """A UNet that takes class labels and a guidance embedding too."""
    config = dict(tiny_unet("sdxl").config) | {"num_class_embeds": 3, "time_cond_proj_dim": 4}
    config.pop("_use_default_values")
    torch.manual_seed(0)
    return UNet2DConditionModel.from_config(config).eval().requires_grad_(False)


def rich_call(step: int = 0, branches: int = 2, prompts: int = 3) -> dict:
    """A call with everything that is recorded."""
    count, generator = branches * prompts, torch.Generator().manual_seed(1)
    fixed = {
        "timestep_cond": torch.randn(count, 4, generator=generator),
        "encoder_hidden_states": torch.randn(count, 5, 64, generator=generator),
        "class_labels": torch.arange(count) % 3,
        "encoder_attention_mask": torch.arange(5).repeat(count, 1) < torch.arange(1, count + 1)[:, None],
        "added_cond_kwargs": {
            "text_embeds": torch.randn(count, 32, generator=generator),
            "time_ids": torch.ones(count, 6),
        },
    }
    latents = torch.randn(prompts, 4, 8, 8, generator=torch.Generator().manual_seed(10 + step))
    return {"sample": latents.repeat(branches, 1, 1, 1), "timestep": torch.tensor(900 - 300 * step), **fixed}


def positional(unet, call: dict):
    first = ("sample", "timestep", "encoder_hidden_states", "class_labels", "timestep_cond")
    rest = {name: value for name, value in call.items() if name not in first}
    return unet(*(call[name] for name in first), return_dict=False, **rest)[0]


def with_residuals(call: dict) -> dict:
    """What a ControlNet adds, other at every step."""
    shapes, generator = [(16, 8), (16, 8), (16, 4), (32, 4)], torch.Generator().manual_seed(int(call["timestep"]))
    residuals = tuple(torch.randn(6, channels, side, side, generator=generator) for channels, side in shapes)
    added = {"down_block_additional_residuals": residuals, "mid_block_additional_residual": torch.ones(6, 32, 4, 4)}
    return call | added | {"cross_attention_kwargs": {"scale": 0.5}}


CALLS = {
    "keywords": lambda unet, call: unet(**call).sample,
    "positions": positional,
    "residuals": lambda unet, call: unet(**with_residuals(call)).sample,
}


@pytest.mark.parametrize("make", CALLS.values(), ids=CALLS)
def test_calls_are_replayed_as_they_were_made(make):
    unet = rich_unet()
    with CallRecorder(unet, 3, outputs=True) as recorder:
        outputs = [make(unet, rich_call(step)) for step in range(2)]
    found = recorder.trajectories()
    assert torch.equal(found.timesteps, torch.tensor([900.0, 600.0]))
    for step, output in enumerate(outputs):
        points = [(n, step) for n in range(3)]
        torch.testing.assert_close(found.expected(points, "cpu"), output)
        torch.testing.assert_close(unet(**found.inputs(points, "cpu", torch.float32)).sample, output)
    mixed = unet(**found.inputs([(2, 0), (0, 1)], "cpu", torch.float32)).sample  # [A·B, ...]
    torch.testing.assert_close(mixed, torch.stack([outputs[0][2], outputs[1][0], outputs[0][5], outputs[1][3]]))
    held = sum(name.startswith("encoder_hidden_states") for name in found.groups[0].batched)
    assert held == 1  # what is the same at every step is kept once


CHANGES = {
    "another text": lambda call: call | {"encoder_hidden_states": call["encoder_hidden_states"] * 2},
    "no guidance embedding": lambda call: {name: value for name, value in call.items() if name != "timestep_cond"},
    "fewer branches": lambda _: rich_call(1, branches=1),
    "latents of each branch": lambda call: call | {"sample": torch.randn(6, 4, 8, 8)},
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_calls_may_change_from_step_to_step(change, tmp_path):
    unet, calls = rich_unet(), [rich_call(), change(rich_call(1))]
    with CallRecorder(unet, 3, outputs=True) as recorder:
        outputs = [unet(**call).sample for call in calls]
    recorder.trajectories().save(tmp_path / "calls.safetensors")
    found = Trajectories.load(tmp_path / "calls.safetensors")
    for batch in found.batches(found.points(), 4):
        again = unet(**found.inputs(batch, "cpu", torch.float32)).sample
        torch.testing.assert_close(again, found.expected(batch, "cpu"), rtol=1e-4, atol=1e-5)
    points = [(n, 1) for n in range(3)]
    torch.testing.assert_close(found.expected(points, "cpu"), outputs[1])


UNRECORDED = {
    "timestep, which differs": lambda call: call | {"timestep": torch.arange(6)},
    "encoder_hidden_states, which has shape": lambda call: call | {"encoder_hidden_states": torch.ones(4, 5, 64)},
    "sample, which has 4 samples": lambda call: call | {"sample": call["sample"][:4]},
    "cross_attention_kwargs.processor, which is a object": lambda call: (
        call | {"cross_attention_kwargs": {"processor": object()}}
    ),
}


@pytest.mark.parametrize("words", UNRECORDED)
def test_what_is_not_recorded_is_refused_by_name(words):
    """Given to the recorder alone; a UNet may complain of them first."""
    recorder, output = CallRecorder(rich_unet(), 3), UNet2DConditionOutput(torch.zeros(6, 4, 8, 8))
    recorder._record(recorder.denoiser, (), rich_call(), output)
    with pytest.raises(UserError, match=f"^MODEL's pipeline calls its denoiser with {words}"):
        CallRecorder(rich_unet(), 3)._record(recorder.denoiser, (), UNRECORDED[words](rich_call()), output)


def test_an_ip_adapters_images_are_recorded(pipelines):
    pipeline = load(pipelines["sdxl"])
    pipeline.load_ip_adapter(ip_adapter(pipeline.unet), subfolder="", weight_name="", image_encoder_folder=None)
    settings = {"num_inference_steps": 1, "ip_adapter_image_embeds": [torch.randn(2, 1, 32)]}
    found, _ = record_evaluation(pipeline, PROMPTS, 0, settings, 3)
    assert output_error(pipeline.unet, found, 2) < -80


def test_a_unet_that_is_another_while_the_pipeline_samples_is_refused(pipelines):
    """Perturbed attention guidance exchanges attention processors during the call."""
    pipeline = StableDiffusionXLPAGPipeline.from_pipe(load(pipelines["sdxl"]))
    pipeline.set_progress_bar_config(disable=True)
    with pytest.raises(UserError, match=r"gives another output .* when called again as recorded"):
        record_evaluation(pipeline, PROMPTS, 0, {"num_inference_steps": 1}, 3)


def test_batches_of_other_timesteps_are_not_joined():
    one, other = random_trajectories(), random_trajectories()
    other.timesteps = other.timesteps + 1
    with pytest.raises(RunError, match="with other timesteps"):
        join([one, other])


def test_recorder_leaves_no_hook(pipelines):
    pipeline = load(pipelines["sdxl"])
    before = len(pipeline.unet._forward_hooks)
    with pytest.raises(RuntimeError), CallRecorder(pipeline.unet, 1):
        raise RuntimeError
    assert len(pipeline.unet._forward_hooks) == before
