"""Denoisers: the components that a pipeline calls at every step of sampling, UNets and diffusion transformers.

What is needed of one is derived from its module tree and from what diffusers declares of its class. `FAMILIES` has a
row for each class that more must be known of. A class without a row is tried by derivation.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from vqdm.config import COMPONENTS, SECOND_EXPERT

TIMESTEP_NAMES = ("timestep", "timesteps", "t")
EDGES = re.compile(
    r"conv_in|conv_out|proj_out|img_in|x_embedder|patch_embed\w*(\..*)?|pos_embed\.proj|patchify_proj"
    r"|all_x_embedder\..*|(all_)?final_layer\..*|norm_out\..*|proj_in"
)  # layers outside the blocks that take or give the latents


@dataclass(frozen=True)
class Family:
    """What cannot be derived of a class.

    Attributes:
        blocks: attributes that hold the blocks, in the order of the data; () derives them.
        layers: patterns of the names of the default layers; () takes every Linear and ungrouped Conv2d in the blocks.
        head: layers that run after the last block; () takes those that are registered after it.
        unbatched: arguments that are tensors without a batch dimension; all others of a class with a row have one.
        listed: arguments that are lists with an element per sample, beside those that hold the latents.
        timestep: factor and offset that make 0 (no noise) to 1000 of the timestep it is called with; None takes those
            from 0 to 1 times 1000, and others as they are.
        guidance: the argument of the pipeline's call that scales classifier-free guidance.
        negative: the negative prompt without which the pipeline leaves that guidance out.
        guided_by: "batch", where guidance doubles the batch, "call", where it is a second call, or "input", where the
            denoiser takes it as a number.
        padded: whether prompts are filled up to the length that the pipeline allows.
        side: of an image in pixels, where neither the pipeline nor the configuration names it.
    """

    blocks: tuple[str, ...] = ()
    layers: tuple[str, ...] = ()
    head: tuple[str, ...] = ()
    unbatched: tuple[str, ...] = ()
    listed: tuple[str, ...] = ()
    timestep: tuple[float, float] | None = None
    guidance: str = "guidance_scale"
    negative: str | None = None
    guided_by: str = "batch"
    padded: bool = True
    side: int | None = None


# VQDM's set (arXiv 2409.00492, §4): attention, feed-forward layers and convolutions of resnets, no time embeddings.
UNET_LAYERS = (
    r".*\.(to_q|to_k|to_v|to_out\.0)",
    r".*\.ff\.net\.(0\.proj|2)",
    r".*\.(proj_in|proj_out)",
    r".*\.(conv1|conv2|conv_shortcut)",
    r".*\.(downsamplers|upsamplers)\.\d+\.conv",
)
FAMILIES = {
    "UNet2DConditionModel": Family(
        blocks=("down_blocks", "mid_block", "up_blocks"), layers=UNET_LAYERS, head=("conv_out",), timestep=(1, 0)
    ),
    "FluxTransformer2DModel": Family(unbatched=("txt_ids", "img_ids"), timestep=(1000, 0), guided_by="input"),
    "SD3Transformer2DModel": Family(timestep=(1, 0)),
    "PixArtTransformer2DModel": Family(timestep=(1, 0)),
    "SanaTransformer2DModel": Family(timestep=(1, 0)),
    "QwenImageTransformer2DModel": Family(
        listed=("img_shapes", "txt_seq_lens"),
        timestep=(1000, 0),
        guidance="true_cfg_scale",
        negative=" ",
        guided_by="call",
        padded=False,
    ),
    "ZImageTransformer2DModel": Family(listed=("cap_feats",), timestep=(-1000, 1000), padded=False, side=1024),
    "Flux2Transformer2DModel": Family(timestep=(1000, 0), guided_by="call"),
    "WanTransformer3DModel": Family(timestep=(1, 0), guided_by="call"),
}


def is_known(model: nn.Module) -> bool:
    """Return whether a denoiser's class has a row."""
    return type(model).__name__ in FAMILIES


def family_of(model: nn.Module) -> Family:
    """Return the row of a denoiser's class; an empty one where there is none."""
    return FAMILIES.get(type(model).__name__, Family())


def denoisers_of(pipeline: DiffusionPipeline) -> dict[str, nn.Module]:
    """Return by name the components that a pipeline denoises with: one, or two experts in the order of their steps."""
    held = {name: part for name in COMPONENTS if isinstance(part := getattr(pipeline, name, None), nn.Module)}
    return {name: part for name, part in held.items() if noise_range(pipeline, name) is not None}


def noise_range(pipeline: DiffusionPipeline, name: str) -> tuple[float, float] | None:
    """Return the first timestep, and that before which all are, that a pipeline calls a denoiser at; None without any.

    Of two experts, as in Wan 2.2, the first is called at timesteps from `boundary_ratio * num_train_timesteps` on, the
    second below; without a `boundary_ratio` the second is never called.
    """
    ratio = None if name == "unet" else pipeline.config.get("boundary_ratio")
    if ratio is None:
        return None if name == SECOND_EXPERT else (0.0, math.inf)
    boundary = ratio * pipeline.scheduler.config.num_train_timesteps
    found = (0.0, boundary) if name == SECOND_EXPERT else (boundary, math.inf)
    return found if found[0] <= pipeline.scheduler.config.num_train_timesteps and found[1] > 0 else None


