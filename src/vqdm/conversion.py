"""Convert formats: quantized folder → plain model, text encoder → aqlm, the original's pickle → quantized folder."""

from __future__ import annotations

import errno
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AqlmConfig, AutoModel, CLIPTextModel, CLIPTextModelWithProjection, PreTrainedModel

from vqdm.additive.code import CodeSpec
from vqdm.config import DTYPES, argument, check_flags, flag, output_dir, single_file_config
from vqdm.diffusion.denoisers import denoiser_name
from vqdm.diffusion.model_folders import (
    check_full_precision,
    check_loaded,
    check_place,
    check_variant,
    denoiser_class,
    found_variant,
    not_found,
    only_variant,
)
from vqdm.diffusion.pipelines import absent_parts, check_model, load_pipeline, saved_types, stored_dtypes
from vqdm.documents import first_line, read_json
from vqdm.errors import UserError
from vqdm.layers.int8 import dequantize_int8, int8_layers
from vqdm.layers.quantized import QuantizedConv2d, QuantizedLinear, quantized_layers
from vqdm.storage.files import save_json, save_tensors
from vqdm.storage.hf import VqdmConfig, build_layers, check_names, mark_quantized
from vqdm.storage.original import load_pickle, tensors_and_specs

KINDS = ("dequantize", "aqlm", "pickle")
_PICKLE = ("kind pickle",)
TEXT_CLASSES = {one.__name__: one for one in (CLIPTextModel, CLIPTextModelWithProjection)}
AQLM_SETTINGS = ("num_codebooks", "nbits_per_codebook", "in_group_size", "out_group_size")
# Settings that the aqlm format has no place for, and the only value that it can hold.
AQLM_NEUTRAL = {"scale_nbits": 0, "groupwise_codebooks": False, "input_channel_scales": False, "row_bits": 0}


@dataclass(frozen=True, kw_only=True)
class ConvertConfig:
    """Settings of `convert`.

    Raises:
        UserError: a value that is not allowed, or settings that contradict each other, naming the flags.
    """

    kind: str = argument("dequantize, aqlm or pickle", choices=KINDS, metavar="KIND")
    source: str = argument("pipeline folder, a model's own folder, or a pickle")
    output_dir: str = output_dir("out/converted", "new or empty folder")
    dtype: str = flag(
        "auto",
        "dequantize: auto = as stored",
        "source and target",
        choices=DTYPES,
        common=True,
        needs=("kind dequantize",),
    )
    model: str | None = flag(
        None,
        "pickle: the full-precision pipeline: a folder, one .safetensors file, or a name on the hub",
        "source and target",
        common=True,
        needs=_PICKLE,
    )
    variant: str | None = flag(None, "file variant of MODEL or SOURCE, such as fp16", "source and target", common=True)
    single_file_config: str | None = single_file_config("source and target", needs=_PICKLE)
    local_files_only: bool = flag(False, "pickle: never ask the hub", "source and target", common=True, needs=_PICKLE)
    trust_pickle: bool = flag(False, "pickle: you trust its source", "source and target", common=True, needs=_PICKLE)

    def __post_init__(self) -> None:
        check_flags(self)
        if self.kind == "pickle" and self.model is None:
            raise UserError("pickle needs --model: the full-precision pipeline that was quantized")
        if self.kind == "pickle" and not self.trust_pickle:
            raise UserError(
                f"pickle {self.source}: reading a pickle can run code; add --trust_pickle if you trust its source"
            )


def convert(config: ConvertConfig) -> str:
    """Convert, and return a line about what was written.

    Raises:
        UserError: the source is not of its kind, the folder is not free, or the target format cannot hold it.
    """
    job = {"dequantize": dequantize, "aqlm": to_aqlm, "pickle": from_pickle}[config.kind]
    with new_folder(config.output_dir) as folder:
        line = job(config, folder)
    return f"{line} in {config.output_dir}"


@contextmanager
def new_folder(path: str) -> Iterator[Path]:
    """Give a folder to write into that becomes `path` on success, and is removed otherwise."""
    target = Path(path)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UserError(f"--output_dir {path} exists and is not empty; choose an empty or new folder")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        staged = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    except OSError as error:
        raise UserError(f"--output_dir {path} cannot be written: {error.strerror}") from None
    try:
        staged.chmod(0o755)
        yield staged
        staged.replace(target)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
        raise UserError(f"--output_dir {path} has been written by another process meanwhile; choose another") from None
    finally:
        shutil.rmtree(staged, ignore_errors=True)


# ------------------------------------------------------------------------------------------- quantized → plain


