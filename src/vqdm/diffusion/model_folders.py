"""Read model folders: which are pipelines, which can be calibrated, and the denoiser of a quantized one.

A path that is no pipeline folder is refused with the way to make one of it. A model that is quantized already would be
compared with itself, and seem perfect; one that needs more than a prompt cannot be sampled. Both are found in
config.json files, before weights are loaded, and again in what was loaded.
"""

from __future__ import annotations

import difflib
import inspect
import re
from pathlib import Path

import diffusers
import torch
from diffusers import DiffusionPipeline, ModelMixin
from torch import nn

from vqdm.config import COMPONENTS, SECOND_EXPERT, label
from vqdm.diffusion.denoisers import denoisers_of
from vqdm.diffusion.single_files import (
    FIRST_LAYER,
    INDEX,
    QUANTIZED_KEYS,
    check_single_file,
    configuration_folder,
    parts_of,
)
from vqdm.documents import first_line, read_json, shortened
from vqdm.errors import UserError
from vqdm.layers.quantized import quantized_layers
from vqdm.storage.hf import Method
from vqdm.storage.hub import is_offline
from vqdm.tracking import log_info

# name, variant, number of a shard, variant where it follows the number, as older files have it
WEIGHTS = re.compile(
    r"(?:diffusion_pytorch_)?(?:pytorch_)?model(?:\.([\w-]+?))?(?:-\d+-of-\d+)?(?:\.([\w-]+))?\.(?:safetensors|bin)"
)
MOST_DECLARED = 2**20  # the largest number in a component's config.json, and
MOST_ENTRIES = 64  # the longest list
PIPELINES = {
    "unet": (
        "StableDiffusionPipeline",
        "StableDiffusionXLPipeline",
        "LatentConsistencyModelPipeline",
        "KolorsPipeline",
    ),
    "transformer": (
        "FluxPipeline",
        "StableDiffusion3Pipeline",
        "PixArtAlphaPipeline",
        "PixArtSigmaPipeline",
        "SanaPipeline",
        "QwenImagePipeline",
        "ZImagePipeline",
        "Flux2Pipeline",
        "Flux2KleinPipeline",
        "WanPipeline",
    ),
}
# Arguments of pipelines that make an image, or frames, of something else than a prompt.
MORE_THAN_A_PROMPT = ("image", "mask_image", "control_image", "video", "audio", "images", "input_image")
# Setting of a UNet → the values with which all that it is called with is recorded.
RECORDED = {
    "class_embed_type": (None,),
    "num_class_embeds": (None,),
    "encoder_hid_dim_type": (None, "text_proj"),
    "addition_embed_type": (None, "text", "text_time"),
}
FULL_PRECISION = {"F16", "BF16", "F32", "F64"}  # as safetensors spells them
QUANTIZED_FILES = ("quantization_config.json", "quantize_config.json", "quanto_qmap.json")
# Settings that a denoiser must share with the pipeline it is put into, where it has them.
SHARED_SETTINGS = ("in_channels", "out_channels", "cross_attention_dim", "addition_embed_type", "time_cond_proj_dim")
SHARED_SETTINGS += ("num_layers", "num_single_layers", "num_attention_heads", "attention_head_dim", "patch_size")
SHARED_SETTINGS += ("joint_attention_dim", "pooled_projection_dim", "caption_channels", "guidance_embeds", "n_layers")
NO_DENOISER = f"which has neither {' nor '.join(COMPONENTS)}: there is nothing to quantize"


