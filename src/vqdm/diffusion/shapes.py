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

import diffusers
import torch
import transformers
from diffusers import DiffusionPipeline, ModelMixin
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedModel

from vqdm.config import COMPONENTS, RunConfig
from vqdm.devices import MatmulRates
from vqdm.diffusion.blocks import Layer
from vqdm.diffusion.denoisers import (
    FAMILIES,
    TIMESTEP_NAMES,
    block_names,
    compute_dtype,
    denoiser_name,
    denoiser_of,
    denoisers_of,
    family_of,
    output_of,
)
from vqdm.diffusion.hessians import input_hooks, shared_inputs
from vqdm.diffusion.pipelines import (
    MOST_TOKENS,
    absent_parts,
    bytes_in_ram,
    check_headers,
    image_size,
    latent_scale,
    networks,
    set_scheduler,
)
from vqdm.diffusion.sampling import called_steps
from vqdm.documents import read_json
from vqdm.errors import RunError

# What a part raises that wants other arguments, or has no operators on the meta device.
UNCALLABLE = (RunError, RuntimeError, ValueError, TypeError, NotImplementedError, AttributeError)
NETWORK_SHARE = 0.5  # of the rate of matrix products that a network reaches; an estimate
USUAL_TOKENS = 77  # of a prompt, as CLIP's encoders are given it
UNPADDED_TOKENS = 128  # of a long prompt that is not filled up


