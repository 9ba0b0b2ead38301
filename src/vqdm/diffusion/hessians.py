"""Hessians of layers: second moments of their inputs, H = E[x xᵀ] (VQDM, arXiv 2409.00492, §3; GPTQ, arXiv 2210.17323).

Every token of a Linear and every output position of a Conv2d is one sample; both guidance branches count.

The result is the same to the last bit on any number of processes, and within rounding for any batch size. A point's
samples are chosen with a generator of its own, in whichever batch it is. And sums cannot depend on their order, because
they are exact: every product is rounded to a multiple of a power of two, the layer's grid, and float64 adds whole
numbers below 2^53 without error. The grid comes from one call that every process makes; a sum that outgrows it is
recorded again on a coarser one.

Letters: I inputs of the layer seen as a matrix, N samples, A guidance branches, B points of a batch, L samples per
image (tokens, or output positions), C channels.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vqdm.config import differences
from vqdm.devices import BatchSize, unless_out_of_memory
from vqdm.diffusion.blocks import Layer
from vqdm.errors import RunError, UserError
from vqdm.parallel import Ranks
from vqdm.storage.files import CorruptFileError, load_checked, load_checked_json, save_checked, save_checked_json

if TYPE_CHECKING:
    from vqdm.diffusion.streams import BlockWalk

VALUES_PER_PRODUCT = 2**25  # of the samples [N, I] that are multiplied at once
ROWS_PER_PRODUCT = 1024  # of H: only its upper triangle is computed, in strips of so many rows
FINENESS = 2.0**-20  # the grid, over the largest mean square of an input; leaves room for 2^32 samples as large
COARSER = 2.0**12
EXACT_BELOW = 2.0**52  # half of what float64 counts to, for what rounding adds
MOST_BRANCHES = 2  # samples of a call on one point
LEAST_EXPONENT = -100  # of a mean square: the grid is a normal number in float32


@dataclass(frozen=True)
class DenoiserCall:
    """Makes the keyword arguments of a denoiser's call.

    Attributes:
        make: makes them for some of the points.
        batch: the points it is called on.
        points: their numbers, the same for every batch size.
        base: numbers of the recorded points that they are made of; None where they are these themselves.
    """

    make: Callable[[Sequence], dict]
    batch: Sequence
    points: Sequence[int]
    base: Sequence[int] | None = None

    @classmethod
    def of(cls, index: int, call: Callable[[], dict]) -> DenoiserCall:
        """Return a call itself, or one of a plain function, on the point `index` alone."""
        return call if isinstance(call, DenoiserCall) else cls(lambda _: call(), (index,), (index,))

    def __call__(self) -> dict:
        return self.make(self.batch)

    def divided(self, size: int) -> Iterator[DenoiserCall]:
        """Yield calls on at most `size` of the points each."""
        for start in range(0, len(self.points), size):
            some = slice(start, start + size)
            base = self.base and self.base[some]
            yield replace(self, batch=self.batch[some], points=self.points[some], base=base)

    @property
    def recorded(self) -> Sequence[int]:
        """The numbers of recorded points that it is made of."""
        return self.base or self.points


class HessianAccumulator:
    """The sum of x xᵀ [I, I] in multiples of a grid, and the number of samples.

    Args:
        grid: a power of two.

    Attributes:
        total: [I, I] in float64, of which the upper triangle counts.
    """

    def __init__(self, size: int, device: torch.device, grid: float = 2.0**-20):
        self.total = torch.zeros(size, size, device=device, dtype=torch.float64)
        self.count, self.grid = 0, grid

    def add(self, inputs: InputRows, points: tuple[int, ...] = (0,), share: float = 1.0) -> None:
        """Accumulate a batch's samples, or a share of every point's; as many at once as memory allows."""
        step = max(1, VALUES_PER_PRODUCT // len(self.total))
        if share >= 1:
            parts = [slice(start, min(start + step, inputs.count)) for start in range(0, inputs.count, step)]
        else:
            images = inputs.count // inputs.each
            points = points if images % len(points) == 0 else points[:1]  # an input that all points share
            parts = sampled_rows(len(self.total), points, images, inputs.each, share).split(step)
        for part in parts:
            samples = inputs.rows(part)  # [N, I]
            self.count += len(samples)
            for start in range(0, len(self.total), ROWS_PER_PRODUCT):
                strip = slice(start, start + ROWS_PER_PRODUCT)
                product = samples[:, strip].T @ samples[:, start:]  # [rows, I - start]
                self.total[strip, start:] += product.div_(self.grid).round_()

    def all_reduce(self, ranks: Ranks) -> None:
        """Replace sum and count by those over all ranks; all must call it."""
        ranks.all_reduce(self.total)
        self.count = sum(ranks.all_gather(self.count))

    @property
    def exact(self) -> bool:
        """Whether no addition was rounded: sums of squares only grow, and bound all other entries."""
        return not self.total.diagonal().max() >= EXACT_BELOW

    def mean(self) -> Tensor | None:
        """H [I, I] in float32, or None when there is no sample."""
        if not self.count:
            return None
        mean = torch.mul(self.total, self.grid / self.count, out=torch.empty_like(self.total, dtype=torch.float32))
        for start in range(0, len(mean), ROWS_PER_PRODUCT):  # mirror the upper triangle
            stop = start + ROWS_PER_PRODUCT
            mean[start:stop, start:stop] = mean[start:stop, start:stop].triu() + mean[start:stop, start:stop].triu(1).T
            mean[stop:, start:stop] = mean[start:stop, stop:].T
        return mean


@lru_cache(maxsize=64)
def sampled_rows(size: int, points: tuple[int, ...], images: int, each: int, share: float) -> Tensor:
    """Choose which of the A·B·L samples of a batch count: a share of every point's, at least one; sorted.

    Args:
        size: I, on which the choice depends: layers of one width and resolution share it.
        points: numbers of the B points; branches are outermost in the batch.
        images: A·B.
        each: L.
    """
    rows = []
    kept = max(1, round(share * images * each / len(points)))
    for place, point in enumerate(points):
        generator = torch.Generator().manual_seed(size + (point << 32))
        chosen = torch.randperm(images // len(points) * each, generator=generator)[:kept]  # of A·L
        rows.append((chosen // each * len(points) + place) * each + chosen % each)
    return torch.cat(rows).sort().values


class InputRows:
    """A layer's input as float32 samples, columns in the order of `blocks.matrix_of`; only those asked for are made.

    Attributes:
        each: L.
        count: A·B·L.
    """

    def __init__(self, module: nn.Linear | nn.Conv2d, x: Tensor, group_channels: bool):
        self.module, self.channels_last = module, group_channels
        if isinstance(module, nn.Linear):
            self.x = x.reshape(-1, x.shape[-1])
            self.count = len(self.x)
        else:
            x = _padded(module, x)
            spans = [d * (k - 1) for d, k in zip(module.dilation, module.kernel_size, strict=True)]
            sizes = zip(x.shape[-2:], spans, module.stride, strict=True)
            self.height, self.width = ((size - span - 1) // stride + 1 for size, span, stride in sizes)
            self.x, self.count = x.permute(0, 2, 3, 1).contiguous(), len(x) * self.height * self.width  # [A·B, H, W, C]
        self.each = self.count // len(x)

    def rows(self, chosen: Tensor | slice) -> Tensor:
        """The samples [N, I] of the given numbers."""
        if isinstance(self.module, nn.Linear):
            return self.x[chosen].float()
        if isinstance(chosen, slice):
            chosen = torch.arange(self.count)[chosen]
        (sh, sw), (dh, dw), (kh, kw) = self.module.stride, self.module.dilation, self.module.kernel_size
        _, H, W, C = self.x.shape
        corner = chosen // self.each * H + chosen % self.each // self.width * sh  # rows of [A·B·H]
        corner = corner * W + chosen % self.width * sw
        taps = (torch.arange(kh)[:, None] * dh * W + torch.arange(kw) * dw).flatten()  # [kh·kw]
        places = (corner[:, None] + taps).flatten().to(self.x.device)
        found = self.x.view(-1, C)[places].float().view(len(chosen), kh * kw, C)
        return (found if self.channels_last else found.transpose(1, 2)).flatten(1)

    def mean_square(self) -> float:
        """The largest mean square of a column over all samples."""
        if isinstance(self.module, nn.Linear):
            return self.x.float().square().mean(0).max().item()
        (sh, sw), (dh, dw), (kh, kw) = self.module.stride, self.module.dilation, self.module.kernel_size
        squares = self.x.float().square()
        taps = [
            squares[:, i * dh :: sh, j * dw :: sw][:, : self.height, : self.width].mean((0, 1, 2))  # [C]
            for i in range(kh)
            for j in range(kw)
        ]
        return torch.stack(taps).max().item()


def _padded(module: nn.Conv2d, x: Tensor) -> Tensor:
    if module.padding == "valid":
        return x
    sides = module._reversed_padding_repeated_twice
    return F.pad(x, sides, mode="constant" if module.padding_mode == "zeros" else module.padding_mode)


def geometry(module: nn.Linear | nn.Conv2d, group_channels: bool) -> tuple:
    """Return what decides a layer's samples besides the input itself: layers equal in both share one Hessian."""
    if isinstance(module, nn.Linear):
        return ("linear",)
    taps = (module.kernel_size, module.stride, module.padding, module.dilation, module.padding_mode)
    return ("conv", group_channels, *taps)


