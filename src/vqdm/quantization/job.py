"""Quantize a pipeline's denoiser: the main job, from prompts to a finished pipeline folder.

Order of work: record the teacher once; then block by block record Hessians with the earlier blocks quantized, quantize
each layer, swap the block's layers in; then evaluate against the teacher and write the folder (arXiv 2409.00492, §4).

Of several processes each goes through all of it and holds the same model; they share prompts, points and layers, and
the first alone writes what exists once. The result is the same to the last byte for any number of them.
"""

from __future__ import annotations

import json
import shlex
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from itertools import chain, groupby
from pathlib import Path
from typing import NamedTuple

import torch
from diffusers import DiffusionPipeline
from PIL import Image
from safetensors import SafetensorError

from vqdm.additive.code import SharedCodebooks
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
from vqdm.diffusion.blocks import Layer, select_layers, unquantized_layers
from vqdm.diffusion.denoisers import compute_dtype, denoiser_name, denoiser_of, is_known
from vqdm.diffusion.hessians import HessianStore
from vqdm.diffusion.model_folders import check_loaded, check_supported, find_denoiser, load_denoiser, load_text_encoders
from vqdm.diffusion.pipelines import (
    check_configured,
    configured_pipeline,
    image_size,
    latent_scale,
    log_truncated,
    networks,
    parameter_bytes,
    pipeline_bytes,
    resting_on_cpu,
    saved_types,
    stored_bytes,
    stored_dtypes,
    weights_fingerprint,
)
from vqdm.diffusion.sampling import (
    check_timestep_range,
    compare_images,
    error_spread,
    output_error,
    point_bytes,
    point_errors,
    predicted_bytes,
)
from vqdm.diffusion.shapes import Shapes, input_groups, meta_denoiser, shapes_of, skeleton_pipeline, training_bytes
from vqdm.diffusion.streams import BlockSwapper, BlockWalk
from vqdm.diffusion.trajectories import Trajectories
from vqdm.documents import first_line
from vqdm.errors import RunError, UserError
from vqdm.fidelity import decibels
from vqdm.images import pair_sheet, save_png
from vqdm.layers.int8 import int8_layers, quantize_int8
from vqdm.layers.quantized import decoded_once
from vqdm.parallel import Ranks, launched
from vqdm.prompts import choose, default_prompts, load_prompts
from vqdm.quantization.allocation import check_target
from vqdm.quantization.config import QuantizeConfig
from vqdm.quantization.layerwise import quantize_layers
from vqdm.quantization.plan import (
    Int8Totals,
    blocks_before_finetuning,
    hessian_bytes,
    keeps_hessians,
    offloads,
    plain_bits,
    plan,
    planned_size,
    recorded_bytes,
    smaller,
)
from vqdm.quantization.recording import (
    HessianRecorder,
    digest,
    finetuning_trajectories,
    student_images,
    teacher_evaluation,
    teacher_trajectories,
)
from vqdm.quantization.shared_codebooks import shared
from vqdm.quantization.text_encoder import (
    TextCalibration,
    TextPart,
    TextRecorder,
    planned_text,
    quantize_text_encoders,
    text_hessian_bytes,
    text_names,
)
from vqdm.storage.files import save_json, save_text
from vqdm.storage.hf import mark_quantized
from vqdm.storage.hub import model_card, stored_sizes
from vqdm.storage.run_folder import LayerResult, RunFolder, check_disk
from vqdm.tracking import Tracker, log_info, own_command, redacted, versions

OUT_OF_MEMORY = "try smaller --height and --width, or --hessian_memory_gb"


