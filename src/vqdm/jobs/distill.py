"""Fine-tune a quantized UNet towards the full-precision one: the order of the work.

Measure before; then epoch after epoch record points, and step over them; then measure what is kept, and write the same
folder with other numbers in it (arXiv 2409.00492, §4: the student's outputs are regressed on the teacher's).
"""

from __future__ import annotations

import json
import shlex
import shutil
import sys
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from PIL import Image
from torch import nn

from vqdm.diffusion.pipelines import check_model, load_pipeline, pick_dtype, weight_files
from vqdm.diffusion.quantized_unet import check_fits, find_quantized_unet, load_quantized_unet
from vqdm.diffusion.sampling import EVALUATION_SEED_OFFSET, pictures
from vqdm.errors import RunError, UserError
from vqdm.images import pair_sheet, save_png
from vqdm.jobs.distill_job import Distillation
from vqdm.jobs.distill_points import epoch_points, evaluation_points, forget_epochs, held_out_points, keeps_outputs
from vqdm.layers.quantized import quantized_layers
from vqdm.layers.rounded import rounded_layers
from vqdm.parallel import Ranks, launched
from vqdm.scores.fidelity import pair_scores, to_tensor
from vqdm.storage.atomic import save_json, save_text
from vqdm.storage.card import model_card
from vqdm.storage.fingerprint import folder_fingerprint
from vqdm.storage.runs import RunFolder
from vqdm.tracking import JsonLines, Stopwatch, Tracker, peak_memory, say
from vqdm.training.checkpoints import Checkpoints
from vqdm.training.code_updates import CodeUpdates
from vqdm.training.config import FinetuneConfig
from vqdm.training.loop import Course, Looks, Loop
from vqdm.training.material import Material, read_material
from vqdm.training.parameters import KINDS, Trained, trainable, types_on_disk, write_back
from vqdm.training.points import Points, spread
from vqdm.training.real import check_schedule
from vqdm.training.result import sizes, stage
from vqdm.training.sources import using
from vqdm.training.step import computing
from vqdm.training.trainer import Diverged, Trainer
from vqdm.training.watching import Errors, measure, read_log, save_loss_plot
from vqdm.versions import versions

# Fields that a resumption may change: they change the result by rounding at most.
FREE_FIELDS = ("local_batch_size", "decode", "use_checkpointing", "target_cache_gb", "checkpointing_steps")
FREE_FIELDS += ("checkpoints_total_limit", "visualize_step", "local_files_only")


def distill(config: FinetuneConfig) -> dict | None:
    """Run the whole job and return the summary; None after a dry run, and on every process but the first.

    Raises:
        UserError: bad input, found before anything slow starts.
        RunError: the work failed, or training diverged; what is finished stays on disk for `resume`, and the best
            parameters of a training that diverged become the result all the same.
    """
    material = read_material(config)
    check_model(config.model)
    source = find_quantized_unet(config.quantized)
    with launched(config.device) as ranks:
        pipeline, student = load(config, ranks, source)
        types = types_on_disk(source)
        trained = trainable(student, config.optimizer)
        say(plan(config, ranks, trained))
        if config.dry_run:
            return None
        folder = RunFolder(config.output_dir)
        if ranks.main:
            folder.open(settings_of(config, material, source), versions(), config.resume, 0)
        if ranks.agreed(folder.finished):
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
    say(f"{folder.path} is finished already")
    return json.loads((folder.path / "summary.json").read_text(encoding="utf-8"))


def load(config: FinetuneConfig, ranks: Ranks, source: Path) -> tuple[DiffusionPipeline, nn.Module]:
    """MODEL's pipeline with the teacher in it, and the student, both on this process's device.

    Raises:
        UserError: either cannot be loaded, they do not fit, or MODEL is quantized itself.
    """
    student = load_quantized_unet(source, torch.float32)
    pipeline = load_pipeline(
        config.model,
        ranks.device,
        pick_dtype(config.dtype, ranks.device),
        config.sampling.scheduler,
        config.variant,
        config.revision,
        config.local_files_only,
    )
    check_fits(student, pipeline.unet, config.quantized, config.model)
    if quantized_layers(pipeline.unet):
        raise UserError(f"MODEL {config.model} is quantized itself; give the original model, which is the teacher")
    if config.real_images:
        check_schedule(pipeline.scheduler)
    if config.use_checkpointing:
        student.enable_gradient_checkpointing()
    return pipeline, student.to(ranks.device)


