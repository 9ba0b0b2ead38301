"""Generate images for a prompt file, with a quantized denoiser or in full precision.

    python generate.py assets/shapes-xl out/shapes-3bit prompts/shapes_test.csv --output_dir out/images-3bit
    python generate.py assets/shapes-xl prompts/shapes_test.csv --output_dir out/images-full
    accelerate launch generate.py stabilityai/stable-diffusion-xl-base-1.0 out/sdxl-3bit coco.csv --bs 16

Without QUANTIZED, MODEL's own is used. Columns seed, negative_prompt, guidance_scale, num_inference_steps, height
and width of the prompt file override the flags for their row. The noise of an image depends only on --seed, the id of
its prompt and its number, not on the batch size or the number of GPUs.
"""

from __future__ import annotations

import logging
import sys

from vqdm.cli import Parser, run_script
from vqdm.errors import RunError
from vqdm.generation.config import GenerateConfig
from vqdm.generation.job import GenerationResult, generate_images
from vqdm.images import NAN, NAN_ADVICE

PARSER = Parser(GenerateConfig, __doc__)


def report(result: GenerationResult) -> None:
    """Warn of images with problems, and print where the images are.

    Raises:
        RunError: an image holds NaN.
    """
    words = ", ".join(f"{count} {problem}" for problem, count in sorted(result.problems.items()))
    if words:
        logging.getLogger("vqdm").warning("warning: images with problems (problem in manifest.jsonl): %s", words)
    rate = f"{result.new / result.seconds:.2f}/s, " if result.new else ""
    print(f"{result.total} images, {result.new} of them new, {rate}in {result.folder}")
    if NAN in result.problems:
        raise RunError(
            f"{result.problems[NAN]} of {result.total} images hold NaN and are black; into another folder, {NAN_ADVICE}"
        )


def main(argv: list[str] | None = None) -> None:
    """Parse, generate, print where the images are."""
    result = generate_images(PARSER.parse(argv))
    if result:
        report(result)


if __name__ == "__main__":
    sys.exit(run_script(main))