@dataclass
class Job:
    """The state that the steps of one run share.

    Attributes:
        parameters: number of those of the whole denoiser, or text encoder.
        int8: what becomes int8.
        component: name of what is quantized, in the pipeline and of its folder: the denoiser, or a text encoder.
        text: what a text encoder is calibrated on; None of the denoiser.
        stored: types of the model's components in their files.
        original_bytes: of the denoiser's files, or of its tensors where it was given in memory; None if unknown.
        pipeline_bytes: the same of the whole pipeline.
        fingerprint: of the weights of a pipeline that was given in memory, else None.
        store: Hessians of the full-precision model, where the run keeps them.
        shared_codebooks: by name.
        codebook_memory_gb: for Hessians that shared codebooks are trained on, as the run was started with.
        ranks: the processes that work on it, each of which has this same job.
        text_parts: the text encoders that are quantized after the denoiser.
        finetune_blocks: as `quantize` takes it.
        needs: what was planned, by phase.
        offload: `config.offload`, decided.
        one_block: what keeps all blocks of the denoiser but one in RAM, where they do not fit on the device.
        walk: calls that go from block to block together, then.
        size: `xtx_batch_size`, or what is left of it.
    """

    config: QuantizeConfig
    pipeline: DiffusionPipeline
    layers: list[Layer]
    calibration: list[str]
    evaluation: list[str]
    folder: RunFolder
    tracker: Tracker
    clock: MemoryClock
    parameters: int
    int8: Int8Totals
    component: str
    text: TextCalibration | None = None
    stored: dict[str, torch.dtype] = field(default_factory=dict)
    original_bytes: int | None = None
    pipeline_bytes: int | None = None
    fingerprint: str | None = None
    store: HessianStore | None = None
    shared_codebooks: dict[str, SharedCodebooks] = field(default_factory=dict)
    codebook_memory_gb: float = 8.0
    ranks: Ranks = field(default_factory=Ranks)
    text_parts: list[TextPart] = field(default_factory=list)
    finetune_blocks: Callable | None = None
    needs: list[Need] = field(default_factory=list)
    offload: str = "none"
    one_block: BlockSwapper | None = None
    walk: BlockWalk | None = None
    size: BatchSize = field(init=False)

    def __post_init__(self) -> None:
        self.size = BatchSize(self.config.xtx_batch_size, OUT_OF_MEMORY)

    @property
    def denoiser(self) -> torch.nn.Module:
        """What is quantized: the denoiser, or a text encoder in its place."""
        return getattr(self.pipeline, self.component)

    @property
    def swapper(self) -> BlockSwapper | None:
        """What keeps all blocks but one of what is quantized in RAM, if anything does."""
        return self.one_block if self.one_block and self.one_block.denoiser is self.denoiser else None

    @property
    def blocks(self) -> list[tuple[str, list[Layer]]]:
        return [(block, list(layers)) for block, layers in groupby(self.layers, key=lambda layer: layer.block)]

    def recorder(self, store: HessianStore, trajectories: Trajectories | None = None) -> HessianRecorder:
        """Return what records Hessians, of the denoiser on the teacher's points where no others are given."""
        if self.text:
            return TextRecorder(self, store)
        return HessianRecorder(self, store, trajectories or teacher_trajectories(self))

    def on_save(self, path: Path) -> None:
        """Run the user's command, without a shell, `{path}` replaced by what was saved; failures are only logged."""
        if self.config.on_save is None:
            return
        words = [word.replace("{path}", str(path)) for word in shlex.split(self.config.on_save)]
        try:
            subprocess.run(words, check=True)
        except (OSError, subprocess.CalledProcessError) as error:
            log_info(redacted(f"--on_save failed: {error}"))


