"""A denoiser without its weights: what shapes alone say of it, within seconds and in little memory.

Letters: A guidance branches, B points in a batch, C channels.
"""

from __future__ import annotations

import inspect
import math
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from diffusers import AutoencoderKL, DiffusionPipeline, ModelMixin, UNet2DConditionModel
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from vqdm.config import RunConfig, flatten
from vqdm.devices import MatmulRates
from vqdm.diffusion.blocks import Layer
from vqdm.diffusion.denoisers import compute_dtype, denoiser_name, denoiser_of
from vqdm.diffusion.hessians import shared_inputs
from vqdm.diffusion.pipelines import MOST_TOKENS, image_size, networks, set_scheduler, stored_values
from vqdm.documents import read_json
from vqdm.errors import RunError

# What a part raises that wants other arguments, or has no operators on the meta device.
UNCALLABLE = (RunError, RuntimeError, ValueError, TypeError, NotImplementedError, AttributeError)
NETWORK_SHARE = 0.5  # of the rate of matrix products that a network reaches; an estimate
USUAL_TOKENS = 77  # of a prompt


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
        latents, outputs: recorded input and outputs of one point.
        conditioning: what is recorded with a prompt, of all branches.
        call: height and width of the latents, branches, and tokens of a prompt, as `meta_call` takes them.
        backward: activations of that call and a backward pass, where one is made.
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
    latents: int = 0
    outputs: int = 0
    conditioning: int = 0
    call: tuple[int, int, int, int] = (0, 0, 0, 0)
    backward: int = 0

    def call_seconds(self, rates: MatmulRates) -> float:
        """Estimate the seconds of a call on one point."""
        return self.step_flops / (NETWORK_SHARE * rates.model)

    def decode_seconds(self, rates: MatmulRates) -> float:
        """Estimate the seconds of decoding an image."""
        return self.decode_flops / (NETWORK_SHARE * rates.single)


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


def skeleton_pipeline(config: RunConfig, dtype: torch.dtype) -> DiffusionPipeline | None:
    """Return MODEL of a program's flags without weights: UNet and VAE on the meta device, text encoders missing.

    None where it is no folder with safetensors files of the usual parts; it is to be loaded then.
    """
    folder = Path(config.model)
    known = stored_values(config.model, config.variant) if folder.is_dir() else {}
    if not {"unet", "vae"} <= known.keys():
        return None
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
    set_scheduler(pipeline, config.sampling.scheduler)
    return pipeline


def meta_call(denoiser: ModelMixin, height: int, width: int, batch: int = 1, tokens: int = USUAL_TOKENS) -> dict:
    """Return the keyword arguments of a denoiser's call on the meta device.

    Args:
        height, width: of the latents.
        batch: A·B.
        tokens: of a prompt.

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
        "encoder_hidden_states": torch.empty(batch, tokens, width_of_text, device="meta", dtype=dtype),
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


def forward_cost(denoiser: ModelMixin, height: int, width: int, batch: int, tokens: int = USUAL_TOKENS) -> Cost:
    """Return what a call without gradients costs, on the meta device. Arguments are those of `meta_call`."""
    call = meta_call(denoiser, height, width, batch, tokens)
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
    with LiveBytes() as live, FlopCounterMode(display=False) as flops, fused_attention():
        call()
    return Cost(live.peak, flops.get_total_flops())


def under_autocast(denoiser: ModelMixin) -> ModelMixin:
    """Make a denoiser on the meta device, which has no autocast, compute as CUDA's does: norms in float32; in place."""
    for module in denoiser.modules():
        if isinstance(module, nn.GroupNorm | nn.LayerNorm):
            nn.Module.to(module, torch.float32)
            module.forward = partial(_cast, type(module).forward, module)
        elif isinstance(module, nn.Linear | nn.Conv2d):
            module.forward = partial(_cast, type(module).forward, module)
    return denoiser


def _cast(forward: Callable, module: nn.Module, x: Tensor, *args) -> Tensor:
    return forward(module, x if module.weight is None else x.to(module.weight.dtype), *args)


