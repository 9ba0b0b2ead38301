"""Images: formats that are read, generated images with their problems, contact sheets with labels, PNG files."""

from __future__ import annotations

import io
import textwrap
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, UnidentifiedImageError, features
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from vqdm.documents import first_line, shortened
from vqdm.storage.files import save_bytes
from vqdm.tracking import log

BLACK, NAN, REPLACED = "black", "nan", "safety_checker"
PROBLEM = "problem"  # in an image's `info`, and in the text fields of its PNG
NAN_ADVICE = "use --dtype bfloat16 or float32, or a MODEL whose VAE is made for float16 (an fp16-fix VAE)"
MARGIN, LINE = 8, 15
PROMPT_LINES = 3
# Format as PIL names it → endings of its files, in any case. Whatever a file is called, no other decoder sees it: the
# rest of them are less used to hostile input, and that of EPS starts a program.
KINDS = {
    "PNG": (".png", ".apng"),
    "JPEG": (".jpg", ".jpeg", ".jpe", ".jfif"),
    "WEBP": (".webp",),
    "BMP": (".bmp",),
    "DIB": (".dib",),
    "GIF": (".gif",),
    "TIFF": (".tif", ".tiff"),
    "PPM": (".ppm", ".pgm", ".pbm", ".pnm"),
    "JPEG2000": (".jp2", ".j2k", ".jpx"),
    "AVIF": (".avif",),
}
BUILT_IN = {"JPEG2000": "jpg_2000", "TIFF": "libtiff", "AVIF": "avif", "WEBP": "webp"}  # names of `PIL.features`
FORMATS = tuple(kind for kind in KINDS if kind not in BUILT_IN or features.check(BUILT_IN[kind]))
SUFFIXES = tuple(suffix for kind in FORMATS for suffix in KINDS[kind])
# Files that lie beside images and are none; any other file that is not read is named, for it may be an image.
BESIDE = (".txt", ".json", ".jsonl", ".csv", ".tsv", ".html", ".md", ".npz", ".yaml", ".yml", ".log", ".lock")
BESIDE += (".parquet", ".tex", ".db", ".ini", ".py", ".sh", ".caption")
MOST_PIXELS = 2**26


def read_image(source: Path | IO[bytes]) -> Image.Image:
    """Decode an image file: 8-bit RGB.

    Raises:
        ValueError: it is no image of one of `FORMATS`, is damaged, has more than `MOST_PIXELS`, or 32-bit values.
    """
    with _opened(source) as image:
        return _eight_bit(image).convert("RGB")


def check_image(source: Path | IO[bytes]) -> None:
    """Read the header of an image file. Raises ValueError as `read_image`, but for damage after the header."""
    with _opened(source):
        pass


@contextmanager
def _opened(source: Path | IO[bytes]) -> Iterator[Image.Image]:
    try:
        with Image.open(source, formats=FORMATS) as image:
            if image.width * image.height > MOST_PIXELS:
                raise ValueError(f"it has {image.width} × {image.height} pixels; allowed are {MOST_PIXELS}")
            if image.mode in ("I", "F"):
                raise ValueError("it has values of 32 bits; save it with 8 or 16")  # white is not defined
            yield image
    except MemoryError:
        raise
    except Exception as error:  # decoders raise a dozen types, some of them only Exception
        raise ValueError(_fault(error)) from None


def _fault(error: Exception) -> str:
    """What is wrong with an image; Pillow names the object that it read from, not the file."""
    return "it is damaged, or not an image" if isinstance(error, UnidentifiedImageError) else first_line(error)


def _eight_bit(image: Image.Image) -> Image.Image:
    """Reduce 16-bit grey to its high byte, as PIL reads 16-bit colours; PIL's own conversion would clip it to white."""
    return image.point(lambda level: level / 256).convert("L") if image.mode.startswith("I;16") else image


def listed(names: Iterable[str]) -> str:
    """Count file names by suffix, and quote the first."""
    names = list(names)
    endings = Counter(PurePosixPath(name).suffix.lower() or "without an ending" for name in names)
    return (
        f"{', '.join(f'{count} {ending}' for ending, count in endings.items())} (the first is {shortened(min(names))})"
    )


