"""Read a whole pipeline from one `.safetensors` file, in the layout of A1111 and Civitai.

The file holds weights alone. Configurations, tokenizers and the scheduler come from another diffusers pipeline of the
same kind, a folder or a name on the hub. All that can be wrong is found in the names and shapes in the file's header
and in the configurations, before weights are loaded; diffusers would take what is missing in the file from elsewhere.
"""

from __future__ import annotations

import math
import re
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import diffusers
import torch
from diffusers import DiffusionPipeline
from huggingface_hub import snapshot_download
from safetensors import SafetensorError
from torch import nn

from vqdm.documents import first_line, read_json
from vqdm.errors import UserError
from vqdm.storage.hf import tensors_in
from vqdm.storage.hub import is_offline

INDEX = "model_index.json"
QUANTIZED_KEYS = ("quantization_config", "compression_config")
PARTS = {
    "model.diffusion_model.": "unet",
    "first_stage_model.": "vae",
    "vae.": "vae",
    "cond_stage_model.": "text_encoder",
    "conditioner.embedders.0.": "text_encoder",
    "conditioner.embedders.1.": "text_encoder_2",
}
PICKLES = (".ckpt", ".pt", ".pth", ".bin")
LORA = ("lora_", ".lora", "lokr_", "hada_w", ".oft_", ".dora_scale")
FIRST_LAYER = "model.diffusion_model.input_blocks.0.0.weight"
SECOND_ENCODER = "conditioner.embedders.1.model.positional_embedding"
# By a tensor that diffusers knows the text encoders by: the pipelines, and the one whose configuration is the default.
SD, SDXL = ("StableDiffusionPipeline", "LatentConsistencyModelPipeline"), ("StableDiffusionXLPipeline",)
LAYOUTS = {
    "conditioner.embedders.0.transformer.text_model.embeddings.position_embedding.weight": (
        SDXL,
        "stabilityai/stable-diffusion-xl-base-1.0",
    ),
    "cond_stage_model.transformer.text_model.embeddings.position_embedding.weight": (
        SD,
        "stable-diffusion-v1-5/stable-diffusion-v1-5",
    ),
    "cond_stage_model.model.token_embedding.weight": (SD, "stabilityai/stable-diffusion-2-1"),
}
PLAYGROUND = ("edm_mean", "playgroundai/playground-v2.5-1024px-aesthetic")
V_PREDICTION = "v_pred"  # a key of SDXL models that were trained so
# Names that begin so in a file of one component, as any program writes it.
ALONE = {
    "a ControlNet": ("control_model.", "controlnet", "input_hint_block."),
    "a UNet": ("model.diffusion_model.", "input_blocks.", "down_blocks.", "conv_in.", "time_embed"),
    "a text encoder": ("cond_stage_model.", "conditioner.", "text_model.", "transformer.", "encoder.block.", "shared."),
    "a VAE": ("first_stage_model.", "vae.", "encoder.", "decoder.", "quant_conv.", "post_quant_conv."),
}
WHOLE = "give a file with UNet, VAE and text encoders, or a diffusers pipeline folder"

Header = dict[str, tuple[tuple[int, ...], str]]  # name → shape, and dtype as safetensors spells it


# ------------------------------------------------------------------------------------------- the file


def header(path: str | Path, flag: str = "MODEL") -> Header:
    """Return name → (shape, dtype) of a file's tensors; none is read. Raises UserError for a damaged file."""
    try:
        return dict(tensors_in([path]))
    except OSError as error:
        raise UserError(f"{flag} {path} cannot be read: {first_line(error)}") from None
    except SafetensorError as error:
        raise UserError(f"{flag} {path} is damaged or not a safetensors file: {first_line(error)}") from None


