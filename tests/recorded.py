"""Trajectories that tests make of tensors, and tensors of trajectories.

Letters: N prompts, S steps with one call each, A guidance branches.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from vqdm.diffusion.trajectories import Call, Group, Trajectories

ADDED = ("text_embeds", "time_ids")  # of `added_cond_kwargs`


def made(latents: Tensor, timesteps: Tensor, conditioning: dict[str, Tensor] | None = None, outputs=None):
    """Trajectories of a UNet: latents [N, S, C, h, w], timesteps [S], name → [N, A, ...], outputs [N, S, A, ...]."""
    conditioning = conditioning or {}
    branches = next((value.shape[1] for value in conditioning.values()), 1)
    batched, calls = dict(conditioning), []
    nodes = {name: {"batch": name} for name in conditioning}
    added = {name: nodes.pop(name) for name in ADDED if name in nodes}
    nodes |= {"added_cond_kwargs": {"dict": added}} if added else {}
    for s, timestep in enumerate(timesteps):
        batched |= {f"sample#{s}": latents[:, s].unsqueeze(1), f"timestep#{s}": timestep.expand(len(latents), 1)}
        batched |= {} if outputs is None else {f"output#{s}": outputs[:, s]}
        own = {"sample": {"batch": f"sample#{s}"}, "timestep": {"batch": f"timestep#{s}"}}
        calls.append(Call(own | nodes, branches, None if outputs is None else f"output#{s}"))
    return Trajectories([Group(list(range(len(latents))), batched, {}, calls)], timesteps)


def some(whole: Trajectories, rows: slice) -> Trajectories:
    """Those of some prompts of trajectories of one group."""
    (group,) = whole.groups
    batched = {name: value[rows].clone() for name, value in group.batched.items()}
    return replace(whole, groups=[Group(list(range(len(group.numbers[rows]))), batched, group.alone, group.calls)])


def without_outputs(whole: Trajectories) -> Trajectories:
    (group,) = whole.groups
    return replace(whole, groups=[replace(group, calls=[replace(call, output=None) for call in group.calls])])


def latents(whole: Trajectories) -> Tensor:
    """[N, S, C, h, w]"""
    (group,) = whole.groups
    return torch.stack([group.batched[call.tree[whole.sample]["batch"]][:, 0] for call in group.calls], 1)


def outputs(whole: Trajectories) -> Tensor:
    """[N, S, A, C, h, w]"""
    (group,) = whole.groups
    return torch.stack([group.batched[call.output] for call in group.calls], 1)


def conditioning(whole: Trajectories, name: str) -> Tensor:
    """[N, A, ...] of the first call."""
    (group,) = whole.groups
    return group.batched[group.calls[0].tree[name]["batch"]]
