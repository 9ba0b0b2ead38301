"""Pictures to score: what `generate.py` wrote, any folder of pictures, or a zip file of them.

Pictures of two sets belong together when their keys (prompt id, sample) are equal, never because of their order.
"""

from __future__ import annotations

import json
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath

from PIL import Image

from vqdm.documents import first_line, parse_json, shortened
from vqdm.errors import RunError, UserError
from vqdm.image_folder import is_encodable, parse_rows
from vqdm.images import BESIDE, FORMATS, SUFFIXES, is_hidden, is_sheet, listed, read_image
from vqdm.metrics.image_files import MANIFEST, PictureFiles, open_files

ANIMATED = (".png", ".apng", ".gif", ".webp", ".tif", ".tiff", ".avif")  # endings of files that may hold several images
# What two pictures of one prompt must share, so that only the UNet differs between them.
SHARED_BY_PICTURES = ("prompt", "negative_prompt", "seed", "settings")
SHARED_BY_RUNS = ("dtype", "model_sha256")

Key = tuple[str, int]


@dataclass(frozen=True)
class Picture:
    """One file of a set.

    Attributes:
        id, sample: the prompt's name and the number of its picture; together the key.
        file: path inside the set.
        row: the manifest's row; empty where there is no manifest.
    """

    id: str
    sample: int
    file: str
    row: dict

    @property
    def key(self) -> Key:
        return self.id, self.sample

    @property
    def prompt(self) -> str | None:
        return self.row.get("prompt")


@dataclass(frozen=True)
class PictureSet:
    """Pictures by key, in the order of the manifest, or of their names where there is none.

    Attributes:
        path: a folder or a zip file.
        run: content of `run.json`; empty where there is none.
        notes: lines about what is left out of the set, or is not as it seems.
    """

    path: Path
    pictures: dict[Key, Picture]
    run: dict
    notes: tuple[str, ...] = ()

    @cached_property
    def _files(self) -> PictureFiles:
        return open_files(self.path)

    def load(self, picture: Picture) -> Image.Image:
        """The decoded picture, 8-bit RGB. Raises RunError for a file that is no picture, or one of too many pixels."""
        try:
            with self._files.open(picture.file) as source:
                return read_image(source)
        except MemoryError:
            raise
        except Exception as error:  # archives know a dozen kinds, some of them only Exception
            raise RunError(f"{self.path / picture.file} cannot be read as a picture: {first_line(error)}") from None

    @property
    def has_prompts(self) -> bool:
        return all(picture.prompt is not None for picture in self.pictures.values())

    @property
    def full_precision(self) -> bool:
        return self.run.get("full_precision") is True

    def problems(self) -> dict[str, int]:
        """What the manifest says is wrong with pictures → how many there are."""
        found = [picture.row.get("problem") for picture in self.pictures.values()]
        return {problem: found.count(problem) for problem in sorted({one for one in found if one})}


def open_pictures(path: str, flag: str) -> PictureSet:
    """The set of a folder or zip file.

    Raises:
        UserError: nothing is there, no picture is in it, or its run is not finished; names `flag`.
    """
    place = Path(path)
    if not place.exists():
        raise UserError(f"{flag}: {path} is not there; give a folder of pictures")
    if place.suffix.lower() in (".npz", ".npy"):
        raise UserError(
            f"{flag}: {path} holds arrays, not images; give a folder or zip file (--fid_reference takes statistics)"
        )
    if place.is_file() and not zipfile.is_zipfile(place):
        raise UserError(f"{flag}: {path} is neither a folder nor a zip file")
    files = open_files(place)
    try:
        pictures = _of_manifest(files, flag)
        named = bool(pictures)
        pictures = pictures or _of_names(_names(files))
        run = _read_run(files, flag)
        left_out = _left_out(files, {picture.file for picture in pictures.values()})
        notes = left_out if named else left_out + _unexpected(files, [one.file for one in pictures.values()])
    except UserError:
        raise
    except (OSError, zipfile.BadZipFile, zlib.error, RuntimeError, ValueError) as error:
        raise UserError(f"{flag}: {path} cannot be read: {first_line(error)}") from None
    if not pictures:
        raise UserError(f"{flag}: {'; '.join([f'{path} holds no picture ({chr(32).join(SUFFIXES)})', *notes])}")
    unfit = [name for one in pictures.values() for name in (one.id, one.file) if not is_encodable(name)]
    if unfit:
        raise UserError(f"{flag}: {path} holds {shortened(unfit[0])}, whose name is not UTF-8; rename it")
    return PictureSet(place, pictures, run, tuple(f"{flag}: {path}: {note}" for note in notes))


