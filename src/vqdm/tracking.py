"""Progress of a run: bars, JSON lines, a live tracker that can never stop the job; and what a result was made with."""

from __future__ import annotations

import io
import json
import logging
import os
import platform
import re
import shlex
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

import diffusers
import torch
import transformers
from PIL import Image
from tqdm import tqdm

import vqdm
from vqdm.documents import first_line

log = logging.getLogger("vqdm")
CLOSING_SECONDS = 120  # that a tracker has to send what is left
LOG_SECONDS = 20  # between lines of the log about a long step


def progress_bar(items: Iterable | None = None, total: int | None = None, description: str = "") -> tqdm:
    """Return a progress bar with time left; where standard error is not a terminal, lines of the log instead.

    Nested bars share a line, every `LOG_SECONDS`. Of several processes the first shows its own.
    """
    if os.environ.get("RANK", "0") != "0":
        return tqdm(items, disable=True)
    kind = tqdm if sys.stderr.isatty() else LoggedBar
    return kind(items, total=total, desc=description, leave=False, dynamic_ncols=True)


class LoggedBar(tqdm):
    """A progress bar that is never drawn, but logged now and then."""

    _open: ClassVar[list[weakref.ref]] = []  # the innermost last; one that nobody holds is closed
    _guard: ClassVar[threading.RLock] = threading.RLock()  # closing may come from garbage collection inside it
    _thread: ClassVar[threading.Thread | None] = None
    monitor_interval = 0  # tqdm's own thread has nothing to redraw

    def __init__(self, *args, **options):
        super().__init__(*args, file=io.StringIO(), **options)
        with self._guard:
            self._open.append(weakref.ref(self))
            if LoggedBar._thread is None or not LoggedBar._thread.is_alive():
                LoggedBar._thread = threading.Thread(target=_log_open_bars, daemon=True)
                LoggedBar._thread.start()

    def __iter__(self) -> Iterator:
        """Count every item at once; tqdm counts when it draws."""
        try:
            for item in self.iterable:
                yield item
                self.n += 1
        finally:
            self.close()

    def display(self, *_, **__) -> None:
        """Draw nothing."""

    def close(self) -> None:
        """Log no more lines of this bar."""
        with self._guard:
            self._open[:] = [one for one in self._open if one() is not None and one() is not self]
        super().close()

    def line(self) -> str:
        """Format the progress so far, and the time left."""
        spent = self.format_dict["elapsed"]
        done = f"{self.desc}: {self.n} of {self.total}, {self.format_interval(spent)} so far"
        if not self.n or not self.total:
            return done
        return f"{done}, about {self.format_interval(spent * (self.total - self.n) / self.n)} left"


def _log_open_bars() -> None:
    while True:
        time.sleep(LOG_SECONDS)
        with LoggedBar._guard:
            if not LoggedBar._open:
                LoggedBar._thread = None
                return
            lines = [bar.line() for one in LoggedBar._open if (bar := one()) is not None]
            bar = None  # the last reference may be this one
        if lines:
            log.info("; ".join(lines))


def log_info(line: str) -> None:
    """One line of the log, of the first process of several, without breaking a bar."""
    if os.environ.get("RANK", "0") == "0":  # also before they have joined
        with tqdm.external_write_mode(file=sys.stdout):
            log.info(line)


class JsonLines:
    """Append-only rows of a table, each a whole line on disk before the next step begins."""

    def __init__(self, path: Path):
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)

    def write(self, row: dict) -> None:
        try:
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self.path)) from None  # a full disk names no file


