"""Quantize a pipeline's UNet: the main job, from prompts to a finished pipeline folder.

Order of work: record the teacher once; then block by block record Hessians with the earlier blocks quantized, solve
each layer, swap the block's layers in; then measure against the teacher and write the folder (arXiv 2409.00492, §4).

Of several processes each goes through all of it and holds the same model; they share prompts, points and layers, and
the first alone writes what there is one of. The result is the same to the last byte for any number of them.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from PIL import Image
from safetensors import SafetensorError

from vqdm.additive.code import AdditiveCode
from vqdm.devices import check_float64, peak_memory, pick_dtype
from vqdm.diffusion.blocks import Layer, rest_layers, select_layers
from vqdm.diffusion.pipelines import (
    check_model,
    configured_pipeline,
    load_pipeline,
    log_truncated,
    saved_types,
    stored_dtypes,
    weight_files,
)
from vqdm.diffusion.sampling import (
    check_timestep_range,
    compared_pictures,
    error_spread,
    output_error,
    point_errors,
    predicted_bytes,
)
from vqdm.diffusion.supported import check_loaded, check_supported
from vqdm.diffusion.trajectories import Trajectories
from vqdm.documents import first_line
from vqdm.errors import RunError, UserError
from vqdm.fidelity import decibels
from vqdm.images import pair_sheet, save_png
from vqdm.layers.int8 import int8_layers, quantize_int8
from vqdm.layers.quantized import QuantizedLayer, decoded_once, quantized_layers, swap
from vqdm.parallel import Ranks, launched
from vqdm.prompts import draw, load_prompts
from vqdm.quantization.allocation import allocated
from vqdm.quantization.block import layer_row, load_solved, solve_block
from vqdm.quantization.codebook_training import make_banks, shared
from vqdm.quantization.config import QuantizeConfig
from vqdm.quantization.plan import (
    Rest,
    bank_bits,
    bank_users,
    blocks_before_finetuning,
    hessian_bytes,
    layer_table,
    plain_bits,
    totals,
)
from vqdm.quantization.quantization_job import Job, on_save
from vqdm.quantization.recording import (
    calibration_trajectories,
    digest,
    finetuning_trajectories,
    student_pictures,
    teacher_evaluation,
    teacher_hessians,
    teacher_trajectories,
)
from vqdm.redaction import own_command
from vqdm.storage.files import save_json, save_text
from vqdm.storage.hf import mark_quantized
from vqdm.storage.hub import model_card
from vqdm.storage.run_folder import RunFolder, SolvedLayer
from vqdm.tracking import Stopwatch, Tracker, log_info, progress_bar
from vqdm.versions import versions


def quantize(config: QuantizeConfig, finetune_blocks: Callable | None = None) -> dict | None:
    """Run the whole job and return the summary; None after a dry run, and on every process but the first.

    Args:
        finetune_blocks: trains the blocks that are quantized so far, `num_intermediate_finetunes` times; called with
            the UNet, full-precision trajectories with outputs, the blocks' names, the ranks, and a file for the trained
            parameters. `finetuning.intermediate.block_finetuner` returns one.

    Raises:
        UserError: bad input, found before anything slow starts.
        RunError: the work failed; what is finished stays on disk for `resume`.
    """
    if config.intermediate.num_intermediate_finetunes and finetune_blocks is None:
        raise UserError("--num_intermediate_finetunes is above 0, but quantize() was called without finetune_blocks")
    prompts = read_prompts(config)
    check_model(config.model, config.variant)
    check_supported(config.model, config.revision, config.local_files_only)
    with launched(config.device) as ranks:
        check_float64(ranks.device)
        return quantize_on(ranks, config, *prompts, finetune_blocks)


def quantize_on(
    ranks: Ranks,
    config: QuantizeConfig,
    calibration: list[str],
    evaluation: list[str],
    finetune_blocks: Callable | None = None,
) -> dict | None:
    """The whole job of one of several processes; the summary on the first, None on the others."""
    pipeline = configured_pipeline(config, ranks.device, pick_dtype(config.dtype, ranks.device))
    check_loaded(pipeline.unet, config.model)
    layers = chosen_layers(config, pipeline.unet)
    parameters = sum(tensor.numel() for tensor in pipeline.unet.parameters())
    rest = Rest.of(pipeline.unet, rest_layers(pipeline.unet, layers) if config.unquantized_nbits == 8 else [])
    stored = stored_dtypes(config.model, config.variant, config.revision)
    plain = plain_bits(pipeline.unet, stored.get("unet"))
    if config.target_bits:
        weights = sum(layer.rows * layer.columns for layer in layers)
        log_info(
            totals(layers, parameters, rest, plain, config.target_bits * weights) + "; allocated after calibration"
        )
    else:
        log_info(layer_table(layers, parameters, rest, plain))
    check_timestep_range(
        pipeline.scheduler, config.sampling.num_inference_steps, config.min_timestep, config.max_timestep
    )
    blocks_before_finetuning(config.intermediate.num_intermediate_finetunes, len({layer.block for layer in layers}))
    if ranks.main:
        log_truncated(pipeline, calibration + evaluation)
    if config.dry_run:
        return None
    folder = RunFolder(config.output_dir)
    with folder.lock(ranks):
        settings = config.to_dict() | {"prompts_sha256": digest(calibration + evaluation)}
        settings["full_precision_hessians"] = bool(config.hessian_cache or config.target_bits or bank_users(layers))
        if ranks.main:
            need = predicted_bytes(pipeline, config.sampling, len(calibration), len(evaluation))
            need += hessian_bytes(layers, config.hessian_memory_gb)
            folder.open(settings, versions(), config.resume, need)
        if ranks.broadcast(folder.finished):
            return close_finished(folder) if ranks.main else None
        about, kind = config.to_dict() | config.spec.to_dict(), config.report_to if ranks.main else "none"
        tracker = Tracker(kind, "vqdm-quantize", folder.path, about)
        job = Job(config, pipeline, layers, calibration, evaluation, folder, tracker, Stopwatch(), parameters, rest)
        job.ranks, job.stored, job.finetune_blocks = ranks, stored, finetune_blocks
        job.bank_memory_gb = ranks.broadcast(folder.started_with("hessian_memory_gb") if ranks.main else None)
        try:
            return run(job)
        finally:
            tracker.finish()


def chosen_layers(config: QuantizeConfig, unet: torch.nn.Module) -> list[Layer]:
    """The layers to quantize; with `target_bits` in single columns, which any layer divides into."""
    spec = config.spec.changed(in_group_size=1) if config.target_bits else config.spec
    layers = select_layers(unet, config.layer_filter, config.min_channels, spec, config.overrides, config.spec)
    return [shared(layer, config.share_codebooks) for layer in layers]


def close_finished(folder: RunFolder) -> dict:
    """The summary of a run that has ended, without the working data that a kill at its very end left."""
    shutil.rmtree(folder.work, ignore_errors=True)
    log_info(f"{folder.path} is finished already")
    return json.loads((folder.path / "summary.json").read_text(encoding="utf-8"))


def read_prompts(config: QuantizeConfig) -> tuple[list[str], list[str]]:
    """Calibration and evaluation prompts, drawn as the settings say."""
    calibration = load_prompts(config.calibration_prompts, "CALIBRATION_PROMPTS")
    evaluation = load_prompts(config.evaluation_prompts, "EVALUATION_PROMPTS")
    return (
        draw(
            calibration, config.calibration_nsamples, config.seed, config.calibration_prompts, "--calibration_nsamples"
        ),
        draw(evaluation, config.evaluation_nsamples, config.seed, config.evaluation_prompts, "--evaluation_nsamples"),
    )


def run(job: Job) -> dict | None:
    """All slow steps; every one of them finds and keeps what an interrupted run left."""
    with job.clock("teacher"):
        teacher, teacher_pictures = teacher_evaluation(job)
        finetuned_on = finetuning_trajectories(job) if job.config.intermediate.num_intermediate_finetunes else []
    if job.config.unquantized_nbits == 8:
        round_rest(job)
    prepare(job)
    solved = load_codes(job) | finished_layers(job)
    if job.ranks.main:
        job.folder.rewrite_table([done.report for done in solved.values()])
    finetunes = blocks_before_finetuning(job.config.intermediate.num_intermediate_finetunes, len(job.blocks))
    for index, (block, layers) in enumerate(progress_bar(job.blocks, description="blocks"), start=1):
        todo = [layer for layer in layers if layer.name not in solved]
        if todo:
            log_info(f"block {index}/{len(job.blocks)} {block}: {len(todo)} of {len(layers)} layers to solve")
            solved |= solve_block(job, layers, todo, calibration_points(job, block))
        swap_block(job, layers, solved)
        if index in finetunes:
            done, file = [block for block, _ in job.blocks[:index]], f"finetuned/after-{index:02d}.safetensors"
            with job.clock("fine-tuning"):
                job.finetune_blocks(job.unet, finetuned_on, done, job.ranks, job.folder.work / file)
        after_block(job, index, block, teacher)
    with job.clock("evaluation"), decoded_once(job.unet):
        errors = point_errors(job.unet, teacher, job.config.xtx_batch_size, job.ranks)
        drawn = student_pictures(job)
        scores = compare_pictures(job, teacher_pictures, drawn) if job.ranks.main else {}
    return finish(job, solved, errors, scores) if job.ranks.main else None


def prepare(job: Job) -> None:
    """What the layers have in common: Hessians of the full-precision model, formats, shared codebooks."""
    config = job.config
    if config.hessian_cache or config.target_bits or bank_users(job.layers):
        with job.clock("hessians"):
            job.store = teacher_hessians(job)
    if config.target_bits:
        with job.clock("allocation"):
            job.layers = allocated(job, job.store)
            log_info(layer_table(job.layers, job.parameters, job.rest, plain_bits(job.unet, job.stored.get("unet"))))
    with job.clock("banks"):
        job.banks = make_banks(job, job.store) if bank_users(job.layers) else {}


def calibration_points(job: Job, block: str) -> Trajectories | None:
    """The points that a block is calibrated on; None where stored Hessians serve."""
    if job.config.calibration_latents == "student":
        return calibration_trajectories(job, f"calibration_{block}")
    return None if job.store else teacher_trajectories(job)


# ------------------------------------------------------------------------------------------- layers


def finished_layers(job: Job) -> dict[str, SolvedLayer]:
    """Layers that an interrupted run left; as the first rank sees them, for all must go on with the same ones."""
    done = job.ranks.broadcast([layer for layer in job.layers if job.folder.layer_path(layer.name).is_file()])
    return {layer.name: load_solved(job, layer) for layer in done}


def load_codes(job: Job) -> dict[str, SolvedLayer]:
    """Layers that `--load` brings from an earlier result, where name, format and shared codebooks agree."""
    if job.config.load is None:
        return {}
    earlier = load_pipeline(job.config.load, torch.device("cpu"), torch.float32)
    held, found = quantized_layers(earlier.unet), {}
    for layer in job.layers:
        if layer.name in held and held[layer.name].spec == layer.spec and same_bank(job, held[layer.name]):
            tensors = held[layer.name].code().pack()
            found[layer.name] = SolvedLayer(tensors, layer.spec, layer_row(layer, {"loaded_from": job.config.load}))
    log_info(f"--load {job.config.load}: {len(found)} of {len(job.layers)} layers are taken from there")
    return found


def same_bank(job: Job, layer: QuantizedLayer) -> bool:
    """Whether a quantized layer's codes mean the same with the job's bank of that name; True for own codebooks."""
    bank = job.banks.get(layer.spec.shared_codebooks)
    return bank is None or torch.equal(layer.code().codebooks.float().cpu(), bank.codebooks.cpu())


def round_rest(job: Job) -> None:
    """Put what is not to be quantized into 8 bit, before Hessians are recorded.

    Raises:
        RunError: a weight is not finite; names the layer.
    """
    for name in rest_layers(job.unet, job.layers):
        try:
            quantize_int8(job.unet, name)
        except ValueError as error:
            raise RunError(str(error)) from None


def swap_block(job: Job, layers: list[Layer], solved: dict[str, SolvedLayer]) -> None:
    """Put a block's codes in the place of its weights."""
    for layer in layers:
        done = solved[layer.name]
        name, bank = layer.spec.shared_codebooks, job.banks.get(layer.spec.shared_codebooks)
        code = AdditiveCode.unpack(done.spec, (layer.rows, layer.columns), done.tensors, bank and bank.codebooks)
        quantized = swap(job.unet, layer.name, layer.spec)
        if bank:
            quantized.shared[0].fill(name, bank.codebooks)
        quantized.set_code(code)


