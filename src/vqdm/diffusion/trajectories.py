"""Sampling trajectories: what a UNet was called with at every step, recorded once and replayed.

Letters: N prompts, S steps, A guidance branches (2 with classifier-free guidance, else 1), B points in a batch.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from vqdm.errors import RunError
from vqdm.storage.atomic import Damaged, load_sealed, save_sealed

CONDITIONING = ("encoder_hidden_states", "timestep_cond")
ADDED_CONDITIONING = ("text_embeds", "time_ids")


@dataclass
class Trajectories:
    """Recorded UNet inputs (and, when asked for, outputs).

    Attributes:
        latents: [N, S, C, h, w], the UNet's input, the same for all branches.
        timesteps: [S].
        conditioning: name → [N, A, ...]; names of `added_cond_kwargs` are kept under their own names.
        outputs: [N, S, A, C, h, w] or None.
    """

    latents: Tensor
    timesteps: Tensor
    conditioning: dict[str, Tensor]
    outputs: Tensor | None = None

    def points(self) -> list[tuple[int, int]]:
        """All (prompt, step) pairs, prompt by prompt."""
        prompts, steps = self.latents.shape[:2]
        return [(n, s) for n in range(prompts) for s in range(steps)]

    def inputs(self, points: list[tuple[int, int]], device, dtype) -> dict:
        """Keyword arguments of a UNet call on B points, all branches in one batch of A·B, branches outermost."""
        prompts, steps = (torch.tensor(column) for column in zip(*points, strict=True))
        conditioning = {name: value[prompts] for name, value in self.conditioning.items()}
        return unet_call(self.latents[prompts, steps], self.timesteps[steps], conditioning, device, dtype)

    def expected(self, points: list[tuple[int, int]], device) -> Tensor:
        """Recorded outputs [A·B, C, h, w] in the order of `inputs`."""
        prompts, steps = (torch.tensor(column) for column in zip(*points, strict=True))
        return self.outputs[prompts, steps].transpose(0, 1).flatten(0, 1).to(device)

    def between(self, low: float, high: float) -> Trajectories:
        """Only the steps whose timestep lies in [low, high]."""
        keep = (self.timesteps >= low) & (self.timesteps <= high)
        outputs = None if self.outputs is None else self.outputs[:, keep]
        return Trajectories(self.latents[:, keep], self.timesteps[keep], self.conditioning, outputs)

    def to_tensors(self) -> dict[str, Tensor]:
        """Everything under one level of names."""
        tensors = {"latents": self.latents, "timesteps": self.timesteps}
        tensors |= {f"conditioning.{name}": value for name, value in self.conditioning.items()}
        return tensors if self.outputs is None else tensors | {"outputs": self.outputs}

    def save(self, path: Path) -> None:
        """Write one safetensors file, atomically, with its checksum."""
        save_sealed(self.to_tensors(), path)

    @classmethod
    def load(cls, path: Path) -> Trajectories:
        """What was saved. Raises RunError when the file is gone or damaged."""
        try:
            return cls.of_tensors(load_sealed(path)[0])
        except (OSError, Damaged) as error:
            raise RunError(f"{path} is missing or damaged ({error}); delete it and run again") from None

    @classmethod
    def of_tensors(cls, tensors: dict[str, Tensor]) -> Trajectories:
        """The inverse of `to_tensors`; other names are left out."""
        prefix = "conditioning."
        conditioning = {key[len(prefix) :]: value for key, value in tensors.items() if key.startswith(prefix)}
        return cls(tensors["latents"], tensors["timesteps"], conditioning, tensors.get("outputs"))


class Recorder:
    """Context manager that notes every call of a UNet while a pipeline samples `prompts` images a batch.

    Leaves no hook behind, also after an exception.
    """

    def __init__(self, unet: nn.Module, prompts: int, outputs: bool = False):
        self.unet, self.prompts, self.with_outputs = unet, prompts, outputs
        self.latents, self.timesteps, self.outputs = [], [], []
        self.conditioning: dict[str, Tensor] = {}

    def __enter__(self) -> Recorder:
        self._hook = self.unet.register_forward_hook(self._note, with_kwargs=True)
        return self

    def __exit__(self, *_) -> None:
        self._hook.remove()

    def _note(self, _module, args, kwargs, output) -> None:
        sample = args[0] if args else kwargs["sample"]  # [A·B, C, h, w]
        timestep = args[1] if len(args) > 1 else kwargs["timestep"]
        self.latents.append(sample[: self.prompts].detach().cpu())
        self.timesteps.append(torch.as_tensor(timestep).detach().cpu().float().reshape(-1)[0])
        if self.with_outputs:
            guess = output[0] if isinstance(output, tuple) else output.sample
            self.outputs.append(guess.detach().cpu().unflatten(0, (-1, self.prompts)).transpose(0, 1))  # [B, A, ...]
        if not self.conditioning:
            given = {name: kwargs.get(name) for name in CONDITIONING}
            given |= {name: (kwargs.get("added_cond_kwargs") or {}).get(name) for name in ADDED_CONDITIONING}
            self.conditioning = {name: self._by_prompt(value) for name, value in given.items() if value is not None}

    def _by_prompt(self, value: Tensor) -> Tensor:
        return value.detach().cpu().unflatten(0, (-1, self.prompts)).transpose(0, 1).contiguous()  # [B, A, ...]

    def trajectories(self) -> Trajectories:
        """What was noted, as one batch of trajectories."""
        outputs = torch.stack(self.outputs, dim=1) if self.with_outputs else None
        return Trajectories(torch.stack(self.latents, 1), torch.stack(self.timesteps), self.conditioning, outputs)


def unet_call(latents: Tensor, timesteps: Tensor, conditioning: dict[str, Tensor], device, dtype) -> dict:
    """Keyword arguments of a UNet call on B points, all branches in one batch of A·B, branches outermost.

    Args: `latents` [B, C, h, w]; `timesteps` [B]; `conditioning`, name → [B, A, ...].
    """
    branches = next(iter(conditioning.values())).shape[1]
    call = {
        "sample": latents.repeat(branches, 1, 1, 1).to(device, dtype),  # [A·B, C, h, w]
        "timestep": timesteps.repeat(branches).to(device),  # [A·B]
    }
    for name, value in conditioning.items():
        target = call.setdefault("added_cond_kwargs", {}) if name in ADDED_CONDITIONING else call
        target[name] = value.transpose(0, 1).flatten(0, 1).to(device, dtype)  # [B, A, ...] → [A·B, ...]
    return call


def join(parts: list[Trajectories]) -> Trajectories:
    """Concatenate over prompts."""
    outputs = None if parts[0].outputs is None else torch.cat([part.outputs for part in parts])
    names = parts[0].conditioning
    conditioning = {name: torch.cat([part.conditioning[name] for part in parts]) for name in names}
    return Trajectories(torch.cat([part.latents for part in parts]), parts[0].timesteps, conditioning, outputs)


def batches(points: list, size: int) -> Iterator[list]:
    """Consecutive slices of at most `size` points."""
    yield from (points[i : i + size] for i in range(0, len(points), size))


def spread_points(trajectories: Trajectories, steps: int, first: int = 0) -> list[tuple[int, int]]:
    """`steps` points per prompt, evenly spread over its trajectory and shifted from prompt to prompt; 0 means all.

    `first` is the number of the first prompt, where others came before.
    """
    prompts, total = trajectories.latents.shape[:2]
    if not 0 < steps < total:
        return trajectories.points()
    return [(n, (k * total // steps + first + n) % total) for n in range(prompts) for k in range(steps)]


def held_out(points: list[tuple[int, int]]) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """Split points nine to one: whole prompts are held out where there are ten or more, else single points."""
    prompts = len({n for n, _ in points})
    apart = [(n if prompts >= 10 else i) % 10 == 9 for i, (n, _) in enumerate(points)]
    kept = [point for point, out in zip(points, apart, strict=True) if not out]
    return kept, [point for point, out in zip(points, apart, strict=True) if out]
