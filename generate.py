"""Draw pictures for a prompt file, with a quantized UNet or in full precision.

    python generate.py assets/shapes-xl out/shapes-3bit prompts/shapes_test.csv --output_dir out/images-3bit
    python generate.py assets/shapes-xl prompts/shapes_test.csv --output_dir out/images-full
    accelerate launch generate.py stabilityai/stable-diffusion-xl-base-1.0 out/sdxl-3bit coco.csv --bs 16

MODEL gives the pipeline, QUANTIZED its UNet; without QUANTIZED the UNet is MODEL's own. Columns seed, negative_prompt,
guidance_scale, num_inference_steps, height and width of the prompt file overrule the flags for their row. A picture's
noise depends on --seed, its prompt's id and its number only: it is the same at any batch size and number of GPUs.
"""

from __future__ import annotations

import argparse
import logging
import re
import sys
from dataclasses import fields

from vqdm.cli import Parser, add_sampling_flags, add_shared_flags, run_script, whole
from vqdm.config import SamplingConfig
from vqdm.errors import RunError
from vqdm.generation.job import Drawn, SampleConfig, sample_images
from vqdm.image_folder import LAYOUTS
from vqdm.images import NAN, NAN_ADVICE


def build_parser() -> Parser:
    """All flags, grouped."""
    parser = Parser(__doc__, "MODEL [QUANTIZED] PROMPTS")
    parser.add_argument("model", metavar="MODEL", help="diffusers pipeline: a folder, or a name on the hub")
    parser.add_argument(
        "quantized", metavar="QUANTIZED", nargs="?", help="quantized pipeline folder, or its unet folder"
    )
    parser.add_argument(
        "prompts",
        metavar="PROMPTS",
        help="prompt file (.txt .csv .tsv .json .jsonl .yaml .parquet), or a datasets id",
    )
    _add_picture_flags(parser.add_argument_group("pictures"))
    _add_work_flags(parser.add_argument_group("work"))
    add_sampling_flags(parser.add_argument_group("sampling"))
    add_shared_flags(parser, output="out/images")
    return parser


def _add_picture_flags(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--num_samples_per_prompt", type=whole(1, 100), default=1, help="pictures a prompt")
    group.add_argument("--negative_prompt", help="for all prompts without one of their own")
    group.add_argument("--teacher", action="store_true", help="insist on full precision; an error with QUANTIZED")
    group.add_argument(
        "--layout",
        choices=tuple(LAYOUTS),
        default="flat",
        help="flat: 000000_00.png; geneval, dpg: as these benchmarks read them",
    )


def _add_work_flags(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--bs", type=whole(1), default=8, help="pictures at once; halved where memory ends")
    group.add_argument("--limit", type=whole(0), default=0, help="only the first prompts; 0 = all")
    group.add_argument(
        "--shard",
        type=shard,
        default="0/1",
        metavar="I/N",
        help="every N-th prompt from the I-th, from 0",
    )
    group.add_argument("--compile", action="store_true", help="torch.compile the UNet")
    group.add_argument(
        "--offload",
        choices=("none", "model", "sequential"),
        default="none",
        help="keep weights off the GPU until they are needed: whole parts, or layer by layer",
    )
    group.add_argument("--resume", action="store_true", help="draw only what is missing or damaged in --output_dir")


def shard(text: str) -> tuple[int, int]:
    """(number, count) of "i/n"."""
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    if not match or int(match[1]) >= int(match[2]):
        raise argparse.ArgumentTypeError(f"{text!r} is not I/N with I from 0 to N-1")
    return int(match[1]), int(match[2])


def to_config(values: dict) -> SampleConfig:
    """Flags to settings. Raises UserError where they contradict each other."""
    sampling = {one.name: values[one.name] for one in fields(SamplingConfig)}
    named = {one.name: values[one.name] for one in fields(SampleConfig) if one.name in values}
    return SampleConfig(**named, sampling=SamplingConfig(**sampling))


def report(drawn: Drawn) -> None:
    """Warn of pictures that are not right, and say where all are.

    Raises:
        RunError: some hold NaN.
    """
    words = ", ".join(f"{count} {problem}" for problem, count in sorted(drawn.problems.items()))
    if words:
        logging.getLogger("vqdm").warning("warning: pictures to look at (problem in manifest.jsonl): %s", words)
    rate = f"{drawn.new / drawn.seconds:.2f} a second, " if drawn.new else ""
    print(f"{drawn.total} pictures, {drawn.new} of them new, {rate}in {drawn.folder}")
    if NAN in drawn.problems:
        raise RunError(
            f"{drawn.problems[NAN]} of {drawn.total} pictures hold NaN and are black; into another folder, {NAN_ADVICE}"
        )


def main(argv: list[str] | None = None) -> None:
    """Parse, build, call, say where the result is."""
    options = build_parser().parse(argv)
    logging.getLogger().setLevel(options.loglevel)
    drawn = sample_images(to_config(vars(options)))
    if drawn:
        report(drawn)


if __name__ == "__main__":
    sys.exit(run_script(main))