def after_block(job: Job, index: int, block: str, teacher: Trajectories) -> None:
    """Optional looks in between: the output error, a loadable snapshot."""
    config = job.config
    if job.ranks.main:
        job.folder.drop_block(block)
    if config.eval_step and index % config.eval_step == 0:
        error = output_error(job.unet, teacher, config.xtx_batch_size, job.ranks)
        job.tracker.log({"unet_output_error_db": error}, step=index)
        log_info(f"after {block}: UNet-output error {error:.2f} dB")
    if config.snapshot_step and index % config.snapshot_step == 0 and job.ranks.main:
        mark_quantized(job.unet)
        path = job.folder.path / "snapshots" / f"{index:02d}_{block}" / "unet"
        with saved_types(job.pipeline, job.stored):
            job.unet.save_pretrained(path)
        on_save(config.on_save, path)


# ------------------------------------------------------------------------------------------- the end


def compare_pictures(job: Job, teacher: list[Image.Image], drawn: list[Image.Image]) -> dict:
    """Save the sheet of pairs, and score the student's pictures by the teacher's."""
    count = job.config.visualize_nsamples
    if count:
        sheet = pair_sheet(job.evaluation[:count], teacher[:count], drawn[:count], ("full precision", "quantized"))
        save_png(sheet, job.folder.path / "image_pairs.png")
        job.tracker.images("image_pairs", [sheet])
    return compared_pictures(teacher, drawn, job.evaluation, "quantized")


