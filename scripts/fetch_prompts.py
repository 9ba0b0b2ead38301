"""Bring published prompts into a file that the programs here read: columns `id`, `prompt`, and what else there is.

    python scripts/fetch_prompts.py coco coco.csv --count 5000
    python scripts/fetch_prompts.py coco coco.csv --source captions_val2014.json
    python scripts/fetch_prompts.py parti parti.csv --count 128
    python scripts/fetch_prompts.py mjhq mjhq.csv --source meta_data.json --count 5000
    python scripts/fetch_prompts.py sdci sdci.csv --source sDCI.yaml --count 5000

SET is one of

    coco   COCO 2014 captions, one per image. --source: captions_*.json, the zip file of annotations, or a table with
           columns image_id (or id) and caption. From the hub: sayakpaul/coco-30-val-2014, captions only
    parti  PartiPrompts. --source: PartiPrompts.tsv. From the hub: nateraw/parti-prompts
    mjhq   MJHQ-30K. --source: meta_data.json. From the hub: playgroundai/MJHQ-30K
    sdci   summarized captions of Densely Captioned Images, up to 77 tokens each. --source: sDCI.yaml, image names and
           prompts. From the hub: mit-han-lab/svdquant-datasets

Without --count all prompts are written, in their order; with it so many, chosen at random without replacement.
"""

from __future__ import annotations

import csv
import io
import random
import sys
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from vqdm.cli import Parser, run_script
from vqdm.config import argument, check_flags, flag
from vqdm.documents import decoded, first_line, parse_json
from vqdm.errors import UserError
from vqdm.prompts import load_rows
from vqdm.storage.files import save_text

COLUMNS = ("id", "prompt", "category", "challenge", "note")


@dataclass(frozen=True)
class PromptSet:
    """Where a set comes from.

    Attributes:
        licence: as on its page.
        local: reads a local copy.
        hub: reads it from the hub.
    """

    licence: str
    local: Callable[[Path], list[dict]]
    hub: Callable[[], list[dict]]


# --------------------------------------------------------------------------------------------- local copies


def read_table(path: Path) -> list[dict]:
    """Rows of any prompt file."""
    return load_rows(str(path), "--source")


def read_coco(path: Path) -> list[dict]:
    """Return one caption per image: of COCO's own annotations that with the lowest number, of a table the first."""
    if path.suffix == ".zip":
        return first_captions(captions_in_zip(path))
    if path.suffix == ".json":
        annotations = annotations_of(path.read_bytes(), path)
        if annotations is not None:
            return first_captions(annotations)
    rows = [row | {"id": row.get("image_id", row.get("id"))} for row in read_table(path)]
    return first_captions(rows) if all(row["id"] is not None for row in rows) else rows


def captions_in_zip(path: Path) -> list[dict]:
    """Return the captions of a zip file of annotations, those of the validation images if it has several."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = sorted(name for name in archive.namelist() if Path(name).name.startswith("captions_"))
            if names:
                print(f"--source {path}: {names[-1]} is read" + (f", not {', '.join(names[:-1])}" if names[1:] else ""))
                return annotations_of(archive.read(names[-1]), path) or []
    except (OSError, zipfile.BadZipFile) as error:
        raise UserError(f"--source {path} cannot be read: {error}") from None
    raise UserError(f"--source {path} holds no captions_*.json")


def annotations_of(data: bytes, path: Path) -> list[dict] | None:
    """Captions of COCO's JSON by rising number; None where it is another kind of JSON."""
    try:
        value = parse_json(decoded(data))
        if not isinstance(value, dict) or "annotations" not in value:
            return None
        ordered = sorted(value["annotations"], key=lambda one: one["id"])
        return [{"id": one["image_id"], "prompt": one["caption"]} for one in ordered]
    except ValueError as error:
        raise UserError(f"--source {path} cannot be read: {first_line(error)}") from None
    except (KeyError, TypeError) as error:
        raise UserError(f"--source {path} is not COCO's file of captions: {error!r}") from None


def first_captions(rows: list[dict]) -> list[dict]:
    """The first row of each id, by rising id."""
    first: dict[str, dict] = {}
    for row in rows:
        first.setdefault(str(row["id"]), row)
    return [first[name] for name in sorted(first, key=lambda name: (len(name), name))]


# --------------------------------------------------------------------------------------------- the hub


def from_hub(repository: str, file: str) -> list[dict]:
    """Rows of one file of a data set on the hub."""
    from huggingface_hub import hf_hub_download

    return read_table(Path(hf_hub_download(repository, file, repo_type="dataset")))