def check_place(model: str, flag: str = "MODEL") -> None:
    """Raise UserError, with what to do, for a path that exists but is no pipeline folder nor a pipeline in one file."""
    path = Path(model)
    if path.is_file():
        return check_single_file(path, flag)
    if not path.is_dir() or (path / INDEX).is_file():
        return
    whole = f"{flag} {model} is"
    if not any(path.iterdir()):
        raise UserError(f"{whole} an empty folder; give a diffusers pipeline folder")
    if (path.absolute().parent / INDEX).is_file():
        raise UserError(f"{whole} a part of the pipeline {path.parent}; give that folder")
    inside = sorted([*path.glob(f"*/{INDEX}"), *path.glob(f"snapshots/*/{INDEX}")])
    if inside:
        raise UserError(f"{whole} a folder without {INDEX}, so not a diffusers pipeline; give {inside[0].parent}")
    kind = _kind(path)
    if kind:
        raise UserError(f"{whole} a single {kind} without {INDEX}; give a whole diffusers pipeline folder")
    files = sorted(path.glob("*.safetensors"))
    advice = f"; for a model in one file give that, {files[0]}" if files else ""
    raise UserError(f"{whole} a folder without {INDEX}, so not a diffusers pipeline{advice}")


def not_found(model: str) -> str:
    """Return the nearest name in the folder of a MODEL that is not found, in words."""
    path = Path(model)
    if path.exists():
        return " (it is neither a file nor a folder)"
    try:
        names = sorted(entry.name for entry in path.parent.iterdir()) if path.name else []
    except OSError:
        names = []
    near = difflib.get_close_matches(path.name, names, 1, 0.7)
    return f" (did you mean {path.parent / near[0]}?)" if near else ""


def _kind(folder: Path) -> str | None:
    """The class of a component's folder."""
    for name in ("config.json", "scheduler_config.json", "tokenizer_config.json"):
        try:
            config = read_json(folder / name)
            found = (
                config.get("_class_name") or config.get("tokenizer_class") or (config.get("architectures") or [""])[0]
            )
        except (OSError, ValueError, AttributeError, IndexError, TypeError):
            continue
        return shortened(found or name).strip("'")
    return None


# ------------------------------------------------------------------------------------------- variants


def variants(folder: Path) -> dict[str | None, str]:
    """Return by variant of a component's weight files, None for plain ones, the first file."""
    found: dict[str | None, str] = {}
    for file in sorted(folder.iterdir()) if folder.is_dir() else ():
        match = WEIGHTS.fullmatch(file.name)
        if match:
            found.setdefault(match[1] or match[2], file.name)
    return found


def only_variant(folder: Path) -> str | None:
    """Return the variant of a component that has files of one variant and no plain ones, else None."""
    found = variants(folder)
    return next(iter(found)) if len(found) == 1 else None


def found_variant(folder: Path, variant: str | None) -> str | None:
    """Return the variant to load of a pipeline folder: `variant`, or the only one of components without plain files."""
    lacking = [held for held in _variants_by_part(folder).values() if None not in held]
    offered = set.intersection(*map(set, lacking)) if lacking else set()
    return variant or (offered.pop() if len(offered) == 1 else None)


def _variants_by_part(folder: Path) -> dict[str, dict[str | None, str]]:
    parts = sorted(part for part in folder.iterdir() if part.is_dir()) if folder.is_dir() else ()
    return {part.name: held for part in parts if (held := variants(part))}


def pickled(folder: Path) -> list[str]:
    """Return the components of a pipeline folder with weights in `.bin` files alone."""
    endings = {
        part.name: {file.suffix for file in part.iterdir() if WEIGHTS.fullmatch(file.name)}
        for part in sorted(folder.iterdir())
        if part.is_dir()
    }
    return [name for name, held in endings.items() if held == {".bin"}]


def check_variant(folder: Path, variant: str | None, name: str) -> None:
    """Raise UserError where a pipeline folder has no weight files of a variant, or without one several variants.

    Of a component without that variant its plain files are read, as diffusers does.

    Args:
        name: of the argument and its value.
    """
    found, wanted = _variants_by_part(folder), found_variant(folder, variant)
    lacking = {part: held for part, held in found.items() if None not in held and wanted not in held}
    if lacking:
        common = sorted(set.intersection(*map(set, lacking.values())))
        kind = f"no {variant} files" if variant else "no files without a variant"
        files = ", ".join(f"{part}/{file}" for part, held in lacking.items() for file in held.values())
        advice = f"add --variant {' or '.join(common)}" if common else "save it again with one variant"
        raise UserError(f"{name}: {', '.join(lacking)}: {kind}, only {files}; {advice}")
    if variant and found and not any(variant in held for held in found.values()):
        raise UserError(f"--variant {variant}: {name} has no such files; leave --variant out")


