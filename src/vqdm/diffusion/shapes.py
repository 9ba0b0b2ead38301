"""A UNet without its weights: what shapes alone say of it, within seconds and in little memory.

Letters: A guidance branches, B points in a batch, C channels.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DiffusionPipeline, UNet2DConditionModel
from torch import nn
from torch.overrides import TorchFunctionMode

from vqdm.diffusion.blocks import Layer
from vqdm.diffusion.hessians import shared_inputs
from vqdm.diffusion.pipelines import set_scheduler
from vqdm.documents import read_json
from vqdm.errors import RunError
from vqdm.live_bytes import LiveBytes

# What a part raises that wants other arguments, or has no operators on the meta device.
UNCALLABLE = (RunError, RuntimeError, ValueError, TypeError, NotImplementedError, AttributeError)
TOKENS = 77  # of a prompt; the length changes no weight


def meta_unet(config: Mapping, dtype: torch.dtype = torch.float32) -> UNet2DConditionModel:
    """Return a UNet of a configuration on the meta device: shapes and types, no values."""
    plain = {name: value for name, value in config.items() if name != "quantization_config"}
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(plain)
    return nn.Module.to(unet, dtype).eval().requires_grad_(False)  # diffusers' own warns of nothing


def meta_copy(part: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Return a part of a pipeline, such as its VAE, on the meta device."""
    with torch.device("meta"):
        copied = type(part).from_config(part.config)
    return nn.Module.to(copied, dtype).eval().requires_grad_(False)


def skeleton_pipeline(folder: Path, dtype: torch.dtype, scheduler: str) -> DiffusionPipeline | None:
    """Return a local pipeline without weights: UNet and VAE on the meta device, text encoders missing.

    None where it has other parts than the usual ones; they are to be loaded then.
    """
    index = read_json(folder / "model_index.json")
    named = {name: value for name, value in index.items() if isinstance(value, list) and value[0]}
    kinds = {"unet": ["diffusers", "UNet2DConditionModel"], "vae": ["diffusers", "AutoencoderKL"]}
    if any(named.get(name) != kind for name, kind in kinds.items()) or "safety_checker" in named:
        return None
    unet = meta_unet(UNet2DConditionModel.load_config(folder / "unet"), dtype)
    with torch.device("meta"):
        vae = AutoencoderKL.from_config(AutoencoderKL.load_config(folder / "vae"))
    missing = {name: None for name in named if name.startswith(("text_encoder", "image_encoder"))}
    pipeline = DiffusionPipeline.from_pretrained(folder, unet=unet, vae=nn.Module.to(vae, dtype), **missing)
    set_scheduler(pipeline, scheduler)
    return pipeline


def meta_call(unet: UNet2DConditionModel, height: int, width: int, batch: int = 1) -> dict:
    """Return the keyword arguments of a UNet call on the meta device.

    Args:
        height, width: of the latents.
        batch: A·B.
    """
    config, dtype = unet.config, unet.dtype
    widths = config.cross_attention_dim
    width_of_text = widths if isinstance(widths, int) else max(widths)
    call = {
        "sample": torch.empty(batch, config.in_channels, height, width, device="meta", dtype=dtype),
        "timestep": torch.empty(batch, device="meta"),
        "encoder_hidden_states": torch.empty(batch, TOKENS, width_of_text, device="meta", dtype=dtype),
    }
    if config.addition_embed_type == "text_time":
        pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
        call["added_cond_kwargs"] = {
            "text_embeds": torch.empty(batch, pooled, device="meta", dtype=dtype),
            "time_ids": torch.empty(batch, 6, device="meta", dtype=dtype),
        }
    return call


def input_groups(unet: UNet2DConditionModel, layers: list[Layer], height: int, width: int) -> list[list[Layer]]:
    """Group layers by the input that they share, as `hessians.shared_inputs`; `unet` is on the meta device.

    Each layer has a group of its own where the UNet cannot be called with these arguments alone.
    """
    try:
        return shared_inputs(unet, layers, meta_call(unet, height, width))
    except UNCALLABLE:
        return [[layer] for layer in layers]


def forward_bytes(unet: UNet2DConditionModel, height: int, width: int, batch: int) -> int:
    """Return the most bytes of activations at once in a UNet call without gradients, on the meta device."""
    call = meta_call(unet, height, width, batch)
    with torch.no_grad(), LiveBytes() as live, _FusedAttention():
        unet(**call)
    return live.peak


def decode_bytes(vae: nn.Module, height: int, width: int) -> int:
    """Return the most bytes of activations at once while a VAE on the meta device decodes one image.

    Args:
        height, width: of the latents.
    """
    latents = torch.empty(1, vae.config.latent_channels, height, width, device="meta", dtype=vae.dtype)
    with torch.no_grad(), LiveBytes() as live, _FusedAttention():
        vae.decode(latents)
    return live.peak


class _FusedAttention(TorchFunctionMode):
    """Inside, attention makes its output alone, as fused kernels do; on the meta device it would make all scores."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is not torch.nn.functional.scaled_dot_product_attention:
            return function(*args, **kwargs)
        names = dict(zip(("query", "key", "value"), args, strict=False)) | kwargs
        return names["query"].new_empty(*names["query"].shape[:-1], names["value"].shape[-1])
