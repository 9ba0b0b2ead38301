"""One block: record the Hessians of its layers on the student so far, solve the layers, keep each result."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import torch
from torch import Tensor

from vqdm.additive.code import AdditiveCode, Bank
from vqdm.additive.config import SolverConfig
from vqdm.additive.solve import LayerReport, solve_layer
from vqdm.diffusion.blocks import Layer, matrix_of
from vqdm.diffusion.hessians import passes, record_hessians, shared_inputs
from vqdm.diffusion.trajectories import Trajectories, held_out, spread_points
from vqdm.errors import RunError
from vqdm.jobs.job import Job, on_save
from vqdm.jobs.plan import layer_line
from vqdm.jobs.recording import unet_calls
from vqdm.layers.quantized import decoded_once
from vqdm.storage.runs import SolvedLayer, layer_generator
from vqdm.tracking import JsonLines, bar, say

MATRICES_A_LAYER = 6  # square matrices of a layer's size that its solution holds at once


def solve_block(
    job: Job, layers: list[Layer], todo: list[Layer], trajectories: Trajectories | None
) -> dict[str, SolvedLayer]:
    """Solve a block's unsolved layers; each result is on disk before the next begins.

    Their Hessians are the stored ones of the full-precision model where the job has them, else those of the student
    so far on `trajectories`.
    """
    solved = {}
    parts = stored_hessians(job, todo) if trajectories is None else student_hessians(job, layers, todo, trajectories)
    with bar(total=len(todo), what="layers") as progress:
        for groups, hessians in parts:
            with job.clock("solving"):
                for layer, (code, report) in solve_layers(job, groups, hessians, job.config.solver, job.banks):
                    solved[layer.name] = keep(job, layer, code, report)
                    progress.update()
    return solved


def stored_hessians(job: Job, todo: list[Layer]) -> Iterator[tuple[list[list[Layer]], dict]]:
    """(layers by input, Hessians by the first layer of each) of the job's store, as many as fit into memory."""
    for groups in passes(job.store.groups(todo), job.config.hessian_memory_gb):
        yield groups, {group[0].name: job.store.load(group[0], job.unet.device) for group in groups}


def student_hessians(
    job: Job, layers: list[Layer], todo: list[Layer], trajectories: Trajectories
) -> Iterator[tuple[list[list[Layer]], dict]]:
    """The same, recorded with the blocks before this one already quantized."""
    points = held_out(spread_points(trajectories, job.config.calibration_nsteps))
    training, apart = (unet_calls(job, trajectories, part) for part in points)
    wanted = {layer.name for layer in todo}
    groups = shared_inputs(job.unet, layers, unet_calls(job, trajectories, points[0][:1])[0]())
    groups = [[layer for layer in group if layer.name in wanted] for group in groups]
    for some in passes([group for group in groups if group], job.config.hessian_memory_gb):
        with (
            job.clock("hessians"),
            decoded_once(job.unet),
            bar(total=len(training) + len(apart), what="Hessians") as ticks,
        ):
            hessians = record_hessians(
                job.unet, some, training, apart, job.config.hessian_samples_per_input, ticks.update
            )
        yield some, hessians


def solve_layers(
    job: Job, groups: list[list[Layer]], hessians: dict, solver: SolverConfig, banks: dict[str, Bank]
) -> Iterator[tuple[Layer, tuple]]:
    """Yield (layer, (code, report)) in order; on a CPU several layers are worked on at once, one thread each.

    The codes do not depend on how many.
    """
    tasks = [(layer, *hessians[group[0].name]) for group in groups for layer in group]
    with one_thread_a_layer(job, max(layer.columns for layer, *_ in tasks)) as workers:
        pool = ThreadPoolExecutor(workers)
        try:
            results = [pool.submit(solve_one, job, solver, banks, *task) for task in tasks]
            for (layer, *_), result in zip(tasks, results, strict=True):
                yield layer, result.result()
        finally:
            pool.shutdown(cancel_futures=True)


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


def solve_one(
    job: Job, solver: SolverConfig, banks: dict[str, Bank], layer: Layer, hessian: Tensor, unseen: Tensor | None
) -> tuple[AdditiveCode, LayerReport]:
    """A layer's code and report. Raises RunError that names the layer."""
    weight = matrix_of(job.unet.get_submodule(layer.name), layer.spec.group_channels).float()
    generator, bank = layer_generator(job.config.seed, layer.name), banks.get(layer.spec.shared_codebooks)
    try:
        return solve_layer(weight, hessian, solver.with_spec(layer.spec), generator, unseen, bank)
    except ValueError as error:
        raise RunError(f"layer {layer.name}: {error}") from None


def keep(job: Job, layer: Layer, code: AdditiveCode, report: LayerReport) -> SolvedLayer:
    """Save a solved layer, and say one line about it."""
    row = layer_row(layer, report.to_dict())
    job.folder.save_layer(layer, code, row)
    JsonLines(job.folder.path / "layers.jsonl").write(row)
    job.tracker.log({f"layer/{key}": value for key, value in row.items() if key not in ("rows", "columns")})
    say(layer_line(row))
    on_save(job.config.on_save, job.folder.layer_path(layer.name))
    return SolvedLayer(code.pack(), layer.spec, row)


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
