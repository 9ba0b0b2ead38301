"""What a text encoder is calibrated on and scored by: prompts, through the pipeline's own `encode_prompt`.

So templates, padding and the layers that the embeddings are taken from are those of the pipeline. `quantization.job`
then quantizes an encoder as it does a denoiser: the classes here give it the calls to record Hessians on, and what an
error of a layer is measured by.

Letters: B prompts of a batch, T tokens of a prompt, C channels.
"""

from __future__ import annotations

import copy
import inspect
import re
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn
from torch.utils._pytree import tree_map
from transformers import PreTrainedModel

from vqdm.additive.code import CodeSpec
from vqdm.diffusion.blocks import Layer, select_layers
from vqdm.diffusion.denoisers import block_names, denoisers_of
from vqdm.diffusion.hessians import DenoiserCall, HessianStore
from vqdm.diffusion.model_folders import check_loaded
from vqdm.diffusion.pipelines import networks, parameter_bytes, sample, stored_bytes
from vqdm.errors import UserError
from vqdm.fidelity import decibels
from vqdm.layers.quantized import decoded_once
from vqdm.quantization.allocation import check_target
from vqdm.quantization.config import IntermediateConfig, QuantizeConfig
from vqdm.quantization.layerwise import quantize_layers
from vqdm.quantization.plan import Int8Totals, hessian_bytes, keeps_hessians, plain_bits, planned_size
from vqdm.quantization.recording import HessianRecorder
from vqdm.quantization.shared_codebooks import shared
from vqdm.storage.hf import mark_text_quantized
from vqdm.tracking import log_info

if TYPE_CHECKING:
    from vqdm.quantization.job import Job

HELD_OUT_EVERY = 8  # of the calibration prompts, one in this many is held out
OTHER_SENSES = re.compile(r"(.*\.)?(visual|vision\w*|image\w*|audio\w*|multi_modal_projector)(\..*)?")
KINDS = ("tokens", "pooled")  # of embeddings: a vector per token, and one per prompt


# ------------------------------------------------------------------------------------------- layers


def text_encoders(pipeline: DiffusionPipeline) -> dict[str, PreTrainedModel]:
    """Return the text encoders of a pipeline by name."""
    found = networks(pipeline).items()
    return {name: part for name, part in found if "encoder" in name and isinstance(part, PreTrainedModel)}


def text_layers(model: nn.Module, spec: CodeSpec, overridden_spec: CodeSpec | None = None) -> list[Layer]:
    """Return every Linear inside the blocks that read text, in their order.

    Embeddings, norms, projections of the output, and what sees images stay.

    Raises:
        ValueError: there is none, or one does not divide into groups of `spec`; a UserError.
    """
    blocks = [re.escape(name) for name in block_names(model) if not OTHER_SENSES.fullmatch(name)]
    if not blocks:
        raise UserError(f"{type(model).__name__} has no blocks of layers that read text")
    return select_layers(model, rf"^(?:{'|'.join(blocks)})\.", 0, spec, {}, overridden_spec)


# ------------------------------------------------------------------------------------------- recording


class _Encoded(Exception):
    pass


@dataclass
class Encoding:
    """A batch of prompts, as a pipeline encodes it on the way to its first call of the denoiser.

    Attributes:
        arguments: of each call of `encode_prompt`, by name.
        results: what each returned, on the CPU.
        calls: by encoder, the arguments of each of its calls by name, tensors on the CPU.
    """

    arguments: list[dict] = field(default_factory=list)
    results: list = field(default_factory=list)
    calls: dict[str, list[dict]] = field(default_factory=dict)

    @property
    def masked(self) -> bool:
        """Whether padding is cut off from the embeddings, or the denoiser is told of it by a mask."""
        return any(isinstance(one, list) or _is_mask(one) for result in self.results for one in _items(result))


