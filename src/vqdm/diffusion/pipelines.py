"""Load text-to-image pipelines and sample from them, with stock diffusers."""

from __future__ import annotations

import hashlib
import inspect
import math
import re
import zipfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path

import diffusers
import torch
import transformers
from diffusers import DiffusionPipeline
from huggingface_hub import try_to_load_from_cache
from PIL import Image
from safetensors import SafetensorError, safe_open
from torch import nn

from vqdm.config import COMPONENTS, SCHEDULERS, RunConfig
from vqdm.diffusion.denoisers import compute_dtype, denoiser_name, denoiser_of, denoisers_of, family_of
from vqdm.diffusion.model_folders import (
    NO_DENOISER,
    check_declared,
    check_experts,
    check_place,
    check_variant,
    found_variant,
    not_found,
    pickled,
)
from vqdm.diffusion.single_files import (
    bytes_of,
    configuration_folder,
    load_single_file,
    parts_of,
    quiet_diffusers,
)
from vqdm.documents import first_line, read_json, shortened
from vqdm.errors import RunError, UserError
from vqdm.images import generated_images
from vqdm.layers.quantized import drop_decoded, narrowed
from vqdm.storage.files import pipeline_fingerprint, single_file_fingerprint
from vqdm.storage.hf import tensors_in
from vqdm.storage.hub import is_offline
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
    single_file_config: str | None = None,
) -> DiffusionPipeline:
    """Load a frozen pipeline with a denoiser, from a folder, one file, or the hub.

    Raises:
        UserError: MODEL is not a pipeline folder or file, or cannot be had from the hub, or has no denoiser.
    """
    check_model(model, variant, revision, local_files_only, single_file_config)
    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
    offline = is_offline(local_files_only)
    try:
        if Path(model).is_file():
            configuration = configuration_folder(model, single_file_config, revision, local_files_only)
            pipeline = load_single_file(model, configuration, dtype)
        else:
            variant = _logged_variant(model, variant, revision, offline)
            where = {"variant": variant, "revision": revision, "local_files_only": offline}
            where |= dict.fromkeys(absent_parts(model, revision, offline))
            with quiet_diffusers() if _logged_bins(model, revision) else nullcontext():
                pipeline = DiffusionPipeline.from_pretrained(model, dtype=dtype, **where)
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # whatever the libraries answer to files of wrong types or shapes
        if Path(model).exists():
            raise UserError(f"MODEL {model} cannot be loaded: {first_line(error)}") from None
        place = f"is not a folder here{not_found(model)}, and cannot be loaded from the hub"
        raise UserError(f"MODEL {model} {place}: {first_line(error)}") from None
    check_experts(pipeline, f"MODEL {model}")
    if denoiser_name(pipeline) is None:
        raise UserError(f"MODEL {model} is a {type(pipeline).__name__}, {NO_DENOISER}")
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
    """Inside, the pipeline may be called: all parts are on the denoiser's device, text encoders until its first call.

    Of two experts one of which is on the CPU, that which is called is on the device, the other on the CPU. The VAE
    works image by image. Afterwards each part is where it was, and in the type that it had: a call that fails may leave
    the VAE in another. Parts with hooks of accelerate move without this.
    """
    denoisers, device = denoisers_of(pipeline), sampling_device(pipeline)
    sliced = getattr(getattr(pipeline, "vae", None), "use_slicing", None)
    parts = {name: part for name, part in other_parts(pipeline).items() if not hasattr(part, "_hf_hook")}
    away = {name: returning(part) for name, part in parts.items() if part.device != device}
    types = {name: part.dtype for name, part in parts.items() if name == "vae"}
    places = {name: part.device for name, part in denoisers.items() if not hasattr(part, "_hf_hook")}
    turns = {name: denoisers[name] for name in places} if {*places.values()} - {device} else {}

    def leave(denoiser: nn.Module, _) -> None:
        for name, take_back in away.items():
            if name != "vae":
                take_back()
        if denoiser.device != device and denoiser in turns.values():
            for other in turns.values():
                drop_decoded(other)
                other.to("cpu")
            denoiser.to(device)

    hooks = [one.register_forward_pre_hook(leave, prepend=True) for one in denoisers.values() if away or turns]
    slice_vae(pipeline)
    try:
        for name in away:
            parts[name].to(device)
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for name in sorted(turns, key=lambda name: places[name] == device):  # first those that leave
            drop_decoded(turns[name])
            turns[name].to(places[name])
        for take_back in away.values():
            take_back()
        for name, dtype in types.items():
            if parts[name].dtype != dtype:
                parts[name].to(dtype)
        if sliced is not None:
            pipeline.vae.use_slicing = sliced


