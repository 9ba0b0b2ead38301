"""The judge: a small classifier, trained on renders, that says what a 64×64 image of the shapes world shows.

`assets/make/train_judge.py` trains it. It reads the fields of `train_text.labels_of`, so `assets/make` has to be on
the import path. Things stand in canonical order: the left or upper one first; index 0 means that a thing is absent.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from scenes import Scene
from train_text import FIELDS, THING_FIELDS, labels_of

WEIGHTS = Path(__file__).with_name("judge.safetensors")
_PLACES = ("first", "second")
NAMES = (*(f"{place}_{field}" for place in _PLACES for field in THING_FIELDS), "layout", "background", "gradient")
SINGLE = ("first_shape", "first_colour", "second_shape")
PAIR = ("first_shape", "first_colour", "second_shape", "second_colour", "layout")


def build() -> nn.Sequential:
    """The untrained network: [B, 3, 64, 64] in [0, 1] to [B, sum(FIELDS)] logits."""
    return nn.Sequential(
        *_convolution(3, 32, kernel=5, stride=2),
        *_convolution(32, 48, kernel=3, stride=2),
        *_convolution(48, 64, kernel=3, stride=1),
        *_convolution(64, 96, kernel=3, stride=2),
        *_convolution(96, 128, kernel=3, stride=1),
        *_convolution(128, 128, kernel=3, stride=2),
        nn.Flatten(),  # [B, 128 * 4 * 4]
        nn.Dropout(0.1),
        nn.Linear(128 * 16, sum(FIELDS)),
    )


def _convolution(inputs: int, outputs: int, kernel: int, stride: int) -> tuple[nn.Module, ...]:
    convolution = nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, bias=False)
    return convolution, nn.BatchNorm2d(outputs), nn.ReLU()


@cache
def load(path: Path = WEIGHTS, device: str = "cpu") -> nn.Sequential:
    """The trained network in float32 evaluation mode."""
    model = build()
    model.load_state_dict(load_file(path))
    return model.eval().requires_grad_(False).to(device)


@torch.no_grad()
def judge(images: Tensor, model: nn.Module | None = None) -> dict[str, Tensor]:
    """Class indices, int64 [B] a field of NAMES, of float images [B, 3, 64, 64] in [0, 1]."""
    logits = (model or load(device=str(images.device)))(images.float())
    parts = logits.split(FIELDS, dim=-1)
    return {name: part.argmax(-1) for name, part in zip(NAMES, parts, strict=True)}


def single_right(images: Tensor, scenes: list[Scene]) -> Tensor:
    """bool [B]: exactly one thing is seen, and its shape and colour are those of the one-thing scene."""
    return _all_right(images, scenes, SINGLE)


def pair_right(images: Tensor, scenes: list[Scene]) -> Tensor:
    """bool [B]: both shapes, both colours and the relation are those of the two-thing scene."""
    return _all_right(images, scenes, PAIR)


def _all_right(images: Tensor, scenes: list[Scene], names: tuple[str, ...]) -> Tensor:
    wanted = torch.tensor([labels_of(scene) for scene in scenes], device=images.device)  # [B, 11]
    seen = judge(images)
    return torch.stack([seen[name] == wanted[:, NAMES.index(name)] for name in names]).all(0)
