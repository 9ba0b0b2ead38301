"""Fine-tuning block by block, against whole calls of teacher and student."""

import copy
import hashlib
import json
import shlex
from dataclasses import replace
from types import SimpleNamespace

import finetune
import pytest
import tiny_students
import torch
from bench_plans import planned_finetuning
from test_plan import sdxl
from tiny_transformers import SIZE, quantized_flux, tiny_transformer_pipeline
from torch.utils._pytree import tree_leaves

from vqdm import devices
from vqdm.cli import run_script
from vqdm.diffusion.denoisers import block_names
from vqdm.diffusion.sampling import record_evaluation
from vqdm.diffusion.streams import BlockSwapper
from vqdm.finetuning import plan
from vqdm.finetuning.blockwise import BlockLoss, Walks, blocks_in_turn, joined, load_block
from vqdm.finetuning.config import FinetuneConfig, OptimizerConfig
from vqdm.finetuning.data import Point, Points, autocast
from vqdm.finetuning.job import disk_to_come
from vqdm.finetuning.trainer import Trainer, trainable
from vqdm.storage.files import save_checked, save_json
from vqdm.storage.run_folder import RunFolder
from vqdm.tracking import Tracker

PROMPTS = ["a circle", "a big red circle", "a star and a big green heart"]
FAST = shlex.split(
    "--finetune_scope blocks --block_steps 4 --block_points 4 --finetune_nsamples 4 --held_out_nsamples 1 "
    "--held_out_points 2 --evaluation_nsamples 1 --visualize_nsamples 1 --num_inference_steps 2 "
    "--finetune_batch_size 2 --finetune_lr 0.01 --lr_warmup_steps 0 --checkpointing_steps 1 --eval_step 2"
)

pytestmark = pytest.mark.usefixtures("one_thread")


def returned(model, name: str, call: dict) -> torch.Tensor:
    """What a block returns in a whole call."""
    found = []
    hook = model.get_submodule(name).register_forward_hook(lambda *given: found.append(given[2]))
    model(**call)
    hook.remove()
    return joined(found[0])


def models(family: str):
    """Teacher, student, and recorded points of three prompts."""
    if family == "unet":
        teacher = tiny_students.teacher()
        return teacher, tiny_students.student(tiny_students.FORMATS["own"]), tiny_students.points(teacher, 3, 2)
    pipeline = tiny_transformer_pipeline(family)
    settings = {"num_inference_steps": 2, "height": 32, "width": 32}
    recorded, _ = record_evaluation(pipeline, PROMPTS, 0, settings, 3)
    student = copy.deepcopy(pipeline.transformer)
    for one in student.parameters():
        one.data += 0.02 * torch.randn(one.shape, generator=torch.Generator().manual_seed(one.numel()))
    return pipeline.transformer, student, Points([recorded])


@pytest.mark.parametrize(("family", "cache"), [("flux", "disk"), ("z-image", "ram"), ("unet", "ram")])
def test_loss_and_gradient_are_those_of_whole_calls(family, cache, tmp_path):
    """Of every block, with points together in a call where they can be; z-image pads prompts to one length."""
    teacher, student, points = models(family)
    chosen = [Point(0, n, n % 2) for n in (0, 1, 2)] + [Point(0, 0, 1)]
    with blocks_in_turn((teacher, student), torch.device("cpu")) as swappers:
        job = SimpleNamespace(
            pipeline=SimpleNamespace(transformer=teacher, config={}),
            swappers=swappers,
            config=SimpleNamespace(block_cache=cache),
            folder=SimpleNamespace(work=tmp_path),
            ranks=tiny_students.ALONE,
        )
        walks = Walks(job, points, chosen)
        for place, name in enumerate(block_names(teacher)):
            walks.reach(place)
            with swappers[1].holding(name) as block:
                trained = trainable(block, OptimizerConfig())
                about = (walks.student, walks.teacher, place, walks.numbers)
                loss = BlockLoss(block, None, torch.float32, 2, job.ranks, *about).backward(points, chosen)
                found = {key: one.grad for key, one in trained.tensors.items()}
                block.zero_grad()
                plain = 0.0
                for point in chosen:
                    call = points.batch([point], "cpu", torch.float32).call
                    with torch.no_grad():
                        target = returned(teacher, name, call)
                    plain += (returned(student, name, call) - target).square().mean() / len(chosen)
                plain.backward()
                assert loss == pytest.approx(plain.item(), rel=1e-3), name
                largest = max(one.grad.abs().max().item() for one in trained if one.grad is not None)
                for key, one in trained.tensors.items():
                    expected, given = (torch.zeros_like(one) if g is None else g for g in (one.grad, found[key]))
                    torch.testing.assert_close(given, expected, rtol=1e-3, atol=1e-4 * largest + 1e-8)
                block.requires_grad_(False).zero_grad()
        assert loss > 0 and bool(list(tmp_path.rglob("*.safetensors"))) == (cache == "disk")
        walks.close()
    assert not list(tmp_path.rglob("*.safetensors"))


