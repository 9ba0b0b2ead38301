"""Output error of the denoiser against stored bits: a line of JSON for each finished run, and a plot.

    python benchmarks/bench_bits.py --ours out/bits/ours-* --plain out/bits/plain-* --plot docs/bits.png

The runs are folders that `main_text2image.py` wrote; `benchmarks/bits.sh` makes them.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

LABELS = {"plain": "published procedure, own codebooks", "ours": "vqdm --target_bits"}


def row(folder: str, kind: str) -> dict:
    """What a run's summary holds."""
    summary = json.loads((Path(folder) / "summary.json").read_text(encoding="utf-8"))
    layers, component = summary["layers"], summary["component"]
    return {
        "run": Path(folder).name,
        "kind": kind,
        "stored_bits": summary["effective_bits_layers"],
        "stored_bits_whole_model": summary[f"effective_bits_{component}"],
        "output_error_db": summary[f"{component}_output_error_db"],
        "output_error_db_median_point": summary[f"{component}_output_error_db_by_point"]["median"],
        "psnr_db": summary["images"]["psnr_db"],
        "seconds": summary["seconds"],
        "held_out_error_mean": sum(layer["held_out_error"] for layer in layers) / len(layers),
    }


def plot(rows: list[dict], path: str) -> None:
    """Error over bits, a line a kind."""
    figure, axes = plt.subplots(figsize=(6.4, 4), layout="constrained")
    for kind, style in (("plain", "s--"), ("ours", "o-")):
        points = sorted((row["stored_bits"], row["output_error_db"]) for row in rows if row["kind"] == kind)
        axes.plot(*zip(*points, strict=True), style, label=LABELS[kind])
    axes.set_xlabel("stored bits per weight, codebooks and scales included")
    axes.set_ylabel("output error on held-out prompts, dB")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ours", nargs="+", default=[], metavar="FOLDER")
    parser.add_argument("--plain", nargs="+", default=[], metavar="FOLDER")
    parser.add_argument("--plot", metavar="PNG")
    arguments = parser.parse_args()
    rows = [row(folder, kind) for kind in ("ours", "plain") for folder in getattr(arguments, kind)]
    for one in rows:
        print(json.dumps(one))
    if arguments.plot:
        plot(rows, arguments.plot)


if __name__ == "__main__":
    main()
