"""Write a pipeline as one file in the layout of A1111 and Civitai: the inverse of what diffusers converts."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from safetensors.torch import save_file
from torch import nn

Tensors = dict[str, torch.Tensor]
RESNET = {
    "norm1.": "in_layers.0.",
    "conv1.": "in_layers.2.",
    "norm2.": "out_layers.0.",
    "conv2.": "out_layers.3.",
    "time_emb_proj.": "emb_layers.1.",
    "conv_shortcut.": "skip_connection.",
}
UNET = {
    "time_embedding.linear_1.": "time_embed.0.",
    "time_embedding.linear_2.": "time_embed.2.",
    "add_embedding.linear_1.": "label_emb.0.0.",
    "add_embedding.linear_2.": "label_emb.0.2.",
    "conv_in.": "input_blocks.0.0.",
    "conv_norm_out.": "out.0.",
    "conv_out.": "out.2.",
    "mid_block.resnets.0.": "middle_block.0.",
    "mid_block.attentions.0.": "middle_block.1.",
    "mid_block.resnets.1.": "middle_block.2.",
}
VAE = {
    "conv_norm_out.": "norm_out.",
    "mid_block.resnets.0.": "mid.block_1.",
    "mid_block.resnets.1.": "mid.block_2.",
    "mid_block.attentions.0.": "mid.attn_1.",
    "conv_shortcut.": "nin_shortcut.",
    "group_norm.": "norm.",
    "to_q.": "q.",
    "to_k.": "k.",
    "to_v.": "v.",
    "to_out.0.": "proj_out.",
    "downsamplers.0.": "downsample.",
    "upsamplers.0.": "upsample.",
    "resnets.": "block.",
}
OPEN_CLIP = {
    "text_model.encoder.layers.": "transformer.resblocks.",
    "text_model.embeddings.position_embedding.weight": "positional_embedding",
    "text_model.embeddings.token_embedding.": "token_embedding.",
    "text_model.final_layer_norm.": "ln_final.",
    "layer_norm1.": "ln_1.",
    "layer_norm2.": "ln_2.",
    "mlp.fc1.": "mlp.c_fc.",
    "mlp.fc2.": "mlp.c_proj.",
    "self_attn.": "attn.",
}


def renamed(name: str, words: dict[str, str]) -> str:
    for ours, theirs in words.items():
        name = name.replace(ours, theirs)
    return name


def unet_tensors(unet: nn.Module) -> Tensors:
    """Tensors by their names below `model.diffusion_model.`."""
    count, found = unet.config.layers_per_block + 1, {}
    for name, tensor in unet.state_dict().items():
        match = re.match(r"(down|up)_blocks\.(\d+)\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.(.*)", name)
        if match is None:
            new = renamed(name, UNET)
            found[renamed(new, RESNET) if re.match(r"middle_block\.[02]", new) else new] = tensor
            continue
        side, block, kind, place, rest = match[1], int(match[2]), match[3], int(match[4]), match[5]
        if kind == "downsamplers":
            new = f"input_blocks.{(block + 1) * count}.0.op.{rest.removeprefix('conv.')}"
        elif kind == "upsamplers":
            crossed = hasattr(unet.up_blocks[block], "attentions")
            new = f"output_blocks.{block * count + count - 1}.{2 if crossed else 1}.{rest}"
        else:
            number = block * count + place
            number, word = (number + 1, "input_blocks") if side == "down" else (number, "output_blocks")
            new = f"{word}.{number}.{int(kind == 'attentions')}.{renamed(rest, RESNET) if kind == 'resnets' else rest}"
        found[new] = tensor
    return found


def vae_tensors(vae: nn.Module) -> Tensors:
    """Tensors by their names below `first_stage_model.`; attention is a convolution there."""
    last, found = len(vae.config.up_block_types) - 1, {}
    for name, tensor in vae.state_dict().items():
        new = re.sub(r"up_blocks\.(\d+)", lambda match: f"up.{last - int(match[1])}", name)
        new = renamed(new.replace("down_blocks.", "down."), VAE)
        found[new] = tensor[:, :, None, None] if "attn_1" in new and tensor.ndim == 2 else tensor
    return found


def clip_tensors(model: nn.Module) -> Tensors:
    """Tensors of a CLIP text model by their names below `transformer.`, with the buffer that old files have."""
    tensors = {f"text_model.{name.removeprefix('text_model.')}": one for name, one in model.state_dict().items()}
    count = len(tensors["text_model.embeddings.position_embedding.weight"])
    return tensors | {"text_model.embeddings.position_ids": torch.arange(count)[None]}


def open_clip_tensors(model: nn.Module) -> Tensors:
    """Tensors of a text model by their names in OpenCLIP, where query, key and value are one matrix."""
    tensors, found = model.state_dict(), {}
    for name, tensor in tensors.items():
        new = renamed(f"text_model.{name.removeprefix('text_model.')}", OPEN_CLIP)
        if name == "text_projection.weight":
            found["text_projection"] = tensor.T
        elif ".q_proj." in name:
            every = [tensors[name.replace("q_proj", one)] for one in ("q_proj", "k_proj", "v_proj")]
            found[new.replace(".q_proj.", ".in_proj_")] = torch.cat(every)
        elif ".k_proj." not in name and ".v_proj." not in name:
            found[new] = tensor
    return found


def single_file_tensors(pipeline: DiffusionPipeline) -> Tensors:
    """All tensors of a pipeline of SDXL, Stable Diffusion 1.5, or 2.1 (its text encoder is of OpenCLIP)."""
    parts = {"model.diffusion_model.": unet_tensors(pipeline.unet), "first_stage_model.": vae_tensors(pipeline.vae)}
    if hasattr(pipeline, "text_encoder_2"):
        parts["conditioner.embedders.0.transformer."] = clip_tensors(pipeline.text_encoder)
        parts["conditioner.embedders.1.model."] = open_clip_tensors(pipeline.text_encoder_2)
    elif pipeline.unet.config.use_linear_projection:
        parts["cond_stage_model.model."] = open_clip_tensors(pipeline.text_encoder)
    else:
        parts["cond_stage_model.transformer."] = clip_tensors(pipeline.text_encoder)
    every = {prefix + name: tensor for prefix, tensors in parts.items() for name, tensor in tensors.items()}
    return every | {"alphas_cumprod": torch.ones(10)}


def write_single_file(folder: str | Path, path: Path, dtype: torch.dtype | None = None) -> Path:
    """Write the pipeline of a folder as one file, in the type that it is stored in unless another is given."""
    pipeline = DiffusionPipeline.from_pretrained(folder, dtype=dtype)
    save_file({name: tensor.clone().contiguous() for name, tensor in single_file_tensors(pipeline).items()}, path)
    return path
