"""The format in diffusers and transformers: its quantizers, and methods of the libraries that quantized models need.

A backend registers itself in two dictionaries of the module `quantizers.auto` of each library.

The module paths of text models depend on the version of transformers, on the class, and on whether they are those of
the model or of its files: with or without `text_model.`, `model.`, `language_model.` in front. Names are stored
without, and found either way.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from enum import Enum
from functools import wraps
from pathlib import Path

import torch
from accelerate import init_empty_weights
from diffusers import (
    ControlNetModel,
    ControlNetUnionModel,
    DiffusionPipeline,
    ModelMixin,
    SparseControlNetModel,
    UNetControlNetXSModel,
    UNetMotionModel,
)
from diffusers.configuration_utils import FrozenDict
from diffusers.loaders import FluxLoraLoaderMixin
from diffusers.quantizers import auto as diffusers_auto
from diffusers.quantizers.base import DiffusersQuantizer
from diffusers.quantizers.quantization_config import QuantizationConfigMixin
from safetensors import safe_open
from torch import nn
from transformers import PreTrainedModel
from transformers.quantizers import HfQuantizer
from transformers.quantizers import auto as transformers_auto
from transformers.utils.quantization_config import QuantizationConfigMixin as TransformersConfigMixin

from vqdm.additive import trellis
from vqdm.additive.code import CodeSpec
from vqdm.layers.int8 import dequantize_int8, int8_layers, swap_int8
from vqdm.layers.quantized import dequantize_layers, quantized_layers, swap

FORMAT_VERSION = 4  # the newest; a file that uses nothing of a version is written as the one before
VERSION_2_KEYS = ("rounded",)
LATER_SETTINGS = ("shared_codebooks", "row_bits", "segment_rows", "segment_bits", "log_scales", "scale_exponent")
FLOATS = ("F64", "F32", "F16", "BF16")
KINDS = {torch.uint8: "U8", torch.int8: "I8"}
TEXT_PREFIXES = ("text_model", "model", "language_model")
QUANTIZED_FIELDS = ("quantization_config", "_pre_quantization_dtype")


class Method(str, Enum):  # noqa: UP042
    """diffusers reads `quant_method.value`, and its own enumeration is closed."""

    VQDM = "vqdm"


class VqdmConfig(QuantizationConfigMixin, TransformersConfigMixin):
    """The `quantization_config` of a quantized model: all that is needed to build its layers without reading a tensor.

    One class for diffusers and transformers, as both ask for a subclass of their own.

    Args:
        code: the settings that most layers share, as `CodeSpec.to_dict` gives them.
        layers: dotted name → the settings in which this layer differs from `code`.
        rounded: dotted names of the int8 layers; version 2.
        format_version: 1 to 4; any other is refused.

    Raises:
        ValueError: unknown version, unknown or impossible setting.
    """

    def __init__(
        self,
        code: dict,
        layers: dict[str, dict],
        rounded: Iterable[str] = (),
        format_version: int = FORMAT_VERSION,
        **_,
    ):
        if type(format_version) is not int or format_version not in range(1, FORMAT_VERSION + 1):
            raise ValueError(
                f"format_version is {format_version!r}; this vqdm reads 1 to {FORMAT_VERSION}, a newer one may read it"
            )
        _check_types(code, layers)
        self.quant_method = Method.VQDM
        self.code, self.layers = dict(code), dict(layers)
        self.rounded = _names(rounded)
        self.specs = {name: CodeSpec().changed(**(self.code | own)) for name, own in self.layers.items()}

    @classmethod
    def of(cls, model: nn.Module) -> VqdmConfig:
        """Make the configuration that describes a model's quantized layers."""
        specs = {name: layer.spec for name, layer in quantized_layers(model).items()}
        code = _commonest([spec.to_dict() for spec in specs.values()])
        layers = {name: _difference(spec.to_dict(), code) for name, spec in specs.items()}
        for name in LATER_SETTINGS:
            if not code[name]:
                del code[name]  # version 1 lacks it
        return cls(code, layers, int8_layers(model))

    @property
    def format_version(self) -> int:
        """Return the oldest version that can express this configuration."""
        if any(spec.is_trellis for spec in self.specs.values()):
            return 4
        if any(spec.row_bits for spec in self.specs.values()):
            return 3
        shares = any(spec.shared_codebooks for spec in self.specs.values())
        return 2 if shares or any(getattr(self, key) for key in VERSION_2_KEYS) else 1

    def renamed(self, rename: Callable[[str], str]) -> VqdmConfig:
        """Return the same configuration with renamed layers."""
        layers = {rename(name): own for name, own in self.layers.items()}
        return VqdmConfig(self.code, layers, map(rename, self.rounded))

    def to_dict(self) -> dict:
        """Return plain JSON types: diffusers serializes them on every load and save."""
        return {
            "quant_method": self.quant_method.value,
            "format_version": self.format_version,
            "code": self.code,
            "layers": self.layers,
            **{key: getattr(self, key) for key in VERSION_2_KEYS if getattr(self, key)},
        }

    def to_diff_dict(self) -> dict:
        """Return all values; diffusers prints the differences to the defaults."""
        return self.to_dict()