def encode(pipeline: DiffusionPipeline, prompts: list[str], settings: dict) -> Encoding:
    """Record what a pipeline does to encode prompts; its denoiser is not called.

    Args:
        settings: keyword arguments of the pipeline's call.

    Raises:
        UserError: the pipeline does not encode its prompts by an `encode_prompt`.
    """
    made, original = Encoding(), getattr(pipeline, "encode_prompt", None)

    def recorded(*args, **options):
        # Some pipelines change the list of prompts that they are given.
        made.arguments.append(copy.deepcopy(_by_name(original, args, options)))
        result = original(*args, **options)
        made.results.append(_on_cpu(result))
        return result

    def stop(*_) -> None:
        raise _Encoded

    def called(name: str, module: nn.Module, args: tuple, options: dict) -> None:
        made.calls.setdefault(name, []).append(_on_cpu(_by_name(module.forward, args, options)))

    with ExitStack() as hooks:
        if original is not None:
            pipeline.__dict__["encode_prompt"] = recorded
            hooks.callback(pipeline.__dict__.pop, "encode_prompt")
        for denoiser in denoisers_of(pipeline).values():
            hooks.callback(denoiser.register_forward_pre_hook(stop).remove)
        for name, part in text_encoders(pipeline).items():
            hooks.callback(part.register_forward_pre_hook(partial(called, name), with_kwargs=True).remove)
        with suppress(_Encoded):
            sample(pipeline, list(prompts), 0, 0, settings | {"output_type": "latent"})
    if not made.results:
        raise UserError(f"a {type(pipeline).__name__} does not encode prompts by encode_prompt, which is unsupported")
    return made


def encoded_again(pipeline: DiffusionPipeline, encoding: Encoding, device: torch.device) -> list:
    """Return what `encode_prompt` returns of a recorded batch with the encoders as they are, all on `device`."""
    results = []
    for arguments in copy.deepcopy(encoding.arguments):
        given = arguments | ({"device": device} if "device" in arguments else {})
        results.append(pipeline.encode_prompt(**given))
    return results


def _by_name(function: Callable, args: tuple, options: dict) -> dict:
    signature = inspect.signature(function)
    bound = signature.bind(*args, **options).arguments
    for one in signature.parameters.values():
        if one.kind is inspect.Parameter.VAR_KEYWORD:
            bound |= bound.pop(one.name, {})
    return bound


def _on_cpu(value):
    return tree_map(lambda one: one.detach().cpu() if isinstance(one, Tensor) else one, value)


# ------------------------------------------------------------------------------------------- embeddings


def vectors(results: list) -> dict[str, list[Tensor]]:
    """Return by kind the embeddings in what `encode_prompt` returned: matrices [N, C] with a vector per row.

    "tokens" are those of the tokens that the denoiser sees: a mask that follows leaves out the others. "pooled" are
    those of prompts.
    """
    found: dict[str, list[Tensor]] = {kind: [] for kind in KINDS}
    for result in results:
        items = _items(result)
        for one, following in zip(items, [*items[1:], None], strict=True):
            if isinstance(one, list):
                found["tokens"] += [each for each in one if isinstance(each, Tensor)]  # [T, C] each
            elif isinstance(one, Tensor) and one.is_floating_point() and one.dim() == 3:
                masked = _is_mask(following) and following.shape == one.shape[:2]
                found["tokens"].append(one[following.bool()] if masked else one.flatten(0, 1))  # [B, T, C] → [N, C]
            elif isinstance(one, Tensor) and one.is_floating_point() and one.dim() == 2:
                found["pooled"].append(one)  # [B, C]
    return found


def _items(result) -> list:
    return list(result) if isinstance(result, tuple) else [result]


def _is_mask(value) -> bool:
    return isinstance(value, Tensor) and value.dim() == 2 and not value.is_floating_point()


