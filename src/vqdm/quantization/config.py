"""Settings of quantization: frozen, checked, printed, and saved beside the result before work starts."""

from __future__ import annotations

import re
import shlex
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path

from vqdm.additive.code import CodeSpec
from vqdm.additive.solve import SolverConfig
from vqdm.config import PROMPT_FILE, RunConfig, check_flags, flag, flags_in, ignore_budget, image_pairs, output_dir
from vqdm.documents import first_line, read_yaml
from vqdm.errors import UserError
from vqdm.tracking import redacted

STATE_BITS = (8, 10, 12)  # that trellis codes may have
FAST_STATE_BITS = 8  # of the codes that effects are measured with: within half a decibel, at a tenth of the time

_LATER = "finetune.py has it, for the finished result"
UNSUPPORTED_FLAGS = {
    "--model_path": "give the model as the first positional argument",
    "--devices": "choose GPUs with CUDA_VISIBLE_DEVICES",
    "--code_dtype": "codes are stored packed, at exactly --nbits_per_codebook bits",
    "--offload_activations": "nothing needs offloading: Hessians are bounded by --hessian_memory_gb",
    "--use_faiss": "k-means runs in torch",
    "--skip_out_loss": "the error of the output is always reported",
    "--print_frequency": "one line per layer is printed",
    "--finetune_method": _LATER,
    "--finetune_relative_mse_tolerance": _LATER,
    "--finetune_keep_best": _LATER,
    "--use_checkpointing": _LATER,
}

_bits = partial(flag, group="bit allocation")
_layers = partial(flag, group="layers")
_calibration = partial(flag, group="calibration and evaluation")
_saving = partial(flag, group="saving and resuming")
_hub = partial(flag, group="hub")
_uploaded = partial(_hub, needs=("push_to_hub",))
_between = partial(flag, needs=("num_intermediate_finetunes",))


@dataclass(frozen=True)
class IntermediateConfig:
    """Fine-tuning between blocks; see `finetuning.intermediate`."""

    num_intermediate_finetunes: int = flag(
        0,
        "how often, evenly spread, quantized blocks are fine-tuned, but for codes and shared codebooks; 0 = never",
        ge=0,
    )
    finetune_nsamples: int = _between(64, "calibration prompts to train on", ge=1)
    finetune_max_epochs: int = _between(1, "epochs of each fine-tuning", ge=1)
    finetune_batch_size: int = _between(32, "batch size, of all processes together", ge=1)
    local_batch_size: int = _between(8, "batch size per process; gradients accumulate over several", ge=1)
    finetune_lr: float | str = _between("auto", "learning rate, as in finetune.py", gt=0, le=1, words=("auto",))
    finetune_adam_beta1: float = _between(0.9, "Adam's beta1", ge=0, lt=1)
    finetune_adam_beta2: float = _between(0.95, "Adam's beta2", ge=0, lt=1)

    def __post_init__(self) -> None:
        check_flags(self)


@dataclass(frozen=True)
class HubConfig:
    """Upload of the finished folder."""

    push_to_hub: bool = _hub(False, "upload the finished folder")
    hub_model_id: str | None = _uploaded(
        None, "repository to upload to (default: the name of --output_dir)", metavar="NAME"
    )
    hub_private: bool = _uploaded(False, "make a new repository private")


