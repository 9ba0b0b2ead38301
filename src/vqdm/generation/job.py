"""Generate images for a prompt file: from prompts to an image folder with a manifest.

Order of work: read prompts, claim the folder, load the pipeline with the quantized denoiser in place, generate this
rank's shard of the missing batches, and merge the manifests of all ranks. No image ever passes between ranks.

Requests are put into batches before they are spread over ranks, and an interrupted batch is generated as a whole again:
an image's last bits can depend on the batch size, and so depend neither on ranks nor on interruptions.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections import Counter
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from huggingface_hub import try_to_load_from_cache

import vqdm
from vqdm.devices import pick_dtype
from vqdm.diffusion.denoisers import denoisers_of
from vqdm.diffusion.model_folders import (
    check_fits,
    check_full_precision,
    check_loaded,
    denoisers_for,
    find_denoisers,
    load_denoiser,
    load_text_encoders,
    quantized_text_encoders,
)
from vqdm.diffusion.pipelines import check_configured, configured_pipeline, local_fingerprint, log_truncated
from vqdm.errors import RunError, UserError
from vqdm.generation.config import GenerateConfig
from vqdm.generation.requests import (
    Request,
    alike,
    generate,
    generate_in_batches,
    make_requests,
    settings_used,
    unused_columns,
)
from vqdm.images import NAN, NAN_ADVICE, GeneratedImage, ImageFolder, Key, check_layout, sealed
from vqdm.layers.quantized import quantized_layers
from vqdm.parallel import Ranks, launched
from vqdm.prompts import load_rows, log_notes
from vqdm.storage.files import folder_fingerprint
from vqdm.storage.run_folder import check_claim
from vqdm.tracking import JsonLines, Tracker, log_info, own_command, progress_bar, versions

# The images do not depend on these, so they may change between a run and its resumption.
FREE_FIELDS = ("output_dir", "device", "bs", "limit", "shard", "num_samples_per_prompt", "compile", "offload")
FREE_FIELDS += ("report_to", "resume", "dry_run", "prompts", "teacher", "local_files_only")


@dataclass(frozen=True)
class GenerationResult:
    """What a finished run reports.

    Attributes:
        total: images of the requests, all of which exist.
        new: those of them that this run generated, with all ranks.
        seconds: to generate these.
        problems: problem of an image → number of images with it.
    """

    folder: Path
    total: int
    new: int
    seconds: float
    problems: dict[str, int]


@dataclass
class GenerationJob:
    """The state that the steps of one run share."""

    config: GenerateConfig
    ranks: Ranks
    folder: ImageFolder
    pipeline: DiffusionPipeline
    tracker: Tracker


def generate_images(config: GenerateConfig) -> GenerationResult | None:
    """Run the whole job; None after a dry run, and on every rank but the first.

    Raises:
        UserError: bad input, found before anything slow starts.
        RunError: the work failed, or an image holds NaN; what is finished stays on disk for `resume`.
    """
    rows = load_rows(config.prompts, "PROMPTS")
    requests = requests_of_shard(config, rows)
    log_notes(unused_columns(rows), config.prompts, "PROMPTS")
    check_layout(config.layout, [request.id for request in requests], config.num_samples_per_prompt)
    check_configured(config)
    if config.teacher:
        check_full_precision(config.model, config.revision, config.local_files_only, "--teacher: MODEL")
    folders = list(find_denoisers(config.quantized, optional=True).values()) if config.quantized else []
    with launched(config.device) as ranks:
        check_offload(config.offload, ranks.device)
        settings = settings_of(config, ranks, rows, folders)
        folder = ImageFolder(Path(config.output_dir), config.layout, config.shard)
        if ranks.main:
            check_claim(folder.path, settings, config.resume)
        log_info(plan(config, ranks, folder, requests))
        if config.dry_run:
            return None
        pipeline = load(config, ranks)
        with folder.held(ranks):
            if ranks.main:
                log_truncated(
                    pipeline, (text for one in requests for text in (one.prompt, one.negative_prompt) if text)
                )
                check_claim(folder.path, settings, config.resume)  # another may have begun since
                folder.claim(record(config, settings, ranks, pipeline))
            return run(config, ranks, folder, pipeline, rows, requests)


def run(
    config: GenerateConfig,
    ranks: Ranks,
    folder: ImageFolder,
    pipeline: DiffusionPipeline,
    rows: list[dict],
    requests: list[Request],
) -> GenerationResult | None:
    """Generate what is missing, once everything is loaded."""
    pending = find_pending(ranks, folder, rows, requests)
    tracker = Tracker(config.report_to if ranks.main else "none", "vqdm-generate", folder.path, config.to_dict())
    began = time.perf_counter()
    try:
        batches = batches_with(requests, pending, config.bs)
        generate_shard(GenerationJob(config, ranks, folder, pipeline, tracker), ranks.shard(batches), pending)
        ranks.barrier()
    finally:
        tracker.finish()
    seconds = time.perf_counter() - began
    if not ranks.main:
        return None
    problems = finish(folder, requests)
    return GenerationResult(folder.path, len(requests), len(pending), seconds, problems)


# ------------------------------------------------------------------------------------------- requests


def requests_of_shard(config: GenerateConfig, rows: list[dict]) -> list[Request]:
    """Return the requests of this shard. Seeds and numbers are those of the whole file: shards fit together."""
    settings = config.sampling.call()
    every = make_requests(
        rows, config.num_samples_per_prompt, config.seed, config.negative_prompt, settings, config.prompts
    )
    number, count = config.shard
    last = config.limit or len(rows)
    chosen = [request for request in every if request.index < last and request.index % count == number]
    if not chosen:
        raise UserError(f"--shard {number}/{count} holds none of the {min(last, len(rows))} prompts")
    return chosen


def check_offload(offload: str, device: torch.device) -> None:
    """Raise UserError where weights cannot wait outside the device that computes."""
    if offload != "none" and device.type == "cpu":
        raise UserError(f"--offload {offload} moves weights between CPU and GPU; the device is {device}")


def settings_of(config: GenerateConfig, ranks: Ranks, rows: list[dict], folders: list[Path]) -> dict:
    """Return everything the images depend on, which a resumption must share; `folders`: of the quantized denoisers."""
    own = {name: value for name, value in config.to_dict().items() if name not in FREE_FIELDS}
    if folders and (texts := text_encoder_folders(config, folders[0])):
        own["text_encoders_sha256"] = " ".join(map(folder_fingerprint, texts))
    return own | {
        "dtype": str(pick_dtype(config.dtype, ranks.device)).removeprefix("torch."),
        "model_sha256": local_fingerprint(config),
        "quantized_sha256": " ".join(map(folder_fingerprint, folders)) or None,
        "prompts_sha256": hashlib.sha256(json.dumps(rows, default=str).encode()).hexdigest(),
    }


def text_encoder_folders(config: GenerateConfig, denoiser_folder: Path) -> list[Path]:
    """Return the folders of the quantized text encoders of QUANTIZED; none where it is the denoiser's folder alone."""
    around = denoiser_folder.parent
    whole = denoiser_folder.resolve() != Path(config.quantized).resolve()
    return [around / name for name in quantized_text_encoders(around)] if whole else []


