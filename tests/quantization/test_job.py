import json
import signal
import subprocess
import sys
import time
from functools import wraps
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import tiny_unet
from diffusers import DiffusionPipeline, UNet2DConditionModel
from main_text2image import PARSER, main
from PIL import Image
from safetensors.torch import load_file
from settings_read import settings_read, undeclared
from tiny_runs import command, file_hashes

from vqdm.additive.code import CodeSpec
from vqdm.cli import run_script
from vqdm.diffusion.blocks import select_layers
from vqdm.diffusion.hessians import HessianStore
from vqdm.layers.int8 import int8_layers, quantize_int8
from vqdm.layers.quantized import quantized_layers
from vqdm.quantization import block as solving
from vqdm.quantization.config import QuantizeConfig
from vqdm.quantization.recording import hessian_settings
from vqdm.storage.run_folder import RunFolder

LAYERS = len(select_layers(tiny_unet("sdxl"), "default", 0, CodeSpec(2, 4, 4), {}))


@pytest.fixture(scope="module")
def read() -> set[str]:
    """Settings that the finished run has read."""
    return set()


@pytest.fixture(scope="module")
def finished(pipelines, prompt_file, tmp_path_factory, read) -> Path:
    """One whole run over the attention of a tiny SDXL pipeline."""
    out = tmp_path_factory.mktemp("quantized") / "out"
    with settings_read(QuantizeConfig, read):
        assert run_script(main, command(pipelines["sdxl"], prompt_file, out)) == 0
    return out


def test_a_setting_that_additive_codes_ignore_says_so(finished, read, pipelines, prompt_file):
    assert not undeclared(PARSER, command(pipelines["sdxl"], prompt_file, finished), read)


def test_result_is_a_pipeline_that_stock_diffusers_loads(finished):
    pipeline = DiffusionPipeline.from_pretrained(finished)
    assert len(quantized_layers(pipeline.unet)) == LAYERS
    image = pipeline("a red circle", num_inference_steps=2, output_type="np").images
    assert image.shape == (1, 16, 16, 3)
    assert not (finished / "work").exists()


def test_summary_counts_what_is_on_disk(finished):
    summary = json.loads((finished / "summary.json").read_text())
    files = list(finished.glob("unet/*.safetensors"))
    size = sum(path.stat().st_size for path in files)
    assert summary["bytes_of_unet"] == size
    pipeline = DiffusionPipeline.from_pretrained(finished)
    layers = quantized_layers(pipeline.unet)
    weights = sum(layer._rows * layer._columns for layer in layers.values())
    bits = sum(layer.stored_bits for layer in layers.values())
    assert summary["effective_bits_layers"] == pytest.approx(bits / weights)
    header = int.from_bytes(files[0].read_bytes()[:8], "little") + 8
    parameters = sum(p.numel() for p in DiffusionPipeline.from_pretrained(summary["model"]).unet.parameters())
    assert summary["effective_bits_unet"] == pytest.approx(8 * (size - header) / parameters)
    assert summary["unet_output_error_db"] < -5
    spread = summary["unet_output_error_db_by_point"]
    assert spread["median"] < spread["95%"] < spread["worst"] and spread["median"] < -5
    assert summary["images"]["count"] == 3 and summary["images"]["psnr_db"] > 10
    assert {"seconds", "peak_memory_bytes", "versions", "command"} <= summary.keys()


def test_every_layer_has_a_line_and_a_held_out_error(finished):
    rows = [json.loads(line) for line in (finished / "layers.jsonl").read_text().splitlines()]
    assert len(rows) == len({row["name"] for row in rows}) == LAYERS
    assert all(0 <= row["error"] < 1 and row["held_out_error"] > 0 for row in rows)


