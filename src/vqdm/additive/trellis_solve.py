"""From weights and second moments of inputs to trellis codes, in one pass of error feedback; and what that will cost.

Feedback goes from column to column, and the trellis down the rows: H couples columns, not rows, so that at column j the
errors of all rows count D_j = V_jj² for the factor H + λI = V Vᵀ (LDL, as in `encode.feedback_factors`). With E_j the
energy of column j and mse(q) the error of a unit Gaussian at width q, the layer's error is about Σ_j D_j·E_j·mse(q_j),
which is known before anything is coded: so bits can be divided among columns, and among layers, without trials. What
corrects that sum is in `Demand` and `expected_errors`.

Letters: O rows, I columns; T rows of a segment; L bits of a state; q widths in quarter bits.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from vqdm.additive.code import AdditiveCode, CodeSpec
from vqdm.additive.encode import column_blocks, damped_cholesky, stacked
from vqdm.additive.scoring import native_scoring
from vqdm.additive.trellis import UNITS, allowed_widths, scale_logarithms, scale_values, table
from vqdm.additive.viterbi import FLAGS, feedback_block, viterbi
from vqdm.compiled import build

# Of a unit Gaussian in segments of 384 rows: mean squared error in dB, and the best scale of the table, by width.
MEASURED = {
    8: {4: (-5.50, 0.90), 6: (-8.30, 1.00), 8: (-11.22, 1.05), 12: (-17.05, 1.15), 16: (-22.70, 1.20),
        20: (-28.36, 1.20), 24: (-34.00, 1.30), 28: (-39.13, 1.40), 32: (-43.87, 1.60)},
    10: {4: (-5.61, 0.90), 6: (-8.46, 1.00), 8: (-11.45, 1.05), 12: (-17.28, 1.10), 16: (-23.20, 1.10),
         20: (-28.78, 1.15), 24: (-34.69, 1.15), 28: (-40.42, 1.30), 32: (-45.85, 1.40), 36: (-51.05, 1.40),
         40: (-55.87, 1.60)},
    12: {4: (-5.65, 0.85), 6: (-8.58, 0.95), 8: (-11.58, 1.00), 12: (-17.46, 1.05), 16: (-23.45, 1.05),
         20: (-29.35, 1.10), 24: (-34.87, 1.10), 28: (-40.95, 1.10), 32: (-46.75, 1.20), 36: (-52.41, 1.30),
         40: (-57.80, 1.30), 44: (-62.84, 1.60), 48: (-67.21, 1.60)},
}  # fmt: skip
STRETCHES = 2.0 ** (torch.arange(9) / 4)  # of the table over its best scale, for columns with outliers
DAMPING = 0.002  # of H's mean diagonal, where it is factored
ROWS_OF_A_STATE = 5  # that the search trades errors among
EXPECTED_ROWS = 32  # combinations of a layer's rows that feedback is followed on
DECADES = 14  # of prices
REFINEMENTS, REFINED_PRICES = 2, 8
LEAST_ERROR = 1e-15


@dataclass(frozen=True)
class Rates:
    """What widths are worth.

    Attributes:
        widths: int64 [n], ascending, the first is 0.
        errors: float64 [n], mean squared error of a unit Gaussian.
        gains: float64 [n], the best scale of the table for it.
        largest: the largest value of the table.
    """

    widths: Tensor
    errors: Tensor
    gains: Tensor
    largest: float

    def index(self, widths: Tensor) -> Tensor:
        """Where `widths` are among all."""
        return torch.searchsorted(self.widths.to(widths.device), widths)


@cache
def rates(T: int, L: int) -> Rates:
    """The rates of segments of T rows. Widths between measured ones lie between them."""
    widths, known = np.array(allowed_widths(T, L)), MEASURED[L]
    decibels, gains = zip(*known.values(), strict=True)
    errors = 10 ** (np.interp(widths, list(known), decibels) / 10)
    errors[0] = 1.0
    found = torch.tensor(widths), torch.tensor(errors), torch.tensor(np.interp(widths, list(known), gains))
    return Rates(*found, table(L).max().item())


@dataclass(frozen=True)
class Demand:
    """What the columns of a layer need of bits, in the order of coding.

    Attributes:
        factors: float32 [I], D_j, by which errors of column j count in coding.
        weights: float32 [I], by which they count in the layer's error: D_j less the part of it that is λ's.
        energies: float32 [I], E_j = Σ_r w².
        clipped: float32 [I, n], the energy beyond the largest value at each of the n `STRETCHES`, at a best scale of 1.
        spread: float32 [I, I], the squares of V⁻¹: what an error D_i·e² of column i adds to E_j for j > i by feedback.
        rows: float32 [R, I], random combinations of the rows: of the same energies, and as much alike as the columns.
        gain: of rows that differ: the search gives the small rows of a window of the trellis more of the error, so that
            the geometric mean of their energies counts.
        energy: tr(W H Wᵀ).
    """

    factors: Tensor
    weights: Tensor
    energies: Tensor
    clipped: Tensor
    spread: Tensor
    rows: Tensor
    gain: float
    energy: float

    @classmethod
    def of(cls, W: Tensor, H: Tensor, V: Tensor, largest: float) -> Demand:
        """Of W [O, I] and H [I, I] in the order of coding, and the factor V [I, I] of the damped H."""
        spread = torch.linalg.solve_triangular(V, torch.eye(len(V)).to(V), upper=True).square()
        damping = (V.square().sum(1) - H.diagonal()).mean().clamp(min=0)
        factors = V.diagonal().square()
        weights = factors * (1 - damping * spread.sum(1)).clamp(min=0)
        energy, energies = ((W @ H) * W).sum().item(), W.square().sum(0)
        some = factors, weights, energies, clipped_energies(W, largest), spread, combined_rows(W, energies)
        return cls(*some, rows_gain(row_scales(W)), max(0.0, energy))


@dataclass(frozen=True)
class Curve:
    """A layer's expected error at several rates.

    Attributes:
        totals: int64 [P], summed widths of a row's columns, ascending.
        errors: float64 [P], relative errors, descending.
        found: (summed widths, ratio) of the layer as it has been coded: its error over the one that was expected of
            that code, by which expectations are corrected.
    """

    totals: Tensor
    errors: Tensor
    found: tuple[tuple[int, float], ...] = ()

    def at(self, totals: np.ndarray) -> np.ndarray:
        """Errors at other summed widths, on the lines between the logarithms."""
        known = np.log(np.maximum(self.errors.numpy(), LEAST_ERROR))
        expected = np.interp(totals, self.totals.numpy(), known)
        if self.found:
            places, ratios = zip(*sorted(self.found), strict=True)
            expected = expected + np.interp(totals, places, np.log(ratios))
        return np.exp(expected)

    def corrected(self, total: int, ratio: float) -> Curve:
        """The curve with one more ratio that has been found."""
        return replace(self, found=(*(one for one in self.found if one[0] != total), (total, ratio)))

    def ratio(self, total: int, error: float) -> float:
        """That of the error of a code to the one that was expected of it."""
        return max(error, LEAST_ERROR) / self.at(np.array([total])).item()


def widths_at(demand: Demand, known: Rates, prices: Tensor) -> tuple[Tensor, Tensor]:
    """Widths [P, I] at `prices` [P] of a unit of width, and the relative errors [P] that they are expected to leave.

    Columns are visited in the order of coding: what is left of the columns before adds to a column's energy, by which
    it then chooses the width that costs the least.
    """
    device, I = demand.energies.device, len(demand.energies)  # noqa: E741
    if native_scoring(demand.energies):
        return _native_widths(demand, known, prices)
    rate, widths, stretch = (one.to(device) for one in (known.errors.float(), known.widths, STRETCHES))
    table, costs = rate[:, None] * stretch, prices.to(device)[:, None] * widths  # [widths, n], [P, widths]
    found = torch.empty(len(prices), I, dtype=torch.int64, device=device)
    added = torch.zeros(len(prices), I, device=device)
    total = torch.zeros(len(prices), dtype=torch.float64, device=device)
    for block in column_blocks(I, 1):
        left = torch.empty(len(prices), block.stop - block.start, device=device)
        for j in range(block.start, block.stop):
            done = slice(block.start, j)
            more = left[:, : j - block.start] @ demand.spread[done, j]
            energy = demand.energies[j] + added[:, j] + more  # [P]
            errors = (energy[:, None, None] * table + demand.clipped[j]).amin(2) * demand.gain  # [P, widths]
            errors[:, 0] = energy
            pick = (demand.factors[j] * errors + costs).argmin(1)
            chosen = errors.gather(1, pick[:, None])[:, 0]
            left[:, j - block.start] = demand.factors[j] * chosen
            total += demand.weights[j] * chosen
            found[:, j] = widths[pick]
        added[:, block.stop :] += left @ demand.spread[block, block.stop :]
    return found, (total / demand.energy if demand.energy > 0 else total * 0).cpu()


class _Layer(ctypes.Structure):
    """As in trellis_widths.c."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("factors", "weights", "energies", "clipped", "spread", "prices")),
        *((name, ctypes.c_void_p) for name in ("errors", "stretches", "widths", "added", "found", "totals")),
        *((name, ctypes.c_int64) for name in ("I", "P", "W", "n")),
        ("gain", ctypes.c_float),
    )


