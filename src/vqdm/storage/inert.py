"""Reading `torch.save` pickles of whole models without importing or calling anything that they name but tensors.

Run as a program, in a process of its own: `python -m vqdm.storage.inert PICKLE OUT.safetensors` reads a UNet that the
original VQDM code saved and writes its tensors under this package's names, with the code settings in the header.
"""

from __future__ import annotations

import json
import pickle  # nosec B403
import sys
import zipfile
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from vqdm.documents import first_line
from vqdm.errors import UserError
from vqdm.storage.atomic import save_tensors
from vqdm.storage.original import PREFIX, is_coded, stored_layer

TENSOR_BUILDERS = {
    ("torch._utils", "_rebuild_tensor_v2"): torch._utils._rebuild_tensor_v2,
    ("torch._utils", "_rebuild_parameter"): torch._utils._rebuild_parameter,
    ("collections", "OrderedDict"): OrderedDict,
    ("torch", "Size"): torch.Size,
    ("torch", "device"): torch.device,
    ("__builtin__", "set"): set,  # the pickle protocol of torch.save keeps Python 2's names
}
# What modules of a UNet consist of; of these the pickle gets stand-ins that do nothing.
STAND_IN_MODULES = ("src.", "diffusers.", "torch.nn.", "torch._C._nn.")
LEFTOVER = "_dummy_parameter"  # an empty tensor that the original hangs on every module


class Inert(dict):
    """Stand-in for an object of any class: takes any arguments, items and state, and does nothing with them."""

    def __init__(self, *_, **__):
        super().__init__()

    __hash__ = object.__hash__

    def __setstate__(self, state) -> None:
        if isinstance(state, dict):
            self.__dict__.update(state)


class InertUnpickler(pickle.Unpickler):
    """Gives tensors as they are, stand-ins for classes of UNets, and refuses every other name."""

    def find_class(self, module: str, name: str):
        found = TENSOR_BUILDERS.get((module, name))
        if found is not None:
            return found
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        if f"{module}.".startswith(STAND_IN_MODULES):
            return type(name, (Inert,), {"__module__": module})
        raise UserError(f"the pickle names {module}.{name}, which no UNet of the original needs; it is not read")


class _InertPickle:
    """What `torch.load` asks of a pickle module."""

    Unpickler = InertUnpickler


def load_inert(path: Path):
    """The object in a `torch.save` file, of stand-ins and tensors.

    Raises:
        UserError: another kind of file, a damaged one, or one that names anything unexpected.
    """
    if not zipfile.is_zipfile(path):
        raise UserError(f"{path} is not a file of torch.save (PyTorch 1.6 or newer)")
    with zipfile.ZipFile(path) as archive:
        if any(name.endswith("constants.pkl") for name in archive.namelist()):
            raise UserError(f"{path} is a TorchScript file, not one of torch.save")
    try:
        return torch.load(path, map_location="cpu", pickle_module=_InertPickle, weights_only=False)  # nosec B614
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{path} cannot be read: {type(error).__name__}: {first_line(error)}") from None


def walk(module: Inert, name: str = "") -> Iterator[tuple[str, Inert]]:
    """(dotted name, stand-in) of a module and all below it, but not below coded layers."""
    yield name, module
    if not is_coded(module):
        for child, below in (getattr(module, "_modules", None) or {}).items():
            if below is not None:
                yield from walk(below, f"{name}.{child}".lstrip("."))


def tensors_and_specs(unet: Inert) -> tuple[dict[str, Tensor], dict[str, dict]]:
    """All tensors of a UNet under this package's names, and coded layer → its settings.

    Raises:
        UserError: nothing in it is quantized, or a layer that this package cannot hold; names it.
    """
    tensors, specs = {}, {}
    for name, module in walk(unet):
        held = dict(getattr(module, "_parameters", None) or {}) | dict(getattr(module, "_buffers", None) or {})
        if is_coded(module):
            spec, coded = stored_layer(name, module)
            specs[name] = spec.to_dict()
            held |= coded
        place = f"{name}.".lstrip(".")
        tensors |= {place + key: value.data for key, value in held.items() if value is not None and key != LEFTOVER}
    if not specs:
        raise UserError(f"no layer in it is a quantized one of the original ({PREFIX}.QuantizedLinear, ...)")
    return tensors, specs


def main(source: str, target: str) -> None:
    """Read a pickle and write one safetensors file; `UserError` says what is wrong with it."""
    tensors, specs = tensors_and_specs(load_inert(Path(source)))
    save_tensors(tensors, Path(target), {"specs": json.dumps(specs)})


if __name__ == "__main__":
    try:
        main(*sys.argv[1:])
    except UserError as problem:
        sys.exit(str(problem))
