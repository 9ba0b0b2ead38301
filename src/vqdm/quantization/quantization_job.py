"""What the steps of a quantization share."""

from __future__ import annotations

import shlex
import subprocess
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path

import torch
from diffusers import DiffusionPipeline

from vqdm.additive.code import SharedCodebooks
from vqdm.diffusion.blocks import Layer
from vqdm.parallel import Ranks
from vqdm.quantization.config import QuantizeConfig
from vqdm.quantization.plan import Rest
from vqdm.redaction import redacted
from vqdm.storage.hessian_store import HessianStore
from vqdm.storage.run_folder import RunFolder
from vqdm.tracking import Stopwatch, Tracker, log_info


@dataclass
class Job:
    """What the steps of one run share.

    Attributes:
        parameters: of the whole UNet.
        rest: what goes into 8 bit.
        stored: types of the model's components in their files.
        store: Hessians of the full-precision model, where the run keeps them.
        banks: shared codebooks by name.
        bank_memory_gb: of Hessians of the layers that shared codebooks are trained on, as the run was started with.
        ranks: the processes that work on it, each of which has this same job.
        finetune_blocks: as `quantize` takes it.
    """

    config: QuantizeConfig
    pipeline: DiffusionPipeline
    layers: list[Layer]
    calibration: list[str]
    evaluation: list[str]
    folder: RunFolder
    tracker: Tracker
    clock: Stopwatch
    parameters: int
    rest: Rest
    store: HessianStore | None = None
    banks: dict[str, SharedCodebooks] = field(default_factory=dict)
    bank_memory_gb: float = 8.0
    ranks: Ranks = field(default_factory=Ranks)
    stored: dict[str, torch.dtype] = field(default_factory=dict)
    finetune_blocks: Callable | None = None

    @property
    def unet(self) -> torch.nn.Module:
        return self.pipeline.unet

    @property
    def blocks(self) -> list[tuple[str, list[Layer]]]:
        return [(block, list(layers)) for block, layers in groupby(self.layers, key=lambda layer: layer.block)]


def on_save(command: str | None, path: Path) -> None:
    """Run the user's command, without a shell, `{path}` replaced by what was saved; a failure is only told."""
    if command is None:
        return
    words = [word.replace("{path}", str(path)) for word in shlex.split(command)]
    try:
        subprocess.run(words, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        log_info(redacted(f"--on_save failed: {error}"))