@dataclass(frozen=True)
class Shapes:
    """What the plan needs of a model, all in bytes.

    Attributes:
        denoiser, text, vae: weights in the type that is computed in.
        step: activations of a call on one point, all of its branches.
        decode: activations, and weights in float32, while the VAE decodes one image.
        pipeline: all weights.
        points: recorded points of all prompts.
        positions: the most samples that a layer sees of one point, of all branches: a number, not bytes.
        itemsize: of a value in the type that is computed in.
        step_flops, decode_flops: floating-point operations of that call, and of decoding an image.
        latents, outputs: recorded input and outputs of one point.
        conditioning: what is recorded with a prompt, of all branches.
        call: height and width of the latents, branches, and tokens of a prompt, as `meta_call` takes them.
        backward: activations of that call and a backward pass, where one is made.
        encoding: activations of a text encoder for one prompt, and for each further one of a batch.
        calls, steps: the calls of a denoising step, and the steps.
        own_steps: of the steps, those at which this denoiser is called and not another expert.
        experts: the denoisers that are called in turn.
        others: weights of the other denoisers.
        outside, block: of the weights, those outside of the blocks, and of the largest block.
        waiting: what blocks returned that a point waits with for the next block, where all go block by block.
        denoisers_in_ram, others_in_ram: what the weights of all denoisers, and of all other networks, take of RAM while
            they are on the CPU; those that are mapped from files take none.
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
    encoding: tuple[int, int] = (0, 0)
    calls: int = 1
    steps: int = 50
    own_steps: int = 50
    experts: int = 1
    others: int = 0
    outside: int = 0
    block: int = 0
    waiting: int = 0
    denoisers_in_ram: int = 0
    others_in_ram: int = 0

    def encoded(self, prompts: int) -> int:
        """Return the bytes of text encoders, and of what they make of a batch of prompts."""
        return self.text + self.encoding[0] + (prompts - 1) * self.encoding[1]

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
    """Return MODEL of a program's flags with its networks on the meta device, made of configurations alone.

    None where it is no folder with the usual parts of a known family; it is to be loaded then.

    Raises:
        UserError: a weight file is damaged, of which the plan needs the header.
    """
    folder = Path(config.model)
    if not folder.is_dir():
        return None
    index = read_json(folder / "model_index.json")
    named = {name: value for name, value in index.items() if isinstance(value, list) and value[0]}
    if "vae" not in named or not any(name in named and named[name][1] in FAMILIES for name in COMPONENTS):
        return None
    check_headers(config)
    parts = dict.fromkeys(absent_parts(config.model, config.revision, offline=True))
    try:
        for name, (library, kind) in named.items():
            kind = getattr({"diffusers": diffusers, "transformers": transformers}[library], kind)
            if issubclass(kind, ModelMixin):
                parts[name] = meta_denoiser(kind, kind.load_config(folder / name), dtype)
            elif issubclass(kind, PreTrainedModel):
                parts[name] = meta_encoder(kind, kind.config_class.from_pretrained(folder / name), dtype)
    except (KeyError, AttributeError, TypeError, OSError, ValueError):
        return None
    pipeline = DiffusionPipeline.from_pretrained(folder, **parts)
    set_scheduler(pipeline, config.sampling.scheduler)
    return pipeline


def meta_encoder(kind: type[PreTrainedModel], config, dtype: torch.dtype) -> PreTrainedModel:
    """Return a text encoder of a class and a configuration on the meta device."""
    with torch.device("meta"):
        encoder = kind._from_config(config)
    return nn.Module.to(encoder, dtype).eval().requires_grad_(False)


def encoding_bytes(pipeline: DiffusionPipeline, dtype: torch.dtype) -> tuple[int, int]:
    """Return the most bytes of tensors that a text encoder makes at once for one prompt, and for each further one.

    An encoder that wants more arguments is left out.
    """
    known = inspect.signature(pipeline.__call__).parameters.get("max_sequence_length")
    found, tokens = [(0, 0)], known.default if known else prompt_tokens(pipeline)
    for part in networks(pipeline).values():
        if isinstance(part, PreTrainedModel):
            encoder = meta_encoder(type(part), part.config, dtype)
            length = min(tokens, getattr(part.config, "max_position_embeddings", tokens))
            ids = [torch.zeros(count, length, dtype=torch.int64, device="meta") for count in (1, 2)]
            try:
                with torch.no_grad():
                    one, two = (_cost(partial(encoder, some)).bytes for some in ids)
            except UNCALLABLE:
                continue
            found.append((one, two - one))
    return max(found)


# ------------------------------------------------------------------------------------------------------------- calls


def meta_call(denoiser: ModelMixin, height: int, width: int, batch: int = 1, tokens: int = USUAL_TOKENS) -> dict:
    """Return the keyword arguments of a denoiser's call on the meta device.

    Args:
        height, width: of the latents.
        batch: A·B.
        tokens: of a prompt.

    Raises:
        NotImplementedError: its arguments are not known.
    """
    kind = type(denoiser).__name__
    if kind not in ARGUMENTS:
        raise NotImplementedError(f"what a {kind} is called with is not known")
    made = partial(torch.empty, device="meta", dtype=denoiser.dtype)
    return ARGUMENTS[kind](denoiser.config, made, height, width, batch, tokens)


def _of_unet(config: Mapping, made: Callable, height: int, width: int, batch: int, tokens: int) -> dict:
    widths = config.cross_attention_dim
    call = {
        "sample": made(batch, config.in_channels, height, width),
        "timestep": made(batch, dtype=torch.float32),
        "encoder_hidden_states": made(batch, tokens, widths if isinstance(widths, int) else max(widths)),
    }
    if config.addition_embed_type == "text_time":
        pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
        call["added_cond_kwargs"] = {"text_embeds": made(batch, pooled), "time_ids": made(batch, 6)}
    return call


def _of_images(config: Mapping, made: Callable, height: int, width: int, batch: int, tokens: int) -> dict:
    """Latents as images: SD3 with pooled texts, PixArt and Sana with a mask of the text."""
    call = {"hidden_states": made(batch, config.in_channels, height, width), "timestep": made(batch)}
    if "pooled_projection_dim" in config:
        text = {"encoder_hidden_states": made(batch, tokens, config.joint_attention_dim)}
        return call | text | {"pooled_projections": made(batch, config.pooled_projection_dim)}
    call["encoder_hidden_states"] = made(batch, tokens, config.caption_channels)
    call["encoder_attention_mask"] = made(batch, tokens, dtype=torch.int64)
    if "use_additional_conditions" in config:
        call["added_cond_kwargs"] = {"resolution": None, "aspect_ratio": None}
    return call


def _of_tokens(config: Mapping, made: Callable, height: int, width: int, batch: int, tokens: int) -> dict:
    """Latents as tokens of 2 × 2 each: FLUX with ids of all tokens, Qwen-Image with the image's height and width."""
    rows, columns = height // 2, width // 2
    call = {
        "hidden_states": made(batch, rows * columns, config.in_channels),
        "encoder_hidden_states": made(batch, tokens, config.joint_attention_dim),
        "timestep": made(batch),
    }
    if "pooled_projection_dim" in config:  # FLUX.1, whose ids have no batch dimension
        call |= {"pooled_projections": made(batch, config.pooled_projection_dim)}
        call |= {"img_ids": made(rows * columns, 3), "txt_ids": made(tokens, 3)}
    elif "timestep_guidance_channels" in config:  # FLUX.2
        whole = partial(made, dtype=torch.int64)
        call |= {"img_ids": whole(batch, rows * columns, 4), "txt_ids": whole(batch, tokens, 4)}
    else:
        call["img_shapes"] = [[(1, rows, columns)]] * batch
    return call | ({"guidance": made(batch)} if config.guidance_embeds else {})