def training_bytes(
    denoiser: ModelMixin, call: tuple[int, int, int, int], checkpointing: bool, layers: Iterable[str] | None = None
) -> int:
    """Return the most bytes of tensors that a call and its backward pass make at once, on the meta device.

    Gradients of weights are made one by one, as by layers that decode in each pass; they do not stay.

    Args:
        call: height and width of the latents, batch, and tokens, as of `meta_call`.
        layers: names of the layers whose weights take gradients; None for all parameters.
    """
    given = denoiser.parameters() if layers is None else (denoiser.get_submodule(name).weight for name in layers)
    call, weights = meta_call(denoiser, *call), list(given)
    hooks = [weight.requires_grad_(True).register_post_accumulate_grad_hook(_drop_gradient) for weight in weights]
    if checkpointing:
        denoiser.enable_gradient_checkpointing()
    try:
        with torch.enable_grad(), LiveBytes() as live, fused_attention():
            denoiser(**call).sample.float().square().sum().backward()
    finally:
        denoiser.requires_grad_(False).disable_gradient_checkpointing()
        for hook in hooks:
            hook.remove()
    return live.peak


def _drop_gradient(weight: nn.Parameter) -> None:
    weight.grad = None


@contextmanager
def fused_attention() -> Iterator[None]:
    """Inside, attention is that of a fused kernel; on the meta device torch's own choice makes all scores.

    A function mode would not reach what checkpointing computes again.
    """
    functional = torch.nn.functional
    usual = functional.scaled_dot_product_attention

    def fused(query: Tensor, key: Tensor, value: Tensor, *_, **__) -> Tensor:
        found = torch.ops.aten._scaled_dot_product_efficient_attention(query, key, value, None, torch.is_grad_enabled())
        return found[0]

    functional.scaled_dot_product_attention = fused
    try:
        yield
    finally:
        functional.scaled_dot_product_attention = usual


def prompt_tokens(pipeline: DiffusionPipeline) -> int:
    """Return the number of tokens that a pipeline's first tokenizer fills up a prompt to."""
    names = sorted(name for name in pipeline.components if name.startswith("tokenizer"))
    lengths = [getattr(getattr(pipeline, name), "model_max_length", MOST_TOKENS) for name in names]
    return next((length for length in lengths if length < MOST_TOKENS), USUAL_TOKENS)


def shapes_of(pipeline: DiffusionPipeline, config: RunConfig, points: int = 0) -> Shapes | None:
    """Return the shapes of a pipeline, whose weights may be missing; None where its parts cannot be called as usual.

    Args:
        points: bytes of recorded points.
    """
    sampling, denoiser, component = config.sampling, denoiser_of(pipeline), denoiser_name(pipeline)
    if denoiser.device.type == "meta":
        values = stored_values(config.model, config.variant, config.revision)
    else:
        values = {name: sum(one.numel() for one in part.parameters()) for name, part in networks(pipeline).items()}
    dtype, scale = compute_dtype(denoiser), pipeline.vae_scale_factor
    size = [side // scale for side in image_size(pipeline, sampling.height, sampling.width)]
    bytes_of = {name: dtype.itemsize * count for name, count in values.items()}
    guidance = inspect.signature(pipeline.__call__).parameters.get("guidance_scale")
    given = sampling.guidance_scale if sampling.guidance_scale is not None else guidance and guidance.default
    wide = dtype == torch.float16 and pipeline.vae.config.get("force_upcast")
    branches = 2 if (given or 0) > 1 else 1
    try:
        call = (*size, branches, prompt_tokens(pipeline))
        latents = dtype.itemsize * denoiser.config.in_channels * math.prod(size)
        meta = meta_denoiser(type(denoiser), denoiser.config, dtype)
        step, given = forward_cost(meta, *call), meta_call(meta, *call)
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
        latents=latents,
        outputs=branches * latents,
        conditioning=sum(one.nbytes for name, one in flatten(given).items() if name not in ("sample", "timestep")),
        call=call,
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
