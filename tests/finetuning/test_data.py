"""Datasets: sets of prompts, folders of captioned images, and points made from images."""

import json

import finetune
import pytest
import recorded
import tiny_students
import torch
from conftest import tiny_pipeline
from diffusers import DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler, VQDiffusionScheduler
from PIL import ExifTags, Image

from vqdm import images
from vqdm.devices import BatchSize
from vqdm.diffusion.pipelines import load_pipeline
from vqdm.diffusion.sampling import generate_images
from vqdm.diffusion.trajectories import Trajectories, join
from vqdm.errors import RunError, UserError
from vqdm.finetuning.config import OptimizerConfig
from vqdm.finetuning.data import (
    CaptionedImage,
    Chunk,
    Point,
    Points,
    bin_of,
    check_scheduler,
    divided,
    encode_images,
    load_captioned_images,
    load_datasets,
    noised_images,
    record_points,
    reshuffled,
    sample_points,
    shuffled,
    split_held_out,
    spread,
    timestep_weights,
    with_denoiser,
)
from vqdm.finetuning.trainer import trainable

FEW = (
    "--finetune_nsamples",
    "6",
    "--held_out_nsamples",
    "4",
    "--evaluation_nsamples",
    "3",
    "--visualize_nsamples",
    "2",
)


def test_prompts_that_are_evaluated_on_are_neither_trained_on_nor_held_out(prompt_file, tmp_path, caplog):
    """Also where both files are one; a prompt that is in the file twice is not trained on where it is held out."""
    prompts = prompt_file.read_text().splitlines()
    twice = tmp_path / "twice.txt"
    twice.write_text("\n".join([*prompts, *prompts]))
    words = ["model", "quantized", str(twice), str(prompt_file), *FEW]
    with caplog.at_level("INFO"):
        datasets = load_datasets(finetune.PARSER.parse(words))
    parts = [set(datasets.training), set(datasets.held_out), set(datasets.evaluation)]
    assert len(parts[2]) == 3 and parts[0] and parts[1]
    assert not (parts[0] & parts[1] or parts[0] & parts[2] or parts[1] & parts[2])
    assert "holds 18 prompts besides 6 evaluation prompts; evaluation prompts are neither trained on" in caplog.text


def test_prompts_repeat_only_after_all_were_used():
    items = list("abcdefg")
    row = reshuffled(items, 0, 21, "seed")
    assert [sorted(row[k : k + 7]) for k in (0, 7, 14)] == [items] * 3 and row[:7] != row[7:14]
    assert [reshuffled(items, k, 3, "seed") for k in range(18)] == [row[k : k + 3] for k in range(18)]
    assert reshuffled(items, 0, 7, "other") != row[:7]


@pytest.fixture
def folder(tmp_path):
    for k in range(2):
        Image.new("RGB", (16, 24), (100 * k, 50, 200)).save(tmp_path / f"{k}.png")
    return tmp_path


