import pytest
import torch

from vqdm.diffusion.pipelines import load_pipeline, sample
from vqdm.diffusion.sampling import (
    check_timestep_range,
    error_spread,
    output_error,
    point_errors,
    record_evaluation,
    record_trajectories,
)
from vqdm.diffusion.trajectories import Recorder, Trajectories, held_out, join, spread_points
from vqdm.errors import UserError

PROMPTS = ["a red circle", "a blue star", "a big green heart"]


def load(folder):
    return load_pipeline(str(folder), torch.device("cpu"), torch.float32)


@pytest.mark.parametrize(("family", "guidance", "branches"), [("sdxl", 5.0, 2), ("turbo", 0.0, 1), ("sd15", 5.0, 2)])
def test_replaying_recorded_points_gives_the_recorded_outputs(pipelines, family, guidance, branches):
    pipeline = load(pipelines[family])
    settings = {"guidance_scale": guidance, "num_inference_steps": 3}
    trajectories, pictures = record_evaluation(pipeline, PROMPTS, 0, settings, size=2)
    assert len(pictures) == 3 and trajectories.outputs.shape[:3] == (3, 3, branches)
    points = [(2, 0), (0, 2), (1, 1)]
    with torch.no_grad():
        again = pipeline.unet(**trajectories.inputs(points, "cpu", torch.float32)).sample
    torch.testing.assert_close(again, trajectories.expected(points, "cpu"), rtol=1e-4, atol=1e-5)
    assert output_error(pipeline.unet, trajectories, size=4) < -80
    errors, energies = point_errors(pipeline.unet, trajectories, size=4)
    assert len(errors) == len(energies) == 9 * branches
    assert sum(energies) == pytest.approx(trajectories.outputs.double().square().sum().item())


def test_the_spread_of_errors_is_that_of_single_points():
    spread = error_spread([1.0, 0.1, 0.01], [100.0, 100.0, 100.0])
    assert (spread["median"], spread["worst"]) == pytest.approx((-30, -20))
    assert spread["95%"] == pytest.approx(-21)


def test_pictures_do_not_depend_on_the_batch(pipelines):
    pipeline, settings = load(pipelines["sdxl"]), {"num_inference_steps": 2, "output_type": "latent"}
    together = sample(pipeline, PROMPTS, 7, 0, settings)
    alone = sample(pipeline, PROMPTS[2:], 7, 2, settings)
    torch.testing.assert_close(together[2:], alone, rtol=1e-3, atol=1e-4)


def test_timestep_range(pipelines):
    pipeline, settings = load(pipelines["sdxl"]), {"num_inference_steps": 5}
    whole = record_trajectories(pipeline, PROMPTS, 0, settings, 3, 0, 1000)
    part = record_trajectories(pipeline, PROMPTS, 0, settings, 3, 300, 700)
    keep = (whole.timesteps >= 300) & (whole.timesteps <= 700)
    assert 0 < keep.sum() < 5
    assert torch.equal(part.latents, whole.latents[:, keep]) and torch.equal(part.timesteps, whole.timesteps[keep])
    with pytest.raises(UserError, match="--min_timestep"):
        check_timestep_range(pipeline.scheduler, 5, 2, 3)


def random_trajectories() -> Trajectories:
    torch.manual_seed(0)
    conditioning = {"encoder_hidden_states": torch.randn(12, 2, 4, 8), "text_embeds": torch.randn(12, 2, 6)}
    return Trajectories(torch.randn(12, 5, 4, 2, 2), torch.arange(5.0), conditioning, torch.randn(12, 5, 2, 4, 2, 2))


def test_save_load_and_join(tmp_path):
    whole = random_trajectories()
    whole.save(tmp_path / "t.safetensors")
    again = Trajectories.load(tmp_path / "t.safetensors")
    assert torch.equal(again.latents, whole.latents) and torch.equal(again.outputs, whole.outputs)
    assert again.conditioning.keys() == whole.conditioning.keys()
    assert join([whole, again]).latents.shape[0] == 24


def test_branches_are_outermost():
    whole = random_trajectories()
    call = whole.inputs([(3, 1), (5, 4)], "cpu", torch.float32)
    tokens = whole.conditioning["encoder_hidden_states"]
    expected = torch.stack([tokens[3, 0], tokens[5, 0], tokens[3, 1], tokens[5, 1]])
    assert torch.equal(call["encoder_hidden_states"], expected)
    assert torch.equal(call["sample"][2], whole.latents[3, 1])
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


def test_recorder_leaves_no_hook(pipelines):
    pipeline = load(pipelines["sdxl"])
    before = len(pipeline.unet._forward_hooks)
    with pytest.raises(RuntimeError), Recorder(pipeline.unet, 1):
        raise RuntimeError
    assert len(pipeline.unet._forward_hooks) == before
