"""The output folder of a quantization while it grows: settings, recorded data, one file per finished layer.

In the folder:

run.json                    settings and versions, written first; compared by --resume
work/evaluation, ...        shards of long steps, such as recorded trajectories
work/hessians*, work/shared_codebooks  Hessians, and shared codebooks, if the run needs them
work/layers/*.safetensors   one quantized layer each: stored tensors, and its report in the header
work/transformer_2, work/text_encoder, ...  the same of a second expert, and of text encoders
plan.json                   the formats that --target_bits chose; plan_text_encoder.json, ... of such parts
layers.jsonl                one line per layer, as the run goes; layers_text_encoder.jsonl, ...
summary.json                written last; marks the run as finished

Every file in work/ contains its own checksum. Several processes share the folder, also on several machines.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from vqdm.additive.code import AdditiveCode, CodeSpec
from vqdm.config import differences
from vqdm.documents import parse_json, read_json
from vqdm.errors import RunError, UserError
from vqdm.layers.quantized import Layer
from vqdm.parallel import Ranks
from vqdm.storage.files import (
    LOCK,
    UNFINISHED,
    CorruptFileError,
    load_checked,
    locked,
    probe,
    save_checked,
    save_json,
    save_text,
    sweep,
)

Tensors = dict[str, Tensor]
SECONDS_TO_APPEAR = 60.0  # for a network disk to show one machine the files of another


@dataclass(frozen=True)
class LayerResult:
    """A layer's code as stored, and its report."""

    tensors: dict[str, Tensor]
    spec: CodeSpec
    report: dict


class RunFolder:
    """The output folder of a run, and the files in it."""

    def __init__(self, path: str):
        self.path, self.part = Path(path), ""
        self.work = self.recorded = self.path / "work"  # of the layers, and of what is recorded once for all parts

    def of_part(self, name: str) -> RunFolder:
        """Return the same folder for the layers of another part of the pipeline: its files have the part's name."""
        found = RunFolder(str(self.path))
        found.part, found.work = name, self.work / name
        return found

    def beside(self, name: str) -> Path:
        """Return the place of a file beside the result, such as `plan.json` or `plan_text_encoder.json`."""
        stem, dot, ending = name.partition(".")
        return self.path / (f"{stem}_{self.part}{dot}{ending}" if self.part else name)

    def lock(self, ranks: Ranks) -> AbstractContextManager[None]:
        """Lock the folder against other runs; the first of several processes does so for all.

        Raises UserError if another run uses it, or it holds anything but a run.
        """
        if not ranks.main:
            return nullcontext()
        check_free(self.path)
        return locked(self.path)

    def check(self, settings: dict, resume: bool, ranks: Ranks) -> None:
        """Check that a run could open the folder, as `open` but for free disk, without writing.

        Raises:
            UserError: as `open`.
        """
        if not ranks.main:
            return
        check_claim(self.path, settings, resume)
        there = next(path for path in (self.path.absolute(), *self.path.absolute().parents) if path.exists())
        if not there.is_dir() or not os.access(there, os.W_OK):
            reason = "no permission to write" if there.is_dir() else "not a folder"
            raise UserError(f"--output_dir {self.path} cannot be written: {reason}: {there}")

    def open(self, settings: dict, versions: dict, resume: bool, need_bytes: int) -> None:
        """Claim the folder for a run.

        Raises:
            UserError: it cannot be written, holds anything but a run, holds a run and `resume` is off, holds a run with
                other settings, or its disk has less than `need_bytes` free.
        """
        record = self.path / "run.json"
        check_claim(self.path, settings, resume)
        self._check_writable(need_bytes)
        if not record.is_file():
            save_json({"settings": settings, "versions": versions}, record)
        sweep(self.path)

    def _check_writable(self, need_bytes: int) -> None:
        try:
            probe(self.work)
        except OSError as error:
            raise UserError(f"--output_dir {self.path} cannot be written: {error.strerror}") from None
        _check_free(self.path, need_bytes, "--output_dir")

    @property
    def finished(self) -> bool:
        return (self.path / "summary.json").is_file()

    def started_with(self, name: str, otherwise=None):
        """Return a setting that the run was started with, or `otherwise`; a resumed run may have another."""
        try:
            return read_json(self.path / "run.json")["settings"][name]
        except (OSError, ValueError, KeyError, TypeError):
            return otherwise

    def layer_path(self, name: str) -> Path:
        return self.work / "layers" / f"{name}.safetensors"

    def block_hessians(self, block: str) -> Path:
        """Return the folder of a block's Hessians while its layers are quantized."""
        return self.work / f"hessians_{block}"

    def drop_block(self, block: str) -> None:
        """Delete the scratch files of a block once its layers are quantized."""
        for path in (self.block_hessians(block), self.work / f"calibration_{block}"):
            shutil.rmtree(path, ignore_errors=True)

    def save_layer(self, layer: Layer, code: AdditiveCode, report: dict) -> None:
        metadata = {"spec": json.dumps(layer.spec.to_dict()), "report": json.dumps(report)}
        save_checked(code.pack(), self.layer_path(layer.name), metadata)

    def load_layer(self, layer: Layer) -> LayerResult | None:
        """Load a quantized layer; None if it is not done yet. Raises RunError if its file is damaged."""
        path = self.layer_path(layer.name)
        if not path.is_file():
            return None
        try:
            tensors, metadata = load_checked(path)
            spec = CodeSpec().changed(**parse_json(metadata["spec"]))
            if spec != layer.spec:
                raise ValueError("it is in another format than the layer")
            spec.check_tensors(layer.rows, layer.columns, tensors)
            return LayerResult(tensors, spec, dict(parse_json(metadata["report"])))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise RunError(f"{path} is damaged ({error}); delete it and run again with --resume") from None

    def rewrite_table(self, rows: list[dict]) -> None:
        """Write `layers.jsonl` with exactly `rows`; after a kill it may lack a line or have one too many."""
        save_text("".join(json.dumps(row) + "\n" for row in rows), self.beside("layers.jsonl"))

    def publish(self, staged: Path) -> None:
        """Move a finished pipeline's parts from `staged` into the folder; `model_index.json` last."""
        for part in sorted(staged.iterdir(), key=lambda part: part.name == "model_index.json"):
            target = self.path / part.name
            if target.is_dir():
                shutil.rmtree(target)
            part.replace(target)


