"""A folder of images with a manifest: what `generate.py` writes and `metrics.py` reads.

DIR/run.json              everything needed to repeat the run; --resume compares it
DIR/manifest.jsonl        a line per image, sorted by prompt and sample; whole when the run is finished
DIR/manifest.*.jsonl      lines of a process that is still running, or was interrupted
DIR/…/*.png               images, in one of three layouts
"""

from __future__ import annotations

import fcntl
import hashlib
import io
import json
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from vqdm.documents import parse_json, shortened
from vqdm.errors import UserError
from vqdm.parallel import Ranks
from vqdm.storage.files import file_sha256, locked, save_bytes, save_json, save_text, sweep
from vqdm.tracking import log

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
