"""Sampling trajectories: the denoiser's calls at every step, recorded once and replayed.

A call is recorded whole, as a tree of its arguments: tensors, and lists, tuples and dicts of them. A tensor with a
batch dimension is kept for every prompt; one without, such as position ids, once. What does not change between calls is
stored once. Guidance may double the batch, or call the denoiser once more: a recorded point is a prompt and a call,
with all guidance branches of that call.

Letters: N prompts, J calls of a trajectory (steps, times the calls of one step), A guidance branches of a call (2 where
guidance doubles the batch, else 1), B points in a batch.
"""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from vqdm.diffusion.denoisers import TIMESTEP_NAMES, family_of, is_known, noise_levels, output_of
from vqdm.errors import RunError, UserError
from vqdm.storage.files import CorruptFileError, load_checked, save_checked

Point = tuple[int, int]  # number of a prompt, and of a call
RECENT = 4  # values of an argument that the next one is compared with: constants, and those of alternating calls
ABOUT = "about"  # name of the stored tensor that holds the trees, as JSON in bytes


@dataclass(frozen=True)
class Call:
    """A recorded call, without its tensors.

    Attributes:
        tree: argument → node: {"batch": name} is a tensor of `Group.batched`, {"alone": name} one of `Group.alone`,
            {"each": [name, ...]} a list of samples, by guidance branch, {"times": node} a list that repeats a value for
            every sample, {"list" | "tuple" | "dict": nodes}, and {"value": constant}.
        branches: A.
        output: name in `Group.batched` of what the denoiser returned; None if that was not recorded.
    """

    tree: dict
    branches: int
    output: str | None = None


@dataclass
class Group:
    """Calls of prompts whose tensors have equal shapes.

    Attributes:
        numbers: of the prompts.
        batched: name → [N, A, ...], or [N, 1, ...] for what all branches share.
        alone: name → tensor without a batch dimension.
        calls: J of them.
    """

    numbers: list[int]
    batched: dict[str, Tensor]
    alone: dict[str, Tensor]
    calls: list[Call]
    _kinds: dict[int, str] = field(default_factory=dict, repr=False, compare=False)

    def kind(self, call: int) -> str:
        """Return a text that is equal for the calls that one batch can hold."""
        if call not in self._kinds:
            one = self.calls[call]
            shapes = {name: self._shape(node) for name, node in one.tree.items()}
            self._kinds[call] = json.dumps([one.branches, shapes], sort_keys=True)
        return self._kinds[call]

    def _shape(self, node: dict):
        """Return a node with shapes for the names of tensors; tensors without a batch dimension count by value."""
        (kind, held), *_ = node.items()
        if kind == "batch":
            tensor = self.batched[held]
            return [kind, list(tensor.shape[2:]), str(tensor.dtype)]
        if kind == "alone":
            return [kind, _digest(self.alone[held])]
        if kind == "each":
            return [kind, len(held)]
        return [kind, _mapped(self._shape, kind, held)]


def _digest(tensor: Tensor) -> str:
    data = tensor.detach().cpu().contiguous()
    return hashlib.sha256(f"{data.dtype}{list(data.shape)}".encode() + bytes(_as_bytes(data).numpy())).hexdigest()


def _as_bytes(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1).view(torch.uint8)


def _mapped(function: Callable, kind: str, held):
    """Apply a function to the nodes inside a node; constants stay."""
    if kind == "dict":
        return {name: function(node) for name, node in held.items()}
    if kind in ("list", "tuple"):
        return [function(node) for node in held]
    return function(held) if kind == "times" else held


