"""What is planned of a fine-tuning, against tensors that are counted while it runs."""

import json
import shutil

import finetune
import pytest
import tiny_students
from test_job import FAST

from vqdm import devices
from vqdm.additive.code import CodeSpec
from vqdm.cli import run_script
from vqdm.diffusion.blocks import select_layers
from vqdm.diffusion.shapes import LiveBytes, Shapes
from vqdm.finetuning import data, job, loop, plan
from vqdm.finetuning.config import FinetuneConfig


@pytest.fixture(scope="module")
def quantized(tmp_path_factory, pipelines):
    """A pipeline folder with all default layers quantized."""
    folder = tmp_path_factory.mktemp("quantized") / "pipeline"
    shutil.copytree(pipelines["sdxl"], folder, ignore=shutil.ignore_patterns("unet"))
    layers = select_layers(tiny_students.teacher(), "default", 0, CodeSpec(2, 4, 4), {})
    tiny_students.student(CodeSpec(2, 4, 4), tuple(one.name for one in layers)).save_pretrained(folder / "unet")
    return folder


@pytest.mark.parametrize(
    "flags",
    [
        "--local_batch_size 2 --no-use_checkpointing --decode step",
        "--local_batch_size 4 --use_checkpointing --decode call --ema_decay 0.9",
        "--local_batch_size 2 --no-use_checkpointing --decode call --update_codes",
    ],
)
def test_planned_are_the_tensors_that_live(flags, pipelines, quantized, prompt_file, tmp_path, monkeypatch):
    found, peaks = [], {}

    def counted(name, function):
        def watched(*args, **kwargs):
            with LiveBytes() as live:
                result = function(*args, **kwargs)
            peaks[name] = max(peaks.get(name, 0), live.peak)
            return result

        return watched

    def planned(config, shapes, student, *args):
        found.append((shapes, student, {need.phase: need for need in plan.plan(config, shapes, student, *args)}))
        return list(found[-1][2].values())

    monkeypatch.setattr(job, "plan", planned)
    monkeypatch.setattr(loop.Loop, "run", counted("training", loop.Loop.run))
    monkeypatch.setattr(job, "evaluate", counted("evaluation", job.evaluate))
    recorder = data.TrajectoryRecorder
    monkeypatch.setattr(recorder, "evaluation", counted("teacher", recorder.evaluation))
    monkeypatch.setattr(recorder, "epoch", counted("points", recorder.epoch))
    words = [pipelines["sdxl"], quantized, prompt_file, prompt_file, "--output_dir", tmp_path / "out"]
    assert run_script(finetune.main, [*map(str, words), *FAST, *flags.split()]) == 0
    shapes, student, needs = found[-1]
    # What lives before the counting begins: the models, the VAE while it samples, drifts of codes.
    before = dict.fromkeys(("teacher", "points"), shapes.denoiser + shapes.vae)
    before["training"] = 4 * student.weights if "--update_codes" in flags else 0
    recorded = {"points": needs["points"].ram - needs["teacher"].ram}  # on a CPU it counts as well
    for name, peak in peaks.items():
        planned = needs[name].device + recorded.get(name, 0)
        assert student.stored + before.get(name, 0) + peak == pytest.approx(planned, rel=0.15), name
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert f"{flags.split(' --ema')[0].split(' --update')[0]} --xtx_batch_size 3" == summary["memory_flags"]
    phases = summary["peak_memory_bytes_by_phase"]
    assert all(phases[name]["planned"]["ram"] > 1e9 and phases[name]["reached"]["host"] > 0 for name in needs)