def _of_lists(config: Mapping, made: Callable, height: int, width: int, batch: int, tokens: int) -> dict:
    """Latents and texts in lists, as of Z-Image."""
    latents = [made(config.in_channels, 1, height, width) for _ in range(batch)]
    return {"x": latents, "t": made(batch), "cap_feats": [made(tokens, config.cap_feat_dim) for _ in range(batch)]}


def _of_frames(config: Mapping, made: Callable, height: int, width: int, batch: int, tokens: int) -> dict:
    """Latents of a video of one frame, as of Wan."""
    latents = made(batch, config.in_channels, 1, height, width)
    return {
        "hidden_states": latents,
        "timestep": made(batch),
        "encoder_hidden_states": made(batch, tokens, config.text_dim),
    }


ARGUMENTS = {
    "UNet2DConditionModel": _of_unet,
    "FluxTransformer2DModel": _of_tokens,
    "SD3Transformer2DModel": _of_images,
    "PixArtTransformer2DModel": _of_images,
    "SanaTransformer2DModel": _of_images,
    "QwenImageTransformer2DModel": _of_tokens,
    "ZImageTransformer2DModel": _of_lists,
    "Flux2Transformer2DModel": _of_tokens,
    "WanTransformer3DModel": _of_frames,
}


def guidance_calls(pipeline: DiffusionPipeline, guidance_scale: float | None) -> tuple[int, int]:
    """Return the guidance branches of a denoiser's call, and its calls at every step; None is the pipeline's own."""
    denoiser = denoiser_of(pipeline)
    row = family_of(denoiser)
    known = inspect.signature(pipeline.__call__).parameters.get(row.guidance)
    scale = guidance_scale if guidance_scale is not None else known and known.default
    embedded = row.guided_by == "input" or (row.guided_by == "call" and denoiser.config.get("guidance_embeds"))
    if embedded or not (scale or 0) > 1:
        return 1, 1
    return (1, 2) if row.guided_by == "call" else (2, 1)


def prompt_tokens(pipeline: DiffusionPipeline) -> int:
    """Return the number of tokens that a pipeline fills up a prompt to; a usual one where it does not."""
    row, length = family_of(denoiser_of(pipeline)), inspect.signature(pipeline.__call__).parameters
    if "max_sequence_length" in length:  # the texts of Stable Diffusion 3 are CLIP's, and then the T5's
        clip = pipeline.tokenizer_max_length if "tokenizer_3" in pipeline.components else 0
        return length["max_sequence_length"].default + clip if row.padded else UNPADDED_TOKENS
    names = sorted(name for name in pipeline.components if name.startswith("tokenizer"))
    lengths = [getattr(getattr(pipeline, name), "model_max_length", MOST_TOKENS) for name in names]
    return next((length for length in lengths if length < MOST_TOKENS), USUAL_TOKENS)


def own_steps(pipeline: DiffusionPipeline, steps: int | None) -> int:
    """Return the number of denoising steps; None is the pipeline's own."""
    known = inspect.signature(pipeline.__call__).parameters.get("num_inference_steps")
    return steps or (known and known.default) or 50


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