@dataclass
class Trajectories:
    """Recorded calls of N prompts, in groups of equal shapes.

    Attributes:
        timesteps: [J], from 0 (no noise) to 1000; the same for all prompts.
        sample, timestep: the arguments that hold the latents and the timestep.
    """

    groups: list[Group]
    timesteps: Tensor
    sample: str = "sample"
    timestep: str = "timestep"

    @property
    def shape(self) -> tuple[int, int]:
        """(N, J)."""
        return sum(len(group.numbers) for group in self.groups), len(self.timesteps)

    @property
    def dtype(self) -> torch.dtype:
        """The type of the latents."""
        group = self.groups[0]
        return group.batched[_names(group.calls[0].tree[self.sample])[0]].dtype

    @property
    def largest(self) -> float:
        """The largest timestep, as the denoiser was called with it."""
        held = [
            group.batched[name]
            for group in self.groups
            for one in group.calls
            for name in _names(one.tree[self.timestep])
        ]
        return max(value.max().item() for value in held)

    def points(self) -> list[Point]:
        """Return all (prompt, call) pairs, prompt by prompt."""
        prompts, calls = self.shape
        return [(n, j) for n in range(prompts) for j in range(calls)]

    def place(self, prompt: int) -> tuple[Group, int]:
        """Return the group of a prompt and its row there."""
        if not hasattr(self, "_places"):
            self._places = {n: (group, row) for group in self.groups for row, n in enumerate(group.numbers)}
        return self._places[prompt]

    def kind(self, point: Point) -> str:
        """Return a text that is equal for the points that one batch can hold."""
        return self.place(point[0])[0].kind(point[1])

    def branches(self, point: Point) -> int:
        """Return A of a point's call."""
        return self.place(point[0])[0].calls[point[1]].branches

    def batches(self, points: list[Point], size: int) -> Iterator[list[Point]]:
        """Yield batches of at most `size` points that one call can take; those of one kind keep their order."""
        for some in by_kind(points, self.kind):
            yield from batches(some, size)

    def inputs(self, points: list[Point], device, dtype, timesteps: Sequence[float] | None = None) -> dict:
        """Return the keyword arguments of a call on B points of one kind, branches outermost in the batch of A·B.

        Args:
            timesteps: to call with in place of the recorded ones, one per point.
        """
        return collate([(self, *point) for point in points], device, dtype, timesteps)

    def expected(self, points: list[Point], device) -> Tensor:
        """Return recorded outputs [A·B, ...] in the order of `inputs`."""
        return collate_outputs([(self, *point) for point in points], device)

    @property
    def has_outputs(self) -> bool:
        return all(call.output is not None for group in self.groups for call in group.calls)

    def output_bytes(self) -> int:
        """Return the bytes of the outputs of one prompt."""
        group = self.groups[0]
        return sum(group.batched[call.output][0].nbytes for call in group.calls)

    def is_finite(self) -> bool:
        """Return whether no latents and no recorded output holds NaN or infinity."""
        names = [
            (group, name)
            for group in self.groups
            for call in group.calls
            for name in (*_names(call.tree[self.sample]), *([call.output] if call.output else []))
        ]
        return all(bool(group.batched[name].isfinite().all()) for group, name in names)

    def with_outputs(self, outputs: dict[Point, Tensor]) -> Trajectories:
        """Return the same with the outputs [A, ...] of all points."""
        groups = []
        for group in self.groups:
            names = [f"output.{j}" for j in range(len(group.calls))]
            made = {
                name: torch.stack([outputs[n, j] for n in group.numbers])  # [N, A, ...]
                for j, name in enumerate(names)
            }
            calls = [replace(call, output=name) for call, name in zip(group.calls, names, strict=True)]
            groups.append(Group(group.numbers, group.batched | made, group.alone, calls))
        return replace(self, groups=groups)

    def between(self, low: float, high: float) -> Trajectories:
        """Return only the calls with a timestep in [low, high]."""
        keep = ((self.timesteps >= low) & (self.timesteps <= high)).nonzero().flatten().tolist()
        groups = []
        for group in self.groups:
            calls = [group.calls[j] for j in keep]
            used = {name for call in calls for node in call.tree.values() for name in _names(node)}
            used |= {call.output for call in calls}
            batched, alone = ({k: v for k, v in held.items() if k in used} for held in (group.batched, group.alone))
            groups.append(Group(group.numbers, batched, alone, calls))
        return replace(self, groups=groups, timesteps=self.timesteps[keep])

    def at(self, samples: Tensor, timesteps: Tensor) -> Trajectories:
        """Return calls like the first one on latents [N, J, ...] at timesteps [J], without outputs."""
        groups = []
        for group in self.groups:
            batched, calls = dict(group.batched), []
            for j, timestep in enumerate(timesteps):
                latents, times = f"{self.sample}.{j}", f"{self.timestep}.{j}"
                batched[latents] = samples[group.numbers, j].unsqueeze(1)  # [N, 1, ...]
                batched[times] = timestep.expand(len(group.numbers), 1)
                own = {self.sample: {"batch": latents}, self.timestep: {"batch": times}}
                calls.append(Call(group.calls[0].tree | own, group.calls[0].branches))
            groups.append(Group(group.numbers, batched, group.alone, calls))
        return replace(self, groups=groups, timesteps=timesteps)

    # ------------------------------------------------------------------------------------ files

    def to_tensors(self) -> dict[str, Tensor]:
        """Return all tensors under one level of names."""
        tensors, about = {"timesteps": self.timesteps}, []
        for k, group in enumerate(self.groups):
            calls = [[call.tree, call.branches, call.output] for call in group.calls]
            about.append({"numbers": group.numbers, "calls": calls})
            tensors |= {f"{k}.batched.{name}": value for name, value in group.batched.items()}
            tensors |= {f"{k}.alone.{name}": value for name, value in group.alone.items()}
        text = json.dumps({"groups": about, "sample": self.sample, "timestep": self.timestep})
        return tensors | {ABOUT: torch.tensor(list(text.encode()), dtype=torch.uint8)}

    @classmethod
    def of_tensors(cls, tensors: dict[str, Tensor]) -> Trajectories:
        """Invert `to_tensors`; other names are left out."""
        about, groups = json.loads(bytes(tensors[ABOUT].tolist())), []
        for k, one in enumerate(about["groups"]):
            batched, alone = (
                {name.removeprefix(start): value for name, value in tensors.items() if name.startswith(start)}
                for start in (f"{k}.batched.", f"{k}.alone.")
            )
            groups.append(Group(one["numbers"], batched, alone, [Call(*call) for call in one["calls"]]))
        return cls(groups, tensors["timesteps"], about["sample"], about["timestep"])

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


