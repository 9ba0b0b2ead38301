"""A program on an emulated GPU, watched: the bytes of its tensors on the CPU, beside those that were planned."""

from __future__ import annotations

import gc
import importlib
import json
import warnings
from pathlib import Path

import torch

from vqdm.devices import PROGRAM
from vqdm.diffusion.streams import BlockWalk
from vqdm.finetuning.trainer import Trainer

SHARE = 0.1  # of the plan, by which what is counted may differ


def mapped_files() -> list[range]:
    """The addresses at which files of weights are mapped."""
    lines = [line.split(maxsplit=5) for line in Path("/proc/self/maps").read_text().splitlines()]
    ends = [one[0].split("-") for one in lines if one[-1].endswith(".safetensors")]
    return [range(int(first, 16), int(last, 16)) for first, last in ends]


def bytes_in_ram() -> int:
    """The bytes of all tensors of the process that are on the CPU, but those that are mapped from files."""
    files, found = mapped_files(), {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what modules give up when they are looked at
        tensors = [one for one in gc.get_objects() if isinstance(one, torch.Tensor)]
    for one in tensors:
        if one.device.type == "cpu" and one.layout == torch.strided:
            storage = one.untyped_storage()
            found[storage.data_ptr()] = storage.nbytes()
    return sum(size for start, size in found.items() if not any(start in file for file in files))


def main(words: list[str]) -> None:
    """Run a program, its name first. Raises AssertionError where tensors take another size than the plan's."""
    reached, run, step = [], BlockWalk.run, Trainer.step
    before = bytes_in_ram()

    def watched_run(walk, *args, **kwargs):
        returned = run(walk, *args, **kwargs)
        reached.append(bytes_in_ram() - before)
        return returned

    def watched_step(trainer, *args):
        reached.append(bytes_in_ram() - before)
        return step(trainer, *args)

    BlockWalk.run, Trainer.step = watched_run, watched_step
    importlib.import_module(words[0]).main([str(word) for word in words[1:]])
    out = Path(words[words.index("--output_dir") + 1])
    phases = json.loads((out / "summary.json").read_text())["peak_memory_bytes_by_phase"]
    planned = max(phases[name]["planned"]["ram"] for name in ("training", "hessians") if name in phases) - PROGRAM
    print(f"in RAM: {max(reached)} bytes of {len(reached)}, planned {planned}")
    assert abs(max(reached) - planned) < SHARE * planned, f"{max(reached)} bytes in RAM, planned {planned}"