@dataclass(frozen=True, kw_only=True)
class QuantizeConfig(RunConfig):
    """Settings of `quantization.job`.

    Raises:
        UserError: a value that is not allowed, or settings that contradict each other, naming the flags.
    """

    calibration_prompts: str | None = flag(None, PROMPT_FILE + "; default: 256 that ship with vqdm", positional=True)
    evaluation_prompts: str | None = flag(
        None, PROMPT_FILE + ", not used to calibrate; default: 64 that ship with vqdm", positional=True
    )
    output_dir: str = output_dir("out/quantized")
    target_bits: float | None = _bits(
        None,
        "stored bits per weight of the quantized layers, such as 2.5, allocated to layers and columns by their effect "
        "on the output, as trellis codes; the allocation is written to plan.json",
        gt=0,
        le=16,
        metavar="BITS",
        common=True,
    )
    code: str | None = _bits(
        None,
        "additive: sums of codebook entries, as in the paper; trellis: trellis codes, which need --target_bits "
        "(default: trellis with --target_bits, else additive)",
        choices=("additive", "trellis"),
    )
    state_bits: int = _bits(
        12,
        "bits of a trellis state; with 10, coding takes a third of the time for 0.1 dB more error; the table that all "
        "layers share takes 16 * 2^BITS bits",
        choices=STATE_BITS,
        needs=("target_bits",),
    )
    sensitivity_points: int = _bits(
        64, "recorded points to measure the sensitivity of layers on", ge=1, needs=("target_bits",)
    )
    share_codebooks: str = _bits(
        "none",
        "additive codes: each layer stores its own codebooks, or linear layers and convolutions each share a set, or "
        "all layers share one",
        choices=("none", "kind", "unet"),
        needs=("not target_bits",),
    )
    solver: SolverConfig = flags_in(SolverConfig, "layer solver")
    components: tuple[str, ...] | str | None = _layers(
        None,
        "parts of the pipeline to quantize: the denoiser, and text encoders by name, such as unet,text_encoder; each "
        "at --target_bits, or as the same codes (default: the denoiser, or both experts)",
        metavar="NAME,NAME,...",
        common=True,
    )
    layer_filter: str = _layers(
        "default",
        "layers to quantize; a regular expression is searched for in their dotted names",
        metavar="{default,all,linear_only,conv_only,REGEX}",
    )
    min_channels: int = _layers(0, "do not quantize layers with fewer channels", ge=0)
    overrides: dict[str, dict | None] | str | None = _layers(
        None, "JSON or YAML: name or regex -> format settings, or null to not quantize", metavar="FILE"
    )
    unquantized_nbits: int = _layers(
        16,
        "8: every Linear and Conv2d that is not quantized, but conv_in and conv_out, is stored in 8 bit with a 16-bit "
        "scale per output: time_embedding, add_embedding, time_emb_proj, and what filters and overrides leave out",
        choices=(16, 8),
        aliases=("rest_nbits",),
    )
    calibration_nsamples: int = _calibration(256, "calibration prompts, chosen at random; 0 = all", ge=0, common=True)
    calibration_nsteps: int = _calibration(5, "denoising steps per prompt to calibrate on; 0 = all", ge=0)
    evaluation_nsamples: int = _calibration(32, "evaluation prompts", ge=1)
    visualize_nsamples: int | None = _calibration(
        None, "image pairs in image_pairs.png; default: 16, or all evaluation prompts if they are fewer", ge=0
    )
    xtx_batch_size: int = _calibration(16, "batch size of the denoiser, in prompts or points", ge=1, common=True)
    calibration_latents: str = _calibration(
        "teacher",
        "teacher: trajectories of the full-precision model, sampled once; student: of the partly quantized model, "
        "sampled again before every block",
        choices=("teacher", "student"),
    )
    min_timestep: float = _calibration(0.0, "lowest timestep to calibrate on", ge=0, le=1000)
    max_timestep: float = _calibration(1000.0, "highest timestep to calibrate on", ge=0, le=1000)
    hessian_memory_gb: float = _calibration(
        8.0, "memory for Hessians; a larger block is recorded in several passes", ge=0
    )
    offload: str = _calibration(
        "auto",
        "transformers: none: all of it on the GPU; ram: one block at a time, and calibration block by block, with the "
        "inputs of blocks in RAM; disk: the same with these on the disk; auto: the first of these that fits",
        choices=("auto", "none", "ram", "disk"),
    )
    hessian_samples_per_input: int = _calibration(
        32, "samples in a Hessian per input of its layer, spread over all batches; 0 = all", ge=0
    )
    hessian_cache: str | None = _calibration(
        None,
        "calibrate on the full-precision model, and keep its Hessians here for runs at other bits",
        metavar="FOLDER",
    )
    intermediate: IntermediateConfig = flags_in(
        IntermediateConfig, "fine-tuning between blocks (of the result: finetune.py)"
    )
    load: str | None = _saving(
        None, "reuse the layers of an earlier result, and quantize only the others", metavar="FOLDER"
    )
    snapshot_step: int = _saving(0, "snapshot interval (blocks): save a loadable denoiser; 0 = never", ge=0)
    eval_step: int = _calibration(
        0, "evaluation interval (blocks): measure the error of the denoiser's output; 0 = never", ge=0
    )
    on_save: str | None = _saving(
        None, "run this after each save, without a shell; {path} becomes what was saved", metavar="COMMAND"
    )
    ignore_budget: bool = ignore_budget()
    hub: HubConfig = flags_in(HubConfig, "hub")

    def __post_init__(self) -> None:
        super().__post_init__()
        # Fields are frozen for everyone else; these are resolved here, once.
        object.__setattr__(self, "overrides", read_overrides(self.overrides))
        object.__setattr__(self, "components", read_components(self.components))
        object.__setattr__(self, "code", self.code or ("additive" if self.target_bits is None else "trellis"))
        if self.min_timestep > self.max_timestep:
            raise UserError(f"--min_timestep {self.min_timestep} is above --max_timestep {self.max_timestep}")
        shown = image_pairs(self.evaluation_nsamples, self.visualize_nsamples, self.sampling)
        object.__setattr__(self, "visualize_nsamples", shown)
        if self.on_save is not None:
            _check_command(self.on_save)
        for pattern, settings in self.overrides.items():
            if settings and settings.get("row_bits"):
                raise UserError(
                    f"--overrides {pattern}: row_bits is {settings['row_bits']!r}, but codes of variable rate are only "
                    "loaded, no longer made; use --target_bits (--code trellis), or segment_bits as in its plan.json"
                )
        self._check_codes()

    def _check_codes(self) -> None:
        if self.share_codebooks != "none" and self.solver.encoder != "ldl":
            raise UserError("--share_codebooks needs --encoder ldl; beam fits codebooks to one layer")
        if self.share_codebooks != "none" and not self.spec.can_share:
            raise UserError("--share_codebooks goes neither with --groupwise_codebooks nor with --codebook_value_nbits")
        if self.hessian_cache and self.calibration_latents == "student":
            raise UserError("--hessian_cache is of the full-precision model; --calibration_latents student is not")
        if self.code == "trellis" and self.target_bits is None:
            raise UserError("--code trellis needs --target_bits, such as --target_bits 3")
        if self.code == "additive" and self.target_bits is not None:
            raise UserError("--code additive does not go with --target_bits, which allocates bits to trellis codes")

    def to_dict(self) -> dict:
        """The settings that a result depends on, without the tokens that a command may hold."""
        settings = super().to_dict() | {"on_save": self.on_save and redacted(self.on_save)}
        return {name: value for name, value in settings.items() if name != "hub"}

    @property
    def spec(self) -> CodeSpec:
        return self.solver.spec


