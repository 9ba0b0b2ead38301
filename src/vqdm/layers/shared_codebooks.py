"""Codebooks that many layers share: a module of the model that stores each bank once.

Letters: M codebooks of K entries; p, g = out and in group size.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vqdm.additive.code import CodeSpec

BANKS = "codebook_banks"  # the model's attribute, and so the prefix of the tensors' names


class CodebookBanks(nn.Module):
    """Banks of codebooks by name, each a float16 parameter [M, K, p, g].

    A bank is asked for by calling the module, so that offloading hooks bring it to the device first.
    """

    def reserve(self, spec: CodeSpec, device: torch.device) -> None:
        """Make room for the bank that `spec` names. Raises ValueError when it is there in another shape."""
        name = spec.shared_codebooks
        held = self._parameters.get(name)
        if held is None and hasattr(self, name):
            raise ValueError(f"shared_codebooks is {name}, which a module of torch needs for itself; choose another")
        if held is None:
            empty = torch.empty(spec.codebooks_shape, dtype=torch.float16, device=device)
            self.register_parameter(name, nn.Parameter(empty, requires_grad=False))
        elif held.shape != spec.codebooks_shape:
            raise ValueError(f"shared_codebooks {name} are {tuple(held.shape)}; a layer needs {spec.codebooks_shape}")

    def fill(self, name: str, codebooks: Tensor) -> None:
        """Set a bank's values."""
        held = self._parameters[name]
        held.data = codebooks.to(held.device, held.dtype)

    def stored_tensors(self) -> dict[str, Tensor]:
        """All banks by name."""
        return dict(self._parameters)

    def forward(self, name: str) -> Tensor:
        """Codebooks [M, K, p, g]."""
        held = self._parameters[name]
        # diffusers' group offloading by leaf takes a module's memory away as soon as its call is over, which is before
        # the layer that asked has decoded: it gets a copy, made on the stream that it computes on.
        return held.clone() if hasattr(self, "_diffusers_hook") else held


def banks_of(model: nn.Module) -> CodebookBanks:
    """The model's banks; an empty module is added where it has none."""
    if not hasattr(model, BANKS):
        setattr(model, BANKS, CodebookBanks())
    return getattr(model, BANKS)


def drop_banks(model: nn.Module) -> None:
    """Remove the banks of a model whose layers need them no more."""
    if hasattr(model, BANKS):
        delattr(model, BANKS)
