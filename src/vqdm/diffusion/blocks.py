"""Select the layers of a UNet to quantize, in the order of the data.

Blocks run in the order of the data: the stem, `down_blocks.*`, `mid_block`, `up_blocks.*`, the head; layers inside a
block in the order of the module tree (VQDM, arXiv 2409.00492, §4: each block is calibrated after the ones before it).

Letters: O outputs, I = kh·kw·C inputs of the layer seen as a matrix.
"""

from __future__ import annotations

import re

import torch
from torch import Tensor, nn

from vqdm.additive.code import CodeSpec
from vqdm.errors import UserError
from vqdm.layers.quantized import Layer

VQDM_LAYERS = (
    r".*\.(to_q|to_k|to_v|to_out\.0)",
    r".*\.ff\.net\.(0\.proj|2)",
    r".*\.(proj_in|proj_out)",
    r".*\.(conv1|conv2|conv_shortcut)",
    r".*\.(downsamplers|upsamplers)\.\d+\.conv",
)
PRESETS = ("default", "all", "linear_only", "conv_only")
_BLOCK = re.compile(r"(down_blocks\.\d+|mid_block|up_blocks\.\d+)\.")


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


def block_of(name: str) -> str:
    """Return the block that a layer name belongs to; "stem" before the first, "head" after the last."""
    found = _BLOCK.match(name)
    if found:
        return found.group(1)
    return "head" if name.startswith("conv_out") else "stem"


def select_layers(
    unet: nn.Module,
    layer_filter: str,
    min_channels: int,
    spec: CodeSpec,
    overrides: dict[str, dict | None],
    overridden_spec: CodeSpec | None = None,
) -> list[Layer]:
    """Select the layers to quantize, in order.

    Args:
        layer_filter: a preset ("default" is VQDM's set, "linear_only" and "conv_only" its halves, "all" every Linear
            and Conv2d inside the blocks) or a regular expression, searched for in the name as VQDM does.
        min_channels: layers with fewer input or output channels are left alone.
        overrides: full-match pattern → settings that replace those of `overridden_spec` (`spec` where it is None), or
            None to leave the layer alone; the first pattern that matches counts.

    Raises:
        UserError: nothing matches, an override matches nothing, or a layer does not divide into groups.
    """
    names = [name for name, module in _plain_layers(unet) if _wanted(name, module, layer_filter, min_channels)]
    names = _in_block_order(unet, names)
    if not names:
        known = ", ".join(name for name, _ in _plain_layers(unet)[:3])
        raise UserError(f"--layer_filter {layer_filter} matches no layer of the UNet (its names look like {known})")
    _check_overrides_used(names, overrides)
    chosen = [(name, _spec_for(name, spec, overrides, overridden_spec or spec)) for name in names]
    layers = [_describe(unet, name, layer_spec) for name, layer_spec in chosen if layer_spec is not None]
    if not layers:
        raise UserError("--overrides leaves no layer to quantize")
    return layers


def unquantized_layers(unet: nn.Module, quantized: list[Layer]) -> list[str]:
    """Return the names of every other Linear and Conv2d but `conv_in` and `conv_out`, in module order.

    They may become int8.

    In VQDM's default set these are the time and size embeddings and the `time_emb_proj` of every resnet.
    """
    taken = {layer.name for layer in quantized} | {"conv_in", "conv_out"}
    return [name for name, _ in _plain_layers(unet) if name not in taken]


def _plain_layers(unet: nn.Module) -> list[tuple[str, nn.Module]]:
    return [(name, module) for name, module in unet.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)]


def _wanted(name: str, module: nn.Module, layer_filter: str, min_channels: int) -> bool:
    linear = isinstance(module, nn.Linear)
    channels = (module.in_features, module.out_features) if linear else (module.in_channels, module.out_channels)
    if min(channels) < min_channels:
        return False
    if layer_filter == "all":
        return bool(_BLOCK.match(name))
    if layer_filter not in PRESETS:
        return _compiled(layer_filter).search(name) is not None
    kinds = {"linear_only": linear, "conv_only": not linear}
    return kinds.get(layer_filter, True) and any(re.fullmatch(pattern, name) for pattern in VQDM_LAYERS)


def _compiled(pattern: str) -> re.Pattern:
    try:
        return re.compile(pattern)
    except re.error as error:
        raise UserError(f"--layer_filter {pattern} is not a regular expression: {error}") from None


def _in_block_order(unet: nn.Module, names: list[str]) -> list[str]:
    """Stem, down, mid, up, head; the module tree's order inside each (UNets register `mid_block` after `up_blocks`)."""
    down = [f"down_blocks.{i}" for i in range(len(getattr(unet, "down_blocks", ())))]
    up = [f"up_blocks.{i}" for i in range(len(getattr(unet, "up_blocks", ())))]
    place = {block: index for index, block in enumerate(["stem", *down, "mid_block", *up, "head"])}
    return sorted(names, key=lambda name: place[block_of(name)])


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


def _describe(unet: nn.Module, name: str, spec: CodeSpec) -> Layer:
    module = unet.get_submodule(name)
    rows, columns = matrix_of(module, spec.group_channels).shape
    kind = "linear" if isinstance(module, nn.Linear) else "conv"
    _check_layer(name, module, rows, columns, spec)
    return Layer(name, block_of(name), kind, rows, columns, spec)


def _check_layer(name: str, module: nn.Module, rows: int, columns: int, spec: CodeSpec) -> None:
    hint = "choose another size, or give this layer its own with --overrides (null leaves it alone)"
    try:
        spec.check_shape(rows, columns)
    except ValueError as error:
        raise UserError(f"layer {name}: {error}; {hint}") from None
    if isinstance(module, nn.Conv2d):
        if module.groups != 1:
            raise UserError(f"layer {name}: a convolution in {module.groups} groups cannot be quantized; {hint}")
        if spec.group_channels and module.in_channels % spec.in_group_size:
            raise UserError(
                f"layer {name}: in_group_size {spec.in_group_size} does not divide its {module.in_channels} "
                f"channels; {hint}"
            )