def most_rows(denoiser: ModelMixin, height: int, width: int, batch: int, tokens: int = USUAL_TOKENS) -> int:
    """Return the most samples, as of a Hessian, that a layer sees in a call. Arguments are those of `meta_call`."""
    found, call = [0], meta_call(denoiser, height, width, batch, tokens)
    names = [name for name, one in denoiser.named_modules() if isinstance(one, nn.Linear | nn.Conv2d)]

    def seen(_: str, module: nn.Module, x: Tensor) -> None:
        channels = x.shape[-1] if isinstance(module, nn.Linear) else x.shape[1] * math.prod(module.stride)
        found.append(x.numel() // channels)

    with torch.no_grad(), input_hooks(denoiser, names, seen):
        denoiser(**call)
    return max(found)


def block_bytes(denoiser: ModelMixin, height: int, width: int, batch: int, tokens: int) -> dict[str, int]:
    """Return `outside`, `block` and `waiting` of `Shapes`. Arguments are those of `meta_call`."""
    names = block_names(denoiser)
    sizes = [sum(one.nbytes for one in denoiser.get_submodule(name).parameters()) for name in names]
    returned: dict[str, int] = {}  # the most of a list

    def seen(name: str, _, args, output) -> None:
        of = name.rpartition(".")[0]
        returned[of] = max(returned.get(of, 0), _bytes(output))

    hooks = [denoiser.get_submodule(name).register_forward_hook(partial(seen, name)) for name in names]
    try:
        with torch.no_grad():
            denoiser(**meta_call(denoiser, height, width, batch, tokens))
    finally:
        for hook in hooks:
            hook.remove()
    whole, most = sum(one.nbytes for one in denoiser.parameters()), list(returned.values())
    waiting = max([*most, sum(most[:-1])], default=0)  # what two lists before a third return waits for it
    return {"outside": whole - sum(sizes), "block": max(sizes, default=0), "waiting": waiting}


def decode_cost(vae: nn.Module, height: int, width: int) -> Cost:
    """Return what a VAE on the meta device costs that decodes one image.

    Args:
        height, width: of the latents.
    """
    channels, frames = vae.config.get("latent_channels"), [] if "latent_channels" in vae.config else [1]
    channels = channels or vae.config.z_dim  # of a VAE for videos too
    latents = torch.empty(1, channels, *frames, height, width, device="meta", dtype=vae.dtype)
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
            output_of(denoiser(**call)).float().square().sum().backward()
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


def _bytes(tree) -> int:
    return sum(one.nbytes for one in tree_leaves(tree) if isinstance(one, Tensor))


def shapes_of(
    pipeline: DiffusionPipeline, config: RunConfig, component: str | None = None, given: bool = False
) -> Shapes | None:
    """Return the shapes of a pipeline, whose weights may be missing; None where its parts cannot be called as usual.

    Args:
        component: the denoiser, of two experts; by default the first.
        given: whether the pipeline was given loaded, and not read from the files of `config`.
    """
    sampling, component = config.sampling, component or denoiser_name(pipeline)
    denoiser, experts = getattr(pipeline, component), denoisers_of(pipeline)
    steps = own_steps(pipeline, sampling.num_inference_steps)
    values = {name: sum(one.numel() for one in part.parameters()) for name, part in networks(pipeline).items()}
    dtype, scale = compute_dtype(denoiser), latent_scale(pipeline)
    size = [side // scale for side in image_size(pipeline, sampling.height, sampling.width)]
    bytes_of = {name: dtype.itemsize * count for name, count in values.items()}
    wide = dtype == torch.float16 and pipeline.vae.config.get("force_upcast")
    branches, calls = guidance_calls(pipeline, sampling.guidance_scale)
    try:
        call = (*size, branches, prompt_tokens(pipeline))
        meta = meta_denoiser(type(denoiser), denoiser.config, dtype)
        step, arguments = forward_cost(meta, *call), meta_call(meta, *call)
        rows, blocks = most_rows(meta, *call), block_bytes(meta, *call)
        vae = meta_copy(pipeline.vae, torch.float32 if wide else dtype)
        decode = decode_cost(vae, *size)
    except UNCALLABLE:
        return None
    tensors = {
        name: sum(one.nbytes for one in tree_leaves(held) if isinstance(one, Tensor))
        for name, held in arguments.items()
    }
    latents, in_ram = tensors.pop(next(iter(arguments))) // branches, bytes_in_ram(config, pipeline, given)
    denoisers_in_ram = sum(in_ram.pop(name) for name in COMPONENTS if name in in_ram)
    return Shapes(
        denoiser=bytes_of[component],
        text=sum(count for name, count in bytes_of.items() if name not in (*COMPONENTS, "vae")),
        vae=bytes_of["vae"],
        step=step.bytes,
        decode=sum(tensor.nbytes for tensor in vae.parameters()) + decode.bytes,
        pipeline=sum(bytes_of.values()),
        points=0,
        positions=rows,
        itemsize=dtype.itemsize,
        step_flops=step.flops,
        decode_flops=decode.flops,
        latents=latents,
        outputs=branches * latents,
        conditioning=len(experts) * calls * sum(held for name, held in tensors.items() if name not in TIMESTEP_NAMES),
        call=call,
        encoding=encoding_bytes(pipeline, dtype),
        calls=calls,
        steps=steps,
        own_steps=called_steps(pipeline, component, steps) if len(experts) > 1 else steps,
        experts=len(experts),
        others=sum(bytes_of[name] for name in COMPONENTS if name in bytes_of and name != component),
        denoisers_in_ram=denoisers_in_ram,
        others_in_ram=sum(in_ram.values()),
        **blocks,
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
