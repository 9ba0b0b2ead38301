"""What the four scripts share: a parser without surprises, and one-line errors with their exit status."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Callable
from pathlib import Path

from vqdm.diffusion.pipelines import SCHEDULERS
from vqdm.documents import first_line, printable, read_yaml, shortened
from vqdm.errors import RunError, UserError
from vqdm.library_logs import plain_library_logs
from vqdm.redaction import redacted

DTYPES = ("auto", "float16", "bfloat16", "float32")
LOG_LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR")


class Parser(argparse.ArgumentParser):
    """Argument parser: no prefix matching, defaults in the help, `--config FILE.yaml` beneath the flags."""

    def __init__(self, doc: str, usage: str):
        super().__init__(
            usage=f"%(prog)s {usage} [FLAGS]",
            description=doc.strip(),
            formatter_class=_HelpFormatter,
            allow_abbrev=False,
            add_help=False,
        )

    def error(self, message: str):
        raise UserError(f"{message} (see --help)")

    def parse(self, argv: list[str] | None = None) -> argparse.Namespace:
        """Flags over `--config` over defaults. Raises UserError on anything unknown."""
        early = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
        early.add_argument("--config", nargs="?")  # without a value it is the whole parser that complains
        known, _ = early.parse_known_args(argv)
        if known.config:
            self.set_defaults(**self._from_yaml(Path(known.config)))
        return self.parse_intermixed_args(argv)

    def _from_yaml(self, path: Path) -> dict:
        try:
            values = read_yaml(path)
        except (OSError, ValueError) as error:
            raise UserError(f"--config: {path} cannot be read: {first_line(error)}") from None
        if not isinstance(values, dict):
            raise UserError(f"--config: {path} must hold a mapping of flags to values")
        # Of flags that share a name, such as --report_to and --wandb, the first one takes the value.
        actions = {action.dest: action for action in reversed(self._actions) if action.option_strings}
        unknown = [name for name in values if name not in actions]
        if unknown:
            raise UserError(f"--config: {path}: no such flag: {', '.join(map(shortened, unknown))}")
        return {name: self._typed(actions[name], value, path) for name, value in values.items()}

    def _typed(self, action: argparse.Action, value, path: Path):
        where = f"--config: {path}: {action.dest} is {shortened(value)}"
        if action.nargs == 0:
            if not isinstance(value, bool):
                raise UserError(f"{where}; allowed are true and false")
            return value
        words = value if isinstance(value, list) and action.nargs == "+" else [value]
        if not words or not all(isinstance(word, str | int | float) and word != "--" for word in words):
            raise UserError(f"{where}; expected a value, or leave the line out")
        if action.type is None and not all(isinstance(word, str) for word in words):
            # YAML takes no for False, and 1.10 for 1.1.
            raise UserError(f"{where}, which YAML does not take for text; put it in quotes")
        try:
            return self._get_values(action, [str(word) for word in words])
        except argparse.ArgumentError as error:
            raise UserError(f"--config: {path}: {error}") from None
        except ValueError as error:  # a number of thousands of digits
            raise UserError(f"{where}: {error}") from None


def _log_level(text: str) -> str:
    return {"WARN": "WARNING"}.get(text.upper(), text.upper())


class _HelpFormatter(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    def __init__(self, prog: str):
        super().__init__(prog, max_help_position=36, width=110)

    def _get_help_string(self, action: argparse.Action) -> str:
        silent = any(action.default is one for one in (None, False, True, argparse.SUPPRESS))
        return action.help if silent or not action.option_strings else super()._get_help_string(action)

    def _get_default_metavar_for_optional(self, action: argparse.Action) -> str:
        return getattr(action.type, "metavar", "TEXT")


class Refused(argparse.Action):
    """A flag of the original that has no meaning here: says what to use instead."""

    def __init__(self, option_strings, dest, advice: str, **_):
        super().__init__(option_strings, argparse.SUPPRESS, nargs="?", help=argparse.SUPPRESS)
        self.advice = advice

    def __call__(self, parser, namespace, values, option_string=None):
        raise UserError(f"{option_string} is not a flag here: {self.advice}")


def whole(low: int, high: int | None = None) -> Callable[[str], int]:
    """A parser of whole numbers in [low, high]."""
    return _number(int, "whole number", "N", low, high)


def real(low: float, high: float | None = None) -> Callable[[str], float]:
    """A parser of numbers in [low, high]."""
    return _number(float, "number", "X", low, high)


def _number(kind: type, words: str, metavar: str, low, high):
    allowed = f"{words}s from {low}" + ("" if high is None else f" to {high}")

    def parse(text: str):
        try:
            value = kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not a {words}; allowed are {allowed}") from None
        if not low <= value or (high is not None and not value <= high):
            raise argparse.ArgumentTypeError(f"{text} is out of range; allowed are {allowed}")
        return value

    parse.metavar = metavar
    return parse


def learning_rate(text: str) -> float | str:
    """Parse a number in [0, 1], or "auto"."""
    try:
        return text if text == "auto" else real(0, 1)(text)
    except argparse.ArgumentTypeError as error:
        raise argparse.ArgumentTypeError(f"{error}, and auto") from None


def add_sampling_flags(group: argparse._ArgumentGroup) -> None:
    """Flags of every script that samples: how, and where the pipeline comes from."""
    group.add_argument(
        "--scheduler",
        choices=tuple(SCHEDULERS),
        default="default",
        type=str.lower,
        help="default: the pipeline's own",
    )
    group.add_argument("--guidance_scale", type=real(0), help="default: the pipeline's own; 0 for SDXL-Turbo")
    group.add_argument("--num_inference_steps", type=whole(1, 1000), help="default: the pipeline's own")
    group.add_argument("--height", type=whole(8), help="pixels; default: the pipeline's own")
    group.add_argument("--width", type=whole(8), help="pixels; default: the pipeline's own")
    group.add_argument("--variant", help="file variant of the model, such as fp16")
    group.add_argument("--revision", help="branch, tag or commit on the hub")
    group.add_argument("--local_files_only", action="store_true", help="never ask the hub")


def add_shared_flags(parser: argparse.ArgumentParser, output: str | None, dtype: bool = True) -> None:
    """Flags that every script has; `--dtype` where the number format is free."""
    group = parser.add_argument_group("run")
    group.add_argument("-h", "--help", action="help", help="show this help and exit")
    group.add_argument("--output_dir", "--save", metavar="DIR", default=output, help="where the result goes")
    group.add_argument("--seed", type=whole(0, 2**63 - 1), default=0, help="start of every random draw")
    if dtype:
        words = "auto: float32 on a CPU, bfloat16 on a GPU that has it (NVIDIA from Ampere on), float16 on others"
        group.add_argument("--dtype", choices=DTYPES, default="auto", help=words)
    group.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...; mps to draw and to score")
    group.add_argument("--report_to", choices=("none", "wandb", "tensorboard"), default="none", help="live tracker")
    group.add_argument(
        "--wandb", dest="report_to", action="store_const", const="wandb", help="the same as --report_to wandb"
    )
    group.add_argument("--loglevel", choices=LOG_LEVELS, default="INFO", type=_log_level, help="DEBUG adds tracebacks")
    group.add_argument("--config", metavar="FILE.yaml", help="values for any of these flags; the command line wins")
    group.add_argument("--dry_run", action="store_true", help="check everything cheap, say what would be done, stop")


def run_script(
    main: Callable[[list[str] | None], None],
    argv: list[str] | None = None,
    after_interrupt: str = "the same command with --resume goes on",
) -> int:
    """Run a script's main function; one line on standard error and the exit status for whatever goes wrong.

    0 done, 1 failed, 2 bad input, 130 interrupted.
    """
    logging.basicConfig(format="%(message)s", level=logging.INFO, stream=sys.stdout, force=True)
    try:
        with plain_library_logs():
            main(argv)
    except UserError as error:
        return _complain(error, 2)
    except (RunError, OSError, MemoryError) as error:
        return _complain(error, 1)
    except KeyboardInterrupt:
        return _complain(KeyboardInterrupt(f"interrupted; {after_interrupt}"), 130)
    except Exception as error:
        return _complain(RunError(f"unexpected {type(error).__name__}: {error} (--loglevel DEBUG shows where)"), 1)
    return 0


def _complain(error: BaseException, status: int) -> int:
    if logging.getLogger().isEnabledFor(logging.DEBUG):
        logging.getLogger().debug("", exc_info=True)
    print(f"error: {printable(redacted(first_line(error)))}", file=sys.stderr)
    return status
