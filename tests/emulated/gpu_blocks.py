"""A fine-tuning block by block on an emulated GPU, watched: how many blocks of a model are there at once."""

from __future__ import annotations

import importlib

from vqdm.diffusion.streams import BlockWalk
from vqdm.finetuning.trainer import Trainer


def main(words: list[str]) -> None:
    """Run a program, its name first. Raises AssertionError where more than one block of a model is on the GPU."""
    found, trained = [], []
    run, step = BlockWalk.run, Trainer.step

    def watched_run(walk, *args, **kwargs):
        returned = run(walk, *args, **kwargs)
        blocks = [walk.denoiser.get_submodule(name) for name in walk.names]
        found.append(sum(next(one.parameters()).device.type == "cuda" for one in blocks))
        return returned

    def watched_step(trainer, *args):
        trained.append({one.device.type for one in trainer.trained})
        return step(trainer, *args)

    BlockWalk.run, Trainer.step = watched_run, watched_step
    importlib.import_module(words[0]).main([str(word) for word in words[1:]])
    assert set(found) == {1}, f"numbers of blocks on the GPU are {set(found)}"
    assert trained and all(kinds == {"cuda"} for kinds in trained)
