"""Sample a pipeline folder on held-out test prompts, and let the judge say how many images show what was asked.

    python assets/make/evaluate_pipeline.py assets/shapes-xl --grid samples.png

Prints JSON: the share of one-thing prompts with nothing but the right shape in the right colour, the share of
two-thing prompts with both shapes, both colours and the relation right, and the accuracy of every single field.
"""

from __future__ import annotations

import argparse
import json
import random
import textwrap
import time
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from PIL import Image, ImageDraw
from torch import Tensor

from scenes import Scene, caption, sample_split
from train_judge import accuracy, judge_module
from vqdm.diffusion.pipelines import load_pipeline

CELL, CAPTION_LINES, SHEET_COLUMNS = 160, 5, 8


def held_out_scenes(count: int, things: int | None) -> list[Scene]:
    """`count` scenes of the test split; one-thing and two-thing scenes in turn when `things` is None."""
    if things:
        return sample_split("test", count, seed=2, things=things)
    singles, pairs = (sample_split("test", (count + 1) // 2, seed=2, things=n) for n in (1, 2))
    return [scene for both in zip(singles, pairs, strict=True) for scene in both][:count]


def sample(pipeline: DiffusionPipeline, captions: list[str], options: argparse.Namespace) -> Tensor:
    """Images float32 [N, 3, 64, 64] in [0, 1] on the CPU; image i depends on seed i alone."""
    chunks = []
    for start in range(0, len(captions), options.bs):
        prompts = captions[start : start + options.bs]
        generators = [torch.Generator().manual_seed(start + i) for i in range(len(prompts))]
        arguments = {"num_inference_steps": options.steps, "guidance_scale": options.guidance_scale}
        pixels = pipeline(prompts, height=64, width=64, generator=generators, output_type="pt", **arguments).images
        chunks.append(pixels.float().cpu())
    return torch.cat(chunks)


def verdicts(pixels: Tensor, scenes: list[Scene]) -> Tensor:
    """bool [N]: by `single_right` for one-thing scenes, by `pair_right` for the others."""
    judge = judge_module()
    pairs = torch.tensor([len(scene.things) == 2 for scene in scenes])
    return torch.where(pairs, judge.pair_right(pixels, scenes), judge.single_right(pixels, scenes))


def summary(pixels: Tensor, scenes: list[Scene], right: Tensor) -> dict:
    """Shares of right images by number of things, and the accuracy of every field."""
    judge, count = judge_module(), torch.tensor([len(scene.things) for scene in scenes])
    kinds = {name: right[count == n] for name, n in (("single_right", 1), ("pair_right", 2)) if (count == n).any()}
    shares = {name: round(part.float().mean().item(), 4) for name, part in kinds.items()}
    return {"prompts": len(scenes)} | shares | {"fields": accuracy(judge, judge.load(), pixels, scenes)}


def contact_sheet(pixels: Tensor, captions: list[str], right: Tensor) -> Image.Image:
    """Images and their prompts in rows of SHEET_COLUMNS, prompts in red where the judge disagrees."""
    rows, height = -(-len(captions) // SHEET_COLUMNS), CELL + 12 * CAPTION_LINES
    sheet = Image.new("RGB", (SHEET_COLUMNS * CELL, rows * height), "white")
    draw = ImageDraw.Draw(sheet)
    for index, (image, text) in enumerate(zip(pixels, captions, strict=True)):
        x, y = index % SHEET_COLUMNS * CELL, index // SHEET_COLUMNS * height
        array = (image.permute(1, 2, 0) * 255).round().byte().numpy()  # [64, 64, 3]
        sheet.paste(Image.fromarray(array).resize((CELL - 8, CELL - 8), Image.Resampling.NEAREST), (x + 4, y + 4))
        words = "\n".join(textwrap.wrap(text, 26)[:CAPTION_LINES])
        draw.multiline_text((x + 4, y + CELL), words, fill="black" if right[index] else "red", spacing=1, font_size=10)
    return sheet


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, nargs="?", default=Path("assets/shapes-xl"))
    parser.add_argument("--things", type=int, choices=(1, 2), help="only prompts of so many things")
    parser.add_argument("--limit", type=int, default=256, help="number of prompts")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--guidance-scale", type=float, default=3.0)
    parser.add_argument("--bs", type=int, default=32)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--grid", type=Path, metavar="FILE.png", help="write the first 64 images as a sheet")
    return parser.parse_args()


def main() -> None:
    options, began = parse_options(), time.time()
    scenes = held_out_scenes(options.limit, options.things)
    captions = [caption(scene, random.Random(index)) for index, scene in enumerate(scenes)]
    dtype = torch.float32 if options.device == "cpu" else torch.float16
    pipeline = load_pipeline(str(options.folder), torch.device(options.device), dtype)
    pixels = sample(pipeline, captions, options)
    right = verdicts(pixels, scenes)
    if options.grid:
        contact_sheet(pixels[:64], captions[:64], right).save(options.grid)
    settings = {"steps": options.steps, "guidance_scale": options.guidance_scale}
    print(json.dumps(settings | summary(pixels, scenes, right) | {"seconds": round(time.time() - began)}, indent=1))


if __name__ == "__main__":
    main()