def test_outputs_that_wait_in_the_teachers_type_are_those_of_whole_calls(tmp_path):
    """In bfloat16 the student's wait in half the bytes, and its blocks get them in float32 again, within rounding."""
    teacher, student, points = models("pixart")  # whose modulations make the student's float32
    teacher.to(torch.bfloat16)
    point = Point(0, 0, 1)
    with blocks_in_turn((teacher, student), torch.device("cpu")) as swappers:
        pipeline = SimpleNamespace(transformer=teacher, config={})
        config, folder = SimpleNamespace(block_cache="ram"), SimpleNamespace(work=tmp_path)
        job = SimpleNamespace(
            pipeline=pipeline, swappers=swappers, config=config, folder=folder, ranks=tiny_students.ALONE
        )
        walks, name = Walks(job, points, [point]), block_names(teacher)[-1]
        walks.reach(place := len(swappers[1].names) - 1)
        waiting = walks.student.outputs
        assert {leaf.dtype for leaves, *_ in waiting.held.values() for leaf in leaves} == {torch.bfloat16}
        assert {leaf.dtype for leaf in tree_leaves(waiting.get(0, place - 1))} == {torch.float32}
        call = points.batch([point], "cpu", torch.float32).call
        with torch.no_grad(), autocast(torch.device("cpu"), torch.bfloat16):
            found, expected = joined(walks.student.output([0], place, call)), returned(student, name, call)
        energy = expected.square().mean()
        assert 0 < (found - expected).square().mean() < 4 * 2.0**-16 * energy  # of one part in 256


@pytest.fixture(scope="module")
def flux(tmp_path_factory):
    """Runs finetune.py on a tiny FLUX.1, two layers of which are quantized."""
    folder = tmp_path_factory.mktemp("flux")
    tiny_transformer_pipeline("flux").save_pretrained(folder / "model")
    quantized_flux().save_pretrained(folder / "quantized")
    (folder / "prompts.txt").write_text(
        "\n".join(f"a {size} red circle {k}" for k in range(4) for size in ("big", "small"))
    )

    def run(out, *extra: str) -> int:
        words = [folder / "model", folder / "quantized", folder / "prompts.txt", folder / "prompts.txt"]
        return run_script(finetune.main, [*map(str, words), "--output_dir", str(out), *SIZE, *FAST, *extra])

    return run


def digest(out) -> str:
    return hashlib.sha256((out / "transformer" / "diffusion_pytorch_model.safetensors").read_bytes()).hexdigest()


def test_blocks_gain_in_turn_and_a_stopped_run_gives_the_same_bytes(flux, tmp_path, monkeypatch, capsys):
    """Stopped in the second block, after a checkpoint; what is in RAM or on the disk is the same."""
    assert flux(tmp_path / "whole") == 0
    line = capsys.readouterr().out.splitlines()[-1]
    summary = json.loads((tmp_path / "whole" / "summary.json").read_text())
    assert [row["block"] for row in summary["blocks"]][::2] == ["transformer_blocks.0", "single_transformer_blocks.1"]
    assert all(row["held_out_db"] <= row["held_out_db_before"] for row in summary["blocks"])
    gained = [row["held_out_db"] < row["held_out_db_before"] for row in summary["blocks"]]
    assert sum(gained) >= 2 and f"{sum(gained)} of 3 blocks gained" in line
    assert summary["transformer_output_error_db"] < summary["transformer_output_error_db_before"]
    rows = [json.loads(line) for line in (tmp_path / "whole" / "training.jsonl").read_text().splitlines()]
    assert {row["block"] for row in rows} == {row["block"] for row in summary["blocks"]}
    assert not list((tmp_path / "whole").glob("*/blocks"))
    step, trainers, resumed = Trainer.step, [], []

    def stopped(self, *args):
        trainers.extend([self] if self not in trainers else [])
        if len(trainers) == 2 and self.steps_done == 2:
            raise KeyboardInterrupt
        return step(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "step", stopped)
        assert flux(tmp_path / "out") == 130
    monkeypatch.setattr(Trainer, "step", lambda self, *args: resumed.append(self.steps_done) or step(self, *args))
    assert flux(tmp_path / "out", "--resume", "--block_cache", "disk") == 0
    assert resumed[:3] == [2, 3, 0]
    assert digest(tmp_path / "out") == digest(tmp_path / "whole")


