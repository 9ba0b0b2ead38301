"""Declare the settings of the programs: each a field of a frozen dataclass, with its flag, help and allowed values.

`cli.Parser` makes the command line, the `--config` file and the help of such a dataclass.
"""

from __future__ import annotations

import json
import math
import shlex
import types
from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace
from functools import cache
from typing import Any, Union, get_args, get_origin, get_type_hints

from vqdm.errors import UserError

DTYPES = ("auto", "float16", "bfloat16", "float32")
TRACKERS = ("none", "wandb", "tensorboard")
SECOND_EXPERT = "transformer_2"  # of pipelines that change their denoiser on the way
COMPONENTS = ("unet", "transformer", SECOND_EXPERT)  # names of denoisers in pipelines, and of their folders
SCHEDULERS = {  # name → class of diffusers
    "default": None,
    "ddpm": "DDPMScheduler",
    "ddim": "DDIMScheduler",
    "heun": "HeunDiscreteScheduler",
    "dpmsolver": "DPMSolverMultistepScheduler",
    "euler": "EulerDiscreteScheduler",
    "ode": "EulerDiscreteScheduler",
}
PROMPT_FILE = "prompt file (.txt .csv .tsv .json .jsonl .yaml .parquet), or datasets id"

# Fields that may change between a run and its resumption, because the result does not depend on them.
FREE_FIELDS = ("output_dir", "report_to", "on_save", "resume", "dry_run", "eval_step", "snapshot_step", "device")
FREE_FIELDS += ("ignore_budget", "local_files_only", "visualize_nsamples", "hessian_cache")
# Those that change memory, and results by rounding at most: what a run that was out of memory is resumed with.
FREE_FIELDS += ("offload", "xtx_batch_size", "hessian_memory_gb", "intermediate.local_batch_size")


# ------------------------------------------------------------------------------------------- declaring flags


@dataclass(frozen=True)
class Flag:
    """How a field appears on the command line; made by `flag`.

    Attributes:
        help: one line; the default is appended.
        group: title that the flag stands under in `--help_all`; None: that of the field that holds its dataclass.
        common: whether `--help` shows it.
        choices: allowed values; a text is matched without regard to case.
        ge, gt, le, lt: bounds of a number.
        words: texts that are allowed beside numbers.
        metavar: placeholder of the value in the help.
        aliases: other names.
        shorthands: values that are flags of their own: `--wandb` for `--report_to wandb`.
        positional: whether it is given by its place; a field without a default always is.
        needs: conditions on other flags, without which this one has no effect, and is refused: see `check_needs`.
    """

    help: str
    group: str | None = None
    common: bool = False
    choices: tuple = ()
    ge: float | None = None
    gt: float | None = None
    le: float | None = None
    lt: float | None = None
    words: tuple[str, ...] = ()
    metavar: str | None = None
    aliases: tuple[str, ...] = ()
    shorthands: tuple[str, ...] = ()
    positional: bool = False
    needs: tuple[str, ...] = ()


def flag(default: Any, help: str, group: str | None = None, **about) -> Any:
    """Return the dataclass field of a flag; `about` are fields of `Flag`."""
    return field(default=default, metadata={"flag": Flag(help, group, **about)})


def argument(help: str, **about) -> Any:
    """Return the dataclass field of a positional argument that must be given."""
    return field(metadata={"flag": Flag(help, positional=True, **about)})


def flags_in(kind: type, group: str) -> Any:
    """Return the field of a dataclass whose fields are flags, by default under one group title."""
    return field(default_factory=kind, metadata={"group": group})


def optional_flags(switch: str, help: str, group: str, **about) -> Any:
    """Return the field of a dataclass of flags that is None unless `--switch` is given, which they all need."""
    return field(default=None, metadata={"group": group, "switch": switch, "flag": Flag(help, group, **about)})


