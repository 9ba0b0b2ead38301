"""Hessians of the full-precision model on disk, for every bit width that is tried.

One safetensors file per input that layers share, with the upper triangles of its Hessians, and an index with these
layers and the model, prompts and sampling that the Hessians were computed for.
"""

from __future__ import annotations

import re
from pathlib import Path

import torch
from torch import Tensor

from vqdm.config import differences
from vqdm.errors import RunError, UserError
from vqdm.layers.quantized import Layer
from vqdm.storage.files import CorruptFileError, load_checked, load_checked_json, save_checked, save_checked_json


class HessianStore:
    """A folder of second moments.

    Raises:
        UserError: the folder holds Hessians of other settings, or its index is damaged.
    """

    def __init__(self, folder: Path, settings: dict):
        self.folder, self.settings = folder, settings
        self.leaders: dict[str, str] = {}  # key of a layer → name of its file
        self.index = folder / "hessians.json"
        if self.index.is_file():
            self._read_index()

    def _read_index(self) -> None:
        try:
            index = load_checked_json(self.index)
            changed = differences(index["settings"], self.settings)
            self.leaders = dict(index["layers"])
            _check_names(self.leaders)
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            raise UserError(f"{self.index} is damaged; delete it, or choose another --hessian_cache") from None
        if changed:
            raise UserError(
                f"--hessian_cache {self.folder} is of another run: {'; '.join(changed)}; choose another folder"
            )

    def __contains__(self, layer: Layer) -> bool:
        return _key(layer) in self.leaders

    def save(self, group: list[Layer], hessian: Tensor, held_out: Tensor | None) -> None:
        """Save H [I, I], and a held-out one, for layers that share an input."""
        self.write(group, hessian, held_out)
        self.enter([group])

    def write(self, group: list[Layer], hessian: Tensor, held_out: Tensor | None) -> None:
        """Write the file only; `enter` adds it to the index."""
        tensors = {"hessian": triangle(hessian)} | ({} if held_out is None else {"held_out": triangle(held_out)})
        save_checked(tensors, self._file(_key(group[0])))

    def enter(self, groups: list[list[Layer]], on_disk: bool = True) -> None:
        """Add groups of written files to the index; only one of several processes changes it on the disk."""
        self.leaders |= {_key(layer): _key(group[0]) for group in groups for layer in group}
        if on_disk:
            save_checked_json({"settings": self.settings, "layers": self.leaders}, self.index)

    def load(self, layer: Layer, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor | None]:
        """Load H and the held-out H of a layer. Raises RunError if the file is missing or damaged."""
        path = self._file(self.leaders[_key(layer)])
        try:
            tensors, _ = load_checked(path, device)
            _check_shapes(tensors, layer.columns)
            whole = {name: _whole(tensors.pop(name), layer.columns) for name in sorted(tensors)}
            return whole["hessian"], whole.get("held_out")
        except (OSError, CorruptFileError, KeyError, ValueError) as error:
            raise RunError(f"{path} is missing or damaged ({error}); delete {self.index} and run again") from None

    def drop(self, groups: list[list[Layer]], on_disk: bool = True) -> None:
        """Remove groups from the index; only one of several processes deletes their files."""
        leaders = {self.leaders.pop(_key(layer)) for group in groups for layer in group}
        if on_disk:
            self.enter([])
            for leader in leaders:
                self._file(leader).unlink(missing_ok=True)

    def groups(self, layers: list[Layer]) -> list[list[Layer]]:
        """Group `layers` by the file they share, in their order."""
        found: dict[str, list[Layer]] = {}
        for layer in layers:
            found.setdefault(self.leaders[_key(layer)], []).append(layer)
        return list(found.values())

    def _file(self, leader: str) -> Path:
        return self.folder / f"{leader}.safetensors"


def _check_names(leaders: dict) -> None:
    """Raise ValueError unless layers and the files that they share are named like layers, so inside the folder."""
    for name in (*leaders, *leaders.values()):
        if not isinstance(name, str) or not re.fullmatch(r"[\w.]+", name):
            raise ValueError(name)


def triangle(matrix: Tensor) -> Tensor:
    """Return the upper triangle of a symmetric matrix [I, I], row by row: [I·(I + 1)/2]."""
    return torch.cat([row[index:] for index, row in enumerate(matrix)])


def symmetric(values: Tensor, size: int) -> Tensor:
    """Invert `triangle`, exactly: the matrix [size, size]."""
    matrix, start = values.new_empty(size, size), 0
    for index in range(size):
        stop = start + size - index
        matrix[index, index:] = values[start:stop]
        matrix[index + 1 :, index] = values[start + 1 : stop]
        start = stop
    return matrix


def _whole(values: Tensor, size: int) -> Tensor:
    return values if values.dim() == 2 else symmetric(values, size)


def _check_shapes(tensors: dict[str, Tensor], columns: int) -> None:
    """Raise ValueError unless all are float32 triangles of matrices [columns, columns], or these, as once written."""
    expected = [columns * (columns + 1) // 2], [columns, columns]
    for name, held in tensors.items():
        if list(held.shape) not in expected or held.dtype != torch.float32:
            raise ValueError(f"{name} is {held.dtype} {list(held.shape)}; expected float32 {expected[0]}")


def _key(layer: Layer) -> str:
    """Return the layer's key; a convolution's Hessian depends on the order of its columns."""
    channels_first = layer.kind == "conv" and not layer.spec.group_channels
    return f"{layer.name}.channels_first" if channels_first else layer.name