def finish(job: Job, solved: dict[str, SolvedLayer], errors: tuple[list, list], scores: dict) -> dict:
    """Write the pipeline folder, the card and the summary, then drop the working data."""
    config = job.config
    files = weight_files(config.model, config.variant, "unet", config.revision)
    staged = job.folder.work / "pipeline"
    with saved_types(job.pipeline, job.stored):
        save_pipeline(job, staged)
        sizes = stored_sizes(job, staged)
    summary = {
        "model": job.config.model,
        "layers_quantized": len(job.layers),
        "layers_in_8_bit": len(int8_layers(job.unet)),
        **sizes,
        "bytes_of_original_unet": sum(file.stat().st_size for file in files) or None,
        "unet_output_error_db": decibels(*map(sum, errors)),
        "unet_output_error_db_by_point": error_spread(*errors),
        "images": scores,
        "seconds": job.clock.phases | {"total": round(sum(job.clock.phases.values()), 3)},
        "peak_memory_bytes": peak_memory(job.ranks.device),
        "versions": versions(),
        "command": own_command(),
        "layers": [done.report for done in solved.values()],
    }
    save_text(model_card(job.config.model, summary), staged / "README.md")
    job.folder.publish(staged)
    save_json(summary, job.folder.path / "summary.json")
    shutil.rmtree(job.folder.work)
    measured = {key: value for key, value in scores.items() if key != "problems"}
    job.tracker.log({key: value for key, value in summary.items() if not isinstance(value, dict | list)} | measured)
    on_save(job.config.on_save, job.folder.path)
    return summary


