"""A UNet without its weights: what shapes alone say of it, within seconds and in little memory.

Letters: A guidance branches, B points in a batch, C channels.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from diffusers import UNet2DConditionModel
from torch import nn

from vqdm.diffusion.blocks import Layer
from vqdm.diffusion.hessians import shared_inputs
from vqdm.errors import RunError

TOKENS = 77  # of a prompt; the length changes no weight


def meta_unet(config: Mapping, dtype: torch.dtype = torch.float32) -> UNet2DConditionModel:
    """Return a UNet of a configuration on the meta device: shapes and types, no values."""
    plain = {name: value for name, value in config.items() if name != "quantization_config"}
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(plain)
    return nn.Module.to(unet, dtype).eval().requires_grad_(False)  # diffusers' own warns of nothing


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
    except (RunError, RuntimeError, ValueError, TypeError, NotImplementedError, AttributeError):
        return [[layer] for layer in layers]
