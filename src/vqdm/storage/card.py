"""The README.md of a quantized pipeline folder: metadata for the hub, figures, and how to load it."""

from __future__ import annotations

from pathlib import Path


def model_card(model: str, summary: dict) -> str:
    """Markdown with the hub's YAML header; it names no base model for a folder, which the hub cannot know."""
    hub_name = "" if Path(model).exists() else f"base_model: {model}\nbase_model_relation: quantized\n"
    base = Path(model).absolute().name if Path(model).exists() else model
    images = summary["images"]
    quality = "none: all images went wrong" if images["psnr_db"] is None else f"{images['psnr_db']:.2f} dB"
    others = f"; {summary['layers_in_8_bit']} others are in 8 bit" if summary["layers_in_8_bit"] else ""
    before = summary.get("unet_output_error_db_before")
    tuned = f", fine-tuned; before: {before:.2f} dB" if before is not None else ""
    return f"""---
library_name: diffusers
pipeline_tag: text-to-image
tags: [vqdm, quantized, text-to-image]
{hub_name}---

# {base}, its UNet at {summary["effective_bits_layers"]:.2f} bits a weight

Quantized with vqdm: additive vector quantization (arXiv 2409.00492) of {summary["layers_quantized"]} layers{others}.

| | |
|---|---|
| stored bits a weight, quantized layers | {summary["effective_bits_layers"]:.3f} |
| stored bits a parameter, whole UNet | {summary["effective_bits_unet"]:.3f} |
| UNet on disk | {summary["bytes_of_unet"] / 1e6:.2f} MB |
| UNet-output error on unseen prompts{tuned} | {summary["unet_output_error_db"]:.2f} dB |
| PSNR of {images["count"]} images at equal seeds | {quality} |

```python
import vqdm  # before from_pretrained: teaches diffusers the format
from diffusers import DiffusionPipeline

pipeline = DiffusionPipeline.from_pretrained("path/to/this/folder")
```
"""
