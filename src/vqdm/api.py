"""Quantize a pipeline with one Python call: what `main_text2image.py` does, on a loaded pipeline or a path."""

from __future__ import annotations

import copy
import difflib
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, fields
from pathlib import Path

from diffusers import DiffusionPipeline
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from vqdm.config import all_settings, build
from vqdm.diffusion.denoisers import denoisers_of
from vqdm.diffusion.model_folders import check_supported_pipeline
from vqdm.diffusion.pipelines import networks, set_scheduler
from vqdm.documents import kind_of
from vqdm.errors import UserError
from vqdm.finetuning.intermediate import block_finetuner
from vqdm.prompts import check_prompts, default_prompts, load_prompts
from vqdm.quantization import job
from vqdm.quantization.config import HubConfig, QuantizeConfig
from vqdm.quantization.language_model import LanguageModel, is_language_model, quantize_language_model
from vqdm.storage.hub import quantized_denoisers

# Settings of how a path is loaded, which a loaded pipeline has decided already.
LOADING = ("dtype", "device", "variant", "single_file_config", "revision", "local_files_only")
# Arguments with a name of their own, and flags for what a user does with the result.
OWN = ("model", "calibration_prompts", "evaluation_prompts", "output_dir", "target_bits")
OWN += tuple(one.name for one in fields(HubConfig))


@dataclass(frozen=True)
class QuantizationReport:
    """Figures of a quantization.

    Attributes:
        bits_per_weight: stored bits per weight of the quantized layers, with scales, codebooks and all.
        bits_per_parameter: the same over the whole denoiser.
        bytes_before, bytes_after: of the denoiser's files; of its tensors where the pipeline was given in memory.
        error_db: squared error of the outputs on the evaluation prompts over the energy of the full-precision outputs,
            summed over all recorded points, in dB.
        median_error_db: the median of the points, in dB.
        psnr_db: between the images of both models from the same noise; None if no pair can be compared.
        pipeline_bytes_before, pipeline_bytes_after: the same of the whole pipeline.
        embeddings_error_db: error of the embeddings of the evaluation prompts in dB, by kind and of "all" together,
            where `components` names text encoders; else None.
        text_encoders: by name, a dict of figures of each that is quantized, as in `summary.json`.
        experts: of two denoisers that are quantized, by name a dict of the fields from `bits_per_weight` to
            `median_error_db`; above are bits per weight and bytes of both, and the other figures of the first.
        perplexity_before, perplexity_after: of the evaluation texts, for a language model alone, which has no
            figures of images, outputs and embeddings.
        layers: a dict per quantized layer: name, block, kind, rows, columns, bits_per_weight, error, ...
        seconds: by phase, and their "total".
    """

    bits_per_weight: float
    bits_per_parameter: float
    bytes_before: int | None
    bytes_after: int
    error_db: float | None
    median_error_db: float | None
    psnr_db: float | None
    pipeline_bytes_before: int | None
    pipeline_bytes_after: int | None
    embeddings_error_db: dict[str, float] | None
    text_encoders: dict[str, dict]
    experts: dict[str, dict]
    perplexity_before: float | None
    perplexity_after: float | None
    layers: tuple[dict, ...]
    seconds: dict[str, float]

    @classmethod
    def of(cls, summary: dict) -> QuantizationReport:
        """Take the figures from the content of a run's `summary.json`."""
        component, names = summary.get("component", "unet"), quantized_denoisers(summary)
        own = {name: _figures(summary, name) for name in names or [component]}
        first, experts = own[component], own if len(own) > 1 else {}
        sizes = [[one[key] for one in own.values()] for key in ("bytes_before", "bytes_after")]
        return cls(
            summary["effective_bits_layers"],
            first["bits_per_parameter"],
            *(None if None in some else sum(some) for some in sizes),
            first["error_db"],
            first["median_error_db"],
            summary.get("images", {}).get("psnr_db"),
            summary.get("bytes_of_original_pipeline"),
            summary.get("bytes_of_pipeline"),
            summary.get("embeddings_error_db"),
            summary.get("text_encoders", {}),
            experts,
            summary.get("perplexity_before"),
            summary.get("perplexity"),
            tuple(summary["layers"]),
            summary["seconds"],
        )