def save_pipeline(job: Job, staged: Path) -> None:
    """The whole pipeline as diffusers saves it."""
    shutil.rmtree(staged, ignore_errors=True)
    mark_quantized(job.unet)
    forget_calls(job.pipeline)
    try:
        job.pipeline.save_pretrained(staged)
    except (OSError, SafetensorError) as error:
        raise RunError(f"{staged} cannot be written: {first_line(error)}; --resume goes on here") from None


def forget_calls(pipeline: DiffusionPipeline) -> None:
    """Clear what tokenizers keep of their last call and would save: a resumed run may not have called them at all."""
    for part in pipeline.components.values():
        backend = getattr(part, "backend_tokenizer", None)
        if backend is not None:
            backend.no_truncation()
            backend.no_padding()


def stored_sizes(job: Job, staged: Path) -> dict[str, float]:
    """Effective bits from the tensors as saved, and bytes of the UNet's files."""
    layers = quantized_layers(job.unet)
    weights = sum(layer.rows * layer.columns for layer in job.layers)
    code_bits = sum(layer.stored_bits for layer in layers.values()) + bank_bits(job.layers)
    every_bit = sum(8 * tensor.element_size() * tensor.numel() for tensor in job.unet.parameters())
    return {
        "weights_quantized": weights,
        "effective_bits_layers": code_bits / weights,
        "effective_bits_unet": every_bit / job.parameters,
        "bytes_of_unet": sum(file.stat().st_size for file in staged.glob("unet/*.safetensors")),
    }
