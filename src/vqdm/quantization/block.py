"""Quantize one block: record the Hessians of its layers on the student so far, quantize and save each layer."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from multiprocessing import TimeoutError as NotYet
from multiprocessing.pool import ThreadPool
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from vqdm.additive.code import AdditiveCode, SharedCodebooks
from vqdm.additive.solve import LayerReport, SolverConfig, Task, solve_layers
from vqdm.diffusion.blocks import Layer, matrix_of
from vqdm.diffusion.hessians import HessianStore, passes
from vqdm.diffusion.trajectories import Trajectories
from vqdm.errors import RunError
from vqdm.parallel import shares
from vqdm.quantization.plan import layer_line
from vqdm.storage.run_folder import LayerResult, layer_generator, wait_for_file
from vqdm.tracking import JsonLines, log_info, progress_bar

if TYPE_CHECKING:
    from vqdm.quantization.job import Job

MATRICES_PER_LAYER = 6  # square matrices of a layer's size that the solver holds at once
WEIGHTS_PER_LAYER = 16  # matrices of its weight's size, codes included
ROWS_PER_BATCH = 2**15  # of layers that are quantized together; more would not make a GPU busier


def quantize_block(
    job: Job, layers: list[Layer], todo: list[Layer], trajectories: Trajectories | None
) -> dict[str, LayerResult]:
    """Quantize the layers `todo` of a block, spread over the ranks; each batch is on disk before the next begins.

    Their Hessians are the stored ones of the full-precision model where the job has them, else those of the student
    so far on `trajectories`. These are on disk while they are needed: an interrupted run does not record them again.
    """
    quantized = {}
    stored = trajectories is None and job.store
    parts = stored_hessians(job, todo) if stored else student_hessians(job, layers, todo, trajectories)
    with progress_bar(total=len(todo), description="layers") as progress:
        for store, groups in parts:
            with job.clock("layers"):
                quantized |= quantize_groups(job, store, groups, progress.update)
    return quantized


def stored_hessians(job: Job, todo: list[Layer]) -> Iterator[tuple[HessianStore, list[list[Layer]]]]:
    """Yield (store, layers by input) of the job's store, as many as fit into memory."""
    for groups in passes(job.store.groups(todo), job.config.hessian_memory_gb):
        yield job.store, groups


def student_hessians(
    job: Job, layers: list[Layer], todo: list[Layer], trajectories: Trajectories | None
) -> Iterator[tuple[HessianStore, list[list[Layer]]]]:
    """Yield the same, recorded with the earlier blocks quantized, and dropped once the layers are."""
    block, wanted = layers[0].block, {layer.name for layer in todo}
    store = HessianStore(job.folder.block_hessians(block), {"block": block})
    store.leaders = job.ranks.broadcast(store.leaders)
    recorder = job.recorder(store, trajectories)
    groups = [[layer for layer in group if layer.name in wanted] for group in recorder.groups(layers)]
    for some in passes([group for group in groups if group], job.config.hessian_memory_gb):
        missing = [group for group in some if any(layer not in store for layer in group)]
        if missing:
            with job.clock("hessians"):
                recorder.record(missing)
        yield store, some
        job.ranks.barrier()
        store.drop(some, on_disk=job.ranks.main)


def quantize_groups(
    job: Job, store: HessianStore, groups: list[list[Layer]], tick: Callable[[], None]
) -> dict[str, LayerResult]:
    """Quantize layers together with the other ranks, and load the results of all of them."""
    layers, rows = [layer for group in groups for layer in group], []
    for layer, code, report in quantize_shard(job, store, layers, job.config.solver, job.shared_codebooks):
        rows.append(save_layer(job, layer, code, report))
        tick()
    logged = {row["name"] for row in rows}
    for row in (row for part in job.ranks.all_gather(rows) for row in part):
        if job.ranks.main and row["name"] not in logged:
            log_layer(job, row)
            tick()
    return {layer.name: load_quantized(job, layer) for layer in layers}


def load_quantized(job: Job, layer: Layer) -> LayerResult:
    """Load a layer that some rank has quantized."""
    wait_for_file(job.folder.layer_path(layer.name))
    return job.folder.load_layer(layer)


def quantize_shard(
    job: Job,
    store: HessianStore,
    layers: list[Layer],
    solver: SolverConfig,
    shared_codebooks: dict[str, SharedCodebooks],
) -> Iterator[tuple[Layer, AdditiveCode, LayerReport]]:
    """Yield this rank's shard of the layers, quantized, the costliest first; other ranks have the others.

    On a CPU several layers are worked on at once, one thread each. The codes depend neither on that nor on the ranks.
    On a GPU layers of one shape are quantized together, on which the codes depend only up to rounding.
    """
    own = [layers[index] for index in shares([cost(layer) for layer in layers], job.ranks.world)[job.ranks.rank]]
    if not own:
        return
    found = {group[0].name: store.load(group[0], job.denoiser.device) for group in store.groups(own)}
    hessians = {layer.name: found[group[0].name] for group in store.groups(own) for layer in group}
    together = batches(own, batch_memory(job.denoiser.device) if solver.encoder == "ldl" else 0)

    def quantize_batch(some: list[Layer]) -> list[tuple[AdditiveCode, LayerReport]]:
        return solve_layers([layer_task(job, solver, shared_codebooks, layer, *hessians[layer.name]) for layer in some])

    with one_thread_per_layer(job, max(layer.columns for layer in own)) as workers, threads(workers) as mapped:
        for some, results in zip(together, mapped(quantize_batch, together), strict=True):
            for layer, result in zip(some, results, strict=True):
                yield layer, *result


