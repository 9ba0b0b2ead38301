"""Run a program: its command line from a dataclass of flags, plain log lines, one-line errors with an exit status."""

from __future__ import annotations

import argparse
import difflib
import logging
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import MISSING
from pathlib import Path
from typing import Any

import diffusers
import transformers

from vqdm.config import Setting, all_settings, build
from vqdm.documents import first_line, printable, read_yaml, shortened
from vqdm.errors import RunError, UserError
from vqdm.tracking import redacted

LOG_LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR")
LAST_GROUPS = ("sampling", "model", "saving and resuming", "hub", "run")  # in `--help_all`, of every program

# Log records of libraries that are shown at DEBUG only, by a part of their text: the programs expect them, or count
# and report them in a line of their own.
EXPECTED = (
    "cannot run with `cpu` device",  # a 16-bit pipeline is moved to the CPU to be saved
    "Token indices sequence length is longer",  # `pipelines.log_truncated` counts these and the next
    "The following part of your input was truncated",
    "invalid value encountered in cast",  # NaN in an image, which `images.problems_of` counts
    "should be kept in float32: []",
    "Defaulting to unsafe serialization",  # a folder of .bin files alone, which are read as tensors only
)
UNIMPORTANT = (DeprecationWarning, PendingDeprecationWarning, FutureWarning, ImportWarning, ResourceWarning)
PACKAGE_PATH = re.compile(r"\S*(?:site|dist)-packages[/\\]")
LONGEST_LINE = 500  # characters


# ------------------------------------------------------------------------------------------- command line


