"""A folder of pictures with a manifest: what `generate.py` writes and `metrics.py` reads.

DIR/run.json              everything needed to repeat the run; what --resume compares
DIR/manifest.jsonl        a line a picture, sorted by prompt and sample; whole when the run is finished
DIR/manifest.*.jsonl      lines of a process that is still running, or was interrupted
DIR/…/*.png               pictures, in one of three layouts
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

# Layout → where the picture of (prompt index, sample) goes.
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
    """A PNG file with `metadata` as JSON in its text field `parameters`; equal input gives equal bytes."""
    about = PngInfo()
    about.add_itxt("parameters", json.dumps(metadata, ensure_ascii=False))
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", pnginfo=about)
    return buffer.getvalue()


def read_rows(path: Path) -> list[dict]:
    """Rows of a manifest; a missing file has none. Damaged lines are left out, with a warning but for a cut last."""
    if not path.is_file():
        return []
    rows = parse_rows(path.read_text(encoding="utf-8", errors="replace"))
    cut = not path.read_bytes().endswith(b"\n")
    for number in (k for k, row in enumerate(rows, start=1) if row is None):
        if number < len(rows) or not cut:
            log.warning("warning: %s: line %d is damaged and left out", path, number)
    return [row for row in rows if row is not None]


def parse_rows(text: str) -> list[dict | None]:
    """A manifest's lines that are not empty, None for a damaged one.

    Only \\n ends a line: prompts may hold other separators, such as U+2028.
    """
    return [_parsed(line) for line in text.split("\n") if line.strip()]


def _parsed(line: str) -> dict | None:
    """A row, or None where it is not what was written; one without a checksum, from elsewhere, is taken as it is."""
    try:
        row = parse_json(line)
        intact = isinstance(row, dict) and row.pop(CHECK, None) in (None, _row_digest(row))
        return row if intact and is_row(row) else None
    except ValueError:
        return None


def sealed(row: dict) -> dict:
    """A row with its checksum, as it goes into a manifest."""
    return row | {CHECK: _row_digest(row)}


def _row_digest(row: dict) -> str:
    return hashlib.sha256(json.dumps(row, sort_keys=True).encode()).hexdigest()[:16]


def is_row(row) -> bool:
    """Whether a value is a row of a manifest: its numbers, texts and settings of their types, its file inside."""
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
    """Whether a value is a relative path that does not leave its folder, as far as its text says."""
    if not isinstance(name, str) or not is_encodable(name) or "\0" in name or "\\" in name or len(name) > LONGEST_NAME:
        return False
    path = PurePosixPath(name)
    return bool(path.parts) and not path.is_absolute() and ".." not in path.parts


def is_encodable(text: str) -> bool:
    """Whether a text can be written as UTF-8: JSON can hold half of a surrogate pair."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def key_of(row: dict) -> Key:
    return row["index"], row["sample"]


