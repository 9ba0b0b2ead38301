"""Second moments of layer inputs, H = E[x xᵀ] (VQDM, arXiv 2409.00492, §3; "Hessian" as in GPTQ, arXiv 2210.17323).

Every token of a Linear and every output position of a Conv2d is one sample; both guidance branches count.

The result is the same to the last bit on any number of processes, and within rounding for any batch size. A point's
samples are drawn with a generator of its own, in whichever batch it is. And sums cannot depend on their order, because
they are exact: every product is rounded to a multiple of a power of two, the layer's grid, and float64 adds whole
numbers below 2^53 without error. The grid comes from one call that every process makes; should a sum outgrow it, it is
recorded on a coarser one.

Letters: I inputs of the layer seen as a matrix, N samples, C channels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vqdm.diffusion.blocks import Layer
from vqdm.errors import RunError
from vqdm.parallel import Ranks

SAMPLES_AT_ONCE = 2**25
ROWS_AT_ONCE = 4096  # of a product, so that no second matrix of its size is needed
FINENESS = 2.0**-20  # the grid, over the largest mean square of an input; leaves room for 2^32 samples as large
COARSER = 2.0**12
EXACT_BELOW = 2.0**52  # half of what float64 counts to, for what rounding adds


@dataclass(frozen=True)
class UnetCall:
    """A function that makes the keyword arguments of a UNet call.

    Attributes:
        points: numbers of the points it is called on, which are the same whatever the batch size.
    """

    make: Callable[[], dict]
    points: Sequence[int]

    def __call__(self) -> dict:
        return self.make()


class Moment:
    """A second moment: the sum of x xᵀ [I, I] in multiples of `grid`, and the number of samples.

    Args:
        grid: a power of two.

    Attributes:
        share: the part of all samples that is counted, drawn for every point with its own generator.
    """

    def __init__(self, size: int, device: torch.device, grid: float = 2.0**-20):
        self.total = torch.zeros(size, size, device=device, dtype=torch.float64)
        self.count, self.grid, self.share = 0, grid, 1.0
        self.start(0)

    def start(self, *points: int) -> None:
        """What is added from here on belongs to the points of these numbers, in this order in every branch."""
        self.points = points

    def drawn(self, images: int, each: int) -> Tensor:
        """Which rows of a call's inputs are counted, sorted: a share of every point's, at least one.

        Args:
            images: A·B inputs of A branches and B points, branches outermost.
            each: L samples of an input.
        """
        if self.share >= 1:
            return torch.arange(images * each)
        points, rows = len(self.points), []
        kept = max(1, round(self.share * images * each / points))
        for place, point in enumerate(self.points):
            generator = torch.Generator().manual_seed(len(self.total) + (point << 32))
            chosen = torch.randperm(images // points * each, generator=generator)[:kept]  # of A·L
            rows.append((chosen // each * points + place) * each + chosen % each)
        return torch.cat(rows).sort().values

    def add(self, samples: Tensor) -> None:
        """Count `samples` [N, I] in."""
        for start in range(0, len(self.total), ROWS_AT_ONCE):
            rows = slice(start, start + ROWS_AT_ONCE)
            product = samples[:, rows].T @ samples  # [rows, I]
            self.total[rows] += product.double().div_(self.grid).round_()
        self.count += len(samples)

    @property
    def exact(self) -> bool:
        """Whether no addition was rounded: sums of squares only grow, and bound all other entries."""
        return not self.total.diagonal().max() >= EXACT_BELOW

    def mean(self) -> Tensor | None:
        """H [I, I] in float32, or None when nothing was counted."""
        if not self.count:
            return None
        return torch.mul(self.total, self.grid / self.count, out=torch.empty_like(self.total, dtype=torch.float32))


def input_rows(module: nn.Linear | nn.Conv2d, x: Tensor, group_channels: bool) -> Tensor:
    """The layer's input as float32 samples [N, I], columns in the order of `blocks.matrix_of`."""
    if isinstance(module, nn.Linear):
        return x.reshape(-1, x.shape[-1]).float()
    x = _padded(module, x.float())
    columns = F.unfold(x, module.kernel_size, module.dilation, 0, module.stride)  # [B, C·taps, L]
    if group_channels:
        taps = module.kernel_size[0] * module.kernel_size[1]
        columns = columns.unflatten(1, (-1, taps)).transpose(1, 2).flatten(1, 2)  # [B, C, taps, L] → [B, taps·C, L]
    return columns.transpose(1, 2).flatten(0, 1)  # [B·L, I]