def _native_widths(demand: Demand, known: Rates, prices: Tensor) -> tuple[Tensor, Tensor]:
    """`widths_at` on the CPU, in C."""
    I, P = len(demand.energies), len(prices)  # noqa: E741
    columns = demand.factors, demand.weights, demand.energies, demand.clipped, demand.spread
    inputs = [one.contiguous() for one in (*columns, prices.float(), known.errors.float(), STRETCHES, known.widths)]
    found, totals = torch.empty(P, I, dtype=torch.int64), torch.zeros(P, dtype=torch.float64)
    added = torch.zeros(P, I)
    pointers = [tensor.data_ptr() for tensor in (*inputs, added, found, totals)]
    counts = I, P, len(known.widths), demand.clipped.shape[1]
    _widths_library().vqdm_widths(ctypes.byref(_Layer(*pointers, *counts, demand.gain)))
    return found, totals / demand.energy if demand.energy > 0 else totals * 0


@cache
def _widths_library() -> ctypes.CDLL:
    return build(Path(__file__).with_name("trellis_widths.c"), FLAGS)


def spread_prices(demand: Demand, count: int = 36) -> Tensor:
    """Prices from where hardly a column has bits to where nearly all have the most: float32 [count], descending."""
    most = (demand.factors * demand.energies).max().clamp(min=1e-30).item()
    return most * torch.logspace(0, -DECADES, count)