def batch_memory(device: torch.device) -> int:
    """Return the bytes for layers quantized together: half of a GPU's free ones; 0 on a CPU, busy with one layer."""
    if device.type != "cuda":
        return 0
    cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # free, inside torch's cache
    return (torch.cuda.mem_get_info(device)[0] + cached) // 2


def batches(layers: list[Layer], memory: int) -> list[list[Layer]]:
    """Return layers of one shape and format, as many as fit into `memory` bytes; with 0, each alone, in their order."""
    if not memory:
        return [[layer] for layer in layers]
    alike: dict[tuple, list[Layer]] = {}
    for layer in layers:
        alike.setdefault((layer.rows, layer.columns, layer.spec), []).append(layer)
    found = []
    for some in alike.values():
        count = layers_at_once(some[0].rows, some[0].columns, memory)
        found += [some[start : start + count] for start in range(0, len(some), count)]
    return found


def layers_at_once(rows: int, columns: int, memory: int) -> int:
    """Return how many layers of a shape to quantize together, at least one."""
    each = 4 * (MATRICES_PER_LAYER * columns**2 + WEIGHTS_PER_LAYER * rows * columns)
    return max(1, min(ROWS_PER_BATCH // rows, memory // each))


def cost(layer: Layer) -> float:
    """Return the work to quantize a layer, in units of its own: searches with H, and its factorization."""
    return layer.rows * layer.columns**2 + layer.columns**3


@contextmanager
def one_thread_per_layer(job: Job, columns: int) -> Iterator[int]:
    """Inside, torch uses one thread on a CPU; gives how many layers to quantize at once, by threads and memory."""
    threads = torch.get_num_threads()
    if job.denoiser.device.type != "cpu":
        yield 1
        return
    fitting = int(job.config.hessian_memory_gb * 1e9 / (MATRICES_PER_LAYER * 4 * columns**2))
    torch.set_num_threads(1)
    try:
        yield max(1, min(threads, fitting))
    finally:
        torch.set_num_threads(threads)


@contextmanager
def threads(workers: int) -> Iterator[Callable]:
    """Give a `map` that works on `workers` items at once. Ctrl-C does not wait for those in progress."""
    if workers == 1:
        yield map
        return
    pool = ThreadPool(workers)

    def results(work: Callable, items: Iterable) -> Iterator:
        remaining = pool.imap(work, items)
        while True:
            try:  # the main thread handles signals only between two waits: it must not wait for a layer to end
                yield remaining.next(timeout=0.5)
            except NotYet:
                continue
            except StopIteration:
                return

    try:
        yield results
    finally:
        pool.terminate()


def layer_task(
    job: Job,
    solver: SolverConfig,
    shared_codebooks: dict[str, SharedCodebooks],
    layer: Layer,
    hessian: Tensor,
    held_out: Tensor | None,
) -> Task:
    """Return a layer as the solver takes it. Raises RunError that names it."""
    weight = matrix_of(job.denoiser.get_submodule(layer.name), layer.spec.group_channels)
    weight = weight.to(job.denoiser.device).float()
    generator, books = layer_generator(job.config.seed, layer.name), shared_codebooks.get(layer.spec.shared_codebooks)
    try:
        return Task(weight, hessian, solver.with_spec(layer.spec), generator, held_out, books)
    except ValueError as error:
        raise RunError(f"layer {layer.name}: {error}") from None


def save_layer(job: Job, layer: Layer, code: AdditiveCode, report: LayerReport) -> dict:
    """Save a quantized layer, log one line about it, and return its row of the table."""
    row = layer_row(layer, report.to_dict())
    job.folder.save_layer(layer, code, row)
    if job.ranks.main:
        log_layer(job, row)
    job.on_save(job.folder.layer_path(layer.name))
    return row


def log_layer(job: Job, row: dict) -> None:
    """Log a quantized layer: a row of the table, numbers for the tracker, and a line."""
    JsonLines(job.folder.beside("layers.jsonl")).write(row)
    job.tracker.log({f"layer/{key}": value for key, value in row.items() if key not in ("rows", "columns")})
    log_info(layer_line(row))


def layer_row(layer: Layer, report: dict) -> dict:
    """Return a row of `layers.jsonl`."""
    about = {
        "name": layer.name,
        "block": layer.block,
        "kind": layer.kind,
        "rows": layer.rows,
        "columns": layer.columns,
    }
    return about | report