def embedding_errors(teacher: list[list], student: list[list]) -> dict[str, float]:
    """Return by kind of embedding the squared error of a vector over its energy, averaged over the vectors.

    Vectors and not their sum: the first token of a language model may have a thousand times the energy of others.
    Tensors that the encoders did not change, such as position ids, do not count.

    Args:
        teacher, student: what `encode_prompt` returned, call by call, of each batch.
    """
    sums = {kind: [0.0, 0] for kind in KINDS}
    for before, after in zip(teacher, student, strict=True):
        pairs = vectors(before), vectors(after)
        for kind, total in sums.items():
            for one, other in zip(*(some[kind] for some in pairs), strict=True):
                one, other = one.double(), other.to(one.device).double()
                energies = one.square().sum(-1)
                some = energies > 0
                if not torch.equal(one, other):
                    total[0] += ((other - one).square().sum(-1)[some] / energies[some]).sum().item()
                    total[1] += int(some.sum())
    return {kind: total / count for kind, (total, count) in sums.items() if count}


class _Embeddings(nn.Module):
    """The embeddings of a recorded batch as a function of an encoder's weights, for `sensitivity.output_effects`.

    Each vector has the length 1, each kind of them the same weight: squared errors are those of `embedding_errors`.
    """

    def __init__(self, pipeline: DiffusionPipeline, name: str):
        super().__init__()
        self.held = (pipeline, getattr(pipeline, name))  # in a tuple, or the encoder would become a child

    def get_submodule(self, target: str) -> nn.Module:
        return self.held[1].get_submodule(target)

    def forward(self, encoding: Encoding) -> Tensor:
        pipeline, encoder = self.held
        results = encoded_again(pipeline, encoding, encoder.device)
        parts = []
        for some in vectors(results).values():
            some = [one.float() for one in some if one.requires_grad]
            count = sum(map(len, some))
            parts += [one / (one.detach().norm(dim=-1, keepdim=True).clamp_min(1e-12) * count**0.5) for one in some]
        return torch.cat([one.flatten() for one in parts])


# ------------------------------------------------------------------------------------------- calibration


@dataclass
class TextCalibration:
    """What `quantization.job` needs to quantize a text encoder as it does a denoiser.

    Attributes:
        training, held_out: recorded batches of calibration prompts.
    """

    pipeline: DiffusionPipeline
    name: str
    training: list[Encoding]
    held_out: list[Encoding]

    @property
    def model(self) -> nn.Module:
        return getattr(self.pipeline, self.name)

    def calls(self) -> tuple[list[DenoiserCall], list[DenoiserCall]]:
        """Return the recorded calls of the encoder, for training and held out."""
        training = self._calls(self.training, 0)
        return training, self._calls(self.held_out, sum(len(call.points) for call in training))

    def _calls(self, encodings: list[Encoding], first: int) -> list[DenoiserCall]:
        """Return calls numbered from `first`; where padding is unseen without it, prompts of one length together."""
        found = []
        for encoding in encodings:
            for call in encoding.calls.get(self.name, ()):
                rows = range(len(call["input_ids"]))
                for columns, some in _by_length(call, encoding.masked):
                    make = partial(_call_on, self.model, call, columns)
                    found.append(DenoiserCall(make, some, [first + row for row in some]))
                first += len(rows)
        return found

    def effects(self, count: int) -> tuple[nn.Module, list[Callable[[], dict]]]:
        """Return a module of the encoder's weights, whose output counts, and calls of it on `count` prompts."""
        chosen = [one for encoding in self.training for one in singles(encoding)][:count]
        return _Embeddings(self.pipeline, self.name), [partial(dict, encoding=one) for one in chosen]


def singles(encoding: Encoding) -> Iterator[Encoding]:
    """Yield an encoding for each of the prompts of a batch."""
    count = next((len(one) for call in encoding.arguments for one in call.values() if isinstance(one, list)), 1)
    for row in range(count):
        yield Encoding(
            [
                {name: [one[row]] if isinstance(one, list) and len(one) == count else one for name, one in call.items()}
                for call in encoding.arguments
            ]
        )