def _names(node: dict) -> list[str]:
    """Return the names of the tensors in a node."""
    (kind, held), *_ = node.items()
    if kind in ("batch", "alone"):
        return [held]
    if kind == "each":
        return held
    inner = [held] if kind == "times" else held.values() if kind == "dict" else held if kind != "value" else []
    return [name for one in inner for name in _names(one)]


# ------------------------------------------------------------------------------------------- replaying


def collate(points: Sequence[tuple[Trajectories, int, int]], device, dtype, timesteps=None) -> dict:
    """Return the keyword arguments of a call on B points of one kind, of any trajectories.

    Floating-point tensors of the latents' type become `dtype`; timesteps, labels and masks stay.
    """
    places = [(*trajectories.place(n), j) for trajectories, n, j in points]
    first, (group, _, j) = points[0][0], places[0]
    branches, own = group.calls[j].branches, group.batched[_names(group.calls[j].tree[first.sample])[0]].dtype

    def on_device(value: Tensor, keep: bool) -> Tensor:
        return value.to(device) if keep or value.dtype != own else value.to(device, dtype)

    def built(nodes: list[dict], keep: bool):
        (kind, held), *_ = nodes[0].items()
        if kind == "batch":
            rows = [g.batched[node["batch"]][row] for (g, row, _), node in zip(places, nodes, strict=True)]
            found = torch.stack([one.expand(branches, *one.shape[1:]) for one in rows])  # [B, A, ...]
            return on_device(found.transpose(0, 1).flatten(0, 1), keep)  # [B, A, ...] → [A·B, ...]
        if kind == "alone":
            return on_device(group.alone[held], keep)
        if kind == "each":
            return [
                on_device(g.batched[node["each"][a]][row, 0], keep)
                for a in range(len(held))
                for (g, row, _), node in zip(places, nodes, strict=True)
            ]
        if kind == "times":
            return [built([held], keep)] * (branches * len(points))
        if kind == "dict":
            return {name: built([node["dict"][name] for node in nodes], keep) for name in held}
        if kind in ("list", "tuple"):
            found = [built([node[kind][k] for node in nodes], keep) for k in range(len(held))]
            return tuple(found) if kind == "tuple" else found
        return held

    trees = [g.calls[call].tree for g, _, call in places]
    call = {name: built([tree[name] for tree in trees], name == first.timestep) for name in trees[0]}
    if timesteps is not None:
        recorded = call[first.timestep]
        given = torch.tensor(timesteps, dtype=recorded.dtype).repeat(branches).to(device)  # [A·B]
        call[first.timestep] = given.view(-1, *[1] * (recorded.dim() - 1)).expand_as(recorded).clone()
    return call