def _left_out(files: PictureFiles, used: set[str]) -> list[str]:
    """Lines about images that are not in the set: of other formats, hidden, or not in its manifest."""
    every = [name for name in files.names() if not name.startswith("__MACOSX/")]
    every = [name for name in every if name not in used and not PurePosixPath(name).name.startswith("._")]
    reasons = {
        "in formats that are not read": [
            name for name in every if not name.lower().endswith(SUFFIXES + BESIDE) and not is_hidden(name)
        ],
        "hidden": [name for name in every if name.lower().endswith(SUFFIXES) and is_hidden(name)],
        "not named by the manifest": [
            name for name in every if name.lower().endswith(SUFFIXES) and not is_hidden(name) and not is_sheet(name)
        ],
        "links to folders or to nothing, which are not followed": files.unreachable(),
    }
    return [f"left out, {reason}: {listed(names)}" for reason, names in reasons.items() if names]


def _unexpected(files: PictureFiles, names: list[str]) -> list[str]:
    """Lines about images of a set without a manifest that a user may not know of: in folders below, or animated."""
    depths = [len(PurePosixPath(name).parts) for name in names]
    below = [name for name, depth in zip(names, depths, strict=True) if depth > min(depths)]
    animated = [name for name in names if name.lower().endswith(ANIMATED) and _frames(files, name) > 1]
    lines = [f"in folders below the others: {listed(below)}"] if below else []
    return lines + ([f"animated, of which the first frame is taken: {listed(animated)}"] if animated else [])


def _frames(files: PictureFiles, name: str) -> int:
    """Frames of a file; 1 for one that cannot be read, which `PictureSet.load` refuses."""
    try:
        with files.open(name) as source, Image.open(source, formats=FORMATS) as image:
            return getattr(image, "n_frames", 1)
    except Exception:  # as in `load`
        return 1


def _of_manifest(files: PictureFiles, flag: str) -> dict[Key, Picture]:
    """Pictures that the manifest names; none where there is no manifest."""
    if files.matching("manifest.*.jsonl"):
        raise UserError(f"{flag}: {files.path} is not finished; run the same generate.py with --resume first")
    rows = _rows(files, flag)
    named = [files.beside_manifest(row["file"]) for row in rows]
    outside = [name for name in named if files.leaves(name)]
    if outside:
        raise UserError(f"{flag}: {files.path / outside[0]} of its manifest is a link to a file outside of the folder")
    missing = [name for name in named if not files.has(name)]
    if missing:
        raise UserError(f"{flag}: {files.path / missing[0]} and {len(missing) - 1} more of its manifest are not there")
    pairs = zip(rows, named, strict=True)
    found = [Picture(str(row.get("id", row["index"])), row["sample"], name, row) for row, name in pairs]
    return {picture.key: picture for picture in found}


def _rows(files: PictureFiles, flag: str) -> list[dict]:
    """Rows of a finished manifest, which has no line that is none: to score fewer pictures would be a silent error."""
    name = files.beside_manifest(MANIFEST)
    if not files.has(name):
        return []
    rows = parse_rows(files.text(name))
    if None in rows:
        damage = f"{rows.count(None)} of {len(rows)} lines are not rows of it"
        raise UserError(f"{flag}: {files.path / name} is damaged: {damage}")
    return rows


