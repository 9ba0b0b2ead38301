"""What a run tells while it runs: progress bars, JSON lines, and a live tracker that can never stop the job."""

from __future__ import annotations

import json
import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from PIL import Image
from tqdm import tqdm

from vqdm.documents import first_line
from vqdm.redaction import redacted

log = logging.getLogger("vqdm")
CLOSING_SECONDS = 120  # that a tracker has to send what is left


def progress_bar(items: Iterable | None = None, total: int | None = None, description: str = "") -> tqdm:
    """A progress bar with time left; silent where standard error is not a terminal."""
    return tqdm(items, total=total, desc=description, disable=None, leave=False, dynamic_ncols=True)


def log_info(line: str) -> None:
    """One line of the log, without breaking a bar."""
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
    """Seconds by phase."""

    def __init__(self):
        self.phases: dict[str, float] = {}

    def __call__(self, phase: str) -> Stopwatch:
        self._phase = phase
        return self

    def __enter__(self) -> None:
        self._began = time.perf_counter()

    def __exit__(self, *_) -> None:
        spent = time.perf_counter() - self._began
        self.phases[self._phase] = round(self.phases.get(self._phase, 0.0) + spent, 3)
