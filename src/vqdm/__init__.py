"""vqdm: text-to-image diffusion models at 2 to 4 bits a weight, with additive vector quantization.

Importing it teaches diffusers and transformers the format, after which `from_pretrained` loads quantized folders.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from vqdm.additive.code import AdditiveCode, CodeSpec
from vqdm.additive.config import SolverConfig
from vqdm.layers.decode import set_decode_path
from vqdm.layers.quantized import QuantizedConv2d, QuantizedLinear, decoded_once
from vqdm.quantization.text_encoder import quantize_text_encoder
from vqdm.storage.casting import allow_casting
from vqdm.storage.hf import VqdmConfig, VqdmQuantizer, register
from vqdm.storage.hf_methods import register_methods
from vqdm.storage.hf_text import VqdmTextQuantizer, register_text

if TYPE_CHECKING:
    from vqdm.api import QuantizationReport, quantize

__version__ = "0.1.0"
__all__ = [
    "AdditiveCode",
    "CodeSpec",
    "QuantizationReport",
    "QuantizedConv2d",
    "QuantizedLinear",
    "SolverConfig",
    "VqdmConfig",
    "VqdmQuantizer",
    "VqdmTextQuantizer",
    "allow_casting",
    "decoded_once",
    "quantize",
    "quantize_text_encoder",
    "set_decode_path",
]
_LAZY = {"QuantizationReport": "vqdm.api", "quantize": "vqdm.api"}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_LAZY[name]), name)


register()
register_text()
register_methods()