def test_captions_from_each_kind_of_file(folder):
    wanted = [CaptionedImage(folder / f"{k}.png", f"image {k}") for k in range(2)]
    for k in range(2):
        (folder / f"{k}.txt").write_text(f"image {k}\n")
    assert load_captioned_images(str(folder)) == wanted
    rows = [{"file": f"{k}.png", "prompt": f"generated {k}"} for k in range(2)]
    (folder / "manifest.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert [image.caption for image in load_captioned_images(str(folder))] == ["generated 0", "generated 1"]
    (folder / "metadata.csv").write_text("file_name,text\n1.png,second\n0.png,first\n")
    assert [image.caption for image in load_captioned_images(str(folder))] == ["first", "second"]


def test_folders_that_do_not_serve(folder):
    with pytest.raises(UserError, match="is not a folder"):
        load_captioned_images(str(folder / "none"))
    with pytest.raises(UserError, match="holds no image with a caption"):
        load_captioned_images(str(folder))
    (folder / "metadata.csv").write_text("file_name,text\n9.png,ninth\n")
    with pytest.raises(UserError, match=r"9\.png: not found"):
        load_captioned_images(str(folder))


def left_out(caplog, folder) -> str:
    """Load a folder; returns the one line of the log about what is left out."""
    caplog.clear()
    load_captioned_images(str(folder))
    (line,) = caplog.messages
    assert line.startswith(f"--real_images: {folder}: ")
    return line


def test_images_that_are_left_out_are_counted_and_named(folder, caplog):
    (folder / "0.txt").write_text("a star")
    assert "left out, without a caption in a .txt file of its name: 1 .png (the first is '1.png')" in left_out(
        caplog, folder
    )
    (folder / "1.txt").write_text(" \n")  # empty
    (folder / "2.heic").write_bytes(b"")
    (folder / ".3.jpg").write_bytes(b"")
    line = left_out(caplog, folder)
    assert "without a caption" in line and "hidden: 1 .jpg" in line
    assert "in formats that are not read: 1 .heic (the first is '2.heic')" in line
    (folder / "metadata.csv").write_text("file_name,text\n1.png,second\n")
    assert "without a caption in metadata.csv: 1 .png (the first is '0.png')" in left_out(caplog, folder)


def test_images_that_generate_marked_are_not_trained_on(folder, caplog):
    rows = [{"file": f"{k}.png", "prompt": "a star", "problem": problem} for k, problem in enumerate([None, "nan"])]
    (folder / "manifest.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert "left out, black, NaN or replaced by a safety checker: 1 .png (the first is '1.png')" in left_out(
        caplog, folder
    )
    assert [image.file.name for image in load_captioned_images(str(folder))] == ["0.png"]


def test_links_that_are_not_followed_are_counted(folder, caplog):
    for k in range(2):
        (folder / f"{k}.txt").write_text("a star")
    (folder / "more").symlink_to(folder.parent)
    (folder / "2.png").symlink_to("nothing.png")
    assert "not followed: 1 .png, 1 without an ending (the first is '2.png')" in left_out(caplog, folder)


def test_a_photograph_is_trained_on_upright(tmp_path, pipelines):
    image = Image.new("RGB", (64, 64), "red")
    image.paste("blue", (0, 0, 64, 32))
    image.save(tmp_path / "upright.png")
    image.getexif()[ExifTags.Base.Orientation] = 3  # upside down
    image.rotate(180).save(tmp_path / "turned.png", exif=image.getexif())
    pipeline = load_pipeline(str(pipelines["sdxl"]), torch.device("cpu"), torch.float32)
    upright, turned = encode_images(pipeline, [tmp_path / "upright.png", tmp_path / "turned.png"], {})
    torch.testing.assert_close(upright, turned)


def test_nothing_is_logged_of_a_folder_that_is_used_whole(folder, caplog):
    rows = [{"file": f"{k}.png", "prompt": "a star"} for k in range(2)]
    (folder / "manifest.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "run.json").write_text("{}")
    (folder / "grids").mkdir()
    Image.new("RGB", (8, 8)).save(folder / "grids" / "0.png")  # a sheet that generate.py adds
    assert len(load_captioned_images(str(folder))) == 2 and not caplog.messages


def test_images_in_folders_below_are_used(folder, caplog):
    (folder / "concept").mkdir()
    (folder / "0.png").rename(folder / "concept" / "0.png")
    for name in ("1", "concept/0"):
        (folder / f"{name}.txt").write_text("a star")
    found = load_captioned_images(str(folder))
    assert [image.file for image in found] == [folder / "1.png", folder / "concept" / "0.png"] and not caplog.messages


@pytest.mark.parametrize("suffix", images.SUFFIXES)
def test_every_readable_format_is_used(suffix, tmp_path):
    kind = next(kind for kind in images.FORMATS if suffix in images.KINDS[kind])
    Image.new("L" if suffix in (".pgm", ".pbm") else "RGB", (8, 8)).save(tmp_path / f"a{suffix.upper()}", format=kind)
    (tmp_path / "a.txt").write_text("a star")
    (found,) = load_captioned_images(str(tmp_path))
    images.read_image(found.file)


def test_a_caption_that_is_not_text_is_named(folder):
    (folder / "0.txt").write_bytes(b"caf\xe9")
    with pytest.raises(UserError, match=r"0\.txt cannot be read: line 1: byte 0xe9 is not UTF-8; save it as UTF-8"):
        load_captioned_images(str(folder))


def test_a_row_without_a_file_name_is_named(folder):
    (folder / "metadata.jsonl").write_text('{"file_name": "0.png", "text": "a"}\n{"text": "b"}\n')
    with pytest.raises(UserError, match=r"metadata\.jsonl, line 2: no file_name"):
        load_captioned_images(str(folder))


@pytest.mark.parametrize("content", [b"", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 1 1\n", b"no image"])
def test_a_file_that_is_no_image_is_refused_before_work_starts(content, folder):
    (folder / "1.png").write_bytes(content)
    (folder / "1.txt").write_text("a star")
    with pytest.raises(UserError, match=r"^--real_images: .*1\.png cannot be read: .*; allowed are") as found:
        load_captioned_images(str(folder))
    assert "\n" not in str(found.value)


def test_an_image_that_is_cut_off_is_named(folder, pipelines):
    data = (folder / "1.png").read_bytes()
    (folder / "1.png").write_bytes(data[: len(data) // 2])
    pipeline = load_pipeline(str(pipelines["sdxl"]), torch.device("cpu"), torch.float32)
    with pytest.raises(RunError, match=r"^--real_images: .*1\.png cannot be read: .*$"):
        encode_images(pipeline, [folder / "1.png"], {})


def test_noise_is_mixed_in_as_the_scheduler_does(folder, pipelines):
    """The Euler scheduler adds noise to a growing variance and scales it back for the UNet."""
    pipeline = load_pipeline(str(pipelines["sdxl"]), torch.device("cpu"), torch.float32)
    found_images = [CaptionedImage(folder / f"{k}.png", f"image {k}") for k in range(2)]
    settings = {"num_inference_steps": 3, "guidance_scale": 5.0}
    found = noised_images(pipeline, found_images, 7, settings)
    latents = encode_images(pipeline, [image.file for image in found_images], settings)
    scheduler = pipeline.scheduler
    scheduler.set_timesteps(3)
    assert torch.equal(found.timesteps, scheduler.timesteps.float())
    for n in range(2):
        noise = torch.randn(3, *latents.shape[1:], generator=torch.Generator().manual_seed(7 + n))
        for s, t in enumerate(scheduler.timesteps):
            scheduler._step_index = scheduler._begin_index = None
            noisy = scheduler.add_noise(latents[n : n + 1], noise[s : s + 1], t[None])
            wanted = scheduler.scale_model_input(noisy, t)[0]
            torch.testing.assert_close(recorded.latents(found)[n, s], wanted, rtol=1e-3, atol=1e-3)
    assert recorded.conditioning(found, "encoder_hidden_states").shape[:2] == (2, 2)
    assert not pipeline.unet._forward_hooks


@pytest.mark.parametrize(
    ("scheduler", "words"),
    [
        (FlowMatchEulerDiscreteScheduler(), "FlowMatchEulerDiscreteScheduler is of flow matching; allowed are teacher"),
        (DPMSolverMultistepScheduler(use_flow_sigmas=True), "DPMSolverMultistepScheduler is of flow matching"),
        (VQDiffusionScheduler(num_vec_classes=4), "VQDiffusionScheduler lacks it"),
    ],
)
def test_images_are_noised_for_schedulers_of_diffusion_alone(scheduler, words):
    """Sana's scheduler has alphas_cumprod too, with which it does not sample."""
    with pytest.raises(UserError, match=rf"^--finetune_method .*{words}") as found:
        check_scheduler(scheduler)
    assert "\n" not in str(found.value)
    check_scheduler(DPMSolverMultistepScheduler())


def two_parts() -> Points:
    whole = tiny_students.points(tiny_students.teacher(), prompts=3, steps=4).parts[0]
    return Points([recorded.some(whole, part) for part in (slice(0, 2), slice(2, 3))])


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
    points.parts[1] = recorded.without_outputs(points.parts[1])
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
    points = Points([recorded.made(latents, torch.arange(float(steps)))])
    training, held_out = split_held_out(points)
    assert sorted(training + held_out) == points.all() and training and held_out
    assert {point.prompt for point in held_out} == wanted
    assert prompts == 1 or not wanted & {point.prompt for point in training}


def test_a_single_point_is_trained_and_evaluated_on():
    points = Points([recorded.made(torch.zeros(1, 1, 1, 1, 1), torch.zeros(1))])
    assert split_held_out(points) == ([Point(0, 0, 0)], [Point(0, 0, 0)])


def test_a_spread_does_not_depend_on_how_trajectories_are_batched():
    whole = join(two_parts().parts)

    chosen = [[(n, s) for _, n, s in spread(Points([whole]), 6)]]
    for size in (1, 2):
        parts = Points([recorded.some(whole, slice(k, k + size)) for k in range(0, 3, size)])
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
    with with_denoiser(pipeline, student):
        assert pipeline.unet is student
        assert len(generate_images(pipeline, ["a red circle"], 0, SETTINGS, 1)) == 1
    for hook in hooks:
        hook.remove()
    assert seen == {"student": True, "text": False, "vae": False}
    assert pipeline.unet is own and "forward" not in vars(student)


def test_points_have_the_type_of_the_pipeline(pipeline, student):
    for unet in (pipeline.unet, student):
        points = sample_points(pipeline, unet, ["a red circle", "a star"], 0, SETTINGS, True)
        assert recorded.latents(points).dtype == recorded.outputs(points).dtype == torch.bfloat16
        assert "forward" not in vars(unet)


def test_points_are_recorded_in_halves_where_memory_ends(tmp_path):
    """Chunk by chunk, in their order, and what is recorded once is kept."""
    whole, tried = join(two_parts().parts), []

    def record(chunk: Chunk) -> Trajectories:
        tried.append(chunk.count)
        if chunk.count > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return recorded.some(whole, slice(chunk.first, chunk.first + chunk.count))

    count, size = whole.shape[0], BatchSize(whole.shape[0])
    assert count > 2
    for _ in range(2):
        points = record_points(tmp_path, [Chunk("teacher", 0, count)], size, record, tiny_students.ALONE)
        assert torch.equal(recorded.latents(join(points.parts)), recorded.latents(whole))
        assert torch.equal(recorded.outputs(join(points.parts)), recorded.outputs(whole))
    assert tried[0] == count and max(tried[1:]) <= 2 and size.value <= 2 and sum(tried[1:]) == count
