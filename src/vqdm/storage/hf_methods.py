"""Methods of diffusers and transformers on a model that vqdm quantized, where their own would fail or mislead.

Casting works as on a plain model, codes aside; a model is saved only if the folder can be loaded again; and what copies
a UNet's weights gets a plain copy. Other models are passed on to the libraries as they are.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from functools import wraps

import torch
from accelerate import init_empty_weights
from diffusers import (
    ControlNetModel,
    ControlNetUnionModel,
    DiffusionPipeline,
    ModelMixin,
    SparseControlNetModel,
    UNetControlNetXSModel,
    UNetMotionModel,
)
from torch import nn
from transformers import PreTrainedModel

from vqdm.storage.hf import Method, allow_casting, build_layers

CAST_TO = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
COPIES_WEIGHTS = (
    (ControlNetModel, "from_unet"),
    (ControlNetUnionModel, "from_unet"),
    (SparseControlNetModel, "from_unet"),
    (UNetControlNetXSModel, "from_unet"),
    (UNetMotionModel, "from_unet2d"),
)
CASTS = ("to", "half", "float")
REMOVE = "remove it first: unload_lora_weights(), unload_ip_adapter(), unfuse_qkv_projections()"


def is_vqdm(model) -> bool:
    """Whether a model holds the format of vqdm."""
    method = getattr(getattr(getattr(model, "hf_quantizer", None), "quantization_config", None), "quant_method", None)
    return method == Method.VQDM


def register_methods() -> None:
    """Wrap the methods; doing it twice changes nothing."""
    for kind in (ModelMixin, PreTrainedModel):
        for name in CASTS:
            _wrap(kind, name, _casting)
    _wrap(ModelMixin, "save_pretrained", _saving)
    _wrap(ModelMixin, "enable_layerwise_casting", _refusing_layerwise)
    _wrap(DiffusionPipeline, "save_pretrained", _saving_pipeline)
    for kind, name in COPIES_WEIGHTS:
        _wrap(kind, name, _copying)


def _wrap(kind: type, name: str, around: Callable) -> None:
    """Replace a method by `around` of it, a classmethod by a classmethod."""
    held = kind.__dict__[name]
    original = held.__func__ if isinstance(held, classmethod) else held
    if hasattr(original, "vqdm_original"):
        return
    replaced = wraps(original)(around(original))
    replaced.vqdm_original = original
    setattr(kind, name, classmethod(replaced) if isinstance(held, classmethod) else replaced)


# ------------------------------------------------------------------------------------------- casting


def _casting(original: Callable) -> Callable:
    def cast(self, *args, **options):
        if not is_vqdm(self):
            return original(self, *args, **options)
        narrow = [one for one in (*args, *options.values()) if isinstance(one, torch.dtype) and one not in CAST_TO]
        if narrow:
            raise ValueError(
                f"a model quantized by vqdm cannot be cast to {narrow[0]}: its codebooks would not survive"
            )
        with allow_casting(self):
            return original(self, *args, **options)

    return cast


def _refusing_layerwise(original: Callable) -> Callable:
    def enable_layerwise_casting(self, *args, **options):
        if is_vqdm(self):
            raise ValueError(
                "enable_layerwise_casting would round the codebooks and scales of a model quantized by vqdm to 8 bits; "
                "leave it out, the codes take less memory already"
            )
        return original(self, *args, **options)

    return enable_layerwise_casting


# ------------------------------------------------------------------------------------------- saving


def _saving(original: Callable) -> Callable:
    def save_pretrained(self, *args, **options):
        check_savable(self, args, options)
        return original(self, *args, **options)

    return save_pretrained


def _saving_pipeline(original: Callable) -> Callable:
    def save_pretrained(self, *args, **options):
        for part in self.components.values():
            check_savable(part, (None, None, *args[1:]), options)  # the second argument is safe_serialization here
        return original(self, *args, **options)

    return save_pretrained


def check_savable(model, args: tuple = (), options: dict | None = None) -> None:
    """Raise ValueError, before anything is written, where a quantized model's folder could not be loaded again.

    Args:
        model: anything; what vqdm did not quantize passes.
        args, options: arguments of `save_pretrained`.
    """
    if not is_vqdm(model):
        return
    options = dict(zip(("", "is_main_process", "save_function", "safe_serialization"), args, strict=False)) | (
        options or {}
    )
    if not options.get("safe_serialization", True) or options.get("use_flashpack"):
        raise ValueError(
            "a model quantized by vqdm is saved as safetensors; leave out safe_serialization=False and use_flashpack"
        )
    added = _added(model)
    if added:
        raise ValueError(f"{type(model).__name__} holds {added}, with which a saved folder cannot be loaded; {REMOVE}")


def _added(model: nn.Module) -> str | None:
    """The first tensor or module that a model holds beyond what its configuration describes."""
    adapted = next((name for name, _ in model.named_modules() if name.endswith(".base_layer")), None)
    if adapted or not isinstance(model, ModelMixin):
        return adapted and f"an adapter at {adapted.removesuffix('.base_layer')}"
    try:
        with init_empty_weights():
            described = type(model).from_config(model.config)
    except (ValueError, TypeError):  # an IP-Adapter changes the configuration
        return "an adapter"
    build_layers(described, model.hf_quantizer.quantization_config)
    return _first_beyond(model.state_dict(), described.state_dict())


def _first_beyond(held: Iterable[str], described: Iterable[str]) -> str | None:
    described = set(described)
    return next((name for name in held if name not in described), None)


# ------------------------------------------------------------------------------------------- copying weights


def _copying(original: Callable) -> Callable:
    def from_unet(cls, unet, *args, **options):
        return original(cls, plain_copy(unet) if is_vqdm(unet) else unet, *args, **options)

    return from_unet


def plain_copy(unet: nn.Module) -> nn.Module:
    """A dequantized copy, in the type that the model computes in.

    Raises ValueError where the model holds an adapter.
    """
    added = _added(unet)
    if added:
        raise ValueError(f"{type(unet).__name__} holds {added}; {REMOVE}")
    dtype = unet.conv_in.bias.dtype
    copied = copy.deepcopy(unet)
    copied.dequantize()
    return copied.to(dtype)
