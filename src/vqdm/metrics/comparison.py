"""Runs side by side: the paper's table in markdown, LaTeX and CSV, with the full-precision row and the noise floor."""

from __future__ import annotations

import csv
import io
import math
import re
import shlex
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from vqdm.documents import read_json
from vqdm.errors import UserError
from vqdm.metrics.catalogue import METRICS
from vqdm.metrics.results import SCHEMA, number

FULL, FLOOR = "full precision", "noise floor"
# Scores of a picture against its partner, or of a set against the partners' set: they have a noise floor.
AGAINST_FULL = tuple(name for name, metric in METRICS.items() if "reference" in metric.needs)


@dataclass(frozen=True)
class Run:
    """What one metrics.json says.

    Attributes:
        path: where it was read from.
        drawn: the quantized folder that drew, or where that is not known the folder of pictures.
        bits: stored bits a parameter of the whole UNet; None where unknown.
        megabytes: of the UNet's files.
        original: megabytes of the UNet before.
        full_precision: whether an unquantized UNet drew.
        floor: whether both sets are of full precision, so that the scores are those of rounding alone.
        metrics: name → entry of metrics.json.
    """

    path: Path
    drawn: Path
    name: str
    bits: float | None
    megabytes: float | None
    original: float | None
    full_precision: bool
    floor: bool
    metrics: dict[str, dict]


@dataclass(frozen=True)
class Cell:
    """A value, and its interval where it has one."""

    value: float
    interval: Sequence[float] | None = None


@dataclass(frozen=True)
class Row:
    """A line of the comparison; `kind` is FULL, FLOOR or "" for a quantized run."""

    name: str
    kind: str
    bits: float | None
    megabytes: float | None
    cells: dict[str, Cell] = field(default_factory=dict)


@dataclass(frozen=True)
class Comparison:
    """Rows under columns: metric → its label."""

    rows: list[Row]
    columns: dict[str, str]

    @property
    def runs(self) -> list[Row]:
        return [row for row in self.rows if not row.kind]

    def row(self, kind: str) -> Row | None:
        return next((row for row in self.rows if row.kind == kind), None)

    def best(self, name: str) -> float | None:
        """The best value of a column among the quantized runs, where there are several."""
        values = [row.cells[name].value for row in self.runs if name in row.cells]
        return (max if METRICS[name].higher else min)(values) if len(values) > 1 else None


# --------------------------------------------------------------------------------------------- reading


def read_run(path: str, name: str | None = None) -> Run:
    """A run from its metrics.json, the folder of it, or the folder of pictures around that.

    Raises:
        UserError: none of them is there, or it is not a record of metrics.py.
    """
    places = [Path(path), Path(path) / "metrics.json", Path(path) / "metrics" / "metrics.json"]
    file = next((place for place in places if place.is_file()), None)
    if file is None:
        command = shlex.join(["python", "metrics.py", path])
        raise UserError(f"RUN {path} holds no metrics.json; score it first: {command}")
    try:
        return _run(file, read_json(file), name)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"RUN {file} is not a record of metrics.py of schema {SCHEMA}") from None


def _run(file: Path, record: dict, name: str | None) -> Run:
    if record["schema"] != SCHEMA:
        raise ValueError(record["schema"])
    size, settings = record["size"], record["run"].get("settings") or {}
    drawn = Path(settings.get("quantized") or record["images"])
    found = {name: record["metrics"][name] for name in METRICS if name in record["metrics"]}
    for entry in found.values():
        _check_entry(entry)
    full, both = record["full_precision"] is True, record["reference_full_precision"] is True
    alike = both and not record["mismatches"]
    return Run(
        path=file,
        drawn=drawn,
        name=name or drawn.name,
        bits=_number(size.get("effective_bits_unet")),
        megabytes=_megabytes(size.get("bytes_of_unet")),
        original=_megabytes(size.get("bytes_of_original_unet")),
        full_precision=full,
        floor=full and alike,
        metrics=found,
    )


def _megabytes(count: int | None) -> float | None:
    return _number(count) / 1e6 if count else None


def _check_entry(entry: dict) -> None:
    """Raise ValueError unless a metric's entry has the types that tables and figures need."""
    _number(entry["reference"])
    interval = entry["interval"] or (0, 0)
    if None in (entry["value"], *map(_number, (entry["value"], *interval))) or len(interval) != 2:
        raise ValueError(entry)
    if not isinstance(entry["label"], str) or not isinstance(entry["n"], int) or not entry["label"].isprintable():
        raise ValueError(entry)


def _number(value) -> float | None:
    """A finite number, or None. Raises ValueError for anything else."""
    if value is not None and (isinstance(value, bool | str) or not math.isfinite(value)):
        raise ValueError(value)
    return value


# --------------------------------------------------------------------------------------------- comparing


def told_apart(runs: Sequence[Run]) -> list[Run]:
    """The runs, those of one name with the folder above in it: scripts/quantization.sh has one name for all results."""
    seen = Counter(run.name for run in runs)
    return [replace(run, name="/".join(run.drawn.parts[-2:])) if seen[run.name] > 1 else run for run in runs]


