"""Select the layers of a denoiser to quantize, in the order of the data.

Blocks are in the order of the data: the stem, those of `denoisers.block_names`, the head; layers inside a block in the
order of the module tree (VQDM, arXiv 2409.00492, §4: each block is calibrated after the ones before it).

Letters: O outputs, I = kh·kw·C inputs of the layer seen as a matrix.
"""

from __future__ import annotations

import re

import torch
from torch import Tensor, nn

from vqdm.additive.code import CodeSpec
from vqdm.diffusion.denoisers import EDGES, block_names, block_of, family_of, in_float32
from vqdm.errors import UserError
from vqdm.layers.quantized import Layer

PRESETS = ("default", "all", "linear_only", "conv_only")


def matrix_of(layer: nn.Linear | nn.Conv2d, group_channels: bool) -> Tensor:
    """Return the weight as a matrix [O, I]; a convolution's columns run taps outermost when `group_channels`."""
    weight = layer.weight.detach()
    if weight.dim() == 4 and group_channels:
        weight = weight.permute(0, 2, 3, 1)  # [O, C, kh, kw] → [O, kh, kw, C]
    return weight.reshape(weight.shape[0], -1)


def weight_of(matrix: Tensor, shape: torch.Size, group_channels: bool) -> Tensor:
    """Invert `matrix_of`: return the weight of `shape` with the matrix `matrix` [O, I]."""
    if len(shape) == 4 and group_channels:
        O, C, kh, kw = shape  # noqa: E741
        return matrix.view(O, kh, kw, C).permute(0, 3, 1, 2)  # [O, I] → [O, C, kh, kw]
    return matrix.view(shape)


def select_layers(
    denoiser: nn.Module,
    layer_filter: str,
    min_channels: int,
    spec: CodeSpec,
    overrides: dict[str, dict | None],
    overridden_spec: CodeSpec | None = None,
) -> list[Layer]:
    """Select the layers to quantize, in order.

    Args:
        layer_filter: a preset ("default" is VQDM's set of a UNet, and every Linear and ungrouped Conv2d inside the
            blocks of another denoiser; "linear_only" and "conv_only" are its halves; "all" is every Linear and Conv2d
            inside the blocks) or a regular expression, searched for in the name as VQDM does.
        min_channels: layers with fewer input or output channels are left alone.
        overrides: full-match pattern → settings that replace those of `overridden_spec` (`spec` where it is None), or
            None to leave the layer alone; the first pattern that matches counts.

    Raises:
        UserError: nothing matches, an override matches nothing, or a layer does not divide into groups.
    """
    every = [name for name, module in _plain_layers(denoiser) if _least_channels(module) >= min_channels]
    if layer_filter in PRESETS:
        preset = _in_preset(denoiser, layer_filter)
        names = [name for name in every if name in preset]
    else:
        pattern = _compiled(layer_filter)
        names = [name for name in every if pattern.search(name)]
    names = _in_block_order(denoiser, names)
    if not names:
        known = ", ".join(name for name, _ in _plain_layers(denoiser)[:3])
        raise UserError(f"--layer_filter {layer_filter} matches no layer of the denoiser (its names look like {known})")
    _check_overrides_used(names, overrides)
    chosen = [(name, _spec_for(name, spec, overrides, overridden_spec or spec)) for name in names]
    layers = [_describe(denoiser, name, layer_spec) for name, layer_spec in chosen if layer_spec is not None]
    if not layers:
        raise UserError("--overrides leaves no layer to quantize")
    return layers


def unquantized_layers(denoiser: nn.Module, quantized: list[Layer]) -> list[str]:
    """Return the names of every other Linear and Conv2d that may become int8, in module order.

    Not those that take or give the latents, nor those that diffusers keeps in float32. In VQDM's default set of a UNet
    these are the time and size embeddings and the `time_emb_proj` of every resnet.
    """
    taken = {layer.name for layer in quantized}
    names = [name for name, _ in _plain_layers(denoiser) if name not in taken and not in_float32(denoiser, name)]
    return [name for name in names if not (EDGES.fullmatch(name) and _outside(denoiser, name))]