def _figures(summary: dict, name: str) -> dict:
    """Return the figures of a summary that are of one model alone."""
    return {
        "bits_per_weight": summary.get(f"effective_bits_layers_{name}", summary["effective_bits_layers"]),
        "bits_per_parameter": summary[f"effective_bits_{name}"],
        "bytes_before": summary[f"bytes_of_original_{name}"],
        "bytes_after": summary[f"bytes_of_{name}"],
        "error_db": summary.get(f"{name}_output_error_db"),
        "median_error_db": summary.get(f"{name}_output_error_db_by_point", {}).get("median"),
    }


def quantize(
    pipeline: DiffusionPipeline | PreTrainedModel | str | Path,
    prompts: Sequence[str] | str | Path | None = None,
    target_bits: float | None = 3.0,
    evaluation_prompts: Sequence[str] | str | Path | None = None,
    output_dir: str | Path | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    **settings,
) -> tuple[DiffusionPipeline | PreTrainedModel, QuantizationReport | None]:
    """Quantize the denoiser of a text-to-image pipeline: its UNet or transformer. Or a causal language model.

        pipeline = DiffusionPipeline.from_pretrained("stabilityai/stable-diffusion-xl-base-1.0", dtype=torch.float16)
        quantized, report = vqdm.quantize(pipeline.to("cuda"), target_bits=3)
        quantized.save_pretrained("sdxl-3bit")

    A pipeline that is given is not changed: its denoiser is copied, and the text encoders that `components` names, as
    in `components=["unet", "text_encoder"]`. The result shares the other parts.

    Args:
        pipeline: a loaded full-precision pipeline, quantized on its device in its dtype; or a folder or hub name.
        prompts: to calibrate on: a list, a prompt file, or None for 256 that ship with vqdm.
        target_bits: stored bits per weight of the quantized layers, divided among them by their effect on the output.
            None gives every layer the additive code that settings such as `num_codebooks` describe.
        evaluation_prompts: to measure errors on, as `prompts`; 64 ship with vqdm.
        output_dir: where the result and the state of the run are written; with `resume=True` an interrupted run in it
            is continued. None works in a temporary folder.
        tokenizer: of a language model that is given in place of the pipeline; `prompts` are texts then.
        settings: flags of `main_text2image.py` by name, without the dashes, such as `num_inference_steps=30`.

    Returns:
        The quantized pipeline, ready to use, and the report; None in its place after `dry_run=True`.

    Raises:
        UserError: an argument is wrong; a ValueError that names it. Nothing slow has started then.
        RunError: the work failed.
    """
    _check_names(settings)
    loaded = isinstance(pipeline, DiffusionPipeline | PreTrainedModel)
    if tokenizer is not None or isinstance(pipeline, PreTrainedModel):
        _check_language_model(pipeline, tokenizer, settings)
    elif loaded:
        _check_loaded_pipeline(pipeline, settings)
    elif not isinstance(pipeline, str | Path):
        raise UserError(f"pipeline is {kind_of(pipeline)}; give a loaded pipeline, a folder or a hub name")
    calibration = _prompts(prompts, "calibration", "prompts")
    evaluation = _prompts(evaluation_prompts, "evaluation", "evaluation_prompts")
    with ExitStack() as cleaning:
        folder = output_dir or cleaning.enter_context(tempfile.TemporaryDirectory(prefix="vqdm-"))
        values = _counts(len(calibration), len(evaluation)) | settings | {"target_bits": target_bits}
        values |= {"output_dir": str(folder), "calibration_prompts": _source(prompts)}
        values |= {"evaluation_prompts": _source(evaluation_prompts)}
        values["model"] = str((pipeline.name_or_path or type(pipeline).__name__) if loaded else pipeline)
        values |= {"device": str(pipeline.device)} if loaded else {}
        config = build(QuantizeConfig, values)
        if isinstance(pipeline, PreTrainedModel) or (not loaded and is_language_model(config)):
            return _quantized_language_model(config, pipeline, tokenizer, (calibration, evaluation))
        finetune_blocks = block_finetuner(config.intermediate, config.seed)
        work_on = _working_copy(pipeline, config) if loaded else None
        quantized, summary = job.quantize(config, finetune_blocks, work_on, (calibration, evaluation))
    return quantized, None if summary is None else QuantizationReport.of(summary)