@dataclass(frozen=True)
class Setting:
    """A flag with what its field says.

    Attributes:
        kind: type of a value; of a sequence, `tuple`.
        optional: whether the value may be None.
        default: of the field; MISSING where it must be given.
    """

    name: str
    kind: type
    optional: bool
    default: Any
    flag: Flag

    @property
    def allowed(self) -> str:
        """The allowed values in words."""
        one = self.flag
        if self.kind is bool:
            return "true and false"
        if one.choices:
            return ", ".join(map(str, one.choices))
        low = "" if one.ge is None else f" from {one.ge}"
        low += "" if one.gt is None else f" above {one.gt}"
        high = "" if one.le is None else f" {'to' if one.gt is None else 'up to'} {one.le}"
        high += "" if one.lt is None else f" to below {one.lt}"
        numbers = {int: "whole numbers", float: "numbers"}.get(self.kind, "texts")
        return ", and ".join((f"{numbers}{low}{high}", *one.words))

    def accepts(self, value: Any) -> bool:
        """Return whether a value is of the type, and allowed."""
        one = self.flag
        if value is None:
            return self.optional
        if self.kind is bool:
            return isinstance(value, bool)
        if self.kind not in (int, float):
            return not one.choices or (isinstance(value, str) and value in one.choices)
        if isinstance(value, str):
            return value in one.words
        if isinstance(value, bool) or not isinstance(value, int if self.kind is int else int | float):
            return False
        above = value >= (-math.inf if one.ge is None else one.ge) and (one.gt is None or value > one.gt)
        below = value <= (math.inf if one.le is None else one.le) and (one.lt is None or value < one.lt)
        return above and below and (not one.choices or value in one.choices)


@cache
def settings_of(kind: type) -> tuple[Setting, ...]:
    """Return the flags of a dataclass, without those of dataclasses inside it."""
    hints = get_type_hints(kind)
    found = []
    for one in fields(kind):
        if "flag" in one.metadata:
            optional, parts = _parts(hints[one.name])
            switch = one.metadata.get("switch")
            kinds = [part for part in (bool, float, int, str) if part in parts]
            default = False if switch else one.default
            typed = bool if switch else kinds[0] if kinds else tuple
            found.append(Setting(switch or one.name, typed, optional and not switch, default, one.metadata["flag"]))
    return tuple(found)


def _parts(hint: Any) -> tuple[bool, tuple]:
    """(whether None is allowed, the other types) of an annotation."""
    parts = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    return type(None) in parts, tuple(part for part in parts if part is not type(None))


def inner(kind: type) -> dict[str, type]:
    """Return field → dataclass, for the fields of a dataclass that hold another one with flags."""
    hints = get_type_hints(kind)
    held = {one.name: _parts(hints[one.name])[1][0] for one in fields(kind) if "group" in one.metadata}
    return {name: part for name, part in held.items() if is_dataclass(part)}


def all_settings(kind: type, group: str = "run") -> list[tuple[str, Setting]]:
    """Return (group title, flag) for each flag of a dataclass and of those inside it, in the order of the fields."""
    found, own, nested = [], {one.name: one for one in settings_of(kind)}, inner(kind)
    for one in fields(kind):
        switch = one.metadata.get("switch")
        name = switch or one.name
        if name in own:
            found.append((own[name].flag.group or group, own[name]))
        if one.name in nested:
            inside = all_settings(nested[one.name], one.metadata["group"])
            found += [(title, _needing(setting, switch)) for title, setting in inside] if switch else inside
    return found


def _needing(setting: Setting, condition: str) -> Setting:
    return replace(setting, flag=replace(setting.flag, needs=(condition, *setting.flag.needs)))


def build(kind: type, values: dict) -> Any:
    """Return a dataclass of the values of its flags, with the dataclasses inside it.

    Raises:
        UserError: settings that contradict each other, or one that has no effect with the others.
    """
    built = _built(kind, values)
    check_needs(kind, values)
    return built


def _built(kind: type, values: dict) -> Any:
    given = {one.name: values[one.name] for one in fields(kind) if one.name in values}
    switches = {one.name: one.metadata["switch"] for one in fields(kind) if "switch" in one.metadata}
    for name, part in inner(kind).items():
        if name not in switches or values.get(switches[name]):
            given[name] = _built(part, values)
    try:
        return kind(**{name: tuple(value) if isinstance(value, list) else value for name, value in given.items()})
    except UserError:
        raise
    except ValueError as error:
        raise UserError(f"--{error}") from None


