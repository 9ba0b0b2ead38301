"""Models in one file: the inverse of diffusers' conversion, what is refused, and the programs from end to end."""

import json
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import convert
import finetune
import generate
import main_text2image
import pytest
import torch
from conftest import tiny_pipeline
from huggingface_hub import snapshot_download
from original_vqdm import original_unet, save_original
from PIL import Image
from safetensors.torch import load_file, save_file
from single_file import write_single_file
from tiny_runs import command
from torch import nn
from transformers import CLIPTextModelWithProjection

import vqdm
from vqdm.cli import run_script
from vqdm.diffusion.model_folders import check_full_precision, check_supported
from vqdm.diffusion.pipelines import check_model, load_pipeline, stored_bytes, stored_dtypes
from vqdm.diffusion.single_files import configuration_folder
from vqdm.errors import UserError
from vqdm.storage.files import single_file_fingerprint
from vqdm.storage.hub import model_card

CPU = torch.device("cpu")
DEFAULTS = {
    "sdxl": "stabilityai/stable-diffusion-xl-base-1.0",
    "sd15": "stable-diffusion-v1-5/stable-diffusion-v1-5",
    "sd21": "stabilityai/stable-diffusion-2-1",
}


def sdxl_pipeline():
    """A tiny SDXL with text encoders of two widths: diffusers tells them apart by that."""
    pipeline = tiny_pipeline("sdxl")
    config = pipeline.text_encoder_2.config
    config.hidden_size, config.num_attention_heads = 48, 3
    unet = type(pipeline.unet).from_config(pipeline.unet.config, cross_attention_dim=32 + 48)
    torch.manual_seed(1)
    pipeline.register_modules(text_encoder_2=CLIPTextModelWithProjection(config), unet=unet)
    return pipeline


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, tuple[Path, Path]]:
    """Family → pipeline folder in float16, and its one file."""
    root, found = tmp_path_factory.mktemp("one-file"), {}
    for family in DEFAULTS:
        pipeline = sdxl_pipeline() if family == "sdxl" else tiny_pipeline(family)
        pipeline.to(torch.float16, silence_dtype_warnings=True).save_pretrained(root / family)
        found[family] = (root / family, write_single_file(root / family, root / f"{family}.safetensors", torch.float16))
    return found