def incomparable(runs: Sequence[Run]) -> list[str]:
    """Lines about metrics that mean different things in different runs: another network, or another N."""
    lines = []
    for name in METRICS:
        seen = {f"{run.metrics[name]['label']}, N = {run.metrics[name]['n']}" for run in runs if name in run.metrics}
        if len(seen) > 1:
            lines.append(f"{name}: {' and '.join(sorted(seen))}")
    return lines


def compare(runs: Sequence[Run]) -> Comparison:
    """Full precision, then the noise floor, then the quantized runs by falling bits."""
    quantized = [run for run in runs if not run.full_precision]
    rows = [full_row(runs), floor_row(runs)]
    rows += [Row(run.name, "", run.bits, run.megabytes, cells_of(run)) for run in quantized]
    kept = [row for row in rows if row is not None]
    kept.sort(key=lambda row: (row.kind != FULL, row.kind != FLOOR, -(row.bits or 0), row.name))
    names = [name for name in METRICS if any(name in row.cells for row in kept)]
    labels = {name: next(run.metrics[name]["label"] for run in runs if name in run.metrics) for name in names}
    return Comparison(kept, labels)


def cells_of(run: Run) -> dict[str, Cell]:
    return {name: Cell(one["value"], one["interval"]) for name, one in run.metrics.items()}


def full_row(runs: Sequence[Run]) -> Row | None:
    """The full-precision model: from a run of it, else from what quantized runs say of their reference."""
    cells = {}
    for run in runs:
        for name, one in run.metrics.items():
            if one["reference"] is not None:
                cells.setdefault(name, Cell(one["reference"]))
    for run in runs:
        if run.full_precision:
            cells |= {name: cell for name, cell in cells_of(run).items() if name not in AGAINST_FULL}
    known = next((run for run in runs if run.original and run.bits and run.megabytes), None)
    # Of the original only its size is on record; bits a parameter follow from the quantized one's two figures.
    bits = known and float(round(known.bits * known.original / known.megabytes))
    return Row(FULL, FULL, bits, known and known.original, cells) if cells else None


def floor_row(runs: Sequence[Run]) -> Row | None:
    """Full precision against itself: what rounding alone does to the scores of pairs."""
    run = next((run for run in runs if run.floor), None)
    if run is None:
        return None
    return Row(FLOOR, FLOOR, None, None, {name: cell for name, cell in cells_of(run).items() if name in AGAINST_FULL})


# --------------------------------------------------------------------------------------------- writing


def markdown(comparison: Comparison) -> str:
    """A table as GitHub shows it; the best quantized run of each column is bold."""
    head = ["", "bits", "MB", *(f"{label} {METRICS[name].arrow}" for name, label in comparison.columns.items())]
    lines = [head, ["---", *["---:"] * (len(head) - 1)]]
    lines += [_cells(comparison, row, "**{}**".format, "–") for row in comparison.rows]
    escaped = [[cell.replace("|", "\\|") for cell in line] for line in lines]
    return "".join(f"| {' | '.join(line)} |\n" for line in escaped)


def latex(comparison: Comparison) -> str:
    """A booktabs table of the same content."""
    arrows = {True: r"$\uparrow$", False: r"$\downarrow$"}
    head = ["", "bits", "MB"]
    head += [f"{_tex(label)} {arrows[METRICS[name].higher]}" for name, label in comparison.columns.items()]
    groups = [[row for row in comparison.rows if row.kind], comparison.runs]
    bodies = [
        "".join(" & ".join(_cells(comparison, row, r"\textbf{{{}}}".format, "--", _tex)) + " \\\\\n" for row in group)
        for group in groups
        if group
    ]
    return (
        f"% needs \\usepackage{{booktabs}}\n\\begin{{tabular}}{{l{'r' * (len(head) - 1)}}}\n\\toprule\n"
        + f"{' & '.join(head)} \\\\\n\\midrule\n"
        + "\\midrule\n".join(bodies)
        + "\\bottomrule\n\\end{tabular}\n"
    )


def _cells(comparison: Comparison, row: Row, bold, none: str, text=str) -> list[str]:
    """A row's cells as text."""
    cells = [text(row.name), number(row.bits, 2) or none, number(row.megabytes, 1) or none]
    for name in comparison.columns:
        cell = row.cells.get(name)
        value = number(cell.value, METRICS[name].decimals) if cell else none
        cells.append(bold(value) if cell and not row.kind and cell.value == comparison.best(name) else value)
    return cells


_TEX = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}


def _tex(text: str) -> str:
    """Text that LaTeX takes literally."""
    return re.sub(r"[\\~^&%$#_{}]", lambda sign: _TEX.get(sign[0], "\\" + sign[0]), text)


def table_csv(comparison: Comparison) -> str:
    """All figures unrounded, with the ends of their intervals."""
    head = ["name", "kind", "bits", "megabytes"]
    for name in comparison.columns:
        head += [name, f"{name}_low", f"{name}_high"]
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(head)
    for row in comparison.rows:
        cells = [row.cells.get(name) for name in comparison.columns]
        values = [
            value for cell in cells for value in (cell and cell.value, *((cell and cell.interval) or (None, None)))
        ]
        writer.writerow([row.name, row.kind or "quantized", row.bits, row.megabytes, *values])
    return buffer.getvalue()