def is_hidden(name: str) -> bool:
    """Return whether a relative path has a part that is hidden, or that macOS adds to zip files."""
    return any(part.startswith((".", "__MACOSX")) for part in name.split("/"))


def is_sheet(name: str) -> bool:
    """Return whether a relative path is one of the sheets that generate.py and metrics.py add to their images."""
    return bool({"grids", "metrics"} & set(PurePosixPath(name).parts[:-1]))


@dataclass(frozen=True)
class GeneratedImage:
    """A generated image and its problem: None, "black", "nan" or "safety_checker"."""

    image: Image.Image
    problem: str | None


def generated_images(result) -> list[GeneratedImage]:
    """Convert the output of a pipeline call with `output_type="pt"`, and mark what its safety checker replaced."""
    replaced = getattr(result, "nsfw_content_detected", None) or [False] * len(result.images)
    return [generated_image(one, bool(flag)) for one, flag in zip(result.images.float().cpu(), replaced, strict=True)]


def generated_image(values: Tensor, replaced: bool = False) -> GeneratedImage:
    """Convert float values [3, H, W] in [0, 1] to 8 bit, rounded as diffusers does; NaN and infinity become black."""
    finite = bool(values.isfinite().all())
    pixels = (values.nan_to_num(0, 0, 0).permute(1, 2, 0) * 255).round().to(torch.uint8).numpy()
    if replaced:
        problem = REPLACED
    elif not finite:
        problem = NAN
    else:
        problem = None if np.any(pixels) else BLACK
    image = Image.fromarray(pixels)
    image.info |= {PROBLEM: problem} if problem else {}
    return GeneratedImage(image, problem)


def problems_of(images: Sequence[Image.Image]) -> dict[str, int]:
    """Count the images that have a problem: problem → count."""
    return dict(sorted(Counter(image.info[PROBLEM] for image in images if PROBLEM in image.info).items()))


def warn_of_problems(images: Sequence[Image.Image], prompts: Sequence[str], source: str) -> None:
    """Log a line per problem: how many images have it, the first prompt, and what to do."""
    advice = {
        NAN: f"hold NaN or infinity and are black there; {NAN_ADVICE}",
        BLACK: f"are black all over; if that is not what the prompt asks for, {NAN_ADVICE}",
        REPLACED: "were replaced by MODEL's safety checker",
    }
    for problem, count in problems_of(images).items():
        first = next(k for k, image in enumerate(images) if image.info.get(PROBLEM) == problem)
        prompt = f"the first is of {shortened(prompts[first])}"
        log.warning("warning: %d of %d images of %s %s; %s", count, len(images), source, advice[problem], prompt)


def comparable(first: Image.Image, second: Image.Image) -> bool:
    """Return whether the error of two images is meaningful: neither has NaN or was replaced, and not both are black."""
    problems = {image.info.get(PROBLEM) for image in (first, second)}
    return not problems & {NAN, REPLACED} and problems != {BLACK}


def pair_sheet(prompts: list[str], left: list[Image.Image], right: list[Image.Image], labels: tuple[str, str]):
    """Make a sheet of image pairs, two pairs per row, each under the start of its prompt.

    Returns a PIL image. Small images are enlarged to at least 128 pixels, without smoothing.
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
    for column, (image, label) in enumerate(zip((left, right), labels, strict=True)):
        x, y = MARGIN + column * (side + MARGIN), (PROMPT_LINES + 1) * LINE + MARGIN
        draw.text((x, y - LINE), label, fill="#555555", font=font)
        cell.paste(image.convert("RGB").resize((side, side), Image.Resampling.NEAREST), (x, y))
    return cell


def save_png(image: Image.Image, path: Path) -> None:
    """Write a PNG, with the problem of the image in its text, under its final name only when it is whole."""
    buffer, about = io.BytesIO(), PngInfo()
    if PROBLEM in image.info:
        about.add_text(PROBLEM, image.info[PROBLEM])
    image.save(buffer, format="PNG", pnginfo=about)
    save_bytes(buffer.getvalue(), path)
