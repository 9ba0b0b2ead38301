"""Quantize a CLIP text encoder, layer of the transformer by layer, as `quantization.job` does a denoiser's blocks."""

from __future__ import annotations

import re
from functools import partial
from itertools import groupby

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from vqdm.additive.solve import LayerReport, SolverConfig, solve_layer
from vqdm.diffusion.blocks import Layer
from vqdm.diffusion.hessians import record_hessians, shared_inputs
from vqdm.diffusion.model_folders import quantized_by
from vqdm.diffusion.trajectories import batches
from vqdm.layers.quantized import decoded_once, swap
from vqdm.storage.hf import mark_text_quantized, short_name
from vqdm.storage.run_folder import layer_generator

HELD_OUT_EVERY = 8  # of the batches, one in this many is held out
_LINEAR = re.compile(r"((?:text_model\.)?encoder\.layers\.\d+)\.(self_attn\.(?:[qkv]|out)_proj|mlp\.fc[12])")


def text_layers(model: PreTrainedModel, config: SolverConfig) -> list[Layer]:
    """Every Linear of the transformer's layers, in order.

    Raises:
        ValueError: there is none, or one does not divide into groups.
    """
    found = [match for name, _ in model.named_modules() if (match := _LINEAR.fullmatch(name))]
    if not found:
        raise ValueError(f"{type(model).__name__} has no encoder layers of CLIP's kind")
    layers = []
    for match in found:
        rows, columns = model.get_submodule(match[0]).weight.shape
        try:
            config.spec.check_shape(rows, columns)
        except ValueError as error:
            raise ValueError(f"layer {match[0]}: {error}") from None
        layers.append(Layer(match[0], match[1], "linear", rows, columns, config.spec))
    return layers


def quantize_text_encoder(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[str],
    config: SolverConfig | None = None,
    seed: int = 0,
    batch_size: int = 16,
) -> dict[str, LayerReport]:
    """Quantize a `CLIPTextModel` or `CLIPTextModelWithProjection` in place, each layer with those before it quantized.

    Embeddings, norms and `text_projection` stay as they are. All positions count, padding too: the UNet sees them all.
    `save_pretrained` of the model, or of a pipeline that holds it, then writes the format.

    Args:
        prompts: to record second moments of layer inputs on; a few hundred suffice.
        config: the code's format and the search; three 8-bit codebooks at group 8 by default.
        seed: with the name of a layer, of its random numbers.
        batch_size: batch size, in prompts.

    Returns:
        Name of the layer → its report; `held_out_error` is None for fewer than 8 batches.

    Raises:
        ValueError: no prompts, a model of another kind or quantized itself, or layers that do not divide into groups.
    """
    config = config or SolverConfig()
    if not prompts:
        raise ValueError("prompts is empty")
    method = quantized_by(model)
    if method:
        raise ValueError(f"{type(model).__name__} is quantized itself ({method}); give the full-precision model")
    calls = [partial(_call, model, tokenizer, batch) for batch in batches(prompts, batch_size)]
    reports = {}
    for _, layers in groupby(text_layers(model, config), key=lambda layer: layer.block):
        reports |= _quantize_layers(model, list(layers), calls, config, seed)
    mark_text_quantized(model)
    return reports


def _call(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: list[str]) -> dict[str, Tensor]:
    """Token ids [B, T], padded as pipelines do."""
    length = min(tokenizer.model_max_length, model.config.max_position_embeddings)
    tokens = tokenizer(prompts, padding="max_length", max_length=length, truncation=True, return_tensors="pt")
    return {"input_ids": tokens.input_ids.to(model.device)}


def _quantize_layers(
    model: PreTrainedModel, layers: list[Layer], calls: list[partial], config: SolverConfig, seed: int
) -> dict[str, LayerReport]:
    """Record Hessians of one block, quantize its layers, and swap them."""
    held_out = calls[HELD_OUT_EVERY - 1 :: HELD_OUT_EVERY]
    training = [call for call in calls if call not in held_out]
    first = calls[0]()
    groups = shared_inputs(model, layers, first)
    with decoded_once(model):
        hessians = record_hessians(model, groups, first, training, held_out)
    codes, reports = {}, {}
    for group in groups:
        for layer in group:
            weight = model.get_submodule(layer.name).weight.detach().float()
            generator = layer_generator(seed, short_name(layer.name))
            hessian, held_out = hessians[group[0].name]
            codes[layer.name], reports[layer.name] = solve_layer(weight, hessian, config, generator, held_out)
    for name, code in codes.items():
        swap(model, name, config.spec).set_code(code)
    return reports