def quantize(
    config: QuantizeConfig,
    finetune_blocks: Callable | None = None,
    pipeline: DiffusionPipeline | None = None,
    prompts: tuple[list[str], list[str]] | None = None,
) -> tuple[DiffusionPipeline, dict | None]:
    """Run the whole job.

    Args:
        finetune_blocks: trains the quantized blocks, `num_intermediate_finetunes` times; called with the denoiser,
            full-precision trajectories with outputs, the blocks' names, the ranks, and a file for the trained
            parameters. `finetuning.intermediate.block_finetuner` returns one.
        pipeline: a loaded one to work on, changed in place; without it `config.model` is loaded.
        prompts: for calibration and for evaluation, in place of the files that `config` names.

    Returns:
        The quantized pipeline, and the summary; None in its place after a dry run, and on every process but the first.

    Raises:
        UserError: bad input, found before anything slow starts.
        RunError: the work failed; what is finished stays on disk for `resume`.
    """
    if config.intermediate.num_intermediate_finetunes and finetune_blocks is None:
        raise UserError("--num_intermediate_finetunes is above 0, but quantize() was called without finetune_blocks")
    calibration, evaluation = choose_prompts(config, *(prompts or read_prompts(config)))
    given = pipeline is not None
    check_sources(config, given)
    with launched(config.device) as ranks:
        check_float64(ranks.device)
        pipeline = pipeline or loaded_pipeline(config, ranks.device)
        planned = plan_run(config, pipeline, given, calibration, evaluation, ranks)
        folder, settings = RunFolder(config.output_dir), planned.settings
        if config.dry_run:
            folder.check(settings, config.resume, ranks)
            return pipeline, None
        if not given and planned.offload == "none":
            denoiser_of(pipeline).to(ranks.device)
        with folder.lock(ranks):
            if ranks.main:
                need = disk_to_come(config, planned, folder, pipeline, (len(calibration), len(evaluation)))
                folder.open(settings, versions(), config.resume, 0 if config.ignore_budget else need)
            if ranks.broadcast(folder.finished):
                return load_finished(folder, pipeline, ranks)
            about, kind = config.to_dict() | config.spec.to_dict(), config.report_to if ranks.main else "none"
            tracker = Tracker(kind, "vqdm-quantize", folder.path, about)
            work = (folder, tracker, MemoryClock(ranks.device))
            sizes = planned.parameters, planned.int8, denoiser_name(pipeline)
            job = Job(config, pipeline, planned.layers, calibration, evaluation, *work, *sizes)
            job.text_parts, job.pipeline_bytes = planned.text_parts, planned.pipeline_bytes
            job.needs, job.ranks, job.finetune_blocks = planned.needs, ranks, finetune_blocks
            job.stored, job.original_bytes = planned.stored, planned.original_bytes
            job.fingerprint, job.offload = planned.fingerprint, planned.offload
            job.codebook_memory_gb = ranks.broadcast(folder.started_with("hessian_memory_gb") if ranks.main else None)
            try:
                with resting_on_cpu(pipeline), blocks_in_turn(job):
                    return pipeline, run(job)
            finally:
                tracker.finish()


def disk_to_come(
    config: QuantizeConfig, planned: RunPlan, folder: RunFolder, pipeline: DiffusionPipeline, prompts: tuple[int, int]
) -> int:
    """Return the bytes that the run is yet to write; `prompts`: how many to calibrate on and to evaluate."""
    need = predicted_bytes(pipeline, config.sampling, *prompts) + hessians_to_come(config, planned, folder)
    if planned.offload != "none" and planned.needs:  # some is written only once other files are gone
        written = sum(file.stat().st_size for file in folder.work.rglob("*.safetensors"))
        need = max(0, max(one.disk for one in planned.needs) - written)
    return need + sum(text_hessian_bytes(config, part) for part in planned.text_parts)


@contextmanager
def blocks_in_turn(job: Job) -> Iterator[None]:
    """Inside, one block of the denoiser at a time is on the device, if it does not fit whole."""
    if job.offload != "none":
        job.one_block = BlockSwapper(job.denoiser, job.ranks.device)
    try:
        yield
    finally:
        if job.one_block:
            job.one_block.close()


def check_sources(config: QuantizeConfig, given: bool) -> None:
    """Check the folders and hub names of the flags, where no loaded pipeline is given. Raises UserError."""
    if config.load is not None:
        find_denoiser(config.load, name="--load")
    if not given:
        check_configured(config)
        where = (config.revision, config.local_files_only)
        check_supported(config.model, *where, single_file_config=config.single_file_config)


def loaded_pipeline(config: QuantizeConfig, device: torch.device) -> DiffusionPipeline:
    """Load MODEL, to the CPU until it is known what fits; for a dry run without its weights, where that can be."""
    dtype = pick_dtype(config.dtype, device)
    pipeline = skeleton_pipeline(config, dtype) if config.dry_run else None
    return pipeline or configured_pipeline(config, torch.device("cpu"), dtype)


