"""What `--unquantized_nbits 8` costs: the error of a UNet's output with its unquantized layers in 8 bit.

    python benchmarks/bench_int8.py assets/shapes-xl prompts/shapes_test.csv
    python benchmarks/bench_int8.py assets/shapes-xl prompts/shapes_test.csv --quantized out/demo

The full-precision model samples the first prompts of the file; its UNet's inputs and outputs are recorded. One JSON
line per row: the error on them, in dB of the outputs' energy, with unquantized layers in 16 and in 8 bit, and the
stored bits per parameter.
"""

from __future__ import annotations

import argparse
import json

import torch
from rivals import bits_on_disk

from vqdm.additive.code import CodeSpec
from vqdm.diffusion.blocks import select_layers, unquantized_layers
from vqdm.diffusion.model_folders import find_denoiser, load_denoiser
from vqdm.diffusion.pipelines import load_pipeline
from vqdm.diffusion.sampling import output_error, record_evaluation
from vqdm.layers.int8 import quantize_int8
from vqdm.layers.quantized import decoded_once, quantized_layers
from vqdm.prompts import load_prompts


def int8_candidates(unet: torch.nn.Module) -> list[str]:
    """Names of what `--unquantized_nbits 8` stores in 8 bit, where no layer is quantized in a run of the defaults."""
    default = [layer.name for layer in select_layers(unet, "default", 0, CodeSpec(1, 1, 1), {})]
    names = list(quantized_layers(unet)) or default
    return [name for name in unquantized_layers(unet, []) if name not in names]


def row(unet: torch.nn.Module, recorded, parameters: int, unquantized_nbits: int, size: int) -> dict:
    """One measured state of the UNet, as it is printed; full-precision tensors count 16 bits per value."""
    with decoded_once(unet):
        error = output_error(unet, recorded, size)
    return {
        "quantized_layers": len(quantized_layers(unet)),
        "unquantized_nbits": unquantized_nbits,
        "unet_output_error_db": round(error, 3),
        "stored_bits_per_parameter": round(bits_on_disk(unet) / parameters, 4),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("prompts")
    parser.add_argument("--quantized", help="measure on top of this result instead of the full-precision UNet")
    parser.add_argument("--limit", type=int, default=8, help="prompts")
    parser.add_argument("--num_inference_steps", type=int, default=10)
    parser.add_argument("--guidance_scale", type=float, default=3.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    pipeline = load_pipeline(arguments.model, torch.device(arguments.device), torch.float32)
    settings = {"num_inference_steps": arguments.num_inference_steps, "guidance_scale": arguments.guidance_scale}
    prompts = load_prompts(arguments.prompts, "PROMPTS")[: arguments.limit]
    recorded, _ = record_evaluation(pipeline, prompts, arguments.seed, settings, arguments.limit)
    unet, parameters = pipeline.unet, sum(tensor.numel() for tensor in pipeline.unet.parameters())
    if arguments.quantized:
        unet = load_denoiser(find_denoiser(arguments.quantized), torch.float32).to(arguments.device)
    names = int8_candidates(unet)
    for unquantized_nbits in (16, 8):
        if unquantized_nbits == 8:
            for name in names:
                quantize_int8(unet, name)
        print(json.dumps(row(unet, recorded, parameters, unquantized_nbits, arguments.limit)), flush=True)


if __name__ == "__main__":
    main()
