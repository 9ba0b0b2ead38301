"""A tiny teacher, students of any format, and random points to train on, without sampling or quantizing."""

from __future__ import annotations

import recorded
import torch
from conftest import tiny_unet
from numerics import random_widths
from torch import nn

from vqdm.additive.code import CodeSpec
from vqdm.additive.trellis import UNITS
from vqdm.finetuning.config import OptimizerConfig
from vqdm.finetuning.data import Points, with_teacher_outputs
from vqdm.finetuning.trainer import DistillationLoss, Trainer, trainable
from vqdm.layers.int8 import quantize_int8
from vqdm.layers.quantized import quantized_layers, shared_codebook_module, swap
from vqdm.parallel import Ranks
from vqdm.storage.hf import mark_quantized

CPU = torch.device("cpu")
ALONE = Ranks()
NAMES = (
    "mid_block.resnets.0.conv1",
    "mid_block.attentions.0.transformer_blocks.0.attn1.to_q",
    "mid_block.resnets.1.conv2",
)
FORMATS = {
    "own": CodeSpec(2, 4, 4),
    "shared": CodeSpec(2, 4, 4, shared_codebooks="shared"),
    "groupwise": CodeSpec(1, 3, 8, groupwise_codebooks=True),
    "input_scales": CodeSpec(2, 4, 4, input_channel_scales=True),
    "scale_codes": CodeSpec(2, 4, 4, scale_nbits=3),
    "scale_a_group": CodeSpec(1, 5, 8, scale_nbits=16, group_channels=False),
    "value_tables": CodeSpec(2, 4, 4, codebook_value_nbits=3, codebook_value_num_groups=2),
    "out_groups": CodeSpec(2, 4, 4, out_group_size=2),
    "variable": CodeSpec(1, 5, 4, shared_codebooks="shared", row_bits=23, input_channel_scales=True),
    "trellis": CodeSpec(
        1, 4, 1, shared_codebooks="shared", segment_rows=16, segment_bits=16 * 60, input_channel_scales=True
    ),
}


def teacher() -> nn.Module:
    return tiny_unet("sdxl").requires_grad_(False).eval()


def student(spec: CodeSpec, names: tuple[str, ...] = NAMES, rounded: bool = False) -> nn.Module:
    """The teacher with random codes in the place of some layers, about as large as what they replace."""
    unet, generator = teacher(), torch.Generator().manual_seed(1)
    for name in names:
        size = unet.get_submodule(name).weight.std().item()
        _fill(swap(unet, name, spec), size, generator)
    if spec.shared_codebooks:
        shared_codebook_module(unet).fill(spec.shared_codebooks, torch.randn(spec.codebooks_shape, generator=generator))
    if rounded:
        quantize_int8(unet, "time_embedding.linear_1")
    mark_quantized(unet)
    return unet.requires_grad_(False)


def _fill(layer, size: float, generator: torch.Generator) -> None:
    for name, tensor in layer.stored_tensors().items():
        if name == "code_widths":
            trellis, b = layer.spec.is_trellis, layer.spec.nbits_per_codebook
            total = layer.spec.segment_bits // layer.spec.segment_rows if trellis else layer.spec.row_bits
            tensor.copy_(random_widths(len(tensor), total, b, generator) * (UNITS if trellis else 1))
        elif tensor.dtype == torch.uint8:
            tensor.copy_(torch.randint(0, 256, tensor.shape, generator=generator))
        elif name.startswith("codebook"):
            tensor.copy_(torch.randn(tensor.shape, generator=generator))
        else:
            tensor.copy_((0.5 + torch.rand(tensor.shape, generator=generator)) * (size if "input" not in name else 1.0))
    if layer.spec.is_trellis:
        layer.input_scales[layer.code_widths == 0] = 0


def points(unet: nn.Module, prompts: int = 6, steps: int = 4) -> Points:
    """Random points with the outputs of `unet`."""
    generator = torch.Generator().manual_seed(2)
    conditioning = {
        "encoder_hidden_states": torch.randn(prompts, 2, 5, 64, generator=generator),
        "text_embeds": torch.randn(prompts, 2, 32, generator=generator),
        "time_ids": torch.full((prompts, 2, 6), 16.0),
    }
    latents = torch.randn(prompts, steps, 4, 8, 8, generator=generator)
    part = recorded.made(latents, torch.linspace(999, 49, steps), conditioning)
    return Points([with_teacher_outputs(unet, part, 8)])


def trainer(
    unet: nn.Module,
    total: int = 10,
    local: int = 8,
    decode: str = "step",
    updates=None,
    dtype: torch.dtype = torch.float32,
    **options,
) -> Trainer:
    """A trainer of all parameters of `unet`."""
    config = OptimizerConfig(**({"finetune_lr": 0.02, "lr_warmup_steps": 0} | options))
    loss_fn = DistillationLoss(unet, None, dtype, local, ALONE)
    return Trainer(loss_fn, trainable(unet, config), config, total, decode, updates)


def codes(unet: nn.Module) -> dict[str, torch.Tensor]:
    """Every integer tensor of the quantized layers, copied."""
    layers = quantized_layers(unet).items()
    return {
        f"{name}.{key}": tensor.clone()
        for name, layer in layers
        for key, tensor in layer.stored_tensors().items()
        if not tensor.is_floating_point()
    }