def expected_errors(ordered: Ordered, demand: Demand, known: Rates, widths: Tensor) -> Tensor:
    """Relative errors that coding at widths [P, I] is expected to leave, float64 [P]: feedback followed on a few rows.

    A decoded value is about the mean of those that it stands for. So of a target t a width of relative error m leaves
    m·t + noise of energy m·(1 − m)·‖t‖². The first part is no noise, and is all that a column without bits leaves: fed
    back into columns that are alike, it adds more to them than their share in `Demand.spread`, at few bits decibels.
    """
    V = ordered.V
    factors, original = V.diagonal(), demand.rows.T.contiguous()  # [I, R]
    differences = torch.empty(len(V), len(widths), len(demand.rows), device=V.device)  # W − Ŵ [I, P, R]
    rate = known.errors.to(V)[known.index(widths)]  # [P, I]
    noise = torch.randn(demand.rows.shape, generator=torch.Generator().manual_seed(0)).to(V).T
    noise = noise / noise.norm(dim=1, keepdim=True)  # [I, R]
    clipped = demand.clipped / torch.where(demand.energies == 0, 1.0, demand.energies)[:, None]
    target = original[:, None].repeat(1, len(widths), 1)  # [I, P, R]
    for block in column_blocks(len(V), 1):
        difference = differences[block]
        for j in range(block.start, block.stop):
            done = slice(block.start, j)
            weight = V[done, j] / factors[j]
            wanted = target[j] + (weight @ difference[: len(weight)].flatten(1)).view_as(target[j])  # [P, R]
            share = (rate[:, j, None] * STRETCHES.to(V) + clipped[j]).amin(1) * demand.gain  # [P]
            share = torch.where(widths[:, j] == 0, 1.0, share.clamp(max=1))[:, None]
            energy = wanted.square().sum(1, keepdim=True)
            left = share * wanted + (energy * share * (1 - share)).sqrt() * noise[j]
            difference[j - block.start] = original[j] - wanted + left
        feedback = V[block, block.stop :] / factors[block.stop :]
        target[block.stop :] += (feedback.T @ difference.flatten(1)).view_as(target[block.stop :])
    moved = (ordered.H @ differences.flatten(1)).view_as(differences)
    total = (moved * differences).sum((0, 2), dtype=torch.float64).cpu()
    return total / demand.energy if demand.energy > 0 else total * 0