def _by_length(call: dict, masked: bool) -> list[tuple[Tensor | None, list[int]]]:
    """Return (the columns of the tokens, or None for all; rows) of a recorded call's prompts of like length."""
    rows, mask = list(range(len(call["input_ids"]))), call.get("attention_mask")
    if not masked or mask is None or mask.shape != call["input_ids"].shape:
        return [(None, rows)]
    found: dict[tuple, list[int]] = {}
    for row in rows:
        found.setdefault(tuple(mask[row].bool().tolist()), []).append(row)
    return [(torch.tensor(columns), some) for columns, some in found.items()]


def _call_on(model: nn.Module, call: dict, columns: Tensor | None, rows: list[int]) -> dict:
    """Return the keyword arguments of a recorded call on some of its rows and columns, on the model's device."""
    shape = call["input_ids"].shape

    def part(value):
        if not isinstance(value, Tensor):
            return value
        if value.dim() and len(value) == shape[0]:
            value = value[rows]
            value = value[:, columns] if columns is not None and value.shape[1:2] == shape[1:] else value
        return value.to(model.device)

    return tree_map(part, call)


class TextRecorder(HessianRecorder):
    """Record Hessians of a text encoder in its present state, into a store."""

    def __init__(self, job: Job, store: HessianStore):
        self.job, self.store, self.other_timesteps, self.walk = job, store, [], None
        self.training, self.held_out = job.text.calls()
        self.first = next(self.training[0].divided(1))()


def text_calibration(job: Job) -> Callable[[str], TextCalibration]:
    """Record the calibration prompts; return the function that makes a `TextCalibration` of an encoder's name."""
    held_out = job.calibration[HELD_OUT_EVERY - 1 :: HELD_OUT_EVERY]
    training = [prompt for index, prompt in enumerate(job.calibration) if index % HELD_OUT_EVERY != HELD_OUT_EVERY - 1]
    parts = [encode_all(job, prompts) for prompts in (training, held_out)]
    return lambda name: TextCalibration(job.pipeline, name, *parts)


def encode_all(job: Job, prompts: list[str]) -> list[Encoding]:
    """Record prompts in batches, which are the same on all ranks: where one has halved its own, all begin again."""
    work = lambda some: encode(job.pipeline, some, job.config.sampling.call())  # noqa: E731
    while True:
        before = job.size.value
        found = [made for _, made in job.size.batches(work, prompts)]
        job.size.value = min(job.ranks.all_gather(job.size.value))
        if job.size.value == before:
            return found


# ------------------------------------------------------------------------------------------- the work


class TextPart(NamedTuple):
    """A text encoder to quantize: its name in the pipeline, layers, number of parameters, bytes before and after."""

    name: str
    layers: list[Layer]
    parameters: int
    original_bytes: int
    planned_bytes: int


def chosen_parts(config: QuantizeConfig, pipeline: DiffusionPipeline) -> tuple[list[str], list[str]]:
    """Return the denoisers to quantize, and the text encoders in the order of `components`.

    Raises:
        UserError: `components` has another name, or no denoiser.
    """
    denoisers, encoders = list(denoisers_of(pipeline)), text_encoders(pipeline)
    chosen = config.components or denoisers
    unknown = [name for name in chosen if name not in denoisers and name not in encoders]
    if unknown:
        allowed = ", ".join([*denoisers, *encoders])
        raise UserError(f"--components: MODEL {config.model} has no {unknown[0]} to quantize; allowed are {allowed}")
    if not {*denoisers} & {*chosen}:
        raise UserError(f"--components {','.join(chosen)} lacks the denoiser; add {' or '.join(denoisers)}")
    return [name for name in denoisers if name in chosen], [name for name in chosen if name in encoders]


