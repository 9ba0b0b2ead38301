"""Load text-to-image pipelines and sample from them, with stock diffusers."""

from __future__ import annotations

import hashlib
import math
import os
import re
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import diffusers
import torch
import transformers
from diffusers import DiffusionPipeline
from huggingface_hub import try_to_load_from_cache
from PIL import Image
from safetensors import safe_open
from torch import nn

from vqdm.config import SCHEDULERS, RunConfig
from vqdm.diffusion.model_folders import check_declared, check_place, check_variant, not_found, pickled
from vqdm.documents import first_line, read_json, shortened
from vqdm.errors import RunError, UserError
from vqdm.images import generated_images
from vqdm.layers.quantized import narrowed
from vqdm.tracking import log, log_info

TYPES = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}  # as safetensors spells them

MOST_TOKENS = 2**20  # of a prompt, where a tokenizer has a limit at all


def load_pipeline(
    model: str,
    device: torch.device,
    dtype: torch.dtype,
    scheduler: str = "default",
    variant: str | None = None,
    revision: str | None = None,
    local_files_only: bool = False,
) -> DiffusionPipeline:
    """Load a frozen pipeline with a UNet, from a folder or the hub.

    Raises:
        UserError: MODEL is not a pipeline folder or cannot be had from the hub, or has no UNet.
    """
    check_model(model, variant)
    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
    offline = local_files_only or os.environ.get("HF_HUB_OFFLINE") == "1"
    try:
        pipeline = DiffusionPipeline.from_pretrained(
            model, dtype=dtype, variant=variant, revision=revision, local_files_only=offline
        )
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # whatever the libraries answer to files of wrong types or shapes
        if Path(model).is_dir():
            raise UserError(f"MODEL {model} cannot be loaded: {first_line(error)}") from None
        place = f"is not a folder here{not_found(model)}, and cannot be loaded from the hub"
        raise UserError(f"MODEL {model} {place}: {first_line(error)}") from None
    if not isinstance(getattr(pipeline, "unet", None), nn.Module):
        raise UserError(f"MODEL {model} is a {type(pipeline).__name__}, which has no UNet; vqdm quantizes UNets")
    bins = pickled(model) if Path(model).is_dir() else []
    if bins:
        log_info(f"MODEL {model}: {', '.join(bins)}: .bin files are read, as tensors only; there is no .safetensors")
    pipeline.set_progress_bar_config(disable=True)
    set_scheduler(pipeline, scheduler)
    for part in pipeline.components.values():
        if isinstance(part, nn.Module):
            part.requires_grad_(False).eval()
    slice_vae(pipeline)
    # Half precision may wait on the CPU for a GPU; diffusers warns of it for every component.
    return pipeline.to(device, silence_dtype_warnings=True)


def slice_vae(pipeline: DiffusionPipeline) -> None:
    """Make the VAE decode and encode image by image, where it can: all of a batch at once would set the peak."""
    if hasattr(getattr(pipeline, "vae", None), "use_slicing"):
        pipeline.vae.use_slicing = True


@contextmanager
def parts_in_use(pipeline: DiffusionPipeline) -> Iterator[None]:
    """Inside, the pipeline may be called: all parts are on the UNet's device, text encoders until its first call.

    The VAE works image by image. Afterwards each part is where it was, and in the type that it had: a call that fails
    may leave the VAE in another. Parts with hooks of accelerate move without this.
    """
    device, sliced = pipeline.unet.device, getattr(getattr(pipeline, "vae", None), "use_slicing", None)
    parts = {name: part for name, part in other_parts(pipeline).items() if not hasattr(part, "_hf_hook")}
    away = {name: part.device for name, part in parts.items() if part.device != device}
    types = {name: part.dtype for name, part in parts.items() if name == "vae"}

    def leave(*_) -> None:
        for name, place in away.items():
            if name != "vae":
                parts[name].to(place)

    hook = pipeline.unet.register_forward_pre_hook(leave) if away else None
    slice_vae(pipeline)
    try:
        for name in away:
            parts[name].to(device)
        yield
    finally:
        if hook:
            hook.remove()
        for name, place in away.items():
            parts[name].to(place)
        for name, dtype in types.items():
            if parts[name].dtype != dtype:
                parts[name].to(dtype)
        if sliced is not None:
            pipeline.vae.use_slicing = sliced


@contextmanager
def resting_on_cpu(pipeline: DiffusionPipeline) -> Iterator[None]:
    """Inside, all parts but the UNet are on the CPU, except while `parts_in_use`; afterwards where they were."""
    parts = [part for part in other_parts(pipeline).values() if not hasattr(part, "_hf_hook")]
    places = [part.device for part in parts]
    try:
        for part in parts:
            part.to("cpu")
        yield
    finally:
        for part, place in zip(parts, places, strict=True):
            part.to(place)


