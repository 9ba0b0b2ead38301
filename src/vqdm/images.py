"""Images: formats that are read, generated images with their problems, contact sheets, PNG files, folders of images."""

from __future__ import annotations

import fcntl
import hashlib
import io
import json
import re
import textwrap
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, UnidentifiedImageError, features
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from vqdm.documents import first_line, parse_json, shortened
from vqdm.errors import UserError
from vqdm.parallel import Ranks
from vqdm.storage.files import file_sha256, locked, save_bytes, save_json, save_text, sweep
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
    """Convert the output of a pipeline call with `output_type="pt"`, and mark what its safety checker replaced.

    Of a video the first frame.
    """
    images = result.images if hasattr(result, "images") else result.frames[:, 0]  # [N, F, 3, H, W] → [N, 3, H, W]
    replaced = getattr(result, "nsfw_content_detected", None) or [False] * len(images)
    return [generated_image(one, bool(flag)) for one, flag in zip(images.float().cpu(), replaced, strict=True)]


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


# --------------------------------------------------------------------------------------------------- a folder of images
#
# With a manifest: what `generate.py` writes and `metrics.py` reads.
#
# DIR/run.json              everything needed to repeat the run; --resume compares it
# DIR/manifest.jsonl        a line per image, sorted by prompt and sample; whole when the run is finished
# DIR/manifest.*.jsonl      lines of a process that is still running, or was interrupted
# DIR/…/*.png               images, in one of three layouts
# Layout → file of the image of (prompt index, sample).

LAYOUTS: dict[str, Callable[[int, int], str]] = {
    "flat": lambda index, sample: f"{index:06d}_{sample:02d}.png",
    "geneval": lambda index, sample: f"{index:05d}/samples/{sample:05d}.png",
    "dpg": lambda index, sample: f"samples/{index:06d}_{sample:02d}.png",
}
GRID_COLUMNS = 2
MOST_IN_GRID = 4
CHECK = "row_sha256"  # the first digits of a manifest line's own digest
LONGEST_NAME = 200  # bytes of UTF-8 of a file's name and an ending, which file systems limit to 255
OPTIONAL_TEXTS = ("prompt", "negative_prompt", "problem")

Key = tuple[int, int]


def png_bytes(image: Image.Image, metadata: dict) -> bytes:
    """Encode a PNG with `metadata` as JSON in its text field `parameters`; equal input gives equal bytes."""
    about = PngInfo()
    about.add_itxt("parameters", json.dumps(metadata, ensure_ascii=False))
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", pnginfo=about)
    return buffer.getvalue()


def read_rows(path: Path) -> list[dict]:
    """Read the rows of a manifest; a missing file has none. Damaged lines are skipped, with a warning unless
    it is the last one, cut off.
    """
    if not path.is_file():
        return []
    rows = parse_rows(path.read_text(encoding="utf-8", errors="replace"))
    cut = not path.read_bytes().endswith(b"\n")
    for number in (k for k, row in enumerate(rows, start=1) if row is None):
        if number < len(rows) or not cut:
            log.warning("warning: %s: line %d is damaged and left out", path, number)
    return [row for row in rows if row is not None]


def parse_rows(text: str) -> list[dict | None]:
    """Parse the lines of a manifest that are not empty; None for a damaged one.

    Only \\n ends a line: prompts may hold other separators, such as U+2028.
    """
    return [_parsed(line) for line in text.split("\n") if line.strip()]


def _parsed(line: str) -> dict | None:
    """Parse a row; None if its checksum differs. A row without a checksum, from elsewhere, is accepted."""
    try:
        row = parse_json(line)
        intact = isinstance(row, dict) and row.pop(CHECK, None) in (None, _row_digest(row))
        return row if intact and is_row(row) else None
    except ValueError:
        return None


def sealed(row: dict) -> dict:
    """Return a row with its checksum, as it goes into a manifest."""
    return row | {CHECK: _row_digest(row)}


def _row_digest(row: dict) -> str:
    return hashlib.sha256(json.dumps(row, sort_keys=True).encode()).hexdigest()[:16]


def is_row(row) -> bool:
    """Return whether a value is a row of a manifest: numbers, texts and settings of their types, its file inside."""
    if not isinstance(row, dict):
        return False
    counts = [row.get(name) for name in ("index", "sample")]
    texts = [row.get("sha256"), *(row[name] for name in OPTIONAL_TEXTS if row.get(name) is not None)]
    return (
        all(type(count) is int and 0 <= count < 2**31 for count in counts)
        and all(isinstance(text, str) and is_encodable(text) for text in texts)
        and isinstance(row.get("settings", {}), dict)
        and is_inside(row.get("file"))
    )


def is_inside(name) -> bool:
    """Return whether a value is a relative path whose text does not leave its folder."""
    if not isinstance(name, str) or not is_encodable(name) or "\0" in name or "\\" in name or len(name) > LONGEST_NAME:
        return False
    path = PurePosixPath(name)
    return bool(path.parts) and not path.is_absolute() and ".." not in path.parts


