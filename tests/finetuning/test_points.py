import pytest
import tiny_students
import torch
from conftest import tiny_pipeline

from vqdm.devices import BatchSize
from vqdm.diffusion.sampling import generate_images
from vqdm.diffusion.trajectories import Trajectories, join
from vqdm.finetuning.config import OptimizerConfig
from vqdm.finetuning.parameters import trainable
from vqdm.finetuning.points import (
    Chunk,
    Point,
    Points,
    bin_of,
    divided,
    record_points,
    sample_points,
    shuffled,
    split_held_out,
    spread,
    timestep_weights,
    with_unet,
)


def two_parts() -> Points:
    whole = tiny_students.points(tiny_students.teacher(), prompts=3, steps=4).parts[0]
    first, second = (
        Trajectories(
            whole.latents[part],
            whole.timesteps,
            {k: v[part] for k, v in whole.conditioning.items()},
            whole.outputs[part],
        )
        for part in (slice(0, 2), slice(2, 3))
    )
    return Points([first, second])


def test_a_batch_over_several_parts_is_that_of_the_parts_joined():
    points = two_parts()
    chosen = [Point(1, 0, 2), Point(0, 1, 0), Point(0, 0, 3)]
    batch, whole = points.batch(chosen, tiny_students.CPU, torch.float32), join(points.parts)
    pairs = [(2, 2), (1, 0), (0, 3)]
    wanted = whole.inputs(pairs, "cpu", torch.float32)
    assert torch.equal(batch.call["sample"], wanted["sample"]) and torch.equal(
        batch.call["timestep"], wanted["timestep"]
    )
    assert torch.equal(batch.call["encoder_hidden_states"], wanted["encoder_hidden_states"])
    assert torch.equal(batch.call["added_cond_kwargs"]["text_embeds"], wanted["added_cond_kwargs"]["text_embeds"])
    assert torch.equal(batch.teacher_output, whole.expected(pairs, "cpu")) and batch.count == 3
    points.parts[1].outputs = None
    assert points.batch(chosen, tiny_students.CPU, torch.float32).teacher_output is None


def test_orders_depend_on_the_seed_alone():
    points = two_parts()
    order = shuffled(points, None, "1")
    assert sorted(order) == points.all() and order == shuffled(points, None, "1") != shuffled(points, None, "2")


def test_timesteps_are_sampled_in_proportion_to_their_weights():
    points = Points(two_parts().parts * 400)
    weights = timestep_weights(points, "beta")
    noisy = [points.timestep(point) > 900 for point in shuffled(points, weights, "1")]
    timesteps = points.parts[0].timesteps
    assert sum(noisy) / len(noisy) == pytest.approx(((timesteps[0] / timesteps.norm()) ** 2).item(), abs=0.03)
    assert timestep_weights(points, "uniform") is None
    assert timestep_weights(two_parts(), "error", [1.0, 2.0, 3.0, 4.0])[:4] == [4.0, 3.0, 2.0, 1.0]


def test_bins_have_equal_width():
    assert [bin_of(t, 4) for t in (0, 249.9, 250, 999, 1000)] == [0, 0, 1, 3, 3]


def test_a_spread_has_all_prompts_and_different_timesteps():
    chosen = spread(two_parts(), 6)
    assert len(chosen) == 6 and len({(k, n) for k, n, _ in chosen}) == 3 and len({s for *_, s in chosen}) > 2
    assert spread(two_parts(), 100) == two_parts().all()


@pytest.mark.parametrize(
    ("prompts", "steps", "wanted"),
    [(20, 2, {9, 19}), (10, 3, {9}), (3, 2, {2}), (1, 20, {0}), (1, 2, {0})],
)
def test_prompts_are_split_whole_where_there_are_several(prompts, steps, wanted):
    latents = torch.zeros(prompts, steps, 1, 1, 1)
    points = Points([Trajectories(latents, torch.arange(float(steps)), {})])
    training, held_out = split_held_out(points)
    assert sorted(training + held_out) == points.all() and training and held_out
    assert {point.prompt for point in held_out} == wanted
    assert prompts == 1 or not wanted & {point.prompt for point in training}


