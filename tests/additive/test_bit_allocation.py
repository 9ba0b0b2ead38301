"""Allocation against all combinations."""

import itertools
import random

import pytest

from vqdm.additive.bit_allocation import allocate, lower_hull


def instance(seed, layers=4, choices=4):
    rng = random.Random(seed)
    bits = [sorted(rng.sample(range(1, 30), choices)) for _ in range(layers)]
    costs = [[rng.random() * 4.0 ** (-k) for k in range(choices)] for _ in range(layers)]
    return bits, costs


def total(values, chosen):
    return sum(own[choice] for own, choice in zip(values, chosen, strict=True))


@pytest.mark.parametrize("seed", range(20))
def test_no_combination_of_as_many_bits_costs_less_where_no_step_was_left_out(seed):
    """Where every step of the hulls down to some price was bought, the result is optimal for its bits."""
    bits, costs = instance(seed)
    everything = list(itertools.product(range(4), repeat=4))
    hulls = [lower_hull(*layer) for layer in zip(bits, costs, strict=True)]
    steps = sorted(
        ((costs[n][a] - costs[n][b]) / (bits[n][b] - bits[n][a]), bits[n][b] - bits[n][a])
        for n, hull in enumerate(hulls)
        for a, b in itertools.pairwise(hull)
    )[::-1]
    budget = sum(own[hull[0]] for own, hull in zip(bits, hulls, strict=True))
    for _, step in steps:
        budget += step
        chosen = allocate(bits, costs, budget)
        assert total(bits, chosen) == budget
        least = min(total(costs, other) for other in everything if total(bits, other) <= budget)
        assert total(costs, chosen) == pytest.approx(least)


@pytest.mark.parametrize("seed", range(20))
def test_any_budget_is_kept_and_more_is_never_worse(seed):
    bits, costs = instance(seed)
    low, high = sum(map(min, bits)), sum(map(max, bits))
    results = [allocate(bits, costs, budget) for budget in (low, (low + high) // 2, high)]
    assert total(bits, results[0]) == low and total(bits, results[1]) <= (low + high) // 2
    spent = [total(costs, chosen) for chosen in results]
    assert spent[0] >= spent[1] >= spent[2] == pytest.approx(sum(map(min, costs)))


def test_a_budget_below_the_least_is_refused():
    with pytest.raises(ValueError, match="below the least possible, 5"):
        allocate([[2, 4], [3, 9]], [[1.0, 0.5], [1.0, 0.1]], 4)


def test_the_hull_leaves_out_what_a_mixture_beats():
    assert lower_hull([1, 2, 3, 4], [8.0, 7.5, 1.0, 1.0]) == [0, 2]