def check_needs(kind: type, values: dict) -> None:
    """Raise UserError for a flag that is not at its default and has no effect with the other values.

    A condition of `Flag.needs` is `NAME`: that flag is set, to something else than 0 or "none"; or `NAME VALUE`: it has
    this value; or `not` and either. Alternatives are joined by `or`.
    """
    settings = {one.name: one for _, one in all_settings(kind)}
    for name, need in unmet_needs(kind, values).items():
        one, value = settings[name], values.get(name, settings[name].default)
        if value != one.default:
            given = f"--{name}" if one.kind is bool else f"--{name} {value}"
            raise UserError(f"{given} has no effect {_without(need, settings)}; leave it out")


def unmet_needs(kind: type, values: dict) -> dict[str, str]:
    """Return flag → the first of its conditions that does not hold, for each flag that has no effect with `values`."""
    settings = [one for _, one in all_settings(kind)]
    held = {one.name: values.get(one.name, one.default) for one in settings}
    found = {}
    for one in settings:
        unmet = [need for need in one.flag.needs if not any(_holds(part, held) for part in need.split(" or "))]
        found |= {one.name: unmet[0]} if unmet else {}
    return found


def _holds(condition: str, held: dict) -> bool:
    name, *allowed = condition.removeprefix("not ").split()
    value = held[name]
    found = str(value) == allowed[0] if allowed else bool(value) and value != "none"
    return found != condition.startswith("not ")


def _without(need: str, settings: dict[str, Setting]) -> str:
    """Return an unmet condition in words, such as "without --target_bits"."""
    lacking, present = [], []
    for part in need.split(" or "):
        name, *allowed = part.removeprefix("not ").split()
        words = [name.upper() if settings[name].flag.positional else f"--{name}", *allowed[:1]]
        (present if part.startswith("not ") else lacking).append(" ".join(words))
    present = [one for one in present if not any(other.startswith(f"{one} ") for other in lacking)]
    parts = [f"with {' and '.join(present)}"] if present else []
    return " and ".join(parts + ([f"without {' or '.join(lacking)}"] if lacking else []))


def check_fields(config: Any) -> None:
    """Raise ValueError, naming the field, its value and what is allowed, for a value that its flag does not allow."""
    for one in settings_of(type(config)):
        if hasattr(config, one.name) and not one.accepts(value := getattr(config, one.name)):
            raise ValueError(f"{one.name} is {value!r}; allowed are {one.allowed}")


def check_flags(config: Any) -> None:
    """Raise UserError, naming the flag, as `check_fields`."""
    try:
        check_fields(config)
    except ValueError as error:
        raise UserError(f"--{error}") from None


# ------------------------------------------------------------------------------------------- shared settings


def label(component: str) -> str:
    """Return what a denoiser is called in messages, given the name of its component."""
    return {"unet": "UNet"}.get(component, component)


@dataclass(frozen=True)
class SamplingConfig:
    """How images are sampled; None leaves a setting to the pipeline."""

    scheduler: str = flag(
        "default", "noise scheduler; default: the pipeline's own", choices=tuple(SCHEDULERS), common=True
    )
    guidance_scale: float | None = flag(
        None, "classifier-free guidance; default: the pipeline's own; 0 for SDXL-Turbo", ge=0, common=True
    )
    num_inference_steps: int | None = flag(
        None, "denoising steps; default: the pipeline's own", ge=1, le=1000, common=True
    )
    height: int | None = flag(None, "image height in pixels; default: the pipeline's own", ge=8)
    width: int | None = flag(None, "image width in pixels; default: the pipeline's own", ge=8)

    def __post_init__(self) -> None:
        check_flags(self)

    def call(self) -> dict:
        """Keyword arguments of the pipeline call."""
        return {name: value for name, value in asdict(self).items() if name != "scheduler"}


def output_dir(default: str | None, help: str = "folder of the result") -> Any:
    """Return the field of `--output_dir`."""
    return flag(default, help, "saving and resuming", common=True, metavar="DIR", aliases=("save",))


def ignore_budget() -> Any:
    """Return the field of `--ignore_budget`."""
    return flag(False, "start although the plan needs more memory or disk than is free", "run")


def single_file_config(group: str, **about) -> Any:
    """Return the field of `--single_file_config`."""
    help = "MODEL in one file: folder or hub name of a pipeline of its kind, for configuration and tokenizers"
    return flag(None, help, group, metavar="FOLDER_OR_HUB_ID", **about)


