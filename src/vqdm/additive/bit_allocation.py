"""Dividing a budget of bits among layers whose errors add up.

For each layer the choices on the lower convex hull of (bits, cost) are the solutions for some price of a bit (Shoham &
Gersho, 1988, "Efficient bit allocation for an arbitrary set of quantizers"); they are bought in the order of what a bit
saves. The result is the least possible cost for the bits it takes.
"""

from __future__ import annotations

from itertools import pairwise


def allocate(bits: list[list[int]], costs: list[list[float]], budget: int) -> list[int]:
    """The choice of every layer, given the `bits` and `costs` of each of its choices, within `budget` bits in all.

    Raises ValueError when the budget is below the sum of the cheapest choices.
    """
    hulls = [lower_hull(*layer) for layer in zip(bits, costs, strict=True)]
    chosen = [hull[0] for hull in hulls]
    left = budget - sum(own[choice] for own, choice in zip(bits, chosen, strict=True))
    if left < 0:
        raise ValueError(f"the budget of {budget} bits is below the least possible, {budget - left}")
    for layer, before, after in _steps(hulls, bits, costs):
        step = bits[layer][after] - bits[layer][before]
        if chosen[layer] == before and step <= left:
            chosen[layer] = after
            left -= step
    return chosen


def lower_hull(bits: list[int], costs: list[float]) -> list[int]:
    """Choices on the lower convex hull of (bits, cost), from the fewest bits to the least cost."""
    hull: list[int] = []
    for choice in sorted(range(len(bits)), key=lambda k: (bits[k], costs[k])):
        if hull and costs[choice] >= costs[hull[-1]]:
            continue
        while len(hull) > 1 and not _convex(bits, costs, hull[-2], hull[-1], choice):
            hull.pop()
        hull.append(choice)
    return hull


def _convex(bits: list[int], costs: list[float], a: int, b: int, c: int) -> bool:
    return (costs[a] - costs[b]) * (bits[c] - bits[b]) > (costs[b] - costs[c]) * (bits[b] - bits[a])


def _steps(hulls: list[list[int]], bits: list[list[int]], costs: list[list[float]]) -> list[tuple[int, int, int]]:
    """(layer, from, to) of every step along a hull, the most saving a bit first."""
    steps = [(layer, *pair) for layer, hull in enumerate(hulls) for pair in pairwise(hull)]

    def saving(step: tuple[int, int, int]) -> float:
        layer, a, b = step
        return (costs[layer][a] - costs[layer][b]) / (bits[layer][b] - bits[layer][a])

    return sorted(steps, key=saving, reverse=True)
