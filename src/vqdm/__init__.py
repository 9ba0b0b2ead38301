"""vqdm: text-to-image diffusion models at 2 to 4 bits a weight, with additive vector quantization.

Importing it teaches diffusers and transformers the format, after which `from_pretrained` loads quantized folders.
"""

from vqdm.additive.code import AdditiveCode, CodeSpec
from vqdm.additive.config import SolverConfig
from vqdm.layers.decode import set_decode_backend
from vqdm.layers.quantized import QuantizedConv2d, QuantizedLinear, decoded_once
from vqdm.quantization.text_encoder import quantize_text_encoder
from vqdm.storage.hf import VqdmConfig, VqdmQuantizer, VqdmTextQuantizer, allow_casting, register
from vqdm.storage.hf_methods import register_methods

__version__ = "0.1.0"
__all__ = [
    "AdditiveCode",
    "CodeSpec",
    "QuantizedConv2d",
    "QuantizedLinear",
    "SolverConfig",
    "VqdmConfig",
    "VqdmQuantizer",
    "VqdmTextQuantizer",
    "allow_casting",
    "decoded_once",
    "quantize_text_encoder",
    "set_decode_backend",
]

register()
register()
register_methods()
