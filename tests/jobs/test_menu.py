"""Formats that layers can become, and how their errors are told from a few measured ones."""

import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from vqdm.additive.code import CodeSpec
from vqdm.diffusion.blocks import Layer
from vqdm.jobs import menu
from vqdm.jobs.menu import MEASURED, error_falls, formats, offered, usual_format

LAYERS = [Layer(f"mid_block.{n}", "mid_block", "linear", 64, 16 * (n + 1), CodeSpec()) for n in range(5)]


@pytest.mark.parametrize("how", ["unet", "kind"])
def test_every_format_takes_the_bits_it_offers_from_one_bank_a_group_size(how):
    found = formats(LAYERS[2], how)
    bits = [bits / g for g in MEASURED for bits in offered(g)]  # of a weight
    assert [one.spec.row_bits / one.columns for one in found] == pytest.approx(bits, abs=0.5 / 48)
    owner = "unet" if how == "unet" else "linear"
    assert {one.spec.shared_codebooks for one in found} == {f"{owner}_0to12_1x{g}" for g in (4, 2, 1)}
    assert all(one.spec.input_channel_scales and one.spec.num_codebooks == 1 for one in found)
    assert min(bits) == 0.5 and max(bits) == 11
    for one in found:
        one.spec.check_shape(one.rows, one.columns)
    assert usual_format(LAYERS[2], how) in found and usual_format(LAYERS[2], how).spec.row_bits == 2 * 48


def test_errors_between_measured_rates_follow_the_line_and_other_layers_get_the_mean(monkeypatch):
    tables = {g: torch.rand(len(MEASURED[g]), 3, generator=torch.Generator().manual_seed(g)).double() for g in MEASURED}
    monkeypatch.setattr(menu, "choose_layers", lambda layers, *_: layers[1:4])
    monkeypatch.setattr(menu, "measured_errors", lambda job, store, layers, g: {"errors": tables[g]})
    monkeypatch.setattr(menu, "pieces", lambda ranks, folder, names, make: [make(name) for name in names])
    config = SimpleNamespace(share_codebooks="unet", seed=0)
    job = SimpleNamespace(config=config, bank_memory_gb=1.0, ranks=None, folder=SimpleNamespace(work=Path("work")))
    falls = error_falls(job, None, LAYERS)
    wanted = [[plain_fall(tables, g, bits, k) for g in MEASURED for bits in offered(g)] for k in range(3)]
    for layer, fall in zip(LAYERS[1:4], wanted, strict=True):
        assert falls[layer.name] == pytest.approx(fall)
    means = [math.prod(column) ** (1 / 3) for column in zip(*wanted, strict=True)]
    assert falls["mid_block.0"] == pytest.approx(means) and falls["mid_block.4"] == pytest.approx(means)


def plain_fall(tables, g, bits, k):
    """Of layer k: error at so many bits over that at 8 bits for 4 columns; a straight line in decibels in between."""
    rates = MEASURED[g]
    below = max(r for r in rates if r <= bits)
    above = min(r for r in rates if r >= bits)
    low, high = (tables[g][rates.index(r), k].item() for r in (below, above))
    share = (bits - below) / (above - below) if above > below else 0.0
    return low ** (1 - share) * high**share / tables[4][MEASURED[4].index(8), k].item()