def captions_on_hub() -> list[dict]:
    """COCO's captions without its images."""
    from huggingface_hub import HfFileSystem

    return captions_of(HfFileSystem(), "datasets/sayakpaul/coco-30-val-2014/**/*.parquet")


def captions_of(filesystem, pattern: str) -> list[dict]:
    """The column `caption` of parquet files, which need not be read as a whole; numbers serve as ids."""
    try:
        from pyarrow.parquet import ParquetFile
    except ImportError:
        raise UserError("reading these captions needs pyarrow (pip install pyarrow)") from None
    captions: list[str] = []
    for path in sorted(filesystem.glob(pattern)):
        with filesystem.open(path, "rb") as file:
            captions += ParquetFile(file).read(columns=["caption"])["caption"].to_pylist()
    return [{"id": number, "prompt": caption} for number, caption in enumerate(captions)]


SETS = {
    "coco": PromptSet("annotations under CC BY 4.0", read_coco, captions_on_hub),
    "parti": PromptSet("Apache-2.0", read_table, lambda: from_hub("nateraw/parti-prompts", "PartiPrompts.tsv")),
    "mjhq": PromptSet(
        "none on its page; look before you pass it on",
        read_table,
        lambda: from_hub("playgroundai/MJHQ-30K", "meta_data.json"),
    ),
    "sdci": PromptSet(
        "that of the Densely Captioned Images; look before you pass it on",
        read_table,
        lambda: from_hub("mit-han-lab/svdquant-datasets", "sDCI.yaml"),
    ),
}


def fetched(name: str, source: str | None) -> list[dict]:
    """Rows of a set.

    Raises:
        UserError: the local copy is not found or is something else, or the hub cannot be reached.
    """
    if source is not None:
        if not Path(source).is_file():
            raise UserError(f"--source {source} is not found, or is not a file")
        return SETS[name].local(Path(source))
    try:
        return SETS[name].hub()
    except UserError:
        raise
    except Exception as error:
        raise UserError(
            f"{name} cannot be had from the hub ({first_line(error)}); give a local copy as --source"
        ) from None


# --------------------------------------------------------------------------------------------- writing


def chosen(rows: list[dict], count: int, seed: int) -> list[dict]:
    """Choose `count` rows without replacement, in their order; 0 means all."""
    if count > len(rows):
        raise UserError(f"--count is {count}, but there are {len(rows)} prompts")
    numbers = sorted(random.Random(seed).sample(range(len(rows)), count)) if count else range(len(rows))
    return [rows[number] for number in numbers]


def tidy(row: dict) -> dict:
    """Lower-case names, and no line breaks or doubled blanks in the prompt."""
    named = {str(name).lower(): value for name, value in row.items()}
    return named | {"prompt": " ".join(str(named["prompt"]).split())}


def table(rows: list[dict]) -> str:
    """CSV with those of COLUMNS that any row has."""
    names = [name for name in COLUMNS if any(name in row for row in rows)]
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, names, extrasaction="ignore", restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return buffer.getvalue()


@dataclass(frozen=True, kw_only=True)
class FetchConfig:
    """Settings of this program."""

    set: str = argument(", ".join(SETS), choices=tuple(SETS), metavar="SET")
    file: str = argument("file to write", metavar="FILE.csv")
    source: str | None = flag(None, "a local copy (default: the hub is asked)", metavar="FILE", common=True)
    count: int = flag(0, "prompts, chosen at random; 0 = all", ge=0, common=True)
    seed: int = flag(0, "random seed", ge=0, common=True)

    def __post_init__(self) -> None:
        check_flags(self)


PARSER = Parser(FetchConfig, __doc__)


def main(argv: list[str] | None = None) -> None:
    """Parse, fetch, write, print where the result is."""
    options = PARSER.parse(argv)
    path = Path(options.file)
    if path.suffix != ".csv":
        raise UserError(f"FILE.csv is {path}; allowed are names that end in .csv")
    found = fetched(options.set, options.source)
    rows = [tidy(row) for row in found if str(row.get("prompt") or "").strip()]
    if len(rows) < len(found):
        print(f"{len(found) - len(rows)} of {len(found)} rows have no prompt and are left out")
    dropped = sorted({str(name) for row in rows for name in row} - set(COLUMNS))
    if dropped:
        print(f"columns left out: {', '.join(dropped)}; {path.name} has {', '.join(COLUMNS)} only")
    rows = chosen(rows, options.count, options.seed)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_text(table(rows), path)
    print(f"{len(rows)} prompts in {path}; licence of {options.set}: {SETS[options.set].licence}")


if __name__ == "__main__":
    sys.exit(run_script(main, after_interrupt="nothing was written"))
