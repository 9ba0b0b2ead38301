"""One block: record the Hessians of its layers on the student so far, solve the layers, keep each result."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.pool import ThreadPool

import torch
from torch import Tensor

from vqdm.additive.code import AdditiveCode, SharedCodebooks
from vqdm.additive.config import SolverConfig
from vqdm.additive.solve import LayerReport, Task, solve_layers
from vqdm.diffusion.blocks import Layer, matrix_of
from vqdm.diffusion.hessians import passes
from vqdm.diffusion.trajectories import Trajectories
from vqdm.errors import RunError
from vqdm.parallel import shares
from vqdm.quantization.plan import layer_line
from vqdm.quantization.quantization_job import Job, on_save
from vqdm.quantization.recording import Recorder
from vqdm.storage.hessian_store import HessianStore
from vqdm.storage.run_folder import SolvedLayer, layer_generator, wait_for_file
from vqdm.tracking import JsonLines, log_info, progress_bar

MATRICES_A_LAYER = 6  # square matrices of a layer's size that its solution holds at once
WEIGHTS_A_LAYER = 16  # matrices of its weight's size, codes and all
ROWS_A_BATCH = 2**15  # of layers that are solved together; more would not make a GPU busier


def solve_block(
    job: Job, layers: list[Layer], todo: list[Layer], trajectories: Trajectories | None
) -> dict[str, SolvedLayer]:
    """Solve a block's unsolved layers, spread over the ranks; each batch's results are on disk before the next begins.

    Their Hessians are the stored ones of the full-precision model where the job has them, else those of the student
    so far on `trajectories`. These are kept on disk, so that an interrupted run does not record them again.
    """
    solved = {}
    parts = stored_hessians(job, todo) if trajectories is None else student_hessians(job, layers, todo, trajectories)
    with progress_bar(total=len(todo), description="layers") as progress:
        for store, groups in parts:
            with job.clock("solving"):
                solved |= solve_groups(job, store, groups, progress.update)
    return solved


def stored_hessians(job: Job, todo: list[Layer]) -> Iterator[tuple[HessianStore, list[list[Layer]]]]:
    """(store, layers by input) of the job's store, as many as fit into memory."""
    for groups in passes(job.store.groups(todo), job.config.hessian_memory_gb):
        yield job.store, groups


def student_hessians(
    job: Job, layers: list[Layer], todo: list[Layer], trajectories: Trajectories
) -> Iterator[tuple[HessianStore, list[list[Layer]]]]:
    """The same, recorded with the blocks before this one already quantized, and dropped once layers are solved."""
    block, wanted = layers[0].block, {layer.name for layer in todo}
    store = HessianStore(job.folder.block_hessians(block), {"block": block})
    store.leaders = job.ranks.broadcast(store.leaders)
    recorder = Recorder(job, store, trajectories)
    groups = [[layer for layer in group if layer.name in wanted] for group in recorder.groups(layers)]
    for some in passes([group for group in groups if group], job.config.hessian_memory_gb):
        missing = [group for group in some if any(layer not in store for layer in group)]
        if missing:
            with job.clock("hessians"):
                recorder.record(missing)
        yield store, some
        job.ranks.barrier()
        store.drop(some, on_disk=job.ranks.main)


def solve_groups(
    job: Job, store: HessianStore, groups: list[list[Layer]], tick: Callable[[], None]
) -> dict[str, SolvedLayer]:
    """Solve layers together with the other ranks, and load the results of all of them."""
    layers, rows = [layer for group in groups for layer in group], []
    for layer, code, report in solve_share(job, store, layers, job.config.solver, job.banks):
        rows.append(keep(job, layer, code, report))
        tick()
    told = {row["name"] for row in rows}
    for row in (row for part in job.ranks.all_gather(rows) for row in part):
        if job.ranks.main and row["name"] not in told:
            tell(job, row)
            tick()
    return {layer.name: load_solved(job, layer) for layer in layers}


def load_solved(job: Job, layer: Layer) -> SolvedLayer:
    """A layer that some rank has solved."""
    wait_for_file(job.folder.layer_path(layer.name))
    return job.folder.load_layer(layer)


