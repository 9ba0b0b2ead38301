"""Checkpoints: `checkpoint-<step>` folders, and the best parameters so far.

A checkpoint has `parameters`, `optimizer`, `average`, `code_updates` and `random` as safetensors (no file for an empty
one) and `state.json` with the counters. The order of points follows from the seed: the step is the place in the data.

accelerate's `save_state` is not used: it writes pickles, not atomically, and not the codes and their drift.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vqdm.errors import RunError
from vqdm.storage.files import CorruptFileError, load_checked, load_checked_json, save_checked, save_checked_json

Tensors = dict[str, dict[str, Tensor]]
CPU = torch.device("cpu")


class Checkpoints:
    """The checkpoints and the best parameters in a folder.

    Args:
        limit: number of checkpoints kept.
        device: of the training; the state of its random generator is saved beside the CPU's.
    """

    def __init__(self, folder: Path, limit: int, device: torch.device = CPU):
        self.folder, self.limit, self.device = folder, limit, device

    def steps(self) -> list[int]:
        """Return the steps of all checkpoints, ascending."""
        names = [re.fullmatch(r"checkpoint-(\d+)", path.name) for path in self.folder.glob("checkpoint-*")]
        return sorted(int(name[1]) for name in names if name)

    def path(self, step: int) -> Path:
        return self.folder / f"checkpoint-{step}"

    def best_path(self, step: int) -> Path:
        return self.folder / "best" / f"step-{step}.safetensors"

    def save(self, step: int, tensors: Tensors, state: dict) -> None:
        """Write a checkpoint atomically, then delete the oldest, and best parameters that no checkpoint refers to."""
        beside = self.folder / "checkpoint-partial"
        shutil.rmtree(beside, ignore_errors=True)
        for name, part in (tensors | {"random": random_state(self.device)}).items():
            if part:
                save_checked(part, beside / f"{name}.safetensors")
        save_checked_json(state | {"step": step}, beside / "state.json")
        shutil.rmtree(self.path(step), ignore_errors=True)
        beside.replace(self.path(step))
        self._prune()

    def _prune(self) -> None:
        for step in self.steps()[: -self.limit]:
            shutil.rmtree(self.path(step))
        named = {self.load_state(step)["best"]["step"] for step in self.steps()}
        for file in (self.folder / "best").glob("step-*.safetensors"):
            if file not in map(self.best_path, named):
                file.unlink()

    def load_state(self, step: int) -> dict:
        """Return the JSON of a checkpoint. Raises RunError if it is missing or damaged."""
        return _intact(self.path(step) / "state.json", load_checked_json)

    def load(self, step: int) -> Tensors:
        """Return the tensors of a checkpoint, by file, and restore the random generators.

        Raises:
            RunError: a file is missing or damaged.
        """
        names = ("parameters", "optimizer", "average", "code_updates", "random")
        files = {name: self.path(step) / f"{name}.safetensors" for name in names}
        tensors = {name: _intact(file, load_checked)[0] if file.is_file() else {} for name, file in files.items()}
        set_random_state(tensors.pop("random"), self.device)
        return tensors

    def save_best(self, step: int, tensors: dict[str, Tensor]) -> None:
        """Write the best parameters, of step `step`, atomically."""
        save_checked(tensors, self.best_path(step))

    def load_best(self, step: int) -> dict[str, Tensor]:
        """Return the best parameters, of step `step`. Raises RunError if they are missing or damaged."""
        return _intact(self.best_path(step), load_checked)[0]

    def clear(self) -> None:
        """Delete all checkpoints and the best parameters."""
        for path in (*map(self.path, self.steps()), self.folder / "best", self.folder / "checkpoint-partial"):
            shutil.rmtree(path, ignore_errors=True)


def _intact(file: Path, read: Callable[[Path], Any]) -> Any:
    """Return `read(file)`. Raises RunError if the file is missing or damaged."""
    try:
        return read(file)
    except (OSError, CorruptFileError) as error:
        raise RunError(f"{file} is missing or damaged ({error}); delete {file.parent} and --resume") from None


def random_state(device: torch.device) -> dict[str, Tensor]:
    """Return the state of torch's generators of the CPU and of `device`, by device type."""
    held = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        held["cuda"] = torch.cuda.get_rng_state(device)
    return held


def set_random_state(held: dict[str, Tensor], device: torch.device) -> None:
    """Restore `random_state`."""
    if "cpu" in held:
        torch.set_rng_state(held["cpu"])
    if "cuda" in held and device.type == "cuda":
        torch.cuda.set_rng_state(held["cuda"], device)
