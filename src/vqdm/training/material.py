"""The prompts and pictures that fine-tuning learns from, and those that it is only measured on."""

from __future__ import annotations

import hashlib
import random
from dataclasses import dataclass

from vqdm.errors import UserError
from vqdm.prompts import draw, load_prompts
from vqdm.training.config import FinetuneConfig
from vqdm.training.points import drawn
from vqdm.training.real import Captioned, captioned_pictures


@dataclass(frozen=True)
class Material:
    """Prompts apart from each other, and pictures.

    Attributes:
        training: prompts whose trajectories are learned from.
        held_out: prompts of the same file that tell which parameters are best.
        evaluation: prompts of another file that tell how good the result is.
        pictures: real ones with captions, where they are learned from.
    """

    training: list[str]
    held_out: list[str]
    evaluation: list[str]
    pictures: list[Captioned]
    seed: int

    def prompts(self, first: int, count: int) -> list[str]:
        """So many from a place in an endless row on: fresh ones until the file is through, then all anew."""
        return drawn(self.training, first, count, f"{self.seed}:prompts")

    def real(self, first: int, count: int) -> list[Captioned]:
        """The same of pictures."""
        return drawn(self.pictures, first, count, f"{self.seed}:pictures")

    @property
    def digest(self) -> str:
        """SHA-256 of all of it, pictures by name and caption."""
        lines = [*self.training, *self.held_out, *self.evaluation, *map(str, self.pictures)]
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def read_material(config: FinetuneConfig) -> Material:
    """Raises UserError where a file cannot be read or holds too few prompts or pictures, naming the flag."""
    every = load_prompts(config.calibration_prompts, "CALIBRATION_PROMPTS")
    if config.held_out_nsamples >= len(every):
        raise UserError(
            f"--held_out_nsamples is {config.held_out_nsamples}, but {config.calibration_prompts} holds {len(every)} "
            "prompts, of which some must be left to learn from"
        )
    order = random.Random(f"{config.seed}:held out").sample(every, len(every))
    held_out, training = order[: config.held_out_nsamples], order[config.held_out_nsamples :]
    if config.finetune_nsamples > len(training):
        raise UserError(
            f"--finetune_nsamples is {config.finetune_nsamples}, but {config.calibration_prompts} holds {len(training)}"
            f" prompts beside {len(held_out)} held-out ones"
        )
    evaluation = load_prompts(config.evaluation_prompts, "EVALUATION_PROMPTS")
    count, source = config.evaluation_nsamples, config.evaluation_prompts
    evaluation = draw(evaluation, count, config.seed, source, "--evaluation_nsamples")
    pictures = captioned_pictures(config.real_images) if config.real_images else []
    return Material(training, held_out, evaluation, pictures, config.seed)
