"""Fine-tune a quantized UNet towards the full-precision one: the order of the work.

Measure before; then epoch after epoch record points, and step over them; then measure what is kept, and write the same
folder with other numbers in it (arXiv 2409.00492, §4: the student's outputs are regressed on the teacher's).
"""

from __future__ import annotations

import json
import shutil
from contextlib import ExitStack
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from torch import nn

from vqdm.devices import check_float64, pick_dtype
from vqdm.diffusion.pipelines import check_model, configured_pipeline, log_truncated
from vqdm.diffusion.quantized_unet import check_fits, find_quantized_unet, load_quantized_unet
from vqdm.diffusion.supported import check_loaded, check_supported
from vqdm.errors import RunError, UserError
from vqdm.finetuning.checkpoints import Checkpoints
from vqdm.finetuning.code_updates import CodeUpdates
from vqdm.finetuning.config import AUTO, FinetuneConfig
from vqdm.finetuning.data import Material, read_material
from vqdm.finetuning.distill_job import Distillation
from vqdm.finetuning.distill_points import (
    epoch_points,
    evaluation_points,
    forget_epochs,
    held_out_points,
    keeps_outputs,
)
from vqdm.finetuning.distill_result import draw_pairs, finish
from vqdm.finetuning.evaluation import measure, read_log
from vqdm.finetuning.loop import Course, Loop, Monitor
from vqdm.finetuning.parameters import KINDS, Trained, trainable, types_on_disk, write_back
from vqdm.finetuning.points import Points, spread
from vqdm.finetuning.real_images import check_schedule
from vqdm.finetuning.trainer import Diverged, Trainer
from vqdm.layers.quantized import float_scales
from vqdm.parallel import Ranks, launched
from vqdm.quantization.plan import predicted_bytes
from vqdm.storage.files import folder_fingerprint
from vqdm.storage.hf import mark_quantized
from vqdm.storage.run_folder import RunFolder
from vqdm.tracking import JsonLines, Stopwatch, Tracker, log_info
from vqdm.versions import versions

ROLE = ", which is the teacher"
SMALL_RATE = 1e-5  # such as the published 1e-6, which was absolute

# Fields that a resumption may change: they change the result by rounding at most.
FREE_FIELDS = ("local_batch_size", "decode", "use_checkpointing", "target_cache_gb", "checkpointing_steps")
FREE_FIELDS += ("checkpoints_total_limit", "visualize_step", "visualize_nsamples", "local_files_only")
FREE_FIELDS += ("xtx_batch_size",)


def distill(config: FinetuneConfig) -> dict | None:
    """Run the whole job and return the summary; None after a dry run, and on every process but the first.

    Raises:
        UserError: bad input, found before anything slow starts.
        RunError: the work failed, or training diverged; what is finished stays on disk for `resume`, and the best
            parameters of a training that diverged become the result all the same.
    """
    material = read_material(config)
    check_model(config.model, config.variant)
    check_supported(config.model, config.revision, config.local_files_only, role=ROLE)
    source = find_quantized_unet(config.quantized)
    with launched(config.device) as ranks, ExitStack() as held:
        check_float64(ranks.device)
        pipeline, student = load(config, ranks, source)
        types = types_on_disk(source) | float_scales(student)
        mark_quantized(student)  # its scales may be of another format now
        trained = trainable(student, config.optimizer)
        log_info(plan(config, ranks, trained))
        if config.optimizer.finetune_lr != AUTO and config.optimizer.finetune_lr < SMALL_RATE:
            log_info(f"--finetune_lr {config.optimizer.finetune_lr} is relative here, and will hardly move anything")
        if ranks.main:
            log_truncated(pipeline, [*material.training, *material.held_out, *material.evaluation])
        if config.dry_run:
            return None
        folder = RunFolder(config.output_dir)
        held.enter_context(folder.lock(ranks))
        if ranks.main:
            folder.open(
                settings_of(config, material, source), versions(), config.resume, needed_bytes(config, pipeline)
            )
        if ranks.broadcast(folder.finished):
            return close_finished(folder) if ranks.main else None
        tracker = Tracker(
            config.report_to if ranks.main else "none",
            "vqdm-finetune",
            folder.path,
            config.to_dict() | config.to_dict()["optimizer"],
        )
        job = Distillation(config, ranks, material, pipeline, student, source, types, folder, tracker, Stopwatch(), [])
        try:
            return run(job, trained)
        finally:
            tracker.finish()