def denoiser_name(pipeline: DiffusionPipeline) -> str | None:
    """Return the name of the component that a pipeline denoises with first; None where it has none of `COMPONENTS`."""
    return next(iter(denoisers_of(pipeline)), None)


def denoiser_of(pipeline: DiffusionPipeline) -> nn.Module:
    """Return the component that a pipeline denoises with first."""
    return getattr(pipeline, denoiser_name(pipeline))


# ------------------------------------------------------------------------------------------- blocks and layers


def block_names(model: nn.Module) -> list[str]:
    """Return the names of a denoiser's blocks, in the order of the data.

    They are members of the attributes that its row names; else of each `nn.ModuleList` of classes that diffusers
    declares as repeated, or not to be split; else of each list at the top of the module tree.
    """
    row = family_of(model)
    if row.blocks:
        held = [(name, getattr(model, name, None)) for name in row.blocks]
        parts = [_members(name, part) if isinstance(part, nn.ModuleList) else [name] for name, part in held if part]
        return [name for some in parts for name in some]
    declared = {*(getattr(model, "_repeated_blocks", None) or ()), *(getattr(model, "_no_split_modules", None) or ())}
    found: list[str] = []
    for name, module in model.named_modules():
        alike = isinstance(module, nn.ModuleList) and len(module) and declared.issuperset(_classes(module))
        if alike and not any(name.startswith(f"{block}.") for block in found):
            found += _members(name, module)
    if found:
        return found
    lists = [(name, part) for name, part in model.named_children() if isinstance(part, nn.ModuleList)]
    return [name for of, part in lists for name in _members(of, part) if has_layers(part)]


def _members(name: str, modules: nn.ModuleList) -> list[str]:
    return [f"{name}.{index}" for index in range(len(modules))]


def _classes(modules: nn.ModuleList) -> set[str]:
    return {type(module).__name__ for module in modules}


def has_layers(module: nn.Module) -> bool:
    """Return whether a module holds a Linear or a Conv2d."""
    return any(isinstance(one, nn.Linear | nn.Conv2d) for one in module.modules())


def block_of(model: nn.Module, name: str) -> str:
    """Return the block that a layer or tensor belongs to; "stem" before the first, "head" after the last."""
    blocks = block_names(model)
    for block in blocks:
        if name.startswith(f"{block}."):
            return block
    row, top = family_of(model), name.split(".")[0]
    if row.head:
        return "head" if top in row.head else "stem"
    children = [child for child, _ in model.named_children()]
    last = max((children.index(block.split(".")[0]) for block in blocks), default=-1)
    return "head" if top in children and children.index(top) > last else "stem"


def in_float32(model: nn.Module, name: str) -> bool:
    """Return whether diffusers keeps a layer in float32 in any type of model."""
    kept = getattr(model, "_keep_in_fp32_modules", None) or ()
    return not set(name.split(".")).isdisjoint(kept)


def compute_dtype(model: nn.Module) -> torch.dtype:
    """Return the type that a denoiser computes in: that of the first bias of a layer, which codes leave plain.

    Of one without biases, that of the first floating-point tensor that no code consists of.
    """
    coded: set[int] = set()
    for name, module in model.named_modules():
        bias = getattr(module, "bias", None)
        layer = isinstance(module, nn.Linear | nn.Conv2d | nn.Conv3d)
        if layer and isinstance(bias, Tensor) and not in_float32(model, name):
            return bias.dtype
        coded |= {id(one) for one in module.stored_tensors().values()} if hasattr(module, "stored_tensors") else set()
    plain = ((name, one) for name, one in model.named_parameters() if one.is_floating_point() and id(one) not in coded)
    return next(one.dtype for name, one in plain if not in_float32(model, name.rpartition(".")[0]))


# ------------------------------------------------------------------------------------------- calls


def output_of(result) -> Tensor:
    """Return the output [A·B, ...] of a denoiser's call: a tensor, a tuple's first, or `.sample`; lists are stacked."""
    found = result if isinstance(result, Tensor) else result[0] if isinstance(result, tuple) else result.sample
    return torch.stack(found) if isinstance(found, list | tuple) else found


def noise_levels(model: nn.Module, timesteps: list[float]) -> list[float]:
    """Return, from 0 (no noise) to 1000, the timesteps of those that a denoiser is called with."""
    factor, offset = family_of(model).timestep or ((1000, 0) if max(timesteps, default=0) <= 1 else (1, 0))
    return [factor * timestep + offset for timestep in timesteps]


def largest_timestep(model: nn.Module, recorded: float) -> float:
    """Return the largest timestep that a denoiser may be called with, 1 or 1000, given the largest recorded one."""
    factor, _ = family_of(model).timestep or (1 if recorded > 1 else 1000, 0)
    return 1000 / abs(factor)
