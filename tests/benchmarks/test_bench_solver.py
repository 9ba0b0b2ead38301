"""The solver's benchmark on layers of a toy size: its rows, and layers at once against one by one."""

import json
import sys

import bench_solver
import pytest


def printed(capsys, monkeypatch, words):
    monkeypatch.setattr(sys, "argv", ["bench_solver.py", "--shapes", "16x32", "--max_epochs", "2", *words])
    bench_solver.main()
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_every_code_has_a_row(capsys, monkeypatch):
    rows = printed(capsys, monkeypatch, ["--codes", "2x2g4", "1x4g4s"])
    assert [row["code"] for row in rows] == ["2x2g4", "1x4g4s"]
    assert all(0 < row["error"] < 1 and row["rows"] == 16 and row["columns"] == 32 for row in rows)


def test_layers_at_once_and_one_by_one_have_the_same_errors(capsys, monkeypatch):
    rows = printed(capsys, monkeypatch, ["--codes", "2x2g4", "1x4g4s", "--batch", "3"])
    assert [(row["code"], row["at_once"]) for row in rows] == [("2x2g4", 1), ("2x2g4", 3), ("1x4g4s", 1), ("1x4g4s", 3)]
    for one, all_of_them in zip(rows[::2], rows[1::2], strict=True):
        assert all_of_them["error"] == pytest.approx(one["error"], rel=0.05)
        assert one["layers"] == 3 and one["seconds"] > 0