def test_pairs_and_card_are_there(finished):
    with Image.open(finished / "image_pairs.png") as sheet:
        assert sheet.width > 2 * 128 and len(sheet.convert("RGB").getcolors(10**6)) > 10
    card = (finished / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: diffusers") and "import vqdm" in card


def test_finished_run_is_not_done_again(finished, pipelines, prompt_file):
    before = {path: path.stat().st_mtime_ns for path in finished.rglob("*")}
    assert run_script(main, command(pipelines["sdxl"], prompt_file, finished, "--resume")) == 0
    assert {path: path.stat().st_mtime_ns for path in finished.rglob("*")} == before


def test_killed_anywhere_it_resumes_to_the_same_bytes(finished, pipelines, prompt_file, tmp_path):
    out = tmp_path / "out"
    line = [sys.executable, "main_text2image.py", *command(pipelines["sdxl"], prompt_file, out, "--resume")]
    for wanted in (1, 20):
        child = subprocess.Popen(line, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while child.poll() is None and len(list(out.glob("work/layers/*.safetensors"))) < wanted:
            time.sleep(0.02)
        child.send_signal(signal.SIGKILL)
        child.wait()
        assert child.returncode == -signal.SIGKILL and not (out / "summary.json").exists()
    (out / "layers.jsonl").write_text((out / "layers.jsonl").read_text()[:-7])
    assert run_script(main, command(pipelines["sdxl"], prompt_file, out, "--resume")) == 0
    assert file_hashes(out) == file_hashes(finished)
    assert len((out / "layers.jsonl").read_text().splitlines()) == LAYERS


@pytest.mark.parametrize("family", ["turbo", "sd15", "sd21"])
def test_other_families(pipelines, prompt_file, tmp_path, family):
    extra = ["--layer_filter", r".*attn1\.to_q|mid_block.*conv1"]
    extra += ["--guidance_scale", "0"] if family == "turbo" else []
    assert run_script(main, command(pipelines[family], prompt_file, tmp_path / "out", *extra)) == 0
    pipeline = DiffusionPipeline.from_pretrained(tmp_path / "out")
    assert quantized_layers(pipeline.unet)


def test_the_first_and_last_convolution_may_be_quantized(pipelines, prompt_file, tmp_path):
    extra = ["--layer_filter", r"conv_in|conv_out|mid_block.*attn1\.to_q"]
    assert run_script(main, command(pipelines["sdxl"], prompt_file, tmp_path / "out", *extra)) == 0
    assert json.loads((tmp_path / "out" / "summary.json").read_text())["layers_quantized"] == 3


def test_a_run_is_resumed_with_less_memory(finished, pipelines, prompt_file, tmp_path, monkeypatch):
    """It keeps what is recorded, and its result is that of one go but for rounding."""
    out, kept = tmp_path / "out", []
    begin = [
        "--share_codebooks",
        "unet",
        "--layer_filter",
        r".*(attn1\.to_q|conv1)",
    ]
    whole = tmp_path / "whole"
    assert run_script(main, command(pipelines["sdxl"], prompt_file, whole, *begin)) == 0
    save = solving.save_layer

    def killed(job, layer, *result):
        if len(kept) == 3:
            raise KeyboardInterrupt
        kept.append(layer.name)
        return save(job, layer, *result)

    monkeypatch.setattr(solving, "save_layer", killed)
    assert run_script(main, command(pipelines["sdxl"], prompt_file, out, *begin)) == 130
    monkeypatch.setattr(solving, "save_layer", save)
    recorded = sorted(path.name for path in out.glob("work/calibration/*"))
    (out / "work" / "calibration" / recorded[-1]).unlink()
    (out / "work" / "hessians" / "hessians.json").unlink()
    less = ["--xtx_batch_size", "2", "--hessian_memory_gb", "0.00005", "--visualize_nsamples", "1", "--resume"]
    assert run_script(main, command(pipelines["sdxl"], prompt_file, out, *begin, *less)) == 0
    one, other = (json.loads((path / "summary.json").read_text()) for path in (whole, out))
    assert other["unet_output_error_db"] == pytest.approx(one["unet_output_error_db"], abs=0.3)
    for before, after in zip(one["layers"], other["layers"], strict=True):
        assert after["name"] == before["name"] and after["error"] == pytest.approx(before["error"], rel=0.02)
    changed = [*less, "--hessian_samples_per_input", "3"]
    assert run_script(main, command(pipelines["sdxl"], prompt_file, out, *begin, *changed)) == 2


def test_out_of_memory_halves_every_batch(finished, pipelines, prompt_file, tmp_path, monkeypatch, capsys):
    """While sampling, recording Hessians and evaluating; the result is that of one go but for rounding."""
    forward = UNet2DConditionModel.forward

    @wraps(forward)  # the recorder of calls reads its signature
    def limited(unet, sample, *args, **kwargs):
        if len(sample) > 4:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(unet, sample, *args, **kwargs)

    monkeypatch.setattr(UNet2DConditionModel, "forward", limited)
    out = tmp_path / "out"
    assert run_script(main, command(pipelines["sdxl"], prompt_file, out)) == 0
    assert capsys.readouterr().out.count("out of memory at batch size") == 1  # of 3 evaluation prompts, for good
    one, other = (json.loads((path / "summary.json").read_text()) for path in (finished, out))
    assert other["unet_output_error_db"] == pytest.approx(one["unet_output_error_db"], abs=1)
    for before, after in zip(one["layers"], other["layers"], strict=True):
        if before["block"] == one["layers"][0]["block"]:  # later ones see what rounding changed
            assert after["error"] == pytest.approx(before["error"], rel=0.02)


@pytest.mark.parametrize("cached", [True, False])
def test_the_disk_that_all_hessians_take_is_checked(pipelines, prompt_file, tmp_path, monkeypatch, capsys, cached):
    """And predicted to the byte but for headers. What a cache holds is not counted again."""
    few, out = ["--layer_filter", r"mid_block.*(attn1|conv1)", "--calibration_nsamples", "10"], tmp_path / "out"
    few += ["--hessian_cache", str(tmp_path / "cache")] if cached else ["--share_codebooks", "unet"]
    words = command(pipelines["sdxl"], prompt_file, out, *few)
    needs, opened = [], RunFolder.open

    def watched(folder, settings, versions, resume, need_bytes):
        needs.append(need_bytes)
        return opened(folder, settings, versions, resume, need_bytes)

    monkeypatch.setattr(RunFolder, "open", watched)
    sizes = []
    monkeypatch.setattr(HessianStore, "enter", entered(sizes))
    assert run_script(main, words) == 0
    assert run_script(main, command(pipelines["sdxl"], prompt_file, tmp_path / "again", *few)) == 0
    hessians = max(sizes)
    monkeypatch.setattr("vqdm.quantization.job.hessian_bytes", lambda *_: 0)
    assert run_script(main, [*words, "--resume"]) == 0
    assert needs[0] - needs[2] == pytest.approx(hessians, rel=0.05)
    assert needs[1] == (needs[2] if cached else needs[0])


def entered(sizes: list[int]):
    """Return `HessianStore.enter`, which notes the bytes of all files."""
    enter = HessianStore.enter

    def watched(store, groups, on_disk=True):
        enter(store, groups, on_disk)
        sizes.append(sum(file.stat().st_size for file in store.folder.glob("*.safetensors")))

    return watched


def test_hessians_hold_for_the_type_that_is_computed_in(pipelines):
    """Also where the first layer is in 8 bit, whose scales are float16."""
    pipeline = DiffusionPipeline.from_pretrained(pipelines["sdxl"], dtype=torch.float32)
    settings = dict(model=str(pipelines["sdxl"]), calibration_prompts="", evaluation_prompts="", output_dir="")
    job = SimpleNamespace(
        config=QuantizeConfig(**settings), denoiser=pipeline.unet, calibration=["a"], fingerprint=None
    )
    before = hessian_settings(job)
    quantize_int8(pipeline.unet, "conv_in")
    assert hessian_settings(job) == before and before["dtype"] == "torch.float32"
    assert "xtx_batch_size" not in before


def test_the_rest_in_8_bit(finished, pipelines, prompt_file, tmp_path, capsys):
    extra = ["--unquantized_nbits", "8", "--layer_filter", r".*attn1\.to_q"]
    out = tmp_path / "out"
    assert run_script(main, command(pipelines["sdxl"], prompt_file, out, *extra)) == 0
    summary, unet = json.loads((out / "summary.json").read_text()), DiffusionPipeline.from_pretrained(out).unet
    others = int8_layers(unet)
    assert summary["layers_in_8_bit"] == len(others) and "down_blocks.0.resnets.0.conv1" in others
    parameters = sum(p.numel() for p in DiffusionPipeline.from_pretrained(summary["model"]).unet.parameters())
    bits = sum(8 * p.element_size() * p.numel() for p in unet.parameters())
    assert summary["effective_bits_unet"] == pytest.approx(bits / parameters)
    assert summary["unet_output_error_db"] < -20
    assert f"{len(others)} others are int8" in (out / "README.md").read_text()
    said = capsys.readouterr().out
    assert f"{len(others)} other layers" in said
    assert f"{bits / parameters:.3f} over the whole model" in said
    assert json.loads((finished / "summary.json").read_text())["layers_in_8_bit"] == 0


SAVED = {
    "float32 in bfloat16": (torch.float32, True, "bfloat16", torch.bfloat16),
    "float32 in float32": (torch.float32, True, "float32", torch.float32),
    "bin in bfloat16": (torch.float32, False, "bfloat16", torch.bfloat16),
    "float16 in float32": (torch.float16, True, "float32", torch.float16),
    "float16 bin in float32": (torch.float16, False, "float32", torch.float16),
}


@pytest.mark.parametrize(("stored", "safe", "dtype", "saved"), SAVED.values(), ids=SAVED)
def test_results_are_in_the_type_computed_in_and_no_wider(
    pipelines, prompt_file, tmp_path, capsys, stored, safe, dtype, saved
):
    """So that the size that is printed first is that on disk; the codes' own tensors are float16."""
    model, out = tmp_path / "model", tmp_path / "out"
    pipeline = DiffusionPipeline.from_pretrained(pipelines["sdxl"], dtype=stored)
    pipeline.save_pretrained(model, safe_serialization=safe)
    assert bool(list(model.glob("unet/*.bin"))) != safe
    extra = ["--dtype", dtype, "--layer_filter", r"(mid_block|up_blocks.0).*attn1\.to_q", "--snapshot_step", "1"]
    assert run_script(main, command(model, prompt_file, out, *extra)) == 0
    files = [*out.glob("*/*.safetensors"), *out.glob("snapshots/*/unet/*.safetensors")]
    for file in files:
        floats = {name: tensor.dtype for name, tensor in load_file(file).items() if tensor.is_floating_point()}
        assert {kind for name, kind in floats.items() if not name.endswith((".codebooks", ".scales"))} == {saved}
    assert len(files) == 6
    held = sum(tensor.nbytes for tensor in load_file(next(out.glob("unet/*.safetensors"))).values())
    assert f"about {held / 1e6:.2f} MB instead of" in capsys.readouterr().out
    summary, parameters = json.loads((out / "summary.json").read_text()), pipeline.unet.num_parameters()
    assert summary["effective_bits_unet"] == pytest.approx(8 * held / parameters)
    assert summary["bytes_of_original_unet"] == sum(path.stat().st_size for path in model.glob("unet/*model*"))


def test_student_latents_snapshots_and_hooks(pipelines, prompt_file, tmp_path):
    out, mark = tmp_path / "out", tmp_path / "saved.txt"
    script = f"import sys; open({str(mark)!r}, 'a').write(sys.argv[1] + chr(10))"
    extra = ["--layer_filter", r".*attn1\.to_q", "--calibration_latents", "student", "--snapshot_step", "2"]
    extra += ["--eval_step", "1", "--on_save", f'{sys.executable} -c "{script}" {{path}}']
    assert run_script(main, command(pipelines["sdxl"], prompt_file, out, *extra)) == 0
    saved = mark.read_text().splitlines()
    assert len([line for line in saved if line.endswith("to_q.safetensors")]) == 4
    assert [line for line in saved if line.endswith("unet")] and saved[-1] == str(out)
    snapshot = next((out / "snapshots").iterdir())
    assert snapshot.name == "02_mid_block"
    from diffusers import UNet2DConditionModel

    assert len(quantized_layers(UNet2DConditionModel.from_pretrained(snapshot / "unet"))) == 2


def test_load_takes_layers_over(finished, pipelines, prompt_file, tmp_path, capsys):
    extra = ["--load", str(finished), "--overrides", str(tmp_path / "plan.yaml")]
    (tmp_path / "plan.yaml").write_text("mid_block.*conv1:\n  num_codebooks: 3\n")
    assert run_script(main, command(pipelines["sdxl"], prompt_file, tmp_path / "out", *extra)) == 0
    assert f"{LAYERS - 2} of {LAYERS} layers are taken from it" in capsys.readouterr().out
    old, new = (DiffusionPipeline.from_pretrained(path).unet.state_dict() for path in (finished, tmp_path / "out"))
    same = "down_blocks.0.resnets.0.conv1.codes"
    assert torch.equal(old[same], new[same])


def test_dry_run_writes_nothing(pipelines, prompt_file, tmp_path, capsys):
    assert run_script(main, command(pipelines["sdxl"], prompt_file, tmp_path / "out", "--dry_run")) == 0
    text = capsys.readouterr().out
    assert "down_blocks.0.resnets.0.conv1" in text and "stored bits per weight" in text
    assert not (tmp_path / "out").exists()


def test_a_dry_run_checks_the_output_folder_as_a_run_does(finished, pipelines, prompt_file, tmp_path, capsys):
    file, foreign, before = tmp_path / "file", tmp_path / "foreign", file_hashes(finished)
    file.write_text("text")
    foreign.mkdir()
    (foreign / "mine.txt").write_text("text")
    for out, more, words in (
        (file, [], "exists and is not a run of vqdm"),
        (foreign, [], "exists and is not a run of vqdm"),
        (foreign, ["--resume"], "exists and is not a run of vqdm"),
        (file / "below", [], "cannot be written"),
        (finished, [], "holds a run already; add --resume"),
        (finished, ["--resume", "--seed", "9"], "was started with other settings: seed was 0, now 9"),
    ):
        for dry in (["--dry_run"], []):
            assert run_script(main, command(pipelines["sdxl"], prompt_file, out, *more, *dry)) == 2
            line = capsys.readouterr().err.splitlines()[-1]
            assert line.startswith(f"error: --{'resume' if '--seed' in more else 'output_dir'}") and words in line
    for out in (finished, tmp_path / "new", tmp_path / "new" / "below"):
        assert run_script(main, command(pipelines["sdxl"], prompt_file, out, "--resume", "--dry_run")) == 0
    assert file_hashes(finished) == before and {path.name for path in tmp_path.iterdir()} == {"file", "foreign"}


def test_load_is_checked_at_the_start(pipelines, prompt_file, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("vqdm.quantization.job.configured_pipeline", None)  # nothing is loaded
    for load, words in (
        (
            "nosuch",
            "--load nosuch holds neither unet/config.json nor transformer/config.json nor transformer_2/config.json "
            "nor config.json, since it is",
        ),
        (str(tmp_path), f"--load {tmp_path} holds neither"),
        (str(pipelines["sdxl"]), "is not quantized: its config.json has no quantization_config of vqdm; give the"),
    ):
        for dry in (["--dry_run"], []):
            words_given = command(pipelines["sdxl"], prompt_file, tmp_path / "out", "--load", load, *dry)
            assert run_script(main, words_given) == 2
            error = capsys.readouterr().err
            assert error.startswith("error: --load ") and words in error and error.count("\n") == 1


def test_offline_wandb_runs(pipelines, prompt_file, tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    extra = ["--layer_filter", r"mid_block.*attn1\.to_q", "--report_to", "wandb"]
    assert run_script(main, command(pipelines["sdxl"], prompt_file, tmp_path / "out", *extra)) == 0
    (run,) = (tmp_path / "out" / "wandb").glob("offline-run-*")
    assert list(run.glob("*.wandb")) and list(run.glob("files/media/images/image_pairs*.png"))


def test_the_tracker_gets_layers_figures_and_images(pipelines, prompt_file, tmp_path, monkeypatch):
    logged, images = {}, []

    class Fake:
        def __init__(self, *_, **__): ...
        def store_init_configuration(self, values): ...
        def finish(self): ...
        def log(self, values, step=None):
            logged.update(values)

        def log_images(self, values, step=None):
            images.extend(values["image_pairs"])

    monkeypatch.setattr("accelerate.tracking.WandBTracker", Fake)
    extra = ["--layer_filter", r"mid_block.*attn1\.to_q", "--wandb"]
    assert run_script(main, command(pipelines["sdxl"], prompt_file, tmp_path / "out", *extra)) == 0
    assert {"layer/error", "layer/seconds", "unet_output_error_db", "effective_bits_layers", "psnr_db"} <= logged.keys()
    assert images[0].ndim == 3


def test_a_broken_tracker_never_stops_the_job(pipelines, prompt_file, tmp_path, monkeypatch):
    def broken(*_, **__):
        raise RuntimeError("no network")

    monkeypatch.setattr("accelerate.tracking.WandBTracker.__init__", broken)
    extra = ["--layer_filter", r"mid_block.*attn1\.to_q", "--wandb"]
    assert run_script(main, command(pipelines["sdxl"], prompt_file, tmp_path / "out", *extra)) == 0


def nan_pipeline(folder, target, name):
    """A copy of a pipeline with one NaN in a weight."""
    pipeline = DiffusionPipeline.from_pretrained(folder)
    pipeline.unet.get_submodule(name).weight.data.view(-1)[0] = float("nan")
    pipeline.save_pretrained(target)
    return target


@pytest.mark.parametrize(
    ("model", "extra", "status", "words"),
    [
        ("no/such/folder", [], 2, "MODEL no/such/folder is not found"),
        ("tests", [], 2, "folder without model_index.json"),
        (
            "sdxl",
            ["--calibration_nsamples", "99"],
            2,
            "but CALIBRATION_PROMPTS holds 12 prompts; give 12, or 0 for all",
        ),
        ("sdxl", ["--evaluation_nsamples", "99"], 2, "but EVALUATION_PROMPTS holds 12 prompts; give 12 or fewer"),
        ("sdxl", ["--layer_filter", "nope"], 2, "--layer_filter nope matches no layer"),
        ("sdxl", ["--in_group_size", "5"], 2, "layer down_blocks.0.resnets.0.conv1: in_group_size 5"),
        ("sdxl", ["--device", "cuda:99"], 2, "--device cuda:99 cannot be used"),
        ("sdxl", ["--output_dir", "tests"], 2, "is not a run of vqdm"),
        ("sdxl", ["--min_timestep", "1", "--max_timestep", "2"], 2, "no step of the scheduler lies between"),
        ("quantized", [], 2, "is quantized itself (vqdm); give the full-precision model"),
        ("nan", [], 1, "NaN"),
    ],
)
def test_bad_input_is_one_line(finished, pipelines, prompt_file, tmp_path, capsys, model, extra, status, words):
    if model == "nan":
        model = nan_pipeline(pipelines["sdxl"], tmp_path / "nan", "down_blocks.0.resnets.0.conv1")
    model = finished if model == "quantized" else pipelines.get(model, model)
    assert run_script(main, command(model, prompt_file, tmp_path / "out", *extra)) == status
    error = capsys.readouterr().err
    assert words in error and error.startswith("error: ") and error.count("\n") == 1