def plan(config: GenerateConfig, ranks: Ranks, folder: ImageFolder, requests: list[Request]) -> str:
    """Format one line: how many images, by which denoiser, where."""
    prompts = len({request.index for request in requests})
    source = f"denoiser of {config.quantized}" if config.quantized else f"own denoiser of {config.model}"
    return (
        f"{len(requests)} images of {prompts} prompts, {source}, batch size {config.bs} on {ranks.world} "
        f"{ranks.device.type} process{'es' if ranks.world > 1 else ''}, "
        f"into {folder.path / folder.file_of(requests[0].key)} and on"
    )


def find_pending(ranks: Ranks, folder: ImageFolder, rows: list[dict], requests: list[Request]) -> list[Request]:
    """Return the requests without an intact image. Only the first rank reads the files."""
    done = set()
    if ranks.main:
        folder.sweep()
        folder.write_prompt_files({request.index: rows[request.index] for request in requests})
        done = folder.finished(request.key for request in requests)
    done = ranks.broadcast(done)
    if done:
        log_info(f"{len(done)} of {len(requests)} images exist already")
    return [request for request in requests if request.key not in done]


# ------------------------------------------------------------------------------------------- the pipeline


def load(config: GenerateConfig, ranks: Ranks) -> DiffusionPipeline:
    """Load MODEL with QUANTIZED's denoisers, and its quantized text encoders, where it is given, ready to generate.

    Raises:
        UserError: either cannot be loaded, they do not fit, or `--teacher` names a quantized MODEL.
    """
    dtype = pick_dtype(config.dtype, ranks.device)
    pipeline = configured_pipeline(config, torch.device("cpu"), dtype)
    folders = denoisers_for(pipeline, config.quantized, config.model, optional=True) if config.quantized else {}
    parts = {}
    for name, folder in folders.items():
        parts[name] = load_denoiser(folder, dtype, optional=True)
        check_fits(parts[name], getattr(pipeline, name), config.quantized, config.model)
    if folders:
        folder = next(iter(folders.values()))
        if text_encoder_folders(config, folder):
            texts = load_text_encoders(folder.parent, pipeline)
            log_info(f"{', '.join(texts)} of {config.quantized} are used too")
            parts |= texts
        pipeline.register_modules(**parts)
    elif config.teacher:
        for denoiser in denoisers_of(pipeline).values():
            check_loaded(denoiser, config.model, "--teacher: MODEL")
    elif any(map(quantized_layers, denoisers_of(pipeline).values())):
        log_info(f"MODEL {config.model} is quantized itself; its own denoiser is used")
    return placed(pipeline, config, ranks.device)