def solve_share(
    job: Job, store: HessianStore, layers: list[Layer], solver: SolverConfig, banks: dict[str, SharedCodebooks]
) -> Iterator[tuple[Layer, AdditiveCode, LayerReport]]:
    """Yield this rank's share of the solutions, the costliest first; other ranks have the others.

    On a CPU several layers are worked on at once, one thread each. The codes depend neither on that nor on the ranks.
    On a GPU layers of one shape are solved together, on which the codes depend only up to rounding.
    """
    own = [layers[index] for index in shares([cost(layer) for layer in layers], job.ranks.world)[job.ranks.rank]]
    if not own:
        return
    found = {group[0].name: store.load(group[0], job.unet.device) for group in store.groups(own)}
    hessians = {layer.name: found[group[0].name] for group in store.groups(own) for layer in group}
    together = batches(own, batch_memory(job.unet.device) if solver.encoder == "ldl" else 0)
    with one_thread_a_layer(job, max(layer.columns for layer in own)) as workers, threads(workers) as mapped:
        solutions = mapped(lambda some: solve_batch(job, solver, banks, some, hessians), together)
        for some, solved in zip(together, solutions, strict=True):
            for layer, solution in zip(some, solved, strict=True):
                yield layer, *solution


def batch_memory(device: torch.device) -> int:
    """Bytes for layers solved together: half of what a GPU has free; 0 on a CPU, which a single layer keeps busy."""
    if device.type != "cuda":
        return 0
    kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # free, though torch holds them
    return (torch.cuda.mem_get_info(device)[0] + kept) // 2


def batches(layers: list[Layer], memory: int) -> list[list[Layer]]:
    """Layers of one shape and format, as many as fit into `memory` bytes; without any, each by itself in its place."""
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
    """How many layers of a shape to solve together, at least one."""
    each = 4 * (MATRICES_A_LAYER * columns**2 + WEIGHTS_A_LAYER * rows * columns)
    return max(1, min(ROWS_A_BATCH // rows, memory // each))


def cost(layer: Layer) -> float:
    """What a layer takes to solve, in units of its own: searches with H, and its factorization."""
    return layer.rows * layer.columns**2 + layer.columns**3


@contextmanager
def one_thread_a_layer(job: Job, columns: int) -> Iterator[int]:
    """Inside, torch uses one thread on a CPU; gives how many layers to solve at once, as threads and memory allow."""
    threads = torch.get_num_threads()
    if job.unet.device.type != "cpu":
        yield 1
        return
    fitting = int(job.config.hessian_memory_gb * 1e9 / (MATRICES_A_LAYER * 4 * columns**2))
    torch.set_num_threads(1)
    try:
        yield max(1, min(threads, fitting))
    finally:
        torch.set_num_threads(threads)


@contextmanager
def threads(workers: int) -> Iterator[Callable]:
    """A `map` that works on so many items at once. Ctrl-C does not wait for those that are under way."""
    if workers == 1:
        yield map
        return
    pool = ThreadPool(workers)
    try:
        yield pool.imap
    finally:
        pool.terminate()


def solve_batch(
    job: Job,
    solver: SolverConfig,
    banks: dict[str, SharedCodebooks],
    layers: list[Layer],
    hessians: dict[str, tuple[Tensor, Tensor | None]],
) -> list[tuple[AdditiveCode, LayerReport]]:
    """Codes and reports of layers of one shape and format."""
    return solve_layers([layer_task(job, solver, banks, layer, *hessians[layer.name]) for layer in layers])


def layer_task(
    job: Job,
    solver: SolverConfig,
    banks: dict[str, SharedCodebooks],
    layer: Layer,
    hessian: Tensor,
    unseen: Tensor | None,
) -> Task:
    """A layer to solve. Raises RunError that names it."""
    weight = matrix_of(job.unet.get_submodule(layer.name), layer.spec.group_channels).float()
    generator, bank = layer_generator(job.config.seed, layer.name), banks.get(layer.spec.shared_codebooks)
    try:
        return Task(weight, hessian, solver.with_spec(layer.spec), generator, unseen, bank)
    except ValueError as error:
        raise RunError(f"layer {layer.name}: {error}") from None


def keep(job: Job, layer: Layer, code: AdditiveCode, report: LayerReport) -> dict:
    """Save a solved layer, say one line about it, and return its row of the table."""
    row = layer_row(layer, report.to_dict())
    job.folder.save_layer(layer, code, row)
    if job.ranks.main:
        tell(job, row)
    on_save(job.config.on_save, job.folder.layer_path(layer.name))
    return row


def tell(job: Job, row: dict) -> None:
    """A solved layer's line: in the table, for the tracker, and on the screen."""
    JsonLines(job.folder.path / "layers.jsonl").write(row)
    job.tracker.log({f"layer/{key}": value for key, value in row.items() if key not in ("rows", "columns")})
    log_info(layer_line(row))


def layer_row(layer: Layer, report: dict) -> dict:
    """A line of `layers.jsonl`."""
    about = {
        "name": layer.name,
        "block": layer.block,
        "kind": layer.kind,
        "rows": layer.rows,
        "columns": layer.columns,
    }
    return about | report
