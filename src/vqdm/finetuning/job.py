"""Fine-tune a quantized denoiser towards the full-precision one: the order of the work.

Evaluate; then, epoch after epoch, record points and train on them; then evaluate the step that is kept, and write a
folder of the same format (arXiv 2409.00492, §4: the student's outputs are regressed on the teacher's).
"""

from __future__ import annotations

import json
import math
import shutil
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from PIL import Image
from torch import nn

from vqdm.config import label
from vqdm.devices import (
    BatchSize,
    MatmulRates,
    MemoryClock,
    Need,
    budgeted,
    check_float64,
    free_memory,
    lacking,
    on,
    pick_dtype,
)
from vqdm.diffusion.denoisers import compute_dtype, denoiser_name, denoiser_of
from vqdm.diffusion.model_folders import (
    check_fits,
    check_loaded,
    check_supported,
    find_denoiser,
    load_denoiser,
)
from vqdm.diffusion.pipelines import (
    check_configured,
    configured_pipeline,
    log_truncated,
    resting_on_cpu,
    saved_types,
    stored_bytes,
    stored_dtypes,
)
from vqdm.diffusion.sampling import (
    EVALUATION_SEED_OFFSET,
    compare_images,
    generate_images,
    predicted_bytes,
    set_timesteps,
)
from vqdm.diffusion.shapes import shapes_of, skeleton_pipeline
from vqdm.diffusion.streams import BlockSwapper
from vqdm.errors import RunError, UserError
from vqdm.finetuning.blockwise import blocks_in_turn, check_points, finetune_blocks, joined_logs
from vqdm.finetuning.code_updates import CodeUpdates
from vqdm.finetuning.config import AUTO, FinetuneConfig
from vqdm.finetuning.data import (
    Datasets,
    Points,
    TrajectoryRecorder,
    check_scheduler,
    load_datasets,
    spread,
    with_denoiser,
)
from vqdm.finetuning.evaluation import Errors, evaluate, read_log, save_loss_plot
from vqdm.finetuning.loop import Checkpoints, EvaluationSchedule, Loop, TrainingSchedule
from vqdm.finetuning.plan import Student, choices, flags, plan, smaller
from vqdm.finetuning.trainer import (
    KINDS,
    DistillationLoss,
    TrainedParameters,
    Trainer,
    trainable,
    types_on_disk,
    write_back,
)
from vqdm.images import pair_sheet, save_png
from vqdm.layers.int8 import int8_layers
from vqdm.layers.quantized import float_scales, quantized_layers
from vqdm.parallel import Ranks, launched
from vqdm.storage.files import folder_fingerprint, save_json, save_text
from vqdm.storage.hf import mark_quantized
from vqdm.storage.hub import model_card, stored_sizes
from vqdm.storage.run_folder import RunFolder
from vqdm.tracking import JsonLines, Tracker, log_info, own_command, versions

ROLE = ", which is the teacher"
SMALL_LEARNING_RATE = 1e-5  # such as the published 1e-6, which was absolute

# Fields that a resumption may change: they change the result by rounding at most.
FREE_FIELDS = ("local_batch_size", "decode", "use_checkpointing", "target_cache_gb", "checkpointing_steps")
FREE_FIELDS += ("checkpoints_total_limit", "visualize_step", "visualize_nsamples", "local_files_only")
FREE_FIELDS += ("xtx_batch_size", "ignore_budget", "block_cache")


