"""vqdm: text-to-image diffusion models at 2 to 4 bits per weight, with additive vector quantization.

Importing it registers the format in diffusers and transformers: `from_pretrained` then loads quantized folders. What
quantizes is imported on first use.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from vqdm.additive.code import AdditiveCode, CodeSpec
from vqdm.layers.decode import set_decode_backend
from vqdm.layers.quantized import QuantizedConv2d, QuantizedLinear, decoded_once
from vqdm.storage.hf import VqdmConfig, VqdmQuantizer, VqdmTextQuantizer, allow_casting, register, register_methods

if TYPE_CHECKING:
    from vqdm.additive.solve import SolverConfig
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
    "set_decode_backend",
]
_LAZY = {
    "QuantizationReport": "vqdm.api",
    "SolverConfig": "vqdm.additive.solve",
    "quantize": "vqdm.api",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        return getattr(import_module(_LAZY[name]), name)
    except ModuleNotFoundError as error:
        raise ImportError(f"vqdm.{name} needs the package {error.name}: pip install 'vqdm[quantize]'") from error


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


register()
register_methods()
