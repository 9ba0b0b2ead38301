"""A denoiser without its weights: what shapes alone say of it, within seconds and in little memory.

Letters: A guidance branches, B points in a batch, C channels.
"""

from __future__ import annotations

import inspect
import math
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from diffusers import AutoencoderKL, DiffusionPipeline, ModelMixin, UNet2DConditionModel
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from vqdm.config import SamplingConfig
from vqdm.diffusion.blocks import Layer
from vqdm.diffusion.denoisers import compute_dtype, denoiser_name, denoiser_of
from vqdm.diffusion.hessians import shared_inputs
from vqdm.diffusion.pipelines import image_size, set_scheduler
from vqdm.documents import read_json
from vqdm.errors import RunError

# What a part raises that wants other arguments, or has no operators on the meta device.
UNCALLABLE = (RunError, RuntimeError, ValueError, TypeError, NotImplementedError, AttributeError)
QKV = ("query", "key", "value")
TOKENS = 77  # of a prompt; the length changes no weight


@dataclass(frozen=True)
class Shapes:
    """What the plan needs of a model, all in bytes.

    Attributes:
        denoiser, text, vae: weights in the type that is computed in.
        step: activations of a call on one point, all of its branches.
        decode: activations, and weights in float32, while the VAE decodes one image.
        pipeline: all weights.
        points: recorded points of all prompts.
        positions: of the latents of one point, of all branches: a number, not bytes.
        itemsize: of a value in the type that is computed in.
        step_flops, decode_flops: floating-point operations of that call, and of decoding an image.
    """

    denoiser: int
    text: int
    vae: int
    step: int
    decode: int
    pipeline: int
    points: int
    positions: int
    itemsize: int
    step_flops: int = 0
    decode_flops: int = 0


def meta_denoiser(kind: type[ModelMixin], config: Mapping, dtype: torch.dtype = torch.float32) -> ModelMixin:
    """Return a denoiser of a class and a configuration on the meta device: shapes and types, no values."""
    plain = {name: value for name, value in config.items() if name != "quantization_config"}
    with torch.device("meta"):
        denoiser = kind.from_config(plain)
    return nn.Module.to(denoiser, dtype).eval().requires_grad_(False)  # diffusers' own warns of nothing


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
    unet = meta_denoiser(UNet2DConditionModel, UNet2DConditionModel.load_config(folder / "unet"), dtype)
    with torch.device("meta"):
        vae = AutoencoderKL.from_config(AutoencoderKL.load_config(folder / "vae"))
    missing = {name: None for name in named if name.startswith(("text_encoder", "image_encoder"))}
    pipeline = DiffusionPipeline.from_pretrained(folder, unet=unet, vae=nn.Module.to(vae, dtype), **missing)
    set_scheduler(pipeline, scheduler)
    return pipeline


def meta_call(denoiser: ModelMixin, height: int, width: int, batch: int = 1) -> dict:
    """Return the keyword arguments of a denoiser's call on the meta device.

    Args:
        height, width: of the latents.
        batch: A·B.

    Raises:
        NotImplementedError: its arguments are not known.
    """
    if not isinstance(denoiser, UNet2DConditionModel):
        raise NotImplementedError(f"what a {type(denoiser).__name__} is called with is not known")
    config, dtype = denoiser.config, denoiser.dtype
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


def input_groups(denoiser: ModelMixin, layers: list[Layer], height: int, width: int) -> list[list[Layer]]:
    """Group layers by the input that they share, as `hessians.shared_inputs`; `denoiser` is on the meta device.

    Each layer has a group of its own where the denoiser cannot be called with these arguments alone.
    """
    try:
        return shared_inputs(denoiser, layers, meta_call(denoiser, height, width))
    except UNCALLABLE:
        return [[layer] for layer in layers]


class Cost(NamedTuple):
    """The most bytes of tensors that a call makes at once, and its floating-point operations."""

    bytes: int
    flops: int


