"""The output folder of a quantization while it grows: settings, recorded data, one file a finished layer.

In the folder:

run.json                    settings and versions, written first; what --resume compares
work/evaluation, ...        pieces of long steps, such as recorded trajectories: see storage/pieces.py
work/hessians*, work/shared_codebooks  Hessians, and shared codebooks, where the run needs them
work/layers/*.safetensors   a solved layer each: stored tensors, and its report in the header
plan.json                   the formats that --target_bits chose
layers.jsonl                a line a layer, as it goes
summary.json                written last; its presence means that the run is finished

Everything in work/ carries its own checksum. Several processes share the folder, also on several machines.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from vqdm.additive.code import AdditiveCode, CodeSpec
from vqdm.diffusion.blocks import Layer
from vqdm.documents import parse_json, read_json
from vqdm.errors import RunError, UserError
from vqdm.parallel import Ranks
from vqdm.storage.atomic import load_sealed, probe, save_json, save_sealed, save_text, sweep
from vqdm.storage.claims import check_claim, check_free
from vqdm.storage.locks import locked


@dataclass(frozen=True)
class SolvedLayer:
    """A layer's code as stored, and what is known about it."""

    tensors: dict[str, Tensor]
    spec: CodeSpec
    report: dict


class RunFolder:
    """OUT and what lies in it."""

    def __init__(self, path: str):
        self.path = Path(path)
        self.work = self.path / "work"

    def held(self, ranks: Ranks) -> AbstractContextManager[None]:
        """Inside, no other run writes into the folder; the first of several processes holds it for all.

        Raises UserError where another run does, or the folder holds something else.
        """
        if not ranks.main:
            return nullcontext()
        check_free(self.path)
        return locked(self.path)

    def open(self, settings: dict, versions: dict, resume: bool, need_bytes: int) -> None:
        """Claim the folder for a run.

        Raises:
            UserError: it cannot be written, holds something else, holds a run and `resume` is off, holds a run of
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
        free = shutil.disk_usage(self.path).free
        if free < need_bytes:
            raise UserError(
                f"--output_dir {self.path}: {free / 1e9:.2f} GB are free, the run needs about {need_bytes / 1e9:.2f} GB"
            )

    @property
    def finished(self) -> bool:
        return (self.path / "summary.json").is_file()

    def started_with(self, name: str):
        """A setting that the run was started with; its resumption may have another."""
        return read_json(self.path / "run.json")["settings"][name]

    def layer_path(self, name: str) -> Path:
        return self.work / "layers" / f"{name}.safetensors"

    def block_hessians(self, block: str) -> Path:
        """Where a block's Hessians are while its layers are solved."""
        return self.work / f"hessians_{block}"

    def drop_block(self, block: str) -> None:
        """Delete what was kept for a block whose layers are solved."""
        for path in (self.block_hessians(block), self.work / f"calibration_{block}"):
            shutil.rmtree(path, ignore_errors=True)

    def save_layer(self, layer: Layer, code: AdditiveCode, report: dict) -> None:
        metadata = {"spec": json.dumps(layer.spec.to_dict()), "report": json.dumps(report)}
        save_sealed(code.pack(), self.layer_path(layer.name), metadata)

    def load_layer(self, layer: Layer) -> SolvedLayer | None:
        """A solved layer, or None when it is still to do. Raises RunError when its file is damaged."""
        path = self.layer_path(layer.name)
        if not path.is_file():
            return None
        try:
            tensors, metadata = load_sealed(path)
            spec = CodeSpec().changed(**parse_json(metadata["spec"]))
            if spec != layer.spec:
                raise ValueError("it is in another format than the layer")
            spec.check_tensors(layer.rows, layer.columns, tensors)
            return SolvedLayer(tensors, spec, dict(parse_json(metadata["report"])))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise RunError(f"{path} is damaged ({error}); delete it and run again with --resume") from None

    def rewrite_table(self, rows: list[dict]) -> None:
        """Make `layers.jsonl` say exactly `rows`; after a kill it may lack a line or have one too many."""
        save_text("".join(json.dumps(row) + "\n" for row in rows), self.path / "layers.jsonl")

    def publish(self, staged: Path) -> None:
        """Move a finished pipeline's parts from `staged` into OUT; `model_index.json` last."""
        for part in sorted(staged.iterdir(), key=lambda part: part.name == "model_index.json"):
            target = self.path / part.name
            if target.is_dir():
                shutil.rmtree(target)
            part.replace(target)


def layer_generator(seed: int, name: str) -> torch.Generator:
    """The random numbers of one layer depend on the seed and its name only, not on what ran before it."""
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") % 2**63)
