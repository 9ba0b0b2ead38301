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
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from itertools import groupby
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
from vqdm.diffusion.denoisers import compute_dtype, denoisers_of, is_known
from vqdm.diffusion.hessians import HessianStore
from vqdm.diffusion.model_folders import (
    check_loaded,
    check_supported,
    denoisers_for,
    find_denoisers,
    load_denoiser,
    load_text_encoders,
)
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
    check_steps,
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
from vqdm.layers.quantized import decoded_once, drop_decoded
from vqdm.parallel import Ranks, launched
from vqdm.prompts import choose, default_prompts, load_prompts
from vqdm.quantization.allocation import check_target
from vqdm.quantization.config import QuantizeConfig
from vqdm.quantization.layerwise import quantize_layers
from vqdm.quantization.plan import (
    Int8Totals,
    blocks_before_finetuning,
    hessian_bytes,
    in_turn,
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
    hessian_folder,
    student_images,
    teacher_evaluation,
    teacher_trajectories,
)
from vqdm.quantization.shared_codebooks import shared
from vqdm.quantization.text_encoder import (
    TextCalibration,
    TextPart,
    TextRecorder,
    chosen_parts,
    planned_text,
    quantize_text_encoders,
    text_hessian_bytes,
)
from vqdm.storage.files import save_json, save_text
from vqdm.storage.hf import mark_quantized
from vqdm.storage.hub import model_card, sizes_together, stored_sizes
from vqdm.storage.run_folder import LayerResult, RunFolder, check_disk
from vqdm.tracking import Tracker, log_info, own_command, redacted, versions

OUT_OF_MEMORY = "try smaller --height and --width, or --hessian_memory_gb"


class DenoiserPart(NamedTuple):
    """A denoiser to quantize.

    Attributes:
        name: of its component.
        groups: its layers by the input that they share.
        parameters, int8, original_bytes: as of `Job`.
        planned_bytes: of the result.
    """

    name: str
    layers: list[Layer]
    groups: list[list[Layer]]
    parameters: int
    int8: Int8Totals
    original_bytes: int | None
    planned_bytes: int


