"""Finding and loading the UNet of a quantized folder, never mistaking a full-precision one for it."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import UNet2DConditionModel

from vqdm.diffusion.model_folders import not_found, only_variant
from vqdm.diffusion.pipelines import check_sizes
from vqdm.documents import first_line, read_json
from vqdm.errors import UserError
from vqdm.layers.quantized import quantized_layers
from vqdm.storage.hf import Method

# Settings that a UNet must share with the pipeline it is put into.
SHARED_SETTINGS = ("in_channels", "out_channels", "cross_attention_dim", "addition_embed_type", "time_cond_proj_dim")


def find_quantized_unet(path: str) -> Path:
    """The UNet's folder, given it or the pipeline folder around it.

    Raises:
        UserError: no UNet is there, or it is not quantized.
    """
    candidates = [folder for folder in (Path(path) / "unet", Path(path)) if (folder / "config.json").is_file()]
    if not candidates:
        what = "" if Path(path).is_dir() else f", since it is not a folder{not_found(path)}"
        files = "neither unet/config.json nor config.json"
        raise UserError(f"QUANTIZED {path} holds {files}{what}; give the folder that quantizing wrote")
    try:
        config = read_json(candidates[0] / "config.json")
        check_sizes(config)
        method = (config.get("quantization_config") or {}).get("quant_method")
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(f"QUANTIZED {path}: config.json cannot be read: {first_line(error)}") from None
    if method != Method.VQDM.value:
        raise UserError(
            f"QUANTIZED {path} is not quantized: its config.json has no quantization_config of vqdm; "
            "for full precision leave QUANTIZED out"
        )
    return candidates[0]


def load_quantized_unet(folder: Path, dtype: torch.dtype) -> UNet2DConditionModel:
    """A frozen UNet on the CPU with at least one quantized layer.

    Raises:
        UserError: the folder cannot be loaded, or nothing in it is quantized.
    """
    variant = only_variant(folder)  # no flag is needed for the only one that there is
    try:
        unet = UNet2DConditionModel.from_pretrained(folder, dtype=dtype, variant=variant, local_files_only=True)
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # whatever diffusers answers to a config.json of wrong types or weights of wrong shapes
        raise UserError(f"QUANTIZED {folder} cannot be loaded: {first_line(error)}") from None
    if not quantized_layers(unet):
        raise UserError(f"QUANTIZED {folder} holds no quantized layer; for full precision leave QUANTIZED out")
    return unet.requires_grad_(False).eval()


def check_fits(unet: UNet2DConditionModel, original: UNet2DConditionModel, path: str, model: str) -> None:
    """Raise UserError where a quantized UNet comes from another kind of model than the pipeline's own."""
    for name in SHARED_SETTINGS:
        ours, theirs = unet.config.get(name), original.config.get(name)
        if ours != theirs:
            raise UserError(f"QUANTIZED {path} does not fit MODEL {model}: its {name} is {ours}, MODEL's is {theirs}")