def combined_rows(W: Tensor, energies: Tensor) -> Tensor:
    """Combinations of W's rows with random signs, [R, I], whose columns have `energies` [I]; W where it is as small."""
    if len(W) <= EXPECTED_ROWS:
        return W
    signs = torch.randint(2, (EXPECTED_ROWS, len(W)), generator=torch.Generator().manual_seed(0)).to(W) * 2 - 1
    rows = signs @ W
    return rows * (energies / rows.square().sum(0).clamp(min=1e-30)).sqrt()


def rate_distortion(widths: Tensor, errors: Tensor) -> Curve:
    """The curve through relative errors [P] at widths [P, I]."""
    totals, order = widths.sum(1).cpu().sort(stable=True)
    return Curve(totals, errors[order].clamp(min=LEAST_ERROR))


def rows_gain(scales: Tensor) -> float:
    """Mean over windows of rows of the geometric mean of scales² [O], over the mean of scales²."""
    squares = scales.square().clamp(min=1e-12)
    window = min(ROWS_OF_A_STATE, len(squares))
    logarithms = torch.cat([squares.log(), squares.log()[: window - 1]]).unfold(0, window, 1)
    return (logarithms.mean(1).exp().mean() / squares.mean()).item()


def clipped_energies(W: Tensor, largest: float) -> Tensor:
    """The energy of every column of W [O, I] beyond a table's largest value at each of the `STRETCHES`: [I, n]."""
    scales = row_scales(W)
    relative = W.abs() / torch.where(scales == 0, 1.0, scales)[:, None]
    rms = weighted_rms(relative, scales)  # [I]
    return torch.stack([over(relative, rms * stretch * largest, scales) for stretch in STRETCHES.tolist()], 1)


def over(values: Tensor, limits: Tensor, scales: Tensor) -> Tensor:
    """The energy [I] of `values` >= 0 [O, I], in units of the row scales, beyond limits [I]."""
    return ((values - limits).clamp(min=0).square() * scales.square()[:, None]).sum(0)


def row_scales(W: Tensor) -> Tensor:
    """RMS of every row of W [..., O, I] over their mean, as it is stored: [..., O]."""
    rms = W.square().mean(-1).sqrt()
    mean = rms.mean(-1, keepdim=True)
    return scale_values(scale_logarithms(rms / torch.where(mean == 0, 1.0, mean)))


def weighted_rms(relative: Tensor, scales: Tensor) -> Tensor:
    """RMS over rows of values [..., O, I] in units of their row scales [..., O], rows counting by scale²: [..., I]."""
    squares = scales.square()[..., None]
    total = squares.sum(-2)
    return ((relative.square() * squares).sum(-2) / torch.where(total == 0, 1.0, total)).sqrt()


# ------------------------------------------------------------------------------------------------ a layer