def close_finished(folder: RunFolder) -> dict:
    """The summary of a run that has ended, without what a kill at its very end left."""
    shutil.rmtree(folder.work, ignore_errors=True)
    Checkpoints(folder.path, 0).clear()
    log_info(f"{folder.path} is finished already")
    return json.loads((folder.path / "summary.json").read_text(encoding="utf-8"))


def load(config: FinetuneConfig, ranks: Ranks, source: Path) -> tuple[DiffusionPipeline, nn.Module]:
    """MODEL's pipeline with the teacher in it, and the student, both on this process's device.

    Raises:
        UserError: either cannot be loaded, they do not fit, MODEL is quantized itself, or the settings do not fit it.
    """
    student = load_quantized_unet(source, torch.float32)
    pipeline = configured_pipeline(config, ranks.device, pick_dtype(config.dtype, ranks.device))
    check_fits(student, pipeline.unet, config.quantized, config.model)
    check_loaded(pipeline.unet, config.model, role=ROLE)
    pipeline.scheduler.set_timesteps(config.sampling.num_inference_steps or 50)
    steps_an_epoch(config, len(pipeline.scheduler.timesteps))
    if config.real_images:
        check_schedule(pipeline.scheduler)
    if config.use_checkpointing:
        student.enable_gradient_checkpointing()
    return pipeline, student.to(ranks.device)


def plan(config: FinetuneConfig, ranks: Ranks, trained: Trained) -> str:
    """One line: what is trained, on what, by how many."""
    plural = {kind: f"{kind}es" if kind.endswith("s") else f"{kind}s" for kind in KINDS}
    kinds = [f"{sum(one == kind for one in trained.kinds.values())} of {plural[kind]}" for kind in KINDS]
    values = sum(tensor.numel() for tensor in trained)
    return (
        f"{values / 1e6:.2f} M values are trained, in {len(trained.kinds)} tensors ({', '.join(kinds)}), "
        f"on {config.finetune_nsamples} trajectories ({config.finetune_method}) an epoch, "
        f"{config.finetune_batch_size} points a step, by {ranks.world} {ranks.device.type} process"
        f"{'es' if ranks.world > 1 else ''}"
    )


def needed_bytes(config: FinetuneConfig, pipeline: DiffusionPipeline) -> int:
    """Disk that a run needs, the teacher's outputs aside."""
    measured = config.evaluation_nsamples + config.held_out_nsamples
    return predicted_bytes(pipeline, config.sampling, 2 * config.finetune_nsamples, measured)


def settings_of(config: FinetuneConfig, material: Material, source: Path) -> dict:
    """Everything the result depends on, which a resumption must share."""
    own = {name: value for name, value in config.to_dict().items() if name not in FREE_FIELDS}
    return own | {"material_sha256": material.digest, "quantized_sha256": folder_fingerprint(source)}


# ------------------------------------------------------------------------------------------- the work


def run(job: Distillation, trained: Trained) -> dict | None:
    """All slow steps, once everything is loaded."""
    with job.clock("teacher"):
        evaluation, held_out = evaluation_points(job), held_out_points(job)
    with job.clock("evaluation"):
        before = measure(job.lesson, evaluation, evaluation.all())
    log_info(
        f"UNet-output error on {len(job.material.evaluation)} unseen prompts before: {before.db:.2f} dB, "
        f"median {before.median_db:.2f} dB"
    )
    loop = make_loop(job, trained, held_out)
    fault, whole = None, Stopwatch()
    try:
        with whole("training"):
            loop.run()
    except Diverged as error:
        fault = error
    job.clock.phases["training"] = round(whole.phases["training"] - job.clock.phases.get("points", 0.0), 3)
    step_kept = keep(job, loop, fault)
    with job.clock("evaluation"):
        after = measure(job.lesson, evaluation, evaluation.all())
    summary = finish(job, loop, step_kept, before, after) if job.ranks.main else None
    job.ranks.barrier()
    if fault:
        raise RunError(f"{fault}: {kept_words(loop)}, is in {job.folder.path}; try a lower --finetune_lr")
    return summary