@contextmanager
def input_hooks(denoiser: nn.Module, names: list[str], seen: Callable[[str, nn.Module, Tensor], None]):
    """Call `seen(name, module, input)` whenever a named layer runs; no hook is left, also after an exception."""
    handles = []
    try:
        for name in names:
            module = denoiser.get_submodule(name)
            handles.append(module.register_forward_pre_hook(lambda m, args, name=name: seen(name, m, args[0])))
        yield
    finally:
        for handle in handles:
            handle.remove()


class _BlockDone(Exception):
    pass


@contextmanager
def stopping_after(denoiser: nn.Module, layers: list[Layer]):
    """Inside, `run(call, of)` runs the denoiser until the blocks of the layers are done; whole for "stem" and "head".

    `call` has the keyword arguments; `of` is the `DenoiserCall` that made them, which does not matter here.
    """
    blocks = {layer.block for layer in layers}
    remaining: set[str] = set()

    def done(block: str) -> None:
        remaining.discard(block)
        if not remaining:
            raise _BlockDone

    inner = [] if blocks & {"stem", "head"} else [(block, denoiser.get_submodule(block)) for block in blocks]
    handles = [module.register_forward_hook(lambda *_, block=block: done(block)) for block, module in inner]

    @torch.no_grad()
    def run(call: dict, of: DenoiserCall | None = None) -> None:
        remaining.update(blocks)
        with suppress(_BlockDone):
            denoiser(**call)

    try:
        yield run
    finally:
        for handle in handles:
            handle.remove()