def _outside(denoiser: nn.Module, name: str) -> bool:
    return block_of(denoiser, name) in ("stem", "head")


def _plain_layers(denoiser: nn.Module) -> list[tuple[str, nn.Module]]:
    return [(name, module) for name, module in denoiser.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)]


def _in_preset(denoiser: nn.Module, preset: str) -> set[str]:
    """Return the names of the layers of a preset; of convolutions in groups, only "all" has those."""
    patterns, blocks = family_of(denoiser).layers, tuple(f"{block}." for block in block_names(denoiser))
    inside = {name: module for name, module in _plain_layers(denoiser) if name.startswith(blocks)}
    if preset == "all":
        return set(inside)
    if patterns:
        inside = {name: one for name, one in inside.items() if any(re.fullmatch(some, name) for some in patterns)}
    else:
        whole = {name: one for name, one in inside.items() if getattr(one, "groups", 1) == 1}
        inside = {name: one for name, one in whole.items() if not in_float32(denoiser, name)}
    kind = {"linear_only": nn.Linear, "conv_only": nn.Conv2d}.get(preset, nn.Module)
    return {name for name, one in inside.items() if isinstance(one, kind)}


def _least_channels(module: nn.Module) -> int:
    if isinstance(module, nn.Linear):
        return min(module.in_features, module.out_features)
    return min(module.in_channels, module.out_channels)


def _compiled(pattern: str) -> re.Pattern:
    try:
        return re.compile(pattern)
    except re.error as error:
        raise UserError(f"--layer_filter {pattern} is not a regular expression: {error}") from None


def _in_block_order(denoiser: nn.Module, names: list[str]) -> list[str]:
    """Stem, blocks, head; the module tree's order inside each (UNets register `mid_block` after `up_blocks`)."""
    place = {block: index for index, block in enumerate(["stem", *block_names(denoiser), "head"])}
    return sorted(names, key=lambda name: place[block_of(denoiser, name)])


def _spec_for(
    name: str, spec: CodeSpec, overrides: dict[str, dict | None], overridden_spec: CodeSpec
) -> CodeSpec | None:
    for pattern, settings in overrides.items():
        if re.fullmatch(pattern, name):
            return None if settings is None else _changed(pattern, overridden_spec, settings)
    return spec


def _changed(pattern: str, spec: CodeSpec, settings: dict) -> CodeSpec:
    try:
        return spec.changed(**settings)
    except ValueError as error:
        raise UserError(f"--overrides {pattern}: {error}") from None


def _check_overrides_used(names: list[str], overrides: dict[str, dict | None]) -> None:
    for pattern in overrides:
        if not any(re.fullmatch(pattern, name) for name in names):
            raise UserError(f"--overrides: {pattern} matches none of the {len(names)} selected layers")


def _describe(denoiser: nn.Module, name: str, spec: CodeSpec) -> Layer:
    module = denoiser.get_submodule(name)
    rows, columns = matrix_of(module, spec.group_channels).shape
    kind = "linear" if isinstance(module, nn.Linear) else "conv"
    _check_layer(name, module, rows, columns, spec)
    return Layer(name, block_of(denoiser, name), kind, rows, columns, spec)


def _check_layer(name: str, module: nn.Module, rows: int, columns: int, spec: CodeSpec) -> None:
    hint = "choose another size, or give this layer its own with --overrides (null leaves it alone)"
    if getattr(module, "groups", 1) != 1:
        leave = "leave it out of --layer_filter, or set it to null in --overrides"
        raise UserError(f"layer {name}: a convolution in {module.groups} groups cannot be quantized; {leave}")
    try:
        spec.check_shape(rows, columns)
    except ValueError as error:
        raise UserError(f"layer {name}: {error}; {hint}") from None
    if isinstance(module, nn.Conv2d) and spec.group_channels and module.in_channels % spec.in_group_size:
        raise UserError(
            f"layer {name}: in_group_size {spec.in_group_size} does not divide its {module.in_channels} "
            f"channels; {hint}"
        )
