"""Memory and disk of a quantization, phase by phase, from shapes alone: before it starts, within seconds.

Counted are tensors that are alive at once. Workspaces of libraries, and what an allocator wastes, are not.

Letters: O rows and I columns of a layer, A guidance branches.
"""

from __future__ import annotations

import inspect
import math
from dataclasses import dataclass, replace
from itertools import groupby

import torch
from diffusers import DiffusionPipeline

from vqdm.additive.solve import GAP_COLUMNS
from vqdm.config import SamplingConfig
from vqdm.devices import peak_memory
from vqdm.diffusion.blocks import Layer
from vqdm.diffusion.hessians import ROWS_PER_PRODUCT, VALUES_PER_PRODUCT, passes
from vqdm.diffusion.pipelines import image_size
from vqdm.diffusion.sampling import unet_dtype
from vqdm.diffusion.shapes import UNCALLABLE, decode_bytes, forward_bytes, meta_copy, meta_unet
from vqdm.quantization.config import QuantizeConfig
from vqdm.quantization.plan import hessian_bytes
from vqdm.tracking import Stopwatch

SUM, MEAN = 8, 4  # bytes of an entry of a Hessian: while it is accumulated, and as it is kept
SQUARES = 4  # matrices [I, I] that the solver makes at once in float32, beside two Hessians
GAP_SQUARES = 6  # that the gap to the bound takes instead, where a layer has one
WEIGHTS = {False: 6, True: 20}  # matrices [O, I] that it makes in float32: of additive codes, of trellis codes
PROGRAM = 1.5e9  # bytes of RAM of the program and its libraries


@dataclass(frozen=True)
class Shapes:
    """What the plan needs of a model, all in bytes.

    Attributes:
        unet, text, vae: weights in the type that is computed in.
        step: activations of a UNet call on one point, all of its branches.
        decode: activations, and weights in float32, while the VAE decodes one image.
        pipeline: all weights.
        points: recorded points of all prompts.
        positions: of the latents of one point, of all branches: a number, not bytes.
        itemsize: of a value in the type that is computed in.
    """

    unet: int
    text: int
    vae: int
    step: int
    decode: int
    pipeline: int
    points: int
    positions: int
    itemsize: int


@dataclass(frozen=True)
class Need:
    """Bytes that a phase needs: on the device that computes, in RAM beside it, and what is on the disk at its end."""

    phase: str
    device: int
    ram: int
    disk: int


def plan(config: QuantizeConfig, shapes: Shapes, groups: list[list[Layer]], all_kept: bool) -> list[Need]:
    """Return what every phase needs.

    Args:
        groups: layers by the input that they share.
        all_kept: whether the Hessians of all layers are recorded first, and kept.
    """
    layers = [layer for group in groups for layer in group]
    by_block = [list(some) for _, some in groupby(groups, key=lambda group: group[0].block)]
    in_block = [part for some in by_block for part in passes(some, config.hessian_memory_gb)]
    recorded = passes(groups, config.hessian_memory_gb) if all_kept else in_block
    batch = config.xtx_batch_size * shapes.step
    rows = max(sample_bytes(config, shapes, group[0].columns) for group in groups)
    sampling = max(shapes.text, shapes.vae + batch, shapes.decode)
    hessians = max(map(squares, recorded)) * (SUM + MEAN) + batch + rows
    hardest = max(solver_bytes(layer, config.code == "trellis") for layer in layers)
    solving = max(map(squares, in_block)) * 2 * MEAN + hardest
    changes = shapes.itemsize * sum(layer.rows * layer.columns for layer in layers)
    rest, kept = shapes.text + shapes.vae, hessian_bytes(groups, config.hessian_memory_gb, all_kept)
    needs = [
        Need("teacher", shapes.unet + sampling, rest + shapes.points, shapes.points),
        Need("hessians", shapes.unet + hessians, rest + shapes.points, shapes.points + kept),
        Need("layers", shapes.unet + solving, rest, shapes.points + kept),
        Need("evaluation", shapes.unet + sampling, rest + shapes.points, shapes.points + kept),
        Need("saving", shapes.unet, rest + shapes.unet, 2 * shapes.pipeline + shapes.points + kept),
    ]
    if config.target_bits is not None:
        # Backward with checkpointing: about one call's activations again, and a gradient.
        widest = max(layer.rows * layer.columns for layer in layers)
        effects = max(2 * (shapes.step + shapes.itemsize * widest), solving)
        needs.insert(2, Need("allocation", shapes.unet + effects, rest + changes + shapes.points, shapes.points + kept))
    return needs


def sample_bytes(config: QuantizeConfig, shapes: Shapes, columns: int) -> int:
    """Return the bytes of the samples of one batch that are multiplied at once, and of a strip of their product."""
    steps = config.sampling.num_inference_steps or 50
    points = 0.9 * (config.calibration_nsamples or 256) * min(config.calibration_nsteps or steps, steps)
    share = min(1.0, config.xtx_batch_size / points)
    rows = config.xtx_batch_size * shapes.positions
    if config.hessian_samples_per_input:
        rows = min(rows, int(config.hessian_samples_per_input * share * columns))
    values = min(rows * columns, VALUES_PER_PRODUCT)
    return (4 + shapes.itemsize) * values + 2 * 4 * columns * min(columns, ROWS_PER_PRODUCT)


