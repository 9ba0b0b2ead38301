"""Settings of generation."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import partial

from vqdm.config import PROMPT_FILE, RunConfig, argument, flag, output_dir
from vqdm.errors import UserError
from vqdm.generation.requests import check_size
from vqdm.images import LAYOUTS

_images = partial(flag, group="images")
_work = partial(flag, group="batches, memory, parallel runs")


@dataclass(frozen=True, kw_only=True)
class GenerateConfig(RunConfig):
    """Settings of `generation.job`. Text such as "1/4" for `shard` becomes (1, 4): prompts 1, 5, 9, ... of 0, 1, 2, ...

    Raises:
        UserError: a value that is not allowed, or settings that contradict each other, naming the flags.
    """

    quantized: str | None = flag(None, "quantized pipeline folder, or its denoiser's folder", positional=True)
    prompts: str = argument(PROMPT_FILE)
    output_dir: str = output_dir("out/images")
    num_samples_per_prompt: int = _images(1, "images per prompt", ge=1, le=100, common=True)
    negative_prompt: str | None = _images(None, "for all prompts without their own", common=True)
    teacher: bool = _images(False, "require full precision; an error with QUANTIZED")
    layout: str = _images(
        "flat", "flat: 000000_00.png; geneval, dpg: as these benchmarks read them", choices=tuple(LAYOUTS)
    )
    bs: int = _work(8, "batch size; halved on out of memory", ge=1, common=True, aliases=("batch_size",))
    limit: int = _work(0, "only the first N prompts; 0 = all", ge=0, common=True)
    shard: tuple[int, int] | str = _work("0/1", "every N-th prompt from the I-th, counted from 0", metavar="I/N")
    compile: bool = _work(False, "torch.compile the denoiser")
    offload: str = _work(
        "none",
        "keep weights off the GPU until they are needed: whole components, or layer by layer",
        choices=("none", "model", "sequential"),
        common=True,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.shard, str):  # frozen for everyone else
            object.__setattr__(self, "shard", _parse_shard(self.shard))
        if self.teacher and self.quantized is not None:
            raise UserError(
                f"--teacher is full precision, but QUANTIZED {self.quantized} is given; leave one of them out"
            )
        if self.compile and self.offload == "sequential":
            raise UserError("--compile does not go with --offload sequential; allowed are none and model")
        for name in ("height", "width"):
            value = getattr(self.sampling, name)
            if value is not None:
                check_size(value, f"--{name}")


def _parse_shard(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    if not match or int(match[1]) >= int(match[2]):
        raise UserError(f"--shard {text!r} is not I/N with I from 0 to N-1")
    return int(match[1]), int(match[2])