def running(denoiser: nn.Module, layers: list[Layer], walk: BlockWalk | None):
    """Return the context manager that runs a denoiser until the layers' blocks are done: whole, or as a walk does."""
    return walk.running(layers) if walk else stopping_after(denoiser, layers)


def shared_inputs(
    denoiser: nn.Module, layers: list[Layer], call: dict, walk: BlockWalk | None = None
) -> list[list[Layer]]:
    """Group layers by the input they see in one call; groups and members keep the order of `layers`.

    Inputs are equal where their values are: every block of a transformer may make the same vector of the timestep. On
    the meta device, where tensors have no values, it is the tensor that counts, which stays alive during the call;
    inputs of one vector per sample count as equal. A `walk` has brought the call to the layers' block.
    """
    by_name, groups, alive = {layer.name: layer for layer in layers}, {}, []

    def seen(name: str, module: nn.Module, x: Tensor) -> None:
        key = (input_key(name, x, alive), tuple(x.shape), geometry(module, by_name[name].spec.group_channels))
        groups.setdefault(key, []).append(name)

    with running(denoiser, layers, walk) as run, input_hooks(denoiser, list(by_name), seen):
        run(call)
    place = {layer.name: index for index, layer in enumerate(layers)}
    reached = {name for names in groups.values() for name in names}
    missing = [name for name in by_name if name not in reached]
    if missing:
        raise RunError(f"layer {missing[0]} does not run when the denoiser samples; leave it out with --layer_filter")
    ordered = [sorted(set(names), key=place.get) for names in groups.values()]
    return [[by_name[name] for name in names] for names in sorted(ordered, key=lambda names: place[names[0]])]


def input_key(name: str, x: Tensor, alive: list[Tensor]) -> tuple:
    """Return what two inputs share only if they are equal: their sums with two sets of weights that suit no pattern.

    Inputs of zeros alone, as those of a model that is not trained yet, are equal by chance; they share nothing.
    """
    if x.device.type == "meta":
        alive.append(x)
        return ("vector",) if x.numel() <= MOST_BRANCHES * x.shape[-1] else (id(x),)
    rows = x.detach().reshape(-1, x.shape[-1]).double()  # [N, C]
    across = torch.arange(1, rows.shape[1] + 1, dtype=torch.float64, device=x.device).sqrt()
    down = torch.arange(1, len(rows) + 1, dtype=torch.float64, device=x.device).log1p()
    sums = rows.sum().item(), (down @ rows @ across).item(), (down @ rows.square() @ across).item()
    return sums if any(sums) else (name,)


