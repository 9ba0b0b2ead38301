"""What a fine-tuning leaves: pictures beside the teacher's, the pipeline folder, the summary."""

from __future__ import annotations

import shutil
from pathlib import Path

from PIL import Image

from vqdm.devices import peak_memory
from vqdm.diffusion.pipelines import weight_files
from vqdm.diffusion.sampling import EVALUATION_SEED_OFFSET, compared_pictures, pictures
from vqdm.finetuning.distill_job import Distillation
from vqdm.finetuning.evaluation import Errors, read_log, save_loss_plot
from vqdm.finetuning.loop import Loop
from vqdm.finetuning.parameters import write_back
from vqdm.finetuning.result import sizes, stage
from vqdm.finetuning.sources import using
from vqdm.finetuning.trainer import Trainer
from vqdm.images import pair_sheet, save_png
from vqdm.layers.int8 import int8_layers
from vqdm.layers.quantized import quantized_layers
from vqdm.redaction import own_command
from vqdm.storage.files import save_json, save_text
from vqdm.storage.hub import model_card
from vqdm.versions import versions


def draw_pairs(job: Distillation, path: Path, count: int) -> list[Image.Image]:
    """The student's pictures of the first evaluation prompts, and a sheet with the teacher's; on the first process."""
    config, prompts = job.config, job.material.evaluation[:count]
    if not (job.ranks.main and count):
        return []
    seed, settings = config.seed + EVALUATION_SEED_OFFSET, config.sampling.call()
    with using(job.pipeline, job.student):
        drawn = pictures(job.pipeline, prompts, seed, settings, config.xtx_batch_size)
    shown = config.visualize_nsamples
    if shown:
        teacher = job.teacher_pictures[:shown]
        sheet = pair_sheet(prompts[:shown], teacher, drawn[:shown], ("full precision", "fine-tuned"))
        save_png(sheet, path)
        job.tracker.images("image_pairs", [sheet])
    return drawn


def finish(job: Distillation, loop: Loop, step_kept: int, before: Errors, after: Errors) -> dict:
    """Write the pipeline folder, the card, the plots and the summary, then drop the working data."""
    folder, staged = job.folder, job.folder.work / "pipeline"
    drawn = draw_pairs(job, folder.path / "image_pairs.png", job.config.evaluation_nsamples)
    scores = compared_pictures(job.teacher_pictures, drawn, job.material.evaluation, "fine-tuned")
    parameters = sum(tensor.numel() for tensor in job.teacher.parameters())
    write_back(job.student, job.types)
    stage(job.pipeline, job.student, job.source, job.config, staged)
    save_loss_plot(read_log(loop.log.path, loop.trainer.done), folder.path / "loss.png")
    summary = (
        summary_of(job, loop, step_kept, before, after) | sizes(job.student, parameters, staged) | {"pictures": scores}
    )
    save_text(model_card(job.config.model, summary), staged / "README.md")
    folder.publish(staged)
    save_json(summary, folder.path / "summary.json")
    shutil.rmtree(folder.work)
    loop.checkpoints.clear()
    job.tracker.log({key: value for key, value in summary.items() if isinstance(value, int | float)})
    return summary


def summary_of(job: Distillation, loop: Loop, step_kept: int, before: Errors, after: Errors) -> dict:
    """What the run has done, and at what cost. `unet_output_error_db`, as of quantization, is the error after."""
    config = job.config
    files = weight_files(config.model, config.variant, "unet", config.revision)
    original = sum(file.stat().st_size for file in files)
    return {
        "model": config.model,
        "quantized": config.quantized,
        "layers_quantized": len(quantized_layers(job.student)),
        "layers_in_8_bit": len(int8_layers(job.student)),
        "bytes_of_original_unet": original or None,
        "unet_output_error_db_before": before.db,
        "unet_output_error_db_after": after.db,
        "unet_output_error_median_db_before": before.median_db,
        "unet_output_error_median_db_after": after.median_db,
        "unet_output_error_db": after.db,
        "unet_output_error_db_by_point_before": before.by_point,
        "unet_output_error_db_by_point": after.by_point,
        "unet_output_error_db_by_timestep_before": before.db_by_timestep,
        "unet_output_error_db_by_timestep": after.db_by_timestep,
        "learning_rate": loop.progress.learning_rate,
        "learning_rate_reductions": loop.progress.reductions,
        "steps": loop.trainer.done,
        "step_kept": step_kept,
        "best": loop.progress.best,
        **groups_changed(loop.trainer),
        "seconds": job.clock.phases | {"total": round(sum(job.clock.phases.values()), 3)},
        "peak_memory_bytes": peak_memory(job.ranks.device),
        "versions": versions(),
        "command": own_command(),
    }


def groups_changed(trainer: Trainer) -> dict[str, int]:
    """How many groups have codes, and how many of them others than before; none were looked at where codes stay."""
    if not trainer.updates:
        return {"groups": 0, "groups_changed": 0}
    groups, changed = trainer.updates.differing()
    return {"groups": groups, "groups_changed": changed}
