"""Compare scored runs: a table in markdown, LaTeX and CSV, and a figure of bits against quality.

The table has a row of full precision, and one of the noise floor: full precision against itself.
"""

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

from vqdm.config import COMPONENTS
from vqdm.documents import read_json
from vqdm.errors import UserError
from vqdm.metrics.catalogue import METRICS
from vqdm.metrics.config import CompareConfig
from vqdm.metrics.results import SCHEMA, number
from vqdm.storage.files import locked, save_bytes, save_text

FULL, FLOOR = "full precision", "noise floor"
# Panels of the figure if none are named, the most important first.
PANELS = ("fid", "fid_fp", "clip", "pickscore", "image_reward", "lpips", "psnr", "ssim")
MOST_PANELS, COLUMNS = 6, 3
MARKERS, LINE = "osD^vP", "#5b5852"
# Scores against the reference images have a noise floor.
AGAINST_REFERENCE = tuple(name for name, metric in METRICS.items() if "reference" in metric.needs)


@dataclass(frozen=True)
class RunRecord:
    """The content of one metrics.json.

    Attributes:
        path: where it was read from.
        source: the quantized folder that generated the images, or the folder of images if that is unknown.
        bits: stored bits per weight of the whole denoiser; None if unknown.
        megabytes: of the files of the denoiser.
        original: megabytes of the unquantized denoiser.
        full_precision: whether the images are those of an unquantized denoiser.
        floor: whether both sets are of full precision, so that the scores measure rounding alone.
        metrics: name → entry of metrics.json.
    """

    path: Path
    source: Path
    name: str
    bits: float | None
    megabytes: float | None
    original: float | None
    full_precision: bool
    floor: bool
    metrics: dict[str, dict]


@dataclass(frozen=True)
class Cell:
    """A value, and its interval if it has one."""

    value: float
    interval: Sequence[float] | None = None


@dataclass(frozen=True)
class RunRow:
    """A row of the comparison; `kind` is FULL, FLOOR or "" for a quantized run."""

    name: str
    kind: str
    bits: float | None
    megabytes: float | None
    cells: dict[str, Cell] = field(default_factory=dict)


@dataclass(frozen=True)
class Comparison:
    """Rows under columns: metric → its label."""

    rows: list[RunRow]
    columns: dict[str, str]

    @property
    def runs(self) -> list[RunRow]:
        return [row for row in self.rows if not row.kind]

    def row(self, kind: str) -> RunRow | None:
        return next((row for row in self.rows if row.kind == kind), None)

    def best(self, name: str) -> float | None:
        """Return the best value of a column among the quantized runs, or None if there are not several."""
        values = [row.cells[name].value for row in self.runs if name in row.cells]
        return (max if METRICS[name].higher else min)(values) if len(values) > 1 else None


@dataclass(frozen=True)
class ComparisonResult:
    """The result of a finished comparison."""

    comparison: Comparison
    folder: Path
    warnings: list[str]


def compare_runs(config: CompareConfig) -> ComparisonResult:
    """Write comparison.md, .tex, .csv and pareto.png, .svg.

    Raises:
        UserError: a run is not found, or values cannot be compared and `force` is off.
    """
    names = config.names or (None,) * len(config.runs)
    runs = [read_run(path, name) for path, name in zip(config.runs, names, strict=True)]
    runs = runs if config.names else with_unique_names(runs)
    differing = incomparable(runs)
    if differing and not config.force:
        raise UserError(f"the runs cannot be compared: {'; '.join(differing)}; --force compares them anyway")
    comparison = compare(runs)
    chosen = panels(comparison, config.plot)
    folder = Path(config.output_dir)
    with locked(folder):
        for suffix, write in {"md": markdown, "tex": latex, "csv": table_csv}.items():
            save_text(write(comparison), folder / f"comparison.{suffix}")
        for suffix, data in plot_pareto(comparison, chosen).items():
            save_bytes(data, folder / f"pareto.{suffix}")
    unknown = [row.name for row in comparison.runs if row.bits is None]
    lines = [f"not comparable: {line}" for line in differing]
    lines += [f"not in the figure, without a summary.json that has their bits: {', '.join(unknown)}"] if unknown else []
    return ComparisonResult(comparison, folder, lines)


# --------------------------------------------------------------------------------------------- reading


