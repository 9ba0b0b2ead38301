"""The prompts and pictures that fine-tuning learns from, and those that it is only measured on."""

from __future__ import annotations

import hashlib
import random
from dataclasses import dataclass

from vqdm.errors import UserError
from vqdm.finetuning.config import FinetuneConfig
from vqdm.finetuning.points import drawn
from vqdm.finetuning.real_images import Captioned, captioned_pictures
from vqdm.prompts import choose, load_prompts
from vqdm.tracking import log_info


@dataclass(frozen=True)
class Material:
    """Prompts apart from each other, and pictures.

    Attributes:
        training: prompts whose trajectories are learned from.
        held_out: prompts of the same file that choose the step to keep.
        evaluation: prompts of another file that tell how good the result is; in none of the others.
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
    evaluation = load_prompts(config.evaluation_prompts, "EVALUATION_PROMPTS")
    count, source = config.evaluation_nsamples, config.evaluation_prompts
    evaluation = choose(evaluation, count, config.seed, source, "--evaluation_nsamples")
    every = load_prompts(config.calibration_prompts, "CALIBRATION_PROMPTS")
    usable = [prompt for prompt in every if prompt not in set(evaluation)]
    words = f"{config.calibration_prompts} holds {len(usable)} prompts"
    if len(usable) < len(every):
        words += f" beside {len(every) - len(usable)} that are evaluated on"
        log_info(f"{words}: only the former are trained on and held out")
    if config.held_out_nsamples >= len(usable):
        raise UserError(
            f"--held_out_nsamples is {config.held_out_nsamples}, but {words}, of which some must be left to learn from"
        )
    order = random.Random(f"{config.seed}:held out").sample(usable, len(usable))
    held_out = order[: config.held_out_nsamples]
    training = [prompt for prompt in order[config.held_out_nsamples :] if prompt not in set(held_out)]
    if config.finetune_nsamples > len(training):
        raise UserError(
            f"--finetune_nsamples is {config.finetune_nsamples}, but {words}, {len(training)} of them not held out"
        )
    pictures = captioned_pictures(config.real_images) if config.real_images else []
    return Material(training, held_out, evaluation, pictures, config.seed)