def _of_names(names: Iterable[str]) -> dict[Key, Picture]:
    """Pictures called by their names without the ending, but where several share that: `a.png` and `a.jpg` are two."""
    stems = {name: str(PurePosixPath(name).with_suffix("")) for name in sorted(names)}
    alike = Counter(stems.values())
    found = [Picture(stem if alike[stem] == 1 else name, 0, name, {}) for name, stem in stems.items()]
    return {picture.key: picture for picture in found}


def _names(files: PictureFiles) -> list[str]:
    """Pictures at any depth; hidden ones are left out. Raises UserError where a zip file has a name twice."""
    names = [name for name in files.names() if not is_hidden(name) and name.lower().endswith(SUFFIXES)]
    if len(set(names)) < len(names):
        twice = Counter(names).most_common(1)[0][0]
        raise ValueError(f"it holds {shortened(twice)} twice")
    return names


def _read_run(files: PictureFiles, flag: str) -> dict:
    """The content of run.json, whose parts that are read here are of their types; empty where there is none."""
    name = files.beside_manifest("run.json")
    if not files.has(name):
        return {}
    try:
        run = parse_json(files.text(name))
        json.dumps(run, allow_nan=False, ensure_ascii=False).encode()
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{flag}: {files.path / name} is damaged: {first_line(error)}") from None
    if not _is_run(run):
        raise UserError(f"{flag}: {files.path / name} is not what generate.py wrote")
    return run


def _is_run(run) -> bool:
    if not isinstance(run, dict) or not isinstance(run.get("settings", {}), dict):
        return False
    settings = run.get("settings", {})
    names = [settings.get(name) for name in ("model", "quantized")]
    parts = [run.get("scheduler"), settings.get("sampling")]
    return all(isinstance(name, str | None) for name in names) and all(isinstance(part, dict | None) for part in parts)


# --------------------------------------------------------------------------------------------- two sets


def shared_keys(images: PictureSet, reference: PictureSet) -> list[Key]:
    """Keys that both sets have, in the order of the first."""
    return [key for key in images.pictures if key in reference.pictures]


def mismatches(images: PictureSet, reference: PictureSet) -> list[str]:
    """Lines that say why a comparison would measure more than the UNet; empty when it would not."""
    keys = shared_keys(images, reference)
    lines = []
    if len(keys) < len(images.pictures):
        lines.append(f"{len(images.pictures) - len(keys)} of {len(images.pictures)} pictures have no partner")
    lines += _differing_rows(images, reference, keys)
    lines += _differing_runs(images.run, reference.run)
    return lines


def _differing_rows(images: PictureSet, reference: PictureSet, keys: list[Key]) -> list[str]:
    lines = []
    for name in SHARED_BY_PICTURES:
        pairs = [(images.pictures[key].row.get(name), reference.pictures[key].row.get(name)) for key in keys]
        differing = [(ours, theirs) for ours, theirs in pairs if ours != theirs]
        if differing:
            lines.append(f"{_words(name, *differing[0])} ({len(differing)} of {len(pairs)} pictures)")
    return lines


def _words(name: str, ours, theirs) -> str:
    """How two values differ; of settings, the first that does."""
    if isinstance(ours, dict) and isinstance(theirs, dict):
        name = next(key for key in [*ours, *theirs] if ours.get(key) != theirs.get(key))
        ours, theirs = ours.get(name), theirs.get(name)
    return f"{name} is {ours!r}, the reference's {theirs!r}"


def _differing_runs(ours: dict, theirs: dict) -> list[str]:
    pairs = {name: [(run.get("settings") or {}).get(name) for run in (ours, theirs)] for name in SHARED_BY_RUNS}
    pairs["scheduler"] = [run.get("scheduler") for run in (ours, theirs)]
    known = {name: pair for name, pair in pairs.items() if None not in pair}
    return [_words(name, *pair) for name, pair in known.items() if pair[0] != pair[1]]
