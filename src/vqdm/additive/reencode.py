"""Moving a coded matrix by changing codes: for wished moves of the weights, the codes that come nearest to them.

A column group's codes are chosen under a metric F Fᵀ of its own, with codebooks and scales as they are.

Letters: O rows, I columns; p, g = out and in group size; R = O/p row groups, G = I/g column groups; M codebooks.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from vqdm.additive.code import AdditiveCode
from vqdm.additive.encode import encode_group, group_values


class Move(NamedTuple):
    """New codes for some column groups, J of them.

    Attributes:
        codes: [R, J, M].
        moved: by how much the decoded columns change, [O, J·g].
        gain: by how much each wish comes nearer, ‖wish F‖² − ‖(wish − moved) F‖²; [R, J], 0 where no code is nearer.
    """

    codes: Tensor
    moved: Tensor
    gain: Tensor


def nearest_moves(code: AdditiveCode, wishes: Tensor, factors: Tensor, beam_size: int) -> Move:
    """The codes of every column group of `code` that come nearest to its decoded values plus `wishes`.

    Args: `wishes` [O, I]; `factors` F [G, g, g]. A group whose present codes are as near keeps them.
    """
    g = code.spec.in_group_size
    present = code.dequantize()
    moves = [
        _nearest_move(code, j, present[:, j * g : (j + 1) * g], wishes[:, j * g : (j + 1) * g], factors[j], beam_size)
        for j in range(len(factors))
    ]
    codes, moved, gain = zip(*moves, strict=True)
    return Move(torch.stack(codes, 1), torch.cat(moved, 1), torch.stack(gain, 1))


def _nearest_move(code: AdditiveCode, j: int, present: Tensor, wish: Tensor, factor: Tensor, beam_size: int) -> tuple:
    """Codes [R, M], moved [O, g] and gain [R] of column group j."""
    p, g = code.spec.out_group_size, code.spec.in_group_size
    t = torch.ones_like(wish[0]) if code.input_scales is None else code.input_scales[j * g : (j + 1) * g].float()
    target = (present + wish) / torch.where(t == 0, 1.0, t)
    found, values = encode_group(target, *_in_float(group_values(code, j)), t[:, None] * factor, beam_size)
    moved = values * t - present
    gain = _squares(wish @ factor, p) - _squares((wish - moved) @ factor, p)
    nearer = gain > 0  # [R]
    codes = torch.where(nearer[:, None], found.to(code.codes.dtype), code.codes[:, j])
    return codes, moved * nearer.repeat_interleave(p)[:, None], torch.where(nearer, gain, 0.0)


def _in_float(values: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    scales, codebooks = values
    return scales.float(), codebooks.float()


def _squares(values: Tensor, p: int) -> Tensor:
    """Sums of squares [R] of the row groups of `values` [O, g]."""
    return values.square().view(-1, p * values.shape[1]).sum(1)


def within(limit: Tensor, move: Move, p: int) -> Tensor:
    """Which moves to make: those of the largest gains whose squared sizes add up to no more than `limit`; bool [R, J].

    Moves without gain are never made. Equal gains go by their place, so that the choice is the same everywhere.
    """
    R, J = move.gain.shape
    sizes = move.moved.view(R, p, J, -1).square().sum((1, 3))  # [O, J·g] → [R, J]
    order = move.gain.flatten().sort(descending=True, stable=True).indices
    made = torch.zeros(R * J, dtype=torch.bool, device=order.device)
    made[order] = sizes.flatten()[order].cumsum(0) <= limit
    return made.view(R, J) & (move.gain > 0)


def make_moves(codes: Tensor, move: Move, made: Tensor, p: int) -> tuple[Tensor, Tensor]:
    """`codes` [R, J, M] with the moves that are `made` [R, J], and the change of the decoded columns [O, J·g]."""
    rows = made.repeat_interleave(p, 0)[:, :, None]  # [O, J, 1]
    moved = move.moved.unflatten(1, (made.shape[1], -1)) * rows  # [O, J, g]
    return torch.where(made[:, :, None], move.codes, codes), moved.flatten(1)