def plan(config: FinetuneConfig, ranks: Ranks, trained: Trained) -> str:
    """One line: what is trained, on what, by how many."""
    kinds = [f"{sum(one == kind for one in trained.kinds.values())} of {kind}s" for kind in KINDS]
    values = sum(tensor.numel() for tensor in trained)
    return (
        f"{values / 1e6:.2f} M values are trained, in {len(trained.kinds)} tensors ({', '.join(kinds)}), "
        f"on {config.finetune_nsamples} trajectories ({config.finetune_method}) an epoch, "
        f"{config.finetune_batch_size} points a step, by {ranks.world} {ranks.device.type} process"
        f"{'es' if ranks.world > 1 else ''}"
    )


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
    say(f"UNet-output error on {len(job.material.evaluation)} unseen prompts: {before.db:.2f} dB before")
    loop = make_loop(job, trained, held_out)
    fault, whole = None, Stopwatch()
    try:
        with whole("training"):
            loop.run()
    except Diverged as error:
        fault = error
    job.clock.phases["training"] = round(whole.phases["training"] - job.clock.phases.get("points", 0.0), 3)
    keep(job, loop, fault)
    with job.clock("evaluation"):
        after = measure(job.lesson, evaluation, evaluation.all())
    summary = finish(job, loop, before, after) if job.ranks.main else None
    job.ranks.wait()
    if fault:
        raise RunError(f"{fault}: {kept_words(loop)}, is in {job.folder.path}; try a lower --finetune_lr")
    return summary


def keep(job: Distillation, loop: Loop, fault: Diverged | None) -> None:
    """Leave in the student what is to be saved, in the types that it is stored in."""
    if fault or job.config.finetune_keep_best:
        loop.trainer.restore(loop.checkpoints.load_best(loop.progress.best["step"]))
        say(f"kept: {kept_words(loop)}")
    else:
        loop.trainer.average.adopt()
    write_back(job.student, job.types)
    if loop.trainer.updates:
        loop.trainer.updates.close()


def kept_words(loop: Loop) -> str:
    best = loop.progress.best
    return f"the best, of step {best['step']} at {best['db']:.2f} dB on held-out points"


def make_loop(job: Distillation, trained: Trained, held_out: Points) -> Loop:
    """The training, where it begins or where the last checkpoint left it.

    Raises:
        UserError: an epoch has fewer points than a step.
    """
    config, folder = job.config, job.folder.path
    steps = len(held_out.parts[0].timesteps)
    course = course_of(job, steps, keeps_outputs(job, held_out))
    lesson = job.lesson
    updates = CodeUpdates(job.student, config.code_updates) if config.code_updates else None
    trainer = Trainer(lesson, trained, config.optimizer, course.total, config.decode, updates)
    checkpoints = Checkpoints(folder, config.checkpoints_total_limit)
    looks = Looks(
        config.eval_step,
        config.checkpointing_steps,
        config.visualize_step,
        config.finetune_relative_mse_tolerance,
        lambda step: draw_pairs(job, folder / "pictures" / f"step-{step:06d}.png", config.visualize_nsamples),
    )
    saved = checkpoints.steps()
    log = folder / "training.jsonl"
    if job.ranks.main:
        read_log(log, saved[-1] if saved else -1)
    chosen = spread(held_out, config.held_out_points)
    loop = Loop(trainer, course, (held_out, chosen), looks, checkpoints, JsonLines(log), job.tracker)
    if saved:
        loop.resume(saved[-1])
        say(f"going on after step {saved[-1]} of {course.total}")
    return loop


