"""What is planned before a quantization starts."""

import json
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import meta_unet, tiny_unet
from main_text2image import main
from sdxl import CONFIG
from tiny_runs import command
from tiny_transformers import SIZE, tiny_transformer_pipeline

from vqdm import devices
from vqdm.additive.code import CodeSpec
from vqdm.cli import run_script
from vqdm.diffusion.blocks import select_layers
from vqdm.diffusion.shapes import LiveBytes, Shapes, forward_cost, input_groups, meta_call, training_bytes
from vqdm.errors import UserError
from vqdm.quantization import allocation, block, job, plan, recording
from vqdm.quantization.config import QuantizeConfig
from vqdm.quantization.plan import blocks_before_finetuning


def test_fine_tunings_are_spread_evenly_between_the_blocks():
    assert [blocks_before_finetuning(count, 7) for count in (0, 1, 2, 6)] == [[], [4], [2, 5], [1, 2, 3, 4, 5, 6]]
    assert blocks_before_finetuning(0, 1) == []
    with pytest.raises(UserError, match="--num_intermediate_finetunes is 7; between 7 blocks allowed are 0 to 6"):
        blocks_before_finetuning(7, 7)


LAST = ["--layer_filter", r"blocks\.1\.(proj_out|norm\.linear|attn\.to_out)", *SIZE]
LAST += ["--hessian_samples_per_input", "4", "--evaluation_nsamples", "5"]
WIDE = ["--layer_filter", r"up_blocks.*(conv1|ff\.net\.2)"]


def counted(function, peaks: list[int]):
    """Return the function; the most bytes of tensors that live at once inside are noted."""

    def watched(*args, **kwargs):
        with LiveBytes() as live:
            result = function(*args, **kwargs)
        peaks.append(live.peak)
        return result

    return watched


@pytest.fixture(scope="module")
def models(pipelines, tmp_path_factory) -> Callable[[str], Path]:
    """Gives the pipeline folder of a family."""
    root = tmp_path_factory.mktemp("transformers")

    def folder(family: str) -> Path:
        if family in pipelines:
            return pipelines[family]
        if not (root / family).is_dir():
            tiny_transformer_pipeline(family).save_pretrained(root / family)
        return root / family

    return folder


@pytest.mark.parametrize(
    ("family", "words"),
    [
        ("sdxl", WIDE),
        ("sdxl", [*WIDE, "--target_bits", "6"]),
        ("flux", [*LAST, "--target_bits", "6"]),
        ("flux", [*LAST, "--offload", "disk"]),
        pytest.param("flux2", LAST, marks=pytest.mark.long),
    ],
)
def test_planned_are_the_tensors_that_live(family, words, models, prompt_file, tmp_path, monkeypatch):
    """Within 15 %, for every phase."""
    code = "--target_bits" in words
    found, make = [], plan.plan
    watched = [
        ("teacher", job, "teacher_evaluation"),
        ("hessians", recording.HessianRecorder, "record"),
        ("allocation", allocation, "expected_curves"),
        ("allocation", allocation, "coding_errors"),
        ("allocation", allocation, "output_effects"),
        ("layers", block, "quantize_groups"),
        ("evaluation", job, "student_images"),
    ]
    if family != "sdxl":  # the curves of small layers are mostly tables of a fixed size
        watched.remove(("allocation", allocation, "expected_curves"))
    peaks = {name: [] for name, _, _ in watched}

    def planned(config, shapes, *args):
        needs = make(config, shapes, *args)
        found.append((shapes, {need.phase: need.device for need in needs}))
        return needs

    monkeypatch.setattr(job, "plan", planned)
    for name, place, function in watched:
        monkeypatch.setattr(place, function, counted(getattr(place, function), peaks[name]))
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)  # one layer at a time
    assert run_script(main, command(models(family), prompt_file, tmp_path / "out", *words)) == 0
    (shapes, needs), *_ = found
    # What lives before the counting begins, beside the denoiser or one block of it: the VAE while it samples.
    before = dict.fromkeys(("teacher", "evaluation"), shapes.vae)
    resident = shapes.outside + shapes.block if "--offload" in words else shapes.denoiser
    for name, some in peaks.items():
        if some:
            assert resident + before.get(name, 0) + max(some) == pytest.approx(needs[name], rel=0.15), name
    assert bool(peaks["allocation"]) == code and all(some for name, some in peaks.items() if name != "allocation")
    phases = json.loads((tmp_path / "out" / "summary.json").read_text())["peak_memory_bytes_by_phase"]
    assert all(phases[name]["planned"]["ram"] > 1e9 and phases[name]["reached"]["host"] > 0 for name in needs)


@pytest.mark.parametrize(
    ("family", "words"),
    [("sdxl", ["--layer_filter", r"mid_block.*attn1\.to_q"]), ("flux", ["--layer_filter", r"ff\.net\.2", *SIZE])],
)
def test_a_dry_run_of_a_folder_reads_no_weights(family, words, models, prompt_file, tmp_path, monkeypatch, capsys):
    """And prints the table that the run prints; also of configurations alone."""
    folder = models(family)
    words = command(folder, prompt_file, tmp_path / "out", *words)
    assert run_script(main, words) == 0
    whole = capsys.readouterr().out

    def unread(*_, **__):
        raise AssertionError("weights are read")

    monkeypatch.setattr("diffusers.models.modeling_utils.load_state_dict", unread)
    monkeypatch.setattr("safetensors.torch.load_file", unread)
    monkeypatch.setattr("transformers.modeling_utils.PreTrainedModel.from_pretrained", unread)
    assert run_script(main, [*words, "--resume", "--dry_run"]) == 0
    dry = capsys.readouterr().out
    lines = [line for line in dry.splitlines() if line.startswith(("teacher", "hessians", "layers ", "saving"))]
    assert len(lines) == 4 and all(line in whole for line in lines)
    bare = shutil.copytree(folder, tmp_path / "bare", ignore=shutil.ignore_patterns("*.safetensors"))
    assert run_script(main, [str(bare), *words[1:], "--output_dir", str(tmp_path / "none"), "--dry_run"]) == 0
    dry = capsys.readouterr().out
    assert all(line in dry for line in lines)