# ------------------------------------------------------------------------------------------- full-precision models


def check_full_precision(
    model: str, revision: str | None, local_files_only: bool, name: str = "MODEL", role: str = ""
) -> None:
    """Raise UserError where the files of a pipeline, or its one file, say that its denoiser is quantized already.

    Args:
        name: of the argument or flag that gives the model.
        role: what the full-precision model is for, to end the line with.
    """
    if Path(model).is_file():
        kinds = {kind for key, (_, kind) in parts_of(model)["unet"].items() if key.endswith("weight")}
        method = ", ".join(sorted(kinds - FULL_PRECISION))
    else:
        names = _named_denoisers(_index(model, revision, local_files_only) or {}) or COMPONENTS[:1]
        configs = {one: _component(model, one, revision, local_files_only) for one in names}
        found = (_quantization(model, one, config) for one, config in configs.items())
        method = next(filter(None, found), None)
    if method:
        raise UserError(f"{name} {model} is quantized itself ({method}); give the full-precision model{role}")


def check_supported(
    model: str,
    revision: str | None,
    local_files_only: bool,
    name: str = "MODEL",
    role: str = "",
    single_file_config: str | None = None,
) -> None:
    """Raise UserError where the files of a pipeline say that it cannot be calibrated; other files pass.

    A text encoder or VAE that is quantized stays as it is, which is logged.
    """
    one_file = Path(model).is_file()
    place = str(configuration_folder(model, single_file_config, revision, local_files_only)) if one_file else model
    index = _index(place, revision, local_files_only)
    if index is None:
        return
    _check_pipeline(f"{name} {model}", index)
    check_full_precision(model, revision, local_files_only, name, role)
    denoiser, *others = _named_denoisers(index)
    parts = [part for part, value in index.items() if isinstance(value, list) and part not in (denoiser, *others)]
    configs = {part: _component(place, part, revision, local_files_only) for part in parts}
    config = _component(place, denoiser, revision, local_files_only)
    if one_file:  # the file decides: inpainting models are named by it alone
        config = (config or {}) | {"in_channels": parts_of(model)["unet"][FIRST_LAYER][0][1]}
    if denoiser == "unet":
        _check_unet(f"{name} {model}", config, configs.get("vae") or {})
    for part, config in configs.items():
        method = _quantization(place, part, config)
        if method:
            log_info(f"{part} of {name} {model} is quantized ({method}) and stays as it is")


def check_supported_pipeline(pipeline: DiffusionPipeline, name: str) -> None:
    """Raise UserError, naming the argument, where a loaded pipeline cannot be calibrated."""
    kind, vae = type(pipeline).__name__, getattr(pipeline, "vae", None)
    held = {one: part for one in COMPONENTS if isinstance(part := getattr(pipeline, one, None), nn.Module)}
    _check_pipeline(
        name, {"_class_name": kind} | {one: ["diffusers", type(part).__name__] for one, part in held.items()}
    )
    check_experts(pipeline, name)
    for own, denoiser in denoisers_of(pipeline).items():
        check_loaded(denoiser, kind, name)
        if hasattr(denoiser, "peft_config"):
            raise UserError(
                f"{name} has LoRA weights beside its {label(own)}; call fuse_lora() and unload_lora_weights() first"
            )
        if own == "unet":
            _check_unet(name, dict(denoiser.config), {} if vae is None else dict(vae.config))


def check_experts(pipeline: DiffusionPipeline, name: str) -> None:
    """Raise UserError, naming the argument, where a pipeline of two experts lacks one that it would call."""
    if "boundary_ratio" not in pipeline.config:
        return
    ratio = pipeline.config.boundary_ratio
    called = {"transformer": ratio is None or ratio < 1, SECOND_EXPERT: ratio is not None and ratio > 0}
    missing = [one for one, needed in called.items() if needed and getattr(pipeline, one, None) is None]
    if missing:
        has = f"has no {missing[0]}, which a boundary_ratio of {ratio} has called"
        raise UserError(f"{name} {has}; add it, or set boundary_ratio in {INDEX}: null for transformer alone, else 1")