def placed(pipeline: DiffusionPipeline, config: GenerateConfig, device: torch.device) -> DiffusionPipeline:
    """Return the pipeline on its device, or offloaded as `--offload` asks."""
    if config.compile:
        for denoiser in denoisers_of(pipeline).values():
            denoiser.compile()
    if config.offload == "model":
        pipeline.enable_model_cpu_offload(device=device)
    elif config.offload == "sequential":
        pipeline.enable_sequential_cpu_offload(device=device)
    else:
        pipeline.to(device)
    return pipeline


def record(config: GenerateConfig, settings: dict, ranks: Ranks, pipeline: DiffusionPipeline) -> dict:
    """Return the content of `run.json`: everything needed to repeat the run."""
    layers = [name for denoiser in denoisers_of(pipeline).values() for name in quantized_layers(denoiser)]
    device = ranks.device
    return {
        "settings": settings,
        "full_precision": not layers,
        "quantized_layers": len(layers),
        "options": {name: value for name, value in config.to_dict().items() if name in FREE_FIELDS},
        "model_commit": model_commit(config.model, config.revision),
        "pipeline": type(pipeline).__name__,
        "scheduler": json.loads(pipeline.scheduler.to_json_string(), parse_constant=str),  # some have an infinity
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "processes": ranks.world,
        "versions": versions(),
        "command": own_command(),
    }


def model_commit(model: str, revision: str | None) -> str | None:
    """Return the commit of a name on the hub; None for a folder or file."""
    if Path(model).exists():
        return None
    index = try_to_load_from_cache(model, "model_index.json", revision=revision)
    return Path(index).parent.name if isinstance(index, str) else None


# ------------------------------------------------------------------------------------------- images


def batches_with(requests: list[Request], pending: list[Request], size: int) -> list[list[Request]]:
    """Return those batches of all requests that hold a pending one."""
    missing = {request.key for request in pending}
    every = [group[start : start + size] for group in alike(requests) for start in range(0, len(group), size)]
    return [batch for batch in every if any(request.key in missing for request in batch)]


def generate_shard(job: GenerationJob, batches: list[list[Request]], pending: list[Request]) -> None:
    """Generate batches and save what is pending; each image and its row are on disk before the next batch begins.

    Raises:
        RunError: every image of the first batch holds NaN, as all others would.
    """
    lines, done, began = JsonLines(job.folder.part(job.ranks.rank)), 0, time.perf_counter()
    missing = {request.key for request in pending}
    share = "images" if job.ranks.world == 1 else "images of this process"
    with progress_bar(total=sum(map(len, batches)), description=share) as ticks:
        for batch, images in generate_in_batches(partial(generate, job.pipeline), batches, job.config.bs):
            if not done and all(one.problem == NAN for one in images):
                raise RunError(f"every image of the first batch holds NaN; {NAN_ADVICE}")
            for request, image in zip(batch, images, strict=True):
                if request.key in missing:
                    lines.write(sealed(save_image(job, request, image) | {"batch_size": len(batch)}))
            if not done:
                job.tracker.images("images", [one.image for one in images])
            done += len(batch)
            ticks.update(len(batch))
            rate = done / (time.perf_counter() - began)
            job.tracker.log({"images": done, "images_per_second": rate}, step=done)


def save_image(job: GenerationJob, request: Request, generated: GeneratedImage) -> dict:
    """Save an image and return its row of the manifest."""
    about = {
        "index": request.index,
        "sample": request.sample,
        "id": request.id,
        "prompt": request.prompt,
        "negative_prompt": request.negative_prompt,
        "seed": request.seed,
        "settings": settings_used(job.pipeline, request, generated.image)
        | {"scheduler": type(job.pipeline.scheduler).__name__},
    }
    model = {"model": job.config.model, "quantized": job.config.quantized, "vqdm": vqdm.__version__}
    digest = job.folder.save(request.key, generated.image, about | model)
    return about | {"file": job.folder.file_of(request.key), "sha256": digest, "problem": generated.problem}


def finish(folder: ImageFolder, requests: list[Request]) -> dict[str, int]:
    """Merge the manifests, write the layout's sheets, and count images with problems.

    Raises:
        RunError: a rank left images out.
    """
    rows = folder.merge()
    wanted: list[Key] = [request.key for request in requests]
    missing = [key for key in wanted if key not in rows]
    if missing:
        raise RunError(f"{len(missing)} images are missing, the first is {folder.file_of(missing[0])}; add --resume")
    folder.write_grids({request.index: request.id for request in requests}, rows)
    return dict(Counter(rows[key]["problem"] for key in wanted if rows[key]["problem"]))