def _padded(module: nn.Conv2d, x: Tensor) -> Tensor:
    if module.padding == "valid":
        return x
    sides = module._reversed_padding_repeated_twice
    return F.pad(x, sides, mode="constant" if module.padding_mode == "zeros" else module.padding_mode)


def add_input(moment: Moment, module: nn.Module, x: Tensor, group_channels: bool) -> None:
    """Count a layer's input in, or its share, a few images at a time so that no unfolded copy grows beyond bounds."""
    linear, done = isinstance(module, nn.Linear), 0
    positions = 1 if linear else x.shape[-2] * x.shape[-1] * len(moment.total)
    for part in x.split(len(x) if linear else max(1, SAMPLES_AT_ONCE // positions)):
        rows = input_rows(module, part, group_channels)  # [b·L, I]
        if moment.share < 1:
            each = len(rows) // len(part)
            counted = moment.drawn(len(x), each) - done * each
            rows = rows[counted[(counted >= 0) & (counted < len(rows))].to(rows.device)]
        done += len(part)
        moment.add(rows)


def sample_count(module: nn.Linear | nn.Conv2d, x: Tensor) -> int:
    """How many samples a layer's input holds: tokens, or about as many output positions as the stride leaves."""
    if isinstance(module, nn.Linear):
        return x.numel() // x.shape[-1]
    return max(1, x.numel() // x.shape[1] // (module.stride[0] * module.stride[1]))


def geometry(module: nn.Linear | nn.Conv2d, group_channels: bool) -> tuple:
    """What, besides the tensor itself, decides a layer's samples: layers equal in both share one Hessian."""
    if isinstance(module, nn.Linear):
        return ("linear",)
    taps = (module.kernel_size, module.stride, module.padding, module.dilation, module.padding_mode)
    return ("conv", group_channels, *taps)


@contextmanager
def input_hooks(unet: nn.Module, names: list[str], seen: Callable[[str, nn.Module, Tensor], None]):
    """Call `seen(name, module, input)` whenever a named layer runs; no hook is left, however one leaves."""
    handles = []
    try:
        for name in names:
            module = unet.get_submodule(name)
            handles.append(module.register_forward_pre_hook(lambda m, args, name=name: seen(name, m, args[0])))
        yield
    finally:
        for handle in handles:
            handle.remove()


class _BlockDone(Exception):
    pass


@contextmanager
def stopping_after(unet: nn.Module, block: str):
    """Inside, `run(call)` runs the UNet up to the end of `block` only; "stem" and "head" run it whole."""

    def stop(*_):
        raise _BlockDone

    handle = None if block in ("stem", "head") else unet.get_submodule(block).register_forward_hook(stop)

    @torch.no_grad()
    def run(call: dict) -> None:
        with suppress(_BlockDone):
            unet(**call)

    try:
        yield run
    finally:
        if handle:
            handle.remove()


def shared_inputs(unet: nn.Module, layers: list[Layer], call: dict) -> list[list[Layer]]:
    """Group layers by the input they see in one UNet call; groups and members keep the order of `layers`.

    Inputs are kept alive during the call, so that an address never stands for two tensors.
    """
    by_name, groups, alive = {layer.name: layer for layer in layers}, {}, []

    def seen(name: str, module: nn.Module, x: Tensor) -> None:
        alive.append(x)
        key = (x.data_ptr(), tuple(x.shape), x.stride(), geometry(module, by_name[name].spec.group_channels))
        groups.setdefault(key, []).append(name)

    with stopping_after(unet, layers[-1].block) as run, input_hooks(unet, list(by_name), seen):
        run(call)
    place = {layer.name: index for index, layer in enumerate(layers)}
    reached = {name for names in groups.values() for name in names}
    missing = [name for name in by_name if name not in reached]
    if missing:
        raise RunError(f"layer {missing[0]} does not run when the UNet samples; leave it out with --layer_filter")
    ordered = [sorted(set(names), key=place.get) for names in groups.values()]
    return [[by_name[name] for name in names] for names in sorted(ordered, key=lambda names: place[names[0]])]


def passes(groups: list[list[Layer]], memory_gb: float) -> list[list[list[Layer]]]:
    """Split groups into runs whose Hessians (a sum in float64 and a result in float32) fit into `memory_gb`."""
    out, used = [], float("inf")
    for group in groups:
        need = (8 + 4) * group[0].columns ** 2 / 1e9
        if used + need > memory_gb:
            out.append([])
            used = 0.0
        out[-1].append(group)
        used += need
    return out


def record_hessians(
    unet: nn.Module,
    groups: list[list[Layer]],
    first: dict,
    training: list[Callable[[], dict]],
    held_out: list[Callable[[], dict]],
    samples_per_input: int = 0,
    tick: Callable[[], None] = lambda: None,
    ranks: Ranks | None = None,
) -> dict[str, tuple[Tensor, Tensor | None]]:
    """Run the UNet on recorded batches and return, for the first layer of each group, H [I, I] and a held-out H.

    Args:
        groups: layers that share an input, as `shared_inputs` finds them.
        first: keyword arguments of a UNet call that shows how large inputs are; every rank makes it.
        training, held_out: functions that make the keyword arguments of one UNet call each, `UnetCall`s where samples
            are drawn; another one counts as a single point. Ranks share the calls, and have the same result.
        samples_per_input: about this many samples are counted for every input of a layer, spread over all points;
            a second moment needs a small multiple of its size. 0 counts all.
        tick: called after every batch of this rank.

    Raises:
        RunError: an input holds NaN or infinity; names the first layer that saw it.
    """
    ranks = ranks or Ranks()
    leaders = [group[0] for group in groups]
    grids = first_grids(unet, leaders, first)
    found = []
    for calls in (training, held_out):
        found.append({})
        left = leaders if calls else []
        while left:
            moments = record_moments(unet, left, grids, calls, samples_per_input, tick, ranks)
            exact = [name for name, moment in moments.items() if moment.exact]
            found[-1] |= {name: moments.pop(name).mean() for name in exact}
            left = [layer for layer in left if layer.name not in found[-1]]
            grids |= {layer.name: COARSER * grids[layer.name] for layer in left}
    return {layer.name: (found[0][layer.name], found[1].get(layer.name)) for layer in leaders}


def first_grids(unet: nn.Module, leaders: list[Layer], call: dict) -> dict[str, float]:
    """By layer name, a grid that suits the inputs that it sees in one UNet call.

    Raises:
        RunError: as `record_hessians`.
    """
    squares, by_name = {}, {layer.name: layer for layer in leaders}

    def seen(name: str, module: nn.Module, x: Tensor) -> None:
        rows = input_rows(module, x, by_name[name].spec.group_channels)
        squares[name] = rows.square().mean(0).max().item()
        if not math.isfinite(squares[name]):
            raise _not_finite(name)

    with stopping_after(unet, leaders[-1].block) as run, input_hooks(unet, list(by_name), seen):
        run(call)
    return {name: FINENESS * 2.0 ** _exponent(square) for name, square in squares.items()}


def _exponent(square: float) -> int:
    return math.frexp(square)[1] if 0 < square < math.inf else 0


def record_moments(
    unet: nn.Module,
    leaders: list[Layer],
    grids: dict[str, float],
    calls: list[Callable[[], dict]],
    samples_per_input: int,
    tick: Callable[[], None],
    ranks: Ranks,
) -> dict[str, Moment]:
    """By layer name, the moment over the calls of all ranks. Raises RunError as `record_hessians`."""
    by_name, device = {layer.name: layer for layer in leaders}, next(unet.parameters()).device
    moments = {name: Moment(layer.columns, device, grids[name]) for name, layer in by_name.items()}
    points = [getattr(call, "points", (index,)) for index, call in enumerate(calls)]
    wanted = samples_per_input / sum(map(len, points))

    def seen(name: str, module: nn.Module, x: Tensor) -> None:
        if wanted:
            samples = sample_count(module, x) / len(moments[name].points)
            moments[name].share = wanted * by_name[name].columns / samples
        add_input(moments[name], module, x, by_name[name].spec.group_channels)

    with stopping_after(unet, leaders[-1].block) as run, input_hooks(unet, list(by_name), seen):
        for batch in ranks.shard(range(len(calls))):
            for moment in moments.values():
                moment.start(*points[batch])
            run(calls[batch]())
            _check_finite(moments)  # now rather than after a pass that takes hours
            tick()
    add_up(moments, ranks)
    _check_finite(moments)
    return moments


def add_up(moments: dict[str, Moment], ranks: Ranks) -> None:
    """Replace the moments of every rank by their sums over all ranks."""
    counts = ranks.all_gather({name: moment.count for name, moment in moments.items()})
    for name, moment in moments.items():
        ranks.all_reduce(moment.total)
        moment.count = sum(part[name] for part in counts)


def _check_finite(moments: dict[str, Moment]) -> None:
    finite = torch.stack([moment.total.diagonal().isfinite().all() for moment in moments.values()])
    for name, sound in zip(moments, finite.tolist(), strict=True):  # one transfer from the GPU for all layers
        if not sound:
            raise _not_finite(name)


def _not_finite(name: str) -> RunError:
    return RunError(f"layer {name}: its inputs hold NaN or infinity; use --dtype bfloat16 or float32")