def _check_types(code, layers) -> None:
    """Raise ValueError unless settings and layers are of the types that a file should hold."""
    if not isinstance(code, dict) or not isinstance(layers, dict):
        raise ValueError("quantization_config: code and layers must be objects")
    wrong = [name for name, own in layers.items() if not isinstance(own, dict)]
    if wrong:
        raise ValueError(f"quantization_config: the settings of layer {wrong[0]} must be an object")


def _names(rounded) -> list[str]:
    names = None if isinstance(rounded, str) or not isinstance(rounded, Iterable) else list(rounded)
    if names is None or not all(isinstance(name, str) for name in names):
        raise ValueError("quantization_config: rounded must be a list of layer names")
    return names


def _commonest(settings: list[dict]) -> dict:
    keys = [tuple(sorted(one.items())) for one in settings]
    return dict(max(dict.fromkeys(keys), key=keys.count)) if keys else CodeSpec().to_dict()


def _difference(own: dict, code: dict) -> dict:
    return {key: value for key, value in own.items() if value != code[key]}


class VqdmQuantizer(DiffusersQuantizer):
    """Builds quantized layers on the meta device; diffusers' ordinary loading then fills their tensors."""

    requires_calibration = True
    required_packages = None

    def maybe_update_loaded_keys(self, loaded_keys: list[str], checkpoint_files: list[str] | None = None) -> list[str]:
        self._files = list(checkpoint_files or [])
        return loaded_keys

    def _process_model_before_weight_loading(self, model: nn.Module, **_) -> None:
        build_layers(model, self.quantization_config)
        if getattr(self, "_files", None):  # an index of shards may be wrong
            check_tensors(tensors_of(model), dict(tensors_in(self._files)))

    def _process_model_after_weight_loading(self, model: nn.Module, **_) -> nn.Module:
        check_widths(model)
        return model

    def _dequantize(self, model: nn.Module) -> nn.Module:
        dequantize_layers(model)
        dequantize_int8(model)
        kept = {name: value for name, value in model.config.items() if name not in QUANTIZED_FIELDS}
        model._internal_dict = FrozenDict(kept)  # diffusers leaves the fields behind, and would save them
        return model

    @property
    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True


def build_layers(model: nn.Module, config: VqdmConfig) -> None:
    """Replace plain layers by the empty ones that `config` describes, in place.

    Raises:
        ValueError: a layer that it names does not exist, is neither Linear nor Conv2d, or does not divide into groups.
    """
    for name, spec in config.specs.items():
        _check_divides(name, _check_plain(model, name), spec)
        swap(model, name, spec)
    for name in config.rounded:
        _check_plain(model, name)
        swap_int8(model, name)


def tensors_of(model: nn.Module) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Return name → shape and dtype of all tensors in a model's files."""
    return {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in model.state_dict().items()}


