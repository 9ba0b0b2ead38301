"""Plan a quantization before it starts: layers, bits, bytes; and format a line per layer while it runs."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import groupby

import torch
from torch import nn

from vqdm.diffusion.blocks import Layer
from vqdm.diffusion.hessians import passes
from vqdm.diffusion.sampling import unet_dtype
from vqdm.errors import UserError


def shared_codebook_users(layers: list[Layer]) -> dict[str, list[Layer]]:
    """Return by name of shared codebooks the layers that use them, in their order."""
    found: dict[str, list[Layer]] = {}
    for layer in layers:
        if layer.spec.shared_codebooks:
            found.setdefault(layer.spec.shared_codebooks, []).append(layer)
    return found


def shared_codebook_bits(layers: list[Layer]) -> int:
    """Return the bits of all shared codebooks of the layers."""
    return sum(16 * torch.Size(of[0].spec.codebooks_shape).numel() for of in shared_codebook_users(layers).values())


def layer_bits(layer: Layer) -> int:
    """Return the bits that a layer will take, without its bias."""
    shapes = layer.spec.tensor_shapes(layer.rows, layer.columns).values()
    return sum(8 * dtype.itemsize * torch.Size(shape).numel() for shape, dtype in shapes)


@dataclass(frozen=True)
class Rest:
    """The layers that become int8: how many, their weights, and the bits of these."""

    layers: int = 0
    weights: int = 0
    bits: int = 0

    @classmethod
    def of(cls, unet: nn.Module, names: list[str]) -> Rest:
        weights = [unet.get_submodule(name).weight for name in names]
        sizes = [weight.numel() for weight in weights]
        return cls(len(names), sum(sizes), 8 * sum(sizes) + 16 * sum(map(len, weights)))


def plain_bits(unet: nn.Module, stored: torch.dtype | None) -> int:
    """Return the bits of a value that stays plain: of the type computed in, or of a narrower one of its files."""
    computed = unet_dtype(unet).itemsize
    return 8 * (min(computed, stored.itemsize) if stored else computed)


def layer_table(layers: list[Layer], parameters: int, rest: Rest, plain: int) -> str:
    """Format one line per layer: shape, code and stored bits per weight; then the totals and the predicted size.

    Args:
        parameters: number of those of the whole UNet.
        rest: what becomes int8.
        plain: bits of every other value.
    """
    width = max(len(layer.name) for layer in layers)
    lines = [f"{'layer':{width}}  kind    rows × columns    code      stored bits per weight"]
    for layer in layers:
        spec, weights = layer.spec, layer.rows * layer.columns
        code = f"{spec.num_codebooks}x{spec.nbits_per_codebook} g{spec.in_group_size}"
        if spec.is_trellis:
            code = f"trellis {spec.nbits_per_codebook}"
        shape = f"{layer.rows:5d} × {layer.columns:<7d}"
        lines.append(f"{layer.name:{width}}  {layer.kind:6s} {shape}  {code:10s} {layer_bits(layer) / weights:6.3f}")
    if rest.layers:
        each = rest.bits / rest.weights
        lines.append(f"{rest.layers} other layers, {rest.weights / 1e6:.2f} M weights: {each:.3f} bits each")
    lines.append(totals(layers, parameters, rest, plain, sum(map(layer_bits, layers)) + shared_codebook_bits(layers)))
    return "\n".join(lines)


def totals(layers: list[Layer], parameters: int, rest: Rest, plain: int, bits: float) -> str:
    """Format the last line of the table, for layers that take `bits` together; also before bits are allocated."""
    weights = sum(layer.rows * layer.columns for layer in layers)
    whole = bits + rest.bits + plain * (parameters - weights - rest.weights)
    return (
        f"{len(layers)} layers, {weights / 1e6:.2f} M of {parameters / 1e6:.2f} M parameters: "
        f"{bits / weights:.3f} stored bits per weight, {whole / parameters:.3f} over the whole UNet, "
        f"about {whole / 8e6:.2f} MB instead of {parameters / 5e5:.2f} MB in 16 bit"
    )


def layer_line(row: dict) -> str:
    """Format the log line of a quantized layer, from its row of the table."""
    held_out = "" if row.get("held_out_error") is None else f" (held-out {row['held_out_error']:.5f})"
    gap = "" if row["gap_db"] is None else f", {row['gap_db']:.1f} dB above the bound"
    bits, seconds = row["bits_per_weight"], row["seconds"]
    return f"{row['name']}: relative error {row['error']:.5f}{held_out}, {bits:.3f} bits{gap}, {seconds:.1f} s"


def blocks_before_finetuning(count: int, blocks: int) -> list[int]:
    """Return after how many blocks each of `count` fine-tunings takes place: evenly spread, none after the last block.

    Raises:
        UserError: there are not as many places between `blocks` blocks.
    """
    if count >= max(1, blocks):
        raise UserError(
            f"--num_intermediate_finetunes is {count}; between {blocks} blocks allowed are 0 to {blocks - 1}"
        )
    return [round(k * blocks / (count + 1)) for k in range(1, count + 1)]


def hessian_bytes(groups: list[list[Layer]], memory_gb: float, all_kept: bool) -> int:
    """Return the bytes of disk for Hessians: a training and a held-out triangle in float32 per shared input.

    Args:
        groups: layers that share an input.
        memory_gb: for the Hessians of one recording pass.
        all_kept: whether those of all layers are kept, and not only those of one pass.
    """
    parts = [groups]
    if not all_kept:
        by_block = [list(some) for _, some in groupby(groups, key=lambda group: group[0].block)]
        parts = [part for some in by_block for part in passes(some, memory_gb)]
    return max(sum(2 * 4 * group[0].columns * (group[0].columns + 1) // 2 for group in part) for part in parts)