def returning(part: nn.Module) -> Callable[[], None]:
    """Return a function that takes a part back to where it is now.

    On the CPU it gets the tensors back that it has now, not copies of those on the device: weights that are mapped from
    a file take no RAM, copies do.
    """
    place = part.device
    if place.type != "cpu" or any(type(one) is not nn.Parameter for one in part.parameters()):
        return lambda: part.to(place)
    held = [
        (owner, name, tensor, tensor.data)
        for module in part.modules()
        for owner in (module._parameters, module._buffers)
        for name, tensor in owner.items()
        if tensor is not None
    ]

    def take_back() -> None:
        for owner, name, tensor, data in held:
            tensor.data = data
            owner[name] = tensor

    return take_back


def sampling_device(pipeline: DiffusionPipeline) -> torch.device:
    """Return the device that a pipeline samples on: that of its denoiser, or of the expert that is not on the CPU."""
    devices = [part.device for part in denoisers_of(pipeline).values() if not hasattr(part, "_hf_hook")]
    return next((one for one in devices if one.type != "cpu"), denoiser_of(pipeline).device)


@contextmanager
def resting_on_cpu(pipeline: DiffusionPipeline, expert: str | None = None) -> Iterator[None]:
    """Inside, all parts but the denoiser are on the CPU, except while `parts_in_use`; afterwards where they were.

    Args:
        expert: that which stays of two, by default the first; they may change places inside.
    """
    denoisers = denoisers_of(pipeline)
    stays = denoisers.get(expert, denoiser_of(pipeline))
    experts = denoisers.values() if len(denoisers) > 1 else ()
    parts = [part for part in (*other_parts(pipeline).values(), *experts) if not hasattr(part, "_hf_hook")]
    places = [part.device for part in parts]
    try:
        for part in parts:
            if part is not stays:
                part.to("cpu")
        yield
    finally:
        for part, place in zip(parts, places, strict=True):
            part.to(place)


def networks(pipeline: DiffusionPipeline) -> dict[str, nn.Module]:
    """Return the networks of a pipeline, such as text encoders, denoiser and VAE, by name."""
    return {name: part for name, part in pipeline.components.items() if isinstance(part, nn.Module)}


def other_parts(pipeline: DiffusionPipeline) -> dict[str, nn.Module]:
    """Return the networks of a pipeline other than its denoisers, by name."""
    return {name: part for name, part in networks(pipeline).items() if name not in COMPONENTS}


def configured_pipeline(config: RunConfig, device: torch.device, dtype: torch.dtype) -> DiffusionPipeline:
    """Load the pipeline of a program's flags. Raises UserError as `load_pipeline`."""
    scheduler, where = config.sampling.scheduler, (config.variant, config.revision, config.local_files_only)
    return load_pipeline(config.model, device, dtype, scheduler, *where, config.single_file_config)


def check_configured(config: RunConfig) -> None:
    """Check MODEL of a program's flags. Raises UserError as `check_model`."""
    check_model(config.model, config.variant, config.revision, config.local_files_only, config.single_file_config)


