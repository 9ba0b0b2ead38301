"""Sampling trajectories: the UNet's inputs at every step, recorded once and replayed.

Letters: N prompts, S steps, A guidance branches (2 with classifier-free guidance, else 1), B points in a batch.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from vqdm.errors import RunError, UserError
from vqdm.storage.files import CorruptFileError, load_checked, save_checked

CONDITIONING = ("encoder_hidden_states", "timestep_cond", "class_labels", "attention_mask", "encoder_attention_mask")
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
        """Return all (prompt, step) pairs, prompt by prompt."""
        prompts, steps = self.latents.shape[:2]
        return [(n, s) for n in range(prompts) for s in range(steps)]

    def inputs(self, points: list[tuple[int, int]], device, dtype) -> dict:
        """Return the keyword arguments of a UNet call on B points, all branches in one batch, branches outermost."""
        prompts, steps = (torch.tensor(column) for column in zip(*points, strict=True))
        conditioning = {name: value[prompts] for name, value in self.conditioning.items()}
        return unet_call(self.latents[prompts, steps], self.timesteps[steps], conditioning, device, dtype)

    def expected(self, points: list[tuple[int, int]], device) -> Tensor:
        """Return recorded outputs [A·B, C, h, w] in the order of `inputs`."""
        prompts, steps = (torch.tensor(column) for column in zip(*points, strict=True))
        return self.outputs[prompts, steps].transpose(0, 1).flatten(0, 1).to(device)

    def between(self, low: float, high: float) -> Trajectories:
        """Return only the steps with a timestep in [low, high]."""
        keep = (self.timesteps >= low) & (self.timesteps <= high)
        outputs = None if self.outputs is None else self.outputs[:, keep]
        return Trajectories(self.latents[:, keep], self.timesteps[keep], self.conditioning, outputs)

    def to_tensors(self) -> dict[str, Tensor]:
        """Return all tensors under one level of names."""
        tensors = {"latents": self.latents, "timesteps": self.timesteps}
        tensors |= {f"conditioning.{name}": value for name, value in self.conditioning.items()}
        return tensors if self.outputs is None else tensors | {"outputs": self.outputs}

    def save(self, path: Path) -> None:
        """Write one safetensors file, atomically, with its checksum."""
        save_checked(self.to_tensors(), path)

    @classmethod
    def load(cls, path: Path) -> Trajectories:
        """Load a saved file. Raises RunError when it is missing or damaged."""
        try:
            return cls.of_tensors(load_checked(path)[0])
        except (OSError, CorruptFileError) as error:
            raise RunError(f"{path} is missing or damaged ({error}); delete it and run again") from None

    @classmethod
    def of_tensors(cls, tensors: dict[str, Tensor]) -> Trajectories:
        """Invert `to_tensors`; other names are left out."""
        prefix = "conditioning."
        conditioning = {key[len(prefix) :]: value for key, value in tensors.items() if key.startswith(prefix)}
        return cls(tensors["latents"], tensors["timesteps"], conditioning, tensors.get("outputs"))


class CallRecorder:
    """Context manager that records every call of a UNet while a pipeline samples `prompts` images per batch.

    Leaves no hook behind, also after an exception. A call that `Trajectories` cannot hold raises UserError with the
    argument: one that is not recorded, or not the same at every step.
    """

    def __init__(self, unet: nn.Module, prompts: int, outputs: bool = False):
        self.unet, self.prompts, self.with_outputs = unet, prompts, outputs
        self.latents, self.timesteps, self.outputs = [], [], []
        self.conditioning: dict[str, Tensor] = {}
        self._given: dict[str, Tensor] | None = None  # of the first call, as it was given
        self._signature = inspect.signature(type(unet).forward)

    def __enter__(self) -> CallRecorder:
        self._hook = self.unet.register_forward_hook(self._record, with_kwargs=True)
        return self

    def __exit__(self, *_) -> None:
        self._hook.remove()

    def _record(self, module, args, kwargs, output) -> None:
        call = self._signature.bind(module, *args, **kwargs).arguments
        given = {name: value for name, value in _given(call).items() if name not in ("sample", "timestep")}
        self._check_same(given)
        self.latents.append(self._shared(call["sample"], "sample").detach().cpu())
        timesteps = torch.as_tensor(call["timestep"]).detach().cpu().float().reshape(-1)
        if (timesteps != timesteps[0]).any():
            raise _unsupported("timestep", "differs between the images of a batch")
        self.timesteps.append(timesteps[0])
        if self.with_outputs:
            student = output[0] if isinstance(output, tuple) else output.sample
            self.outputs.append(self._by_prompt(student, "sample"))
        if not self.conditioning:
            self.conditioning = {name: self._by_prompt(value, name) for name, value in given.items()}

    def _check_same(self, given: dict[str, Tensor]) -> None:
        """Raise UserError unless conditioning is that of the first call."""
        first = self._given = given if self._given is None else self._given
        for name in (*first, *given):
            before, now = first.get(name), given.get(name)
            if before is None or now is None or before.shape != now.shape or not torch.equal(before, now):
                raise _unsupported(name, "changes from step to step")

    def _shared(self, sample: Tensor, name: str) -> Tensor:
        """Return the latents [B, C, h, w] of [A·B, C, h, w], the same in every branch."""
        branches = self._split(sample, name)
        if not (branches == branches[:1]).logical_or(branches.isnan()).all():
            raise _unsupported(name, "differs between the guidance branches")
        return branches[0]

    def _by_prompt(self, value: Tensor, name: str) -> Tensor:
        return self._split(value, name).detach().cpu().transpose(0, 1).contiguous()  # [B, A, ...]

    def _split(self, value: Tensor, name: str) -> Tensor:
        """[A·B, ...] → [A, B, ...]."""
        if value.dim() == 0 or len(value) % self.prompts:
            raise _unsupported(name, f"has shape {list(value.shape)} for {self.prompts} prompts")
        return value.unflatten(0, (-1, self.prompts))

    def trajectories(self) -> Trajectories:
        """Return the recorded calls as one batch of trajectories."""
        outputs = torch.stack(self.outputs, dim=1) if self.with_outputs else None
        return Trajectories(torch.stack(self.latents, 1), torch.stack(self.timesteps), self.conditioning, outputs)


def _given(call: dict) -> dict[str, Tensor]:
    """Return the arguments that change the output of a UNet call, those inside `added_cond_kwargs` by their names.

    Raises UserError, naming the argument, for one that is not recorded.
    """
    call = {name: value for name, value in call.items() if name not in ("self", "return_dict") and value is not None}
    added = {name: value for name, value in (call.pop("added_cond_kwargs", None) or {}).items() if value is not None}
    rest = {name: value for name, value in call.items() if not (isinstance(value, dict | list | tuple) and not value)}
    for known, values in ((("sample", "timestep", *CONDITIONING), rest), (ADDED_CONDITIONING, added)):
        for name, value in values.items():
            if name not in known or (name != "timestep" and not isinstance(value, Tensor)):
                raise _unsupported(name, "is not recorded")
    return rest | added


def _unsupported(name: str, why: str) -> UserError:
    return UserError(
        f"MODEL's pipeline calls its UNet with {name}, which {why}; vqdm calibrates text-to-image pipelines that give "
        f"{', '.join((*CONDITIONING, *ADDED_CONDITIONING))}, the same at every step"
    )


def unet_call(latents: Tensor, timesteps: Tensor, conditioning: dict[str, Tensor], device, dtype) -> dict:
    """Return the keyword arguments of a UNet call on B points, all branches in one batch of A·B, branches outermost.

    Args: `latents` [B, C, h, w]; `timesteps` [B]; `conditioning`, name → [B, A, ...].
    """
    branches = next(iter(conditioning.values())).shape[1]
    call = {
        "sample": latents.repeat(branches, 1, 1, 1).to(device, dtype),  # [A·B, C, h, w]
        "timestep": timesteps.repeat(branches).to(device),  # [A·B]
    }
    for name, value in conditioning.items():
        target = call.setdefault("added_cond_kwargs", {}) if name in ADDED_CONDITIONING else call
        kind = dtype if value.is_floating_point() else value.dtype  # labels and masks stay as they are
        target[name] = value.transpose(0, 1).flatten(0, 1).to(device, kind)  # [B, A, ...] → [A·B, ...]
    return call


def join(parts: list[Trajectories]) -> Trajectories:
    """Concatenate over prompts.

    Raises RunError unless all were sampled with the same steps and conditioning.
    """
    first = parts[0]
    for part in parts[1:]:
        if not torch.equal(part.timesteps, first.timesteps) or part.conditioning.keys() != first.conditioning.keys():
            raise RunError("the pipeline samples some prompts with other timesteps, or calls its UNet in another way")
    outputs = None if parts[0].outputs is None else torch.cat([part.outputs for part in parts])
    names = parts[0].conditioning
    conditioning = {name: torch.cat([part.conditioning[name] for part in parts]) for name in names}
    return Trajectories(torch.cat([part.latents for part in parts]), parts[0].timesteps, conditioning, outputs)


def batches(points: list, size: int) -> Iterator[list]:
    """Yield consecutive slices of at most `size` points."""
    yield from (points[i : i + size] for i in range(0, len(points), size))


def spread_points(trajectories: Trajectories, steps: int, first: int = 0) -> list[tuple[int, int]]:
    """Return `steps` points per prompt, evenly spread over its steps, shifted from prompt to prompt; 0 means all.

    `first` is the number of the first prompt in the whole list.
    """
    prompts, total = trajectories.latents.shape[:2]
    if not 0 < steps < total:
        return trajectories.points()
    return [(n, (k * total // steps + first + n) % total) for n in range(prompts) for k in range(steps)]


def held_out(points: list[tuple[int, int]]) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """Split points nine to one: whole prompts are held out where there are ten or more, else single points."""
    prompts = len({n for n, _ in points})
    chosen = [(n if prompts >= 10 else i) % 10 == 9 for i, (n, _) in enumerate(points)]
    training = [point for point, out in zip(points, chosen, strict=True) if not out]
    return training, [point for point, out in zip(points, chosen, strict=True) if out]