def check_loaded(denoiser: nn.Module, model: str, name: str = "MODEL", role: str = "") -> None:
    """Raise UserError where a denoiser was quantized by any library, whatever its files said."""
    method = quantized_by(denoiser)
    if method:
        raise UserError(f"{name} {model} is quantized itself ({method}); give the full-precision model{role}")


def quantized_by(model: nn.Module) -> str | None:
    """Return the method that a loaded model is quantized with, or the type of an unusual weight; None if plain."""
    method = getattr(getattr(getattr(model, "hf_quantizer", None), "quantization_config", None), "quant_method", None)
    if method:
        return str(getattr(method, "value", method))
    for module in model.modules():
        if hasattr(module, "stored_tensors"):
            return "vqdm"
        weight = getattr(module, "weight", None) if isinstance(module, nn.Linear | nn.Conv2d) else None
        if weight is not None and type(weight) is not nn.Parameter:
            return type(weight).__name__
        if weight is not None and (not weight.is_floating_point() or weight.element_size() < 2):
            return str(weight.dtype).removeprefix("torch.")
    return None


def _named_denoisers(index: dict) -> list[str]:
    """Return the names of the denoisers in the content of a `model_index.json`."""
    return [name for name in COMPONENTS if isinstance(index.get(name), list) and index[name][-1:] not in ([], [None])]


def _check_pipeline(model: str, index: dict) -> None:
    kind, held = index.get("_class_name"), _named_denoisers(index)
    if not held:
        raise UserError(f"{model} is a {kind}, {NO_DENOISER}")
    denoiser = held[0]
    if (
        SECOND_EXPERT in held
        and "boundary_ratio" not in inspect.signature(getattr(diffusers, str(kind), dict)).parameters
    ):
        raise UserError(
            f"{model} is a {kind} with a {SECOND_EXPERT} but no boundary_ratio that says when it is called, which is "
            "unsupported"
        )
    library, own = index[denoiser][0], index[denoiser][-1]
    if denoiser == "unet" and library == "diffusers" and own != "UNet2DConditionModel":
        raise UserError(f"{model} has a {own} as its UNet, which is unsupported; allowed is UNet2DConditionModel")
    known = PIPELINES["unet" if denoiser == "unet" else "transformer"]
    if kind in known or not hasattr(diffusers, str(kind)):
        return
    asked = inspect.signature(getattr(diffusers, kind).__call__).parameters.values()
    more = [one.name for one in asked if one.name in MORE_THAN_A_PROMPT]
    if denoiser == "unet" or more or "prompt" not in {one.name for one in asked}:
        raise UserError(
            f"{model} is a {kind}, which is unsupported: it needs more than a prompt, or calls its {label(denoiser)} "
            f"with what is not recorded; allowed are {', '.join(known)}"
        )
    log_info(f"{model} is a {kind}, which vqdm has never been tried with; what is needed of it is derived")


def _check_unet(model: str, config: dict | None, vae: dict) -> None:
    config = config or {}
    for name, allowed in RECORDED.items():
        if config.get(name) not in allowed:
            raise UserError(
                f"{model}: its UNet has {name} {config[name]!r}, which is unsupported: what it is called with for that "
                f"is not recorded; allowed are {', '.join(map(str, allowed))}"
            )
    channels, latents = config.get("in_channels", 4), vae.get("latent_channels", 4)
    if channels != latents:
        raise UserError(
            f"{model}: its UNet takes {channels} channels and the VAE gives {latents}, as in inpainting and image "
            "editing, which is unsupported; give a text-to-image model"
        )


def _quantization(model: str, part: str, config: dict | None) -> str | None:
    """Return the quantization method that a component's files name, or None."""
    found = next((config[key] for key in QUANTIZED_KEYS if (config or {}).get(key)), None)
    if found:
        return str(found.get("quant_method") or found.get("quant_type") or "quantization_config")
    return next((file for file in QUANTIZED_FILES if (Path(model) / part / file).is_file()), None)