def read_components(given: Sequence[str] | str | None) -> tuple[str, ...] | None:
    """Return names of parts of a pipeline, of a sequence or of names with commas between. Raises UserError."""
    if given is None:
        return None
    names = [name.strip() for name in given.split(",")] if isinstance(given, str) else list(given)
    if not names or not all(isinstance(name, str) and name for name in names) or len({*names}) < len(names):
        raise UserError(f"--components is {given!r}; give different names of parts, such as unet,text_encoder")
    return tuple(names)


def _check_command(command: str) -> None:
    try:
        words = shlex.split(command)
    except ValueError as error:
        raise UserError(f"--on_save {command!r} is not a command: {error}") from None
    if not words:
        raise UserError("--on_save is empty; give a program and its arguments")
    if "{path}" not in words[0] and shutil.which(words[0]) is None:
        raise UserError(f"--on_save {words[0]} is not found, or is no program; give one on PATH, or its path")


def read_overrides(given: dict[str, dict | None] | str | None) -> dict[str, dict | None]:
    """Return full-match pattern → settings or None, of a JSON or YAML file or of a mapping; empty for None.

    Raises:
        UserError: unreadable file, a bad pattern, or a setting that does not exist.
    """
    if given is None:
        return {}
    path = "" if isinstance(given, dict) else f" {given}"
    try:
        plan = given if isinstance(given, dict) else read_yaml(Path(given))
    except (OSError, ValueError) as error:
        raise UserError(f"--overrides{path} cannot be read: {first_line(error)}") from None
    if not isinstance(plan, dict):
        raise UserError(f"--overrides{path} must map layer names or patterns to settings, or to null")
    for pattern, settings in plan.items():
        _check_override(path, pattern, settings)
    return plan


def _check_override(path: str, pattern, settings) -> None:
    if not isinstance(pattern, str):
        raise UserError(f"--overrides{path}: {pattern!r} is a {type(pattern).__name__}; patterns are text in quotes")
    known = [one.name for one in fields(CodeSpec)]
    if not isinstance(settings, dict | None) or any(name not in known for name in settings or ()):
        allowed = [name for name in known if name != "row_bits"]
        raise UserError(f"--overrides{path}: {pattern}: expected null, or settings out of {', '.join(allowed)}")
    try:
        re.compile(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        raise UserError(f"--overrides{path}: {pattern} is not a regular expression: {error}") from None
