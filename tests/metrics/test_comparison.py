"""Comparing runs from hand-written records."""

import csv
import io
import json
import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
from metrics import main
from PIL import Image

from vqdm.cli import run_script
from vqdm.metrics.comparison import (
    compare,
    front,
    incomparable,
    is_far,
    latex,
    markdown,
    read_run,
    table_csv,
)

LABELS = {"clip": "CLIP score[a_b]", "psnr": "PSNR (dB)", "fid_fp": "FID-8[clean] to full precision"}


def record(values: dict, bits: float | None = None, full: bool = False, **changes) -> dict:
    size = {"effective_bits_unet": bits, "bytes_of_unet": bits * 1e6, "bytes_of_original_unet": 16e6} if bits else {}
    metrics = {
        name: {"label": LABELS[name], "value": value, "interval": [value - 1, value + 1], "n": 8, "reference": None}
        for name, value in values.items()
    }
    if "clip" in metrics and not full:
        metrics["clip"]["reference"] = 30.0
    run = {"settings": {"quantized": None if full else f"out/model_{bits}"}}
    whole = {"schema": 1, "images": "out/images", "full_precision": full, "reference_full_precision": True}
    return whole | {"size": size, "run": run, "metrics": metrics, "mismatches": []} | changes


RECORDS = {
    "four": record({"clip": 29.5, "psnr": 30.0, "fid_fp": 5.0}, 4.0),
    "three": record({"clip": 29.75, "psnr": 25.0, "fid_fp": 9.0}, 3.0),
    "two": record({"clip": 20.0, "psnr": 20.0, "fid_fp": 50.0}, 2.0),
    "floor": record({"clip": 30.5, "psnr": 60.0, "fid_fp": 0.25}, full=True),
}


@pytest.fixture
def runs(tmp_path) -> dict[str, Path]:
    """Folders of images, each with its record where metrics.py puts it."""
    for name, one in RECORDS.items():
        folder = tmp_path / name / "metrics"
        folder.mkdir(parents=True)
        (folder / "metrics.json").write_text(json.dumps(one))
    return {name: tmp_path / name for name in RECORDS}


@pytest.fixture
def comparison(runs):
    return compare([read_run(str(path)) for path in runs.values()])


def test_results_of_one_name_get_that_of_the_folder_above(tmp_path, runs):
    for bits in (3, 2):
        one = record({"psnr": 10.0 * bits}, bits) | {
            "run": {"settings": {"quantized": f"out/sdxl-{bits}bit/quantized"}}
        }
        (tmp_path / f"{bits}.json").write_text(json.dumps(one))
    places = [str(tmp_path / "3.json"), str(tmp_path / "2.json"), str(runs["four"])]
    words = ["compare", *places, "--force", "--output_dir", str(tmp_path / "out")]
    assert run_script(main, words) == 0
    rows = list(csv.DictReader(io.StringIO((tmp_path / "out" / "comparison.csv").read_text())))
    names = [row["name"] for row in rows if row["kind"] == "quantized"]
    assert names == ["model_4.0", "sdxl-3bit/quantized", "sdxl-2bit/quantized"]
    assert run_script(main, [*words, "--names", "a", "a", "b"]) == 0
    assert "sdxl" not in (tmp_path / "out" / "comparison.csv").read_text()


def test_runs_are_found_by_any_of_their_paths(runs):
    places = runs["four"], runs["four"] / "metrics", runs["four"] / "metrics" / "metrics.json"
    assert len({read_run(str(place)).bits for place in places}) == 1


def test_rows_are_full_precision_then_floor_then_falling_bits(comparison):
    assert [row.name for row in comparison.rows] == [
        "full precision", "noise floor", "model_4.0", "model_3.0", "model_2.0"
    ]  # fmt: skip
    full, floor = comparison.rows[:2]
    assert (full.bits, full.megabytes, full.cells["clip"].value) == (16.0, 16.0, 30.5)
    assert set(full.cells) == {"clip"} and set(floor.cells) == {"psnr", "fid_fp"}


def test_full_precision_is_known_from_the_quantized_runs_alone(runs):
    found = compare([read_run(str(runs["three"]))])
    assert found.rows[0].name == "full precision" and found.rows[0].cells["clip"].value == 30.0
    assert found.row("noise floor") is None


def test_a_forced_comparison_is_no_noise_floor(runs):
    path = runs["floor"] / "metrics" / "metrics.json"
    path.write_text(json.dumps(RECORDS["floor"] | {"mismatches": ["seed is 1, the reference's 0"]}))
    assert not read_run(str(path)).floor


def test_markdown_marks_the_best_quantized_run(comparison):
    lines = markdown(comparison).splitlines()
    assert lines[0].startswith("|  | bits | MB | CLIP score[a_b] ↑ | FID-8[clean] to full precision ↓ | PSNR (dB) ↑ |")
    assert lines[2] == "| full precision | 16.00 | 16.0 | 30.50 | – | – |"
    assert lines[4] == "| model_4.0 | 4.00 | 4.0 | 29.50 | **5.000** | **30.00** |"
    assert "**29.75**" in lines[5] and len({line.count("|") for line in lines}) == 1