@dataclass
class Job:
    """The state that the steps of one run share.

    Attributes:
        parameters: number of those of the whole denoiser, or text encoder.
        int8: what becomes int8.
        component: name of what is quantized, in the pipeline and of its folder: a denoiser, or a text encoder.
        denoisers: names of all denoisers that the run quantizes, of which two experts have a job each.
        experts: of the first denoiser's job, the others.
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
        swappers: by denoiser, what keeps all of its blocks but one in RAM, where they do not fit on the device.
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
    denoisers: tuple[str, ...] = ()
    experts: list[DenoiserPart] = field(default_factory=list)
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
    swappers: dict[str, BlockSwapper] = field(default_factory=dict)
    walk: BlockWalk | None = None
    size: BatchSize = field(init=False)

    def __post_init__(self) -> None:
        self.size = BatchSize(self.config.xtx_batch_size, OUT_OF_MEMORY)
        self.denoisers = self.denoisers or (self.component,)

    @property
    def denoiser(self) -> torch.nn.Module:
        """What is quantized: the denoiser, or a text encoder in its place."""
        return getattr(self.pipeline, self.component)

    @property
    def swapper(self) -> BlockSwapper | None:
        """What keeps all blocks but one of what is quantized in RAM, if anything does."""
        return self.swappers.get(self.component)

    @property
    def drops_hessians(self) -> bool:
        """Whether stored Hessians of a denoiser are deleted once it is quantized, and not kept until the end."""
        return bool(self.swappers) or len(self.denoisers) > 1

    @property
    def blocks(self) -> list[tuple[str, list[Layer]]]:
        return [(block, list(layers)) for block, layers in groupby(self.layers, key=lambda layer: layer.block)]

    def rest(self) -> None:
        """Take all denoisers off the device."""
        for swapper in self.swappers.values():
            swapper.leave()
        for denoiser in denoisers_of(self.pipeline).values():
            drop_decoded(denoiser)
            denoiser.to("cpu")

    def enter(self) -> None:
        """Bring the denoiser to the device; of two experts, the other leaves it, but what `swappers` keep there."""
        for name, denoiser in denoisers_of(self.pipeline).items():
            if name not in self.swappers and name != self.component:
                drop_decoded(denoiser)
                denoiser.to("cpu")
        for swapper in self.swappers.values():
            swapper.leave()
            swapper.settle()
        if not self.swappers:
            self.denoiser.to(self.ranks.device)

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
            getattr(pipeline, planned.parts[0].name).to(ranks.device)
        with folder.lock(ranks):
            if ranks.main:
                need = disk_to_come(config, planned, folder, pipeline, (len(calibration), len(evaluation)))
                folder.open(settings, versions(), config.resume, 0 if config.ignore_budget else need)
            if ranks.broadcast(folder.finished):
                return load_finished(folder, pipeline, ranks)
            about, kind = config.to_dict() | config.spec.to_dict(), config.report_to if ranks.main else "none"
            tracker = Tracker(kind, "vqdm-quantize", folder.path, about)
            work = (folder, tracker, MemoryClock(ranks.device))
            first, *experts = planned.parts
            sizes = first.parameters, first.int8, first.name, tuple(part.name for part in planned.parts), experts
            job = Job(config, pipeline, first.layers, calibration, evaluation, *work, *sizes)
            job.text_parts, job.pipeline_bytes = planned.text_parts, planned.pipeline_bytes
            job.needs, job.ranks, job.finetune_blocks = planned.needs, ranks, finetune_blocks
            job.stored, job.original_bytes = planned.stored, first.original_bytes
            job.fingerprint, job.offload = planned.fingerprint, planned.offload
            job.codebook_memory_gb = ranks.broadcast(folder.started_with("hessian_memory_gb") if ranks.main else None)
            try:
                with resting_on_cpu(pipeline, job.component), blocks_in_turn(job):
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
    """Inside, one block of each denoiser at a time is on the device, if they do not fit whole."""
    try:
        if job.offload != "none":
            for name, denoiser in denoisers_of(job.pipeline).items():
                job.swappers[name] = BlockSwapper(denoiser, job.ranks.device)
        yield
    finally:
        for swapper in job.swappers.values():
            swapper.close()


def check_sources(config: QuantizeConfig, given: bool) -> None:
    """Check the folders and hub names of the flags, where no loaded pipeline is given. Raises UserError."""
    if config.load is not None:
        find_denoisers(config.load, name="--load")
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
    """What is known of a run before anything slow starts: as in `Job`, the denoisers, and the run's record."""

    parts: list[DenoiserPart]
    needs: list[Need]
    offload: str
    stored: dict[str, torch.dtype]
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
    names, encoders = chosen_parts(config, pipeline)
    stored = stored_types(config, pipeline, given)
    steps, limits = config.sampling.num_inference_steps, (config.min_timestep, config.max_timestep)
    check_timestep_range(pipeline.scheduler, steps, *limits)
    check_steps(pipeline, names, steps, *limits)
    parts = [planned_denoiser(config, pipeline, name, given, stored.get(name), len(names) > 1) for name in names]
    text_parts = [planned_text(config, pipeline, name, given, stored.get(name)) for name in encoders]
    whole, several = pipeline_bytes(config, pipeline, given), [*parts, *text_parts]
    if len(several) > 1 and None not in (whole, *(one.original_bytes for one in parts)):
        planned = whole - sum(one.original_bytes - one.planned_bytes for one in several)
        log_info(f"whole pipeline: about {planned / 1e6:.2f} MB instead of {whole / 1e6:.2f} MB")
    for part in parts:
        blocks_before_finetuning(
            config.intermediate.num_intermediate_finetunes, len({one.block for one in part.layers})
        )
    if ranks.main:
        log_truncated(pipeline, calibration + evaluation)
    prompts = (len(calibration), len(evaluation))
    needs, offload = planned_needs(config, pipeline, parts, ranks.device, prompts, given)
    if offload != "none" and (names == ["unet"] or config.intermediate.num_intermediate_finetunes):
        flag = "a UNet" if names == ["unet"] else "--num_intermediate_finetunes"
        raise UserError(f"--offload {offload} does not go with {flag}; allowed is none")
    fingerprint = weights_fingerprint(pipeline) if given else None
    settings = config.to_dict() | {"prompts_sha256": digest(calibration + evaluation)}
    settings["full_precision_hessians"] = keeps_hessians(config, parts[0].layers)
    settings |= {"weights_sha256": fingerprint} if given else {}
    return RunPlan(parts, needs, offload, stored, whole, fingerprint, settings, text_parts)