def test_a_single_point_is_trained_and_evaluated_on():
    points = Points([Trajectories(torch.zeros(1, 1, 1, 1, 1), torch.zeros(1), {})])
    assert split_held_out(points) == ([Point(0, 0, 0)], [Point(0, 0, 0)])


def test_a_spread_does_not_depend_on_how_trajectories_are_batched():
    whole = join(two_parts().parts)

    def cut(first: int, last: int) -> Trajectories:
        held = {name: value[first:last] for name, value in whole.conditioning.items()}
        return Trajectories(whole.latents[first:last], whole.timesteps, held)

    chosen = [[(n, s) for _, n, s in spread(Points([whole]), 6)]]
    for size in (1, 2):
        parts = Points([cut(k, k + size) for k in range(0, 3, size)])
        chosen.append([(size * k + n, s) for k, n, s in spread(parts, 6)])
    assert chosen[0] == chosen[1] == chosen[2]


def test_sources_share_the_trajectories_whatever_the_batch_size():
    assert divided(["teacher"], 5, 4) == [Chunk("teacher", 5, 4)]
    assert divided(["teacher", "student"], 10, 5) == [Chunk("teacher", 10, 2), Chunk("student", 12, 3)]
    assert divided(["teacher", "student", "real"], 0, 2) == [Chunk("student", 0, 1), Chunk("real", 1, 1)]


# ------------------------------------------------------------------------------------------- sampling with the student

SETTINGS = {"num_inference_steps": 2}


@pytest.fixture(scope="module")
def pipeline():
    found = tiny_pipeline("sdxl").to(torch.bfloat16)
    found.set_progress_bar_config(disable=True)
    return found


@pytest.fixture
def student():
    """A student in training, so in float32."""
    unet = tiny_students.student(tiny_students.FORMATS["own"])
    trainable(unet, OptimizerConfig())
    return unet


def test_the_student_alone_is_under_autocast(pipeline, student):
    """Text encoders and VAE run in their own type, as without a student."""
    own, seen = pipeline.unet, {}
    parts = {"student": student.mid_block, "text": pipeline.text_encoder, "vae": pipeline.vae.decoder}
    hooks = [
        part.register_forward_hook(lambda *_, name=name: seen.update({name: torch.is_autocast_enabled("cpu")}))
        for name, part in parts.items()
    ]
    with with_unet(pipeline, student):
        assert pipeline.unet is student
        assert len(generate_images(pipeline, ["a red circle"], 0, SETTINGS, 1)) == 1
    for hook in hooks:
        hook.remove()
    assert seen == {"student": True, "text": False, "vae": False}
    assert pipeline.unet is own and "forward" not in vars(student)


def test_points_have_the_type_of_the_pipeline(pipeline, student):
    for unet in (pipeline.unet, student):
        points = sample_points(pipeline, unet, ["a red circle", "a star"], 0, SETTINGS, True)
        assert points.latents.dtype == points.outputs.dtype == torch.bfloat16
        assert "forward" not in vars(unet)


def test_points_are_recorded_in_halves_where_memory_ends(tmp_path):
    """Chunk by chunk, in their order, and what is recorded once is kept."""
    whole, tried = join(two_parts().parts), []

    def record(chunk: Chunk) -> Trajectories:
        tried.append(chunk.count)
        if chunk.count > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        some = slice(chunk.first, chunk.first + chunk.count)
        conditioning = {name: value[some] for name, value in whole.conditioning.items()}
        return Trajectories(whole.latents[some], whole.timesteps, conditioning, whole.outputs[some])

    count, size = len(whole.latents), BatchSize(len(whole.latents))
    assert count > 2
    for _ in range(2):
        points = record_points(tmp_path, [Chunk("teacher", 0, count)], size, record, tiny_students.ALONE)
        assert torch.equal(join(points.parts).latents, whole.latents)
        assert torch.equal(join(points.parts).outputs, whole.outputs)
    assert tried[0] == count and max(tried[1:]) <= 2 and size.value <= 2 and sum(tried[1:]) == count
