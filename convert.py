"""Convert between quantized folders, plain models, the aqlm format, and pickles of the original VQDM code.

    python convert.py dequantize out/sdxl-3bit --output_dir out/sdxl-plain
    python convert.py aqlm out/sdxl-3bit/text_encoder --output_dir out/text-aqlm
    python convert.py pickle unet.pickle --model stabilityai/stable-diffusion-xl-base-1.0 --trust_pickle \\
        --output_dir out/sdxl-converted

dequantize: every quantized layer of a pipeline, denoiser or text encoder becomes the plain layer of its decoded weight.
aqlm: text encoders for stock transformers with the aqlm package; what the format cannot hold is refused.
pickle: a UNet that the original code saved with torch.save becomes a quantized folder. Classes in it become
stand-ins, and unexpected names are refused; still, give only files whose source you trust.
"""

from __future__ import annotations

import sys

import diffusers
import transformers

from vqdm.cli import Parser, run_script
from vqdm.conversion import ConvertConfig, convert

PARSER = Parser(ConvertConfig, __doc__)


def main(argv: list[str] | None = None) -> None:
    """Parse, convert, print what was written."""
    config = PARSER.parse(argv)
    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
    print(convert(config))


if __name__ == "__main__":
    sys.exit(run_script(main, after_interrupt="nothing was written"))
