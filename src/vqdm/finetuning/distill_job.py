"""What the steps of a fine-tuning share."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from PIL import Image
from torch import nn

from vqdm.finetuning.config import FinetuneConfig
from vqdm.finetuning.data import Material
from vqdm.finetuning.step import Lesson
from vqdm.parallel import Ranks
from vqdm.storage.run_folder import RunFolder
from vqdm.tracking import Stopwatch, Tracker


@dataclass
class Distillation:
    """What the steps of one run share.

    Attributes:
        source: the quantized UNet's folder.
        types: of the student's parameters as they are stored.
        teacher_pictures: of the evaluation prompts; on the first process alone.
    """

    config: FinetuneConfig
    ranks: Ranks
    material: Material
    pipeline: DiffusionPipeline
    student: nn.Module
    source: Path
    types: dict[str, torch.dtype]
    folder: RunFolder
    tracker: Tracker
    clock: Stopwatch
    teacher_pictures: list[Image.Image]

    @property
    def teacher(self) -> nn.Module:
        return self.pipeline.unet

    @property
    def lesson(self) -> Lesson:
        return Lesson(self.student, self.teacher, self.teacher.dtype, self.config.local_batch_size, self.ranks)
