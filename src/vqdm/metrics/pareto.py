"""Bits against quality, a panel a metric: the front, the full-precision line and the noise floor."""

from __future__ import annotations

import io
from collections.abc import Sequence

from vqdm.errors import UserError
from vqdm.metrics.catalogue import METRICS
from vqdm.metrics.comparison import FLOOR, FULL, Comparison, Row
from vqdm.metrics.results import number

# Panels where none are named, the most telling first.
USUAL = ("fid", "fid_fp", "clip", "pickscore", "hpsv2", "image_reward", "lpips", "psnr", "ssim")
MOST_PANELS, COLUMNS = 6, 3
BESIDE = (6, -11)  # points from a run's mark to its name
MOST_ROOM = 0.6
FRONT, DOMINATED, LINE = "#2456c9", "#a5a29b", "#5b5852"


def front(points: Sequence[tuple[float, float]], higher: bool) -> list[int]:
    """Indices of (bits, value) points that no other beats or equals in both and beats in one, by rising bits."""
    sign = 1 if higher else -1

    def beaten(k: int) -> bool:
        bits, value = points[k]
        return any(
            other_bits <= bits and sign * other >= sign * value and (other_bits, other) != (bits, value)
            for other_bits, other in points
        )

    return sorted((k for k in range(len(points)) if not beaten(k)), key=lambda k: points[k][0])


def panels(comparison: Comparison, wanted: Sequence[str] | None) -> list[str]:
    """Which metrics are drawn.

    Raises:
        UserError: a wanted one is in no run.
    """
    missing = [name for name in wanted or () if name not in comparison.columns]
    if missing:
        raise UserError(f"--plot: {missing[0]} is in no run; allowed are {', '.join(comparison.columns)}")
    usual = [name for name in USUAL if name in comparison.columns] or list(comparison.columns)
    return list(wanted or usual[:MOST_PANELS])


def draw_pareto(comparison: Comparison, names: Sequence[str]) -> dict[str, bytes]:
    """The figure as "png" and "svg" files; equal input gives equal bytes."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    columns = 2 if len(names) == 4 else min(COLUMNS, len(names))
    rows = -(-len(names) // columns)
    style = {"svg.hashsalt": "vqdm", "svg.fonttype": "none", "font.size": 9, "axes.grid": True, "grid.color": "#e6e3dc"}
    with rc_context(style):
        figure = Figure(figsize=(4.2 * columns, 3.4 * rows), layout="constrained")
        drawn = [(figure.add_subplot(rows, columns, place + 1), name) for place, name in enumerate(names)]
        for axes, name in drawn:
            draw_panel(axes, comparison, name)
        figure.draw_without_rendering()  # places of points are known from here on
        for axes, name in drawn:
            write_names(axes, [(row, row.cells[name].value) for row in shown(comparison, name)])
        files = {}
        for kind, metadata in (("png", {"Software": None}), ("svg", {"Date": None})):
            buffer = io.BytesIO()
            figure.savefig(buffer, format=kind, dpi=160, metadata=metadata)
            files[kind] = buffer.getvalue()
    return files


def draw_panel(axes, comparison: Comparison, name: str) -> None:
    """One metric; up is always better."""
    runs = shown(comparison, name)
    points = [(row.bits, row.cells[name].value) for row in runs]
    best = front(points, METRICS[name].higher)
    axes.plot([points[k][0] for k in best], [points[k][1] for k in best], color=FRONT, linewidth=1.2, zorder=2)
    for k, row in enumerate(runs):
        draw_point(axes, row, name, FRONT if k in best else DOMINATED)
    draw_lines(axes, comparison, name, [value for _, value in points])
    axes.set_xlabel("stored bits a parameter, whole UNet")
    axes.set_title(comparison.columns[name], fontsize=9)
    axes.margins(x=0.12, y=0.12)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    if not METRICS[name].higher:
        axes.invert_yaxis()
        axes.set_ylabel("less is better →", fontsize=8)


def shown(comparison: Comparison, name: str) -> list[Row]:
    """Runs whose bits and value are known."""
    return [row for row in comparison.runs if row.bits is not None and name in row.cells]


def draw_point(axes, row: Row, name: str, colour: str) -> None:
    """A run with its interval."""
    cell = row.cells[name]
    low, high = cell.interval or (cell.value, cell.value)
    # A percentile interval may leave out the value itself; a bar cannot have a negative length.
    bars = [[max(0, cell.value - low)], [max(0, high - cell.value)]]
    axes.errorbar(row.bits, cell.value, yerr=bars, fmt="o", color=colour, markersize=5, elinewidth=1, zorder=3)


def write_names(axes, points: Sequence[tuple[Row, float]]) -> None:
    """A name right below each point, where no rising front crosses it, pushed down until it is clear of the others."""
    taken = [text.get_window_extent() for text in axes.texts]
    words = {"textcoords": "offset points", "fontsize": 7.5, "color": LINE, "in_layout": False}
    labels = [axes.annotate(row.name, (row.bits, value), BESIDE, **words) for row, value in points]
    make_room(axes, labels)
    for label in sorted(labels, key=lambda one: -axes.transData.transform(one.xy)[1]):
        while any(label.get_window_extent().overlaps(box) for box in taken):
            label.xyann = (label.xyann[0], label.xyann[1] - 1)
        taken.append(label.get_window_extent())


def make_room(axes, labels: Sequence) -> None:
    """Widen the axis of bits until the longest name right of the last point fits, up to `MOST_ROOM` of the panel."""
    if not labels:
        return
    width = axes.get_window_extent().width
    longest = max(label.get_window_extent().width for label in labels) + 2 * BESIDE[0] * axes.figure.dpi / 72
    left, right = axes.get_xlim()
    last = max(label.xy[0] for label in labels)
    axes.set_xlim(left, max(right, left + (last - left) / (1 - min(longest / width, MOST_ROOM))))


def draw_lines(axes, comparison: Comparison, name: str, values: Sequence[float]) -> None:
    """Dashed: full precision; dotted: full precision against itself, or a note where that is far off the points."""
    words = {"xycoords": axes.get_yaxis_transform(), "textcoords": "offset points", "fontsize": 7.5, "color": LINE}
    for kind, style in ((FULL, "--"), (FLOOR, ":")):
        row = comparison.row(kind)
        if not row or name not in row.cells:
            continue
        value = row.cells[name].value
        if kind == FLOOR and far(value, values):
            text = f"{kind} {number(value, METRICS[name].decimals)}"
            axes.annotate(text, (0, 1), (4, -10), **words | {"xycoords": "axes fraction"})
            continue
        axes.axhline(value, color=LINE, linestyle=style, linewidth=1, zorder=1)
        axes.annotate(kind, (0, value), (4, 3), **words)


def far(value: float, values: Sequence[float]) -> bool:
    """Whether a line at `value` would squeeze the points together."""
    if not values:
        return False
    span = max(values) - min(values)
    return min(abs(value - one) for one in values) > 1.5 * span