def check_single_file(path: Path, flag: str = "MODEL") -> None:
    """Raise UserError, with what the file is and what to do, for one that is not a whole pipeline with a UNet."""
    start, suffix = f"{flag} {path} is", path.suffix.lower()
    if suffix in PICKLES:
        raise UserError(f"{start} a pickle, which can run code; convert it to .safetensors: {_conversion(path)}")
    if suffix == ".gguf":
        raise UserError(f"{start} a GGUF file, which holds a quantized model; give the full-precision model")
    if path.suffix != ".safetensors":
        raise UserError(f"{start} a file; give a diffusers pipeline folder, the one that holds {INDEX}")
    names = header(path, flag)
    if any(mark in name for name in names for mark in LORA):
        raise UserError(f"{start} a file of LoRA weights, not a model; give the model that they belong to")
    parts = {part for prefix, part in PARTS.items() if any(name.startswith(prefix) for name in names)}
    if "unet" in parts and FIRST_LAYER not in names:
        raise UserError(f"{start} a file with another denoiser than a UNet; vqdm quantizes UNets")
    if not {"unet", "vae", "text_encoder"} <= parts:
        if len(parts) > 1:
            lacking = ", ".join(sorted({"unet", "vae", "text_encoder"} - parts))
            raise UserError(f"{start} a file without {lacking}, not a whole model; {WHOLE}")
        kind = next((kind for kind, starts in ALONE.items() if any(name.startswith(starts) for name in names)), None)
        raise UserError(f"{start} a file of {kind or 'tensors of an unknown layout'} alone, not a whole model; {WHOLE}")
    if len(names[FIRST_LAYER][0]) != 4:
        raise UserError(f"{start} a file whose {FIRST_LAYER} is no convolution; {WHOLE}")
    layout = next((key for key in LAYOUTS if key in names), None)
    second = layout is not None and LAYOUTS[layout][0] == SDXL
    if layout is None or (second and SECOND_ENCODER not in names):
        raise UserError(f"{start} a file without text encoders in the layout of A1111; {WHOLE}")
    if second and names[layout][0][-1:] == names[SECOND_ENCODER][0][-1:]:
        raise UserError(f"{start} a file with two text encoders of one width, which diffusers confuses; {WHOLE}")


def _conversion(path: Path) -> str:
    """Return the command, quoted for a shell, that writes a pickle's tensors as safetensors."""
    code = (
        "import torch; from safetensors.torch import save_file; "
        f"t = torch.load({str(path)!r}, 'cpu', weights_only=True); t = t.get('state_dict', t); "
        f"save_file({{k: v.contiguous().clone() for k, v in t.items() if hasattr(v, 'clone')}}, "
        f"{str(path.with_suffix('.safetensors'))!r})"
    )
    return f"python -c {shlex.quote(code)}"


def parts_of(path: str | Path) -> dict[str, Header]:
    """Return component name → the tensors that a file has of it."""
    found: dict[str, Header] = {}
    for name, about in header(path).items():
        part = next((part for prefix, part in PARTS.items() if name.startswith(prefix)), None)
        if part:
            found.setdefault(part, {})[name] = about
    return found


def bytes_of(tensors: Header) -> int:
    """Return the bytes of tensors in a file."""
    return sum(math.prod(shape) * _itemsize(kind) for shape, kind in tensors.values())


def _itemsize(kind: str) -> int:
    bits = re.search(r"\d+", kind)
    return int(bits[0]) // 8 if bits else 1  # BOOL


# ------------------------------------------------------------------------------------------- its configuration


