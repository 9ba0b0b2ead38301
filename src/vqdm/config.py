"""Settings of the jobs: frozen, checked, printed, and saved beside the result before work starts."""

from __future__ import annotations

import json
import re
import shlex
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

from vqdm.additive.code import CodeSpec
from vqdm.additive.config import SolverConfig
from vqdm.documents import first_line, read_yaml
from vqdm.errors import UserError
from vqdm.redaction import redacted

# Fields that may change between a run and its resumption, because the result does not depend on them.
FREE_FIELDS = ("output_dir", "report_to", "on_save", "resume", "dry_run", "eval_step", "snapshot_step", "device")
FREE_FIELDS += ("local_files_only", "visualize_nsamples", "hessian_cache")
# Those that change memory, and results by rounding at most: what a run that was out of memory is resumed with.
FREE_FIELDS += ("xtx_batch_size", "hessian_memory_gb", "between.local_batch_size")

# Fields of the format of additive codes, which --target_bits does not use.
ADDITIVE_FIELDS = (
    "num_codebooks",
    "nbits_per_codebook",
    "in_group_size",
    "out_group_size",
    "scale_nbits",
    "codebook_value_nbits",
    "codebook_value_num_groups",
    "groupwise_codebooks",
    "input_channel_scales",
)


@dataclass(frozen=True)
class SamplingConfig:
    """How pictures are sampled; None leaves a setting to the pipeline.

    Attributes:
        scheduler: a name of `pipelines.SCHEDULERS`.
        guidance_scale: classifier-free guidance weight.
        num_inference_steps: steps of the scheduler.
        height, width: picture size in pixels.
    """

    scheduler: str = "default"
    guidance_scale: float | None = None
    num_inference_steps: int | None = None
    height: int | None = None
    width: int | None = None

    def call(self) -> dict:
        """Keyword arguments of the pipeline call."""
        return {name: value for name, value in asdict(self).items() if name != "scheduler"}


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """What every program that runs a model is told.

    Attributes:
        model: diffusers pipeline, a folder or a name on the hub; variant, revision and local_files_only belong to it.
        output_dir: folder of the result; resume goes on with what is there.
        seed: of all that is drawn at random.
        dtype, device: what is computed in, and where; "auto" is the first GPU, in bfloat16 if it has that (NVIDIA's
            from compute capability 8.0 on) and else in float16, or the CPU in float32.
        report_to: a tracker of `tracking`.
        dry_run: check, print, and write nothing.
    """

    model: str
    output_dir: str
    seed: int = 0
    dtype: str = "auto"
    device: str = "auto"
    variant: str | None = None
    revision: str | None = None
    local_files_only: bool = False
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    report_to: str = "none"
    resume: bool = False
    dry_run: bool = False

    def to_dict(self) -> dict:
        """Plain JSON types, nested as the dataclasses are."""
        return asdict(self)


# Flags of a run that generating images with its result needs as well.
REPEATED = ("variant", "revision", "dtype", "device")


def generate_command(config: RunConfig, prompts: str) -> str:
    """The command, quoted for a shell, that generates images with a run's result as the run itself does."""
    given = {name: getattr(config, name) for name in REPEATED} | asdict(config.sampling)
    usual = {one.name: one.default for one in (*fields(RunConfig), *fields(SamplingConfig))}
    words = [config.model, config.output_dir, prompts]
    for name, value in given.items():
        words += [f"--{name}", str(value)] if value != usual[name] else []
    words += ["--local_files_only"] if config.local_files_only else []
    return shlex.join(["python", "generate.py", *words, "--output_dir", f"{config.output_dir.rstrip('/')}-images"])


@dataclass(frozen=True)
class BetweenConfig:
    """Fine-tuning between blocks; see `finetuning.intermediate`; `finetuning.config` explains learning rates.

    Attributes:
        num_intermediate_finetunes: how many; 0 = none.
        finetune_nsamples: the first calibration prompts, whose trajectories are learned from.
        finetune_max_epochs: how often each time.
    """

    num_intermediate_finetunes: int = 0
    finetune_nsamples: int = 64
    finetune_max_epochs: int = 1
    finetune_batch_size: int = 32
    local_batch_size: int = 8
    finetune_lr: float | str = "auto"
    finetune_adam_beta1: float = 0.9
    finetune_adam_beta2: float = 0.95