def other_parts(pipeline: DiffusionPipeline) -> dict[str, nn.Module]:
    """Return the networks of a pipeline other than its UNet, such as text encoders and VAE, by name."""
    parts = {name: part for name, part in pipeline.components.items() if isinstance(part, nn.Module)}
    return {name: part for name, part in parts.items() if name != "unet"}


def configured_pipeline(config: RunConfig, device: torch.device, dtype: torch.dtype) -> DiffusionPipeline:
    """Load the pipeline of a program's flags. Raises UserError as `load_pipeline`."""
    scheduler, where = config.sampling.scheduler, (config.variant, config.revision, config.local_files_only)
    return load_pipeline(config.model, device, dtype, scheduler, *where)


def check_model(model: str, variant: str | None = None) -> None:
    """Raise UserError for a path that is not a pipeline folder, or lacks a variant, before anything slow is tried."""
    check_place(model)
    path = Path(model)
    if path.is_dir():
        _check_index(path / "model_index.json", model)
        check_variant(model, variant)
    elif model.startswith((".", "/", "~")) or model.count("/") != 1:
        advice = "give a diffusers pipeline folder, or a hub name like owner/name"
        raise UserError(f"MODEL {model} is not found{not_found(model)}; {advice}")


def _check_index(index: Path, model: str) -> None:
    """Raise UserError for a `model_index.json` that is no object, or names parts outside of its folder."""
    try:
        names = list(read_json(index).items())
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(f"MODEL {model}: model_index.json cannot be read: {first_line(error)}") from None
    unfit = [name for name, value in names if isinstance(value, list) and not re.fullmatch(r"\w+", name)]
    if unfit:
        raise UserError(f"MODEL {model}: model_index.json names a part {shortened(unfit[0])}; allowed are words")
    for file in sorted(index.parent.glob("*/config.json")):
        try:
            check_declared(read_json(file))
        except (OSError, ValueError, AttributeError) as error:
            raise UserError(f"MODEL {model}: {file} cannot be read: {first_line(error)}") from None


def set_scheduler(pipeline: DiffusionPipeline, name: str) -> None:
    """Replace the pipeline's scheduler, keeping its noise schedule; "default" keeps it as it is."""
    if SCHEDULERS[name]:
        kind = getattr(diffusers, SCHEDULERS[name])
        options = {"use_karras_sigmas": False} if name == "ode" else {}
        pipeline.scheduler = kind.from_config(pipeline.scheduler.config, **options)


def local_folder(model: str, revision: str | None) -> Path:
    """Return the folder of a pipeline's files: MODEL, or for a hub name its folder in the cache, once loaded."""
    cached = None if Path(model).is_dir() else try_to_load_from_cache(model, "model_index.json", revision=revision)
    return Path(cached).parent if isinstance(cached, str) else Path(model)


def weight_files(model: str, variant: str | None, component: str = "*", revision: str | None = None) -> list[Path]:
    """Return the weight files of one variant of a loaded pipeline, sorted; `.bin` where there is no safetensors."""
    folder = local_folder(model, revision)
    files = sorted(folder.glob(f"{component}/*.safetensors"))
    safe = {file.parent for file in files}
    files += [file for file in sorted(folder.glob(f"{component}/*_model*.bin")) if file.parent not in safe]
    if variant:
        return [file for file in files if file.name.partition(".")[2].startswith((f"{variant}.", f"{variant}-"))]
    return [file for file in files if file.name.count(".") == 1]


def stored_dtypes(
    model: str, variant: str | None, revision: str | None = None, component: str = "*"
) -> dict[str, torch.dtype]:
    """Return by component name the widest type of the weights and biases in its files, of a loaded pipeline.

    Codebooks and scales of quantized layers do not count.
    """
    found: dict[str, torch.dtype] = {}
    for file in weight_files(model, variant, component, revision):
        kinds = {dtype for name, dtype in dtypes_in(file).items() if name.endswith(("weight", "bias"))}
        for dtype in kinds:
            widest = found.setdefault(file.parent.name, dtype)
            found[file.parent.name] = dtype if dtype.itemsize > widest.itemsize else widest
    return found


def stored_values(model: str, variant: str | None, revision: str | None = None) -> dict[str, int]:
    """Return by component name how many values its safetensors files hold; only headers are read."""
    found: dict[str, int] = {}
    for file in weight_files(model, variant, revision=revision):
        if file.suffix == ".safetensors":
            with safe_open(file, "pt") as tensors:
                shapes = [tensors.get_slice(name).get_shape() for name in tensors.keys()]  # noqa: SIM118
            found[file.parent.name] = found.get(file.parent.name, 0) + sum(map(math.prod, shapes))
    return found


