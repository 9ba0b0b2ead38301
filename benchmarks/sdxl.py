"""The UNet of Stable Diffusion XL without its weights: shapes of its layers, and what all of them would take."""

from __future__ import annotations

from itertools import combinations

import torch
from accelerate import init_empty_weights
from diffusers import UNet2DConditionModel

from vqdm.additive.code import CodeSpec
from vqdm.diffusion.blocks import Layer, select_layers

CONFIG = dict(
    sample_size=128,
    block_out_channels=(320, 640, 1280),
    down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    transformer_layers_per_block=(1, 2, 10),
    attention_head_dim=(5, 10, 20),
    cross_attention_dim=2048,
    use_linear_projection=True,
    addition_embed_type="text_time",
    addition_time_embed_dim=256,
    projection_class_embeddings_input_dim=2816,
)


def sdxl_layers() -> list[Layer]:
    """The 771 layers that are quantized by default."""
    with init_empty_weights():
        unet = UNet2DConditionModel(**CONFIG)
    return select_layers(unet, "default", 0, CodeSpec(1, 8, 4), {})


def fitted(measured: list[tuple[int, int, float]]) -> torch.Tensor:
    """(a, b, c) of seconds = a·O·I + b·O·I² + c·I³, for scores, products with H and factorizations, none negative.

    `measured` are (rows O, columns I, seconds); relative errors count.
    """
    A = torch.tensor([_terms(rows, columns) for rows, columns, _ in measured], dtype=torch.float64)
    seconds = torch.tensor([seconds for *_, seconds in measured], dtype=torch.float64)
    best, least = torch.zeros(3, dtype=torch.float64), torch.inf
    for kept in (subset for size in (1, 2, 3) for subset in combinations(range(3), size)):
        found = torch.zeros(3, dtype=torch.float64)
        scaled = A[:, kept] / seconds[:, None]  # relative errors count
        found[list(kept)] = torch.linalg.lstsq(scaled, torch.ones_like(seconds)[:, None]).solution[:, 0]
        error = ((A @ found) / seconds - 1).square().sum().item()
        if (found >= 0).all() and error < least:
            best, least = found, error
    return best


def predicted(rows: int, columns: int, coefficients: torch.Tensor) -> float:
    """Seconds of one layer by `fitted`."""
    return (torch.tensor(_terms(rows, columns), dtype=torch.float64) @ coefficients).item()


def extrapolate(measured: list[tuple[int, int, float]]) -> dict[str, float]:
    """Seconds of all layers, one after another, from (rows O, columns I, seconds) of some."""
    coefficients, layers = fitted(measured), sdxl_layers()
    misfits = [predicted(rows, columns, coefficients) / seconds - 1 for rows, columns, seconds in measured]
    return {
        "layers": len(layers),
        "seconds": sum(predicted(layer.rows, layer.columns, coefficients) for layer in layers),
        "worst_relative_misfit": max(map(abs, misfits)),
    }


def _terms(O: int, I: int) -> list[float]:  # noqa: E741
    return [O * I / 1e6, O * I**2 / 1e9, I**3 / 1e9]