def is_encodable(text: str) -> bool:
    """Return whether a text can be written as UTF-8: JSON can hold half of a surrogate pair."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def key_of(row: dict) -> Key:
    return row["index"], row["sample"]


@dataclass(frozen=True)
class ImageFolder:
    """DIR, as one shard of a run uses it.

    Attributes:
        path: the folder.
        layout: a name of `LAYOUTS`.
        shard: (number, count); shards may share a folder, also at the same time.
    """

    path: Path
    layout: str = "flat"
    shard: tuple[int, int] = (0, 1)

    # ------------------------------------------------------------------------------------ claiming

    def held(self, ranks: Ranks) -> AbstractContextManager[None]:
        """Lock this shard against other runs; the first of several processes holds the lock for all.

        Raises UserError if another run holds it.
        """
        number, count = self.shard
        return locked(self.path, part=f"-{number}of{count}") if ranks.main else nullcontext()

    def claim(self, about: dict) -> None:
        """Write `run.json`, unless an earlier part of this run has.

        Raises:
            UserError: the folder cannot be written.
        """
        record = self.path / "run.json"
        try:
            if not record.is_file():
                save_json(about, record)
        except OSError as error:
            raise UserError(f"--output_dir {self.path} cannot be written: {error.strerror}") from None

    def sweep(self) -> None:
        """Delete temporary files of killed writers, unless other shards may be writing."""
        if self.shard[1] == 1:
            sweep(self.path)

    # ------------------------------------------------------------------------------------ images

    def file_of(self, key: Key) -> str:
        """Return the path of an image inside the folder."""
        return LAYOUTS[self.layout](*key)

    def save(self, key: Key, image: Image.Image, metadata: dict) -> str:
        """Write an image atomically; return the SHA-256 of the file."""
        data = png_bytes(image, metadata)
        save_bytes(data, self.path / self.file_of(key))
        return hashlib.sha256(data).hexdigest()

    def intact(self, row: dict) -> bool:
        """Return whether the file of a row exists and is still the one that was written."""
        path = self.path / row["file"]
        return row["file"] == self.file_of(key_of(row)) and path.is_file() and file_sha256(path) == row["sha256"]

    # ------------------------------------------------------------------------------------ manifest

    def part(self, rank: int) -> Path:
        """Return the file of the rows of one process of this shard until they are merged."""
        number, count = self.shard
        return self.path / f"manifest.{number}of{count}.rank{rank}.jsonl"

    def rows(self) -> dict[Key, dict]:
        """Return all rows so far, sorted. Unmerged rows of this shard replace merged ones, those of others do not."""
        own, parts = self._own_parts(), sorted(self.path.glob("manifest.*.jsonl"))
        files = [path for path in parts if path not in own] + [self.path / "manifest.jsonl"] + own
        found = {key_of(row): row for file in files for row in read_rows(file)}
        return dict(sorted(found.items()))

    def _own_parts(self) -> list[Path]:
        return sorted(self.path.glob(self.part(0).name.replace("rank0", "rank*")))

    def merge(self, unless: Callable[[dict], bool] = lambda row: False) -> dict[Key, dict]:
        """Write all rows to `manifest.jsonl`, without those for which `unless` holds; return them."""
        with self._locked():
            kept = {key: row for key, row in self.rows().items() if not unless(row)}
            lines = (json.dumps(sealed(row), ensure_ascii=False) + "\n" for row in kept.values())
            save_text("".join(lines), self.path / "manifest.jsonl")
            for path in self._own_parts():
                path.unlink()
        return kept

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Lock the manifest against merges of other shards."""
        with open(self.path / ".lock", "w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def finished(self, wanted: Iterable[Key]) -> set[Key]:
        """Merge, drop wanted images that are missing or damaged, and return the wanted ones that exist."""
        wanted = set(wanted)
        kept = self.merge(unless=lambda row: key_of(row) in wanted and not self.intact(row))
        return wanted & kept.keys()

    # ------------------------------------------------------------------------------------ layouts

    def write_prompt_files(self, rows: dict[int, dict]) -> None:
        """Write the file of the layout for each prompt: GenEval reads the row from `metadata.jsonl`."""
        if self.layout == "geneval":
            for index, row in rows.items():
                line = json.dumps(row, ensure_ascii=False, default=str) + "\n"
                save_text(line, (self.path / self.file_of((index, 0))).parent.parent / "metadata.jsonl")

    def write_grids(self, names: dict[int, str], rows: dict[Key, dict]) -> None:
        """Write the sheets of the layout: DPG-Bench reads the images of a prompt from `grids/ID.png`."""
        if self.layout != "dpg":
            return
        for index, name in names.items():
            files = [rows[index, k]["file"] for k in range(MOST_IN_GRID) if (index, k) in rows]
            if files:
                sheet = grid([Image.open(self.path / file).convert("RGB") for file in files])
                save_bytes(png_bytes(sheet, {"files": files}), self.path / "grids" / f"{name}.png")


def grid(images: list[Image.Image]) -> Image.Image:
    """Tile images of one size without gaps, two per row; a single one stays unchanged."""
    width, height = images[0].size
    columns = min(GRID_COLUMNS, len(images))
    sheet = Image.new("RGB", (columns * width, -(-len(images) // columns) * height))
    for k, image in enumerate(images):
        sheet.paste(image, (k % columns * width, k // columns * height))
    return sheet


def check_layout(layout: str, names: list[str], samples: int) -> None:
    """Raise UserError for ids or numbers of images that a layout cannot hold."""
    if layout != "dpg":
        return
    if samples > MOST_IN_GRID:
        raise UserError(f"--num_samples_per_prompt is {samples}; --layout dpg holds {MOST_IN_GRID} at most")
    unfit = [name for name in names if not re.fullmatch(r"[\w-]+", name)]
    if unfit:
        found = shortened(unfit[0])
        raise UserError(f"--layout dpg names files by id; {found} has other characters than letters, digits, _ and -")
    overlong = [name for name in names if len(name.encode()) > LONGEST_NAME]
    if overlong:
        raise UserError(f"--layout dpg names files by id; {shortened(overlong[0])} has more than {LONGEST_NAME} bytes")
