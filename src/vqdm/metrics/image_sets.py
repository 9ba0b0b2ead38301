"""Images to score: what `generate.py` wrote, any folder of images, or a zip file of them.

Images of two sets are a pair if their keys (prompt id, sample) are equal; their order does not matter.
"""

from __future__ import annotations

import json
import os
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import IO, Any

from PIL import ExifTags, Image

from vqdm.documents import decoded, first_line, parse_json, read_text, shortened
from vqdm.errors import RunError, UserError
from vqdm.images import (
    BESIDE,
    FORMATS,
    SUFFIXES,
    check_image,
    is_encodable,
    is_hidden,
    is_sheet,
    listed,
    parse_rows,
    read_image,
)
from vqdm.parallel import Ranks
from vqdm.tracking import progress_bar

MOST_TEXT = 2**28  # bytes of a text file once unpacked
MANIFEST = "manifest.jsonl"
# What two images of one prompt must share, so that only the denoiser differs between them.
SHARED_BY_IMAGES = ("prompt", "negative_prompt", "seed", "settings")
SHARED_BY_RUNS = ("dtype", "model_sha256")

Key = tuple[str, int]


@dataclass(frozen=True)
class ImageEntry:
    """One image of a set.

    Attributes:
        id, sample: the name of the prompt and the number of its image; together the key.
        file: path inside the set.
        row: of the manifest; empty without a manifest.
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
class ImageSet:
    """Images by key, in the order of the manifest, or of their names without a manifest.

    Attributes:
        path: a folder or a zip file.
        run: content of `run.json`; empty without that file.
        notes: lines about images that are left out, or that a user may not expect.
    """

    path: Path
    entries: dict[Key, ImageEntry]
    run: dict
    notes: tuple[str, ...] = ()

    @cached_property
    def _files(self) -> ImageFiles:
        return ImageFiles(self.path)

    def load(self, entry: ImageEntry) -> Image.Image:
        """Decode an image to 8-bit RGB. Raises RunError for a file that is no image, or one of too many pixels."""
        try:
            with self._files.open(entry.file) as source:
                return read_image(source)
        except MemoryError:
            raise
        except Exception as error:  # archives know a dozen kinds, some of them only Exception
            raise RunError(f"{self.path / entry.file} cannot be read as an image: {first_line(error)}") from None

    def check(self, flag: str) -> None:
        """Read the header of every image. Raises UserError for a file that is no image; names `flag`."""
        for entry in self.entries.values():
            try:
                with self._files.open(entry.file) as source:
                    check_image(source)
            except MemoryError:
                raise
            except Exception as error:  # as in `load`
                file = self.path / entry.file
                raise UserError(f"{flag}: {file} cannot be read as an image: {first_line(error)}") from None

    @property
    def has_prompts(self) -> bool:
        return all(entry.prompt is not None for entry in self.entries.values())

    @property
    def full_precision(self) -> bool:
        return self.run.get("full_precision") is True

    def problems(self) -> dict[str, int]:
        """Count the images that have a problem in the manifest: problem → count."""
        found = [entry.row.get("problem") for entry in self.entries.values()]
        return {problem: found.count(problem) for problem in sorted({one for one in found if one})}


# --------------------------------------------------------------------------------------------- files


@dataclass(frozen=True)
class ImageFiles:
    """Files of a folder, or of a zip file that is read in place, by names relative to it."""

    path: Path

    @cached_property
    def _archive(self) -> zipfile.ZipFile | None:
        """None for a folder."""
        return zipfile.ZipFile(self.path) if self.path.is_file() else None

    @cached_property
    def _entries(self) -> list[str]:
        """Everything at any depth but folders; os.walk, unlike glob, raises OSError for a folder it cannot read."""
        if self._archive:
            return [name for name in self._archive.namelist() if not name.endswith("/")]
        found = []
        for folder, folders, files in os.walk(self.path, onerror=_raise):
            links = [name for name in folders if os.path.islink(os.path.join(folder, name))]
            found += [Path(folder, name).relative_to(self.path).as_posix() for name in (*files, *links)]
        return found

    @cached_property
    def _unique(self) -> frozenset[str]:
        return frozenset(self._entries)

    @cached_property
    def _top(self) -> str:
        """The folder of the manifest, with its slash: the only one at the top of a zip file, as `zip -r` leaves it."""
        tops = {name.split("/")[0] for name in self._entries if not name.startswith("__MACOSX/")}
        top = f"{tops.pop()}/" if self._archive and len(tops) == 1 else ""
        return top if top + MANIFEST in self._unique else ""

    def names(self) -> list[str]:
        return [name for name in self._entries if self.has(name)]

    def unreachable(self) -> list[str]:
        """List links to folders or to nothing."""
        return [name for name in self._entries if not self.has(name)]

    def beside_manifest(self, name: str) -> str:
        """Return the name here of a file that the manifest names."""
        return self._top + name

    def matching(self, pattern: str) -> list[str]:
        """List the files beside the manifest whose names match."""
        return [name for name in self._entries if fnmatchcase(name, self._top + pattern)]

    def has(self, name: str) -> bool:
        return name in self._unique if self._archive else (self.path / name).is_file()

    def leaves(self, name: str) -> bool:
        """Return whether a file is a link to somewhere outside."""
        return not self._archive and not (self.path / name).resolve().is_relative_to(self.path.resolve())

    def open(self, name: str) -> IO[bytes]:
        return self._archive.open(name) if self._archive else (self.path / name).open("rb")

    def text(self, name: str) -> str:
        """Read a text file. Raises OSError, or ValueError if it is too long or not UTF-8."""
        if not self._archive:
            return read_text(self.path / name, MOST_TEXT)
        if self._archive.getinfo(name).file_size > MOST_TEXT:
            raise ValueError(f"it has more than {MOST_TEXT} bytes")
        return decoded(self._archive.read(name))


def _raise(error: OSError) -> None:
    raise error


# --------------------------------------------------------------------------------------------- opening


def open_images(path: str, flag: str) -> ImageSet:
    """Open the set of a folder or zip file.

    Raises:
        UserError: it is not found, holds no image, or its run is not finished; names `flag`.
    """
    place = Path(path)
    if not place.exists():
        raise UserError(f"{flag}: {path} is not found; give a folder of images")
    if place.suffix.lower() in (".npz", ".npy"):
        raise UserError(
            f"{flag}: {path} holds arrays, not images; give a folder or zip file (--fid_reference takes statistics)"
        )
    if place.is_file() and not zipfile.is_zipfile(place):
        kinds = "a folder, a zip file nor .npz" if flag == "--fid_reference" else "a folder nor a zip file"
        raise UserError(f"{flag}: {path} is neither {kinds}")
    files = ImageFiles(place)
    try:
        images = _of_manifest(files, flag)
        named = bool(images)
        images = images or _of_names(_names(files))
        run = _read_run(files, flag)
        left_out = _left_out(files, {image.file for image in images.values()})
        notes = left_out if named else left_out + _unexpected(files, [one.file for one in images.values()])
    except UserError:
        raise
    except (OSError, zipfile.BadZipFile, zlib.error, RuntimeError, ValueError) as error:
        raise UserError(f"{flag}: {path} cannot be read: {first_line(error)}") from None
    if not images:
        raise UserError(f"{flag}: {'; '.join([f'{path} holds no image ({chr(32).join(SUFFIXES)})', *notes])}")
    unfit = [name for one in images.values() for name in (one.id, one.file) if not is_encodable(name)]
    if unfit:
        raise UserError(f"{flag}: {path} holds {shortened(unfit[0])}, whose name is not UTF-8; rename it")
    return ImageSet(place, images, run, tuple(f"{flag}: {path}: {note}" for note in notes))


def _left_out(files: ImageFiles, used: set[str]) -> list[str]:
    """Return lines about images that are not in the set: of other formats, hidden, or not in its manifest."""
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


def _unexpected(files: ImageFiles, names: list[str]) -> list[str]:
    """Return lines about images of a set without a manifest: in folders below, or not read as a viewer shows them."""
    depths = [len(PurePosixPath(name).parts) for name in names]
    below = [name for name, depth in zip(names, depths, strict=True) if depth > min(depths)]
    peculiar: dict[str, list[str]] = {"in folders below the others": below}
    for name in names:
        for words in _peculiarities(files, name):
            peculiar.setdefault(words, []).append(name)
    return [f"{words}: {listed(some)}" for words, some in peculiar.items() if some]


def _peculiarities(files: ImageFiles, name: str) -> list[str]:
    """Return what of a file is not read; nothing for one that cannot be read, which `ImageSet.load` refuses."""
    try:
        with files.open(name) as source, Image.open(source, formats=FORMATS) as image:
            found = {
                "animated, of which the first frame is taken": getattr(image, "n_frames", 1) > 1,
                "with transparency, of which the colours alone are taken": image.has_transparency_data,
                "with an EXIF orientation, which is not applied": image.format != "TIFF"  # Pillow applies that
                and image.getexif().get(ExifTags.Base.Orientation, 1) != 1,
            }
            return [words for words, is_so in found.items() if is_so]
    except Exception:  # as in `load`
        return []


def _of_manifest(files: ImageFiles, flag: str) -> dict[Key, ImageEntry]:
    """Return the images that the manifest names; none without a manifest."""
    if files.matching("manifest.*.jsonl"):
        raise UserError(f"{flag}: {files.path} is not finished; run the same generate.py with --resume first")
    rows = _rows(files, flag)
    named = [files.beside_manifest(row["file"]) for row in rows]
    outside = [name for name in named if files.leaves(name)]
    if outside:
        raise UserError(f"{flag}: {files.path / outside[0]} of its manifest is a link to a file outside of the folder")
    missing = [name for name in named if not files.has(name)]
    if missing:
        raise UserError(f"{flag}: {files.path / missing[0]} and {len(missing) - 1} more of its manifest are not found")
    pairs = zip(rows, named, strict=True)
    found = [ImageEntry(str(row.get("id", row["index"])), row["sample"], name, row) for row, name in pairs]
    return {image.key: image for image in found}


def _rows(files: ImageFiles, flag: str) -> list[dict]:
    """Return the rows of a finished manifest; a damaged line is an error, since fewer images would be scored."""
    name = files.beside_manifest(MANIFEST)
    if not files.has(name):
        return []
    rows = parse_rows(files.text(name))
    if None in rows:
        damage = f"{rows.count(None)} of {len(rows)} lines are not rows of it"
        raise UserError(f"{flag}: {files.path / name} is damaged: {damage}")
    return rows


def _of_names(names: Iterable[str]) -> dict[Key, ImageEntry]:
    """Return images called by their names without the ending, unless several share that: `a.png` and `a.jpg`."""
    stems = {name: str(PurePosixPath(name).with_suffix("")) for name in sorted(names)}
    alike = Counter(stems.values())
    found = [ImageEntry(stem if alike[stem] == 1 else name, 0, name, {}) for name, stem in stems.items()]
    return {image.key: image for image in found}


def _names(files: ImageFiles) -> list[str]:
    """List images at any depth but hidden ones. Raises ValueError for a zip file that has a name twice."""
    names = [name for name in files.names() if not is_hidden(name) and name.lower().endswith(SUFFIXES)]
    if len(set(names)) < len(names):
        twice = Counter(names).most_common(1)[0][0]
        raise ValueError(f"it holds {shortened(twice)} twice")
    return names


def _read_run(files: ImageFiles, flag: str) -> dict:
    """Return the content of run.json, with the parts that are read here of their types; empty without that file."""
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


def shared_keys(images: ImageSet, reference: ImageSet) -> list[Key]:
    """Return the keys that both sets have, in the order of the first."""
    return [key for key in images.entries if key in reference.entries]


def mismatches(images: ImageSet, reference: ImageSet) -> list[str]:
    """Return lines about differences beside the denoiser; empty if there are none."""
    keys = shared_keys(images, reference)
    lines = []
    if len(keys) < len(images.entries):
        lines.append(f"{len(images.entries) - len(keys)} of {len(images.entries)} images have no partner")
    lines += _differing_rows(images, reference, keys)
    lines += _differing_runs(images.run, reference.run)
    return lines


def _differing_rows(images: ImageSet, reference: ImageSet, keys: list[Key]) -> list[str]:
    lines = []
    for name in SHARED_BY_IMAGES:
        pairs = [(images.entries[key].row.get(name), reference.entries[key].row.get(name)) for key in keys]
        differing = [(ours, theirs) for ours, theirs in pairs if ours != theirs]
        if differing:
            lines.append(f"{_words(name, *differing[0])} ({len(differing)} of {len(pairs)} images)")
    return lines


def _words(name: str, ours, theirs) -> str:
    """Describe how two values differ; of settings, the first that does."""
    if isinstance(ours, dict) and isinstance(theirs, dict):
        name = next(key for key in [*ours, *theirs] if ours.get(key) != theirs.get(key))
        ours, theirs = ours.get(name), theirs.get(name)
    return f"{name} is {ours!r}, the reference's {theirs!r}"


def _differing_runs(ours: dict, theirs: dict) -> list[str]:
    pairs = {name: [(run.get("settings") or {}).get(name) for run in (ours, theirs)] for name in SHARED_BY_RUNS}
    pairs["scheduler"] = [run.get("scheduler") for run in (ours, theirs)]
    known = {name: pair for name, pair in pairs.items() if None not in pair}
    differing = {name: pair for name, pair in known.items() if pair[0] != pair[1]}
    return [
        "MODEL differs from the reference's" if name == "model_sha256" else _words(name, *pair)
        for name, pair in differing.items()
    ]


# --------------------------------------------------------------------------------------------- loading in batches


@dataclass(frozen=True)
class ImageLoader:
    """Loads images in batches, ahead of the network that takes them; each process loads its shard.

    Attributes:
        batch_size: images per call of a network.
        threads: that decode and prepare images meanwhile.
    """

    ranks: Ranks
    batch_size: int
    threads: int

    def batches(self, keys: Sequence, prepare: Callable[[Any], Any], description: str) -> Iterator[tuple[list, list]]:
        """Yield this rank's keys in batches, with what `prepare` returns for each key."""
        shard = list(self.ranks.shard(keys))
        groups = [shard[start : start + self.batch_size] for start in range(0, len(shard), self.batch_size)]
        ticks = progress_bar(total=len(shard), description=description) if self.ranks.main else None
        with ThreadPoolExecutor(self.threads) as pool:
            ahead = [pool.submit(prepare, key) for key in groups[0]] if groups else []
            for number, group in enumerate(groups):
                now, later = ahead, groups[number + 1] if number + 1 < len(groups) else []
                ahead = [pool.submit(prepare, key) for key in later]
                yield group, [future.result() for future in now]
                if ticks is not None:
                    ticks.update(len(group))
        if ticks is not None:
            ticks.close()


def resized(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """Resize a reference image to the size of the scored one, bicubic, if it differs."""
    return image if image.size == size else image.resize(size, Image.Resampling.BICUBIC)
