"""What a quantization will do and take, before it starts; and a line for each layer while it runs."""

from __future__ import annotations

import torch
from diffusers import DiffusionPipeline
from torch import nn

from vqdm.diffusion.blocks import Layer


def layer_bits(layer: Layer) -> int:
    """Bits that a layer will take, biases aside."""
    shapes = layer.spec.tensor_shapes(layer.rows, layer.columns).values()
    return sum(8 * dtype.itemsize * torch.Size(shape).numel() for shape, dtype in shapes)


def rounded_bits(rest: list[nn.Linear | nn.Conv2d]) -> int:
    """Bits that layers take in 8 bit, biases aside."""
    return sum(8 * layer.weight.numel() + 16 * len(layer.weight) for layer in rest)


def layer_table(layers: list[Layer], parameters: int, rest: list[nn.Linear | nn.Conv2d]) -> str:
    """A line a layer: shape, code and stored bits a weight; then the totals and the predicted size.

    Args:
        parameters: of the whole UNet.
        rest: the plain layers that go into 8 bit.
    """
    width = max(len(layer.name) for layer in layers)
    lines = [f"{'layer':{width}}  kind    rows × columns    code    stored bits a weight"]
    for layer in layers:
        spec, weights = layer.spec, layer.rows * layer.columns
        code = f"{spec.num_codebooks}x{spec.nbits_per_codebook} g{spec.in_group_size}"
        shape = f"{layer.rows:5d} × {layer.columns:<7d}"
        lines.append(f"{layer.name:{width}}  {layer.kind:6s} {shape}  {code:8s} {layer_bits(layer) / weights:6.3f}")
    weights = sum(layer.rows * layer.columns for layer in layers)
    bits = sum(layer_bits(layer) for layer in layers)
    others = sum(layer.weight.numel() for layer in rest)
    whole = bits + rounded_bits(rest) + 16 * (parameters - weights - others)
    if rest:
        lines.append(
            f"{len(rest)} other layers, {others / 1e6:.2f} M weights: {rounded_bits(rest) / others:.3f} bits each"
        )
    lines.append(
        f"{len(layers)} layers, {weights / 1e6:.2f} M of {parameters / 1e6:.2f} M parameters: "
        f"{bits / weights:.3f} stored bits a weight, {whole / parameters:.3f} over the whole UNet, "
        f"about {whole / 8e6:.2f} MB instead of {parameters / 5e5:.2f} MB in 16 bit"
    )
    return "\n".join(lines)


def layer_line(row: dict) -> str:
    unseen = "" if row.get("held_out_error") is None else f" (unseen {row['held_out_error']:.5f})"
    gap = "" if row["gap_db"] is None else f", {row['gap_db']:.1f} dB above the bound"
    bits, seconds = row["bits_per_weight"], row["seconds"]
    return f"{row['name']}: relative error {row['error']:.5f}{unseen}, {bits:.3f} bits{gap}, {seconds:.1f} s"


def predicted_bytes(pipeline: DiffusionPipeline, steps: int | None, calibration: int, evaluation: int) -> int:
    """Disk that a run on so many prompts needs: recorded points, and the pipeline twice."""
    parts = [part for part in pipeline.components.values() if isinstance(part, torch.nn.Module)]
    pipeline_bytes = sum(tensor.element_size() * tensor.numel() for part in parts for tensor in part.parameters())
    latents = pipeline.unet.config.in_channels * pipeline.unet.config.sample_size**2 * 4
    return 2 * pipeline_bytes + latents * (steps or 50) * (calibration + 3 * evaluation)