def check_model(
    model: str,
    variant: str | None = None,
    revision: str | None = None,
    local_files_only: bool = False,
    single_file_config: str | None = None,
) -> None:
    """Raise UserError for a path that is neither a pipeline folder nor a pipeline in one file, or lacks a variant.

    Weights are not read. Of a hub name only what is in the cache is checked, where the hub is not asked.
    """
    check_place(model)
    path = Path(model)
    on_hub = single_file_config if path.is_file() else model
    if revision and path.exists() and (on_hub is None or Path(on_hub).exists()):
        kind = "file" if path.is_file() else "folder"
        raise UserError(f"--revision {revision} is of a name on the hub, and MODEL {model} is a {kind}; leave it out")
    if path.is_file():
        if variant:
            raise UserError(f"--variant {variant}: MODEL {model} is one file, without variants; leave --variant out")
        folder = configuration_folder(model, single_file_config, revision, local_files_only)
        return _check_index(folder / "model_index.json", model)
    if single_file_config:
        raise UserError(
            f"--single_file_config {single_file_config} belongs to a MODEL in one .safetensors file, and {model} is "
            f"{'a folder' if path.is_dir() else 'none'}; leave it out"
        )
    if path.is_dir():
        _check_index(path / "model_index.json", model)
        check_variant(path, variant, f"MODEL {model}")
    elif model.startswith((".", "/", "~")) or model.count("/") != 1:
        advice = "give a diffusers pipeline folder, a .safetensors file, or a hub name like owner/name"
        raise UserError(f"MODEL {model} is not found{not_found(model)}; {advice}")
    elif is_offline(local_files_only):
        check_variant(local_folder(model, revision), variant, f"MODEL {model}")


def _logged_variant(model: str, variant: str | None, revision: str | None, offline: bool) -> str | None:
    """Return the variant to load, and log one that was found; the hub has others than the cache, and is asked."""
    if variant or not (offline or Path(model).is_dir()):
        return variant
    found = found_variant(local_folder(model, revision), None)
    if found:
        log_info(f"MODEL {model} has {found} files only; they are read, as with --variant {found}")
    return found


def absent_parts(model: str, revision: str | None, offline: bool) -> list[str]:
    """Return, and log, the parts that MODEL's class takes and its `model_index.json` lacks, or has as null.

    diffusers wants None passed for them, as for the T5 of Stable Diffusion 3 that people leave out.
    """
    index = DiffusionPipeline.load_config(model, revision=revision, local_files_only=offline)
    kind = getattr(diffusers, str(index.get("_class_name")), None)
    if not (isinstance(kind, type) and issubclass(kind, DiffusionPipeline)):
        return []
    expected = inspect.signature(kind.__init__).parameters.values()
    needed = [one.name for one in expected if one.name != "self" and one.default is inspect.Parameter.empty]
    needed = [name for name in needed if name not in kind._optional_components]
    absent = [name for name in needed if name not in index or index[name] in ([], [None, None])]
    if absent:
        log_info(f"MODEL {model} has no {', '.join(absent)}; it is used without")
    return absent


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


def _logged_bins(model: str, revision: str | None) -> list[str]:
    """Return, and log, the components with `.bin` files alone. diffusers would log an error for each of them."""
    folder = local_folder(model, revision)
    bins = pickled(folder) if folder.is_dir() else []
    if bins:
        log_info(f"MODEL {model}: {', '.join(bins)}: .bin files are read, as tensors only; there is no .safetensors")
    return bins


def set_scheduler(pipeline: DiffusionPipeline, name: str) -> None:
    """Replace the pipeline's scheduler, keeping its noise schedule; "default" keeps it as it is.

    Raises:
        UserError: the pipeline's own scheduler is of flow matching, which another one would not continue.
    """
    if SCHEDULERS[name]:
        own, kind = pipeline.scheduler, getattr(diffusers, SCHEDULERS[name])
        if is_flow_matching(own) and type(own) is not kind:
            what = f"the model's {type(own).__name__} is of flow matching"
            raise UserError(f"--scheduler is {name}, but {what}; allowed is default")
        options = {"use_karras_sigmas": False} if name == "ode" else {}
        pipeline.scheduler = kind.from_config(own.config, **options)


def is_flow_matching(scheduler) -> bool:
    """Return whether a scheduler mixes data and noise as (1 - σ) · x + σ · ε, not by alphas_cumprod."""
    return "FlowMatch" in type(scheduler).__name__ or bool(scheduler.config.get("use_flow_sigmas"))


def local_folder(model: str, revision: str | None) -> Path:
    """Return the place of a pipeline's files: MODEL, or for a hub name its folder in the cache, once loaded."""
    cached = None if Path(model).exists() else try_to_load_from_cache(model, "model_index.json", revision=revision)
    return Path(cached).parent if isinstance(cached, str) else Path(model)