def refusal(file: Path, config: Path | None = None, **settings) -> str:
    with pytest.raises(UserError) as caught:
        check_model(str(file), single_file_config=config and str(config), **settings)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("family", DEFAULTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_file_is_the_pipeline_that_its_folder_is(models, family, dtype, capfd):
    folder, file = models[family]
    capfd.readouterr()
    ours = load_pipeline(str(file), CPU, dtype, single_file_config=str(folder))
    captured = capfd.readouterr()
    assert "float32" not in captured.err and "not used" not in captured.err
    theirs = load_pipeline(str(folder), CPU, dtype)
    assert type(ours) is type(theirs) and ours.components.keys() == theirs.components.keys()
    for name, part in theirs.components.items():
        own = getattr(ours, name)
        assert type(own) is type(part)
        if isinstance(part, nn.Module):
            held = own.state_dict()
            assert held.keys() == part.state_dict().keys() and own.dtype == part.dtype and not own.training
            assert all(torch.equal(held[key], tensor) for key, tensor in part.state_dict().items())
    check_supported(str(file), None, True, single_file_config=str(folder))
    assert stored_dtypes(str(file), None) == stored_dtypes(str(folder), None)
    tensors = sum(tensor.nbytes for tensor in load_file(next(folder.glob("unet/*.safetensors"))).values())
    assert stored_bytes(str(file), None, "unet") == tensors


def test_the_configuration_needs_no_weights(models, tmp_path):
    folder, file = models["sd15"]
    shutil.copytree(folder, tmp_path / "c", ignore=shutil.ignore_patterns("*.safetensors"))
    load_pipeline(str(file), CPU, torch.float32, single_file_config=str(tmp_path / "c"))


@pytest.mark.parametrize("family", DEFAULTS)
def test_without_a_configuration_one_line_says_what_to_pass(models, family):
    line = refusal(models[family][1], local_files_only=True)
    assert f"whose configuration ({DEFAULTS[family]}) is not in the hub cache; pass --single_file_config with" in line


@pytest.mark.parametrize("family", DEFAULTS)
def test_the_configuration_of_the_hub_cache_is_used(models, family, tmp_path, monkeypatch):
    """Offline, diffusers itself would ask the hub; --revision is that of the configuration."""
    folder, file = models[family]
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    for name, branch in ((DEFAULTS[family], "main"), ("you/name", "other")):
        repository = tmp_path / f"models--{name.replace('/', '--')}"
        (repository / "refs").mkdir(parents=True)
        (repository / "refs" / branch).write_text("commit")
        kept = shutil.ignore_patterns("*.safetensors")
        shutil.copytree(folder, repository / "snapshots" / "commit", ignore=kept)
    load_pipeline(str(file), CPU, torch.float32, local_files_only=True)
    monkeypatch.setattr("vqdm.diffusion.single_files.snapshot_download", _recorded(asked := []))
    configuration_folder(str(file), None, "other", True)
    configuration_folder(str(file), "you/name", "other", True)
    assert [(name, revision) for name, revision in asked] == [(DEFAULTS[family], None), ("you/name", "other")]


def _recorded(asked: list):
    def download(name: str, revision: str | None, **settings) -> str:
        asked.append((name, revision))
        return snapshot_download(name, revision=revision, **settings)

    return download


def test_configurations_that_do_not_fit(models, tmp_path):
    (xl, xl_file), (sd, sd_file), (sd2, _) = models["sdxl"], models["sd15"], models["sd21"]
    assert "is a StableDiffusionXLPipeline, and MODEL" in refusal(sd_file, xl)
    assert "is a StableDiffusionPipeline, and MODEL" in refusal(xl_file, sd)
    assert "belongs to a MODEL in one .safetensors file, and" in refusal(sd, sd)
    assert "belongs to a MODEL in one .safetensors file, and" in refusal("you/name", sd)
    assert "has no model_index.json" in refusal(sd_file, sd / "unet")
    assert "is no folder; give a diffusers pipeline folder or a hub name" in refusal(sd_file, tmp_path / "none")
    assert "cannot be had from the hub" in refusal(sd_file, Path("you/name"))
    assert "is one file, without variants; leave --variant out" in refusal(sd_file, sd, variant="fp16")
    assert "--revision x is of a name on the hub, and MODEL" in refusal(sd, revision="x")
    assert f"MODEL {sd_file} is a file; leave it out" in refusal(sd_file, sd, revision="x")
    with pytest.raises(UserError, match="cannot be loaded"):
        load_pipeline(str(sd_file), CPU, torch.float32, single_file_config=str(sd2))

    def changed(name: str, **settings) -> Path:
        folder = tmp_path / f"changed-{len(list(tmp_path.iterdir()))}"
        shutil.copytree(sd, folder, ignore=shutil.ignore_patterns("*.safetensors"))
        config = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps(config | settings))
        return folder

    quantized = changed("unet/config.json", quantization_config={"quant_method": "vqdm"})
    assert "is of a quantized model (unet); give a full-precision one" in refusal(sd_file, quantized)
    huge = changed("vae/config.json", latent_channels=10**12)
    assert "which no model has" in refusal(sd_file, huge)
    deeper = changed("text_encoder/config.json", num_hidden_layers=3)
    with pytest.raises(UserError, match=r"its text_encoder lacks .*layers\.2\..*, which the configuration in"):
        load_pipeline(str(sd_file), CPU, torch.float32, single_file_config=str(deeper))
    tensors = load_file(sd_file) | {"model.diffusion_model.middle_block.9.x": torch.zeros(3, dtype=torch.float16)}
    save_file(tensors, tmp_path / "more.safetensors")
    with pytest.raises(UserError, match=r"its unet has \d+ values, and \d+ by the configuration"):
        load_pipeline(str(tmp_path / "more.safetensors"), CPU, torch.float32, single_file_config=str(sd))
    save_file(load_file(sd_file) | {"v_pred": torch.zeros(0)}, tmp_path / "v.safetensors")
    assert "predicts v, by its key v_pred, and the scheduler of" in refusal(tmp_path / "v.safetensors", sd)
    check_model(
        str(tmp_path / "v.safetensors"),
        single_file_config=str(changed("scheduler/scheduler_config.json", prediction_type="v_prediction")),
    )