@dataclass
class FinetuneJob:
    """State that the steps of one run share.

    Attributes:
        pipeline: with the teacher as its denoiser.
        source: the quantized denoiser's folder.
        types: name → stored type of the student's parameters.
        needs: what was planned, by phase.
        swappers: of the teacher and the student, where one block of each is on the device; else none.
        size: `xtx_batch_size`, or what is left of it.
    """

    config: FinetuneConfig
    ranks: Ranks
    datasets: Datasets
    pipeline: DiffusionPipeline
    student: nn.Module
    source: Path
    types: dict[str, torch.dtype]
    folder: RunFolder
    tracker: Tracker
    needs: list[Need]
    swappers: list[BlockSwapper] = field(default_factory=list)
    clock: MemoryClock = field(init=False)
    size: BatchSize = field(init=False)

    def __post_init__(self) -> None:
        self.clock, self.size = MemoryClock(self.ranks.device), BatchSize(self.config.xtx_batch_size)

    @property
    def loss_fn(self) -> DistillationLoss:
        teacher, size = denoiser_of(self.pipeline), self.config.local_batch_size
        return DistillationLoss(self.student, teacher, teacher.dtype, size, self.ranks)

    @property
    def component(self) -> str:
        """The name of the denoiser in the pipeline, which is also that of its folder."""
        return denoiser_name(self.pipeline)

    @property
    def recorder(self) -> TrajectoryRecorder:
        models, folder = (self.pipeline, self.student), self.folder.work
        return TrajectoryRecorder(self.config, self.datasets, *models, folder, self.ranks, self.size)


def finetune(config: FinetuneConfig) -> dict | None:
    """Run the whole job and return the summary; None after a dry run, and on every process but the first.

    Raises:
        UserError: bad input, found before anything slow starts.
        RunError: the work failed, or training diverged. Finished work stays on disk for `resume`; after a divergence
            the best parameters become the result all the same.
    """
    datasets = load_datasets(config)
    check_configured(config)
    where = (config.revision, config.local_files_only)
    check_supported(config.model, *where, role=ROLE, single_file_config=config.single_file_config)
    source = find_denoiser(config.quantized)
    with launched(config.device) as ranks, ExitStack() as held:
        check_float64(ranks.device)
        pipeline, student = load_models(config, ranks, source)
        stored, parameters = types_on_disk(source), dict(student.named_parameters())  # buffers are stored, not trained
        types = {name: dtype for name, dtype in stored.items() if name in parameters} | float_scales(student)
        mark_quantized(student)  # its scales may be of another format now
        trained = trainable(student, config.optimizer)
        log_info(training_plan(config, ranks, trained))
        config, needs = fitted(config, pipeline, student, trained, ranks)
        blockwise = config.finetune_scope == "blocks"
        if blockwise:
            student.requires_grad_(False)
            check_points(config, len(pipeline.scheduler.timesteps))
        elif not config.dry_run:
            denoiser_of(pipeline).to(ranks.device)
            student.to(ranks.device)
        if config.use_checkpointing:
            student.enable_gradient_checkpointing()
        if config.optimizer.finetune_lr != AUTO and config.optimizer.finetune_lr < SMALL_LEARNING_RATE:
            log_info(f"--finetune_lr {config.optimizer.finetune_lr} is relative, and will hardly change anything")
        if ranks.main:
            log_truncated(pipeline, [*datasets.training, *datasets.held_out, *datasets.evaluation])
        settings = {name: value for name, value in config.to_dict().items() if name not in FREE_FIELDS}
        if ranks.main:
            settings |= {"datasets_sha256": datasets.digest, "quantized_sha256": folder_fingerprint(source)}
        folder = RunFolder(config.output_dir)
        if config.dry_run:
            folder.check(settings, config.resume, ranks)
            return None
        held.enter_context(folder.lock(ranks))
        if ranks.main:
            folder.open(settings, versions(), config.resume, disk_to_come(config, needs, folder, pipeline))
        if ranks.broadcast(folder.finished):
            return close_finished(folder) if ranks.main else None
        about, kind = config.to_dict() | config.to_dict()["optimizer"], config.report_to if ranks.main else "none"
        tracker = Tracker(kind, "vqdm-finetune", folder.path, about)
        job = FinetuneJob(config, ranks, datasets, pipeline, student, source, types, folder, tracker, needs)
        try:
            models = (denoiser_of(pipeline), student)
            with resting_on_cpu(pipeline), blocks_in_turn(models if blockwise else (), ranks.device) as job.swappers:
                return run(job, trained)
        finally:
            tracker.finish()