def collate_outputs(points: Sequence[tuple[Trajectories, int, int]], device) -> Tensor:
    """Return recorded outputs [A·B, ...] of points of one kind, in the order of `collate`."""
    places = [(*trajectories.place(n), j) for trajectories, n, j in points]
    found = torch.stack([group.batched[group.calls[j].output][row] for group, row, j in places])  # [B, A, ...]
    return found.transpose(0, 1).flatten(0, 1).to(device)


def join(parts: list[Trajectories]) -> Trajectories:
    """Concatenate over prompts; parts with equal shapes become one group.

    Raises RunError unless all were sampled with the same steps.
    """
    first, groups, offset = parts[0], {}, 0
    for part in parts:
        if not torch.equal(part.timesteps, first.timesteps):
            raise RunError("the pipeline samples some prompts with other timesteps, or calls its denoiser otherwise")
        for group in part.groups:
            moved = replace(group, numbers=[offset + n for n in group.numbers], _kinds={})
            groups.setdefault(_alike(group), []).append(moved)
        offset += part.shape[0]
    return replace(first, groups=[_concatenated(some) for some in groups.values()])


def _alike(group: Group) -> str:
    """Return a text that is equal for groups that can be concatenated."""
    shapes = {name: [list(tensor.shape[1:]), str(tensor.dtype)] for name, tensor in group.batched.items()}
    alone = {name: _digest(tensor) for name, tensor in group.alone.items()}
    return json.dumps(
        [shapes, alone, [[call.tree, call.branches, call.output] for call in group.calls]], sort_keys=True
    )


def _concatenated(groups: list[Group]) -> Group:
    numbers = [n for group in groups for n in group.numbers]
    batched = {name: torch.cat([group.batched[name] for group in groups]) for name in groups[0].batched}
    return Group(numbers, batched, groups[0].alone, groups[0].calls)


# ------------------------------------------------------------------------------------------- recording