def planned_denoiser(
    config: QuantizeConfig,
    pipeline: DiffusionPipeline,
    name: str,
    given: bool,
    stored: torch.dtype | None = None,
    named: bool = False,
) -> DenoiserPart:
    """Choose the layers of a denoiser, and log their bits and its size.

    Args:
        stored: its type in its files.
        named: whether the log names it.

    Raises:
        UserError: it is quantized itself, or its layers cannot take the settings.
    """
    denoiser = getattr(pipeline, name)
    check_loaded(denoiser, config.model)
    layers = chosen_layers(config, denoiser)
    parameters = sum(tensor.numel() for tensor in denoiser.parameters())
    plain = unquantized_layers(denoiser, layers) if config.unquantized_nbits == 8 else []
    int8 = Int8Totals.of(denoiser, plain)
    size, planned = planned_size(config, layers, parameters, int8, plain_bits(denoiser, stored))
    log_info(f"{name}:\n{size}" if named else size)
    files = None if given else stored_bytes(config.model, config.variant, name, config.revision)
    original = parameter_bytes(denoiser) if given else files
    groups = groups_by_input(config, pipeline, denoiser, layers)
    return DenoiserPart(name, layers, groups, parameters, int8, original, planned)


def stored_types(config: QuantizeConfig, pipeline: DiffusionPipeline, given: bool) -> dict[str, torch.dtype]:
    """Return types of the components as stored; of a loaded pipeline those in memory."""
    if given:
        return {name: part.dtype for name, part in networks(pipeline).items()}
    return stored_dtypes(config.model, config.variant, config.revision)