def disk_to_come(config: FinetuneConfig, needs: list[Need], folder: RunFolder, pipeline: DiffusionPipeline) -> int:
    """Return the bytes that the run is yet to write; block by block those of the plan, without a checkpoint of all."""
    if config.finetune_scope == "blocks" and needs:
        written = sum(file.stat().st_size for file in folder.work.rglob("*.safetensors"))
        return max(0, max(need.disk for need in needs) - written)
    evaluated = config.evaluation_nsamples + config.held_out_nsamples
    return predicted_bytes(pipeline, config.sampling, 2 * config.finetune_nsamples, evaluated)


def close_finished(folder: RunFolder) -> dict:
    """Return the summary of a finished run, and delete working data that a kill at its very end left."""
    shutil.rmtree(folder.work, ignore_errors=True)
    Checkpoints(folder.path, 0).clear()
    log_info(f"{folder.path} is finished already")
    return json.loads((folder.path / "summary.json").read_text(encoding="utf-8"))


def load_models(config: FinetuneConfig, ranks: Ranks, source: Path) -> tuple[DiffusionPipeline, nn.Module]:
    """Load MODEL's pipeline, whose denoiser is the teacher, and the student, to the CPU until it is known what fits.

    Raises:
        UserError: either cannot be loaded, they do not fit, MODEL is quantized itself, or the settings do not fit it.
    """
    student, dtype = load_denoiser(source, torch.float32), pick_dtype(config.dtype, ranks.device)
    pipeline = skeleton_pipeline(config, dtype) if config.dry_run else None
    pipeline = pipeline or configured_pipeline(config, torch.device("cpu"), dtype)
    check_fits(student, denoiser_of(pipeline), config.quantized, config.model)
    check_loaded(denoiser_of(pipeline), config.model, role=ROLE)
    set_timesteps(pipeline.scheduler, config.sampling.num_inference_steps or 50)
    if config.finetune_scope != "blocks":
        steps_per_epoch(config, len(pipeline.scheduler.timesteps))
    if config.real_images:
        check_scheduler(pipeline.scheduler)
    return pipeline, student


def fitted(
    config: FinetuneConfig, pipeline: DiffusionPipeline, student: nn.Module, trained: TrainedParameters, ranks: Ranks
) -> tuple[FinetuneConfig, list[Need]]:
    """Return the settings with the scope and flags of memory that are left open chosen by what is free, and the needs.

    A run keeps the scope that it was started with.

    Raises:
        UserError: a phase needs more than is free, unless `ignore_budget` or `dry_run`.
    """
    if config.finetune_scope == "auto" and config.resume:
        started = RunFolder(config.output_dir).started_with("finetune_scope", "auto")
        config = replace(config, finetune_scope=started)
    shapes, options = shapes_of(pipeline, config), choices(config)
    if shapes is None:
        log_info("no plan of memory: the denoiser or the VAE wants arguments that are not known")
        return options[0], []
    dtype = compute_dtype(denoiser_of(pipeline))
    sizes = Student.of(student, trained, dtype, shapes.call)
    steps, rates = shapes.steps * shapes.calls, MatmulRates.measured(ranks.device, dtype)

    def needs_of(one: FinetuneConfig) -> list[Need]:
        return on(plan(one, shapes, sizes, steps, rates), ranks.device.type)

    free = free_memory(ranks.device)
    fitting = (k for k, one in enumerate(options) if not lacking(needs_of(one), *free))
    chosen = options[ranks.broadcast(next(fitting, len(options) - 1))]
    log_info(f"memory: {flags(chosen)}")
    return chosen, budgeted(chosen, needs_of, smaller(chosen), flags, ranks.device)