def weight_files(model: str, variant: str | None, component: str = "*", revision: str | None = None) -> list[Path]:
    """Return the weight files that diffusers reads of a loaded pipeline folder, sorted.

    Those of the variant, where a component has it, else plain ones; `.bin` where there is no safetensors.
    """
    folder, chosen = local_folder(model, revision), []
    variant = found_variant(folder, variant)
    for part in sorted(folder.glob(component)):
        files = sorted([*part.glob("*.safetensors"), *part.glob("*_model*.bin")])
        own = [file for file in files if file.name.partition(".")[2].startswith((f"{variant}.", f"{variant}-"))]
        own = own or [file for file in files if file.name.count(".") == 1]
        chosen += [file for file in own if file.suffix == ".safetensors"] or own
    return chosen


def check_headers(config: RunConfig) -> None:
    """Raise UserError where the header of one of MODEL's safetensors files cannot be read."""
    for file in weight_files(config.model, config.variant, "*", config.revision):
        try:
            list(tensors_in([file] if file.suffix == ".safetensors" else []))
        except SafetensorError as error:
            raise UserError(f"MODEL {config.model} cannot be loaded: {file}: {first_line(error)}") from None


def stored_bytes(model: str, variant: str | None, component: str, revision: str | None = None) -> int | None:
    """Return the bytes of a component in the files of a loaded pipeline; None where there are none."""
    if Path(model).is_file():
        return bytes_of(parts_of(model).get(component, {})) or None
    return sum(file.stat().st_size for file in weight_files(model, variant, component, revision)) or None


def bytes_in_ram(config: RunConfig, pipeline: DiffusionPipeline, given: bool) -> dict[str, int]:
    """Return by network the bytes of RAM of its weights while they are on the CPU, in the type that is computed in.

    diffusers and transformers map safetensors files: weights of that type stay there, and the system reads them when
    they are needed. Others, and those of a pipeline that is `given` loaded, are in RAM. Without any files, as of
    configurations alone, all count as mapped.
    """
    dtype, found = compute_dtype(denoiser_of(pipeline)), {}
    for name, part in networks(pipeline).items():
        found[name] = dtype.itemsize * sum(one.numel() for one in part.parameters())
        files = None if given else weight_files(config.model, config.variant, name, config.revision)
        if files is not None and not Path(config.model).is_file():
            tensors = tensors_in(file for file in files if file.suffix == ".safetensors")
            mapped = [math.prod(shape) for _, (shape, kind) in tensors if TYPES.get(kind) == dtype]
            found[name] = max(0, found[name] - dtype.itemsize * sum(mapped)) if files else 0
    return found


def parameter_bytes(part: nn.Module) -> int:
    """Return the bytes of a network's parameters in memory."""
    return sum(tensor.element_size() * tensor.numel() for tensor in part.parameters())


def pipeline_bytes(config: RunConfig, pipeline: DiffusionPipeline, given: bool) -> int | None:
    """Return the bytes of all of MODEL's weight files; of a pipeline that is given loaded, those in memory."""
    if given:
        return sum(map(parameter_bytes, networks(pipeline).values()))
    if Path(config.model).is_file():
        return Path(config.model).stat().st_size
    return stored_bytes(config.model, config.variant, "*", config.revision)


def local_fingerprint(config: RunConfig) -> str | None:
    """Return the fingerprint of MODEL's files, or of its file and configuration; None for a name on the hub."""
    path = Path(config.model)
    if not path.is_file():
        return pipeline_fingerprint(path) if path.is_dir() else None
    where = (config.single_file_config, config.revision, config.local_files_only)
    return single_file_fingerprint(path, configuration_folder(config.model, *where))


def stored_dtypes(
    model: str, variant: str | None, revision: str | None = None, component: str = "*"
) -> dict[str, torch.dtype]:
    """Return by component name the widest type of the weights and biases in its files, of a loaded pipeline.

    Codebooks and scales of quantized layers do not count.
    """
    if Path(model).is_file():
        parts = parts_of(model).items()
        held = [(part, {name: TYPES.get(kind) for name, (_, kind) in tensors.items()}) for part, tensors in parts]
    else:
        held = [(file.parent.name, dtypes_in(file)) for file in weight_files(model, variant, component, revision)]
    found: dict[str, torch.dtype] = {}
    for part, dtypes in held:
        for dtype in {dtype for name, dtype in dtypes.items() if dtype and name.endswith(("weight", "bias"))}:
            widest = found.setdefault(part, dtype)
            found[part] = dtype if dtype.itemsize > widest.itemsize else widest
    return found