def _quantized_language_model(
    config: QuantizeConfig,
    given: PreTrainedModel | str | Path,
    tokenizer: PreTrainedTokenizerBase | None,
    texts: tuple[list[str], list[str]],
) -> tuple[PreTrainedModel, QuantizationReport | None]:
    held = None
    if isinstance(given, PreTrainedModel):
        held = LanguageModel(copy.deepcopy(given).eval().requires_grad_(False), tokenizer)
    quantized, summary = quantize_language_model(config, held, texts)
    return quantized.model, None if summary is None else QuantizationReport.of(summary)


def _check_language_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, settings: dict) -> None:
    if not isinstance(model, PreTrainedModel):
        raise UserError("tokenizer is of a loaded language model; a pipeline or a folder has its own; leave it out")
    given = [name for name in LOADING if name in settings]
    if given:
        raise UserError(f"{given[0]} belongs to a path; the model is loaded already, and is used as it is")
    if not type(model).__name__.endswith("ForCausalLM"):
        kind = type(model).__name__
        raise UserError(f"pipeline is a {kind}; give a causal language model, or a pipeline and components=[...]")
    if tokenizer is None:
        raise UserError("tokenizer is None; give the tokenizer of the language model")


def _check_names(settings: dict) -> None:
    known = {setting.name for _, setting in all_settings(QuantizeConfig) if setting.name not in OWN}
    for name in settings:
        if name not in known:
            near = difflib.get_close_matches(name, known, 1)
            hint = f"did you mean {near[0]}?" if near else "settings are the flags of main_text2image.py"
            raise UserError(f"{name} is not a setting of quantize; {hint}")


def _check_loaded_pipeline(pipeline: DiffusionPipeline, settings: dict) -> None:
    given = [name for name in LOADING if name in settings]
    if given:
        raise UserError(f"{given[0]} belongs to a path; the pipeline is loaded already, and is used as it is")
    if any(hasattr(part, "_hf_hook") for part in pipeline.components.values() if isinstance(part, nn.Module)):
        raise UserError("pipeline is offloaded; call pipeline.remove_all_hooks() first, or give its folder or hub name")
    check_supported_pipeline(pipeline, "pipeline")


def _prompts(given: Sequence[str] | str | Path | None, kind: str, name: str) -> list[str]:
    if given is None or isinstance(given, str | Path):
        return load_prompts(default_prompts(kind, name) if given is None else str(given), name)
    return check_prompts(given, name)


def _source(given: Sequence[str] | str | Path | None) -> str | None:
    """Return what the record of the run names; it also holds a digest of the prompts."""
    return str(given) if isinstance(given, str | Path) else None if given is None else f"a list of {len(given)}"


def _counts(calibration: int, evaluation: int) -> dict:
    """Return numbers of prompts, where the defaults are more than there are."""
    usual = {one.name: one.default for one in fields(QuantizeConfig)}
    return {
        "calibration_nsamples": min(usual["calibration_nsamples"], calibration),
        "evaluation_nsamples": min(usual["evaluation_nsamples"], evaluation),
    }


def _working_copy(pipeline: DiffusionPipeline, config: QuantizeConfig) -> DiffusionPipeline:
    """Return a pipeline with copies of what is quantized, the scheduler and tokenizers, and the same other models."""
    copied, changed = copy.copy(pipeline), {*(config.components or denoisers_of(pipeline))}
    for name, part in pipeline.components.items():
        if name in changed or not isinstance(part, nn.Module):
            setattr(copied, name, copy.deepcopy(part))
    set_scheduler(copied, config.sampling.scheduler)
    for name in changed & networks(copied).keys():
        getattr(copied, name).requires_grad_(False).eval()
    copied.set_progress_bar_config(disable=True)
    return copied