def dtypes_in(file: Path) -> dict[str, torch.dtype]:
    """Return the type of every tensor in 16 or 32-bit floating point in a weight file; no tensor is read."""
    if file.suffix == ".bin":
        tensors = torch.load(file, map_location="meta", weights_only=True, mmap=True)
        kinds = {name: tensor.dtype for name, tensor in tensors.items()}
    else:
        with safe_open(file, "pt") as tensors:
            kinds = {name: TYPES.get(tensors.get_slice(name).get_dtype()) for name in tensors.keys()}  # noqa: SIM118
    return {name: dtype for name, dtype in kinds.items() if dtype in TYPES.values()}


def weights_fingerprint(pipeline: DiffusionPipeline) -> str:
    """Return the SHA-256 of the names, types and values of all tensors of a pipeline's components."""
    digest = hashlib.sha256()
    for name, part in sorted(pipeline.components.items()):
        for key, tensor in part.state_dict().items() if isinstance(part, nn.Module) else ():
            digest.update(f"{name}.{key} {tensor.dtype} {list(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


@contextmanager
def saved_types(pipeline: DiffusionPipeline, stored: dict[str, torch.dtype]) -> Iterator[None]:
    """Inside, every component is in the type that is saved: that it computes in, or a narrower one of its files."""
    with ExitStack() as narrowing:
        for name, dtype in stored.items():
            part = getattr(pipeline, name, None)
            if isinstance(part, nn.Module):
                narrowing.enter_context(narrowed(part, dtype))
        yield


def image_size(pipeline: DiffusionPipeline, height: int | None, width: int | None) -> tuple[int, int]:
    """Return height and width in pixels, the pipeline's own where None.

    Raises:
        UserError: one is None, and the UNet's configuration names no size.
    """
    side, scale = pipeline.unet.config.sample_size, pipeline.vae_scale_factor
    if side is None and None in (height, width):
        raise UserError("MODEL's UNet names no size of its images; give --height and --width")
    own = (side, side) if isinstance(side, int) else side or (0, 0)
    return height or own[0] * scale, width or own[1] * scale


def generators(seed: int, indices: range | list[int]) -> list[torch.Generator]:
    """Return one CPU generator per image: its noise depends on neither batch size nor device."""
    return [torch.Generator("cpu").manual_seed(seed + index) for index in indices]


def log_truncated(pipeline: DiffusionPipeline, prompts: Iterable[str]) -> None:
    """Log one line if prompts are longer than a text encoder reads: how many, and the first of them."""
    names = [name for name in pipeline.components if name.startswith("tokenizer")]
    tokenizers = [part for name in names if (part := getattr(pipeline, name)) is not None]
    tokenizers = [one for one in tokenizers if one.model_max_length < MOST_TOKENS]
    every, long = list(dict.fromkeys(prompts)), set()
    for one in tokenizers:
        lengths = map(len, one(every).input_ids if every else [])
        long |= {text for text, length in zip(every, lengths, strict=True) if length > one.model_max_length}
    if long:
        most = min(one.model_max_length for one in tokenizers)
        log.warning(
            "warning: %d of %d prompts are longer than the %d tokens that a text encoder reads, and are cut off there; "
            "the first begins %s",
            *(len(long), len(every), most, shortened(next(text for text in every if text in long))),
        )


@torch.no_grad()
def sample(pipeline: DiffusionPipeline, prompts: list[str], seed: int, first: int, settings: dict) -> list[Image.Image]:
    """Generate images for a batch of prompts, or latents [N, C, h, w]; the k-th uses seed `seed + first + k`.

    Args:
        settings: keyword arguments of the pipeline call; None values are left to the pipeline.

    Returns:
        PIL images, with what is wrong with one in its `info` (see `images`); for `output_type="latent"` a tensor.

    Raises:
        RunError: latents hold NaN or infinity.
    """
    given = {name: value for name, value in settings.items() if value is not None}
    given.setdefault("output_type", "pt")
    noise = generators(seed, range(first, first + len(prompts)))
    with parts_in_use(pipeline):
        result = pipeline(prompt=prompts, generator=noise, **given)
    if given["output_type"] != "latent":
        return [one.image for one in generated_images(result)]
    if not result.images.isfinite().all():
        raise RunError("sampling gave NaN or infinity; run the model in another --dtype (float32 or bfloat16)")
    return result.images