def squares(groups: list[list[Layer]]) -> int:
    """Return the sum of I² over the inputs of a pass."""
    return sum(group[0].columns ** 2 for group in groups)


def solver_bytes(layer: Layer, trellis: bool) -> int:
    """Return the bytes that quantizing one layer takes beside its Hessians, with trellis or additive codes."""
    solver = SQUARES * layer.columns**2 + WEIGHTS[trellis] * layer.rows * layer.columns
    gap = GAP_SQUARES * layer.columns**2 if layer.columns <= GAP_COLUMNS else 0
    return 4 * max(solver, gap)


def shapes_of(
    pipeline: DiffusionPipeline, sampling: SamplingConfig, values: dict[str, int], points: int
) -> Shapes | None:
    """Return the shapes of a pipeline, whose weights may be missing; None where its parts cannot be called as usual.

    Args:
        values: number of those of every part, by name.
        points: bytes of recorded points.
    """
    dtype, scale = unet_dtype(pipeline.unet), pipeline.vae_scale_factor
    size = [side // scale for side in image_size(pipeline, sampling.height, sampling.width)]
    bytes_of = {name: dtype.itemsize * count for name, count in values.items()}
    guidance = inspect.signature(pipeline.__call__).parameters.get("guidance_scale")
    given = sampling.guidance_scale if sampling.guidance_scale is not None else guidance and guidance.default
    wide = dtype == torch.float16 and pipeline.vae.config.get("force_upcast")
    branches = 2 if (given or 0) > 1 else 1
    try:
        step = forward_bytes(meta_unet(pipeline.unet.config, dtype), *size, branches)
        vae = meta_copy(pipeline.vae, torch.float32 if wide else dtype)
        decode = decode_bytes(vae, *size)
    except UNCALLABLE:
        return None
    return Shapes(
        unet=bytes_of["unet"],
        text=sum(count for name, count in bytes_of.items() if name not in ("unet", "vae")),
        vae=bytes_of["vae"],
        step=step,
        decode=sum(tensor.nbytes for tensor in vae.parameters()) + decode,
        pipeline=sum(bytes_of.values()),
        points=points,
        positions=branches * math.prod(size),
        itemsize=dtype.itemsize,
    )


def on(needs: list[Need], device: str) -> list[Need]:
    """Return the needs with the RAM of the program itself; on a CPU, RAM is where all is computed."""
    own = int(PROGRAM)
    if device == "cpu":
        return [replace(need, device=0, ram=need.ram + need.device + own) for need in needs]
    return [replace(need, ram=need.ram + own) for need in needs]


def table(needs: list[Need]) -> str:
    """Format a line per phase, in GB."""
    lines = [f"{'phase':12} {'GPU':>7} {'RAM':>7} {'disk':>7}   GB, counted from shapes"]
    lines += [f"{n.phase:12} {n.device / 1e9:7.2f} {n.ram / 1e9:7.2f} {n.disk / 1e9:7.2f}" for n in needs]
    return "\n".join(lines)


def lacking(needs: list[Need], device: int | None, ram: int | None) -> list[str]:
    """Return a line for GPU memory and for RAM, where a phase needs more than is free; None is unknown."""
    found = []
    for name, free, most in (
        ("GPU memory", device, max(needs, key=lambda need: need.device)),
        ("RAM", ram, max(needs, key=lambda need: need.ram)),
    ):
        wanted = most.device if name == "GPU memory" else most.ram
        if free is not None and wanted > free:
            found.append(f"{name}: phase {most.phase} needs {wanted / 1e9:.2f} GB, {free / 1e9:.2f} GB are free")
    return found


def smaller(config: QuantizeConfig) -> list[QuantizeConfig]:
    """Return the settings with smaller batches, then with less memory for Hessians too; the closest come first."""
    found, size, memory = [], config.xtx_batch_size, config.hessian_memory_gb
    while size > 1:
        size //= 2
        found.append(replace(config, xtx_batch_size=size))
    for k in range(1, 7):
        found.append(replace(config, xtx_batch_size=size, hessian_memory_gb=memory / 2**k))
    return found


class MemoryClock(Stopwatch):
    """Seconds by phase, and the peaks of memory that were reached in it: those of the host only ever grow."""

    def __init__(self, device: torch.device):
        super().__init__()
        self.device, self.peaks = device, {}

    def __enter__(self) -> None:
        self._note("between")
        super().__enter__()

    def __exit__(self, *error) -> None:
        super().__exit__(*error)
        self._note(self._phase)

    def _note(self, phase: str) -> None:
        before = self.peaks.get(phase, {})
        now = peak_memory(self.device)
        self.peaks[phase] = {kind: max(value, before.get(kind, 0)) for kind, value in now.items()}
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)

    def whole(self) -> dict[str, int]:
        """Return the peaks of all phases together, as `devices.peak_memory`."""
        self._note("between")
        return {kind: max(one[kind] for one in self.peaks.values()) for kind in self.peaks["between"]}