@dataclass(frozen=True)
class Ordered:
    """A layer with its columns in the order of coding: those that weigh most first.

    Attributes:
        W, H, V: [O, I], [I, I], and the upper triangular factor [I, I] of H + λI, H of mean diagonal one.
        order: the layer's columns in the order they have here, [I].
    """

    W: Tensor
    H: Tensor
    V: Tensor
    order: Tensor

    @classmethod
    def of(cls, W: Tensor, H: Tensor) -> Ordered:
        mean = H.diagonal().mean()
        H = H / mean if mean > 0 else torch.eye(len(H), dtype=H.dtype, device=H.device)
        return cls.by(W, H, H.diagonal().argsort(descending=True, stable=True))

    @classmethod
    def by(cls, W: Tensor, H: Tensor, order: Tensor) -> Ordered:
        """In an order of the columns [I], H of mean diagonal one."""
        H = H[order][:, order].contiguous()
        return cls(W[:, order].contiguous(), H, damped_cholesky(H.flip(0, 1), DAMPING).flip(0, 1), order)

    def dropped_first(self, widths: Tensor) -> tuple[Ordered, Tensor]:
        """Columns without bits before all others, which then make up for them and for one another; `widths` [I] too.

        Where they are, no column would make up for what the columns before it leave.
        """
        if (widths > 0).all() or not widths.any():
            return self, widths
        order = (widths > 0).to(torch.int8).argsort(stable=True)
        moved = Ordered.by(self.W, self.H, order)
        return replace(moved, order=self.order[order]), widths[order]

    def demand(self, spec: CodeSpec) -> Demand:
        """What the columns need of bits."""
        return Demand.of(self.W, self.H, self.V, rates(spec.segment_rows, spec.nbits_per_codebook).largest)


def layer_curves(W: Tensor, H: Tensor, spec: CodeSpec, others: Sequence[CodeSpec] = ()) -> list[Curve]:
    """What the error of a layer W [O, I] will be at any bits, given the second moment H [I, I] of its inputs.

    First that of codes of `spec`; then those of `others`, formats with other tables: what `expected_errors` finds
    beyond the sum over columns is about the same for all.
    """
    ordered = Ordered.of(W, H)
    demand, plain = ordered.demand(spec), []
    for one in (spec, *others):
        known = rates(one.segment_rows, one.nbits_per_codebook)
        demand = replace(demand, clipped=clipped_energies(ordered.W, known.largest))
        widths, errors = widths_at(demand, known, spread_prices(demand))
        plain.append(rate_distortion(widths, errors))
        if one is spec:
            exact = rate_distortion(widths, expected_errors(ordered, demand, known, widths))
    excess = Curve(exact.totals, exact.errors / plain[0].errors)
    return [exact, *(replace(one, errors=one.errors * excess.at(one.totals.numpy())) for one in plain[1:])]


def solve_trellis(layers: Sequence[tuple[Tensor, Tensor]], spec: CodeSpec) -> list[AdditiveCode]:
    """The codes of layers of one shape and format, each a weight W [O, I] and an H [I, I], as they will be stored.

    All are coded together, column by column, so that a launch on a GPU does the work of all.
    """
    ordered = [Ordered.of(W, H) for W, H in layers]
    known = rates(spec.segment_rows, spec.nbits_per_codebook)
    total = UNITS * spec.segment_bits // spec.segment_rows
    widths = [divide_columns(one.demand(spec), known, total) for one in ordered]
    ordered, widths = zip(*map(Ordered.dropped_first, ordered, widths), strict=True)
    factors = [one.V.diagonal() for one in ordered]
    feedback = [one.V / factor for one, factor in zip(ordered, factors, strict=True)]
    parts = [one.W for one in ordered], factors, feedback
    code = trellis_encode(*map(stacked, parts), spec, stacked(widths))
    codes = [code] if len(layers) == 1 else unstacked(code, len(layers))
    return [code.with_groups(one.order.argsort()).stored() for code, one in zip(codes, ordered, strict=True)]


def unstacked(code: AdditiveCode, count: int) -> list[AdditiveCode]:
    """The codes of several layers, one by one."""
    names = ("codes", "codebooks", "scales", "input_scales", "widths")
    return [replace(code, **{name: getattr(code, name)[k] for name in names}) for k in range(count)]