def groups_by_input(
    config: QuantizeConfig, pipeline: DiffusionPipeline, denoiser: torch.nn.Module, layers: list[Layer]
) -> list[list[Layer]]:
    """Return a denoiser's layers grouped by the input that they share, found without the weights."""
    height, width = image_size(pipeline, config.sampling.height, config.sampling.width)
    size = (height // latent_scale(pipeline), width // latent_scale(pipeline))
    return input_groups(meta_denoiser(type(denoiser), denoiser.config), layers, *size)


def planned_needs(
    config: QuantizeConfig,
    pipeline: DiffusionPipeline,
    parts: list[DenoiserPart],
    device: torch.device,
    prompts: tuple[int, int],
    given: bool,
) -> tuple[list[Need], str]:
    """Log what every phase needs, and return it and `offload` as decided; nothing where the model is an unusual one.

    Args:
        parts: the denoisers to quantize.
        prompts: numbers of those for calibration and for evaluation.
        given: whether the pipeline was given loaded.

    Raises:
        UserError: a phase needs more than is free, unless `ignore_budget` or `dry_run`.
    """
    counted = [planned_shapes(config, pipeline, part, prompts, device.type != "cpu", given) for part in parts]
    if None in counted:
        log_info("no plan of memory: the denoiser or the VAE wants arguments that are not known")
        return [], "none" if config.offload == "auto" else config.offload
    on_gpu = parts[0].name != "unet" and device.type != "cpu"
    rates = MatmulRates.measured(device, compute_dtype(getattr(pipeline, parts[0].name)))
    shapes = counted[0]

    def needs_of(one: QuantizeConfig) -> list[Need]:
        return on(needs_in_turn(one, parts, counted, prompts, rates), device.type)

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


def planned_shapes(
    config: QuantizeConfig,
    pipeline: DiffusionPipeline,
    part: DenoiserPart,
    prompts: tuple[int, int],
    on_gpu: bool,
    given: bool = False,
) -> Shapes | None:
    """Return the shapes that a denoiser's needs are counted from; None and `given` as of `shapes_of`."""
    shapes = shapes_of(pipeline, config, part.name, given)
    if shapes is None:
        return None
    unet = part.name == "unet"
    points = point_bytes(pipeline, config.sampling, *prompts) if unet else recorded_bytes(shapes, *prompts)
    shapes = replace(shapes, points=points)
    return with_backward(shapes, getattr(pipeline, part.name), part.layers, on_gpu) if config.target_bits else shapes


def needs_in_turn(
    config: QuantizeConfig,
    parts: list[DenoiserPart],
    shapes: list[Shapes],
    prompts: tuple[int, int],
    rates: MatmulRates,
) -> list[Need]:
    """Return what every phase needs of denoisers, each with its shapes, that are quantized one after the other."""
    plans = []
    for part, own in zip(parts, shapes, strict=True):
        kept, beside = keeps_hessians(config, part.layers), [one.groups for one in parts if one is not part]
        plans.append(plan(config, own, part.groups, kept, prompts, rates, beside))
    sampling = prompts[0] * shapes[0].steps * shapes[0].calls * shapes[0].call_seconds(rates)
    return in_turn(plans, sampling) if len(plans) > 1 else plans[0]


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
    needs = []
    for part in planned.parts:
        kept = keeps_hessians(config, part.layers)
        sets = 1 if kept and planned.offload != "none" else 2
        place = hessian_folder(config, folder if part is planned.parts[0] else folder.of_part(part.name), part.name)
        need = hessian_bytes(part.groups, config.hessian_memory_gb, kept, sets)
        needs.append(max(0, need - sum(file.stat().st_size for file in place.glob("*.safetensors"))))
    if not config.hessian_cache:
        return max(needs)  # one's are dropped before the next's are made
    return check_disk(Path(config.hessian_cache), folder.path, sum(needs), "--hessian_cache")


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
    found = {}
    for name, place in denoisers_for(pipeline, str(folder.path), str(folder.path)).items():
        before = getattr(pipeline, name)
        found[name] = load_denoiser(place, before.dtype).to(before.device)
    pipeline.register_modules(**found, **load_text_encoders(folder.path, pipeline))
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
    config, jobs = job.config, [job, *(expert_job(job, part) for part in job.experts)]
    with job.clock("teacher"):
        teachers, teacher_images = teacher_evaluation(job)
        finetuning = jobs if config.intermediate.num_intermediate_finetunes else []
        finetuned_on = {one.component: finetuning_trajectories(one) for one in finetuning}
    if config.unquantized_nbits == 8:
        for one in jobs:
            make_int8(one)  # before Hessians are recorded
    if job.experts and config.calibration_latents == "teacher":
        with job.clock("hessians"):
            teacher_trajectories(job)  # of all experts, before one is quantized
    quantized, errors = {}, {}
    for one in jobs:
        if job.experts:
            one.enter()
        found = quantize_denoiser(one, teachers[one.component], finetuned_on.get(one.component))
        quantized[one.component] = found
        drop_hessians(one)
    texts = quantize_text_encoders(job) if job.text_parts else {}
    with job.clock("evaluation"), ExitStack() as decoded:
        for one in jobs:
            if job.experts:
                one.enter()
            if not one.swapper:
                decoded.enter_context(decoded_once(one.denoiser))
            errors[one.component] = point_errors(one.denoiser, teachers[one.component], job.size, job.ranks)
        images = student_images(job)
        scores = compare_pairs(job, teacher_images, images) if job.ranks.main else {}
    return finish(job, jobs, quantized, errors, scores, texts) if job.ranks.main else None


def expert_job(job: Job, part: DenoiserPart) -> Job:
    """Return the job of quantizing another expert, in a part of the run's folder."""
    found = replace(
        job,
        layers=part.layers,
        folder=job.folder.of_part(part.name),
        parameters=part.parameters,
        int8=part.int8,
        component=part.name,
        experts=[],
        original_bytes=part.original_bytes,
        shared_codebooks={},
        text_parts=[],
    )
    found.size = job.size
    return found


def make_int8(job: Job) -> None:
    """Round the layers that become int8. Raises RunError where a weight is not finite."""
    for name in unquantized_layers(job.denoiser, job.layers):
        try:
            quantize_int8(job.denoiser, name)
        except ValueError as error:
            raise RunError(str(error)) from None


def quantize_denoiser(
    job: Job, teacher: Trajectories, finetuned_on: list[Trajectories] | None
) -> dict[str, LayerResult]:
    """Quantize the layers of a denoiser, with evaluations, snapshots and fine-tuning between blocks."""
    finetunes = blocks_before_finetuning(job.config.intermediate.num_intermediate_finetunes, len(job.blocks))

    def after(index: int, block: str) -> None:
        if index in finetunes:
            done, file = [block for block, _ in job.blocks[:index]], f"finetuned/after-{index:02d}.safetensors"
            with job.clock("fine-tuning"):
                job.finetune_blocks(job.denoiser, finetuned_on, done, job.ranks, job.folder.work / file)
        after_block(job, index, block, teacher)

    return quantize_layers(job, after)


def drop_hessians(job: Job) -> None:
    """Delete Hessians that are done with, if denoisers are too large, or too many, to keep them until the end."""
    job.ranks.barrier()
    if job.drops_hessians and job.ranks.main:
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
    job: Job,
    jobs: list[Job],
    quantized: dict[str, dict[str, LayerResult]],
    errors: dict[str, tuple[list, list]],
    scores: dict,
    texts: dict[str, dict],
) -> dict:
    """Write the pipeline folder, the card and the summary, then drop the working data.

    Args:
        jobs: of all denoisers; `quantized` and `errors` are theirs by component.
    """
    staged = job.folder.work / "pipeline"
    for swapper in job.swappers.values():
        swapper.leave()
    with job.clock("saving"), saved_types(job.pipeline, job.stored):
        save_pipeline(job, staged)
        sizes = {one.component: stored_sizes(one.denoiser, one.component, one.parameters, staged) for one in jobs}
        for part in job.text_parts:
            one = stored_sizes(getattr(job.pipeline, part.name), part.name, part.parameters, staged)
            texts[part.name] |= {key.removesuffix(f"_{part.name}").removesuffix("_of"): one[key] for key in one}
    summary = {
        "model": job.config.model,
        "component": job.component,
        "layers_quantized": sum(len(one.layers) for one in jobs),
        "layers_in_8_bit": sum(len(int8_layers(one.denoiser)) for one in jobs),
        **sizes_together(sizes),
        **{f"bytes_of_original_{one.component}": one.original_bytes for one in jobs},
        "bytes_of_pipeline": sum(file.stat().st_size for file in staged.glob("*/*.safetensors")),
        "bytes_of_original_pipeline": job.pipeline_bytes,
        "text_encoders": texts,
        "embeddings_error_db": texts[job.text_parts[-1].name]["embeddings_error_db"] if texts else None,
        **{f"{name}_output_error_db": decibels(*map(sum, some)) for name, some in errors.items()},
        **{f"{name}_output_error_db_by_point": error_spread(*some) for name, some in errors.items()},
        "images": scores,
        "seconds": job.clock.phases | {"total": round(sum(job.clock.phases.values()), 3)},
        "peak_memory_bytes": job.clock.whole(),
        "peak_memory_bytes_by_phase": job.clock.beside(job.needs),
        "versions": versions(),
        "command": own_command(),
        "layers": [reported(done, name, len(jobs) > 1) for name, some in quantized.items() for done in some.values()],
    }
    save_text(model_card(job.config.model, summary), staged / "README.md")
    job.folder.publish(staged)
    save_json(summary, job.folder.path / "summary.json")
    shutil.rmtree(job.folder.work)
    measured = {key: value for key, value in scores.items() if key != "problems"}
    job.tracker.log({key: value for key, value in summary.items() if not isinstance(value, dict | list)} | measured)
    job.on_save(job.folder.path)
    return summary


def reported(done: LayerResult, component: str, named: bool) -> dict:
    """Return the summary's row of a layer; of two experts, whose layers have the same names, with its component."""
    return {"component": component} | done.report if named else done.report


def save_pipeline(job: Job, staged: Path) -> None:
    """Save the whole pipeline as diffusers does."""
    shutil.rmtree(staged, ignore_errors=True)
    for name in job.denoisers:
        mark_quantized(getattr(job.pipeline, name))
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