OTHERS = {
    "kohya LoRA": (["lora_unet_x.lora_up.weight", "lora_te_x.alpha"], "a file of LoRA weights"),
    "diffusers LoRA": (["unet.down_blocks.0.x.lora.up.weight"], "a file of LoRA weights"),
    "peft LoRA": (["base_model.model.x.lora_A.weight"], "a file of LoRA weights"),
    "LoHa": (["x.hada_w1_a"], "a file of LoRA weights"),
    "LoKr": (["x.lokr_w1"], "a file of LoRA weights"),
    "VAE": (["encoder.conv_in.weight", "decoder.conv_in.weight", "quant_conv.weight"], "a file of a VAE alone"),
    "VAE below its prefix": (["first_stage_model.decoder.conv_in.weight"], "a file of a VAE alone"),
    "UNet": (["model.diffusion_model.input_blocks.0.0.weight"], "a file of a UNet alone"),
    "UNet of diffusers": (["conv_in.weight", "down_blocks.0.resnets.0.conv1.weight"], "a file of a UNet alone"),
    "UNet without prefix": (["input_blocks.0.0.weight"], "a file of a UNet alone"),
    "text encoder": (["text_model.embeddings.token_embedding.weight"], "a file of a text encoder alone"),
    "T5": (["encoder.block.0.layer.0.x", "shared.weight"], "a file of a text encoder alone"),
    "text encoder below its prefix": (["cond_stage_model.transformer.x"], "a file of a text encoder alone"),
    "FLUX": (
        ["model.diffusion_model.double_blocks.0.img_attn.norm.key_norm.scale"],
        "a file with another denoiser than a",
    ),
    "ControlNet": (["control_model.time_embed.0.weight"], "a file of a ControlNet alone"),
    "embedding": (["clip_g", "clip_l"], "a file of tensors of an unknown layout alone"),
    "nothing": ([], "a file of tensors of an unknown layout alone"),
}


@pytest.mark.parametrize(("names", "words"), OTHERS.values(), ids=OTHERS)
def test_files_of_a_part_are_recognized_by_their_keys(tmp_path, names, words):
    save_file({name: torch.zeros(1) for name in names}, tmp_path / "m.safetensors")
    assert f"m.safetensors is {words}" in refusal(tmp_path / "m.safetensors")


@pytest.mark.parametrize(
    ("left_out", "words"),
    [
        ("first_stage_model.", "without vae, not a whole model"),
        ("conditioner.embedders.0.", "without text_encoder, not a whole model"),
        ("conditioner.embedders.1.", "without text encoders in the layout of A1111"),
        ("model.diffusion_model.", "without unet, not a whole model"),
        ("model.diffusion_model.input_blocks.0.", "with another denoiser than a UNet"),
        ("conditioner.embedders.0.transformer.text_model.embeddings.", "without text encoders in the layout of A1111"),
    ],
)
def test_files_that_lack_a_part(models, tmp_path, left_out, words):
    """diffusers would take it from the folder of the configuration."""
    folder, file = models["sdxl"]
    tensors = {name: tensor for name, tensor in load_file(file).items() if not name.startswith(left_out)}
    save_file(tensors, tmp_path / "m.safetensors")
    assert f"is a file {words}" in refusal(tmp_path / "m.safetensors", folder)


