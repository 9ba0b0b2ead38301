"""Second moments of layer inputs, H = E[x xᵀ] (VQDM, arXiv 2409.00492, §3; "Hessian" as in GPTQ, arXiv 2210.17323).

Every token of a Linear and every output position of a Conv2d is one sample; both guidance branches count.

Letters: I inputs of the layer seen as a matrix, N samples, C channels.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import contextmanager, suppress

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vqdm.diffusion.blocks import Layer
from vqdm.errors import RunError

SAMPLES_AT_ONCE = 2**25


class Moment:
    """A running second moment in float32: the sum of x xᵀ [I, I] and the number of samples.

    Args:
        share: the part of all samples that is counted, drawn anew from every batch with a seeded generator.
    """

    def __init__(self, size: int, device: torch.device, share: float = 1.0):
        self.total = torch.zeros(size, size, device=device)
        self.count, self.share = 0, share
        self.generator = torch.Generator().manual_seed(size)

    def add(self, samples: Tensor) -> None:
        """Count `samples` [N, I] in, or their share."""
        if self.share < 1:
            kept = max(1, round(self.share * len(samples)))
            rows = torch.randperm(len(samples), generator=self.generator)[:kept].sort().values
            samples = samples[rows.to(samples.device)]
        self.total.addmm_(samples.T, samples)
        self.count += len(samples)

    def mean(self) -> Tensor | None:
        """H [I, I], or None when nothing was counted."""
        return self.total / self.count if self.count else None


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
    """Count a layer's input in, a few images at a time so that no unfolded copy grows beyond bounds."""
    if isinstance(module, nn.Linear):
        moment.add(input_rows(module, x, group_channels))
        return
    positions = x.shape[-2] * x.shape[-1] * len(moment.total)
    for part in x.split(max(1, SAMPLES_AT_ONCE // positions)):
        moment.add(input_rows(module, part, group_channels))


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
    """Split groups into runs whose Hessians (training and held-out, float32) fit into `memory_gb`."""
    out, used = [], float("inf")
    for group in groups:
        need = 2 * 4 * group[0].columns ** 2 / 1e9
        if used + need > memory_gb:
            out.append([])
            used = 0.0
        out[-1].append(group)
        used += need
    return out


def record_hessians(
    unet: nn.Module,
    groups: list[list[Layer]],
    training: list[Callable[[], dict]],
    held_out: list[Callable[[], dict]],
    samples_per_input: int = 0,
    tick: Callable[[], None] = lambda: None,
) -> dict[str, tuple[Tensor, Tensor | None]]:
    """Run the UNet on recorded batches and return, for the first layer of each group, H [I, I] and a held-out H.

    Args:
        groups: layers that share an input, as `shared_inputs` finds them.
        training, held_out: functions that make the keyword arguments of one UNet call each.
        samples_per_input: about this many samples are counted for every input of a layer, spread over all batches;
            a second moment needs a small multiple of its size. 0 counts all.
        tick: called after every batch.

    Raises:
        RunError: an input holds NaN or infinity; names the first layer that saw it.
    """
    leaders = {group[0].name: group[0] for group in groups}
    device = next(unet.parameters()).device
    found = {}
    for which, calls in (("training", training), ("held_out", held_out)):
        moments = {name: Moment(layer.columns, device) for name, layer in leaders.items()}
        wanted = samples_per_input / max(1, len(calls))

        def seen(name: str, module: nn.Module, x: Tensor, moments=moments, wanted=wanted) -> None:
            if wanted:
                moments[name].share = wanted * leaders[name].columns / sample_count(module, x)
            add_input(moments[name], module, x, leaders[name].spec.group_channels)

        with stopping_after(unet, groups[-1][0].block) as run, input_hooks(unet, list(leaders), seen):
            for call in calls:
                run(call())
                tick()
        found[which] = {name: moment.mean() for name, moment in moments.items()}
    _check_finite(found["training"])
    return {name: (found["training"][name], found["held_out"][name]) for name in leaders}


def _check_finite(hessians: dict[str, Tensor]) -> None:
    for name, hessian in hessians.items():
        if not hessian.diagonal().isfinite().all():
            raise RunError(
                f"layer {name}: its inputs hold NaN or infinity; run the model in another --dtype (float32 or bfloat16)"
            )
