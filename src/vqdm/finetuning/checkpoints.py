"""What a stopped run goes on from: `checkpoint-<step>` folders of tensors and JSON, and the best parameters so far.

In a checkpoint: `parameters`, `optimizer`, `average`, `code_updates`, `random` as safetensors, those that hold any,
and `state.json` with the counters. Points are drawn from the seed and the step, so the step is the place in the data.
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
        limit: checkpoints that are kept.
        device: where training computes; the state of its random numbers is kept beside the CPU's.
    """

    def __init__(self, folder: Path, limit: int, device: torch.device = CPU):
        self.folder, self.limit, self.device = folder, limit, device

    def steps(self) -> list[int]:
        """Steps of the checkpoints that are there, ascending."""
        names = [re.fullmatch(r"checkpoint-(\d+)", path.name) for path in self.folder.glob("checkpoint-*")]
        return sorted(int(name[1]) for name in names if name)

    def path(self, step: int) -> Path:
        return self.folder / f"checkpoint-{step}"

    def best_path(self, step: int) -> Path:
        return self.folder / "best" / f"step-{step}.safetensors"

    def save(self, step: int, tensors: Tensors, state: dict) -> None:
        """Write a checkpoint whole or not at all, then drop the oldest, and best parameters that none names."""
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
        """The JSON of a checkpoint. Raises RunError when it is damaged."""
        return _intact(self.path(step) / "state.json", load_checked_json)

    def load(self, step: int) -> Tensors:
        """The tensors of a checkpoint, by file; the state of random numbers is put in place.

        Raises:
            RunError: a file is damaged.
        """
        names = ("parameters", "optimizer", "average", "code_updates", "random")
        files = {name: self.path(step) / f"{name}.safetensors" for name in names}
        tensors = {name: _intact(file, load_checked)[0] if file.is_file() else {} for name, file in files.items()}
        set_random_state(tensors.pop("random"), self.device)
        return tensors

    def save_best(self, step: int, tensors: dict[str, Tensor]) -> None:
        save_checked(tensors, self.best_path(step))

    def load_best(self, step: int) -> dict[str, Tensor]:
        """Raises RunError when they are not there, or damaged."""
        return _intact(self.best_path(step), load_checked)[0]

    def clear(self) -> None:
        """Delete all checkpoints and the best parameters."""
        for path in (*map(self.path, self.steps()), self.folder / "best", self.folder / "checkpoint-partial"):
            shutil.rmtree(path, ignore_errors=True)


def _intact(file: Path, read: Callable[[Path], Any]) -> Any:
    """What `read` makes of a file. Raises RunError when it is missing or damaged."""
    try:
        return read(file)
    except (OSError, CorruptFileError) as error:
        raise RunError(f"{file} is missing or damaged ({error}); delete {file.parent} and --resume") from None


def random_state(device: torch.device) -> dict[str, Tensor]:
    """The state of torch's generators, of the CPU and of `device`, by type of device."""
    held = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        held["cuda"] = torch.cuda.get_rng_state(device)
    return held


def set_random_state(held: dict[str, Tensor], device: torch.device) -> None:
    if "cpu" in held:
        torch.set_rng_state(held["cpu"])
    if "cuda" in held and device.type == "cuda":
        torch.cuda.set_rng_state(held["cuda"], device)