def sdxl(**settings) -> tuple[FinetuneConfig, Shapes, plan.Student]:
    """Sizes of SDXL at 1024² in bfloat16, counted on the meta device, and of a student of 3 bits."""
    settings = {"finetune_scope": "denoiser"} | settings
    config = FinetuneConfig(model="m", quantized="q", calibration_prompts="c", evaluation_prompts="e", **settings)
    unet, text, vae, latents = 5_135_000_000, 1_635_000_000, 167_000_000, 2 * 4 * 128**2
    shapes = Shapes(
        unet, text, vae, 330_000_000, 4_000_000_000, unet + text + vae, 0, 2 * 128**2, 2, 13_500_000_000_000, 10**13,
        latents, 2 * latents, 630_784, (128, 128, 2, 77),
    )  # fmt: skip
    activations = {False: 17_363_000_000, True: 1_783_000_000}
    return (
        config,
        shapes,
        plan.Student(1_070_000_000, 2_540_953_600, 29_491_200, 28_000_000, 419_000_000, activations.get),
    )


@pytest.mark.parametrize(
    ("free", "expected"),
    [
        (80e9, "--local_batch_size 2 --no-use_checkpointing --decode step"),
        (24e9, "--local_batch_size 8 --use_checkpointing --decode call"),
        (12e9, "--local_batch_size 4 --use_checkpointing --decode call"),
    ],
)
def test_sdxl_is_trained_in_what_is_free(free, expected):
    """The fastest settings that fit are taken; flags that are given stay."""
    config, shapes, student = sdxl(xtx_batch_size=4)
    needs_of = lambda one: devices.on(plan.plan(one, shapes, student, 50, devices.MatmulRates(1e14, 4e13)), "cuda")  # noqa: E731
    fitting = [one for one in plan.choices(config) if not devices.lacking(needs_of(one), int(free), int(32e9))]
    assert plan.flags(fitting[0]).startswith(expected)
    assert all(plan.slowness(fitting[0]) <= plan.slowness(one) for one in fitting)
    given = plan.choices(sdxl(local_batch_size=1, decode="call")[0])
    assert {(one.local_batch_size, one.decode) for one in given} == {(1, "call")} and len(given) == 2
    disk = max(need.disk for need in needs_of(fitting[0]))
    assert disk < 40e9


def test_times_are_in_the_order_of_the_work():
    def times(**settings) -> dict[str, float]:
        config, shapes, student = sdxl(
            **{"local_batch_size": 4, "use_checkpointing": True, "decode": "call"} | settings
        )
        needs = plan.plan(config, shapes, student, 50, devices.MatmulRates(1e14, 4e13))
        return {need.phase: need.seconds for need in needs}

    usual = times()
    assert 0 == usual["saving"] < usual["evaluation"] < usual["points"] < usual["training"]
    for changed, phases in (
        (times(finetune_max_epochs=8), {"points", "training"}),
        (times(evaluation_nsamples=64), {"teacher", "evaluation"}),
        (times(local_batch_size=1), {"training"}),
    ):
        assert {name for name, value in changed.items() if value > usual[name]} == phases
    assert times(use_checkpointing=False)["training"] < usual["training"]
    assert times(max_steps=1)["training"] < usual["training"] / 10


@pytest.mark.parametrize(("free", "advice"), [(1.505e9, "it fits with --local_batch_size"), (1e9, "smaller --height")])
def test_a_run_that_does_not_fit_is_refused(
    free, advice, pipelines, quantized, prompt_file, tmp_path, monkeypatch, capsys
):
    for module in (devices, job):
        monkeypatch.setattr(module, "free_memory", lambda device: (None, int(free)))
    words = [pipelines["sdxl"], quantized, prompt_file, prompt_file, "--output_dir", tmp_path / "out"]
    words = [*map(str, words), *FAST, "--local_batch_size", "64", "--no-use_checkpointing", "--decode", "step"]
    assert run_script(finetune.main, words) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: RAM: phase training needs ") or advice != "it fits with --local_batch_size"
    assert advice in error and "--ignore_budget" in error and not (tmp_path / "out").exists()
    assert run_script(finetune.main, [*words, "--dry_run"]) == 0 and advice in capsys.readouterr().out