class RunPlan(NamedTuple):
    """What is known of a run before anything slow starts: as in `Job`, the layers by input, and the run's record."""

    layers: list[Layer]
    parameters: int
    int8: Int8Totals
    groups: list[list[Layer]]
    needs: list[Need]
    offload: str
    stored: dict[str, torch.dtype]
    original_bytes: int | None
    pipeline_bytes: int | None
    fingerprint: str | None
    settings: dict
    text_parts: list[TextPart]


def plan_run(
    config: QuantizeConfig,
    pipeline: DiffusionPipeline,
    given: bool,
    calibration: list[str],
    evaluation: list[str],
    ranks: Ranks,
) -> RunPlan:
    """Choose the layers, and log and check what the run will need.

    Raises:
        UserError: settings and model do not fit each other, or the run does not fit the machine.
    """
    denoiser, component = denoiser_of(pipeline), denoiser_name(pipeline)
    check_loaded(denoiser, config.model)
    names = text_names(config, pipeline)
    stored, original_bytes = model_files(config, pipeline, given)
    layers = chosen_layers(config, denoiser)
    parameters = sum(tensor.numel() for tensor in denoiser.parameters())
    plain = unquantized_layers(denoiser, layers) if config.unquantized_nbits == 8 else []
    int8 = Int8Totals.of(denoiser, plain)
    size, planned = planned_size(config, layers, parameters, int8, plain_bits(denoiser, stored.get(component)))
    log_info(size)
    text_parts = [planned_text(config, pipeline, name, given, stored.get(name)) for name in names]
    whole = pipeline_bytes(config, pipeline, given)
    if text_parts and None not in (whole, original_bytes):
        smaller_by = original_bytes - planned + sum(one.original_bytes - one.planned_bytes for one in text_parts)
        log_info(f"whole pipeline: about {(whole - smaller_by) / 1e6:.2f} MB instead of {whole / 1e6:.2f} MB")
    steps, limits = config.sampling.num_inference_steps, (config.min_timestep, config.max_timestep)
    check_timestep_range(pipeline.scheduler, steps, *limits)
    blocks_before_finetuning(config.intermediate.num_intermediate_finetunes, len({one.block for one in layers}))
    if ranks.main:
        log_truncated(pipeline, calibration + evaluation)
    groups = groups_by_input(config, pipeline, layers)
    needs, offload = planned_needs(config, pipeline, groups, ranks.device, (len(calibration), len(evaluation)))
    if offload != "none" and (component == "unet" or config.intermediate.num_intermediate_finetunes):
        flag = "a UNet" if component == "unet" else "--num_intermediate_finetunes"
        raise UserError(f"--offload {offload} does not go with {flag}; allowed is none")
    fingerprint = weights_fingerprint(pipeline) if given else None
    settings = config.to_dict() | {"prompts_sha256": digest(calibration + evaluation)}
    settings["full_precision_hessians"] = keeps_hessians(config, layers)
    settings |= {"weights_sha256": fingerprint} if given else {}
    about = (offload, stored, original_bytes, whole, fingerprint)
    return RunPlan(layers, parameters, int8, groups, needs, *about, settings, text_parts)


def model_files(
    config: QuantizeConfig, pipeline: DiffusionPipeline, given: bool
) -> tuple[dict[str, torch.dtype], int | None]:
    """Return types of the components as stored, and bytes of the denoiser; of a loaded pipeline those in memory."""
    if given:
        stored = {name: part.dtype for name, part in networks(pipeline).items()}
        return stored, parameter_bytes(denoiser_of(pipeline))
    stored = stored_dtypes(config.model, config.variant, config.revision)
    return stored, stored_bytes(config.model, config.variant, denoiser_name(pipeline), config.revision)


