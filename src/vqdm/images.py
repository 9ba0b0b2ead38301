"""Pictures: contact sheets with labels."""

from __future__ import annotations

import io
import textwrap
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from vqdm.storage.atomic import save_bytes

MARGIN, LINE = 8, 15
PROMPT_LINES = 3


def pair_sheet(prompts: list[str], left: list[Image.Image], right: list[Image.Image], labels: tuple[str, str]):
    """A sheet of picture pairs, two pairs a row, each under the start of its prompt.

    Returns a PIL image. Small pictures are enlarged to at least 128 pixels, without smoothing.
    """
    side = max(128, min(384, left[0].width)) // left[0].width * left[0].width or left[0].width
    cells = [_pair(*row, labels, side) for row in zip(prompts, left, right, strict=True)]
    width, height = cells[0].size
    sheet = Image.new("RGB", (2 * width if len(cells) > 1 else width, height * -(-len(cells) // 2)), "white")
    for index, cell in enumerate(cells):
        sheet.paste(cell, (index % 2 * width, index // 2 * height))
    return sheet


def _pair(prompt: str, left: Image.Image, right: Image.Image, labels: tuple[str, str], side: int) -> Image.Image:
    font = ImageFont.load_default(12)
    width = 2 * side + 3 * MARGIN
    lines = textwrap.wrap(prompt, max(20, width // 7))[:PROMPT_LINES]
    cell = Image.new("RGB", (width, side + (PROMPT_LINES + 1) * LINE + 2 * MARGIN), "white")
    draw = ImageDraw.Draw(cell)
    for row, line in enumerate(lines):
        draw.text((MARGIN, MARGIN // 2 + row * LINE), line, fill="black", font=font)
    for column, (picture, label) in enumerate(zip((left, right), labels, strict=True)):
        x, y = MARGIN + column * (side + MARGIN), (PROMPT_LINES + 1) * LINE + MARGIN
        draw.text((x, y - LINE), label, fill="#555555", font=font)
        cell.paste(picture.convert("RGB").resize((side, side), Image.Resampling.NEAREST), (x, y))
    return cell


def save_png(image: Image.Image, path: Path) -> None:
    """Write a PNG under its final name only when it is whole."""
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    save_bytes(buffer.getvalue(), path)