def read_run(path: str, name: str | None = None) -> RunRecord:
    """Read a run from its metrics.json, the folder of it, or the folder of images around that.

    Raises:
        UserError: none of them is found, or it is not a record of metrics.py.
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


def _run(file: Path, record: dict, name: str | None) -> RunRecord:
    if record["schema"] != SCHEMA:
        raise ValueError(record["schema"])
    size, settings = record["size"], record["run"].get("settings") or {}
    source = Path(settings.get("quantized") or record["images"])
    bits, megabytes, original = _size(size)
    found = {name: record["metrics"][name] for name in METRICS if name in record["metrics"]}
    for entry in found.values():
        _check_entry(entry)
    full, both = record["full_precision"] is True, record["reference_full_precision"] is True
    alike = both and not record["mismatches"]
    return RunRecord(
        path=file,
        source=source,
        name=name or source.name,
        bits=bits,
        megabytes=megabytes,
        original=original,
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


def _size(size: dict) -> tuple[float | None, float | None, float | None]:
    """Return bits per weight, megabytes, and those of the original: of both experts together, where there are two."""
    parts = [part for part in COMPONENTS if f"effective_bits_{part}" in size] or COMPONENTS[:1]
    bits = [_number(size.get(f"effective_bits_{part}")) for part in parts]
    sizes = [[_megabytes(size.get(f"{name}_{part}")) for part in parts] for name in ("bytes_of", "bytes_of_original")]
    megabytes, original = (None if None in some else sum(some) for some in sizes)
    if len(parts) == 1 or not megabytes or not all(bits):
        return bits[0], megabytes, original
    weights = sum(held / each for held, each in zip(sizes[0], bits, strict=True))  # in proportion to their numbers
    return megabytes / weights, megabytes, original


def _number(value) -> float | None:
    """Return a finite number, or None. Raises ValueError for anything else."""
    if value is not None and (isinstance(value, bool | str) or not math.isfinite(value)):
        raise ValueError(value)
    return value


# --------------------------------------------------------------------------------------------- comparing


def with_unique_names(runs: Sequence[RunRecord]) -> list[RunRecord]:
    """Add the folder above to names that several runs have, as results of scripts/quantization.sh do."""
    seen = Counter(run.name for run in runs)
    return [replace(run, name="/".join(run.source.parts[-2:])) if seen[run.name] > 1 else run for run in runs]


def incomparable(runs: Sequence[RunRecord]) -> list[str]:
    """Return lines about metrics that runs computed with different networks or numbers of images."""
    lines = []
    for name in METRICS:
        seen = {f"{run.metrics[name]['label']}, N = {run.metrics[name]['n']}" for run in runs if name in run.metrics}
        if len(seen) > 1:
            lines.append(f"{name}: {' and '.join(sorted(seen))}")
    return lines


def compare(runs: Sequence[RunRecord]) -> Comparison:
    """Order rows: full precision, then the noise floor, then the quantized runs by falling bits."""
    quantized = [run for run in runs if not run.full_precision]
    rows = [full_row(runs), floor_row(runs)]
    rows += [RunRow(run.name, "", run.bits, run.megabytes, cells_of(run)) for run in quantized]
    kept = [row for row in rows if row is not None]
    kept.sort(key=lambda row: (row.kind != FULL, row.kind != FLOOR, -(row.bits or 0), row.name))
    names = [name for name in METRICS if any(name in row.cells for row in kept)]
    labels = {name: next(run.metrics[name]["label"] for run in runs if name in run.metrics) for name in names}
    return Comparison(kept, labels)


def cells_of(run: RunRecord) -> dict[str, Cell]:
    return {name: Cell(one["value"], one["interval"]) for name, one in run.metrics.items()}


def full_row(runs: Sequence[RunRecord]) -> RunRow | None:
    """Return the row of the full-precision model: from a run of it, else from the reference of quantized runs."""
    cells = {}
    for run in runs:
        for name, one in run.metrics.items():
            if one["reference"] is not None:
                cells.setdefault(name, Cell(one["reference"]))
    for run in runs:
        if run.full_precision:
            cells |= {name: cell for name, cell in cells_of(run).items() if name not in AGAINST_REFERENCE}
    known = next((run for run in runs if run.original and run.bits and run.megabytes), None)
    # The record holds only the size of the original; its bits per weight follow from those of the quantized denoiser.
    bits = known and float(round(known.bits * known.original / known.megabytes))
    return RunRow(FULL, FULL, bits, known and known.original, cells) if cells else None


def floor_row(runs: Sequence[RunRecord]) -> RunRow | None:
    """Return the row of full precision against itself: the effect of rounding alone."""
    for run in runs:
        if run.floor:
            cells = {name: cell for name, cell in cells_of(run).items() if name in AGAINST_REFERENCE}
            return RunRow(FLOOR, FLOOR, None, None, cells)
    return None


# --------------------------------------------------------------------------------------------- writing


def markdown(comparison: Comparison) -> str:
    """Format a table for GitHub; the best quantized run of each column is bold."""
    head = ["", "bits", "MB", *(f"{label} {METRICS[name].arrow}" for name, label in comparison.columns.items())]
    lines = [head, ["---", *["---:"] * (len(head) - 1)]]
    lines += [_cells(comparison, row, "**{}**".format, "–") for row in comparison.rows]
    escaped = [[cell.replace("|", "\\|") for cell in line] for line in lines]
    return "".join(f"| {' | '.join(line)} |\n" for line in escaped)


def latex(comparison: Comparison) -> str:
    """Format a booktabs table of the same content."""
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


def _cells(comparison: Comparison, row: RunRow, bold, none: str, text=str) -> list[str]:
    """Format the cells of a row."""
    cells = [text(row.name), number(row.bits, 2) or none, number(row.megabytes, 1) or none]
    for name in comparison.columns:
        cell = row.cells.get(name)
        value = number(cell.value, METRICS[name].decimals) if cell else none
        cells.append(bold(value) if cell and not row.kind and cell.value == comparison.best(name) else value)
    return cells


_TEX = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}


def _tex(text: str) -> str:
    """Escape text for LaTeX."""
    return re.sub(r"[\\~^&%$#_{}]", lambda sign: _TEX.get(sign[0], "\\" + sign[0]), text)


def table_csv(comparison: Comparison) -> str:
    """Format all values unrounded, with the ends of their intervals."""
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


# --------------------------------------------------------------------------------------------- figure


def front(points: Sequence[tuple[float, float]], higher: bool) -> list[int]:
    """Return the indices of the Pareto-optimal (bits, value) points, by rising bits."""
    sign = 1 if higher else -1

    def beaten(k: int) -> bool:
        bits, value = points[k]
        return any(
            other_bits <= bits and sign * other >= sign * value and (other_bits, other) != (bits, value)
            for other_bits, other in points
        )

    return sorted((k for k in range(len(points)) if not beaten(k)), key=lambda k: points[k][0])


def panels(comparison: Comparison, wanted: Sequence[str] | None) -> list[str]:
    """Choose the metrics of the figure.

    Raises:
        UserError: a wanted one is in no run.
    """
    missing = [name for name in wanted or () if name not in comparison.columns]
    if missing:
        raise UserError(f"--plot: {missing[0]} is in no run; allowed are {', '.join(comparison.columns)}")
    usual = [name for name in PANELS if name in comparison.columns] or list(comparison.columns)
    return list(wanted or usual[:MOST_PANELS])


def plot_pareto(comparison: Comparison, names: Sequence[str]) -> dict[str, bytes]:
    """Plot the figure as "png" and "svg" files; equal input gives equal bytes."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    columns = 2 if len(names) == 4 else min(COLUMNS, len(names))
    rows = -(-len(names) // columns)
    style = {"svg.hashsalt": "vqdm", "svg.fonttype": "none", "font.size": 9, "axes.grid": True, "grid.color": "#e6e3dc"}
    style |= {"text.parse_math": False}  # names are no formulas
    with rc_context(style):
        figure = Figure(figsize=(4.2 * columns, 3.4 * rows + 0.4), layout="constrained")
        marks = {}
        for place, name in enumerate(names):
            marks |= plot_panel(figure.add_subplot(rows, columns, place + 1), comparison, name)
        if marks:
            figure.legend(marks.values(), marks.keys(), loc="outside lower center", ncols=2 * columns, frameon=False)
        files = {}
        for kind, metadata in (("png", {"Software": None}), ("svg", {"Date": None})):
            buffer = io.BytesIO()
            figure.savefig(buffer, format=kind, dpi=160, metadata=metadata)
            files[kind] = buffer.getvalue()
    return files


def plot_panel(axes, comparison: Comparison, name: str) -> dict:
    """Plot one metric, up is better: runs with their intervals, the front, full precision and the noise floor.

    Returns:
        Label → mark of the legend.
    """
    higher = METRICS[name].higher
    shown = [(k, row) for k, row in enumerate(comparison.runs) if row.bits is not None and name in row.cells]
    points = [(row.bits, row.cells[name].value) for _, row in shown]
    best = [points[k] for k in front(points, higher)]
    axes.plot([bits for bits, _ in best], [value for _, value in best], color=LINE, linewidth=1, zorder=2)
    marks = {}
    for k, row in shown:
        cell = row.cells[name]
        low, high = cell.interval or (cell.value, cell.value)
        # A percentile interval may leave out the value itself; a bar cannot have a negative length.
        bars = [[max(0, cell.value - low)], [max(0, high - cell.value)]]
        mark = {"fmt": MARKERS[k % len(MARKERS)], "color": f"C{k}"}
        marks[row.name] = axes.errorbar(row.bits, cell.value, bars, **mark, zorder=3)
    for kind, style in ((FULL, "--"), (FLOOR, ":")):
        row = comparison.row(kind)
        if row is None or name not in row.cells:
            continue
        value = row.cells[name].value
        if kind == FULL or not is_far(value, [one for _, one in points]):
            marks[kind] = axes.axhline(value, color=LINE, linestyle=style, linewidth=1, zorder=1)
        else:
            text = f"{kind} {number(value, METRICS[name].decimals)}"
            axes.annotate(text, (0, 1), (4, -10), xycoords="axes fraction", textcoords="offset points", fontsize=7.5)
    axes.set_xlabel("stored bits per weight, whole denoiser")
    axes.set_title(comparison.columns[name], fontsize=9)
    axes.margins(x=0.12, y=0.12)
    axes.spines[["top", "right"]].set_visible(False)
    if not higher:
        axes.invert_yaxis()
        axes.set_ylabel("less is better →", fontsize=8)
    return marks


def is_far(value: float, values: Sequence[float]) -> bool:
    """Return whether a line at `value` would squeeze the points together."""
    span = max(values, default=0) - min(values, default=0)
    return bool(values) and min(abs(value - one) for one in values) > 1.5 * span
