"""Quantize a causal language model of transformers, by the steps of `quantization.job`.

It is calibrated on texts, joined and cut into sequences of tokens, and scored by the perplexity of held-out ones.

Letters: N sequences of T tokens, V entries of the vocabulary.
"""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from vqdm.config import RunConfig, all_settings
from vqdm.devices import BatchSize, MemoryClock, check_float64, pick_dtype
from vqdm.diffusion.blocks import Layer
from vqdm.diffusion.hessians import DenoiserCall
from vqdm.diffusion.model_folders import check_loaded
from vqdm.diffusion.pipelines import local_folder, parameter_bytes, weights_fingerprint
from vqdm.documents import first_line, read_json
from vqdm.errors import UserError
from vqdm.layers.quantized import decoded_once, narrowed
from vqdm.parallel import Ranks, launched
from vqdm.quantization.allocation import check_target
from vqdm.quantization.config import HubConfig, QuantizeConfig
from vqdm.quantization.job import Job, choose_prompts, read_prompts
from vqdm.quantization.layerwise import quantize_layers
from vqdm.quantization.plan import Int8Totals, plain_bits, planned_size
from vqdm.quantization.recording import digest
from vqdm.quantization.shared_codebooks import shared
from vqdm.quantization.text_encoder import HELD_OUT_EVERY, text_layers
from vqdm.storage.files import folder_fingerprint, save_json, save_text
from vqdm.storage.hf import mark_text_quantized
from vqdm.storage.hub import is_offline, language_model_card, stored_sizes
from vqdm.storage.run_folder import RunFolder
from vqdm.tracking import Tracker, log_info, own_command, versions

MOST_TOKENS = 2048  # of a sequence
PART = "model"  # what it is called where a pipeline's parts have names
# Flags that a language model takes; any other is of pipelines.
TAKEN = ("model", "calibration_prompts", "evaluation_prompts", "output_dir", "target_bits", "code", "state_bits")
TAKEN += ("sensitivity_points", "share_codebooks", "calibration_nsamples", "evaluation_nsamples", "xtx_batch_size")
TAKEN += ("hessian_memory_gb", "hessian_samples_per_input", "on_save", "ignore_budget", "seed", "device", "dtype")
TAKEN += ("local_files_only", "report_to", "dry_run", "resume", "revision", "visualize_nsamples")
TAKEN += tuple(one.name for one in fields(HubConfig))


@dataclass
class LanguageModel:
    """A language model and its tokenizer, in the place of a pipeline."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase

    @property
    def components(self) -> dict:
        return {PART: self.model}


# ------------------------------------------------------------------------------------------- texts


def token_sequences(texts: list[str], language_model: LanguageModel) -> Tensor:
    """Join texts, each ended by the tokenizer's end of text, and cut them into sequences [N, T] without a rest.

    T is at most `MOST_TOKENS` and what the model and its tokenizer take; fewer where the texts are shorter.

    Raises:
        UserError: they are not two tokens long.
    """
    tokenizer, config = language_model.tokenizer, language_model.model.config
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    tokens = [token for text in texts for token in [*tokenizer(text, add_special_tokens=False).input_ids, *end]]
    limits = (MOST_TOKENS, getattr(config, "max_position_embeddings", MOST_TOKENS), tokenizer.model_max_length)
    length = min(len(tokens), *limits)
    if length < 2:
        raise UserError(f"the texts have {len(tokens)} tokens; give longer ones, or more")
    return torch.tensor(tokens[: len(tokens) // length * length]).view(-1, length)  # → [N, T]


class _Logits(nn.Module):
    """√p · (z - E_p z) of the logits z [N, T, V] at probabilities p, which are held: for `sensitivity.output_effects`.

    The squared error of this is Var_p(Δz), to second order twice the KL divergence of the changed probabilities.
    """

    def __init__(self, model: PreTrainedModel):
        super().__init__()
        self.held = (model,)  # in a tuple, or the model would become a child

    def get_submodule(self, target: str) -> nn.Module:
        return self.held[0].get_submodule(target)

    def forward(self, tokens: Tensor) -> Tensor:
        model = self.held[0]
        logits = model(input_ids=tokens.to(model.device), use_cache=False).logits.float()
        p = logits.detach().softmax(-1)
        return p.sqrt() * (logits - (p * logits).sum(-1, keepdim=True))


@dataclass
class TextSequences:
    """What a language model is calibrated on, as `TextCalibration` of an encoder; sequences [N, T] of tokens."""

    model: PreTrainedModel
    sequences: Tensor
    batch_size: int

    def calls(self) -> tuple[list[DenoiserCall], list[DenoiserCall]]:
        """Return calls of the model, for training and held out."""
        numbers = range(len(self.sequences))
        held_out = [k for k in numbers if k % HELD_OUT_EVERY == HELD_OUT_EVERY - 1]
        training = [k for k in numbers if k % HELD_OUT_EVERY != HELD_OUT_EVERY - 1]
        return self._calls(training), self._calls(held_out)

    def _calls(self, numbers: list[int]) -> list[DenoiserCall]:
        parts = [numbers[k : k + self.batch_size] for k in range(0, len(numbers), self.batch_size)]
        return [DenoiserCall(self._call, part, part) for part in parts]

    def _call(self, numbers: list[int]) -> dict:
        return {"input_ids": self.sequences[numbers].to(self.model.device), "use_cache": False}

    def effects(self, count: int) -> tuple[nn.Module, list[Callable[[], dict]]]:
        """Return a module of the model's weights, whose output counts, and calls of it on `count` sequences."""
        return _Logits(self.model), [partial(dict, tokens=one[None]) for one in self.sequences[:count]]