def groups_by_input(config: QuantizeConfig, pipeline: DiffusionPipeline, layers: list[Layer]) -> list[list[Layer]]:
    """Return the layers grouped by the input that they share, found without the weights."""
    height, width = image_size(pipeline, config.sampling.height, config.sampling.width)
    size = (height // latent_scale(pipeline), width // latent_scale(pipeline))
    denoiser = denoiser_of(pipeline)
    return input_groups(meta_denoiser(type(denoiser), denoiser.config), layers, *size)


def planned_needs(
    config: QuantizeConfig,
    pipeline: DiffusionPipeline,
    groups: list[list[Layer]],
    device: torch.device,
    prompts: tuple[int, int],
) -> tuple[list[Need], str]:
    """Log what every phase needs, and return it and `offload` as decided; nothing where the model is an unusual one.

    Args:
        groups: the layers to quantize, as of `groups_by_input`.
        prompts: numbers of those for calibration and for evaluation.

    Raises:
        UserError: a phase needs more than is free, unless `ignore_budget` or `dry_run`.
    """
    shapes = shapes_of(pipeline, config)
    if shapes is None:
        log_info("no plan of memory: the denoiser or the VAE wants arguments that are not known")
        return [], "none" if config.offload == "auto" else config.offload
    denoiser, layers = denoiser_of(pipeline), list(chain.from_iterable(groups))
    unet, dtype = denoiser_name(pipeline) == "unet", compute_dtype(denoiser)
    points = point_bytes(pipeline, config.sampling, *prompts) if unet else recorded_bytes(shapes, *prompts)
    shapes = replace(shapes, points=points)
    if config.target_bits is not None:
        shapes = with_backward(shapes, denoiser, layers, device.type != "cpu")
    on_gpu = not unet and device.type != "cpu"
    rates = MatmulRates.measured(device, dtype)

    def needs_of(one: QuantizeConfig) -> list[Need]:
        return on(plan(one, shapes, groups, keeps_hessians(one, layers), prompts, rates), device.type)

    def flags(one: QuantizeConfig | None) -> str:
        if one is None:
            return "--xtx_batch_size or --hessian_memory_gb"
        more = f" --calibration_nsteps {one.calibration_nsteps}" if one.offload in ("ram", "disk") else ""
        return f"--xtx_batch_size {one.xtx_batch_size} --hessian_memory_gb {one.hessian_memory_gb:g}{more}"

    free = free_memory(device)
    options = [replace(config, offload=one) for one in offloads(config, on_gpu)]
    fitting = next((one for one in options if not lacking(needs_of(one), *free)), options[-1])
    if fitting.offload != "none":
        log_info(f"the denoiser does not fit on the device whole: --offload {fitting.offload}")
    return budgeted(fitting, needs_of, smaller(fitting, shapes.steps * shapes.calls), flags, device), fitting.offload


def with_backward(shapes: Shapes, denoiser: torch.nn.Module, layers: list[Layer], checkpointing: bool) -> Shapes:
    """Return the shapes with what a backward pass takes to the weights of the layers."""
    copied = meta_denoiser(type(denoiser), denoiser.config, compute_dtype(denoiser))
    names = [layer.name for layer in layers]
    return replace(shapes, backward=training_bytes(copied, shapes.call, checkpointing, names))


def hessians_to_come(config: QuantizeConfig, planned: RunPlan, folder: RunFolder) -> int:
    """Return the bytes of Hessians that a run will write, beyond those that exist; 0 if on another disk.

    Raises:
        UserError: the disk of `hessian_cache` has less free.
    """
    kept = keeps_hessians(config, planned.layers)
    sets = 1 if kept and planned.offload != "none" else 2
    need = hessian_bytes(planned.groups, config.hessian_memory_gb, kept, sets)
    place = Path(config.hessian_cache) if config.hessian_cache else folder.work / "hessians"
    need = max(0, need - sum(file.stat().st_size for file in place.glob("*.safetensors")))
    return need if place.parent == folder.work else check_disk(place, folder.path, need, "--hessian_cache")


def chosen_layers(config: QuantizeConfig, denoiser: torch.nn.Module) -> list[Layer]:
    """Return the layers to quantize; with `target_bits` in single columns, into which any layer divides.

    Raises:
        UserError: there is none, or they cannot take `target_bits`.
    """
    spec = config.spec if config.target_bits is None else config.spec.changed(in_group_size=1)
    layers = select_layers(denoiser, config.layer_filter, config.min_channels, spec, config.overrides, config.spec)
    if not is_known(denoiser):
        blocks = len({layer.block for layer in layers})
        log_info(f"{type(denoiser).__name__} is not in vqdm's table; its {blocks} blocks with layers were derived")
    if config.target_bits is not None:
        check_target(config, layers)
    return [shared(layer, config.share_codebooks) for layer in layers]


def load_finished(
    folder: RunFolder, pipeline: DiffusionPipeline, ranks: Ranks
) -> tuple[DiffusionPipeline, dict | None]:
    """Put what a finished run quantized into the pipeline, and return it with the run's summary.

    Working data that a kill at the run's very end left is deleted.
    """
    component, before = denoiser_name(pipeline), denoiser_of(pipeline)
    denoiser = load_denoiser(folder.path / component, before.dtype).to(before.device)
    pipeline.register_modules(**{component: denoiser}, **load_text_encoders(folder.path, pipeline))
    if not ranks.main:
        return pipeline, None
    shutil.rmtree(folder.work, ignore_errors=True)
    log_info(f"{folder.path} is finished already")
    return pipeline, json.loads((folder.path / "summary.json").read_text(encoding="utf-8"))


def read_prompts(config: QuantizeConfig) -> tuple[list[str], list[str]]:
    """Return all calibration and evaluation prompts of the files that are given, or those that ship with vqdm."""
    return tuple(
        load_prompts(source or default_prompts(kind, flag), flag)
        for source, kind, flag in (
            (config.calibration_prompts, "calibration", "CALIBRATION_PROMPTS"),
            (config.evaluation_prompts, "evaluation", "EVALUATION_PROMPTS"),
        )
    )


def choose_prompts(
    config: QuantizeConfig, calibration: list[str], evaluation: list[str]
) -> tuple[list[str], list[str]]:
    """Return as many calibration and evaluation prompts as the settings ask for, chosen with the seed."""
    about = ("CALIBRATION_PROMPTS", "--calibration_nsamples")
    return (
        choose(calibration, config.calibration_nsamples, config.seed, *about, zero_is_offered=True),
        choose(evaluation, config.evaluation_nsamples, config.seed, "EVALUATION_PROMPTS", "--evaluation_nsamples"),
    )


def run(job: Job) -> dict | None:
    """All slow steps; each finds and keeps what an interrupted run left. Returns the summary on the first process."""
    config = job.config
    with job.clock("teacher"):
        teacher, teacher_images = teacher_evaluation(job)
        finetuned_on = finetuning_trajectories(job) if config.intermediate.num_intermediate_finetunes else []
    if config.unquantized_nbits == 8:
        for name in unquantized_layers(job.denoiser, job.layers):  # before Hessians are recorded
            try:
                quantize_int8(job.denoiser, name)
            except ValueError as error:  # a weight is not finite
                raise RunError(str(error)) from None
    finetunes = blocks_before_finetuning(config.intermediate.num_intermediate_finetunes, len(job.blocks))

    def after(index: int, block: str) -> None:
        if index in finetunes:
            done, file = [block for block, _ in job.blocks[:index]], f"finetuned/after-{index:02d}.safetensors"
            with job.clock("fine-tuning"):
                job.finetune_blocks(job.denoiser, finetuned_on, done, job.ranks, job.folder.work / file)
        after_block(job, index, block, teacher)

    quantized = quantize_layers(job, after)
    drop_hessians(job)
    texts = quantize_text_encoders(job) if job.text_parts else {}
    with job.clock("evaluation"), nullcontext() if job.swapper else decoded_once(job.denoiser):
        errors = point_errors(job.denoiser, teacher, job.size, job.ranks)
        images = student_images(job)
        scores = compare_pairs(job, teacher_images, images) if job.ranks.main else {}
    return finish(job, quantized, errors, scores, texts) if job.ranks.main else None


def drop_hessians(job: Job) -> None:
    """Delete Hessians that are done with, if the denoiser is too large to keep them until the end."""
    job.ranks.barrier()
    if job.swapper and job.ranks.main:
        shutil.rmtree(job.folder.work / "hessians", ignore_errors=True)


def after_block(job: Job, index: int, block: str, teacher: Trajectories) -> None:
    """Evaluate the output error and save a loadable snapshot, where the settings ask for it."""
    config = job.config
    if config.eval_step and index % config.eval_step == 0:
        error = output_error(job.denoiser, teacher, job.size, job.ranks)
        job.tracker.log({f"{job.component}_output_error_db": error}, step=index)
        log_info(f"after {block}: {label(job.component)}-output error {error:.2f} dB")
    if config.snapshot_step and index % config.snapshot_step == 0 and job.ranks.main:
        mark_quantized(job.denoiser)
        path = job.folder.path / "snapshots" / f"{index:02d}_{block}" / job.component
        with saved_types(job.pipeline, job.stored):
            job.denoiser.save_pretrained(path)
        job.on_save(path)


# ------------------------------------------------------------------------------------------- the end


def compare_pairs(job: Job, teacher: list[Image.Image], student: list[Image.Image]) -> dict:
    """Save the sheet of pairs, and score the student's images by the teacher's."""
    count = job.config.visualize_nsamples
    if count:
        sheet = pair_sheet(job.evaluation[:count], teacher[:count], student[:count], ("full precision", "quantized"))
        save_png(sheet, job.folder.path / "image_pairs.png")
        job.tracker.images("image_pairs", [sheet])
    return compare_images(teacher, student, job.evaluation, "quantized")


def finish(
    job: Job, quantized: dict[str, LayerResult], errors: tuple[list, list], scores: dict, texts: dict[str, dict]
) -> dict:
    """Write the pipeline folder, the card and the summary, then drop the working data."""
    staged = job.folder.work / "pipeline"
    if job.swapper:
        job.swapper.leave()
    with job.clock("saving"), saved_types(job.pipeline, job.stored):
        save_pipeline(job, staged)
        sizes = stored_sizes(job.denoiser, job.component, job.parameters, staged)
        for part in job.text_parts:
            one = stored_sizes(getattr(job.pipeline, part.name), part.name, part.parameters, staged)
            texts[part.name] |= {key.removesuffix(f"_{part.name}").removesuffix("_of"): one[key] for key in one}
    summary = {
        "model": job.config.model,
        "component": job.component,
        "layers_quantized": len(job.layers),
        "layers_in_8_bit": len(int8_layers(job.denoiser)),
        **sizes,
        f"bytes_of_original_{job.component}": job.original_bytes,
        "bytes_of_pipeline": sum(file.stat().st_size for file in staged.glob("*/*.safetensors")),
        "bytes_of_original_pipeline": job.pipeline_bytes,
        "text_encoders": texts,
        "embeddings_error_db": texts[job.text_parts[-1].name]["embeddings_error_db"] if texts else None,
        f"{job.component}_output_error_db": decibels(*map(sum, errors)),
        f"{job.component}_output_error_db_by_point": error_spread(*errors),
        "images": scores,
        "seconds": job.clock.phases | {"total": round(sum(job.clock.phases.values()), 3)},
        "peak_memory_bytes": job.clock.whole(),
        "peak_memory_bytes_by_phase": job.clock.beside(job.needs),
        "versions": versions(),
        "command": own_command(),
        "layers": [done.report for done in quantized.values()],
    }
    save_text(model_card(job.config.model, summary), staged / "README.md")
    job.folder.publish(staged)
    save_json(summary, job.folder.path / "summary.json")
    shutil.rmtree(job.folder.work)
    measured = {key: value for key, value in scores.items() if key != "problems"}
    job.tracker.log({key: value for key, value in summary.items() if not isinstance(value, dict | list)} | measured)
    job.on_save(job.folder.path)
    return summary


def save_pipeline(job: Job, staged: Path) -> None:
    """Save the whole pipeline as diffusers does."""
    shutil.rmtree(staged, ignore_errors=True)
    mark_quantized(job.denoiser)
    forget_calls(job.pipeline)
    try:
        job.pipeline.save_pretrained(staged)
    except (OSError, SafetensorError) as error:
        raise RunError(f"{staged} cannot be written: {first_line(error)}; continue with --resume") from None


def forget_calls(pipeline: DiffusionPipeline) -> None:
    """Clear what tokenizers keep of their last call and would save: a resumed run may not have called them."""
    for part in pipeline.components.values():
        backend = getattr(part, "backend_tokenizer", None)
        if backend is not None:
            backend.no_truncation()
            backend.no_padding()