def planned_text(
    config: QuantizeConfig, pipeline: DiffusionPipeline, name: str, given: bool, stored: torch.dtype | None
) -> TextPart:
    """Choose the layers of a text encoder, and log their bits and its size.

    Raises:
        UserError: it is quantized itself, or its layers cannot take the settings.
    """
    model = getattr(pipeline, name)
    check_loaded(model, config.model, f"--components {name}: MODEL")
    try:
        spec = config.spec if config.target_bits is None else config.spec.changed(in_group_size=1)
        layers = [shared(layer, config.share_codebooks) for layer in text_layers(model, spec)]
        if config.target_bits is not None:
            check_target(replace(config, overrides=None), layers)
    except UserError as error:
        raise UserError(f"--components {name}: {error}") from None
    parameters = sum(tensor.numel() for tensor in model.parameters())
    size, planned = planned_size(config, layers, parameters, Int8Totals(), plain_bits(model, stored))
    log_info(f"{name}, a {type(model).__name__}:\n{size}")
    files = None if given else stored_bytes(config.model, config.variant, name, config.revision)
    return TextPart(name, layers, parameters, files or parameter_bytes(model), planned)


def text_hessian_bytes(config: QuantizeConfig, part: TextPart) -> int:
    """Return the bytes of disk for a text encoder's Hessians; layers of one parent, but its last, share an input."""
    groups: dict[tuple, list[Layer]] = {}
    last = {layer.name.rpartition(".")[0]: layer.name for layer in part.layers}
    for layer in part.layers:
        parent = layer.name.rpartition(".")[0]
        groups.setdefault((parent, layer.columns, layer.name == last[parent]), []).append(layer)
    return hessian_bytes(list(groups.values()), config.hessian_memory_gb, keeps_hessians(config, part.layers))


def quantize_text_encoders(job: Job) -> dict[str, dict]:
    """Quantize the text encoders, and return by name what the summary says of each.

    Their calls and embeddings are recorded first, of the full-precision encoders; the denoiser is on the CPU then.
    """
    device, encoders = job.ranks.device, text_encoders(job.pipeline).values()
    with job.clock("prompts"):
        calibration, evaluation = text_calibration(job), encode_all(job, job.evaluation)
    figures = {}
    job.rest()
    try:
        for encoder in encoders:
            encoder.to(device)
        for part in job.text_parts:
            began, one = time.perf_counter(), text_job(job, part, calibration(part.name))
            quantized = quantize_layers(one, lambda *_: None)
            mark_text_quantized(one.denoiser)
            with job.clock("evaluation"):
                errors = embeddings_error(job, evaluation, device)
            figures[part.name] = {
                "layers_quantized": len(one.layers),
                "embeddings_error_db": errors,
                "bytes_of_original": part.original_bytes,
                "seconds": round(time.perf_counter() - began, 3),
                "layers": [done.report for done in quantized.values()],
            }
            log_info(f"{part.name}: error of the embeddings {errors['all']:.2f} dB, with what is quantized so far")
    finally:
        for encoder in encoders:
            encoder.to("cpu")
        job.enter()
    return figures


def text_job(job: Job, part: TextPart, calibration: TextCalibration) -> Job:
    """Return the job of quantizing a text encoder, which settings of the denoiser's own layers and steps leave out."""
    config = replace(
        job.config,
        overrides=None,
        load=None,
        hessian_cache=None,
        calibration_latents="teacher",
        intermediate=IntermediateConfig(),
        unquantized_nbits=16,
    )
    found = replace(
        job,
        config=config,
        layers=part.layers,
        folder=job.folder.of_part(part.name),
        parameters=part.parameters,
        int8=Int8Totals(),
        component=part.name,
        text=calibration,
        store=None,
        shared_codebooks={},
        text_parts=[],
    )
    found.size = job.size
    return found


@torch.no_grad()
def embeddings_error(job: Job, evaluation: list[Encoding], device: torch.device) -> dict[str, float]:
    """Return the errors of the embeddings of the evaluation prompts in dB: by kind, and of "all" kinds alike."""
    with ExitStack() as decoded:
        for encoder in text_encoders(job.pipeline).values():
            decoded.enter_context(decoded_once(encoder))
        student = [encoded_again(job.pipeline, encoding, device) for encoding in evaluation]
    errors = embedding_errors([encoding.results for encoding in evaluation], student)
    errors["all"] = sum(errors.values()) / max(1, len(errors))
    return {kind: decibels(error, 1.0) for kind, error in errors.items()}