def test_text_encoders_of_one_width(tmp_path):
    tiny_pipeline("sdxl").save_pretrained(tmp_path)
    file = write_single_file(tmp_path, tmp_path / "m.safetensors")
    assert "two text encoders of one width, which diffusers confuses" in refusal(file)


@pytest.mark.parametrize("suffix", [".ckpt", ".pt", ".pth", ".bin", ".CKPT"])
def test_pickles_come_with_the_command_that_converts_them(models, tmp_path, suffix):
    file = tmp_path / f"my model's{suffix}"
    tensors = load_file(models["sd15"][1])
    torch.save({"state_dict": tensors, "epoch": 3}, file)
    line = refusal(file)
    assert "is a pickle, which can run code; convert it to .safetensors: python -c " in line
    if suffix == ".ckpt":
        words = shlex.split(line.partition(".safetensors: ")[2])
        subprocess.run([sys.executable, *words[1:]], check=True, timeout=120)
        assert load_file(file.with_suffix(".safetensors")).keys() == tensors.keys()


def test_other_and_damaged_files(models, tmp_path):
    (tmp_path / "m.gguf").touch()
    assert "is a GGUF file, which holds a quantized model" in refusal(tmp_path / "m.gguf")
    (tmp_path / "model_index.json").write_text("{}")
    assert "is a file; give a diffusers pipeline folder" in refusal(tmp_path / "model_index.json")
    (tmp_path / "m.safetensors").write_bytes(models["sd15"][1].read_bytes()[:-9])
    assert "m.safetensors is damaged or not a safetensors file" in refusal(tmp_path / "m.safetensors")


def test_what_cannot_be_calibrated_is_refused_before_loading(models, tmp_path):
    folder, file = models["sd15"]
    first, tensors = "model.diffusion_model.input_blocks.0.0.weight", load_file(file)
    save_file(tensors | {first: torch.zeros(16, 9, 3, 3)}, tmp_path / "inpainting.safetensors")
    with pytest.raises(UserError, match="its UNet takes 9 channels and the VAE gives 4"):
        check_supported(str(tmp_path / "inpainting.safetensors"), None, True, single_file_config=str(folder))
    save_file(tensors | {first: tensors[first].to(torch.float8_e4m3fn)}, tmp_path / "float8.safetensors")
    with pytest.raises(UserError, match=r"is quantized itself \(F8_E4M3\)"):
        check_full_precision(str(tmp_path / "float8.safetensors"), None, True)


def test_the_fingerprint_is_of_the_file_and_its_configuration(models, tmp_path):
    folder, file = models["sd15"]
    copy = shutil.copytree(folder, tmp_path / "c", ignore=shutil.ignore_patterns("*.safetensors"))
    first = single_file_fingerprint(file, folder)
    assert single_file_fingerprint(file, copy) == first
    (copy / "scheduler" / "scheduler_config.json").write_text("{}")
    assert single_file_fingerprint(file, copy) != first
    tensors = load_file(file)
    save_file({name: tensor + 1 for name, tensor in tensors.items()}, tmp_path / "m.safetensors")
    assert single_file_fingerprint(tmp_path / "m.safetensors", folder) != first


def test_the_card_is_named_after_the_file(tmp_path):
    (tmp_path / "my model.safetensors").touch()
    figures = dict.fromkeys(("effective_bits_layers", "effective_bits_unet", "unet_output_error_db"), 1.0)
    figures |= {"layers_quantized": 1, "layers_in_8_bit": 0, "bytes_of_unet": 1, "images": {"psnr_db": 1.0, "count": 1}}
    card = model_card(str(tmp_path / "my model.safetensors"), figures)
    assert "# my model, its UNet at" in card and "base_model" not in card


# ------------------------------------------------------------------------------------------- the programs


