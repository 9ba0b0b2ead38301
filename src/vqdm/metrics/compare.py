"""Compare scored runs: from several metrics.json to one table and one figure."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from vqdm.errors import UserError
from vqdm.metrics.comparison import (
    Comparison,
    compare,
    incomparable,
    latex,
    markdown,
    read_run,
    table_csv,
    told_apart,
)
from vqdm.metrics.config import CompareConfig
from vqdm.metrics.pareto import draw_pareto, panels
from vqdm.storage.files import locked, save_bytes, save_text


@dataclass(frozen=True)
class Compared:
    """What a finished comparison has to say."""

    comparison: Comparison
    folder: Path
    warnings: list[str]


def compare_runs(config: CompareConfig) -> Compared:
    """Write comparison.md, .tex, .csv and pareto.png, .svg.

    Raises:
        UserError: a run is not there, or values cannot be compared and `force` is off.
    """
    names = config.names or (None,) * len(config.runs)
    runs = [read_run(path, name) for path, name in zip(config.runs, names, strict=True)]
    runs = runs if config.names else told_apart(runs)
    differing = incomparable(runs)
    if differing and not config.force:
        raise UserError(f"the runs cannot be compared: {'; '.join(differing)}; --force does it all the same")
    comparison = compare(runs)
    drawn = panels(comparison, config.plot)
    folder = Path(config.output_dir)
    writers = {"md": markdown, "tex": latex, "csv": table_csv}
    with locked(folder):
        for suffix, write in writers.items():
            save_text(write(comparison), folder / f"comparison.{suffix}")
        for suffix, data in draw_pareto(comparison, drawn).items():
            save_bytes(data, folder / f"pareto.{suffix}")
    unknown = [row.name for row in comparison.runs if row.bits is None]
    lines = [f"not comparable: {line}" for line in differing]
    lines += [f"not in the figure, since no summary.json tells their bits: {', '.join(unknown)}"] if unknown else []
    return Compared(comparison, folder, lines)
