"""UNets that the original VQDM code (arXiv 2409.00492) saved, read without its code and without running any.

The original pickles whole modules, which `torch.load(weights_only=True)` cannot read. Here every class of the pickle is
replaced by a stand-in that does nothing; layers are recognized by their attributes and become codes of this package.
Only `convert.py` needs this module.

Letters: R, G row and column groups; M codebooks of K entries; p, g out and in group size; n bits of a second-level
code.
"""

from __future__ import annotations

import pickle  # nosec B403
import zipfile
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import Tensor

from vqdm.additive.code import AdditiveCode, CodeSpec
from vqdm.documents import first_line
from vqdm.errors import UserError

PREFIX = "src.aq"  # the module of the original's classes; a layer holds its bias and a `quantized_weight`
CODED = ("QuantizedLinear", "QuantizedConv2D")
SCALE_BITS = (*range(9), 16)
TENSOR_BUILDERS = {
    ("torch._utils", "_rebuild_tensor_v2"): torch._utils._rebuild_tensor_v2,
    ("torch._utils", "_rebuild_parameter"): torch._utils._rebuild_parameter,
    ("collections", "OrderedDict"): OrderedDict,
    ("torch", "Size"): torch.Size,
    ("torch", "device"): torch.device,
    ("__builtin__", "set"): set,  # the pickle protocol of torch.save keeps Python 2's names
}
# Modules of the classes in a UNet, which get stand-ins.
STAND_IN_MODULES = ("src.", "diffusers.", "torch.nn.", "torch._C._nn.")
LEFTOVER = "_dummy_parameter"  # an empty tensor that the original hangs on every module


class StandIn(dict):
    """Stand-in for an object of any class: takes any arguments, items and state, and does nothing with them."""

    def __init__(self, *_, **__):
        super().__init__()

    __hash__ = object.__hash__

    def __setstate__(self, state) -> None:
        if isinstance(state, dict):
            self.__dict__.update(state)


class SafeUnpickler(pickle.Unpickler):
    """Builds tensors, replaces classes of UNets by stand-ins, and refuses every other name."""

    def find_class(self, module: str, name: str):
        found = TENSOR_BUILDERS.get((module, name))
        if found is not None:
            return found
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        if f"{module}.".startswith(STAND_IN_MODULES):
            return type(name, (StandIn,), {"__module__": module})
        raise UserError(f"the pickle names {module}.{name}, which no UNet of the original needs; it is not read")


def load_pickle(path: Path):
    """Load the object of a `torch.save` file, as stand-ins and tensors.

    Raises:
        UserError: another kind of file, a damaged one, or one that names anything unexpected.
    """
    if not zipfile.is_zipfile(path):
        raise UserError("it is not a file of torch.save (PyTorch 1.6 or newer)")
    with zipfile.ZipFile(path) as archive:
        if any(name.endswith("constants.pkl") for name in archive.namelist()):
            raise UserError("it is a TorchScript file, not one of torch.save")
    try:
        safe = SimpleNamespace(__name__=__name__, Unpickler=SafeUnpickler)  # all that torch uses of a pickle module
        return torch.load(path, map_location="cpu", pickle_module=safe, weights_only=False)  # nosec B614
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"it cannot be read: {type(error).__name__}: {first_line(error)}") from None


def is_coded(module) -> bool:
    """Return whether a module, or its stand-in, is a quantized layer of the original."""
    return type(module).__module__ == PREFIX and type(module).__name__ in CODED


def stored_layer(name: str, layer) -> tuple[CodeSpec, dict[str, Tensor]]:
    """Return the settings and stored tensors, without the bias, of the original's layer `name`.

    Values are rounded to float16. Second-level codebook values are looked up and stored in 16 bit, because the
    original shares their tables differently.

    Raises:
        UserError: it lacks what a layer of the original has, or its settings or values cannot be held.
    """
    try:
        weight = layer._modules["quantized_weight"]
        code = additive_code(weight, getattr(layer, "group_channels", True))
    except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise UserError(f"layer {name} is not one of the original: {first_line(error)}") from None
    tensors = code.pack()
    for key, tensor in tensors.items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise UserError(f"layer {name}: its {key} hold values that are not finite in float16")
    return code.spec, tensors


