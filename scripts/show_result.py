"""Load a quantized pipeline with stock diffusers, generate an image with it, and print the figures of its summary.

python scripts/show_result.py out/demo/quantized [--prompt "a big red circle above a small blue star"]
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import diffusers
import torch
import transformers
from diffusers import DiffusionPipeline

import vqdm

PROMPT = "a big plain red circle left of a small striped blue star on a white background"


def table(summary: dict) -> str:
    """Format the figures in two columns."""
    component = summary.get("component", "unet")
    label, now = {"unet": "UNet"}.get(component, component), summary[f"bytes_of_{component}"]
    original = summary[f"bytes_of_original_{component}"]
    psnr = summary["images"]["psnr_db"]
    rows = {
        "stored bits per weight, quantized layers": f"{summary['effective_bits_layers']:.3f}",
        f"stored bits per parameter, whole {label}": f"{summary[f'effective_bits_{component}']:.3f}",
        f"{label} on disk": f"{now / 1e6:.2f} MB" + (f" (was {original / 1e6:.2f} MB)" if original else ""),
        f"{label}-output error, held-out prompts": f"{summary[f'{component}_output_error_db']:.2f} dB",
        "PSNR of images, equal seeds": "none: all images have problems" if psnr is None else f"{psnr:.2f} dB",
        "time": f"{summary['seconds']['total']:.0f} s",
    }
    width = max(map(len, rows))
    return "\n".join(f"{name:{width}}  {value}" for name, value in rows.items())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--prompt", default=PROMPT)
    options = parser.parse_args()
    for library in (diffusers, transformers):
        library.utils.logging.disable_progress_bar()
    pipeline = DiffusionPipeline.from_pretrained(options.folder, dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    result = pipeline(options.prompt, num_inference_steps=20, guidance_scale=3.0, generator=torch.manual_seed(0))
    result.images[0].save(options.folder / "sample.png")
    print(f"\nvqdm {vqdm.__version__}, {options.folder}\n")
    print(table(json.loads((options.folder / "summary.json").read_text())))
    print(f"\nimage pairs  {options.folder / 'image_pairs.png'}\none image    {options.folder / 'sample.png'}")


if __name__ == "__main__":
    main()
