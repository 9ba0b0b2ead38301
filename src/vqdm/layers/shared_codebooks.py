"""Codebooks that many layers share: a module of the model that stores each set of codebooks once.

Letters: M codebooks of K entries; p, g = out and in group size.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vqdm.additive.code import CodeSpec

SHARED_CODEBOOKS = "codebook_banks"  # the model's attribute, and so the prefix of the tensors' names in files


class SharedCodebookModule(nn.Module):
    """Shared codebooks by name, each a float16 parameter [M, K, p, g].

    Layers get codebooks by calling the module, so offloading hooks bring them to the device first.
    """

    def reserve(self, spec: CodeSpec, device: torch.device) -> None:
        """Allocate the codebooks that `spec` names. Raises ValueError if they exist in another shape."""
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
        """Set the values of codebooks."""
        held = self._parameters[name]
        held.data = codebooks.to(held.device, held.dtype)

    def stored_tensors(self) -> dict[str, Tensor]:
        """Return all codebooks by name."""
        return dict(self._parameters)

    def forward(self, name: str) -> Tensor:
        """Return the codebooks [M, K, p, g] of that name."""
        held = self._parameters[name]
        # diffusers' group offloading by leaf takes a module's memory away as soon as its call is over, which is before
        # the layer that called has decoded: it gets a copy, made on the stream that it computes on.
        return held.clone() if hasattr(self, "_diffusers_hook") else held


def shared_codebook_module(model: nn.Module) -> SharedCodebookModule:
    """Return the model's shared codebooks; adds an empty module if it has none."""
    if not hasattr(model, SHARED_CODEBOOKS):
        setattr(model, SHARED_CODEBOOKS, SharedCodebookModule())
    return getattr(model, SHARED_CODEBOOKS)


def drop_shared_codebooks(model: nn.Module) -> None:
    """Remove the shared codebooks from a model whose layers no longer need them."""
    if hasattr(model, SHARED_CODEBOOKS):
        delattr(model, SHARED_CODEBOOKS)