def additive_code(weight, group_channels: bool) -> AdditiveCode:
    """Convert an original `QuantizedWeight`."""
    codes, codebooks = tensor_of(weight, "codes"), codebooks_of(weight)
    sets, M, K, p, g = codebooks.shape
    spec = CodeSpec(
        num_codebooks=M,
        nbits_per_codebook=weight.nbits_per_codebook,
        in_group_size=g,
        out_group_size=p,
        scale_nbits=weight.scale_nbits if weight.scale_nbits in SCALE_BITS else 16,
        groupwise_codebooks=sets > 1,
        input_channel_scales=tensor_of(weight, "input_scales") is not None,
        group_channels=group_channels,
    )
    codes = codes.long() % K  # narrow signed types wrap around
    columns = tensor_of(weight, "input_scales")
    return AdditiveCode(spec, codes, codebooks if sets > 1 else codebooks[0], scales_of(weight), columns)


def codebooks_of(weight) -> Tensor:
    """Return codebooks [1 or G, M, K, p, g]; quantized values are looked up as in the original."""
    values = tensor_of(weight, "codebooks").float()
    if weight.codebook_value_nbits >= 16:
        return values
    sets, M, K, p, g = values.shape
    T = weight.codebook_value_num_groups
    split = values.view(sets, M, T, K // T, p, g).permute(2, 4, 5, 0, 1, 3)  # [T, p, g, sets, M, K/T]
    tables = tensor_of(weight, "codebook_value_clusters").float().view(T * p * g, -1)  # [T·p·g, 2^n]
    looked_up = nearest_of(tables, split.reshape(T * p * g, -1)).view(split.shape)
    return looked_up.permute(3, 4, 0, 5, 1, 2).reshape(values.shape)


def scales_of(weight) -> Tensor:
    """Return scales [R, 1], or [R, G] if the original has one per group, looked up as in the original."""
    if weight.scale_nbits == 0 or weight.scales_are_lossless:
        return tensor_of(weight, "scales").float().flatten(1)
    tables = tensor_of(weight, "scales_clusters").float()  # [R, 2^n]
    if weight.straight_through_gradient:
        return nearest_of(tables, tensor_of(weight, "scales").float().flatten(1))
    return torch.gather(tables, 1, tensor_of(weight, "scales_indices").long())


def nearest_of(tables: Tensor, values: Tensor) -> Tensor:
    """Return the value of each row's `tables` [rows, n] nearest to each of `values` [rows, N]."""
    ordered = tables.sort(1).values
    middles = (ordered[:, 1:] + ordered[:, :-1]) / 2
    return torch.gather(ordered, 1, torch.searchsorted(middles.contiguous(), values.contiguous()))


def tensor_of(weight, name: str) -> Tensor | None:
    """Return a tensor of a module, a parameter or a plain attribute; None if it is None in the original."""
    if name in weight._parameters:
        held = weight._parameters[name]
        return None if held is None else held.data
    return getattr(weight, name)


def walk_modules(module: StandIn, name: str = "") -> Iterator[tuple[str, StandIn]]:
    """Yield (dotted name, stand-in) of a module and all below it, but not below coded layers."""
    yield name, module
    if not is_coded(module):
        for child, below in (getattr(module, "_modules", None) or {}).items():
            if below is not None:
                yield from walk_modules(below, f"{name}.{child}".lstrip("."))


def tensors_and_specs(unet: StandIn) -> tuple[dict[str, Tensor], dict[str, dict]]:
    """Return all tensors of a UNet under this package's names, and coded layer → its settings.

    Raises:
        UserError: nothing in it is quantized, or a layer that this package cannot hold; names it.
    """
    tensors, specs = {}, {}
    for name, module in walk_modules(unet):
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
