"""What libraries log and warn of, as programs show it: a line each, without paths, and only what matters to users."""

from __future__ import annotations

import logging
import os
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import diffusers
import transformers

from vqdm.documents import printable

# Logged at DEBUG, by words of each: what a program does on purpose, or counts and reports in a line of its own.
EXPECTED = (
    "cannot run with `cpu` device",  # a 16-bit pipeline is moved to the CPU to be saved
    "Token indices sequence length is longer",  # `pipelines.log_truncated` counts these and the next
    "The following part of your input was truncated",
    "invalid value encountered in cast",  # NaN in an image, which `drawing` counts
    "should be kept in float32: []",
    "Defaulting to unsafe serialization",  # a folder of .bin files alone, which are read as tensors only
)
UNIMPORTANT = (DeprecationWarning, PendingDeprecationWarning, FutureWarning, ImportWarning, ResourceWarning)
PATH = re.compile(r"\S*(?:site|dist)-packages[/\\]")
LONGEST = 500  # characters of a line


class _OneLine(logging.Filter):
    """Lets a library's record through as one line, where it matters to the user; those of `vqdm` as they are."""

    def filter(self, record: logging.LogRecord) -> bool:
        if record.name.split(".")[0] == "vqdm" or record.exc_info:
            return True
        text = PATH.sub("", " ".join(record.getMessage().split()))
        record.msg, record.args = f"warning: {printable(text, LONGEST)}", None
        told = logging.getLogger().level <= logging.DEBUG
        if told or any(words in text for words in EXPECTED):
            return told
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
