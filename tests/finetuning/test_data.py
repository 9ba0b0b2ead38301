"""Datasets: sets of prompts, folders of captioned images, and points made from images."""

import json

import finetune
import pytest
import torch
from PIL import ExifTags, Image

from vqdm import images
from vqdm.diffusion.pipelines import load_pipeline
from vqdm.errors import RunError, UserError
from vqdm.finetuning.data import (
    CaptionedImage,
    encode_images,
    load_captioned_images,
    load_datasets,
    noised_images,
    reshuffled,
)

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
            torch.testing.assert_close(found.latents[n, s], wanted, rtol=1e-3, atol=1e-3)
    assert found.conditioning["encoder_hidden_states"].shape[:2] == (2, 2)
    assert not pipeline.unet._forward_hooks