class Tracker:
    """wandb or tensorboard through accelerate; whatever goes wrong there is a warning, once, and the job goes on."""

    def __init__(self, kind: str, name: str, folder: Path, config: dict):
        self.inner = None
        if kind != "none":
            self._guard(lambda: self._start(kind, name, folder, config))

    def _start(self, kind: str, name: str, folder: Path, config: dict) -> None:
        from accelerate import PartialState
        from accelerate.tracking import TensorBoardTracker, WandBTracker

        PartialState()
        if kind == "wandb":
            self.inner = WandBTracker(name, dir=str(folder))
        else:
            self.inner = TensorBoardTracker(name, logging_dir=str(folder))
        plain = {key: value for key, value in config.items() if isinstance(value, int | float | str | bool)}
        if hasattr(self.inner, "start"):  # newer accelerate starts a tracker in a step of its own
            self.inner.start()
        self.inner.store_init_configuration(plain)

    def log(self, values: dict, step: int | None = None) -> None:
        """Numbers by name."""
        numbers = {key: value for key, value in values.items() if isinstance(value, int | float)}
        if self.inner:
            self._guard(lambda: self.inner.log(numbers, step=step))

    def images(self, name: str, images: list[Image.Image]) -> None:
        if self.inner:
            import numpy as np

            self._guard(lambda: self.inner.log_images({name: [np.asarray(image) for image in images]}))

    def finish(self) -> None:
        """Close the tracker, but do not wait for a network that is gone: results on disk do not depend on it."""
        if not self.inner:
            return
        closing = threading.Thread(target=self._guard, args=(self.inner.finish,), daemon=True)
        closing.start()
        closing.join(CLOSING_SECONDS)
        if closing.is_alive():
            log.warning("the tracker is still sending after %g s and is left behind", CLOSING_SECONDS)
            self.inner = None

    def _guard(self, action: Callable[[], Any]) -> None:
        try:
            action()
        except (Exception, SystemExit) as error:  # a tracker that asks the program to end is not obeyed
            words = redacted(first_line(error))
            log.warning("tracking is off from here on: %s: %s", type(error).__name__, words)
            self.inner = None


class Stopwatch:
    """Seconds by phase; those of a phase inside another one are not counted in that one."""

    def __init__(self):
        self.phases: dict[str, float] = {}
        self._open: list[str] = []

    def __call__(self, phase: str) -> Stopwatch:
        self._next = phase
        return self

    def __enter__(self) -> None:
        self._lap()
        self._open.append(self._next)

    def __exit__(self, *_) -> None:
        self._lap()
        self._open.pop()

    def _lap(self) -> None:
        now = time.perf_counter()
        if self._open:
            self.phases[self._open[-1]] = round(self.phases.get(self._open[-1], 0.0) + now - self._began, 3)
        self._began = now


# ----------------------------------------------------------------------------------------------------------- provenance
#
# What a result was made with: versions and the command line, without the access tokens in it.

MASK = "[hidden]"
SECRET_NAME = re.compile(r"(?:TOKEN|API_?KEY|SECRET|PASSWORD|PASSWD)(?:_ACCESS)?(?:_KEY)?$", re.IGNORECASE)
SHORTEST = 8  # characters of a secret: shorter values would mask parts of ordinary words

_NAME = r"[\w.-]*(?:token|api[_-]?key|secret|password|passwd)"
_PATTERNS = (
    # name=value and "name: value" anywhere, "--name value" on a command line
    (re.compile(rf"((?:{_NAME}\s*[=:]|--{_NAME}\s)\s*['\"]?)[^\s'\"&;,]+", re.IGNORECASE), rf"\1{MASK}"),
    (re.compile(r"(\b(?:bearer|basic)\s+)[\w.~+/=-]+", re.IGNORECASE), rf"\1{MASK}"),
    (re.compile(r"(\b[a-z][a-z0-9+.-]*://)[^\s/@]+@", re.IGNORECASE), rf"\1{MASK}@"),
    (re.compile(r"\b(?:hf_|api_org_|ghp_|gho_|github_pat_|glpat-|sk-|xox[abp]-|wandb_v1_|AKIA)[\w-]{8,}"), MASK),
)


def redacted(text: str) -> str:
    """Return `text` with `[hidden]` in place of what looks like an access token, or is one of the environment's."""
    for secret in secrets(os.environ):
        text = text.replace(secret, MASK)
    for pattern, replacement in _PATTERNS:
        text = pattern.sub(replacement, text)
    return text


def secrets(environment: Mapping[str, str]) -> list[str]:
    """Return the values of variables with names of secrets, the longest first."""
    found = {value for name, value in environment.items() if SECRET_NAME.search(name) and len(value) >= SHORTEST}
    return sorted(found, key=lambda value: (-len(value), value))


def own_command() -> str:
    """Return the command line of this process, as it may be recorded."""
    return redacted(shlex.join(sys.argv))


def versions() -> dict[str, str]:
    """Return library → version, for summaries and run records."""
    modules = {"vqdm": vqdm, "torch": torch, "diffusers": diffusers, "transformers": transformers}
    return {"python": platform.python_version()} | {name: module.__version__ for name, module in modules.items()}