def tensors_in(files: Iterable[str | Path]) -> Iterator[tuple[str, tuple[tuple[int, ...], str]]]:
    """Yield (name, (shape, dtype as safetensors spells it)) of the tensors in safetensors files.

    Reads headers only, so wrong sizes allocate nothing. Raises ValueError for other files.
    """
    for path in files:
        if Path(path).suffix != ".safetensors":
            raise ValueError(f"{path} is not a safetensors file")
        with safe_open(path, "pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118
                held = tensors.get_slice(name)
                yield name, (tuple(held.get_shape()), held.get_dtype())


def check_tensors(
    expected: dict[str, tuple[tuple[int, ...], torch.dtype]], held: dict[str, tuple[tuple[int, ...], str]]
) -> None:
    """Raise ValueError, naming the first tensor, if one is missing, unknown, or of another shape or kind.

    Floating dtypes may differ: they are cast.
    """
    check_names(expected, held)
    for name, (shape, kind) in held.items():
        own, dtype = expected[name]
        fits = kind in FLOATS if dtype.is_floating_point else kind == KINDS.get(dtype, kind)
        if shape != own or not fits:
            raise ValueError(f"tensor {name} of the checkpoint is {kind} {shape}; the layer holds {own}")


def check_names(expected: Iterable[str], loaded: Iterable[str]) -> None:
    """Raise ValueError if tensors are missing or unknown: the libraries would only warn, and leave a layer random."""
    expected, loaded = dict.fromkeys(expected), dict.fromkeys(loaded)
    absent = [name for name in expected if name not in loaded]
    if absent:
        raise ValueError(f"the checkpoint lacks {len(absent)} tensors, the first is {absent[0]}")
    extra = [name for name in loaded if name not in expected]
    if extra:
        raise ValueError(f"the checkpoint holds {len(extra)} unknown tensors, the first is {extra[0]}")


def check_widths(model: nn.Module) -> None:
    """Raise ValueError if the code widths of a layer contradict its format."""
    for name, layer in quantized_layers(model).items():
        if layer.spec.is_trellis and layer.code_widths.device.type != "meta":
            spec = layer.spec
            try:
                trellis.check_widths(layer.code_widths, spec.segment_rows, spec.nbits_per_codebook, spec.segment_bits)
            except ValueError as error:
                raise ValueError(f"{name}.{error}") from None
        if layer.spec.row_bits and layer.code_widths.device.type != "meta":
            widths = layer.code_widths.to(torch.int64)
            if widths.max() > layer.spec.nbits_per_codebook or widths.sum() != layer.spec.row_bits:
                raise ValueError(f"{name}.code_widths do not add up to row_bits {layer.spec.row_bits}")


def _check_divides(name: str, layer: nn.Linear | nn.Conv2d, spec: CodeSpec) -> None:
    if getattr(layer, "groups", 1) != 1:
        raise ValueError(f"quantization_config: layer {name} is a convolution in {layer.groups} groups")
    try:
        spec.check_shape(len(layer.weight), layer.weight[0].numel())
    except ValueError as error:
        raise ValueError(f"quantization_config: layer {name}: {error}") from None


def _check_plain(model: nn.Module, name: str) -> nn.Module:
    """Return the plain layer of that name. Raises ValueError if it cannot be swapped, or already is."""
    try:
        layer = model.get_submodule(name)
    except AttributeError:
        raise ValueError(f"quantization_config names layer {name}, which {type(model).__name__} lacks") from None
    if not isinstance(layer, nn.Linear | nn.Conv2d) or hasattr(layer, "stored_tensors"):
        raise ValueError(f"quantization_config names layer {name}, which is a {type(layer).__name__}")
    return layer


def mark_quantized(model: nn.Module) -> VqdmConfig:
    """Mark a diffusers model as quantized: `save_pretrained` then writes the format."""
    config = VqdmConfig.of(model)
    model.register_to_config(quantization_config=config)
    model.hf_quantizer = VqdmQuantizer(config, pre_quantized=True)
    model.is_quantized, model.quantization_method = True, config.quant_method
    return config


@contextmanager
def allow_casting(model: nn.Module) -> Iterator[None]:
    """Inside, diffusers casts a quantized model like a plain one, instead of refusing.

    `load_ip_adapter` and `save_lora_adapter` cast the model to the type that it has. Floating-point tensors of codes
    are cast like all others; packed codes are integers and stay.
    """
    quantized = getattr(model, "is_quantized", False)
    model.is_quantized = False
    try:
        yield
    finally:
        model.is_quantized = quantized


# -------------------------------------------------------------------------------------------------------- text encoders


class VqdmTextQuantizer(HfQuantizer):
    """Builds quantized layers on the meta device, once the names and shapes in the files are known to be right."""

    requires_calibration = True

    def _process_model_before_weight_loading(
        self, model: nn.Module, checkpoint_files: list[str] | None = None, **_
    ) -> None:
        names = {short_name(name): name for name, _ in model.named_modules()}
        build_layers(model, self.quantization_config.renamed(lambda name: names.get(short_name(name), name)))
        widen(model)
        if checkpoint_files:
            check_text_tensors(model, dict(tensors_in(checkpoint_files)))

    def _process_model_after_weight_loading(self, model: nn.Module, **_) -> nn.Module:
        check_widths(model)
        for layer in quantized_layers(model).values():
            for name, (_, dtype) in layer.spec.tensor_shapes(layer._rows, layer._columns).items():
                tensor = getattr(layer, name)  # transformers has widened it with all that it keeps in float32
                tensor.data = tensor.data.to(dtype)
        return model

    def _dequantize(self, model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
        dequantize_layers(model)
        dequantize_int8(model)
        # A configuration that was saved holds its type as a word.
        return model.to(getattr(torch, dtype) if isinstance(dtype, str) else dtype or model.dtype)

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True


def check_text_tensors(model: nn.Module, held: dict[str, tuple[int, ...]]) -> None:
    """Check tensors as `check_tensors` does, by stored names.

    transformers would warn and leave random weights. Tensors that it ties to another may be missing.
    """
    tied = {short_name(name) for name in getattr(model, "all_tied_weights_keys", None) or {}}
    expected = {short_name(name): about for name, about in tensors_of(model).items()}
    held = {short_name(name): about for name, about in held.items()}
    expected = {name: about for name, about in expected.items() if name in held or name not in tied}
    check_tensors(expected, held)


def short_name(name: str) -> str:
    """Return a module's or tensor's name as it is stored, for any version of transformers."""
    parts = name.split(".")
    while len(parts) > 1 and parts[0] in TEXT_PREFIXES:
        del parts[0]
    return ".".join(parts)


def widen(model: nn.Module) -> None:
    """Let the weights of quantized layers decode to float32 where transformers keeps them in it, such as T5's `wo`."""
    kept = getattr(model, "_keep_in_fp32_modules", None) or ()
    for name, layer in quantized_layers(model).items():
        layer.wide = not set(name.split(".")).isdisjoint(kept)


def mark_text_quantized(model: nn.Module) -> VqdmConfig:
    """Mark a transformers model as quantized: `save_pretrained` then writes the format."""
    widen(model)
    config = VqdmConfig.of(model).renamed(short_name)
    model.config.quantization_config = config
    model.hf_quantizer = VqdmTextQuantizer(config, pre_quantized=True)
    model.is_quantized, model.quantization_method = True, config.quant_method
    return config


def register() -> None:
    """Register `quant_method: vqdm` in diffusers and transformers; calling it twice changes nothing."""
    for auto, quantizer in ((diffusers_auto, VqdmQuantizer), (transformers_auto, VqdmTextQuantizer)):
        auto.AUTO_QUANTIZER_MAPPING[Method.VQDM.value] = quantizer
        auto.AUTO_QUANTIZATION_CONFIG_MAPPING[Method.VQDM.value] = VqdmConfig


# ----------------------------------------------------------------------------------------- methods of a quantized model
#
# Methods of diffusers and transformers on a model that vqdm quantized, where their own would fail or mislead. Casting
# works as on a plain model, codes aside; a model is saved only if the folder can be loaded again; and what copies a
# UNet's weights gets a plain copy. Other models are passed on to the libraries as they are.

CAST_TO = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
COPIES_WEIGHTS = (
    (ControlNetModel, "from_unet"),
    (ControlNetUnionModel, "from_unet"),
    (SparseControlNetModel, "from_unet"),
    (UNetControlNetXSModel, "from_unet"),
    (UNetMotionModel, "from_unet2d"),
)
CASTS = ("to", "half", "float")
REMOVE = "remove it first: unload_lora_weights(), unload_ip_adapter(), unfuse_qkv_projections()"


def is_vqdm(model) -> bool:
    """Whether a model holds the format of vqdm."""
    method = getattr(getattr(getattr(model, "hf_quantizer", None), "quantization_config", None), "quant_method", None)
    return method == Method.VQDM


def register_methods() -> None:
    """Wrap the methods; doing it twice changes nothing."""
    for kind in (ModelMixin, PreTrainedModel):
        for name in CASTS:
            _wrap(kind, name, _casting)
    _wrap(ModelMixin, "save_pretrained", _saving)
    _wrap(ModelMixin, "enable_layerwise_casting", _refusing_layerwise)
    _wrap(DiffusionPipeline, "save_pretrained", _saving_pipeline)
    for kind, name in COPIES_WEIGHTS:
        _wrap(kind, name, _copying)
    _wrap(FluxLoraLoaderMixin, "_maybe_expand_lora_state_dict", _unexpanded)


def _wrap(kind: type, name: str, around: Callable) -> None:
    """Replace a method by `around` of it, a classmethod by a classmethod."""
    held = kind.__dict__[name]
    original = held.__func__ if isinstance(held, classmethod) else held
    if hasattr(original, "vqdm_original"):
        return
    replaced = wraps(original)(around(original))
    replaced.vqdm_original = original
    setattr(kind, name, classmethod(replaced) if isinstance(held, classmethod) else replaced)


# ------------------------------------------------------------------------------------------- casting


def _casting(original: Callable) -> Callable:
    def cast(self, *args, **options):
        if not is_vqdm(self):
            return original(self, *args, **options)
        narrow = [one for one in (*args, *options.values()) if isinstance(one, torch.dtype) and one not in CAST_TO]
        if narrow:
            raise ValueError(
                f"a model quantized by vqdm cannot be cast to {narrow[0]}: its codebooks would not survive"
            )
        with allow_casting(self):
            return original(self, *args, **options)

    return cast


def _refusing_layerwise(original: Callable) -> Callable:
    def enable_layerwise_casting(self, *args, **options):
        if is_vqdm(self):
            raise ValueError(
                "enable_layerwise_casting would round the codebooks and scales of a model quantized by vqdm to 8 bits; "
                "leave it out, the codes take less memory already"
            )
        return original(self, *args, **options)

    return enable_layerwise_casting


# ------------------------------------------------------------------------------------------- saving


def _saving(original: Callable) -> Callable:
    def save_pretrained(self, *args, **options):
        check_savable(self, args, options)
        return original(self, *args, **options)

    return save_pretrained


def _saving_pipeline(original: Callable) -> Callable:
    def save_pretrained(self, *args, **options):
        for part in self.components.values():
            check_savable(part, (None, None, *args[1:]), options)  # the second argument is safe_serialization here
        return original(self, *args, **options)

    return save_pretrained


def check_savable(model, args: tuple = (), options: dict | None = None) -> None:
    """Raise ValueError, before anything is written, where a quantized model's folder could not be loaded again.

    Args:
        model: anything; what vqdm did not quantize passes.
        args, options: arguments of `save_pretrained`.
    """
    if not is_vqdm(model):
        return
    options = dict(zip(("", "is_main_process", "save_function", "safe_serialization"), args, strict=False)) | (
        options or {}
    )
    if not options.get("safe_serialization", True) or options.get("use_flashpack"):
        raise ValueError(
            "a model quantized by vqdm is saved as safetensors; leave out safe_serialization=False and use_flashpack"
        )
    added = _added(model)
    if added:
        raise ValueError(f"{type(model).__name__} holds {added}, with which a saved folder cannot be loaded; {REMOVE}")


def _added(model: nn.Module) -> str | None:
    """The first tensor or module that a model holds beyond what its configuration describes."""
    adapted = next((name for name, _ in model.named_modules() if name.endswith(".base_layer")), None)
    if adapted or not isinstance(model, ModelMixin):
        return adapted and f"an adapter at {adapted.removesuffix('.base_layer')}"
    try:
        with init_empty_weights():
            described = type(model).from_config(model.config)
    except (ValueError, TypeError):  # an IP-Adapter changes the configuration
        return "an adapter"
    build_layers(described, model.hf_quantizer.quantization_config)
    return _first_beyond(model.state_dict(), described.state_dict())


def _first_beyond(held: Iterable[str], described: Iterable[str]) -> str | None:
    described = set(described)
    return next((name for name in held if name not in described), None)


# ------------------------------------------------------------------------------------------- copying weights


def _unexpanded(original: Callable) -> Callable:
    """An adapter of a quantized transformer is of its width: the original reads a `weight` that is not stored."""

    def expand(cls, transformer, lora_state_dict):
        return lora_state_dict if is_vqdm(transformer) else original(cls, transformer, lora_state_dict)

    return expand


def _copying(original: Callable) -> Callable:
    def from_unet(cls, unet, *args, **options):
        return original(cls, plain_copy(unet) if is_vqdm(unet) else unet, *args, **options)

    return from_unet


def plain_copy(unet: nn.Module) -> nn.Module:
    """A dequantized copy, in the type that the model computes in.

    Raises ValueError where the model holds an adapter.
    """
    added = _added(unet)
    if added:
        raise ValueError(f"{type(unet).__name__} holds {added}; {REMOVE}")
    dtype = unet.conv_in.bias.dtype
    copied = copy.deepcopy(unet)
    copied.dequantize()
    return copied.to(dtype)