def course_of(job: Distillation, steps: int, keep_outputs: bool) -> Course:
    """What is stepped over, with `steps` points a trajectory. Raises UserError as `make_loop`."""
    config = job.config
    points = config.finetune_nsamples * steps
    an_epoch = points // config.finetune_batch_size
    if an_epoch == 0:
        raise UserError(
            f"--finetune_batch_size is {config.finetune_batch_size}, but an epoch has {points} points "
            f"({config.finetune_nsamples} trajectories of {steps} steps)"
        )
    total = an_epoch * config.finetune_max_epochs
    total = min(total, config.max_steps) if config.max_steps else total

    def points_of(epoch: int) -> Points:
        saved = Checkpoints(job.folder.path, 0).steps()
        unsaved = 0 if config.checkpointing_steps else epoch  # nobody will come back
        forget_epochs(job, saved[0] // an_epoch if saved else unsaved)
        return epoch_points(job, epoch, keep_outputs)

    return Course(points_of, an_epoch, total, config.finetune_batch_size, config.timestep_sampling, config.seed)


# ------------------------------------------------------------------------------------------- pictures and the end


def draw_pairs(job: Distillation, path: Path, count: int) -> list[Image.Image]:
    """The student's pictures of the first evaluation prompts, and a sheet with the teacher's; on the first process."""
    config, prompts = job.config, job.material.evaluation[:count]
    if not (job.ranks.main and count):
        return []
    seed, settings = config.seed + EVALUATION_SEED_OFFSET, config.sampling.call()
    with using(job.pipeline, job.student), computing(job.ranks.device, job.teacher.dtype):
        drawn = pictures(job.pipeline, prompts, seed, settings, config.xtx_batch_size)
    shown = config.visualize_nsamples
    if shown:
        teacher = job.teacher_pictures[:shown]
        sheet = pair_sheet(prompts[:shown], teacher, drawn[:shown], ("full precision", "fine-tuned"))
        save_png(sheet, path)
        job.tracker.images("image_pairs", [sheet])
    return drawn


def finish(job: Distillation, loop: Loop, before: Errors, after: Errors) -> dict:
    """Write the pipeline folder, the card, the plots and the summary, then drop the working data."""
    config, folder = job.config, job.folder
    staged = folder.work / "pipeline"
    drawn = draw_pairs(job, folder.path / "image_pairs.png", config.evaluation_nsamples)
    original = sum(file.stat().st_size for file in weight_files(config.model, config.variant, "unet"))
    parameters = sum(tensor.numel() for tensor in job.teacher.parameters())
    stage(job.pipeline, job.student, job.source, config, staged)
    save_loss_plot(read_log(loop.log.path, loop.trainer.done), folder.path / "loss.png")
    summary = {
        "model": config.model,
        "quantized": config.quantized,
        "layers_quantized": len(quantized_layers(job.student)),
        "layers_in_8_bit": len(rounded_layers(job.student)),
        **sizes(job.student, parameters, staged),
        "bytes_of_original_unet": original or None,
        "unet_output_error_db_before": before.db,
        "unet_output_error_db": after.db,
        "unet_output_error_db_by_timestep_before": before.db_by_timestep,
        "unet_output_error_db_by_timestep": after.db_by_timestep,
        "steps": loop.trainer.done,
        "best": loop.progress.best,
        **groups_changed(loop.trainer),
        "pictures": pair_scores(to_tensor(job.teacher_pictures), to_tensor(drawn)) | {"count": len(drawn)},
        "seconds": job.clock.phases | {"total": round(sum(job.clock.phases.values()), 3)},
        "peak_memory_bytes": peak_memory(),
        "versions": versions(),
        "command": shlex.join(sys.argv),
    }
    save_text(model_card(config.model, summary), staged / "README.md")
    folder.publish(staged)
    save_json(summary, folder.path / "summary.json")
    shutil.rmtree(folder.work)
    loop.checkpoints.clear()
    job.tracker.log({key: value for key, value in summary.items() if isinstance(value, int | float)})
    return summary


def groups_changed(trainer: Trainer) -> dict[str, int]:
    """How many groups have codes, and how many of them others than before; none were looked at where codes stay."""
    if not trainer.updates:
        return {"groups": 0, "groups_changed": 0}
    groups, changed = trainer.updates.differing()
    return {"groups": groups, "groups_changed": changed}