TUNING = shlex.split(
    "--finetune_nsamples 6 --held_out_nsamples 2 --held_out_points 4 --evaluation_nsamples 2 --visualize_nsamples 2 "
    "--num_inference_steps 2 --xtx_batch_size 3 --finetune_batch_size 4 --local_batch_size 2 --finetune_max_epochs 1"
)


def same_tensors(first: Path, second: Path) -> None:
    ours, theirs = load_file(first), load_file(second)
    assert ours.keys() == theirs.keys()
    assert all(ours[key].dtype == theirs[key].dtype and torch.equal(ours[key], theirs[key]) for key in theirs)


def pixels(folder: Path) -> list[bytes]:
    return [Image.open(file).tobytes() for file in sorted(folder.glob("*.png"))]


def test_the_programs_give_the_same_from_a_file_as_from_its_folder(models, prompt_file, tmp_path, capsys):
    folder, file = models["sd15"]
    given = {"folder": [str(folder)], "file": [str(file), "--single_file_config", str(folder)]}
    for name, (model, *flags) in given.items():
        out = tmp_path / name
        assert run_script(main_text2image.main, command(model, prompt_file, out, *flags)) == 0
        printed = capsys.readouterr().out
        assert all(flag in printed for flag in flags)  # of the command that generates images
        assert run_script(main_text2image.main, command(model, prompt_file, out, *flags, "--resume")) == 0
        shown = [str(prompt_file), "--num_inference_steps", "2", "--limit", "2"]
        for source in ([model, str(out), *shown], [model, *shown, "--teacher"]):
            images = tmp_path / f"{name}-images-{source[-1].strip('-')}"
            arguments = [*source, *flags, "--output_dir", str(images)]
            assert run_script(generate.main, arguments) == 0
            assert run_script(generate.main, [*arguments, "--resume"]) == 0
    for part in ("unet", "vae", "text_encoder"):
        same_tensors(*(next((tmp_path / name / part).glob("*.safetensors")) for name in given))
    for images in tmp_path.glob("file-images-*"):
        assert pixels(images) and pixels(images) == pixels(tmp_path / images.name.replace("file", "folder"))
    ours, theirs = (json.loads((tmp_path / name / "summary.json").read_text()) for name in ("file", "folder"))
    assert ours["unet_output_error_db"] == theirs["unet_output_error_db"]
    assert 0 < theirs["bytes_of_original_unet"] - ours["bytes_of_original_unet"] < 40_000  # the header
    run = json.loads((tmp_path / "file-images-teacher" / "run.json").read_text())
    assert run["settings"]["model_sha256"] == single_file_fingerprint(file, folder) and run["model_commit"] is None


def test_fine_tuning_and_converting_take_a_file_too(models, prompt_file, tmp_path, capsys):
    """The other components beside a UNet that is alone are MODEL's."""
    folder, file = models["sd15"]
    torch.manual_seed(0)
    unet = original_unet({"mid_block.resnets.0.conv1": {}, "mid_block.attentions.0.proj_in": {}}, "sd15")
    pickle = save_original(unet, tmp_path / "unet.pickle")
    given = {"folder": [str(folder)], "file": [str(file), "--single_file_config", str(folder)]}
    for name, (model, *flags) in given.items():
        out = ["--output_dir", str(tmp_path / f"converted-{name}")]
        arguments = ["pickle", str(pickle), "--model", model, *flags, "--trust_pickle", *out]
        assert run_script(convert.main, arguments) == 0
        shutil.copytree(tmp_path / f"converted-{name}" / "unet", tmp_path / f"alone-{name}")
        out = ["--output_dir", str(tmp_path / f"tuned-{name}")]
        prompts = [str(prompt_file), str(prompt_file)]
        arguments = [model, str(tmp_path / f"alone-{name}"), *prompts, *flags, *TUNING, *out]
        assert run_script(finetune.main, arguments) == 0, capsys.readouterr().err
        assert run_script(finetune.main, [*arguments, "--resume"]) == 0
    for kind in ("converted", "tuned"):
        for part in ("unet", "vae", "text_encoder"):
            same_tensors(*(next((tmp_path / f"{kind}-{name}" / part).glob("*.safetensors")) for name in given))


