"""Replace the weights of a model's layers by codes: Hessians, bit allocation, shared codebooks, then block by block.

The model is a denoiser, a text encoder or a language model; each step finds and keeps what an interrupted run left.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from vqdm.additive.code import AdditiveCode
from vqdm.diffusion.blocks import Layer
from vqdm.diffusion.model_folders import denoisers_for, load_denoiser
from vqdm.diffusion.trajectories import Trajectories
from vqdm.layers.quantized import QuantizedLayer, quantized_layers, swap
from vqdm.quantization.allocation import allocated
from vqdm.quantization.block import layer_row, load_quantized, quantize_block
from vqdm.quantization.plan import keeps_hessians, layer_table, plain_bits, shared_codebook_users
from vqdm.quantization.recording import drop_walk, student_trajectories, teacher_hessians, teacher_trajectories
from vqdm.quantization.shared_codebooks import make_shared_codebooks
from vqdm.storage.run_folder import LayerResult
from vqdm.tracking import log_info, progress_bar

if TYPE_CHECKING:
    from vqdm.quantization.job import Job


def quantize_layers(job: Job, after: Callable[[int, str], None]) -> dict[str, LayerResult]:
    """Replace the weights of the job's layers by codes; each step finds and keeps what an interrupted run left.

    Args:
        after: called with the number and name of each block that is done.
    """
    if keeps_hessians(job.config, job.layers) and not (job.drops_hessians and all_coded(job)):
        with job.clock("hessians"):
            job.store = teacher_hessians(job)
    if job.config.target_bits is not None:
        with job.clock("allocation"):
            job.layers = allocated(job, job.store)
            plain = plain_bits(job.denoiser, job.stored.get(job.component))
            log_info(layer_table(job.layers, job.parameters, job.int8, plain))
    with job.clock("shared_codebooks"):
        job.shared_codebooks = make_shared_codebooks(job, job.store) if shared_codebook_users(job.layers) else {}
    quantized = load_codes(job) | finished_layers(job)
    if job.ranks.main:
        job.folder.rewrite_table([done.report for done in quantized.values()])
    for index, (block, layers) in enumerate(progress_bar(job.blocks, description="blocks"), start=1):
        todo = [layer for layer in layers if layer.name not in quantized]
        if todo:
            log_info(f"block {index}/{len(job.blocks)} {block}: {len(todo)} of {len(layers)} layers to quantize")
            quantized |= quantize_block(job, layers, todo, calibration_points(job, block))
        swap_block(job, layers, quantized)
        if job.ranks.main:
            job.folder.drop_block(block)
        after(index, block)
    drop_walk(job)
    return quantized


def all_coded(job: Job) -> bool:
    """Return whether a run with allocated bits was interrupted after its last layer; its Hessians may be gone."""
    paths = [job.folder.layer_path(layer.name) for layer in job.layers]
    return job.ranks.broadcast(job.config.target_bits is not None and all(path.is_file() for path in paths))


def calibration_points(job: Job, block: str) -> Trajectories | None:
    """Return the points that a block is calibrated on; None where stored Hessians or recorded prompts serve."""
    if job.text:
        return None
    if job.config.calibration_latents == "student":
        return student_trajectories(job, block)
    return None if job.store else teacher_trajectories(job)


def finished_layers(job: Job) -> dict[str, LayerResult]:
    """Return the layers that an interrupted run left, as the first rank sees them: all ranks continue with the same."""
    done = job.ranks.broadcast([layer for layer in job.layers if job.folder.layer_path(layer.name).is_file()])
    return {layer.name: load_quantized(job, layer) for layer in done}


def load_codes(job: Job) -> dict[str, LayerResult]:
    """Return the layers of an earlier result that `--load` names, where name, format and shared codebooks agree."""
    if job.config.load is None:
        return {}
    folder = denoisers_for(job.pipeline, job.config.load, job.config.model, name="--load").get(job.component)
    held, found = {}, {}
    if folder is not None:  # else of another expert alone
        held = quantized_layers(load_denoiser(folder, torch.float32, name="--load"))
    for layer in job.layers:
        if layer.name in held and held[layer.name].spec == layer.spec and same_shared_codebooks(job, held[layer.name]):
            tensors = held[layer.name].code().pack()
            found[layer.name] = LayerResult(tensors, layer.spec, layer_row(layer, {"loaded_from": job.config.load}))
    log_info(f"--load {job.config.load}: {len(found)} of {len(job.layers)} layers are taken from it")
    return found


def same_shared_codebooks(job: Job, layer: QuantizedLayer) -> bool:
    """Return whether a layer's shared codebooks equal the job's of that name; True if it has its own."""
    books = job.shared_codebooks.get(layer.spec.shared_codebooks)
    return books is None or torch.equal(layer.code().codebooks.float().cpu(), books.codebooks.cpu())


def swap_block(job: Job, layers: list[Layer], quantized: dict[str, LayerResult]) -> None:
    """Replace the weights of a block by their codes."""
    if job.swapper:
        job.swapper.leave()
    for layer in layers:
        done = quantized[layer.name]
        name, books = layer.spec.shared_codebooks, job.shared_codebooks.get(layer.spec.shared_codebooks)
        code = AdditiveCode.unpack(done.spec, (layer.rows, layer.columns), done.tensors, books and books.codebooks)
        module = swap(job.denoiser, layer.name, layer.spec)
        if books:
            module.shared[0].fill(name, books.codebooks)
        module.set_code(code)
    if job.swapper:
        job.swapper.settle()