def training_plan(config: FinetuneConfig, ranks: Ranks, trained: TrainedParameters) -> str:
    """Return one line: what is trained, on how much, by how many processes."""
    plural = {kind: f"{kind}es" if kind.endswith("s") else f"{kind}s" for kind in KINDS}
    kinds = [f"{sum(one == kind for one in trained.kinds.values())} {plural[kind]}" for kind in KINDS]
    values = sum(tensor.numel() for tensor in trained)
    return (
        f"training {values / 1e6:.2f} M values in {len(trained.kinds)} tensors ({', '.join(kinds)}), "
        f"on {config.finetune_nsamples} trajectories ({config.finetune_method}) per epoch, "
        f"batch size {config.finetune_batch_size}, on {ranks.world} {ranks.device.type} process"
        f"{'es' if ranks.world > 1 else ''}"
    )


def steps_per_epoch(config: FinetuneConfig, points: int) -> int:
    """Return the optimizer steps of an epoch, with `points` points per trajectory.

    Raises:
        UserError: an epoch has too few points for one batch.
    """
    count = config.finetune_nsamples * points
    if count < config.finetune_batch_size:
        raise UserError(
            f"--finetune_batch_size is {config.finetune_batch_size}, but an epoch has {count} points "
            f"({config.finetune_nsamples} trajectories of {points} steps)"
        )
    return count // config.finetune_batch_size


# ------------------------------------------------------------------------------------------- the work


def run(job: FinetuneJob, trained: TrainedParameters) -> dict | None:
    """Run all slow steps; finds and continues what an interrupted run left."""
    with job.clock("teacher"):
        evaluation, held_out = job.recorder.evaluation(), job.recorder.held_out()
        teacher_images = job.recorder.teacher_images() if job.ranks.main else []
    if not job.swappers:
        denoiser_of(job.pipeline).to("cpu")  # its outputs are recorded; it comes back for the next points
    with job.clock("evaluation"):
        before = evaluate(job.loss_fn, evaluation, evaluation.all())
    if not math.isfinite(before.loss):
        advice = "use another --dtype (float32 or bfloat16)"
        raise RunError(f"QUANTIZED {job.config.quantized} gives NaN or infinity before training; {advice}")
    log_info(
        f"{label(job.component)}-output error on {len(job.datasets.evaluation)} evaluation prompts before training: "
        f"{before.db:.2f} dB, median {before.median_db:.2f} dB"
    )
    if job.swappers:
        about, diverged = in_blocks(job, held_out), ""
    else:
        about, diverged = together(job, trained, held_out, teacher_images)
    write_back(job.student, job.types, torch.float32)  # evaluated are the stored values
    with job.clock("evaluation"):
        after = evaluate(job.loss_fn, evaluation, evaluation.all())
    summary = save_result(job, about, (before, after), teacher_images) if job.ranks.main else None
    job.ranks.barrier()
    if diverged:
        raise RunError(f"{diverged}, is in {job.folder.path}; try a lower --finetune_lr")
    return summary


def together(
    job: FinetuneJob, trained: TrainedParameters, held_out: Points, teacher_images: list[Image.Image]
) -> tuple[dict, str]:
    """Train the whole denoiser; return what the summary says of it, and why it diverged, with what is kept, or ""."""
    loop = make_loop(job, trained, held_out, teacher_images)
    with job.clock("training"):
        step_kept, divergence = loop.run_to_result()
    updates = loop.trainer.updates
    groups, changed = updates.changed_groups() if updates else (0, 0)
    if updates:
        updates.close()
    if job.ranks.main:
        save_loss_plot(read_log(loop.log.path, loop.trainer.steps_done), job.folder.path / "loss.png")
    about = {
        "learning_rate": loop.progress.learning_rate,
        "learning_rate_reductions": loop.progress.reductions,
        "steps": loop.trainer.steps_done,
        "step_kept": step_kept,
        "best": loop.progress.best,
        "groups": groups,
        "groups_changed": changed,
    }
    return about, f"{divergence}: {loop.kept()}" if divergence else ""


