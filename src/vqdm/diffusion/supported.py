"""Whether a model can be calibrated: found in its config.json files, before weights are loaded, and in what was loaded.

A model that is quantized already would be measured against itself, and look splendid; one whose UNet is called with
what is not recorded would be calibrated on something else.
"""

from __future__ import annotations

import os
from pathlib import Path

import diffusers
from diffusers import DiffusionPipeline, UNet2DConditionModel
from torch import nn

from vqdm.documents import read_json
from vqdm.errors import UserError
from vqdm.tracking import log_info

PIPELINES = ("StableDiffusionPipeline", "StableDiffusionXLPipeline", "LatentConsistencyModelPipeline", "KolorsPipeline")
# Setting of a UNet → the values with which all that it is called with is recorded.
RECORDED = {
    "class_embed_type": (None,),
    "num_class_embeds": (None,),
    "encoder_hid_dim_type": (None, "text_proj"),
    "addition_embed_type": (None, "text", "text_time"),
}
QUANTIZED_KEYS = ("quantization_config", "compression_config")
QUANTIZED_FILES = ("quantization_config.json", "quantize_config.json", "quanto_qmap.json")


def check_full_precision(
    model: str, revision: str | None, local_files_only: bool, name: str = "MODEL", role: str = ""
) -> None:
    """Raise UserError where the files of a pipeline say that its UNet is quantized already.

    Args:
        name: of the argument or flag that gives the model.
        role: what the full-precision model is for, to end the line with.
    """
    method = _quantization(model, "unet", _component(model, "unet", revision, local_files_only))
    if method:
        raise UserError(f"{name} {model} is quantized itself ({method}); give the full-precision model{role}")


def check_supported(
    model: str, revision: str | None, local_files_only: bool, name: str = "MODEL", role: str = ""
) -> None:
    """Raise UserError where the files of a pipeline say that it cannot be calibrated; other files pass.

    A text encoder or VAE that is quantized stays as it is, which is logged.
    """
    index = _index(model, revision, local_files_only)
    if index is None:
        return
    _check_pipeline(f"{name} {model}", index)
    check_full_precision(model, revision, local_files_only, name, role)
    parts = [part for part, value in index.items() if isinstance(value, list) and part != "unet"]
    configs = {part: _component(model, part, revision, local_files_only) for part in parts}
    _check_unet(f"{name} {model}", _component(model, "unet", revision, local_files_only), configs.get("vae") or {})
    for part, config in configs.items():
        method = _quantization(model, part, config)
        if method:
            log_info(f"{part} of {name} {model} is quantized ({method}) and stays as it is")


def check_loaded(unet: nn.Module, model: str, name: str = "MODEL", role: str = "") -> None:
    """Raise UserError where a UNet was quantized by any library, whatever its files said."""
    method = quantized_by(unet)
    if method:
        raise UserError(f"{name} {model} is quantized itself ({method}); give the full-precision model{role}")


def quantized_by(model: nn.Module) -> str | None:
    """What a loaded model is quantized with, or the type of its first unusual weight; None for a plain model."""
    method = getattr(getattr(getattr(model, "hf_quantizer", None), "quantization_config", None), "quant_method", None)
    if method:
        return str(getattr(method, "value", method))
    for module in model.modules():
        if hasattr(module, "stored_tensors"):
            return "vqdm"
        weight = getattr(module, "weight", None) if isinstance(module, nn.Linear | nn.Conv2d) else None
        if weight is not None and type(weight) is not nn.Parameter:
            return type(weight).__name__
        if weight is not None and (not weight.is_floating_point() or weight.element_size() < 2):
            return str(weight.dtype).removeprefix("torch.")
    return None


def _check_pipeline(model: str, index: dict) -> None:
    kind = index.get("_class_name")
    unet = index.get("unet")
    if not isinstance(unet, list) or unet[-1:] in ([], [None]):
        raise UserError(f"{model} is a {kind}, which has no UNet; vqdm quantizes UNets")
    if unet[0] == "diffusers" and unet[-1] != "UNet2DConditionModel":
        raise UserError(f"{model} has a {unet[-1]} as its UNet, which is unsupported; allowed is UNet2DConditionModel")
    if kind not in PIPELINES and hasattr(diffusers, str(kind)):
        raise UserError(
            f"{model} is a {kind}, which is unsupported: it needs more than a prompt, or calls its UNet with what is "
            f"not recorded; allowed are {', '.join(PIPELINES)}"
        )


def _check_unet(model: str, config: dict | None, vae: dict) -> None:
    config = config or {}
    for name, allowed in RECORDED.items():
        if config.get(name) not in allowed:
            raise UserError(
                f"{model}: its UNet has {name} {config[name]!r}, which is unsupported: what it is called with for that "
                f"is not recorded; allowed are {', '.join(map(str, allowed))}"
            )
    channels, latents = config.get("in_channels", 4), vae.get("latent_channels", 4)
    if channels != latents:
        raise UserError(
            f"{model}: its UNet takes {channels} channels and the VAE gives {latents}, as in inpainting and image "
            "editing, which is unsupported; give a text-to-image model"
        )


def _quantization(model: str, part: str, config: dict | None) -> str | None:
    """The method that a component's files name, None where they name none."""
    found = next((config[key] for key in QUANTIZED_KEYS if (config or {}).get(key)), None)
    if found:
        return str(found.get("quant_method") or found.get("quant_type") or "quantization_config")
    return next((file for file in QUANTIZED_FILES if (Path(model) / part / file).is_file()), None)


def _index(model: str, revision: str | None, local_files_only: bool) -> dict | None:
    return _config(DiffusionPipeline, model, "model_index.json", None, revision, local_files_only)


def _component(model: str, part: str, revision: str | None, local_files_only: bool) -> dict | None:
    return _config(UNet2DConditionModel, model, f"{part}/config.json", part, revision, local_files_only)


def _config(
    kind: type, model: str, file: str, part: str | None, revision: str | None, local_files_only: bool
) -> dict | None:
    """A small file of a folder or of the hub; None where it cannot be had, of which loading will complain."""
    try:
        if Path(model).is_dir():
            found = read_json(Path(model) / file)
        else:
            offline = local_files_only or os.environ.get("HF_HUB_OFFLINE") == "1"
            found = kind.load_config(model, subfolder=part, revision=revision, local_files_only=offline)
    except Exception:
        return None
    return found if isinstance(found, dict) else None
