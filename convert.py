"""Convert between quantized folders, plain models, the aqlm format, and pickles of the original VQDM code.

    python convert.py dequantize out/sdxl-3bit --output_dir out/sdxl-plain
    python convert.py aqlm out/sdxl-3bit/text_encoder --output_dir out/text-aqlm
    python convert.py pickle unet.pickle --model stabilityai/stable-diffusion-xl-base-1.0 --trust_pickle \\
        --output_dir out/sdxl-converted

dequantize: every quantized layer of a pipeline, UNet or text encoder becomes the plain layer of its decoded weight.
aqlm: text encoders for stock transformers with the aqlm package; what the format cannot hold is refused.
pickle: a UNet that the original code saved with torch.save becomes a quantized folder. The pickle is read in another
process that knows tensors and refuses unexpected names; still, give only files whose source you trust.
"""

from __future__ import annotations

import logging
import sys
from dataclasses import fields

import diffusers
import transformers

from vqdm.cli import DTYPES, LOG_LEVELS, Parser, run_script
from vqdm.conversion import KINDS, ConvertConfig, convert


def build_parser() -> Parser:
    """All flags."""
    parser = Parser(__doc__, "{dequantize,aqlm,pickle} SOURCE")
    parser.add_argument("kind", metavar="KIND", choices=KINDS, help="dequantize, aqlm or pickle")
    parser.add_argument("source", metavar="SOURCE", help="pipeline folder, a model's own folder, or a pickle")
    group = parser.add_argument_group("what and where")
    group.add_argument("--output_dir", "--save", metavar="DIR", default="out/converted", help="new or empty folder")
    group.add_argument("--dtype", choices=DTYPES, default="auto", help="dequantize: auto = as stored")
    group.add_argument("--model", metavar="MODEL", help="pickle: the full-precision pipeline, a folder or a hub name")
    group.add_argument("--variant", help="file variant of MODEL or SOURCE, such as fp16")
    group.add_argument("--local_files_only", action="store_true", help="pickle: never ask the hub")
    group.add_argument("--trust_pickle", action="store_true", help="pickle: its source is trusted")
    group = parser.add_argument_group("run")
    group.add_argument("-h", "--help", action="help", help="show this help and exit")
    group.add_argument("--loglevel", choices=LOG_LEVELS, default="INFO", type=str.upper, help="DEBUG adds tracebacks")
    group.add_argument("--config", metavar="FILE.yaml", help="values for any of these flags; the command line wins")
    return parser


def main(argv: list[str] | None = None) -> None:
    """Parse, build, call, say what was written."""
    options = build_parser().parse(argv)
    logging.getLogger().setLevel(options.loglevel)
    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
    settings = {one.name: getattr(options, one.name) for one in fields(ConvertConfig)}
    print(convert(ConvertConfig(**settings)))


if __name__ == "__main__":
    sys.exit(run_script(main, after_interrupt="nothing was written"))
