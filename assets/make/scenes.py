"""The world of the small pipeline: scenes of coloured shapes, their captions, and an anti-aliased renderer.

A scene is one or two objects on a background. `sample_scene` draws one, `caption` words it with synonyms, `render`
paints a batch of them with signed distance functions. `split_of` sends every scene to exactly one of four disjoint
splits, by a hash of what the caption *means*, so that no paraphrase of a test prompt is ever trained on.

Letters: B scenes, S pixels a side, y down, x right, both in [-1, 1].
"""

from __future__ import annotations

import hashlib
import math
import random
from dataclasses import dataclass, replace

import torch
from torch import Tensor

SHAPES = ("circle", "square", "triangle", "star", "cross", "heart")
COLOURS = {
    "red": (0.86, 0.10, 0.12),
    "orange": (0.98, 0.55, 0.08),
    "yellow": (0.97, 0.88, 0.15),
    "green": (0.13, 0.65, 0.22),
    "cyan": (0.15, 0.80, 0.85),
    "blue": (0.12, 0.25, 0.85),
    "purple": (0.50, 0.16, 0.65),
    "pink": (0.98, 0.55, 0.75),
}
FILLS = ("plain", "striped", "dotted")
SIZES = {"small": 0.27, "large": 0.41}
BACKGROUNDS = {"white": (0.96, 0.96, 0.96), "gray": (0.55, 0.55, 0.55), "black": (0.06, 0.06, 0.06)}
PLACES = {"center": (0.0, 0.0), "left": (-0.45, 0.0), "right": (0.45, 0.0), "top": (0.0, -0.45), "bottom": (0.0, 0.45)}
RELATIONS = {"left of": (-1, 0), "right of": (1, 0), "above": (0, -1), "below": (0, 1)}
SPLITS = ("training", "calibration", "evaluation", "test")

_INVERSE = {"right of": "left of", "below": "above"}
_SIZE_WORDS = {"small": ("small", "little"), "large": ("large", "big")}
_RELATION_WORDS = {
    "left of": ("left of", "to the left of"),
    "right of": ("right of", "to the right of"),
    "above": ("above", "over"),
    "below": ("below", "under"),
}
_PLACE_WORDS = {
    "center": ("in the center", "in the middle"),
    "left": ("on the left",),
    "right": ("on the right",),
    "top": ("at the top",),
    "bottom": ("at the bottom",),
}
_FILL_WORDS = {"plain": ("", "plain"), "striped": ("striped",), "dotted": ("dotted", "spotted")}
_LEADS = ("", "a picture of ", "a drawing of ")


@dataclass(frozen=True)
class Thing:
    """One object: words only, no pixels."""

    shape: str
    colour: str
    fill: str
    size: str


@dataclass(frozen=True)
class Scene:
    """One or two things; `layout` is a place for one thing, and a relation of the first to the second for two."""

    things: tuple[Thing, ...]
    layout: str
    background: str
    gradient: bool

    def canonical(self) -> Scene:
        """The same image with the left or upper thing named first."""
        if self.layout not in _INVERSE:
            return self
        return replace(self, things=self.things[::-1], layout=_INVERSE[self.layout])


def sample_scene(rng: random.Random, things: int | None = None) -> Scene:
    """A random scene of one or two things, of different colour or shape when there are two."""
    count = things or rng.choice((1, 2, 2))
    drawn = [_sample_thing(rng) for _ in range(count)]
    while count == 2 and (drawn[0].shape, drawn[0].colour) == (drawn[1].shape, drawn[1].colour):
        drawn[1] = _sample_thing(rng)
    layout = rng.choice(tuple(PLACES if count == 1 else RELATIONS))
    return Scene(tuple(drawn), layout, rng.choice(tuple(BACKGROUNDS)), rng.random() < 0.3)


def _sample_thing(rng: random.Random) -> Thing:
    return Thing(rng.choice(SHAPES), rng.choice(tuple(COLOURS)), rng.choice(FILLS), rng.choice(tuple(SIZES)))