def test_blocks_with_nothing_to_train_are_as_before(flux, tmp_path, monkeypatch):
    """Of three blocks two have quantized layers. A tracker's steps go on from block to block."""
    steps = []
    monkeypatch.setattr(Tracker, "log", lambda self, values, step=None: steps.extend([step] if step else []))
    assert flux(tmp_path / "out", *shlex.split("--codebook_lr 0 --weight_lr 0 --bias_lr 0")) == 0
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert [row["steps"] for row in summary["blocks"]] == [4, 4, 0]
    assert steps == sorted(steps) and len(set(steps)) > 6


def test_a_loaded_block_is_not_undone_when_another_comes(tmp_path):
    """As on a GPU, from which a block comes back as it went there."""
    student = models("flux")[1]
    swapper, name = BlockSwapper(student, torch.device("cpu")), block_names(student)[-1]
    swapper.enter(name)
    swapper._home = [(one, one.data.clone()) for one, _ in swapper._home]
    values = {key: one + 1 for key, one in student.get_submodule(name).named_parameters()}
    folder = tmp_path / "blocks" / name
    save_checked(values, folder / "result.safetensors")
    save_json({}, folder / "result.json")
    load_block(SimpleNamespace(folder=SimpleNamespace(work=tmp_path), student=student, swappers=[None, swapper]), name)
    swapper.leave()
    torch.testing.assert_close(dict(student.get_submodule(name).named_parameters()), values, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        (["--max_steps", "3"], "--max_steps 3 has no effect with --finetune_scope blocks"),
        (["--use_checkpointing"], "--use_checkpointing has no effect"),
        (["--finetune_batch_size", "64"], "--finetune_batch_size is 64, but --block_points 4"),
        (["--finetune_scope", "denoiser"], "--block_steps 4 has no effect"),
    ],
)
def test_flags_that_do_not_go_with_blocks(extra, words, flux, tmp_path, capsys):
    assert flux(tmp_path / "out", *extra) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert words in line and not (tmp_path / "out").exists()


def test_what_fits_decides_the_scope():
    """By default the whole denoiser, where it fits; else block by block, first with what waits in RAM."""
    config, shapes, student = sdxl(finetune_scope="auto", xtx_batch_size=1)
    shapes = replace(shapes, block=700_000_000)
    student = student._replace(block=100_000_000, outside=10_000_000, block_weights=300_000_000)

    def scope(gpu: float, ram: float) -> tuple[str, str]:
        for one in plan.choices(config):
            needs = devices.on(plan.plan(one, shapes, student, 50, devices.MatmulRates(1e14, 4e13)), "cuda")
            if not devices.lacking(needs, int(gpu), int(ram)):
                return one.finetune_scope, one.block_cache
        return "", ""

    assert scope(24e9, 64e9)[0] == "denoiser"
    assert scope(8e9, 64e9) == ("blocks", "ram")
    assert scope(1e9, 64e9) == ("", "")
    assert {one.finetune_scope for one in plan.choices(sdxl(finetune_scope="blocks")[0])} == {"blocks"}


def test_a_run_block_by_block_wants_the_disk_of_its_plan(tmp_path):
    """Less what is written already; no two whole pipelines, which a large model would not have."""
    save_checked({"one": torch.zeros(100)}, tmp_path / "work" / "blocks" / "one.safetensors")
    written = (tmp_path / "work" / "blocks" / "one.safetensors").stat().st_size
    config, needs = (
        sdxl(finetune_scope="blocks")[0],
        [devices.Need(name, 0, 0, size) for name, size in (("training", 900), ("saving", 800))],
    )
    assert disk_to_come(config, needs, RunFolder(str(tmp_path)), None) == 900 - written


@pytest.mark.long
@pytest.mark.parametrize("model", ["FLUX.1-dev", "Qwen-Image"])
def test_models_too_large_for_a_gpu_fit_block_by_block(model):
    """In 24 GB of GPU memory, 64 of RAM and 60 of disk, from the true configurations."""
    files = dict.fromkeys(("quantized", "calibration_prompts", "evaluation_prompts"), "")
    config = FinetuneConfig(model=model, **files, xtx_batch_size=4)
    found = planned_finetuning(model, config, gpu=24, ram=64)
    assert found["fits"] and found["finetune_scope"] == "blocks" and found["disk_gb"] < 60