def with_bins(folder: Path, copy: Path, legacy: bool) -> Path:
    """A copy of a pipeline folder whose weights are pickled."""
    shutil.copytree(folder, copy)
    for part in ("unet", "vae", "text_encoder"):
        file = next((copy / part).glob("*.safetensors"))
        name = file.stem if part != "text_encoder" else f"pytorch_{file.stem}"
        torch.save(load_file(file), file.with_name(f"{name}.bin"), _use_new_zipfile_serialization=not legacy)
        file.unlink()
    return copy


@pytest.mark.parametrize("legacy", [False, True])
def test_a_folder_of_bin_files_is_as_good(models, tmp_path, capfd, legacy):
    """Also of the files that torch wrote before 1.6, which cannot be mapped."""
    folder, _ = models["sd15"]
    bins = with_bins(folder, tmp_path / "bins", legacy)
    assert stored_dtypes(str(bins), None) == stored_dtypes(str(folder), None)
    capfd.readouterr()
    ours, theirs = (load_pipeline(str(model), CPU, torch.float32) for model in (bins, folder))
    assert "unsafe" not in capfd.readouterr().err
    for part in ("unet", "vae", "text_encoder"):
        held = getattr(ours, part).state_dict()
        assert all(torch.equal(held[key], one) for key, one in getattr(theirs, part).state_dict().items())


def test_the_programs_take_a_folder_of_bin_files(models, prompt_file, tmp_path, capsys):
    bins = with_bins(models["sd15"][0], tmp_path / "bins", False)
    for dry in (["--dry_run"], []):
        assert run_script(main_text2image.main, command(bins, prompt_file, tmp_path / "out", *dry)) == 0
    line = "bins: text_encoder, unet, vae: .bin files are read, as tensors only"
    assert line in "".join(capsys.readouterr())
    shown = [str(bins), str(tmp_path / "out"), str(prompt_file), "--num_inference_steps", "2", "--limit", "2"]
    assert run_script(generate.main, [*shown, "--output_dir", str(tmp_path / "images")]) == 0
    assert line in "".join(capsys.readouterr())


def test_the_python_call_takes_a_file(models, tmp_path):
    folder, file = models["sdxl"]
    settings = {"dry_run": True, "output_dir": tmp_path / "out", "evaluation_prompts": ["b"] * 2}
    pipeline, report = vqdm.quantize(file, ["a"] * 4, single_file_config=str(folder), **settings)
    assert report is None and pipeline.unet.config.cross_attention_dim == 80
    with pytest.raises(UserError, match="single_file_config belongs to a path; the pipeline is loaded already"):
        vqdm.quantize(pipeline, ["a"] * 4, single_file_config=str(folder), **settings)


def test_every_program_refuses_in_one_line(models, prompt_file, tmp_path, capsys):
    lora = tmp_path / "lora.safetensors"
    save_file({"lora_unet_x.lora_up.weight": torch.zeros(1)}, lora)
    (tmp_path / "pickle").touch()
    words = [str(prompt_file), "--output_dir", str(tmp_path / "out")]
    runs = [
        (main_text2image.main, command(lora, prompt_file, tmp_path / "out")),
        (finetune.main, [str(lora), str(models["sd15"][0]), str(prompt_file), *words, *TUNING]),
        (generate.main, [str(lora), *words]),
        (convert.main, ["pickle", str(tmp_path / "pickle"), "--model", str(lora), "--trust_pickle", *words[1:]]),
    ]
    for main, arguments in runs:
        assert run_script(main, arguments) == 2
        captured = capsys.readouterr()
        assert "lora.safetensors is a file of LoRA weights" in captured.err and captured.err.count("\n") == 1
