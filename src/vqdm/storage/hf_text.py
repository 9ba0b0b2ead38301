"""The format's home in transformers, for text encoders: `hf.VqdmConfig` with a quantizer of transformers' own kind.

The module paths of CLIP's text models depend on the version of transformers and on the class: with or without
`text_model.` in front. Names are stored without, and found either way.
"""

from __future__ import annotations

from torch import dtype as Dtype
from torch import nn
from transformers.quantizers import HfQuantizer, auto

from vqdm.layers.int8 import dequantize_int8
from vqdm.layers.quantized import dequantize_layers
from vqdm.storage.hf import Method, VqdmConfig, build_layers, check_tensors, check_widths, tensors_in, tensors_of

TEXT_PREFIX = "text_model."


class VqdmTextQuantizer(HfQuantizer):
    """Builds quantized layers on the meta device, once the names and shapes in the files are known to be right."""

    requires_calibration = True

    def _process_model_before_weight_loading(
        self, model: nn.Module, checkpoint_files: list[str] | None = None, **_
    ) -> None:
        build_layers(model, self.quantization_config.renamed(lambda name: _name_in(model, name)))
        if checkpoint_files:
            check_text_tensors(model, dict(tensors_in(checkpoint_files)))

    def _process_model_after_weight_loading(self, model: nn.Module, **_) -> nn.Module:
        check_widths(model)
        return model

    def _dequantize(self, model: nn.Module, dtype: Dtype | None = None) -> nn.Module:
        dequantize_layers(model)
        dequantize_int8(model)
        return model.to(dtype or model.dtype)

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True


def check_text_tensors(model: nn.Module, held: dict[str, tuple[int, ...]]) -> None:
    """As `check_tensors`, by stored names.

    transformers would warn and leave random weights. Tensors that it ties to another need not be held.
    """
    tied = {short_name(name) for name in getattr(model, "all_tied_weights_keys", None) or {}}
    expected = {short_name(name): about for name, about in tensors_of(model).items()}
    held = {short_name(name): about for name, about in held.items()}
    expected = {name: about for name, about in expected.items() if name in held or name not in tied}
    check_tensors(expected, held)


def short_name(name: str) -> str:
    """A module's or tensor's name as it is stored, whatever the version of transformers."""
    return name.removeprefix(TEXT_PREFIX)


def _name_in(model: nn.Module, name: str) -> str:
    """The name by which this model knows a stored one."""
    return TEXT_PREFIX + name if isinstance(getattr(model, "text_model", None), nn.Module) else name


def mark_text_quantized(model: nn.Module) -> VqdmConfig:
    """Tell a transformers model that it is quantized now, so that `save_pretrained` writes the format."""
    config = VqdmConfig.of(model).renamed(short_name)
    model.config.quantization_config = config
    model.hf_quantizer = VqdmTextQuantizer(config, pre_quantized=True)
    model.is_quantized, model.quantization_method = True, config.quant_method
    return config


def register_text() -> None:
    """Make transformers know `quant_method: vqdm`; doing it twice changes nothing."""
    auto.AUTO_QUANTIZER_MAPPING[Method.VQDM.value] = VqdmTextQuantizer
    auto.AUTO_QUANTIZATION_CONFIG_MAPPING[Method.VQDM.value] = VqdmConfig