def test_latex_is_whole_and_literal(comparison):
    text = latex(comparison)
    assert r"CLIP score[a\_b] $\uparrow$" in text and r"model\_4.0 & 4.00 & 4.0 & 29.50 & \textbf{5.000}" in text
    body = [line for line in text.splitlines() if line.endswith(r"\\")]
    assert {line.count("&") for line in body} == {5} and r"{lrrrrr}" in text
    assert text.count(r"\begin{tabular}") == text.count(r"\end{tabular}") == 1


def test_csv_keeps_all_digits_and_intervals(comparison):
    rows = list(csv.DictReader(io.StringIO(table_csv(comparison))))
    assert rows[3]["clip"] == "29.75" and (rows[3]["clip_low"], rows[3]["clip_high"]) == ("28.75", "30.75")
    assert rows[0]["kind"] == "full precision" and rows[2]["kind"] == "quantized" and rows[0]["psnr"] == ""


def test_other_networks_and_numbers_are_not_comparable(runs, tmp_path, capsys):
    other = json.loads(json.dumps(RECORDS["two"]))
    other["metrics"]["clip"]["n"] = 9
    other["metrics"]["psnr"]["label"] = "PSNR (other)"
    (tmp_path / "other.json").write_text(json.dumps(other))
    lines = incomparable([read_run(str(runs["four"])), read_run(str(tmp_path / "other.json"))])
    assert lines == [
        "clip: CLIP score[a_b], N = 8 and CLIP score[a_b], N = 9",
        "psnr: PSNR (dB), N = 8 and PSNR (other), N = 8",
    ]
    words = ["compare", str(runs["four"]), str(tmp_path / "other.json"), "--output_dir", str(tmp_path / "out")]
    assert run_script(main, words) == 2 and not (tmp_path / "out").exists()
    assert "the runs cannot be compared: clip: " in capsys.readouterr().err
    assert run_script(main, [*words, "--force"]) == 0
    assert "not comparable: clip" in capsys.readouterr().out


def test_the_command_writes_tables_and_figure(runs, tmp_path, capsys):
    out = tmp_path / "out"
    words = ["compare", *map(str, runs.values()), "--names", "_a", "b$x_$", "c|d", "e", "--output_dir", str(out)]
    assert run_script(main, words) == 0
    assert "| c\\|d | 2.00 |" in capsys.readouterr().out
    assert sorted(path.name for path in out.iterdir()) == [
        "comparison.csv", "comparison.md", "comparison.tex", "pareto.png", "pareto.svg"
    ]  # fmt: skip
    with Image.open(out / "pareto.png") as image:
        assert image.width > 1500
    texts = {"".join(node.itertext()) for node in ElementTree.parse(out / "pareto.svg").iter() if "text" in node.tag}
    assert {"_a", "b$x_$", "c|d", "full precision", LABELS["psnr"], LABELS["fid_fp"]} <= texts
    assert not re.search(rb"\d{4}-\d\d-\d\dT", (out / "pareto.svg").read_bytes())
    first = (out / "pareto.svg").read_bytes(), (out / "pareto.png").read_bytes()
    assert run_script(main, words) == 0
    assert first == ((out / "pareto.svg").read_bytes(), (out / "pareto.png").read_bytes())


def test_runs_without_bits_are_named(tmp_path, capsys):
    (tmp_path / "x.json").write_text(json.dumps(record({"psnr": 20.0}) | {"images": "out/unknown"}))
    assert run_script(main, ["compare", str(tmp_path / "x.json"), "--output_dir", str(tmp_path / "out")]) == 0
    assert "without a summary.json that has their bits: model_None" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("nowhere", "RUN nowhere holds no metrics.json; score it first"),
        ("README.md", "RUN README.md is not a record of metrics.py"),
        ("FOUR --names a b", "--names gives 2 names for 1 runs"),
        ("FOUR --plot lpips", "--plot: lpips is in no run; allowed are clip, fid_fp, psnr"),
        ("", "the following arguments are required: RUN"),
    ],
)
def test_bad_input_is_one_line(runs, tmp_path, capsys, words, message):
    line = [str(runs["four"]) if word == "FOUR" else word for word in words.split()]
    assert run_script(main, ["compare", *line, "--output_dir", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and not (tmp_path / "out").exists()


# --------------------------------------------------------------------------------------------- figure


def test_front_keeps_what_nothing_beats():
    points = [(4.0, 30.0), (3.0, 25.0), (3.5, 24.0), (2.0, 20.0), (2.0, 19.0)]
    assert front(points, higher=True) == [3, 1, 0]
    assert front([(b, -v) for b, v in points], higher=False) == [3, 1, 0]
    assert front([(2.0, 1.0), (2.0, 1.0)], higher=True) == [0, 1]


def test_a_line_far_from_all_points_is_left_out():
    assert is_far(100, [30, 32]) and not is_far(34, [30, 32]) and not is_far(5, [])