# ------------------------------------------------------------------------------------------------ dividing bits


def divide_columns(demand: Demand, known: Rates, total: int) -> Tensor:
    """Widths [I] that add up to `total`, at nearly the least expected error.

    Raises:
        ValueError: no allowed widths add up to the total.
    """
    prices = spread_prices(demand)
    for _ in range(REFINEMENTS):
        widths, _ = widths_at(demand, known, prices)
        taken = widths.sum(1).cpu()
        last = int((taken <= total).sum()) - 1  # of the prices that are not too low; totals rise but for rounding
        low, high = prices[min(last + 1, len(prices) - 1)].item(), prices[max(last, 0)].item()
        prices = torch.logspace(np.log10(high), np.log10(low), REFINED_PRICES)
    widths, _ = widths_at(demand, known, prices)
    fitting = (widths.sum(1) <= total).nonzero()
    first = widths[int(fitting[-1])] if len(fitting) else torch.zeros_like(widths[0])
    return filled_up(first, demand, known, total)


def filled_up(widths: Tensor, demand: Demand, known: Rates, total: int) -> Tensor:
    """`widths` [I] of no more than `total`, widened one after another where that gains most until they add up to it.

    Raises:
        ValueError: as `divide_columns`.
    """
    allowed = known.widths.to(widths.device)
    picks, rate = torch.searchsorted(allowed, widths), known.errors.float().to(widths.device)
    while left := total - int(allowed[picks].sum()):
        above = (picks + 1).clamp(max=len(allowed) - 1)
        steps = allowed[above] - allowed[picks]
        gains = demand.factors * demand.energies * (rate[picks] - rate[above]) / steps.clamp(min=1)
        gains = torch.where((steps > 0) & (steps <= left), gains, -torch.inf)
        column = int(gains.argmax())
        if gains[column] > -torch.inf:
            picks[column] += 1
            continue
        # Every coded column is at the most, and what is left is less than the least.
        full, empty = (picks == len(allowed) - 1).nonzero(), (picks == 0).nonzero()
        lowered = allowed[-1] - (allowed[1] - left)
        if not len(full) or not len(empty) or lowered not in allowed:
            raise ValueError(f"no widths of {len(picks)} columns add up to {total}")
        picks[full[0, 0]], picks[empty[0, 0]] = int((allowed == lowered).nonzero()[0, 0]), 1
    return allowed[picks]


# ------------------------------------------------------------------------------------------------ coding


def trellis_encode(W: Tensor, factors: Tensor, feedback: Tensor, spec: CodeSpec, widths: Tensor) -> AdditiveCode:
    """Codes of W [..., O, I] by error feedback, column after column.

    Args:
        factors: V_jj [..., I], and `feedback` [..., I, I], as of `encode.feedback_factors` for single columns.
        spec: a trellis format; its `scale_exponent` counts.
        widths: int64 [..., I].

    Every column's scale is the one that its target asks for by then, what feedback has added to it included.
    """
    T, L = spec.segment_rows, spec.nbits_per_codebook
    known, values = rates(T, L), table(L).to(W.device)
    scales = row_scales(W)
    weights = scales.square()
    rings = _rings((weights / weights.mean(-1, keepdim=True)).nan_to_num(0.0), T)
    picks = known.index(widths.cpu())
    difference, target = torch.zeros_like(W), W.clone()  # W − Ŵ where coded
    if W.dim() == 2 and native_scoring(W):
        states, columns = _native_encode(W, feedback, spec, widths, scales, rings.view(-1))
        return AdditiveCode(spec, states[..., None], values.view(1, -1, 1, 1), scales[:, None], columns, widths)
    states = torch.zeros(W.shape, dtype=torch.int32, device=W.device)
    columns = torch.zeros_like(W[..., 0, :])
    for block in column_blocks(W.shape[-1], 1):
        for j in range(block.start, block.stop):
            done = slice(block.start, j)
            wanted = target[..., j] + (difference[..., done] @ feedback[..., done, j, None])[..., 0]
            relative = (wanted / torch.where(scales == 0, 1.0, scales)).where(scales > 0, 0.0)
            columns[..., j] = column_scale(relative, scales, known, picks[..., j], spec.scale_exponent)
            scale = columns[..., j, None]
            units = _rings(relative / torch.where(scale == 0, 1.0, scale), T)
            coded = _states(units, rings, values, widths[..., j], scale.numel())
            states[..., j] = coded.view(wanted.shape)
            difference[..., j] = W[..., j] - values[states[..., j].long()] * scales * scale
        target[..., block.stop :] += difference[..., block] @ feedback[..., block, block.stop :]
    books = values.view(1, -1, 1, 1).expand(*W.shape[:-2], 1, -1, 1, 1)
    return AdditiveCode(spec, states[..., None], books, scales[..., None], columns, widths)