@torch.no_grad()
def perplexity(model: PreTrainedModel, sequences: Tensor, size: BatchSize) -> float:
    """Return exp of the mean of -log p of each token given those before it in its sequence, but for the first."""

    def loss(numbers: range) -> float:
        tokens = sequences[numbers.start : numbers.stop].to(model.device)  # [n, T]
        logits = model(input_ids=tokens, use_cache=False).logits[:, :-1].float()  # [n, T - 1, V]
        return cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="sum").item()

    total = sum(found for _, found in size.batches(loss, range(len(sequences))))
    return math.exp(total / (sequences.numel() - len(sequences)))


# ------------------------------------------------------------------------------------------- loading


def is_language_model(config: RunConfig) -> bool:
    """Return whether MODEL is a folder, or a hub name, of a causal language model of transformers alone."""
    place = Path(config.model)
    on_hub = not place.exists() and re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", config.model)
    if not (place.is_dir() or on_hub) or (local_folder(config.model, config.revision) / "model_index.json").is_file():
        return False
    if (place.absolute().parent / "model_index.json").is_file():  # a part of a pipeline
        return False
    try:
        held = read_json(place / "config.json") if place.is_dir() else _model_config(config).to_dict()
        names = held.get("architectures")
    except (OSError, ValueError, AttributeError):
        return False
    return any(str(name).endswith("ForCausalLM") for name in names or ())


def _model_config(config: RunConfig) -> PretrainedConfig:
    where = {"revision": config.revision, "local_files_only": is_offline(config.local_files_only)}
    return AutoConfig.from_pretrained(config.model, **where)


def load_language_model(config: QuantizeConfig, device: torch.device) -> LanguageModel:
    """Load MODEL, frozen; for a dry run without its weights. Raises UserError where that fails."""
    dtype = pick_dtype(config.dtype, device)
    where = {"revision": config.revision, "local_files_only": is_offline(config.local_files_only)}
    try:
        tokenizer = AutoTokenizer.from_pretrained(config.model, **where)
        if config.dry_run:
            with torch.device("meta"):
                model = AutoModelForCausalLM.from_config(_model_config(config), dtype=dtype)
        else:
            model = AutoModelForCausalLM.from_pretrained(config.model, dtype=dtype, **where).to(device)
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # whatever transformers answers to files of wrong types or shapes
        raise UserError(f"MODEL {config.model} cannot be loaded: {first_line(error)}") from None
    return LanguageModel(model.eval().requires_grad_(False), tokenizer)


def check_flags_taken(config: QuantizeConfig) -> None:
    """Raise UserError for a flag that is not at its default and means nothing for a language model."""
    usual = QuantizeConfig(model=config.model)
    owners = lambda one: (one, one.sampling, one.intermediate, one.hub)  # noqa: E731
    for _, setting in all_settings(QuantizeConfig):
        for own, other in zip(owners(config), owners(usual), strict=True):
            if setting.name in TAKEN or not hasattr(own, setting.name):
                continue
            if getattr(own, setting.name) != getattr(other, setting.name):
                raise UserError(
                    f"--{setting.name} is of pipelines, and MODEL {config.model} is a language model; leave it out"
                )


# ------------------------------------------------------------------------------------------- the work