def forward_cost(denoiser: ModelMixin, height: int, width: int, batch: int) -> Cost:
    """Return what a call without gradients costs, on the meta device."""
    call = meta_call(denoiser, height, width, batch)
    with torch.no_grad():
        return _cost(lambda: denoiser(**call))


def decode_cost(vae: nn.Module, height: int, width: int) -> Cost:
    """Return what a VAE on the meta device costs that decodes one image.

    Args:
        height, width: of the latents.
    """
    latents = torch.empty(1, vae.config.latent_channels, height, width, device="meta", dtype=vae.dtype)
    with torch.no_grad():
        return _cost(lambda: vae.decode(latents))


def _cost(call: Callable[[], object]) -> Cost:
    with LiveBytes() as live, FlopCounterMode(display=False) as flops, _FusedAttention() as attention:
        call()
    return Cost(live.peak, flops.get_total_flops() + attention.flops)


class _FusedAttention(TorchFunctionMode):
    """Inside, attention makes its output alone, as fused kernels do; on the meta device it would make all scores."""

    def __init__(self):
        super().__init__()
        self.flops = 0

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is not torch.nn.functional.scaled_dot_product_attention:
            return function(*args, **kwargs)
        query, key, value = ((dict(zip(QKV, args, strict=False)) | kwargs)[name] for name in QKV)
        self.flops += sdpa_flop_count(query.shape, key.shape, value.shape)
        return query.new_empty(*query.shape[:-1], value.shape[-1])


def shapes_of(
    pipeline: DiffusionPipeline, sampling: SamplingConfig, values: dict[str, int], points: int
) -> Shapes | None:
    """Return the shapes of a pipeline, whose weights may be missing; None where its parts cannot be called as usual.

    Args:
        values: number of those of every part, by name.
        points: bytes of recorded points.
    """
    denoiser, component = denoiser_of(pipeline), denoiser_name(pipeline)
    dtype, scale = compute_dtype(denoiser), pipeline.vae_scale_factor
    size = [side // scale for side in image_size(pipeline, sampling.height, sampling.width)]
    bytes_of = {name: dtype.itemsize * count for name, count in values.items()}
    guidance = inspect.signature(pipeline.__call__).parameters.get("guidance_scale")
    given = sampling.guidance_scale if sampling.guidance_scale is not None else guidance and guidance.default
    wide = dtype == torch.float16 and pipeline.vae.config.get("force_upcast")
    branches = 2 if (given or 0) > 1 else 1
    try:
        step = forward_cost(meta_denoiser(type(denoiser), denoiser.config, dtype), *size, branches)
        vae = meta_copy(pipeline.vae, torch.float32 if wide else dtype)
        decode = decode_cost(vae, *size)
    except UNCALLABLE:
        return None
    return Shapes(
        denoiser=bytes_of[component],
        text=sum(count for name, count in bytes_of.items() if name not in (component, "vae")),
        vae=bytes_of["vae"],
        step=step.bytes,
        decode=sum(tensor.nbytes for tensor in vae.parameters()) + decode.bytes,
        pipeline=sum(bytes_of.values()),
        points=points,
        positions=branches * math.prod(size),
        itemsize=dtype.itemsize,
        step_flops=step.flops,
        decode_flops=decode.flops,
    )


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of the storages that operators make inside, and the most that were alive at once.

    What an operator takes and gives back inside, such as oneDNN's reordered weights, is not seen.
    """

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self._known = weakref.WeakSet()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        given = {tensor.untyped_storage() for tensor in tree_leaves((args, kwargs)) if isinstance(tensor, torch.Tensor)}
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage() not in given:
                self._count(tensor.untyped_storage())
        return result

    def _count(self, storage):
        if storage not in self._known:
            self._known.add(storage)
            self._add(storage.nbytes())
            weakref.finalize(storage, self._add, -storage.nbytes())

    def _add(self, count):
        self.now += count
        self.peak = max(self.peak, self.now)
