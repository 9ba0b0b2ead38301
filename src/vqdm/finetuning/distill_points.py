"""The points of a fine-tuning: those it is measured on, recorded once, and those of each epoch."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

from PIL import Image

from vqdm.diffusion.sampling import EVALUATION_SEED_OFFSET, record_evaluation
from vqdm.diffusion.trajectories import Trajectories
from vqdm.finetuning.config import sources
from vqdm.finetuning.distill_job import Distillation
from vqdm.finetuning.points import Points
from vqdm.finetuning.sources import Chunk, Studio, divided
from vqdm.images import save_png
from vqdm.parallel import Ranks
from vqdm.storage.run_folder import span_name, spans, wait_for_file
from vqdm.tracking import log_info, progress_bar

HELD_OUT_SEED_OFFSET, TRAINING_SEED_OFFSET = 2_000_000, 3_000_000  # far from those of calibration and evaluation


def recorded(
    folder: Path, parts: Sequence[Chunk], size: int, record: Callable[[Chunk], Trajectories], ranks: Ranks
) -> Points:
    """The points of all parts, in chunks of at most `size`; those that `folder` lacks are recorded, each by one rank.

    Raises:
        RunError: what another process wrote is not here, or damaged.
    """
    places = [(part.source, spans(ranks, folder, part.first, part.count, size)) for part in parts]
    chunks = [Chunk(source, *span) for source, found in places for span in found]
    files = [folder / f"{span_name(chunk.first, chunk.count)}.safetensors" for chunk in chunks]
    missing = ranks.broadcast([k for k, file in enumerate(files) if not file.is_file()])
    for k in progress_bar(ranks.shard(missing), description=f"points of {folder.name}"):
        record(chunks[k]).save(files[k])
    ranks.barrier()
    for file in files:
        wait_for_file(file)
    return Points([Trajectories.load(file) for file in files])


def studio_of(job: Distillation, seed_offset: int, keep_outputs: bool) -> Studio:
    material, config = job.material, job.config
    return Studio(
        job.pipeline,
        job.student,
        config.sampling.call(),
        config.seed + seed_offset,
        keep_outputs,
        material.prompts,
        material.real,
    )


def held_out_points(job: Distillation) -> Points:
    """The teacher's trajectories of the held-out prompts, with its outputs."""
    prompts, size = job.material.held_out, job.config.xtx_batch_size
    studio = studio_of(job, HELD_OUT_SEED_OFFSET, True)
    studio = Studio(**vars(studio) | {"prompts": lambda first, count: prompts[first : first + count]})
    return recorded(job.folder.work / "held_out", divided(["teacher"], 0, len(prompts)), size, studio.record, job.ranks)


def evaluation_points(job: Distillation) -> Points:
    """The teacher's trajectories and outputs on the evaluation prompts; its pictures go to the job."""
    config, prompts = job.config, job.material.evaluation
    folder = job.folder.work / "evaluation"
    seed = config.seed + EVALUATION_SEED_OFFSET

    def record(chunk: Chunk) -> Trajectories:
        some = prompts[chunk.first : chunk.first + chunk.count]
        found, drawn = record_evaluation(job.pipeline, some, seed + chunk.first, config.sampling.call(), chunk.count)
        for k, picture in enumerate(drawn):
            save_png(picture, folder / f"{chunk.first + k:06d}.png")
        return found

    parts = divided(["teacher"], 0, len(prompts))
    points = recorded(folder, parts, config.xtx_batch_size, record, job.ranks)
    if job.ranks.main:
        job.teacher_pictures = [Image.open(file).convert("RGB") for file in sorted(folder.glob("*.png"))]
    return points


def epoch_points(job: Distillation, epoch: int, keep_outputs: bool) -> Points:
    """The points of an epoch, made by the student as it is now where it makes them."""
    config = job.config
    studio = studio_of(job, TRAINING_SEED_OFFSET, keep_outputs)
    first = epoch * config.finetune_nsamples
    parts = divided(sources(config.finetune_method), first, config.finetune_nsamples)
    folder = job.folder.work / f"epoch-{epoch:04d}"
    with job.clock("points"):
        job.teacher.to(job.ranks.device)
        points = recorded(folder, parts, config.xtx_batch_size, studio.record, job.ranks)
        if all(part.outputs is not None for part in points.parts):  # a run before may have kept none
            job.teacher.to("cpu")  # where nobody will ask it
    return points


def forget_epochs(job: Distillation, oldest: int) -> None:
    """Delete the points of the epochs before `oldest`."""
    for folder in job.folder.work.glob("epoch-*") if job.ranks.main else ():
        if int(folder.name.removeprefix("epoch-")) < oldest:
            shutil.rmtree(folder)


def keeps_outputs(job: Distillation, points: Points) -> bool:
    """Whether what the teacher says on an epoch's points fits into --target_cache_gb, and onto the disk."""
    outputs = points.parts[0].outputs  # [N, S, A, C, h, w]
    need = outputs[0].nbytes * job.config.finetune_nsamples
    free = shutil.disk_usage(job.folder.path).free
    fits = job.ranks.broadcast(need <= 1e9 * job.config.target_cache_gb and 2 * need < free)
    log_info(
        f"outputs of the teacher: {need / 1e9:.2f} GB per epoch, {'on disk' if fits else 'computed at every step'}"
    )
    return fits