def layer_generator(seed: int, name: str) -> torch.Generator:
    """Make a generator that depends on the seed and the layer's name only, not on what ran before."""
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") % 2**63)


# ------------------------------------------------------------------------------------------------ ownership


def check_free(folder: Path) -> None:
    """Raise UserError if a folder holds anything but a run."""
    occupied = folder.exists() and not (folder / "run.json").is_file()
    if occupied and (not folder.is_dir() or _foreign(folder)):
        raise UserError(f"--output_dir {folder} exists and is not a run of vqdm; choose an empty or new folder")


def check_claim(folder: Path, settings: dict, resume: bool) -> None:
    """Check that a run with `settings` may write into `folder`, without writing.

    Raises:
        UserError: the folder holds anything but a run, holds a run and `resume` is off, or a run with other settings.
    """
    record = folder / "run.json"
    if record.is_file():
        _check_resumable(record, settings, resume)
    check_free(folder)


def _foreign(folder: Path) -> bool:
    """Return whether there are files other than those of a run that was killed before it wrote run.json."""
    left = lambda path: path.name.endswith(UNFINISHED) or path.name.startswith(LOCK)  # noqa: E731
    return any(path != folder / "work" and not left(path) for path in folder.rglob("*"))


def _check_resumable(record: Path, settings: dict, resume: bool) -> None:
    folder = record.parent
    if not resume:
        raise UserError(f"--output_dir {folder} holds a run already; add --resume, or choose another folder")
    try:
        changed = differences(read_json(record)["settings"], settings)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"--resume: {record} is damaged; choose another folder") from None
    if changed:
        raise UserError(f"--resume: {folder} was started with other settings: {'; '.join(changed)}")


# ------------------------------------------------------------------------------------------------ shards


def shards(ranks: Ranks, folder: Path, names: Sequence[str], make: Callable[[str], Tensors]) -> list[Tensors]:
    """Return the tensors of every shard, in the order of `names`; all ranks must call it.

    A shard is a file of a long step, made by one rank and read by all. Neither the set of shards nor a shard depends on
    the number of ranks, so the result does not either. After an interruption only missing shards are made.

    Raises:
        RunError: a file is damaged.
    """
    missing = ranks.broadcast([name for name in names if not _file(folder, name).is_file()])
    for name in ranks.shard(missing):
        save_checked(make(name), _file(folder, name))
    ranks.barrier()
    return [read_shard(_file(folder, name)) for name in names]


def spans(ranks: Ranks, folder: Path, first: int, count: int, size: int) -> list[tuple[int, int]]:
    """Divide items `first` to `first + count` into spans (first, count); all ranks must call it.

    Spans with shards in the folder stay, and the gaps get new ones of at most `size`: a run that is resumed with
    another batch size keeps its shards, and one with the same batch size gets the spans of an uninterrupted run.
    """
    files = [re.fullmatch(r"(\d+)-(\d+)\.safetensors", path.name) for path in folder.glob("*.safetensors")]
    held = sorted((int(file[1]), int(file[2])) for file in files if file)
    place, end, found = first, first + count, []
    for start, number in [*held, (end, 0)]:
        if place <= start and start + number <= end:
            found += [(k, min(size, start - k)) for k in range(place, start, size)]
            found += [(start, number)] * (number > 0)
            place = start + number
    return ranks.broadcast(found)


def span_name(first: int, count: int) -> str:
    """Return the name of a span's shard."""
    return f"{first:06d}-{count:04d}"


def check_disk(folder: Path, beside: Path, need_bytes: int, flag: str) -> int:
    """Return `need_bytes` if `folder`, which need not exist, is on the disk of `beside`; else 0.

    Raises:
        UserError: it is on another disk, with less free; names `flag`.
    """
    places = ([path.absolute(), *path.absolute().parents] for path in (folder, beside))
    there, here = (next(one for one in some if one.exists()) for some in places)
    if there.stat().st_dev == here.stat().st_dev:
        return need_bytes
    _check_free(there, need_bytes, flag)
    return 0


def _check_free(folder: Path, need_bytes: int, flag: str) -> None:
    free = shutil.disk_usage(folder).free
    if free < need_bytes:
        raise UserError(f"{flag} {folder}: {free / 1e9:.2f} GB are free, the run needs about {need_bytes / 1e9:.2f} GB")


def read_shard(path: Path) -> Tensors:
    """Load the tensors of a file that exists, or will in a moment. Raises RunError if it is damaged."""
    wait_for_file(path)
    try:
        return load_checked(path)[0]
    except (OSError, CorruptFileError) as error:
        raise RunError(f"{path} is damaged ({error}); delete it and run again with --resume") from None


def wait_for_file(path: Path) -> None:
    """Wait until a file that another machine has written is visible here.

    Raises:
        RunError: it does not appear.
    """
    end = time.monotonic() + SECONDS_TO_APPEAR
    while not path.is_file():
        if time.monotonic() > end:
            raise RunError(f"{path} does not appear; all machines must share the folder of --output_dir")
        time.sleep(0.2)


def _file(folder: Path, name: str) -> Path:
    return folder / f"{name}.safetensors"