def _index(model: str, revision: str | None, local_files_only: bool) -> dict | None:
    return _config(DiffusionPipeline, model, "model_index.json", None, revision, local_files_only)


def _component(model: str, part: str, revision: str | None, local_files_only: bool) -> dict | None:
    return _config(ModelMixin, model, f"{part}/config.json", part, revision, local_files_only)


def _config(
    kind: type, model: str, file: str, part: str | None, revision: str | None, local_files_only: bool
) -> dict | None:
    """Read a small file of a folder or of the hub; None where that fails, as loading then does."""
    try:
        if Path(model).is_dir():
            found = read_json(Path(model) / file)
        else:
            offline = is_offline(local_files_only)
            found = kind.load_config(model, subfolder=part, revision=revision, local_files_only=offline)
    except Exception:
        return None
    return found if isinstance(found, dict) else None


# ------------------------------------------------------------------------------------------- quantized models


def check_declared(config: dict) -> None:
    """Raise ValueError where a component's config.json declares a module that no model has, before it is made."""
    for name, value in config.items():
        entries = (
            [one for row in value for one in (row if isinstance(row, list) else [row])]
            if isinstance(value, list)
            else [value]
        )
        numbers = [one for one in entries if isinstance(one, int | float)]
        if len(entries) > MOST_ENTRIES or any(not -MOST_DECLARED <= one <= MOST_DECLARED for one in numbers):
            raise ValueError(f"its {name} is {shortened(value, 40)}, which no model has")


LEAVE_OUT = "for full precision leave QUANTIZED out"
GIVE = "give the folder that quantizing wrote"


def find_denoisers(path: str, optional: bool = False, name: str = "QUANTIZED") -> dict[str, Path]:
    """Return by component the folders of the quantized denoisers, given one or the pipeline folder around them.

    One that is given itself belongs to the component that its folder is named after; "" where that is none.

    Args:
        optional: whether the program does without one, for messages.
        name: of the flag or argument that gives it, for messages.

    Raises:
        UserError: no denoiser is found, or it is not quantized.
    """
    if Path(path).is_file():
        raise UserError(f"{name} {path} is a file; {GIVE}")
    own = Path(path).resolve().name
    candidates = {part: Path(path) / part for part in COMPONENTS if (Path(path) / part / "config.json").is_file()}
    if not candidates and (Path(path) / "config.json").is_file():
        candidates = {own if own in COMPONENTS else "": Path(path)}
    if not candidates:
        what = "" if Path(path).is_dir() else f", since it is not a folder{not_found(path)}"
        files = f"neither {' nor '.join(f'{part}/config.json' for part in COMPONENTS)} nor config.json"
        raise UserError(f"{name} {path} holds {files}{what}; {GIVE}")
    found = {}
    for part, folder in candidates.items():
        try:
            config = read_json(folder / "config.json")
            check_declared(config)
            method = (config.get("quantization_config") or {}).get("quant_method")
        except (OSError, ValueError, AttributeError) as error:
            raise UserError(f"{name} {path}: config.json cannot be read: {first_line(error)}") from None
        found |= {part: folder} if method == Method.VQDM.value else {}
    if not found:
        raise UserError(
            f"{name} {path} is not quantized: its config.json has no quantization_config of vqdm; "
            f"{LEAVE_OUT if optional else GIVE}"
        )
    return found


def find_denoiser(path: str, optional: bool = False, name: str = "QUANTIZED") -> Path:
    """Return the folder of the only quantized denoiser, or of the first of two experts, as `find_denoisers`."""
    return next(iter(find_denoisers(path, optional, name).values()))