def passes(groups: list[list[Layer]], memory_gb: float) -> list[list[list[Layer]]]:
    """Split groups into runs with Hessians (a sum in float64 and a result in float32) that fit into `memory_gb`."""
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
    denoiser: nn.Module,
    groups: list[list[Layer]],
    first: dict,
    training: list[Callable[[], dict]],
    held_out: list[Callable[[], dict]],
    samples_per_input: int = 0,
    tick: Callable[[], None] = lambda: None,
    ranks: Ranks | None = None,
    size: BatchSize | None = None,
    other_timesteps: list[DenoiserCall] = (),
    walk: BlockWalk | None = None,
) -> dict[str, tuple[Tensor, Tensor | None]]:
    """Run the denoiser on recorded batches and return, for the first layer of each group, H [I, I] and a held-out H.

    Args:
        groups: layers that share an input, as `shared_inputs` finds them.
        first: keyword arguments of a call that shows how large inputs are; every rank makes it.
        training, held_out: functions that make the keyword arguments of one call each; one that is no `DenoiserCall`
            counts as a single point. Ranks share the calls, and have the same result.
        samples_per_input: about this many samples count for every input of a layer, spread over all points; a second
            moment needs a small multiple of its size. 0 counts all.
        tick: called after every batch of this rank.
        size: of batches; calls on more points are divided.
        other_timesteps: calls that count, beside `training`, for layers that see one vector per sample and not one per
            token, such as modulations by the timestep. Their H has the rank of the number of timesteps: at one that
            was never recorded any error of the layer might appear.
        walk: runs the block of the layers alone, on single points; all groups are of one block then.

    Raises:
        RunError: an input holds NaN or infinity; names the first layer that saw it. Or out of memory at batch size 1.
    """
    ranks, leaders = ranks or Ranks(), [group[0] for group in groups]
    training, held_out = ([DenoiserCall.of(*one) for one in enumerate(calls)] for calls in (training, held_out))
    size = size or BatchSize(max(len(call.points) for call in (*training, *held_out)))
    grids, single = first_grids(denoiser, leaders, first, walk)
    results = []
    for calls, more in ((training, list(other_timesteps)), (held_out, [])):
        results.append({})
        left = leaders if calls else []
        while left:
            extra = (more, [layer for layer in left if layer.name in single])
            sums = accumulated(denoiser, left, grids, calls, extra, samples_per_input, tick, ranks, size, walk)
            exact = [name for name, hessian in sums.items() if hessian.exact]
            results[-1] |= {name: sums.pop(name).mean() for name in exact}  # each sum is freed in turn
            left = [layer for layer in left if layer.name not in results[-1]]
            grids |= {layer.name: COARSER * grids[layer.name] for layer in left}
    return {layer.name: (results[0][layer.name], results[1].get(layer.name)) for layer in leaders}


def accumulated(
    denoiser: nn.Module,
    leaders: list[Layer],
    grids: dict[str, float],
    calls: list[DenoiserCall],
    extra: tuple[list[DenoiserCall], list[Layer]],
    samples_per_input: int,
    tick: Callable[[], None],
    ranks: Ranks,
    size: BatchSize,
    walk: BlockWalk | None = None,
) -> dict[str, HessianAccumulator]:
    """Return by layer name the sums over the calls of all ranks. Raises RunError as `record_hessians`.

    A rank that is out of memory begins again with smaller batches: the layers before that which had no memory have
    counted the batch already. The first batch is as large as any other, so that little is lost.

    Args:
        extra: further calls, and the layers that they count for.
    """
    per_point = samples_per_input / sum(len(call.points) for call in calls)
    own, ticks = [calls[index] for index in ranks.shard(range(len(calls)))], 0

    def tick_once(count: int) -> None:
        nonlocal ticks
        if count > ticks:
            ticks = count
            tick()

    if walk:
        more = [call for call in extra[0] if walk.owns(call)]
    else:
        more = [extra[0][index] for index in ranks.shard(range(len(extra[0])))]
    extra = (more if extra[1] else [], extra[1])
    record = partial(own_sums, denoiser, leaders, grids, own, extra, per_point, tick_once, walk)
    while (found := unless_out_of_memory(record, size.value)) is None:
        size.halve(min(size.value, max((len(call.points) for call in own), default=1)))
    (sums,) = found
    for hessian in sums.values():
        hessian.all_reduce(ranks)
    _check_finite(sums)
    return sums


