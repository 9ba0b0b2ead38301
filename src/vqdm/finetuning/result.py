"""The folder that fine-tuning leaves: a pipeline like the one it began with, its UNet with other numbers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from diffusers import DiffusionPipeline
from torch import nn

from vqdm.diffusion.pipelines import saved_types, stored_dtypes
from vqdm.finetuning.config import FinetuneConfig
from vqdm.layers.quantized import quantized_layers
from vqdm.layers.shared_codebooks import SHARED_CODEBOOKS


def stage(
    pipeline: DiffusionPipeline, student: nn.Module, quantized: Path, config: FinetuneConfig, staged: Path
) -> None:
    """Write a whole pipeline with the student as its UNet into `staged`.

    Everything else is copied from the folder around the quantized UNet; where there is none, it is the model's, every
    component in the type that it computes in, or a narrower one of its files.
    """
    shutil.rmtree(staged, ignore_errors=True)
    index = quantized.parent / "model_index.json"
    if index.is_file():
        staged.mkdir(parents=True)
        shutil.copy(index, staged)
        for name in components(index):
            shutil.copytree(quantized.parent / name, staged / name)
        student.save_pretrained(staged / "unet")
    else:
        stored = stored_dtypes(config.model, config.variant, config.revision)
        stored.pop("unet", None)
        pipeline.register_modules(unet=student)
        with saved_types(pipeline, stored):
            pipeline.save_pretrained(staged)


def components(index: Path) -> list[str]:
    """The components beside the UNet that `model_index.json` names and that have a folder."""
    named = json.loads(index.read_text(encoding="utf-8"))
    found = [name for name, value in named.items() if isinstance(value, list) and name != "unet"]
    return [name for name in found if (index.parent / name).is_dir()]


def sizes(student: nn.Module, parameters: int, staged: Path) -> dict[str, float]:
    """Effective bits from the tensors as saved, and bytes of the UNet's files; `parameters` of the original UNet."""
    layers = quantized_layers(student).values()
    weights = sum(layer._rows * layer._columns for layer in layers)
    banks = getattr(student, SHARED_CODEBOOKS, None)
    code_bits = sum(layer.stored_bits for layer in layers) + (_bits(banks) if banks else 0)
    return {
        "weights_quantized": weights,
        "effective_bits_layers": code_bits / weights,
        "effective_bits_unet": _bits(student) / parameters,
        "bytes_of_unet": sum(file.stat().st_size for file in staged.glob("unet/*.safetensors")),
    }


def _bits(module: nn.Module) -> int:
    return sum(8 * tensor.element_size() * tensor.numel() for tensor in module.parameters())