@pytest.mark.parametrize(("free", "advice"), [(1.51e9, "it fits with "), (1e9, "smaller --height")])
def test_a_run_that_does_not_fit_is_refused(free, advice, pipelines, prompt_file, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(devices, "free_memory", lambda device: (None, int(free)))
    few = ["--layer_filter", r"mid_block.*attn1\.to_q", "--hessian_samples_per_input", "0", "--xtx_batch_size", "256"]
    words = command(pipelines["sdxl"], prompt_file, tmp_path / "out", *few)
    assert run_script(main, words) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: RAM: phase ") and advice in error and "--ignore_budget" in error
    assert not (tmp_path / "out").exists()
    assert run_script(main, [*words, "--dry_run"]) == 0 and advice in capsys.readouterr().out
    smaller = shlex.split(error.partition("it fits with ")[2].partition(";")[0])
    assert run_script(main, [*words, *(smaller or ["--ignore_budget"])]) == 0


def test_sdxl_fits_24_gb():
    """Counted from its true configuration; the sizes of parts are those of its files."""
    unet = meta_unet(CONFIG, torch.bfloat16)
    layers = select_layers(unet, "default", 0, CodeSpec(1, 8, 1), {})
    groups = input_groups(unet, layers, 128, 128)
    step, weights = forward_cost(unet, 128, 128, 2), 2 * sum(one.numel() for one in unet.parameters())
    text, vae = int(1.64e9), int(0.17e9)
    backward = training_bytes(unet, (128, 128, 2, 77), checkpointing=True, layers=[layer.name for layer in layers])
    sizes = (weights, text, vae, step.bytes, int(4e9), weights + text + vae, int(2e8), 2 * 128**2, 2, step.flops)
    shapes = Shapes(*sizes, backward=backward)
    config = QuantizeConfig(model="sdxl", target_bits=3.0, xtx_batch_size=4)
    needs = devices.on(plan.plan(config, shapes, groups, True, (256, 32), devices.MatmulRates(1e14, 4e13)), "cuda")
    most = {name: max(getattr(need, name) for need in needs) / 1e9 for name in ("device", "ram", "disk")}
    assert 15 < most["device"] < 24 and most["ram"] < 32 and most["disk"] < 40
    assert not devices.lacking(needs, int(24e9), int(32e9)) and devices.lacking(needs, int(12e9), None)


def test_times_are_in_the_order_of_the_work():
    """On a model of few layers: more points, prompts and state bits take longer, in their own phase alone."""
    unet = meta_unet(tiny_unet("sdxl").config)
    layers = select_layers(unet, "default", 0, CodeSpec(1, 8, 1), {})
    groups, step = input_groups(unet, layers, 8, 8), forward_cost(unet, 8, 8, 2)
    shapes = Shapes(0, 0, 0, step.bytes, 0, 0, 0, 128, 4, step.flops, 10 * step.flops)
    slow = devices.MatmulRates(1e9, 1e9)

    def times(prompts=(64, 16), rates=slow, **settings) -> dict[str, float]:
        config = QuantizeConfig(model="tiny", target_bits=6.0, **settings)
        return {need.phase: need.seconds for need in plan.plan(config, shapes, groups, True, prompts, rates)}

    usual = times(calibration_nsteps=5)
    assert usual["saving"] == 0 < usual["teacher"] < usual["evaluation"] and usual["layers"] > 0
    for changed, phases in (
        (times(calibration_nsteps=0), {"hessians"}),
        (times((128, 16), calibration_nsteps=5), {"hessians"}),
        (times((64, 32), calibration_nsteps=5), {"teacher", "evaluation"}),
        (times(calibration_nsteps=5, sensitivity_points=128), {"allocation"}),
    ):
        assert {name for name, value in changed.items() if value > usual[name]} == phases
        assert all(value >= usual[name] for name, value in changed.items())
    fewer_states = times(calibration_nsteps=5, state_bits=10)
    assert {name for name, value in fewer_states.items() if value != usual[name]} == {"layers"}
    assert usual["layers"] / 4 < fewer_states["layers"] < usual["layers"]
    twice = times(calibration_nsteps=5, rates=devices.MatmulRates(2e9, 2e9))
    assert twice == pytest.approx({name: value / 2 for name, value in usual.items()})


def test_attention_is_counted_as_fused_kernels_make_it():
    """The scores of all pairs of tokens never exist at once."""
    peaks = [forward_cost(meta_unet(tiny_unet("sdxl").config), side, side, 1).bytes for side in (32, 64)]
    assert 3.5 < peaks[1] / peaks[0] < 4.5
    assert meta_call(meta_unet(tiny_unet("sd15").config), 8, 8, 3)["sample"].shape == (3, 4, 8, 8)