def keep(job: Distillation, loop: Loop, fault: Diverged | None) -> int:
    """Leave in the student what is to be saved: the values that are stored, in the type that is computed in.

    Returns the step whose parameters they are.
    """
    step = loop.trainer.done
    job.ranks.barrier()  # the first process has written the best
    if fault or job.config.finetune_keep_best:
        step = loop.progress.best["step"]
        loop.trainer.restore(loop.checkpoints.load_best(step))
        log_info(f"kept: {kept_words(loop)}")
    else:
        loop.trainer.average.adopt()
    write_back(job.student, job.types, torch.float32)
    if loop.trainer.updates:
        loop.trainer.updates.close()
    return step


def kept_words(loop: Loop) -> str:
    best = loop.progress.best
    error = f"{best['db']:.2f} dB, median {best['median_db']:.2f} dB on held-out points"
    return f"the best, of step {best['step']} at {error}"


def make_loop(job: Distillation, trained: Trained, held_out: Points) -> Loop:
    """The training, where it begins or where the last checkpoint left it."""
    config, folder = job.config, job.folder.path
    steps = len(held_out.parts[0].timesteps)
    course = course_of(job, steps, keeps_outputs(job, held_out))
    lesson = job.lesson
    updates = CodeUpdates(job.student, config.code_updates) if config.code_updates else None
    trainer = Trainer(lesson, trained, config.optimizer, course.total, config.decode, updates)
    checkpoints = Checkpoints(folder, config.checkpoints_total_limit, job.ranks.device)
    monitor = Monitor(
        config.eval_step,
        config.checkpointing_steps,
        config.visualize_step,
        config.finetune_keep_best,
        config.early_stopping_patience,
        config.finetune_relative_mse_tolerance,
        job.types,
        lambda step: draw_pairs(job, folder / "pictures" / f"step-{step:06d}.png", config.visualize_nsamples),
    )
    saved = checkpoints.steps()
    log = folder / "training.jsonl"
    if job.ranks.main:
        read_log(log, saved[-1] if saved else -1)
    chosen = spread(held_out, config.held_out_points)
    loop = Loop(trainer, course, (held_out, chosen), monitor, checkpoints, JsonLines(log), job.tracker)
    if saved:
        loop.resume(saved[-1])
        log_info(f"continuing after step {saved[-1]} of {course.total}")
    return loop


def steps_an_epoch(config: FinetuneConfig, steps: int) -> int:
    """Optimizer steps, with `steps` points a trajectory. Raises UserError where an epoch has no points for one."""
    points = config.finetune_nsamples * steps
    if points < config.finetune_batch_size:
        raise UserError(
            f"--finetune_batch_size is {config.finetune_batch_size}, but an epoch has {points} points "
            f"({config.finetune_nsamples} trajectories of {steps} steps)"
        )
    return points // config.finetune_batch_size


def course_of(job: Distillation, steps: int, keep_outputs: bool) -> Course:
    """What is stepped over, with `steps` points a trajectory."""
    config = job.config
    an_epoch = steps_an_epoch(config, steps)
    total = an_epoch * config.finetune_max_epochs
    total = min(total, config.max_steps) if config.max_steps else total

    def points_of(epoch: int) -> Points:
        saved = Checkpoints(job.folder.path, 0).steps()
        unsaved = 0 if config.checkpointing_steps else epoch  # nobody will come back
        forget_epochs(job, saved[0] // an_epoch if saved else unsaved)
        return epoch_points(job, epoch, keep_outputs)

    return Course(points_of, an_epoch, total, config.finetune_batch_size, config.timestep_sampling, config.seed)
