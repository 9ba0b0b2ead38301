"""What a path that is no pipeline folder is instead, and how to make one of it; which file variants a folder has."""

from __future__ import annotations

import difflib
import re
import shlex
from pathlib import Path

from safetensors import SafetensorError, safe_open

from vqdm.documents import read_json, shortened
from vqdm.errors import UserError

SINGLE_FILES = (".safetensors", ".ckpt", ".pt", ".pth", ".bin", ".gguf")
# name, variant, number of a shard, variant where it follows the number, as older files have it
WEIGHTS = re.compile(
    r"(?:diffusion_pytorch_)?(?:pytorch_)?model(?:\.([\w-]+?))?(?:-\d+-of-\d+)?(?:\.([\w-]+))?\.(?:safetensors|bin)"
)
INDEX = "model_index.json"


def check_place(model: str, flag: str = "MODEL") -> None:
    """Raise UserError for a path that is there but is no pipeline folder: says what it is, and what to do."""
    path = Path(model)
    if path.is_file():
        raise UserError(f"{flag} {model} is {_of_file(path)}")
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
    checkpoints = sorted(file for file in path.iterdir() if file.suffix in (".safetensors", ".ckpt"))
    advice = f"; {checkpoints[0].name} in it is {_of_file(checkpoints[0])}" if checkpoints else ""
    raise UserError(f"{whole} a folder without {INDEX}, so not a diffusers pipeline{advice}")


def not_found(model: str) -> str:
    """Words for a MODEL that is neither here nor on the hub, with the nearest name in its folder."""
    path = Path(model)
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


def _of_file(path: Path) -> str:
    """What a file is that was given as a pipeline, and what to do."""
    if path.suffix.lower() not in SINGLE_FILES:
        return f"a file; give a diffusers pipeline folder, the one that holds {INDEX}"
    names, dtype = _header(path)
    if any("lora_" in name or ".lora" in name for name in names):
        return "a file of LoRA weights, not a model; give the pipeline folder that they belong to"
    # Keys of the text encoders and the UNet, as checkpoints in one file name them.
    if any(name.startswith("conditioner.embedders.") for name in names):
        kind = "StableDiffusionXLPipeline"
    elif any(name.startswith("cond_stage_model.") for name in names):
        kind = "StableDiffusionPipeline"
    elif names and not any(name.startswith("model.diffusion_model.") for name in names):
        return "a file of weights of one component; give the diffusers pipeline folder around it"
    else:
        kind = None
    code = (
        f"import torch; from diffusers import {kind or 'StableDiffusionXLPipeline'} as P; "
        f"P.from_single_file({str(path)!r}, torch_dtype=torch.{dtype}).save_pretrained({str(path.with_suffix(''))!r})"
    )
    other = "" if kind else " (StableDiffusionPipeline for Stable Diffusion 1.5 and 2.1)"
    return f"a single-file checkpoint; turn it into a folder once{other}, and give that: python -c {shlex.quote(code)}"


def _header(path: Path) -> tuple[list[str], str]:
    """Names of a safetensors file's tensors and the floating-point type of the first; no names for other files."""
    try:
        with safe_open(path, "pt") as tensors:
            names = list(tensors.keys())
            kind = tensors.get_slice(names[0]).get_dtype() if names else "F16"
    except (OSError, SafetensorError):
        return [], "float16"
    return names, {"F32": "float32", "BF16": "bfloat16"}.get(kind, "float16")


# ------------------------------------------------------------------------------------------- variants


def variants(folder: Path) -> dict[str | None, str]:
    """Variants of a component's weight files, None for plain ones → the first file of each."""
    found: dict[str | None, str] = {}
    for file in sorted(folder.iterdir()) if folder.is_dir() else ():
        match = WEIGHTS.fullmatch(file.name)
        if match:
            found.setdefault(match[1] or match[2], file.name)
    return found


def only_variant(folder: Path) -> str | None:
    """The variant of a component that has files of just one variant and no plain ones, else None."""
    found = variants(folder)
    return next(iter(found)) if len(found) == 1 else None


def pickled(model: str) -> list[str]:
    """Components of a pipeline folder whose weights are `.bin` files alone."""
    endings = {
        part.name: {file.suffix for file in part.iterdir() if WEIGHTS.fullmatch(file.name)}
        for part in sorted(Path(model).iterdir())
        if part.is_dir()
    }
    return [name for name, held in endings.items() if held == {".bin"}]


def check_variant(model: str, variant: str | None, flag: str = "MODEL") -> None:
    """Raise UserError where a pipeline folder has no weight files of the variant that is asked for.

    Of a component without that variant its plain files are read, as diffusers does.
    """
    found = {part.name: variants(part) for part in sorted(Path(model).iterdir()) if part.is_dir()}
    found = {name: held for name, held in found.items() if held}
    lacking = {name: held for name, held in found.items() if None not in held and variant not in held}
    if lacking:
        offered = next(iter(next(iter(lacking.values()))))
        wanted = f"no {variant} files" if variant else "no files without a variant"
        files = ", ".join(f"{name}/{next(iter(held.values()))}" for name, held in lacking.items())
        advice = f"add --variant {offered}" if offered else "leave --variant out"
        raise UserError(f"{flag} {model}: {', '.join(lacking)}: {wanted}, only {files}; {advice}")
    if variant and found and not any(variant in held for held in found.values()):
        raise UserError(f"--variant {variant}: {flag} {model} has no such files; leave --variant out")