def quantize_language_model(
    config: QuantizeConfig,
    given: LanguageModel | None = None,
    texts: tuple[list[str], list[str]] | None = None,
) -> tuple[LanguageModel, dict | None]:
    """Run the whole job; `job.quantize` of a language model.

    Args:
        given: a loaded one to work on, changed in place; without it `config.model` is loaded.
        texts: for calibration and for evaluation, in place of the files that `config` names.

    Returns:
        The quantized model, and the summary; None in its place after a dry run, and on every process but the first.

    Raises:
        UserError: bad input, found before anything slow starts.
        RunError: the work failed; what is finished stays on disk for `resume`.
    """
    check_flags_taken(config)
    calibration, evaluation = choose_prompts(config, *(texts or read_prompts(config)))
    with launched(config.device) as ranks:
        check_float64(ranks.device)
        held = given or load_language_model(config, ranks.device)
        check_loaded(held.model, config.model)
        sequences = [token_sequences(some, held) for some in (calibration, evaluation)]
        layers = planned_layers(config, held.model)
        folder, settings = RunFolder(config.output_dir), config.to_dict()
        settings |= {"prompts_sha256": digest(calibration + evaluation)}
        settings |= {"weights_sha256": weights_fingerprint(held)} if given else {}
        if config.dry_run:
            folder.check(settings, config.resume, ranks)
            return held, None
        with folder.lock(ranks):
            if ranks.main:
                folder.open(settings, versions(), config.resume, 2 * parameter_bytes(held.model))
            if ranks.broadcast(folder.finished):
                return load_finished(folder, held, ranks)
            tracker = Tracker(config.report_to if ranks.main else "none", "vqdm-quantize", folder.path, settings)
            size = sum(tensor.numel() for tensor in held.model.parameters()), Int8Totals(), PART
            job = Job(config, held, layers, calibration, evaluation, folder, tracker, MemoryClock(ranks.device), *size)
            job.ranks, job.original_bytes = ranks, parameter_bytes(held.model)
            job.codebook_memory_gb = ranks.broadcast(folder.started_with("hessian_memory_gb") if ranks.main else None)
            job.text = TextSequences(held.model, sequences[0], config.xtx_batch_size)
            job.fingerprint = model_fingerprint(config, settings)
            try:
                return held, run(job, sequences[1])
            finally:
                tracker.finish()


def model_fingerprint(config: QuantizeConfig, settings: dict) -> str:
    """Return what Hessians on the disk are of: the weights that are given, or MODEL's files or name."""
    place = Path(config.model)
    files = folder_fingerprint(place) if place.is_dir() else f"{config.model}@{config.revision}"
    return settings.get("weights_sha256", files)


def planned_layers(config: QuantizeConfig, model: PreTrainedModel) -> list[Layer]:
    """Choose the layers, and log their bits and the size. Raises UserError where they cannot take the settings."""
    spec = config.spec if config.target_bits is None else config.spec.changed(in_group_size=1)
    layers = [shared(layer, config.share_codebooks) for layer in text_layers(model, spec)]
    if config.target_bits is not None:
        check_target(config, layers)
    parameters = sum(tensor.numel() for tensor in model.parameters())
    log_info(planned_size(config, layers, parameters, Int8Totals(), plain_bits(model, None))[0])
    return layers


def load_finished(folder: RunFolder, held: LanguageModel, ranks: Ranks) -> tuple[LanguageModel, dict | None]:
    """Return the model of a finished run, with the run's summary on the first process."""
    model = type(held.model).from_pretrained(folder.path, dtype=held.model.dtype, local_files_only=True)
    found = replace(held, model=model.to(held.model.device).requires_grad_(False).eval())
    if not ranks.main:
        return found, None
    shutil.rmtree(folder.work, ignore_errors=True)
    log_info(f"{folder.path} is finished already")
    return found, json.loads((folder.path / "summary.json").read_text(encoding="utf-8"))


def run(job: Job, evaluation: Tensor) -> dict | None:
    """Take all slow steps; return the summary on the first process."""
    model = job.denoiser
    with job.clock("teacher"):
        before = perplexity(model, evaluation, job.size)
    quantized = quantize_layers(job, lambda *_: None)
    mark_text_quantized(model)
    with job.clock("evaluation"), decoded_once(model):
        after = perplexity(model, evaluation, job.size)
    if not job.ranks.main:
        return None
    staged = job.folder.work / "staged"
    shutil.rmtree(staged, ignore_errors=True)
    stored = getattr(model.config, "dtype", None) or model.dtype
    with job.clock("saving"), narrowed(model, getattr(torch, stored) if isinstance(stored, str) else stored):
        model.save_pretrained(staged / PART)
        job.pipeline.tokenizer.save_pretrained(staged / PART)
    summary = {
        "model": job.config.model,
        "component": PART,
        "layers_quantized": len(job.layers),
        **stored_sizes(model, PART, job.parameters, staged),
        f"bytes_of_original_{PART}": job.original_bytes,
        "perplexity_before": before,
        "perplexity": after,
        "seconds": job.clock.phases | {"total": round(sum(job.clock.phases.values()), 3)},
        "peak_memory_bytes": job.clock.whole(),
        "versions": versions(),
        "command": own_command(),
        "layers": [done.report for done in quantized.values()],
    }
    save_text(language_model_card(job.config.model, summary), staged / PART / "README.md")
    job.folder.publish(staged / PART)
    save_json(summary, job.folder.path / "summary.json")
    shutil.rmtree(job.folder.work)
    job.on_save(job.folder.path)
    return summary