def in_blocks(job: FinetuneJob, held_out: Points) -> dict:
    """Train block by block; return what the summary says of it."""
    rows = finetune_blocks(job, held_out)
    if job.ranks.main:
        save_text("".join(json.dumps(row) + "\n" for row in joined_logs(job, rows)), job.folder.path / "training.jsonl")
    return {
        "blocks": rows,
        "steps": sum(row["steps"] for row in rows),
        "groups": sum(row["groups"] for row in rows),
        "groups_changed": sum(row["groups_changed"] for row in rows),
    }


def make_loop(
    job: FinetuneJob, trained: TrainedParameters, held_out: Points, teacher_images: list[Image.Image]
) -> Loop:
    """Build the training loop, and restore the newest checkpoint if there is one."""
    config, folder, recorder = job.config, job.folder.path, job.recorder
    per_epoch = steps_per_epoch(config, len(held_out.parts[0].timesteps))
    keep_outputs = recorder.keeps_outputs(held_out)
    total = per_epoch * config.finetune_max_epochs
    total = min(total, config.max_steps) if config.max_steps else total
    updates = CodeUpdates(job.student, config.code_updates) if config.code_updates else None
    trainer = Trainer(job.loss_fn, trained, config.optimizer, total, config.decode, updates)
    checkpoints = Checkpoints(folder, config.checkpoints_total_limit, job.ranks.device)

    def points_of(epoch: int) -> Points:
        saved = checkpoints.steps()
        without_checkpoint = 0 if config.checkpointing_steps else epoch
        recorder.delete_epochs(saved[0] // per_epoch if saved else without_checkpoint)
        with job.clock("points"):
            return recorder.epoch(epoch, keep_outputs)

    def save_images(step: int) -> None:
        path = folder / "images" / f"step-{step:06d}.png"
        generate_pairs(job, path, config.visualize_nsamples, teacher_images)

    schedule = TrainingSchedule(
        points_of, per_epoch, total, config.finetune_batch_size, config.timestep_sampling, config.seed
    )
    evaluations = EvaluationSchedule(
        config.eval_step,
        config.checkpointing_steps,
        config.visualize_step,
        config.finetune_keep_best,
        config.early_stopping_patience,
        config.finetune_relative_mse_tolerance,
        job.types,
        save_images,
    )
    saved, log = checkpoints.steps(), folder / "training.jsonl"
    if job.ranks.main:
        read_log(log, saved[-1] if saved else -1)
    chosen = spread(held_out, config.held_out_points)
    loop = Loop(trainer, schedule, (held_out, chosen), evaluations, checkpoints, JsonLines(log), job.tracker)
    if saved:
        loop.resume(saved[-1])
        log_info(f"resuming after step {saved[-1]} of {total}")
    return loop


# ------------------------------------------------------------------------------------------- the result


def generate_pairs(job: FinetuneJob, path: Path, count: int, teacher_images: list[Image.Image]) -> list[Image.Image]:
    """Generate the student's images of `count` evaluation prompts, and save a sheet of pairs; on the first process."""
    config, prompts = job.config, job.datasets.evaluation[:count]
    if not (job.ranks.main and count):
        return []
    seed, settings = config.seed + EVALUATION_SEED_OFFSET, config.sampling.call()
    with with_denoiser(job.pipeline, job.student):
        images = generate_images(job.pipeline, prompts, seed, settings, job.size)
    shown = config.visualize_nsamples
    if shown:
        sheet = pair_sheet(prompts[:shown], teacher_images[:shown], images[:shown], ("full precision", "fine-tuned"))
        save_png(sheet, path)
        job.tracker.images("image_pairs", [sheet])
    return images


def save_result(
    job: FinetuneJob, about: dict, errors: tuple[Errors, Errors], teacher_images: list[Image.Image]
) -> dict:
    """Write the pipeline folder, the card, the plots and the summary, then delete the working data.

    Args:
        about: what the summary says of the training.
        errors: on the evaluation prompts, before and after.
    """
    folder, staged = job.folder, job.folder.work / "pipeline"
    with job.clock("evaluation"):
        images = generate_pairs(job, folder.path / "image_pairs.png", job.config.evaluation_nsamples, teacher_images)
        scores = compare_images(teacher_images, images, job.datasets.evaluation, "fine-tuned")
    parameters = sum(tensor.numel() for tensor in denoiser_of(job.pipeline).parameters())
    for swapper in job.swappers:
        swapper.leave()
    write_back(job.student, job.types)
    with job.clock("saving"):
        stage_pipeline(job, staged)
    summary = summary_of(job, about, *errors) | stored_sizes(job.student, job.component, parameters, staged)
    summary |= {"images": scores}
    save_text(model_card(job.config.model, summary), staged / "README.md")
    folder.publish(staged)
    save_json(summary, folder.path / "summary.json")
    shutil.rmtree(folder.work)
    Checkpoints(folder.path, 0).clear()
    job.tracker.log({key: value for key, value in summary.items() if isinstance(value, int | float)})
    return summary


def stage_pipeline(job: FinetuneJob, staged: Path) -> None:
    """Write a whole pipeline with the student as its denoiser into `staged`.

    All other components are copied from the folder around the quantized one. If there is none, they are the model's,
    each in the type that it computes in, or a narrower one of its files.
    """
    config, quantized = job.config, job.source.parent
    shutil.rmtree(staged, ignore_errors=True)
    index = quantized / "model_index.json"
    if index.is_file():
        staged.mkdir(parents=True)
        shutil.copy(index, staged)
        for name, value in json.loads(index.read_text(encoding="utf-8")).items():
            if isinstance(value, list) and name != job.component and (quantized / name).is_dir():
                shutil.copytree(quantized / name, staged / name)
        job.student.save_pretrained(staged / job.component)
    else:
        stored = stored_dtypes(config.model, config.variant, config.revision)
        stored.pop(job.component, None)
        job.pipeline.register_modules(**{job.component: job.student})
        with saved_types(job.pipeline, stored):
            job.pipeline.save_pretrained(staged)


def summary_of(job: FinetuneJob, about: dict, before: Errors, after: Errors) -> dict:
    """Return settings, errors and cost of the run. `unet_output_error_db`, or that of another
    component's name, is the error after, as in a quantization."""
    config = job.config
    error = f"{job.component}_output_error"
    return {
        "model": config.model,
        "quantized": config.quantized,
        "component": job.component,
        "layers_quantized": len(quantized_layers(job.student)),
        "layers_in_8_bit": len(int8_layers(job.student)),
        f"bytes_of_original_{job.component}": stored_bytes(
            config.model, config.variant, job.component, config.revision
        ),
        f"{error}_db_before": before.db,
        f"{error}_db_after": after.db,
        f"{error}_median_db_before": before.median_db,
        f"{error}_median_db_after": after.median_db,
        f"{error}_db": after.db,
        f"{error}_db_by_point_before": before.by_point,
        f"{error}_db_by_point": after.by_point,
        f"{error}_db_by_timestep_before": before.db_by_timestep,
        f"{error}_db_by_timestep": after.db_by_timestep,
        "finetune_scope": config.finetune_scope,
        "memory_flags": flags(config),
        **about,
        "seconds": job.clock.phases | {"total": round(sum(job.clock.phases.values()), 3)},
        "peak_memory_bytes": job.clock.whole(),
        "peak_memory_bytes_by_phase": job.clock.beside(job.needs),
        "versions": versions(),
        "command": own_command(),
    }