@dataclass(frozen=True)
class ImageFolder:
    """DIR, seen from one shard of a run.

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
        """Inside, no other run writes this shard's pictures; the first of several processes holds it for all.

        Raises UserError where another run does.
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
        """Delete what killed writers left, unless other shards may be writing."""
        if self.shard[1] == 1:
            sweep(self.path)

    # ------------------------------------------------------------------------------------ pictures

    def file_of(self, key: Key) -> str:
        """A picture's path inside the folder."""
        return LAYOUTS[self.layout](*key)

    def save(self, key: Key, image: Image.Image, metadata: dict) -> str:
        """Write a picture whole or not at all; returns the SHA-256 of the file."""
        data = png_bytes(image, metadata)
        save_bytes(data, self.path / self.file_of(key))
        return hashlib.sha256(data).hexdigest()

    def intact(self, row: dict) -> bool:
        """Whether a row's file is there and still the one that was written."""
        path = self.path / row["file"]
        return row["file"] == self.file_of(key_of(row)) and path.is_file() and file_sha256(path) == row["sha256"]

    # ------------------------------------------------------------------------------------ manifest

    def part(self, rank: int) -> Path:
        """Where one process of this shard keeps its rows until they are merged."""
        number, count = self.shard
        return self.path / f"manifest.{number}of{count}.rank{rank}.jsonl"

    def rows(self) -> dict[Key, dict]:
        """All rows so far, sorted; this shard's own unmerged rows are newer than merged ones, other shards' are not."""
        own, parts = self._own_parts(), sorted(self.path.glob("manifest.*.jsonl"))
        files = [path for path in parts if path not in own] + [self.path / "manifest.jsonl"] + own
        found = {key_of(row): row for file in files for row in read_rows(file)}
        return dict(sorted(found.items()))

    def _own_parts(self) -> list[Path]:
        return sorted(self.path.glob(self.part(0).name.replace("rank0", "rank*")))

    def merge(self, unless: Callable[[dict], bool] = lambda row: False) -> dict[Key, dict]:
        """Put all rows into `manifest.jsonl`, leaving out those for which `unless` holds; returns them."""
        with self._locked():
            kept = {key: row for key, row in self.rows().items() if not unless(row)}
            lines = (json.dumps(sealed(row), ensure_ascii=False) + "\n" for row in kept.values())
            save_text("".join(lines), self.path / "manifest.jsonl")
            for path in self._own_parts():
                path.unlink()
        return kept

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Keep other shards from merging meanwhile."""
        with open(self.path / ".lock", "w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def finished(self, wanted: Iterable[Key]) -> set[Key]:
        """Merge, forget wanted pictures that are missing or damaged, and say which of the wanted ones are there."""
        wanted = set(wanted)
        kept = self.merge(unless=lambda row: key_of(row) in wanted and not self.intact(row))
        return wanted & kept.keys()

    # ------------------------------------------------------------------------------------ layouts

    def write_prompt_files(self, rows: dict[int, dict]) -> None:
        """The layout's file beside each prompt's pictures: GenEval reads the row itself from `metadata.jsonl`."""
        if self.layout == "geneval":
            for index, row in rows.items():
                line = json.dumps(row, ensure_ascii=False, default=str) + "\n"
                save_text(line, (self.path / self.file_of((index, 0))).parent.parent / "metadata.jsonl")

    def write_grids(self, names: dict[int, str], rows: dict[Key, dict]) -> None:
        """The layout's sheets: DPG-Bench reads a prompt's pictures from one file, `grids/ID.png`, two a row."""
        if self.layout != "dpg":
            return
        for index, name in names.items():
            files = [rows[index, k]["file"] for k in range(MOST_IN_GRID) if (index, k) in rows]
            if files:
                sheet = grid([Image.open(self.path / file).convert("RGB") for file in files])
                save_bytes(png_bytes(sheet, {"files": files}), self.path / "grids" / f"{name}.png")


def grid(images: list[Image.Image]) -> Image.Image:
    """Pictures of one size without gaps, two a row; a single one as it is."""
    width, height = images[0].size
    columns = min(GRID_COLUMNS, len(images))
    sheet = Image.new("RGB", (columns * width, -(-len(images) // columns) * height))
    for k, image in enumerate(images):
        sheet.paste(image, (k % columns * width, k // columns * height))
    return sheet


def check_layout(layout: str, names: list[str], samples: int) -> None:
    """Raise UserError where a layout cannot hold what is asked for."""
    if layout != "dpg":
        return
    if samples > MOST_IN_GRID:
        raise UserError(f"--num_samples_per_prompt is {samples}; --layout dpg holds {MOST_IN_GRID} at most")
    unfit = [name for name in names if not re.fullmatch(r"[\w-]+", name)]
    if unfit:
        found = shortened(unfit[0])
        raise UserError(f"--layout dpg names files by id; {found} has other signs than letters, digits, _ and -")
    overlong = [name for name in names if len(name.encode()) > LONGEST_NAME]
    if overlong:
        raise UserError(f"--layout dpg names files by id; {shortened(overlong[0])} has more than {LONGEST_NAME} bytes")