def split_of(scene: Scene) -> str:
    """Which split a scene belongs to: 4 % each for calibration, evaluation and test, the rest for training."""
    bucket = int(hashlib.sha256(repr(scene.canonical()).encode()).hexdigest(), 16) % 100
    return SPLITS[1 + bucket // 4] if bucket < 12 else "training"


def sample_split(split: str, count: int, seed: int, things: int | None = None) -> list[Scene]:
    """`count` distinct scenes of one split."""
    rng, found = random.Random(f"{split}-{seed}"), {}
    while len(found) < count:
        scene = sample_scene(rng, things)
        if split_of(scene) == split:
            found.setdefault(scene.canonical(), scene)
    return list(found.values())


def caption(scene: Scene, rng: random.Random) -> str:
    """A sentence for the scene, synonyms drawn from `rng`."""
    background = f"{scene.background} gradient" if scene.gradient else scene.background
    ending = f"on a {background} {rng.choice(('background', 'backdrop'))}"
    first = _noun_phrase(scene.things[0], rng)
    if len(scene.things) == 1:
        body = f"{first} {rng.choice(_PLACE_WORDS[scene.layout])}"
    else:
        body = f"{first} {rng.choice(_RELATION_WORDS[scene.layout])} {_noun_phrase(scene.things[1], rng)}"
    return f"{rng.choice(_LEADS)}{body} {ending}"


def _noun_phrase(thing: Thing, rng: random.Random) -> str:
    words = [rng.choice(_SIZE_WORDS[thing.size]), rng.choice(_FILL_WORDS[thing.fill]), thing.colour, thing.shape]
    return "a " + " ".join(word for word in words if word)


# --------------------------------------------------------------------------------------------------- rendering


def render(scenes: list[Scene], generator: torch.Generator, size: int = 64) -> Tensor:
    """Paint scenes with small random jitters of pose and light.

    Returns float32 [B, 3, size, size] in [0, 1].
    """
    ticks = (torch.arange(size) + 0.5) * 2 / size - 1  # [S]
    y, x = torch.meshgrid(ticks, ticks, indexing="ij")  # [S, S]
    image = _background(scenes, y, generator)  # [B, 3, S, S]
    for index in range(2):
        holders = [b for b, scene in enumerate(scenes) if len(scene.things) > index]
        if holders:
            layer, cover = _paint([scenes[b] for b in holders], index, x, y, generator)
            image[holders] = image[holders] * (1 - cover) + layer * cover
    light = 0.95 + 0.1 * torch.rand(len(scenes), 1, 1, 1, generator=generator)
    return (image * light).clamp(0, 1)


def _background(scenes: list[Scene], y: Tensor, generator: torch.Generator) -> Tensor:
    base = torch.tensor([BACKGROUNDS[scene.background] for scene in scenes])[:, :, None, None]  # [B, 3, 1, 1]
    lean = torch.tensor([0.35 if scene.background == "black" else -0.35 for scene in scenes])
    lean = lean * torch.tensor([float(scene.gradient) for scene in scenes])
    return base + lean[:, None, None, None] * (y[None, None] + 1) / 2


def _paint(scenes, index, x, y, generator) -> tuple[Tensor, Tensor]:
    """Colour [B, 3, S, S] and coverage [B, 1, S, S] of the index-th thing of every scene."""
    things = [scene.things[index] for scene in scenes]
    jitter = torch.rand(len(scenes), 4, generator=generator) * 2 - 1  # [B, 4]
    centre = torch.tensor([_centre(scene, index) for scene in scenes]) + 0.06 * jitter[:, :2]
    radius = torch.tensor([SIZES[thing.size] for thing in things]) * (1 + 0.06 * jitter[:, 2])
    angle = math.radians(8) * jitter[:, 3]
    dx, dy = x[None] - centre[:, 0, None, None], y[None] - centre[:, 1, None, None]
    cos, sin = angle.cos()[:, None, None], angle.sin()[:, None, None]
    u, v = cos * dx + sin * dy, cos * dy - sin * dx  # [B, S, S], in the thing's own frame
    pixel = 2 / x.shape[0]
    distance = _distance(things, u, v, radius[:, None, None])
    return _fill(things, u, v, distance, pixel), (0.5 - distance / pixel).clamp(0, 1)[:, None]


def _centre(scene: Scene, index: int) -> tuple[float, float]:
    if len(scene.things) == 1:
        return PLACES[scene.layout]
    sign = 0.47 if index == 0 else -0.47
    dx, dy = RELATIONS[scene.layout]
    return (sign * dx, sign * dy)


def _fill(things: list[Thing], u: Tensor, v: Tensor, distance: Tensor, pixel: float) -> Tensor:
    """[B, 3, S, S]: dark stripes, or white dots that stay clear of the outline, over the plain colour."""
    plain = torch.tensor([COLOURS[thing.colour] for thing in things])[:, :, None, None]
    wave = (torch.cos(u * (2 * math.pi / 0.22)) * 0.22 / (2 * math.pi * pixel) + 0.5).clamp(0, 1)[:, None]
    du, dv = (u + 0.125) % 0.25 - 0.125, (v + 0.125) % 0.25 - 0.125
    dot = (0.5 - torch.maximum(torch.hypot(du, dv) - 0.065, distance + 0.06) / pixel).clamp(0, 1)[:, None]
    striped, dotted = plain * (1 - 0.6 * wave), plain * (1 - dot) + dot
    kind = torch.tensor([FILLS.index(thing.fill) for thing in things])[:, None, None, None]
    return torch.where(kind == 1, striped, torch.where(kind == 2, dotted, plain.expand_as(dotted)))


def _distance(things: list[Thing], u: Tensor, v: Tensor, r: Tensor) -> Tensor:
    """Signed distance [B, S, S] to every thing's outline, negative inside."""
    kind = [SHAPES.index(thing.shape) for thing in things]
    out = torch.empty_like(u)
    for index, distance in enumerate((_circle, _square, _triangle, _star, _cross, _heart)):
        rows = [b for b, k in enumerate(kind) if k == index]
        if rows:
            out[rows] = distance(u[rows], v[rows], r[rows])
    return out


def _circle(u, v, r):
    return torch.hypot(u, v) - 0.95 * r


def _square(u, v, r):
    return torch.maximum(u.abs(), v.abs()) - 0.84 * r


def _triangle(u, v, r):
    v = v - 0.2 * r
    slanted = u.abs() * (math.sqrt(3) / 2) - v * 0.5
    return torch.maximum(slanted - 0.58 * r, v - 0.58 * r)


def _star(u, v, r):
    """Five points up: fold the plane five times, then the distance to one slanted edge."""
    fold = 2 * math.pi / 5
    theta = torch.atan2(u, -v)
    theta = (theta + fold / 2) % fold - fold / 2
    rho = torch.hypot(u, v)
    a, b = rho * theta.cos(), (rho * theta.sin()).abs()
    tip, notch = 1.12 * r, 0.48 * r
    edge_a, edge_b = notch * math.cos(fold / 2) - tip, notch * math.sin(fold / 2)
    return ((a - tip) * edge_b - b * edge_a) / torch.hypot(edge_a, edge_b)


def _cross(u, v, r):
    arm, width = 0.98 * r, 0.33 * r
    upright = torch.maximum(u.abs() - width, v.abs() - arm)
    return torch.minimum(upright, torch.maximum(u.abs() - arm, v.abs() - width))


def _heart(u, v, r):
    """Two discs over a diamond's lower half."""
    u, v = u.abs() / r, (v / r - 0.08)
    disc = torch.hypot(u - 0.45, v + 0.38) - 0.52
    wedge = torch.maximum((u + v - 0.87) / math.sqrt(2), -0.38 - v)
    wedge = torch.maximum(wedge, u + v * 0.4 - 0.9)
    return torch.minimum(disc, wedge) * r
