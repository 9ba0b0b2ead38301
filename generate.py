"""Generate images for a prompt file, with a quantized UNet or in full precision.

    python generate.py assets/shapes-xl out/shapes-3bit prompts/shapes_test.csv --output_dir out/images-3bit
    python generate.py assets/shapes-xl prompts/shapes_test.csv --output_dir out/images-full
    accelerate launch generate.py stabilityai/stable-diffusion-xl-base-1.0 out/sdxl-3bit coco.csv --bs 16

Without QUANTIZED, MODEL's own UNet is used. Columns seed, negative_prompt, guidance_scale, num_inference_steps, height
and width of the prompt file override the flags for their row. The noise of an image depends only on --seed, the id of
its prompt and its number, not on the batch size or the number of GPUs.
"""

from __future__ import annotations

import logging
import sys

from vqdm.cli import Parser, run_script
from vqdm.errors import RunError
from vqdm.generation.config import GenerateConfig
from vqdm.generation.job import Drawn, sample_images
from vqdm.images import NAN, NAN_ADVICE

PARSER = Parser(GenerateConfig, __doc__)


def report(drawn: Drawn) -> None:
    """Warn of images with problems, and print where the images are.

    Raises:
        RunError: an image holds NaN.
    """
    words = ", ".join(f"{count} {problem}" for problem, count in sorted(drawn.problems.items()))
    if words:
        logging.getLogger("vqdm").warning("warning: images with problems (problem in manifest.jsonl): %s", words)
    rate = f"{drawn.new / drawn.seconds:.2f}/s, " if drawn.new else ""
    print(f"{drawn.total} images, {drawn.new} of them new, {rate}in {drawn.folder}")
    if NAN in drawn.problems:
        raise RunError(
            f"{drawn.problems[NAN]} of {drawn.total} images hold NaN and are black; into another folder, {NAN_ADVICE}"
        )


def main(argv: list[str] | None = None) -> None:
    """Parse, generate, print where the images are."""
    drawn = sample_images(PARSER.parse(argv))
    if drawn:
        report(drawn)


if __name__ == "__main__":
    sys.exit(run_script(main))