def own_sums(
    denoiser: nn.Module,
    leaders: list[Layer],
    grids: dict[str, float],
    calls: list[DenoiserCall],
    extra: tuple[list[DenoiserCall], list[Layer]],
    per_point: float,
    tick: Callable[[int], None],
    walk: BlockWalk | None,
    size: int,
) -> dict[str, HessianAccumulator]:
    """Return by layer name the sums over calls, on at most `size` points at once; `tick` gets the number of the done.

    Args:
        extra: further calls, and the layers that they count for.
        per_point: samples of a point for every input of a layer; 0 counts all.
    """
    device, channels = next(denoiser.parameters()).device, {one.name: one.spec.group_channels for one in leaders}
    sums = {one.name: HessianAccumulator(one.columns, device, grids[one.name]) for one in leaders}

    def seen(points: tuple[int, ...], name: str, module: nn.Module, x: Tensor) -> None:
        inputs, hessian = InputRows(module, x, channels[name]), sums[name]
        wanted = per_point * len(hessian.total) * len(points)
        hessian.add(inputs, points, wanted / inputs.count if wanted else 1.0)

    def run_part(run: Callable, part: DenoiserCall, layers: list[Layer]) -> None:
        with input_hooks(denoiser, [one.name for one in layers], partial(seen, tuple(part.points))):
            run(part(), part)

    more, layers = extra
    if more:  # before a walk goes on to the next block
        with running(denoiser, layers, walk) as run:
            for part in (part for call in more for part in call.divided(size)):
                run_part(run, part, layers)
    with running(denoiser, leaders, walk) as run:
        for count, call in enumerate(calls, start=1):
            for part in call.divided(size):
                run_part(run, part, leaders)
            _check_finite(sums)  # now rather than after a pass that takes hours
            tick(count)
    return sums


def first_grids(
    denoiser: nn.Module, leaders: list[Layer], call: dict, walk: BlockWalk | None = None
) -> tuple[dict[str, float], set[str]]:
    """Return by layer name a grid that suits the inputs of one call on one point; and who sees a vector per sample.

    Raises:
        RunError: as `record_hessians`.
    """
    grids, single, channels = {}, set(), {layer.name: layer.spec.group_channels for layer in leaders}

    def seen(name: str, module: nn.Module, x: Tensor) -> None:
        inputs = InputRows(module, x, channels[name])
        square = inputs.mean_square()
        if inputs.count <= MOST_BRANCHES:
            single.add(name)
        if not math.isfinite(square):
            raise _not_finite(name)
        grids[name] = FINENESS * 2.0 ** max(LEAST_EXPONENT, math.frexp(square)[1])

    with running(denoiser, leaders, walk) as run, input_hooks(denoiser, list(channels), seen):
        run(call)
    return grids, single


def _check_finite(sums: dict[str, HessianAccumulator]) -> None:
    finite = torch.stack([hessian.total.diagonal().isfinite().all() for hessian in sums.values()])
    for name, sound in zip(sums, finite.tolist(), strict=True):  # one transfer from the GPU for all layers
        if not sound:
            raise _not_finite(name)


def _not_finite(name: str) -> RunError:
    return RunError(f"layer {name}: its inputs hold NaN or infinity; use --dtype bfloat16 or float32")


# -------------------------------------------------------------------------------------------------------------- on disk
#
# Hessians of the full-precision model, kept for every bit width that is tried.
#
# One safetensors file per input that layers share, with the upper triangles of its Hessians, and an index with these
# layers and the model, prompts and sampling that the Hessians were computed for.