def dequantize(config: ConvertConfig, folder: Path) -> str:
    """Write the plain model of a quantized pipeline, or of its denoiser's or a text encoder's own folder."""
    source = load_source(config.source, config.variant)
    parts = models_of(source)
    quantized = {name: part for name, part in parts.items() if quantized_layers(part) or int8_layers(part)}
    if not quantized:
        raise UserError(f"{config.source} is not quantized; there is nothing to dequantize")
    count = sum(len(quantized_layers(part)) + len(int8_layers(part)) for part in quantized.values())
    for part in quantized.values():
        make_plain(part, config.dtype)
    source.save_pretrained(folder)
    return f"{count} layers of {', '.join(quantized)} are plain now,"


def make_plain(model: nn.Module, dtype: str) -> None:
    """Dequantize in place, in the type of the tensors that are not quantized, or in `dtype`; decoded in float32."""
    coded = {id(tensor) for module in model.modules() for tensor in _stored(module)}
    plain = next(t.dtype for t in model.parameters() if t.is_floating_point() and id(t) not in coded)
    target = plain if dtype == "auto" else getattr(torch, dtype)
    for tensor in model.parameters():
        if tensor.is_floating_point():
            tensor.data = tensor.data.float()
    # transformers casts to the type of its configuration unless given another.
    model.dequantize(dtype=target) if isinstance(model, PreTrainedModel) else model.dequantize()
    model.to(target)


def _stored(module: nn.Module) -> list[torch.Tensor]:
    return list(module.stored_tensors().values()) if hasattr(module, "stored_tensors") else []


def load_source(path: str, variant: str | None = None) -> DiffusionPipeline | nn.Module:
    """Load a pipeline, a denoiser or a text encoder from its folder, in its stored types.

    Raises:
        UserError: none of these is found, it lacks the variant, or it cannot be loaded.
    """
    folder = Path(path)
    if folder.is_file() or not (folder / "config.json").is_file():
        check_place(path, "SOURCE")
        if folder.is_file():
            raise UserError(f"SOURCE {path} is a model in one file, which is not quantized; give a quantized folder")
    if not folder.is_dir():
        raise UserError(f"SOURCE {path} is not found{not_found(path)}; give a folder")
    try:
        if (folder / "model_index.json").is_file():
            check_variant(folder, variant, f"SOURCE {path}")
            variant = found_variant(folder, variant)
            named = read_json(folder / "model_index.json")
            stored = {name: dtype for name, dtype in stored_dtypes(path, variant).items() if name in named}
            dtypes, absent = stored | {"default": torch.float32}, dict.fromkeys(absent_parts(path, None, True))
            where = {"variant": variant, "local_files_only": True, **absent}
            return DiffusionPipeline.from_pretrained(folder, dtype=dtypes, **where)
        config = read_json(folder / "config.json")
        variant = variant or only_variant(folder)
        own = folder.resolve()
        dtype = stored_dtypes(str(own.parent), variant, component=own.name).get(own.name, torch.float32)
        if "_class_name" in config:
            kind = denoiser_class(folder)
            return kind.from_pretrained(folder, dtype=dtype, variant=variant, local_files_only=True)
        kind = TEXT_CLASSES.get((config.get("architectures") or [None])[0], AutoModel)
        return kind.from_pretrained(folder, dtype=dtype, variant=variant, local_files_only=True)
    except UserError:
        raise
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(f"{path} cannot be loaded: {first_line(error)}") from None


def models_of(source: DiffusionPipeline | nn.Module) -> dict[str, nn.Module]:
    """Return by name the models of a pipeline, or the one that is given."""
    if isinstance(source, nn.Module):
        return {type(source).__name__: source}
    return {name: part for name, part in source.components.items() if isinstance(part, nn.Module)}


# ------------------------------------------------------------------------------------------- text encoder → aqlm
#
# The format that stock transformers loads beside the aqlm package holds Linear layers of one shape of code, with
# codebooks of the layer's own and a scale per row (arXiv 2401.06118).
#
# Letters: R, G row and column groups; M codebooks of K = 2^b entries; p, g out and in group size.


def to_aqlm(config: ConvertConfig, folder: Path) -> str:
    """Write a text encoder in the aqlm format; of a pipeline, each quantized text encoder in a folder of its name."""
    source = load_source(config.source, config.variant)
    found = {name: part for name, part in models_of(source).items() if isinstance(part, PreTrainedModel)}
    quantized = {name: part for name, part in found.items() if quantized_layers(part)}
    if not quantized:
        raise UserError(f"{config.source} holds no quantized text encoder; aqlm holds text encoders only")
    for name, part in quantized.items():
        export_aqlm(part, folder if part is source else folder / name)
    return f"{', '.join(quantized)} in the aqlm format"