class CallRecorder:
    """Context manager that records every call of a denoiser while a pipeline samples `prompts` images per batch.

    Leaves no hook behind, also after an exception. A call that `Trajectories` cannot hold raises UserError with the
    argument.
    """

    def __init__(self, denoiser: nn.Module, prompts: int, outputs: bool = False):
        self.denoiser, self.prompts, self.with_outputs = denoiser, prompts, outputs
        self.row, self.known = family_of(denoiser), is_known(denoiser)
        parameters = list(inspect.signature(type(denoiser).forward).parameters)
        self.sample = parameters[1]
        self.timestep = next((name for name in TIMESTEP_NAMES if name in parameters), None)
        self._signature = inspect.signature(type(denoiser).forward)
        self.calls: list[Call] = []
        self.levels: list[float] = []
        self.batched: dict[str, list[Tensor]] = {}  # name → of each prompt [A, ...]
        self.alone: dict[str, Tensor] = {}

    def __enter__(self) -> CallRecorder:
        if self.timestep is None:
            raise _unsupported(TIMESTEP_NAMES[0], "is no argument of its denoiser")
        self._hook = self.denoiser.register_forward_hook(self._record, with_kwargs=True)
        return self

    def __exit__(self, *_) -> None:
        self._hook.remove()

    def _record(self, module, args, kwargs, output) -> None:
        given = self._arguments(module, args, kwargs)
        sample = given[self.sample]
        if not isinstance(sample, Tensor | list | tuple) or len(sample) % self.prompts:
            raise _unsupported(self.sample, f"has {_length(sample)} samples for {self.prompts} prompts")
        branches = len(sample) // self.prompts
        self.levels.append(self._timestep(given))
        given[self.timestep] = self._spread(given[self.timestep], branches)
        tree = {name: self._node(name, value, branches) for name, value in given.items()}
        made = None
        if self.with_outputs:
            made = self._node("output", output_of(output), branches)["batch"]
        self.calls.append(Call(tree, branches, made))

    def _arguments(self, module, args, kwargs) -> dict:
        """Return the arguments by name, without those that ask for a type of output or for nothing."""
        bound = self._signature.bind(module, *args, **kwargs)
        given = {}
        for name, value in bound.arguments.items():
            kind = self._signature.parameters[name].kind
            if kind is inspect.Parameter.VAR_POSITIONAL:
                raise _unsupported(name, "is not recorded")
            given |= value if kind is inspect.Parameter.VAR_KEYWORD else {name: value}
        empty = lambda value: value is None or (isinstance(value, dict | list | tuple) and not value)  # noqa: E731
        return {
            name: value for name, value in given.items() if name not in ("self", "return_dict") and not empty(value)
        }

    def _timestep(self, given: dict) -> float:
        """Return the timestep of a call, the same for all images of a batch."""
        values = torch.as_tensor(given[self.timestep]).detach().float().cpu()
        values = values.flatten(1).amax(1) if values.dim() > 1 else values.reshape(-1)
        if (values != values[0]).any():
            raise _unsupported(self.timestep, "differs between the images of a batch")
        return values[0].item()

    def _spread(self, timestep, branches: int) -> Tensor:
        """Return a timestep for every sample, [A·B] or with further dimensions."""
        value = torch.as_tensor(timestep)
        value = value if value.is_floating_point() else value.float()
        return value.expand(branches * self.prompts) if value.numel() == 1 else value

    def _node(self, path: str, value, branches: int) -> dict:
        """Return the node of a value, and keep its tensors."""
        name, samples = path.split(".")[0], branches * self.prompts
        if isinstance(value, Tensor):
            if name not in self.row.unbatched and value.dim() > 0 and len(value) == samples:
                return {"batch": self._keep(path, value, branches)}
            if self.known and name not in self.row.unbatched:
                raise _unsupported(path, f"has shape {list(value.shape)} for {self.prompts} prompts")
            return {"alone": self._keep_alone(path, value)}
        if isinstance(value, dict):
            return {"dict": {key: self._node(f"{path}.{key}", one, branches) for key, one in value.items()}}
        if isinstance(value, list | tuple):
            if path in (self.sample, *self.row.listed) and len(value) == samples:
                if all(isinstance(one, Tensor) for one in value):
                    return {"each": [self._keep_each(f"{path}.{a}", value, a) for a in range(branches)]}
                if _is_constant(value) and all(one == value[0] for one in value):
                    return {"times": self._node(f"{path}.0", value[0], branches)}
            kind = "list" if isinstance(value, list) else "tuple"
            return {kind: [self._node(f"{path}.{k}", one, branches) for k, one in enumerate(value)]}
        if not _is_constant(value):
            raise _unsupported(path, f"is a {type(value).__name__}, which is not recorded")
        return {"value": value}

    def _keep(self, path: str, value: Tensor, branches: int) -> str:
        """Keep a tensor [A·B, ...] of every prompt, that of the latents once where all branches share it."""
        value = value.detach().cpu().unflatten(0, (branches, self.prompts))  # [A·B, ...] → [A, B, ...]
        shared = path in (self.sample, self.timestep) and (value == value[:1]).logical_or(value.isnan()).all()
        value = (value[:1] if shared else value).transpose(0, 1).contiguous()  # [B, A or 1, ...]
        return self._named(self.batched, path, list(value.unbind(0)))

    def _keep_each(self, path: str, values: Sequence[Tensor], branch: int) -> str:
        """Keep one branch of a list of samples; they may differ in their shapes."""
        some = values[branch * self.prompts : (branch + 1) * self.prompts]
        return self._named(self.batched, path, [one.detach().cpu().clone().unsqueeze(0) for one in some])  # [1, ...]

    def _keep_alone(self, path: str, value: Tensor) -> str:
        return self._named(self.alone, path, value.detach().cpu().clone())

    def _named(self, held: dict, path: str, value) -> str:
        """Return the name of an equal value that was kept lately, else keep this one."""
        numbers = [int(name.rpartition("#")[2]) for name in held if name.rpartition("#")[0] == path]
        argument = path.split(".")[0]  # latents and timestep change at every step; two calls of guidance share them
        recent = {"output": 0, self.sample: 1, self.timestep: 1}.get(argument, RECENT)
        for number in numbers[len(numbers) - min(recent, len(numbers)) :]:
            if _equal(held[f"{path}#{number}"], value):
                return f"{path}#{number}"
        name = f"{path}#{len(numbers)}"
        held[name] = value
        return name

    def trajectories(self) -> Trajectories:
        """Return the recorded calls: one group, or several where shapes differ between prompts."""
        alike: dict[tuple, list[int]] = {}
        for n in range(self.prompts):
            alike.setdefault(tuple(one[n].shape for one in self.batched.values()), []).append(n)
        groups = [
            Group(
                some,
                {name: torch.stack([one[n] for n in some]) for name, one in self.batched.items()},
                self.alone,
                self.calls,
            )
            for some in alike.values()
        ]
        timesteps = torch.tensor(noise_levels(self.denoiser, self.levels))
        return Trajectories(groups, timesteps, self.sample, self.timestep)


