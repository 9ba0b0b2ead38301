"""Compute metrics of images, alone or against those of the full-precision model, and compare runs.

    python metrics.py out/images-3bit --reference out/images-full
    python metrics.py out/images-3bit --reference out/images-full --fid_reference coco.npz --metrics fid fid_fp clip
    python metrics.py real-images --save_stats coco.npz
    accelerate launch metrics.py out/images-3bit --reference out/images-full --bs 64
    python metrics.py compare out/images-4bit out/images-3bit out/images-2bit

IMAGES is a folder of generate.py, any folder of images, or a zip file; images of two folders are paired by prompt id
and sample. The result goes into IMAGES/metrics: metrics.json, per_image.csv and report.html.
"""

from __future__ import annotations

import logging
import sys

from vqdm.cli import Parser, run_script
from vqdm.metrics.catalogue import REMOVED_FLAGS
from vqdm.metrics.comparison import compare_runs, markdown
from vqdm.metrics.config import CompareConfig, MetricsConfig
from vqdm.metrics.job import ScoreResult, score_images
from vqdm.metrics.results import terminal_table

PARSER = Parser(MetricsConfig, __doc__, REMOVED_FLAGS)
COMPARE_PARSER = Parser(
    CompareConfig, "Put runs into one table and one figure of bits against quality.", command="compare"
)


def report(scored: ScoreResult) -> None:
    """Print the table, what was skipped and why, and where the files are."""
    if scored.scores:
        print(f"\n{terminal_table(scored.scores)}\n")
    for reason in dict.fromkeys(scored.skipped.values()):
        print(f"skipped {', '.join(name for name in scored.skipped if scored.skipped[name] == reason)}: {reason}")
    for line in scored.warnings:
        logging.getLogger("vqdm").warning("warning: %s", line)
    print(f"metrics.json and per_image.csv are in {scored.folder}")
    if scored.report:
        print(f"report: {scored.report}")


def main_compare(argv: list[str]) -> None:
    """`metrics.py compare`."""
    compared = compare_runs(COMPARE_PARSER.parse(argv))
    print(markdown(compared.comparison))
    for line in compared.warnings:
        logging.getLogger("vqdm").warning("warning: %s", line)
    print(f"comparison.md, .tex, .csv and pareto.png, .svg are in {compared.folder}")


def main(argv: list[str] | None = None) -> None:
    """Parse, compute the metrics, print where the result is."""
    words = sys.argv[1:] if argv is None else argv
    if words[:1] == ["compare"]:
        return main_compare(words[1:])
    scored = score_images(PARSER.parse(argv))
    if scored:
        report(scored)


if __name__ == "__main__":
    sys.exit(run_script(main, after_interrupt="nothing was written"))