def denoisers_for(
    pipeline: DiffusionPipeline, path: str, model: str, optional: bool = False, name: str = "QUANTIZED"
) -> dict[str, Path]:
    """Return what `find_denoisers` finds at `path` by the components of MODEL's pipeline that it belongs to.

    Raises:
        UserError: as `find_denoisers`; MODEL lacks the component, or has two experts and the folder another name.
    """
    found, own = find_denoisers(path, optional, name), list(denoisers_of(pipeline))
    if len(own) > 1 and "" in found:
        raise UserError(
            f"{name} {path} is one denoiser, and MODEL {model} has two experts; name its folder {' or '.join(own)}"
        )
    if len(own) == len(found) == 1:  # of whichever name
        return dict(zip(own, found.values(), strict=True))
    missing = [one for one in found if one not in own]
    if missing:
        raise UserError(f"{name} {path} has a {missing[0]}, and MODEL {model} has none; they do not fit")
    return found


def denoiser_class(folder: Path) -> type[ModelMixin]:
    """Return the diffusers class that a component's config.json names. Raises ValueError for any other."""
    name = read_json(folder / "config.json").get("_class_name")
    found = getattr(diffusers, name, None) if isinstance(name, str) else None
    if not (isinstance(found, type) and issubclass(found, ModelMixin)):
        raise ValueError(f"its _class_name is {shortened(str(name))}, which is no model of diffusers")
    return found


def load_denoiser(folder: Path, dtype: torch.dtype, optional: bool = False, name: str = "QUANTIZED") -> ModelMixin:
    """Load a frozen denoiser on the CPU with at least one quantized layer; `optional`, `name` as for `find_denoiser`.

    Raises:
        UserError: the folder cannot be loaded, or nothing in it is quantized.
    """
    variant = only_variant(folder)  # no flag is needed for the only one that there is
    try:
        kind = denoiser_class(folder)
        denoiser = kind.from_pretrained(folder, dtype=dtype, variant=variant, local_files_only=True)
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # whatever diffusers answers to a config.json of wrong types or weights of wrong shapes
        raise UserError(f"{name} {folder} cannot be loaded: {first_line(error)}") from None
    if not quantized_layers(denoiser):
        raise UserError(f"{name} {folder} holds no quantized layer; {LEAVE_OUT if optional else GIVE}")
    return denoiser.requires_grad_(False).eval()


def quantized_text_encoders(folder: Path) -> list[str]:
    """Return the names of the parts of a pipeline folder that vqdm quantized through transformers."""
    found = []
    for file in sorted(folder.glob("*/config.json")):
        try:
            config = read_json(file)
            method = (config.get("quantization_config") or {}).get("quant_method")
        except (OSError, ValueError, AttributeError):
            continue
        if method == Method.VQDM.value and "architectures" in config:
            found.append(file.parent.name)
    return found


def load_text_encoders(folder: Path, pipeline: DiffusionPipeline, name: str = "QUANTIZED") -> dict[str, nn.Module]:
    """Load the quantized text encoders of a pipeline folder, each as the pipeline has it: class, type and device.

    Args:
        name: as for `find_denoiser`.

    Raises:
        UserError: one cannot be loaded, or the pipeline has none of that name.
    """
    found = {}
    for part in quantized_text_encoders(folder):
        own = getattr(pipeline, part, None)
        if own is None:
            raise UserError(f"{name} {folder} has a {part}, and MODEL has none; they do not fit")
        try:
            model = type(own).from_pretrained(folder / part, dtype=own.dtype, local_files_only=True)
        except (MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # as of `load_denoiser`
            raise UserError(f"{name} {folder / part} cannot be loaded: {first_line(error)}") from None
        found[part] = model.to(own.device).requires_grad_(False).eval()
    return found


def check_fits(denoiser: ModelMixin, original: ModelMixin, path: str, model: str) -> None:
    """Raise UserError where a quantized denoiser comes from another kind of model than the pipeline's own."""
    ours, theirs = type(denoiser).__name__, type(original).__name__
    if ours != theirs:
        raise UserError(f"QUANTIZED {path} does not fit MODEL {model}: it is a {ours}, MODEL has a {theirs}")
    for name in SHARED_SETTINGS:
        ours, theirs = denoiser.config.get(name), original.config.get(name)
        if ours != theirs:
            raise UserError(f"QUANTIZED {path} does not fit MODEL {model}: its {name} is {ours}, MODEL's is {theirs}")