@dataclass(frozen=True, kw_only=True)
class QuantizeConfig(RunConfig):
    """Everything that `quantization.job` needs; the flags of `main_text2image.py` by the same names.

    Raises:
        UserError: settings that contradict each other, naming the flags.
    """

    calibration_prompts: str
    evaluation_prompts: str
    solver: SolverConfig = field(default_factory=SolverConfig)
    between: BetweenConfig = field(default_factory=BetweenConfig)
    overrides: dict[str, dict | None] = field(default_factory=dict)
    rest_nbits: int = 16
    layer_filter: str = "default"
    min_channels: int = 0
    calibration_nsamples: int = 256
    calibration_nsteps: int = 0
    evaluation_nsamples: int = 32
    visualize_nsamples: int = 16
    xtx_batch_size: int = 16
    calibration_latents: str = "teacher"
    min_timestep: float = 0.0
    max_timestep: float = 1000.0
    hessian_memory_gb: float = 8.0
    hessian_samples_per_input: int = 32
    hessian_cache: str | None = None
    share_codebooks: str = "none"
    target_bits: float | None = None
    code: str = "additive"
    state_bits: int = 12
    sensitivity_points: int = 64
    load: str | None = None
    on_save: str | None = None
    snapshot_step: int = 0
    eval_step: int = 0

    def __post_init__(self) -> None:
        if self.min_timestep > self.max_timestep:
            raise UserError(f"--min_timestep {self.min_timestep} is above --max_timestep {self.max_timestep}")
        check_pictures(self.evaluation_nsamples, self.visualize_nsamples, self.sampling)
        if self.on_save is not None:
            _split_command(self.on_save)
        for pattern, settings in self.overrides.items():
            if settings and settings.get("row_bits"):
                raise UserError(
                    f"--overrides {pattern}: row_bits is {settings['row_bits']!r}, but codes of variable rate are only "
                    "loaded, no longer made; use --target_bits (--code trellis), or segment_bits as in its plan.json"
                )
        self._check_sharing()

    def _check_sharing(self) -> None:
        if self.share_codebooks != "none" and self.solver.encoder != "ldl":
            raise UserError("--share_codebooks needs --encoder ldl; beam fits codebooks to one layer")
        if self.share_codebooks != "none" and not self.spec.can_share:
            raise UserError("--share_codebooks goes neither with --groupwise_codebooks nor with --codebook_value_nbits")
        if self.hessian_cache and self.calibration_latents == "student":
            raise UserError("--hessian_cache is of the full-precision model; --calibration_latents student is not")
        if self.code == "trellis" and self.target_bits is None:
            raise UserError("--code trellis needs --target_bits, such as --target_bits 3")
        if self.target_bits is None:
            return
        if self.code == "additive":
            raise UserError("--code additive does not go with --target_bits, which divides bits among trellis codes")
        changed = [name for name in ADDITIVE_FIELDS if getattr(self.spec, name) != getattr(CodeSpec(), name)]
        if changed:
            raise UserError(f"--target_bits chooses formats itself; leave out --{', --'.join(changed)}")
        if self.share_codebooks != "none":
            raise UserError("--share_codebooks is for additive codes; --target_bits needs none")

    def to_dict(self) -> dict:
        """Without the tokens that a command may hold."""
        return super().to_dict() | {"on_save": self.on_save and redacted(self.on_save)}

    @property
    def spec(self) -> CodeSpec:
        return self.solver.spec


def check_pictures(evaluated: int, shown: int, sampling: SamplingConfig) -> None:
    """Raise UserError, naming the flags, where the pictures of an evaluation cannot be as they say."""
    if shown > evaluated:
        raise UserError(
            f"--visualize_nsamples {shown} is more than --evaluation_nsamples {evaluated}, of which they are the first"
        )
    if (sampling.height is None) != (sampling.width is None):
        raise UserError("--height and --width are given together, or neither")


def _split_command(command: str) -> list[str]:
    try:
        words = shlex.split(command)
    except ValueError as error:
        raise UserError(f"--on_save {command!r} is not a command: {error}") from None
    if not words:
        raise UserError("--on_save is empty; give a program and its arguments")
    return words


def flatten(settings: dict, prefix: str = "") -> dict:
    """Nested settings as one level of dotted names."""
    out = {}
    for name, value in settings.items():
        deeper = isinstance(value, dict) and name != "overrides"
        out |= flatten(value, f"{prefix}{name}.") if deeper else {prefix + name: value}
    return out


def differences(saved: dict, now: dict) -> list[str]:
    """Lines that say which settings differ, and how, leaving out those the result does not depend on."""
    before, after = flatten(saved), flatten(json.loads(json.dumps(now)))
    free = lambda name: name in FREE_FIELDS or name.split(".")[0] in FREE_FIELDS  # noqa: E731
    names = [name for name in dict.fromkeys([*before, *after]) if not free(name)]
    return [
        f"{name.split('.')[-1]} was {before.get(name)!r}, now {after.get(name)!r}"
        for name in names
        if before.get(name) != after.get(name)
    ]


def read_overrides(path: str | None) -> dict[str, dict | None]:
    """Full-match pattern → settings or None, from a JSON or YAML file; empty without a file.

    Raises:
        UserError: unreadable file, a bad pattern, or a setting that does not exist.
    """
    if path is None:
        return {}
    try:
        plan = read_yaml(Path(path))
    except (OSError, ValueError) as error:
        raise UserError(f"--overrides {path} cannot be read: {first_line(error)}") from None
    if not isinstance(plan, dict):
        raise UserError(f"--overrides {path} must map layer names or patterns to settings, or to null")
    for pattern, settings in plan.items():
        _check_override(path, pattern, settings)
    return plan


def _check_override(path: str, pattern, settings) -> None:
    if not isinstance(pattern, str):
        raise UserError(f"--overrides {path}: {pattern!r} is a {type(pattern).__name__}; patterns are text in quotes")
    known = [one.name for one in fields(CodeSpec)]
    if not isinstance(settings, dict | None) or any(name not in known for name in settings or ()):
        allowed = [name for name in known if name != "row_bits"]
        raise UserError(f"--overrides {path}: {pattern}: expected null, or settings out of {', '.join(allowed)}")
    try:
        re.compile(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        raise UserError(f"--overrides {path}: {pattern} is not a regular expression: {error}") from None