def export_aqlm(model: PreTrainedModel, folder: Path) -> AqlmConfig:
    """Write a text encoder as `config.json` and `model.safetensors` in the aqlm format; layers in 8 bit become plain.

    Raises:
        UserError: nothing is quantized, or something that the format cannot hold; names the layer and the setting.
    """
    layers = quantized_layers(model)
    spec = common_spec(layers)
    dequantize_int8(model)
    others = [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and name not in layers]
    config = AqlmConfig(
        **{name: getattr(spec, name) for name in AQLM_SETTINGS},
        linear_weights_not_to_quantize=[name.removeprefix("text_model.") for name in others],
    )
    written = model.config.to_dict() | {"architectures": [type(model).__name__]}
    written["quantization_config"] = config.to_dict() | {"quant_method": "aqlm"}
    save_tensors(aqlm_tensors(model, layers), folder / "model.safetensors", {"format": "pt"})
    save_json(written, folder / "config.json")
    return config


def common_spec(layers: dict[str, nn.Module]) -> CodeSpec:
    """The settings that all layers share. Raises UserError as `export_aqlm`."""
    if not layers:
        raise UserError("no layer is quantized, so there is nothing to export to aqlm")
    first = next(iter(layers))
    for name, layer in layers.items():
        if isinstance(layer, QuantizedConv2d):
            raise UserError(f"layer {name} is a convolution; aqlm holds Linear layers only")
        for key, value in AQLM_NEUTRAL.items():
            if getattr(layer.spec, key) != value:
                raise UserError(f"layer {name} has {key} {getattr(layer.spec, key)}; aqlm holds {value} only")
        for key in AQLM_SETTINGS:
            own, others = getattr(layer.spec, key), getattr(layers[first].spec, key)
            if own != others:
                raise UserError(f"layer {name} has {key} {own}, {first} has {others}; aqlm holds one for all layers")
    return layers[first].spec


def aqlm_tensors(model: nn.Module, layers: dict[str, QuantizedLinear]) -> dict[str, Tensor]:
    """The state of a model with its quantized layers' tensors as aqlm names and lays them out."""
    coded = {f"{name}.{key}" for name, layer in layers.items() for key in layer.stored_tensors()}
    tensors = {name: tensor for name, tensor in model.state_dict().items() if name not in coded}
    for name, layer in layers.items():
        tensors |= {f"{name}.{key}": tensor for key, tensor in layer_tensors(layer).items()}
    return tensors


def layer_tensors(layer: QuantizedLinear) -> dict[str, Tensor]:
    """`codes` [R, G, M] as signed integers, `codebooks` [M, K, p, g] and `scales` [R, 1, 1, 1] in float16."""
    code = layer.code()
    return {
        "codes": signed(code.codes, layer.spec.nbits_per_codebook),
        "codebooks": code.codebooks.to(torch.float16),
        "scales": code.scales.to(torch.float16)[:, :, None, None],  # [R, 1] → [R, 1, 1, 1]
    }


def signed(codes: Tensor, nbits: int) -> Tensor:
    """Codes 0..2^nbits-1 in two's complement of `nbits` bits, in the narrowest type that aqlm reads them from."""
    wrapped = torch.where(codes >= 2 ** (nbits - 1), codes - 2**nbits, codes)
    return wrapped.to(torch.int8 if nbits <= 8 else torch.int16)


# ------------------------------------------------------------------------------------------- pickle → quantized


def from_pickle(config: ConvertConfig, folder: Path) -> str:
    """Write the pipeline `config.model` with the UNet of a pickle, as a quantized folder."""
    if not Path(config.source).is_file():
        raise UserError(f"pickle {config.source} is not a file")
    check_model(config.model, config.variant, None, config.local_files_only, config.single_file_config)
    check_full_precision(config.model, None, config.local_files_only, "--model")
    pipeline = load_pipeline(
        config.model,
        torch.device("cpu"),
        torch.float32,
        variant=config.variant,
        local_files_only=config.local_files_only,
        single_file_config=config.single_file_config,
    )
    if denoiser_name(pipeline) != "unet":
        raise UserError(f"--model {config.model} has no UNet; the original quantized UNets only")
    check_loaded(pipeline.unet, config.model, "--model")
    fill(pipeline.unet, config.source)
    mark_quantized(pipeline.unet)
    with saved_types(pipeline, stored_dtypes(config.model, config.variant)):
        pipeline.save_pretrained(folder)
    return f"{len(quantized_layers(pipeline.unet))} layers of the original"


def fill(unet: nn.Module, source: str) -> None:
    """Replace a UNet's layers and all its tensors by those of a pickle, in place.

    Raises:
        UserError: the pickle is not one of the original, or of another UNet; names a layer or tensor.
    """
    try:
        tensors, specs = tensors_and_specs(load_pickle(Path(source)))
    except UserError as error:
        raise UserError(f"pickle {source}: {error}") from None
    try:
        build_layers(unet, VqdmConfig({}, specs))
        check_names(unet.state_dict(), tensors)
        unet.load_state_dict(tensors, assign=True)
    except (ValueError, RuntimeError) as error:
        lines = [line.strip() for line in str(error).splitlines()]
        raise UserError(f"pickle {source} does not fit --model: {lines[-1]}") from None
    unet.requires_grad_(False)
