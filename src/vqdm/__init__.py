"""vqdm: text-to-image diffusion models at 2 to 4 bits a weight, with additive vector quantization.

Importing it teaches diffusers the format, after which `from_pretrained` loads quantized folders.
"""

from vqdm.additive.code import AdditiveCode, CodeSpec
from vqdm.additive.config import SolverConfig
from vqdm.layers.decode import set_decode_path
from vqdm.layers.quantized import QuantizedConv2d, QuantizedLinear, decoded_once
from vqdm.storage.hf import VqdmConfig, VqdmQuantizer, register

__version__ = "0.1.0"
__all__ = [
    "AdditiveCode",
    "CodeSpec",
    "QuantizedConv2d",
    "QuantizedLinear",
    "SolverConfig",
    "VqdmConfig",
    "VqdmQuantizer",
    "decoded_once",
    "set_decode_path",
]

register()