class Parser(argparse.ArgumentParser):
    """Parse command lines into instances of a dataclass of flags.

    No abbreviated flags; `--config FILE.yaml` gives values that the command line overrides; `--help` lists the common
    flags and `--help_all` all of them.

    Args:
        kind: dataclass whose fields `config.flag` and `config.argument` declare.
        doc: description of the program.
        unsupported: flags of the original that are refused → what to use instead.
        command: first word of the command line of a program with several.
    """

    def __init__(self, kind: type, doc: str, unsupported: dict[str, str] | None = None, command: str = ""):
        super().__init__(
            description=doc.strip(),
            formatter_class=lambda prog: _HelpFormatter(prog, max_help_position=36, width=120),
            allow_abbrev=False,
            add_help=False,
        )
        self.prog += command and f" {command}"
        self.kind, self.common = kind, {"config", "help", "help_all"}
        settings = all_settings(kind)
        found = [*(group for group, one in settings if not one.flag.positional), "run"]
        titles = [*(title for title in found if title not in LAST_GROUPS), *LAST_GROUPS]
        groups = {title: self.add_argument_group(title) for title in dict.fromkeys(titles) if title in found}
        for group, one in settings:
            if one.flag.positional:
                self._add_positional(one)
            else:
                self._add_flag(groups[group], one)
        run = groups["run"]
        run.add_argument(
            "--loglevel",
            choices=LOG_LEVELS,
            default="INFO",
            type=_log_level,
            help="DEBUG adds tracebacks (default: INFO)",
        )
        run.add_argument("--config", metavar="FILE.yaml", help="values for any of these flags; the command line wins")
        run.add_argument("-h", "--help", action=_Help, everything=False, help="show the common flags")
        run.add_argument("--help_all", action=_Help, everything=True, help="show all flags, by group")
        for name, advice in (unsupported or {}).items():
            self.add_argument(name, action=_Unsupported, advice=advice)
        self.usage = " ".join(["%(prog)s", *map(_usage, self._get_positional_actions()), "[FLAGS]"])

    def _add_positional(self, one: Setting) -> None:
        metavar, given = one.flag.metavar or one.name.upper(), {"help": one.flag.help.replace("%", "%%")}
        given |= {"choices": one.flag.choices} if one.flag.choices else {}
        given |= {"nargs": "+"} if one.kind is tuple else {} if one.default is MISSING else {"nargs": "?"}
        self.add_argument(one.name, metavar=metavar, **given)

    def _add_flag(self, group: argparse._ArgumentGroup, one: Setting) -> None:
        names = [f"--{name}" for name in (one.name, *one.flag.aliases)]
        text = one.flag.help.replace("%", "%%")
        if not (one.default is None or one.default is False or "default" in text):
            text += f" (default: {'on' if one.default is True else one.default})"
        if one.kind is bool:
            action = "store_true" if one.default is False else argparse.BooleanOptionalAction
            group.add_argument(*names, dest=one.name, action=action, default=one.default).help = text
        else:
            plain = one.kind is tuple or (one.kind is str and not one.flag.choices)
            given = {"choices": one.flag.choices} if one.flag.choices else {"metavar": _metavar(one)}
            given |= {"metavar": one.flag.metavar} if one.flag.metavar else {}
            given |= {} if plain else {"type": _reader(one)}
            given |= {"nargs": "+"} if one.kind is tuple else {}
            group.add_argument(*names, dest=one.name, default=one.default, help=text, **given)
        for value in one.flag.shorthands:
            text = f"the same as --{one.name} {value}"
            group.add_argument(
                f"--{value}", dest=one.name, action="store_const", const=value, default=one.default, help=text
            )
        if one.flag.common:
            self.common.add(one.name)

    def error(self, message: str):
        unknown = re.match(r"unrecognized arguments: (?:.* )?--([^\s=]+)", message)
        raise UserError(f"{message}{self._nearest(unknown[1]) if unknown else ''} (see --help_all)")

    def _nearest(self, name: str) -> str:
        """Return the question whether the flag most like an unknown one was meant; empty if none is like it."""
        shown = [one for one in self._actions if one.help != argparse.SUPPRESS]
        known = [word.removeprefix("--") for one in shown for word in one.option_strings if word.startswith("--")]
        near = difflib.get_close_matches(name, known, 1)
        return f"; did you mean --{near[0]}?" if near else ""

    def _get_values(self, action: argparse.Action, words: list[str]) -> Any:
        # An unset variable of a shell makes an empty text. Only prompts may be empty.
        if "" in words and action.dest != "negative_prompt":
            raise argparse.ArgumentError(action, "the value is empty; is a variable of the shell unset?")
        return super()._get_values(action, words)

    def parse(self, argv: list[str] | None = None) -> Any:
        """Return the dataclass of a command line, and set the log level.

        Raises:
            UserError: an unknown flag, a value that is not allowed, or settings that contradict each other.
        """
        early = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
        early.add_argument("--config", nargs="?")  # without a value it is the whole parser that complains
        known, _ = early.parse_known_args(argv)
        changed = self._from_file(Path(known.config)) if known.config else {}  # the whole parser refuses an empty one
        kept = {action.dest: action.default for action in self._actions}
        self.set_defaults(**changed)
        try:
            values = vars(self.parse_intermixed_args(argv))
        finally:
            self.set_defaults(**{name: kept[name] for name in changed})
        logging.getLogger().setLevel(values["loglevel"])
        return build(self.kind, values)

    def _from_file(self, path: Path) -> dict:
        try:
            values = read_yaml(path)
        except (OSError, ValueError) as error:
            raise UserError(f"--config: {path} cannot be read: {first_line(error)}") from None
        if not isinstance(values, dict):
            raise UserError(f"--config: {path} must hold a mapping of flags to values")
        # Of flags that share a name, such as --report_to and --wandb, the first one takes the value.
        others = ("config", "help", "help_all", argparse.SUPPRESS)
        flags = [one for one in self._actions if one.option_strings and one.dest not in others]
        actions = {action.dest: action for action in reversed(flags)}
        actions |= {name.removeprefix("--"): one for one in flags if one.nargs != 0 for name in one.option_strings}
        unknown = [name for name in values if name not in actions]
        if unknown:
            hint = self._nearest(str(unknown[0]))
            raise UserError(f"--config: {path}: no such flag: {', '.join(map(shortened, unknown))}{hint}")
        found = [(actions[name].dest, self._typed(actions[name], name, value, path)) for name, value in values.items()]
        twice = [name for k, (name, _) in enumerate(found) if name in dict(found[:k])]
        if twice:
            raise UserError(f"--config: {path}: {twice[0]} is given under two names; leave one out")
        return dict(found)

    def _typed(self, action: argparse.Action, name: str, value: Any, path: Path) -> Any:
        where = f"--config: {path}: {name} is {shortened(value)}"
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

    def help_text(self, everything: bool) -> str:
        """Return the help: usage, description, positional arguments, and the common flags or all groups."""
        formatter = self._get_formatter()
        formatter.add_usage(self.usage, [], [])
        formatter.add_text(self.description)
        groups = {group.title: group._group_actions for group in self._action_groups}
        places = self._get_positional_actions()
        sections = {"positional arguments": places} | {
            title: actions for title, actions in groups.items() if actions and actions[0] not in places
        }
        if not everything:
            shown = [one for group in self._action_groups for one in group._group_actions if one.dest in self.common]
            sections = {"positional arguments": places, "common flags": shown}
        for title, actions in sections.items():
            formatter.start_section(title)
            formatter.add_arguments(actions)
            formatter.end_section()
        return formatter.format_help()


