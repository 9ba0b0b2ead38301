"""Milliseconds of decoding a weight by each decode backend, beside those of the layer itself: one JSON line per row.

    OMP_NUM_THREADS=1 python benchmarks/bench_decode.py --shapes 1280x1280 1280x1280x3x3 --codes 3x8g8 2x6g4
    OMP_NUM_THREADS=1 python benchmarks/bench_decode.py --unet assets/shapes-xl/unet --batches 2 32
    python benchmarks/bench_decode.py --device cuda --dtype float16

A shape is OxI of a linear layer or OxCxhxw of a convolution; a code is MxbgG: M codebooks of b bits, groups of G; or,
of linear layers, tB: a trellis of 12 state bits, B bits per weight, in columns that differ by up to two. The layer runs
on T tokens, a convolution on a square image of T positions. With --unet a row is a UNet's step on noise, all its
default layers coded. Codes are random: decoding takes the same time whatever they say. Every figure is the least of
--repeats, the backends and the codes of a shape taking turns.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from collections.abc import Callable, Hashable, Iterator
from functools import partial
from itertools import product

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from vqdm.additive.code import CodeSpec
from vqdm.additive.trellis import UNITS
from vqdm.compiled import compiler
from vqdm.diffusion.blocks import Layer, select_layers
from vqdm.layers.decode import BACKENDS, CANDIDATES, decode, set_decode_backend
from vqdm.layers.quantized import (
    QuantizedConv2d,
    QuantizedLayer,
    QuantizedLinear,
    SharedCodebookModule,
    decoded_once,
    swap,
)
from vqdm.quantization.allocation import trellis_layer, width_total
from vqdm.quantization.shared_codebooks import trellis_codebooks

STATE_BITS = 12
LATENT = 8  # pixels of a side that one latent stands for


def least_ms(runs: dict[Hashable, Callable[[], object]], repeats: int, device: str) -> dict[Hashable, float]:
    """The shortest time of each of `runs`, which take turns, after one that does not count."""
    seconds = dict.fromkeys(runs, float("inf"))
    for repeat in range(repeats + 1):
        for name, run in runs.items():
            _wait(device)
            start = time.perf_counter()
            run()
            _wait(device)
            if repeat:
                seconds[name] = min(seconds[name], time.perf_counter() - start)
    return {name: round(1e3 * value, 3) for name, value in seconds.items()}


def _wait(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def spec_of(code: str) -> CodeSpec:
    """3x8g8 → three codebooks of 8 bits, groups of 8."""
    return CodeSpec(*map(int, code.replace("g", "x").split("x")))


def trellis_linear(plain: nn.Linear, bits: float, generator: torch.Generator) -> QuantizedLinear:
    """The layer as a random trellis code of about `bits` per weight."""
    O, I = plain.weight.shape  # noqa: E741
    found = trellis_layer(Layer("", "", "linear", O, I, CodeSpec()), STATE_BITS, bits)
    layer = QuantizedLinear.like(plain, found.spec)
    layer.shared = (SharedCodebookModule(),)
    layer.shared[0].reserve(found.spec, plain.weight.device)
    layer.shared[0].fill(found.spec.shared_codebooks, trellis_codebooks(STATE_BITS))
    for name, tensor in layer.stored_tensors().items():
        low, high = (0, 256) if name == "codes" else (100, 150)
        tensor.copy_(torch.randint(low, high, tensor.shape, generator=generator))
    mean, more = divmod(width_total(found), I)
    apart = torch.randint(min(UNITS, mean - UNITS) + 1, (I // 2,), generator=generator)
    widths = mean + torch.cat([apart, -apart, apart.new_zeros(I % 2)]) + (torch.arange(I) < more)
    layer.code_widths.copy_(widths[torch.randperm(I, generator=generator)])
    return layer


def fill(layer: QuantizedLayer, generator: torch.Generator) -> QuantizedLayer:
    """Random codes; codebooks and scales that keep activations in range."""
    for name, tensor in layer.stored_tensors().items():
        if tensor.dtype == torch.uint8:
            tensor.data = torch.randint(0, 256, tensor.shape, generator=generator, dtype=torch.uint8)
        elif name == "codebooks":
            size = (layer.spec.num_codebooks * layer._columns) ** -0.5
            tensor.data = (torch.randn(tensor.shape, generator=generator) * size).to(tensor.dtype)
        else:
            tensor.data = torch.ones_like(tensor)
    return layer


def layer_rows(shape: str, arguments: argparse.Namespace) -> Iterator[dict]:
    """One layer in all codes: each decode backend, and the plain layer on each number of tokens."""
    rows, columns, *kernel = map(int, shape.split("x"))
    dtype, generator = getattr(torch, arguments.dtype), torch.Generator().manual_seed(0)
    runs, bits, out = {}, {}, None  # one buffer for all, as in a model
    for code in arguments.codes:
        if kernel:
            plain = nn.Conv2d(columns, rows, kernel, padding="same", bias=False)
            layer = fill(QuantizedConv2d.like(plain, spec_of(code)), generator)
        else:
            plain = nn.Linear(columns, rows, bias=False)
            trellis = code.startswith("t")
            layer = trellis_linear(plain, float(code[1:]), generator) if trellis else None
            layer = layer or fill(QuantizedLinear.like(plain, spec_of(code)), generator)
        stored = layer.to(arguments.device)._stored()
        out = torch.empty(stored.shape, dtype=dtype, device=arguments.device) if out is None else out
        runs |= {(code, path): partial(decode, stored, dtype, out, path) for path in decode_backends(arguments)}
        bits[code] = layer.stored_bits / out.numel()
    plain = plain.to(arguments.device, dtype)
    runs |= {("plain", f"{T}"): partial(plain, inputs(plain, T, out)) for T in arguments.tokens}
    ms = least_ms(runs, arguments.repeats, arguments.device)
    for code in (*arguments.codes, "plain"):
        found = {name: time for (one, name), time in ms.items() if one == code}
        yield {"shape": shape, "code": code, "bits": bits.get(code), "ms": found}


def inputs(plain: nn.Module, tokens: int, like: Tensor) -> Tensor:
    """Noise for a layer: [tokens, I], or [1, C, √tokens, √tokens]."""
    if isinstance(plain, nn.Linear):
        return like.new_ones(tokens, plain.in_features).normal_()
    side = round(tokens**0.5)
    return like.new_ones(1, plain.in_channels, side, side).normal_()


def decode_backends(arguments: argparse.Namespace) -> list[str]:
    """The backends that the command line asks for, or all of the device."""
    found = [*CANDIDATES.get(arguments.device.split(":")[0], ("torch",)), "compile"]
    return arguments.paths or [name for name in found if name != "native" or compiler()]


def unet_row(unet: UNet2DConditionModel, batch: int, code: str, arguments: argparse.Namespace) -> dict:
    """One UNet step: plain, coded with each backend, and coded with the decoded weights kept."""
    coded, generator = copy.deepcopy(unet), torch.Generator().manual_seed(0)
    for found in select_layers(unet, "default", 0, spec_of(code), {}):
        fill(swap(coded, found.name, found.spec), generator).to(arguments.device)
    step = unet_inputs(unet, batch)
    runs = {"plain": partial(unet, **step)}
    runs |= {path: partial(forced, path, partial(coded, **step)) for path in (*decode_backends(arguments), "auto")}
    ms = least_ms(runs, arguments.repeats, arguments.device)
    with decoded_once(coded):
        ms |= least_ms({"decoded_once": partial(coded, **step)}, arguments.repeats, arguments.device)
    return {"unet": arguments.unet, "batch": batch, "code": code, "ms": ms, "ratio": round(ms["auto"] / ms["plain"], 3)}


def forced(path: str, run: Callable[[], object]) -> None:
    """Run with all weights decoded by one backend."""
    set_decode_backend(path)
    run()
    set_decode_backend(None)


def unet_inputs(
    unet: UNet2DConditionModel, batch: int, height: int | None = None, width: int | None = None, tokens: int = 24
) -> dict:
    """Noise of the shapes that a step of the pipeline passes, for images of `height` by `width` pixels."""
    config, like = unet.config, unet.conv_in.weight
    noise = lambda *shape: like.new_ones(shape).normal_()  # noqa: E731
    sides = (pixels // LATENT if pixels else config.sample_size for pixels in (height, width))
    inputs = {"sample": noise(batch, config.in_channels, *sides), "timestep": 500}
    inputs["encoder_hidden_states"] = noise(batch, tokens, config.cross_attention_dim)
    if config.addition_embed_type == "text_time":
        pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
        inputs["added_cond_kwargs"] = {"text_embeds": noise(batch, pooled), "time_ids": noise(batch, 6)}
    return inputs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    shapes = ["224x224", "640x640", "1280x1280", "1280x5120", "320x320x3x3", "1280x1280x3x3"]
    parser.add_argument("--shapes", nargs="+", default=shapes, metavar="OxI|OxCxhxw")
    parser.add_argument(
        "--codes", nargs="+", default=["2x6g4", "2x8g8", "3x8g8", "4x8g8", "2x12g8"], metavar="MxbgG|tB"
    )
    parser.add_argument("--tokens", nargs="+", type=int, default=[64, 1024, 4096])
    parser.add_argument("--paths", nargs="+", choices=BACKENDS[1:])
    parser.add_argument("--unet", metavar="DIR", help="a UNet's steps instead of single layers")
    parser.add_argument("--batches", nargs="+", type=int, default=[2, 32])
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=("float32", "float16", "bfloat16"))
    arguments = parser.parse_args()
    print(json.dumps({"device": arguments.device, "dtype": arguments.dtype, "threads": torch.get_num_threads()}))
    with torch.no_grad():
        if arguments.unet:
            unet = UNet2DConditionModel.from_pretrained(arguments.unet, dtype=getattr(torch, arguments.dtype))
            unet = unet.to(arguments.device)
            for batch, code in product(arguments.batches, arguments.codes):
                print(json.dumps(unet_row(unet, batch, code, arguments)), flush=True)
        else:
            for shape in arguments.shapes:
                for row in layer_rows(shape, arguments):
                    print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