def dtypes_in(file: Path) -> dict[str, torch.dtype]:
    """Return the type of every tensor in 16 or 32-bit floating point in a weight file; no tensor is read."""
    if file.suffix == ".bin":
        tensors = torch.load(file, map_location="meta", weights_only=True, mmap=zipfile.is_zipfile(file) or None)
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


def latent_scale(pipeline: DiffusionPipeline) -> int:
    """Return the side in pixels of what one latent stands for; pipelines of videos name it otherwise."""
    return getattr(pipeline, "vae_scale_factor", None) or pipeline.vae_scale_factor_spatial


def image_size(pipeline: DiffusionPipeline, height: int | None, width: int | None) -> tuple[int, int]:
    """Return height and width in pixels, the pipeline's own where None.

    Raises:
        UserError: one is None, and neither the pipeline nor its denoiser's configuration names a size.
    """
    scale, denoiser = latent_scale(pipeline), denoiser_of(pipeline)
    side = denoiser.config.get("sample_size", getattr(pipeline, "default_sample_size", None))
    own = [one * scale for one in ((side, side) if isinstance(side, int) else side or ())]
    if not own and family_of(denoiser).side:
        own = [family_of(denoiser).side] * 2
    if not own:
        known = inspect.signature(pipeline.__call__).parameters
        own = [known[side].default for side in ("height", "width") if isinstance(known[side].default, int)]
    if not own and None in (height, width):
        raise UserError("MODEL's denoiser names no size of its images; give --height and --width")
    return height or own[0], width or own[1]


def call_arguments(pipeline: DiffusionPipeline, settings: dict, prompts: int) -> dict:
    """Return settings, without those that are None, as keyword arguments of the pipeline's call on so many prompts.

    Raises:
        UserError: the pipeline takes no negative prompt.
    """
    given = {name: value for name, value in settings.items() if value is not None}
    row, known = family_of(denoiser_of(pipeline)), inspect.signature(pipeline.__call__).parameters
    if "guidance_scale" in given:
        given[row.guidance] = given.pop("guidance_scale")
    if row.negative is not None:
        given.setdefault("negative_prompt", [row.negative] * prompts)
    if "negative_prompt" in given and "negative_prompt" not in known:
        raise UserError(f"negative_prompt: a {type(pipeline).__name__} takes none; leave it out")
    if "num_frames" in known:
        given["num_frames"] = 1  # an image, of a model of videos
    if "use_resolution_binning" in known and {"height", "width"} <= given.keys():
        given["use_resolution_binning"] = False  # the size that was asked for, not one of its own that is near
    return given


def latent_values(pipeline: DiffusionPipeline, height: int, width: int) -> int:
    """Return the number of values of the latents of one image of a size in pixels."""
    config = pipeline.vae.config
    channels = config.get("latent_channels") or config.get("z_dim") or denoiser_of(pipeline).config.in_channels
    return channels * (height * width // latent_scale(pipeline) ** 2)


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
    """Generate images for a batch of prompts, or latents [N, C, (1,) h, w]; the k-th uses seed `seed + first + k`.

    Args:
        settings: keyword arguments of the pipeline call; None values are left to the pipeline.

    Returns:
        PIL images, with what is wrong with one in its `info` (see `images`); for `output_type="latent"` a tensor.

    Raises:
        RunError: latents hold NaN or infinity.
    """
    given = {"output_type": "pt"} | call_arguments(pipeline, settings, len(prompts))
    noise = generators(seed, range(first, first + len(prompts)))
    with parts_in_use(pipeline):
        result = pipeline(prompt=prompts, generator=noise, **given)
    if given["output_type"] != "latent":
        return [one.image for one in generated_images(result)]
    latents = result.images if hasattr(result, "images") else result.frames
    if not latents.isfinite().all():
        raise RunError("sampling gave NaN or infinity; run the model in another --dtype (float32 or bfloat16)")
    return latents
