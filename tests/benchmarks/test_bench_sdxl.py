"""The phases of a part beside the plan, on a tiny pipeline; and the tables that JSON lines become."""

import argparse
import json
import sys

import bench_calibration
import bench_sdxl
import pytest
import tables
import torch


def test_a_row_per_phase_with_what_lived(pipelines, tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)  # one layer at a time
    given = {"work": tmp_path, "model": pipelines["sdxl"], "size": 64, "bits": 6, "device": "cpu", "dtype": "float32"}
    layers = {"layers": r"up_blocks.*(conv1|ff\.net\.2)", "widest": 23040, "tokenizer": None}
    monkeypatch.setattr(bench_sdxl, "STATE_BITS", ["--state_bits", "8"])
    *phases, last = bench_sdxl.rows(argparse.Namespace(**given, **layers))
    names = [row["phase"] for row in phases]
    assert names == ["teacher", "hessians", "allocation", "layers", "evaluation", "saving"]
    for row in phases[:-1]:
        assert 0.4 < row["part_live_gb"] / row["part_planned_gb"] < 1.2, row["phase"]  # of so few tensors
        assert row["part_seconds"] > 0 and row["whole_planned_gb"] > 0
    assert last["layers"] > 1 and last["rss_gb"] > 0.1 and last["written_gb"] > 0


def test_tables_have_a_row_per_line(tmp_path, capsys, monkeypatch):
    rows = [{"name": "a", "ms": 1.23456}, {"name": "b|c", "ms": None}, {"device": "x"}]
    (tmp_path / "decode.jsonl").write_text("warning: not JSON\n" + "".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "kernels.jsonl").write_text("12 passed\n")
    monkeypatch.setattr(sys, "argv", ["tables.py", str(tmp_path)])
    tables.main()
    lines = capsys.readouterr().out.splitlines()
    assert lines[:6] == ["## decode", "", "| name | ms |", "|---|---|", "| a | 1.235 |", r"| b\|c | – |"]
    assert "| x |" in lines and not any("kernels" in line for line in lines)


def test_loss_is_to_the_largest_pair():
    row = bench_calibration.summarized(16, 2, {"a": 0.02, "b": 0.4}, {"a": 0.01, "b": 0.4})
    assert row["points"] == 32 and row["most_lost_db"] == pytest.approx(3.01, abs=0.01)
    assert row["lost_db"] == pytest.approx(3.01 / 2, abs=0.01) and row["worst_layer_db"] == pytest.approx(
        -3.98, abs=0.01
    )


def test_codes_found_under_the_judge_are_best(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    W, X, other = (torch.randn(*shape, generator=generator) for shape in ((32, 48), (400, 48), (12, 48)))
    H, few = X.T @ X / 400, other.T @ other / 12
    assert bench_calibration.coded_error("a", W, H, H, 2.0) < bench_calibration.coded_error("a", W, few, H, 2.0) < 1