def configuration_folder(
    model: str, single_file_config: str | None, revision: str | None = None, local_files_only: bool = False
) -> Path:
    """Return a folder with the configurations, tokenizers and scheduler of a MODEL in one file.

    Args:
        single_file_config: a pipeline folder or hub name; None takes that of the first model of the file's kind.
        revision: of the hub name.

    Raises:
        UserError: it is not found, is of another kind of model, or of a quantized one.
    """
    names = header(model)
    pipelines, usual = next(LAYOUTS[key] for key in LAYOUTS if key in names)
    name = single_file_config or (PLAYGROUND[1] if PLAYGROUND[0] in names else usual)
    flag = f"--single_file_config {name}"
    where = (revision if single_file_config else None, local_files_only)
    folder = Path(name) if Path(name).is_dir() else _downloaded(model, name, single_file_config is not None, *where)
    try:
        kind = read_json(folder / INDEX).get("_class_name")
        scheduler = read_json(folder / "scheduler" / "scheduler_config.json")
        configs = {file.parent.name: read_json(file) for file in sorted(folder.glob("*/config.json"))}
    except FileNotFoundError:
        raise UserError(f"{flag} has no {INDEX} or scheduler; give a diffusers pipeline, without weights too") from None
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(f"{flag}: a configuration cannot be read: {first_line(error)}") from None
    if kind not in pipelines:
        raise UserError(f"{flag} is a {kind}, and MODEL {model} is of another kind; allowed are {', '.join(pipelines)}")
    quantized = [part for part, config in configs.items() if any(config.get(key) for key in QUANTIZED_KEYS)]
    if quantized:
        raise UserError(f"{flag} is of a quantized model ({', '.join(quantized)}); give a full-precision one")
    if V_PREDICTION in names and scheduler.get("prediction_type") != "v_prediction":
        raise UserError(f"MODEL {model} predicts v, by its key {V_PREDICTION}, and the scheduler of {flag} does not")
    return folder


def _downloaded(model: str, name: str, given: bool, revision: str | None, local_files_only: bool) -> Path:
    """Return the folder in the hub cache with the small files of a pipeline."""
    offline = is_offline(local_files_only)
    if name.startswith((".", "/", "~")) or name.count("/") != 1:
        raise UserError(f"--single_file_config {name} is no folder; give a diffusers pipeline folder or a hub name")
    try:
        return Path(
            snapshot_download(
                name,
                revision=revision,
                local_files_only=offline,
                allow_patterns=["*.json", "*/*.json", "*.txt", "*/*.txt", "*/*.model"],
                ignore_patterns=["*.index.json", "*.index.*.json"],
            )
        )
    except Exception as error:  # the client's own errors, and those of the connection below it
        if given:
            raise UserError(f"--single_file_config {name} cannot be had from the hub: {first_line(error)}") from None
        where = "is not in the hub cache" if offline else f"cannot be had from the hub ({first_line(error)})"
        raise UserError(
            f"MODEL {model} is one file, whose configuration ({name}) {where}; pass --single_file_config with the "
            "folder or hub name of a diffusers pipeline of its kind, whose weights are not needed"
        ) from None


# ------------------------------------------------------------------------------------------- loading


@contextmanager
def quiet_diffusers() -> Iterator[None]:
    """Inside, diffusers logs nothing."""
    verbosity = diffusers.logging.get_verbosity()
    diffusers.logging.set_verbosity(diffusers.logging.CRITICAL)
    try:
        yield
    finally:
        diffusers.logging.set_verbosity(verbosity)


def load_single_file(model: str, configuration: Path, dtype: torch.dtype) -> DiffusionPipeline:
    """Load the pipeline of one file on the CPU, without a safety checker.

    Raises:
        ValueError: a component lacks tensors, or has others than its configuration says.
    """
    index = read_json(configuration / INDEX)
    kind = getattr(diffusers, index["_class_name"])
    without = {"safety_checker": None, "requires_safety_checker": False} if "safety_checker" in index else {}
    where = {"config": str(configuration), "local_files_only": True}
    with quiet_diffusers():  # it warns of its own casts, and of tensors that are checked below
        pipeline = kind.from_single_file(model, dtype=dtype, **where, **without)
    for name, part in pipeline.components.items():
        named = part.named_parameters() if isinstance(part, nn.Module) else ()
        lacking = [key for key, tensor in named if tensor.is_meta]
        if lacking:
            raise ValueError(f"its {name} lacks {lacking[0]}, which the configuration in {configuration} has")
    ours = sum(tensor.numel() for tensor in pipeline.unet.parameters())
    theirs = sum(math.prod(shape) for shape, _ in parts_of(model)["unet"].values())
    if ours != theirs:
        raise ValueError(f"its unet has {theirs} values, and {ours} by the configuration in {configuration}")
    return pipeline