class _HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Help with line breaks in the description, and `--flag, --alias VALUE`."""

    def _format_action_invocation(self, action: argparse.Action) -> str:
        if not action.option_strings or action.nargs == 0:
            return super()._format_action_invocation(action)
        return f"{', '.join(action.option_strings)} {self._format_args(action, action.metavar or '')}"


class _Help(argparse.Action):
    """Print the help of the common flags, or of everything, and exit."""

    def __init__(self, option_strings, dest, everything: bool, help: str):
        super().__init__(option_strings, dest, nargs=0, default=argparse.SUPPRESS, help=help)
        self.everything = everything

    def __call__(self, parser, namespace, values, option_string=None):
        print(parser.help_text(self.everything), end="")
        parser.exit()


class _Unsupported(argparse.Action):
    """Refuse a flag of the original that has no meaning here, with what to use instead."""

    def __init__(self, option_strings, dest, advice: str):
        super().__init__(option_strings, argparse.SUPPRESS, nargs="?", help=argparse.SUPPRESS)
        self.advice = advice

    def __call__(self, parser, namespace, values, option_string=None):
        raise UserError(f"{option_string} is not a flag here: {self.advice}")


def _usage(action: argparse.Action) -> str:
    return {"?": f"[{action.metavar}]", "+": f"{action.metavar} [{action.metavar} ...]"}.get(
        action.nargs, action.metavar
    )


def _log_level(text: str) -> str:
    return {"WARN": "WARNING"}.get(text.upper(), text.upper())


def _metavar(one: Setting) -> str:
    number = {int: "N", float: "X"}.get(one.kind, "TEXT")
    return f"{{{','.join((*one.flag.words, number))}}}" if one.flag.words else number


def _reader(one: Setting) -> Callable[[str], Any]:
    """Return the function that turns the text of a flag into its value, for argparse."""

    def read(text: str) -> Any:
        if one.kind is str:  # argparse compares with the choices
            return {choice.lower(): choice for choice in one.flag.choices}.get(text.lower(), text)
        if text in one.flag.words:
            return text
        try:
            value = one.kind(text)
        except ValueError:
            name = "whole number" if one.kind is int else "number"
            raise argparse.ArgumentTypeError(f"{text!r} is not a {name}; allowed are {one.allowed}") from None
        if not one.flag.choices and not one.accepts(value):
            raise argparse.ArgumentTypeError(f"{text} is out of range; allowed are {one.allowed}")
        return value

    return read


# ------------------------------------------------------------------------------------------- programs


def run_script(
    main: Callable[[list[str] | None], None],
    argv: list[str] | None = None,
    after_interrupt: str = "the same command with --resume continues",
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


# ------------------------------------------------------------------------------------------- log lines of libraries


class _OneLine(logging.Filter):
    """Lets a library's record through as one line, where it matters to the user; those of `vqdm` as they are."""

    def filter(self, record: logging.LogRecord) -> bool:
        if record.name.split(".")[0] == "vqdm" or record.exc_info:
            return True
        text = PACKAGE_PATH.sub("", " ".join(record.getMessage().split()))
        record.msg, record.args = f"warning: {printable(text, LONGEST_LINE)}", None
        debugging = logging.getLogger().level <= logging.DEBUG
        if debugging or any(words in text for words in EXPECTED):
            return debugging
        first = os.environ.get("RANK", "0") == "0"
        return record.levelno >= max(logging.WARNING if first else logging.ERROR, logging.getLogger().level)


def _log_warning(message, category, filename, lineno, file=None, line=None) -> None:
    """In place of `warnings.showwarning`, which prints the path of the source and a line of it."""
    level = logging.DEBUG if issubclass(category, UNIMPORTANT) else logging.WARNING
    logging.getLogger("py.warnings").log(level, "%s", message)


@contextmanager
def plain_library_logs() -> Iterator[None]:
    """Inside, what libraries log and warn of reaches the root logger's handlers as plain single lines.

    diffusers and transformers have handlers of their own, which write to standard error.
    """
    libraries = (diffusers.utils.logging, transformers.utils.logging)
    one_line, handlers = _OneLine(), list(logging.getLogger().handlers)
    for handler in handlers:
        handler.addFilter(one_line)
    for library in libraries:
        library.disable_default_handler()
        library.enable_propagation()
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _log_warning
            yield
    finally:
        for library in libraries:
            library.disable_propagation()
            library.enable_default_handler()
        for handler in handlers:
            handler.removeFilter(one_line)