def _native_encode(
    W: Tensor, feedback: Tensor, spec: CodeSpec, widths: Tensor, scales: Tensor, weights: Tensor
) -> tuple[Tensor, Tensor]:
    """States [O, I] and column scales [I] of W [O, I] on the CPU; the columns of a block are one call of C."""
    T, L = spec.segment_rows, spec.nbits_per_codebook
    known, levels = rates(T, L), scale_values(torch.arange(256), spec.scale_exponent)
    picks = known.index(widths)
    gains, errors = known.gains[picks].float(), known.errors[picks].float()
    original = W.T.contiguous()  # [I, O]
    targets, states, columns = original.clone(), torch.empty(W.T.shape, dtype=torch.int32), torch.empty(W.shape[1])
    for block in column_blocks(W.shape[1], 1):
        choice = table(L), gains[block], errors[block], STRETCHES, levels, known.largest
        some = targets[block], original[block], feedback[block, block], (scales, weights), widths[block].to(torch.int32)
        difference, columns[block], states[block] = feedback_block(*some, choice, T)
        targets[block.stop :] += feedback[block, block.stop :].T @ difference
    return states.T.contiguous(), columns


def _rings(rows: Tensor, T: int) -> Tensor:
    """Rows [..., O] as rings [N, T]."""
    return rows.reshape(-1, T)


def _states(units: Tensor, weights: Tensor, values: Tensor, widths: Tensor, layers: int) -> Tensor:
    """States [N, T] of the rings of `layers` layers; 0 where a layer's width is 0."""
    each = widths.cpu().reshape(-1).repeat_interleave(len(units) // layers)  # [N]
    if (each > 0).all():
        return viterbi(units, weights, values, each)
    states, coded = torch.zeros_like(units, dtype=torch.int32), each > 0
    if coded.any():
        some = coded.to(units.device)
        states[some] = viterbi(units[some], weights[some], values, each[coded])
    return states


def column_scale(relative: Tensor, scales: Tensor, known: Rates, picks: Tensor, exponent: int) -> Tensor:
    """The stored scale [...] of a column of values [..., O] in units of row scales, at the widths of `picks` [...].

    The table is stretched beyond its best scale as long as that costs less than what lies beyond its largest value.
    """
    rms = weighted_rms(relative[..., None], scales)[..., 0]
    gains = known.gains.to(relative)[picks.to(relative.device)]
    errors = known.errors.to(relative)[picks.to(relative.device)]
    tries = (gains * rms)[..., None] * STRETCHES.to(relative)  # [..., n]
    squares = scales.square()
    beyond = (relative.abs()[..., None] - tries[..., None, :] * known.largest).clamp(min=0).square()  # [..., O, n]
    clipped = (beyond * squares[..., None]).sum(-2)
    expected = (errors * rms.square() * squares.sum(-1))[..., None] * STRETCHES.to(relative) + clipped
    best = tries.gather(-1, expected.argmin(-1, keepdim=True))[..., 0]
    best = torch.where(picks.to(relative.device) == 0, 0.0, best)
    return scale_values(scale_logarithms(best, exponent), exponent)
