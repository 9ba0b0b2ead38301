"""The benchmark of trellis codes at a toy size: a tiny Gaussian, an encoder with random weights, narrow layers."""

import json
import sys
from types import SimpleNamespace

import bench_trellis
import pytest
import torch
from real.problems import Problem
from torch import nn

from vqdm.additive.code import CodeSpec


class Sum(nn.Module):
    """Two linear layers on rows of numbers."""

    def __init__(self):
        super().__init__()
        self.inner, self.outer = nn.Linear(64, 64), nn.Linear(64, 32)

    def forward(self, x):
        return SimpleNamespace(sample=self.outer(self.inner(x).relu()))


def problem(arguments):
    torch.manual_seed(0)
    model = Sum().requires_grad_(False)
    weights = {name: model.get_submodule(name).weight.detach().clone() for name in ("inner", "outer")}
    moments = {name: one.T @ one / 256 for name in weights for one in [torch.randn(256, 64)]}
    batches = [{"x": torch.randn(2, 4, 64)} for _ in range(4)]
    return Problem("minilm", model, weights, moments, moments, batches, batches, False, {"model": "sum"})


@pytest.fixture
def printed(capsys, monkeypatch):
    monkeypatch.setattr(bench_trellis, "load_minilm", problem)

    def run(*words):
        monkeypatch.setattr(sys, "argv", ["bench_trellis.py", *map(str, words)])
        bench_trellis.main()
        return [json.loads(line) for line in capsys.readouterr().out.splitlines()]

    return run


def test_a_gaussian_lies_between_the_bound_and_the_additive_code(printed):
    rows = printed("gaussian", "--size", 64, "--bits", 2, "--state_bits", 8, 10)
    names = [row["code"] for row in rows]
    assert names == ["trellis, 8 state bits", "trellis, 10 state bits", "shared codebook of 8 bits, groups of 4"]
    errors = [row["mean_squared_error_db"] for row in rows]
    assert all(row["bound_db"] < error for row, error in zip(rows, errors, strict=True))
    assert errors[1] < errors[0] < errors[2]
    scales_and_widths = (8 * 64 + 2 * 8 * 64) / 64**2
    assert rows[0]["stored_bits"] == pytest.approx(2 + scales_and_widths, abs=1e-4)


def test_rows_are_weighted_or_not(printed):
    _, alike, weighted = printed("rows", "--targets", 3, "--state_bits", 8)
    assert (alike["rows"], weighted["rows"]) == ("alike", "weighted")
    assert alike["stored_bits"] == pytest.approx(weighted["stored_bits"], abs=0.05)
    assert alike["output_error_db"] != weighted["output_error_db"]


def test_errors_are_predicted_and_found(printed, monkeypatch):
    low, high = printed("predict", "--bits", 2, 3, "--state_bits", 8)
    assert (low["code_bits"], high["code_bits"]) == (2, 3) and low["layers"] == high["layers"] == 2
    assert high["error_db_median"] < low["error_db_median"] - 4
    assert abs(low["prediction_off_db_median"]) < 0.5 and abs(high["prediction_off_db_median"]) < 0.5
    given = [("a", torch.randn(64, 16), torch.eye(16), None)]
    monkeypatch.setattr(bench_trellis, "model_layers", lambda model, cache, device: given)
    [row] = printed("predict", "--model", "m", "--hessian_cache", "c", "--bits", 2, "--state_bits", 8)
    assert row["layers"] == 1 and row["prediction_within_half_db"] == 1
    with pytest.raises(SystemExit):
        printed("predict", "--model", "m")


def test_weights_of_rows_are_kept_by_the_stored_scales():
    importance = torch.rand(48, generator=torch.Generator().manual_seed(0)) + 0.1
    roots = bench_trellis.scale_steps(importance)
    torch.testing.assert_close(roots.square(), importance, rtol=2 ** (1 / 16) - 1, atol=0)
    torch.testing.assert_close(roots.log2() * 16, (roots.log2() * 16).round(), rtol=0, atol=1e-3)


def test_layers_that_are_wide_or_long_are_taken_in_part(printed):
    *rows, whole = printed("cost", "--shapes", "320x64", "1280x64", "1280x128", "64x6000", "--state_bits", 8)
    assert [(row["rows"], row["columns"], row["rows_taken"]) for row in rows] == [
        (320, 64, 320),
        (1280, 64, 640),
        (1280, 128, 640),
    ]
    assert whole["cpu_seconds"] > 0 and whole["additive_seconds"] == 21_600


def test_codebooks_of_more_entries_are_trained_on_more_rows():
    small, large = CodeSpec(1, 8, 4), CodeSpec(1, 12, 4)
    assert bench_trellis.sampled_rows(large, 1024) == 512 > bench_trellis.sampled_rows(small, 1024)