@dataclass(frozen=True, kw_only=True)
class ProgramConfig:
    """Settings of every program. Raises UserError, naming the flag, on a value that is not allowed."""

    output_dir: str = output_dir("out")
    seed: int = flag(0, "random seed", "run", ge=0, le=2**63 - 1)
    device: str = flag("auto", "auto, cpu, cuda, cuda:1, ...; mps to generate images and for metrics", "run")
    local_files_only: bool = flag(False, "never ask the hub", "model")
    report_to: str = flag("none", "live tracker", "run", choices=TRACKERS, shorthands=("wandb",))
    dry_run: bool = flag(False, "check the input, print the plan, and stop", "run", common=True)

    def __post_init__(self) -> None:
        check_flags(self)

    def to_dict(self) -> dict:
        """Plain JSON types, nested as the dataclasses are."""
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class RunConfig(ProgramConfig):
    """Settings of every program that runs a model."""

    model: str = argument("diffusers pipeline: a folder, one .safetensors file, or a name on the hub")
    dtype: str = flag(
        "auto",
        "auto: float32 on a CPU, bfloat16 on a GPU that has it (NVIDIA from Ampere on), float16 on others",
        "run",
        choices=DTYPES,
    )
    variant: str | None = flag(None, "file variant of the model, such as fp16; default: the only one", "model")
    single_file_config: str | None = single_file_config("model")
    revision: str | None = flag(None, "branch, tag or commit on the hub", "model")
    sampling: SamplingConfig = flags_in(SamplingConfig, "sampling")
    resume: bool = flag(False, "continue an interrupted run in --output_dir", "saving and resuming", common=True)


# Flags of a run that generating images with its result needs as well.
REPEATED = ("variant", "single_file_config", "revision", "dtype", "device")


def generate_command(config: RunConfig, prompts: str) -> str:
    """Return the command, quoted for a shell, that generates images with a run's result as the run itself does."""
    given = {name: getattr(config, name) for name in REPEATED} | asdict(config.sampling)
    usual = {one.name: one.default for one in (*fields(RunConfig), *fields(SamplingConfig))}
    words = [config.model, config.output_dir, prompts]
    for name, value in given.items():
        words += [f"--{name}", str(value)] if value != usual[name] else []
    words += ["--local_files_only"] if config.local_files_only else []
    return shlex.join(["python", "generate.py", *words, "--output_dir", f"{config.output_dir.rstrip('/')}-images"])


def image_pairs(evaluated: int, shown: int | None, sampling: SamplingConfig) -> int:
    """Return how many image pairs an evaluation shows; by default 16, or as many as are evaluated.

    Raises:
        UserError: they contradict other settings of the evaluation; names the flags.
    """
    shown = min(16, evaluated) if shown is None else shown
    if shown > evaluated:
        raise UserError(
            f"--visualize_nsamples {shown} is more than --evaluation_nsamples {evaluated}, of which they are the first"
        )
    if (sampling.height is None) != (sampling.width is None):
        raise UserError("--height and --width are given together, or neither")
    return shown


# ------------------------------------------------------------------------------------------- saved settings


def flatten(settings: dict, prefix: str = "") -> dict:
    """Return nested settings as one level of dotted names."""
    out = {}
    for name, value in settings.items():
        deeper = isinstance(value, dict) and name != "overrides"
        out |= flatten(value, f"{prefix}{name}.") if deeper else {prefix + name: value}
    return out


DIGEST = "_sha256"  # ends the names of settings that are digests of files, named as their arguments


def differences(saved: dict, now: dict) -> list[str]:
    """Return a line for each setting that differs, without those that the result does not depend on."""
    before, after = flatten(saved), flatten(json.loads(json.dumps(now)))
    free = lambda name: name in FREE_FIELDS or name.split(".")[0] in FREE_FIELDS  # noqa: E731
    names = [name for name in dict.fromkeys([*before, *after]) if not free(name)]
    return [
        _difference(name, before.get(name), after.get(name)) for name in names if before.get(name) != after.get(name)
    ]


def _difference(name: str, before, now) -> str:
    """Describe how a setting differs; of a digest, whose digits say nothing, only what it is of."""
    name = name.split(".")[-1]
    if not name.endswith(DIGEST):
        return f"{name} was {before!r}, now {now!r}"
    what = name.removesuffix(DIGEST).upper()
    return f"{what} differ from those of the run" if what.endswith("S") else f"{what} differs from that of the run"