def _equal(one, other) -> bool:
    if isinstance(one, Tensor):
        return one.shape == other.shape and one.dtype == other.dtype and torch.equal(one, other)
    return all(map(_equal, one, other))


def _is_constant(value) -> bool:
    """Return whether a value holds numbers and text alone, in lists, tuples and dicts."""
    if isinstance(value, list | tuple):
        return all(map(_is_constant, value))
    if isinstance(value, dict):
        return all(isinstance(key, str) and _is_constant(one) for key, one in value.items())
    return value is None or (isinstance(value, bool | int | str | float) and value == value)


def _length(value) -> str:
    return str(len(value)) if isinstance(value, list | tuple | Tensor) and getattr(value, "ndim", 1) else "no"


def _unsupported(name: str, why: str) -> UserError:
    return UserError(f"MODEL's pipeline calls its denoiser with {name}, which {why}; it cannot be calibrated")


# ------------------------------------------------------------------------------------------- choosing points


def by_kind(points: Sequence, kind: Callable) -> list[list]:
    """Return points in lists of one kind each, in the order of the first; points of one kind keep their order."""
    found: dict[str, list] = {}
    for point in points:
        found.setdefault(kind(point), []).append(point)
    return list(found.values())


def batches(points: list, size: int) -> Iterator[list]:
    """Yield consecutive slices of at most `size` points."""
    yield from (points[i : i + size] for i in range(0, len(points), size))


def spread_points(trajectories: Trajectories, steps: int, first: int = 0) -> list[Point]:
    """Return `steps` points per prompt, evenly spread over its calls, shifted from prompt to prompt; 0 means all.

    `first` is the number of the first prompt in the whole list.
    """
    prompts, total = trajectories.shape
    if not 0 < steps < total:
        return trajectories.points()
    return [(n, (k * total // steps + first + n) % total) for n in range(prompts) for k in range(steps)]


def held_out(points: list[Point]) -> tuple[list[Point], list[Point]]:
    """Split points nine to one: whole prompts are held out where there are ten or more, else single points."""
    prompts = len({n for n, _ in points})
    chosen = [(n if prompts >= 10 else i) % 10 == 9 for i, (n, _) in enumerate(points)]
    training = [point for point, out in zip(points, chosen, strict=True) if not out]
    return training, [point for point, out in zip(points, chosen, strict=True) if out]