class HessianStore:
    """A folder of second moments.

    Raises:
        UserError: the folder holds Hessians of other settings, or its index is damaged.
    """

    def __init__(self, folder: Path, settings: dict):
        self.folder, self.settings = folder, settings
        self.leaders: dict[str, str] = {}  # key of a layer → name of its file
        self.index = folder / "hessians.json"
        if self.index.is_file():
            self._read_index()

    def _read_index(self) -> None:
        try:
            index = load_checked_json(self.index)
            changed = differences(index["settings"], self.settings)
            self.leaders = dict(index["layers"])
            _check_names(self.leaders)
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            raise UserError(f"{self.index} is damaged; delete it, or choose another --hessian_cache") from None
        if changed:
            raise UserError(
                f"--hessian_cache {self.folder} is of another run: {'; '.join(changed)}; choose another folder"
            )

    def __contains__(self, layer: Layer) -> bool:
        return _key(layer) in self.leaders

    def save(self, group: list[Layer], hessian: Tensor, held_out: Tensor | None) -> None:
        """Save H [I, I], and a held-out one, for layers that share an input."""
        self.write(group, hessian, held_out)
        self.enter([group])

    def write(self, group: list[Layer], hessian: Tensor, held_out: Tensor | None) -> None:
        """Write the file only; `enter` adds it to the index."""
        tensors = {"hessian": triangle(hessian)} | ({} if held_out is None else {"held_out": triangle(held_out)})
        save_checked(tensors, self._file(_key(group[0])))

    def enter(self, groups: list[list[Layer]], on_disk: bool = True) -> None:
        """Add groups of written files to the index; only one of several processes changes it on the disk."""
        self.leaders |= {_key(layer): _key(group[0]) for group in groups for layer in group}
        if on_disk:
            save_checked_json({"settings": self.settings, "layers": self.leaders}, self.index)

    def load(self, layer: Layer, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor | None]:
        """Load H and the held-out H of a layer. Raises RunError if the file is missing or damaged."""
        path = self._file(self.leaders[_key(layer)])
        try:
            tensors, _ = load_checked(path, device)
            _check_shapes(tensors, layer.columns)
            whole = {name: _whole(tensors.pop(name), layer.columns) for name in sorted(tensors)}
            return whole["hessian"], whole.get("held_out")
        except (OSError, CorruptFileError, KeyError, ValueError) as error:
            raise RunError(f"{path} is missing or damaged ({error}); delete {self.index} and run again") from None

    def drop(self, groups: list[list[Layer]], on_disk: bool = True) -> None:
        """Remove groups from the index; only one of several processes deletes their files."""
        leaders = {self.leaders.pop(_key(layer)) for group in groups for layer in group}
        if on_disk:
            self.enter([])
            for leader in leaders:
                self._file(leader).unlink(missing_ok=True)

    def groups(self, layers: list[Layer]) -> list[list[Layer]]:
        """Group `layers` by the file they share, in their order."""
        found: dict[str, list[Layer]] = {}
        for layer in layers:
            found.setdefault(self.leaders[_key(layer)], []).append(layer)
        return list(found.values())

    def _file(self, leader: str) -> Path:
        return self.folder / f"{leader}.safetensors"


def _check_names(leaders: dict) -> None:
    """Raise ValueError unless layers and the files that they share are named like layers, so inside the folder."""
    for name in (*leaders, *leaders.values()):
        if not isinstance(name, str) or not re.fullmatch(r"[\w.]+", name):
            raise ValueError(name)


def triangle(matrix: Tensor) -> Tensor:
    """Return the upper triangle of a symmetric matrix [I, I], row by row: [I·(I + 1)/2]."""
    return torch.cat([row[index:] for index, row in enumerate(matrix)])


def symmetric(values: Tensor, size: int) -> Tensor:
    """Invert `triangle`, exactly: the matrix [size, size]."""
    matrix, start = values.new_empty(size, size), 0
    for index in range(size):
        stop = start + size - index
        matrix[index, index:] = values[start:stop]
        matrix[index + 1 :, index] = values[start + 1 : stop]
        start = stop
    return matrix


def _whole(values: Tensor, size: int) -> Tensor:
    return values if values.dim() == 2 else symmetric(values, size)


def _check_shapes(tensors: dict[str, Tensor], columns: int) -> None:
    """Raise ValueError unless all are float32 triangles of matrices [columns, columns], or these, as once written."""
    expected = [columns * (columns + 1) // 2], [columns, columns]
    for name, held in tensors.items():
        if list(held.shape) not in expected or held.dtype != torch.float32:
            raise ValueError(f"{name} is {held.dtype} {list(held.shape)}; expected float32 {expected[0]}")


def _key(layer: Layer) -> str:
    """Return the layer's key; a convolution's Hessian depends on the order of its columns."""
    channels_first = layer.kind == "conv" and not layer.spec.group_channels
    return f"{layer.name}.channels_first" if channels_first else layer.name
