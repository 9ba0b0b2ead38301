"""Turn the JSON lines of a benchmark folder into tables for RESULTS.md, on standard output.

    python benchmarks/tables.py out/gpu > tables.md

A section per `*.jsonl` file. Lines with the same names are rows of one table; other text in a file is left out.
"""

from __future__ import annotations

import argparse
import json
from itertools import groupby
from pathlib import Path


def rows_of(path: Path) -> list[dict]:
    """The JSON objects of a file, a line each."""
    found = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            value = json.loads(line)
        except json.JSONDecodeError:
            continue
        if isinstance(value, dict):
            found.append(value)
    return found


def cell(value) -> str:
    if value is None:
        return "–"
    if isinstance(value, float):
        return f"{value:.4g}"
    return str(value).replace("|", "\\|").replace("\n", " ")


def table(rows: list[dict]) -> list[str]:
    """Lines of a table of rows with the same names."""
    lines = ["| " + " | ".join(rows[0]) + " |", "|" + "---|" * len(rows[0])]
    return lines + ["| " + " | ".join(map(cell, row.values())) + " |" for row in rows]


def section(path: Path) -> list[str]:
    """A heading and the tables of a file; empty where it has no row."""
    tables = [table(list(alike)) for _, alike in groupby(rows_of(path), key=tuple)]
    lines = [line for one in tables for line in (*one, "")]
    return [f"## {path.stem}", "", *lines] if lines else []


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    print("\n".join(line for path in sorted(folder.glob("*.jsonl")) for line in section(path)))


if __name__ == "__main__":
    main()
