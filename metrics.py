"""Score images, alone or against those of the full-precision model, and compare runs.

    python metrics.py out/images-3bit --reference out/images-full
    python metrics.py out/images-3bit --reference out/images-full --fid_reference coco.npz --metrics fid fid_fp clip
    python metrics.py real-images --save_stats coco.npz
    accelerate launch metrics.py out/images-3bit --reference out/images-full --bs 64
    python metrics.py compare out/images-4bit out/images-3bit out/images-2bit

IMAGES is a folder of generate.py, any folder of images, or a zip file; images of two folders are paired by prompt
id and sample. Without --metrics, every metric is computed that the input allows and whose network is on this machine.
The result goes into IMAGES/metrics: metrics.json, per_image.csv and report.html.
"""

from __future__ import annotations

import argparse
import logging
import re
import sys
from dataclasses import fields

from vqdm.cli import LOG_LEVELS, Parser, Refused, add_shared_flags, run_script, whole
from vqdm.metrics.catalogue import NAMES, REMOVED_FLAGS
from vqdm.metrics.compare import CompareConfig
from vqdm.metrics.comparison import compare_runs, markdown
from vqdm.metrics.job import ScoreResult, score_images
from vqdm.metrics.networks import LPIPS_FILES
from vqdm.metrics.results import terminal_table
from vqdm.metrics.score_job import FID_MODES, ScoreConfig


def build_parser() -> Parser:
    """All flags of scoring, grouped."""
    parser = Parser(__doc__, "IMAGES [--reference IMAGES_FP] [--fid_reference DIR|ZIP|NPZ]")
    parser.add_argument("images", metavar="IMAGES", help="images to score: a folder, or a zip file")
    _add_input_flags(parser.add_argument_group("what is scored"))
    _add_network_flags(parser.add_argument_group("networks (each a folder or file, or a name on the hub)"))
    _add_report_flags(parser.add_argument_group("report"))
    add_shared_flags(parser, output=None, dtype=False)
    for flag, advice in REMOVED_FLAGS.items():
        parser.add_argument(flag, action=Refused, advice=advice)
    return parser


def _add_input_flags(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--reference", metavar="IMAGES_FP", help="images of the full-precision model, same prompts, seeds"
    )
    group.add_argument("--fid_reference", metavar="PATH", help="what fid, kid, ... compare with: folder, zip or .npz")
    group.add_argument("--metrics", nargs="+", metavar="NAME", help=f"only these: {', '.join(NAMES)}")
    group.add_argument("--force", action="store_true", help="score pairs although their settings differ")
    group.add_argument("--save_stats", metavar="FILE.npz", help="write IMAGES' statistics for a later --fid_reference")
    group.add_argument("--save_features", action="store_true", help="also into FILE.npz; kid needs them")
    group.add_argument("--bs", type=whole(1), default=16, help="images per batch")
    group.add_argument("--threads", type=whole(1, 256), default=4, help="threads that decode images")


def _add_network_flags(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--clip_model", default="ViT-H-14", help="open_clip architecture, or folder or hub name")
    group.add_argument("--clip_pretrained", default="laion2b_s32b_b79k", help="open_clip tag, or file of weights")
    group.add_argument("--fid_features", default="inception", help="inception, a file of its weights, or an encoder")
    group.add_argument(
        "--fid_mode", choices=FID_MODES, help="how images are resized to Inception's 299 pixels; default: clean"
    )
    group.add_argument("--pickscore_model", default="yuvalkirstain/PickScore_v1", help="CLIP of pickscore")
    group.add_argument("--image_reward_model", default="THUDM/ImageReward", help="folder with ImageReward.pt")
    group.add_argument("--lpips_net", choices=tuple(LPIPS_FILES), default="alex", help="backbone of LPIPS")
    group.add_argument("--lpips_weights", metavar="FILE.pth", help="default: torchvision's, in torch.hub's folder")
    group.add_argument("--local_files_only", action="store_true", help="never ask the hub")


def _add_report_flags(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--report_images", type=whole(0), default=64, help="worst in report.html, and as many random ones; 0: none"
    )
    group.add_argument("--report_size", type=whole(16), default=512, help="pixels of the longer side of its images")


def build_compare_parser() -> Parser:
    """All flags of comparing."""
    parser = Parser("Put scored runs into one table and one figure of bits against quality.", "RUN [RUN ...]")
    parser.prog += " compare"
    parser.add_argument("runs", metavar="RUN", nargs="+", help="folder of scored images, or a metrics.json")
    parser.add_argument("-h", "--help", action="help", help="show this help and exit")
    parser.add_argument("--output_dir", metavar="DIR", default="out/comparison", help="where the result goes")
    parser.add_argument("--names", nargs="+", metavar="NAME", help="one for each RUN; default: their folders'")
    parser.add_argument("--plot", nargs="+", metavar="METRIC", help="panels of the figure; default: the usual ones")
    parser.add_argument("--force", action="store_true", help="compare although networks or numbers of images differ")
    parser.add_argument("--loglevel", choices=LOG_LEVELS, default="INFO", help="DEBUG adds tracebacks")
    return parser


def to_compare_config(values: dict) -> CompareConfig:
    """Flags to settings. Raises UserError where they contradict each other."""
    lists = {name: values[name] and tuple(values[name]) for name in ("runs", "names", "plot")}
    return CompareConfig(**lists, output_dir=values["output_dir"], force=values["force"])


def to_config(values: dict) -> ScoreConfig:
    """Flags to settings. Raises UserError where they contradict each other."""
    named = {one.name: values[one.name] for one in fields(ScoreConfig)}
    return ScoreConfig(**named | {"metrics": values["metrics"] and split(values["metrics"])})


def split(words: list[str]) -> tuple[str, ...]:
    """Names that were given as several words, with commas, or as one text in a --config file."""
    return tuple(name for word in words for name in re.split(r"[,\s]+", word) if name)


def report(scored: ScoreResult) -> None:
    """The table, what was skipped and why, and where the files are."""
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
    options = build_compare_parser().parse(argv)
    logging.getLogger().setLevel(options.loglevel)
    compared = compare_runs(to_compare_config(vars(options)))
    print(markdown(compared.comparison))
    for line in compared.warnings:
        logging.getLogger("vqdm").warning("warning: %s", line)
    print(f"comparison.md, .tex, .csv and pareto.png, .svg are in {compared.folder}")


def main(argv: list[str] | None = None) -> None:
    """Parse, build, call, say where the result is."""
    words = sys.argv[1:] if argv is None else argv
    if words[:1] == ["compare"]:
        return main_compare(words[1:])
    options = build_parser().parse(argv)
    logging.getLogger().setLevel(options.loglevel)
    scored = score_images(to_config(vars(options)))
    if scored:
        report(scored)


if __name__ == "__main__":
    sys.exit(run_script(main, after_interrupt="nothing was written"))
