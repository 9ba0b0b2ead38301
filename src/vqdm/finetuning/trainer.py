"""The student in training: its loss, optimizer, learning-rate schedule, moving average, and one step of all processes.

Each process computes the gradient of its shard of a batch, in micro-batches. The sum over all processes is the gradient
of the one big batch up to rounding, for any number of processes; DDP would average over shards of unequal size.

Letters: A guidance branches, B points in a batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from vqdm.diffusion.denoisers import TIMESTEP_NAMES, output_of
from vqdm.diffusion.pipelines import dtypes_in
from vqdm.diffusion.trajectories import batches
from vqdm.errors import RunError
from vqdm.finetuning.code_updates import CodeUpdates
from vqdm.finetuning.config import AUTO, OptimizerConfig
from vqdm.finetuning.data import Batch, Point, Points, autocast
from vqdm.layers.quantized import SharedCodebookModule, held_weights, quantized_layers
from vqdm.parallel import Ranks

# ------------------------------------------------------------------------------------------------- trainable parameters
#
# Every floating-point tensor of the student. Codes and 8-bit values are integers and stay. Trained are codebooks (a
# layer's own, groupwise, as tables of values, or shared), scales (of rows, groups, inputs, int8 layers), biases and
# norms, and weights of layers that are not quantized.
#
# Parameters are float32 in training and written back in the type they are stored in.

CODEBOOKS = ("codebooks", "codebook_values")
KINDS = ("codebook", "scale", "weight", "bias")


@dataclass(frozen=True)
class TrainedParameters:
    """Parameters in training, by dotted name in module order.

    Attributes:
        kinds: name → one of `KINDS`.
        rms: name → root mean square when training began.
    """

    tensors: dict[str, nn.Parameter]
    kinds: dict[str, str]
    rms: dict[str, float]

    def __iter__(self) -> Iterator[nn.Parameter]:
        return iter(self.tensors.values())


def trainable(
    model: nn.Module, config: OptimizerConfig, selected: Callable[[str], bool] = lambda name: True
) -> TrainedParameters:
    """Make floating-point parameters float32, and the selected ones with a learning rate above 0 trainable; in place.

    Args:
        selected: called with a parameter's dotted name.
    """
    kinds, factors = kinds_of(model), kind_factors(config)
    names = [name for name, kind in kinds.items() if factors[kind] > 0 and selected(name)]
    held = dict(model.named_parameters())
    for name in kinds:
        held[name].data = held[name].data.float()
        held[name].requires_grad_(name in names)
    tensors = {name: held[name] for name in names}
    rms = {name: tensor.detach().square().mean().sqrt().item() for name, tensor in tensors.items()}
    return TrainedParameters(tensors, {name: kinds[name] for name in names}, rms)


def kinds_of(model: nn.Module) -> dict[str, str]:
    """Return name → kind of every floating-point parameter, in module order."""
    found = {}
    for path, module in model.named_modules():
        for name, tensor in module.named_parameters(prefix=path, recurse=False):
            if tensor.is_floating_point():
                found[name] = _kind(module, name.rpartition(".")[2], tensor)
    return found


def _kind(module: nn.Module, name: str, tensor: nn.Parameter) -> str:
    if isinstance(module, SharedCodebookModule) or name in CODEBOOKS:
        return "codebook"
    if name != "bias" and hasattr(module, "stored_tensors"):
        return "scale"
    return "weight" if tensor.dim() > 1 else "bias"


def kind_factors(config: OptimizerConfig) -> dict[str, float]:
    """Return kind → factor of the learning rate."""
    return dict(zip(KINDS, (config.codebook_lr, config.scale_lr, config.weight_lr, config.bias_lr), strict=True))


def parameter_groups(trained: TrainedParameters, config: OptimizerConfig) -> list[dict]:
    """Return Adam's parameter groups: one per learning rate, which depends on kind and size.

    A group's `lr_factor` is its factor of the training's learning rate. The learning rate of biases and norms is
    absolute. That of all other parameters is relative to their root mean square, rounded to a power of two: a learning
    rate that suits codebooks of size 1 would scatter scales of size 0.01.
    """
    factors = kind_factors(config)
    groups: dict[float, list[nn.Parameter]] = {}
    for name, tensor in trained.tensors.items():
        kind, rms = trained.kinds[name], trained.rms[name]
        factor = factors[kind] * (1.0 if kind == "bias" or rms == 0 else 2.0 ** round(math.log2(rms)))
        groups.setdefault(factor, []).append(tensor)
    groups = groups or {0.0: []}  # where codes alone are trained
    return [{"params": tensors, "lr": factor, "lr_factor": factor} for factor, tensors in groups.items()]


def types_on_disk(folder: Path) -> dict[str, torch.dtype]:
    """Return name → type of every floating-point tensor in a model folder's safetensors files."""
    return {name: dtype for path in sorted(folder.glob("*.safetensors")) for name, dtype in dtypes_in(path).items()}


def stored_types(model: nn.Module) -> dict[str, torch.dtype]:
    """Return name → type of every floating-point parameter."""
    held = dict(model.named_parameters())
    return {name: held[name].dtype for name in kinds_of(model)}


@contextmanager
def rounded_to(types: dict[str, torch.dtype], trained: TrainedParameters) -> Iterator[None]:
    """Inside, parameters have the values that will be read back from disk: rounded to their stored types."""
    exact = {name: tensor.data for name, tensor in trained.tensors.items()}
    for name, tensor in trained.tensors.items():
        tensor.data = tensor.data.to(types[name]).to(tensor.dtype)
    try:
        yield
    finally:
        for name, tensor in trained.tensors.items():
            tensor.data = exact[name]


def write_back(model: nn.Module, types: dict[str, torch.dtype], compute_dtype: torch.dtype | None = None) -> None:
    """Freeze parameters and round each to its type in `types`, in place; held in `compute_dtype` afterwards, if given.

    Raises:
        RunError: a value exceeds its type's range; names the parameter.
    """
    held = dict(model.named_parameters())
    for name, dtype in types.items():
        held[name].requires_grad_(False)
        held[name].grad = None
        held[name].data = held[name].data.to(dtype)
        if not held[name].isfinite().all():
            raise RunError(f"{name} exceeds the range of {dtype}; use a lower --finetune_lr")
        if compute_dtype:
            held[name].data = held[name].data.to(compute_dtype)


BUCKET_VALUES = 2**24  # gradients per all-reduce
MOMENTS = ("exp_avg", "exp_avg_sq", "step")
LEARNING_RATE_OF_ERROR = 0.05  # times the median prompt's relative error, as an amplitude
LEARNING_RATES = (1e-5, 2e-3)  # range of the automatic choice
SMALLEST_SCALE = 2.0**-16  # of the loss in float16; a gradient that overflows at this scale is not finite at all


class Diverged(RunError):
    """The loss or the gradient is not finite, or the held-out loss has risen."""


@dataclass(frozen=True)
class DistillationLoss:
    """Mean squared error between student and teacher outputs, computed in micro-batches on any number of processes.

    Attributes:
        teacher: computes the outputs of points without recorded ones; None if all are recorded.
        dtype: type in which the student computes (autocast).
        micro_batch_size: points per call of the student on one process.
    """

    student: nn.Module
    teacher: nn.Module | None
    dtype: torch.dtype
    micro_batch_size: int
    ranks: Ranks

    def micro_batches(self, points: Points, chosen: Sequence[Point]) -> Iterator[tuple[Batch, list[int]]]:
        """Yield this process's shard of `chosen`, every batch with teacher outputs; and the places of its points there.

        Points of other shapes are in other batches.
        """
        own = self.ranks.shard(chosen)
        for some in points.alike(range(len(own)), own):
            for places in batches(some, self.micro_batch_size):
                batch = points.batch([own[place] for place in places], self.ranks.device, torch.float32)
                if batch.teacher_output is None:
                    batch = batch._replace(teacher_output=self.teacher_output(batch.call))
                yield batch, places

    @torch.no_grad()
    def teacher_output(self, call: dict) -> Tensor:
        """Return the teacher's output, [A·B, ...], in its own type."""
        return output_of(self.teacher(**_cast(call, self.teacher.dtype)))

    def student_output(self, call: dict) -> Tensor:
        """Return the student's output, float32 [A·B, ...]."""
        with autocast(self.ranks.device, self.dtype):
            return output_of(self.student(**call)).float()

    def backward(self, points: Points, chosen: Sequence[Point], scale: float = 1.0) -> float:
        """Add `scale` times this process's part of the gradient to `.grad`, and return its part of the loss.

        The parts of all processes sum to the mean squared error over all values of all `chosen` points, and to its
        gradient; a point of more branches counts as much as any other.
        """
        loss = 0.0
        for batch, _ in self.micro_batches(points, chosen):
            values = batch.teacher_output.numel() // batch.count  # per point
            error = self.student_output(batch.call) - batch.teacher_output.float()  # [A·B, ...]
            part = error.square().sum() / (len(chosen) * values)
            (part * scale).backward()
            loss += part.item()
        return loss


def _cast(call, dtype: torch.dtype):
    """Return the arguments in another type; timesteps, labels and masks stay."""
    if isinstance(call, dict):
        return {name: value if name in TIMESTEP_NAMES else _cast(value, dtype) for name, value in call.items()}
    if isinstance(call, list | tuple):
        return type(call)(_cast(value, dtype) for value in call)
    return call.to(dtype) if isinstance(call, Tensor) and call.is_floating_point() else call


# ------------------------------------------------------------------------------------------- learning rate


def choose_learning_rate(config: OptimizerConfig, median_db: float) -> float:
    """Return `finetune_lr`; if it is "auto", in proportion to the median prompt's error in dB before training.

    Adam moves every parameter by about the learning rate, relative to its size, however small the gradient is; the
    outputs move with it. Steps that move the outputs by more than their error do harm.
    """
    if config.finetune_lr != AUTO:
        return config.finetune_lr
    least, most = LEARNING_RATES
    return float(f"{min(most, max(least, LEARNING_RATE_OF_ERROR * 10 ** (median_db / 20))):.2g}")


def schedule_factor(step: int, total: int, config: OptimizerConfig, warmup_start: int = 0) -> float:
    """Return a step's factor of the learning rate: linear warmup times the schedule, which ends at 0.

    Steps count from 0. The warmup begins at step `warmup_start`, where Adam's moments are empty: training starts there
    again after the learning rate was reduced. (torch's schedulers have no such product.)
    """
    done = step / max(1, total)
    schedule = {"cosine": 0.5 * (1 + math.cos(math.pi * done)), "linear": 1 - done, "constant": 1.0}
    warmup = min(1.0, (step - warmup_start + 1) / (config.lr_warmup_steps + 1))
    return warmup * schedule[config.lr_scheduler]


# ------------------------------------------------------------------------------------------- the trainer


class MovingAverage:
    """Exponential moving average of parameters. Codes are not averaged: averaged codebooks decode the newest codes.

    torch's `AveragedModel` would copy the whole student, codes included.

    Attributes:
        decay: 0 keeps no average.
        tensors: name → averaged values.
    """

    def __init__(self, trained: TrainedParameters, decay: float):
        self.trained, self.decay = trained, decay
        held = trained.tensors.items() if decay else ()
        self.tensors = {name: tensor.detach().clone() for name, tensor in held}

    def update(self, step: int) -> None:
        """Take in the parameters after `step` steps; the decay grows from 0.1 to `decay` in the first steps."""
        if self.decay:
            average = get_ema_multi_avg_fn(min(self.decay, (1 + step) / (10 + step)))
            average(list(self.tensors.values()), [tensor.detach() for tensor in self.trained], step)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Inside, the model has the averaged values; without an average, its own."""
        self.swap()
        try:
            yield
        finally:
            self.swap()

    def swap(self) -> None:
        """Exchange the parameters with their averages."""
        for name, averaged in self.tensors.items():
            held = self.trained.tensors[name]
            self.tensors[name], held.data = held.data, averaged

    def load(self, tensors: dict[str, Tensor]) -> None:
        for name, value in tensors.items():
            self.tensors[name].copy_(value)


class StepResult(NamedTuple):
    """Loss and gradient norm of the batch, learning rate, and counts of groups whose codes were tried and changed."""

    loss: float
    gradient_norm: float
    learning_rate: float
    codes: dict[str, int]


class Trainer:
    """Trains the student step by step.

    Args:
        trained: parameters, each float32.
        config: if its learning rate is "auto", set `learning_rate` before the first step.
        total_steps: of the whole training, for the schedule.
        decode: "step" decodes weights once per step and keeps them, with their gradients, in float32; "call" decodes in
            every forward and backward pass.
        updates: changes codes after each step; None leaves them as they are.

    Attributes:
        steps_done: steps so far.
        warmup_start: step at which the optimizer's state was last empty.
    """

    def __init__(
        self,
        loss_fn: DistillationLoss,
        trained: TrainedParameters,
        config: OptimizerConfig,
        total_steps: int,
        decode: str = "step",
        updates: CodeUpdates | None = None,
    ):
        self.loss_fn, self.trained, self.config = loss_fn, trained, config
        self.total_steps, self.decode, self.updates = total_steps, decode, updates
        self.learning_rate = config.finetune_lr
        betas = (config.finetune_adam_beta1, config.finetune_adam_beta2)
        self.optimizer = torch.optim.Adam(parameter_groups(trained, config), betas=betas)
        # Never stepped: holds what the scaler unscales and checks, which are more tensors than Adam's.
        latents = updates.latents() if updates else []
        self.scaled = torch.optim.SGD([{"params": [*trained, *latents]}], lr=0.0)
        self.average = MovingAverage(trained, config.ema_decay)
        self.scaler = torch.amp.GradScaler(loss_fn.ranks.device.type, enabled=loss_fn.dtype == torch.float16)
        self.steps_done = self.warmup_start = 0

    def step(self, points: Points, chosen: Sequence[Point]) -> StepResult:
        """Take one optimizer step on the batch `chosen`; every process calls it with the same batch.

        Raises:
            Diverged: the loss or the gradient is not finite.
        """
        factor = schedule_factor(self.steps_done, self.total_steps, self.config, self.warmup_start)
        for group in self.optimizer.param_groups:
            group["lr"] = group["lr_factor"] * (factor * self.learning_rate)
        loss = self.compute_gradients(points, chosen)
        if not math.isfinite(loss):
            raise Diverged(f"the loss is {loss} at step {self.steps_done + 1}")
        norm, finite = self._unscale_and_clip()
        scale = self.scaler.get_scale() if self.scaler.is_enabled() else 0.0
        if not finite and scale <= SMALLEST_SCALE:
            raise Diverged(f"the gradient is not finite at step {self.steps_done + 1}")
        codes = {}
        if finite:
            self.optimizer.step()
            if self.updates:
                codes = {f"groups_{name}": count for name, count in self.updates.step(factor)._asdict().items()}
        self.scaler.update()  # reduces the scale after a gradient that is not finite
        self.steps_done += 1
        self.average.update(self.steps_done)
        return StepResult(loss, norm, factor * self.learning_rate, codes)

    def compute_gradients(self, points: Points, chosen: Sequence[Point]) -> float:
        """Set the gradients of the batch, summed over all processes; returns the batch's loss."""
        ranks = self.loss_fn.ranks
        self.optimizer.zero_grad()
        if self.updates:
            self.updates.zero_grad()
        scale = self.scaler.scale(torch.ones((), device=ranks.device)).item()
        with held_weights(self.loss_fn.student) if self.decode == "step" else nullcontext():
            loss = self.loss_fn.backward(points, chosen, scale)
        for tensor in self.trained:
            tensor.grad = torch.zeros_like(tensor) if tensor.grad is None else tensor.grad
        latents = self.updates.gradients() if self.updates else []
        sum_over_ranks([tensor.grad for tensor in self.trained] + list(latents), ranks)
        total = torch.tensor([loss], dtype=torch.float64, device=ranks.device)
        ranks.all_reduce(total)
        return total.item()

    def _unscale_and_clip(self) -> tuple[float, bool]:
        """Return the norm of the parameters' gradients before clipping, and whether all gradients are finite."""
        self.scaler.unscale_(self.scaled)
        limit = self.config.max_grad_norm or math.inf
        norm = nn.utils.clip_grad_norm_(list(self.trained), limit).item()
        latents = self.updates.gradients() if self.updates else []
        return norm, math.isfinite(norm) and math.isfinite(nn.utils.get_total_norm(latents).item())

    # ------------------------------------------------------------------------------------ state

    def result_tensors(self) -> dict[str, Tensor]:
        """Return the result so far: averaged parameters (without an average, the parameters) and codes."""
        return dict(self.average.tensors or self.trained.tensors) | self._codes()

    def _codes(self) -> dict[str, Tensor]:
        if not self.updates:
            return {}
        layers = quantized_layers(self.loss_fn.student).items()
        return {f"{name}.codes": layer.codes for name, layer in layers}

    def load_result(self, tensors: dict[str, Tensor]) -> None:
        """Put `result_tensors` in the place of parameters and codes, and drop the average."""
        held = dict(self.loss_fn.student.named_parameters())
        for name, value in tensors.items():
            held[name].data.copy_(value)
        self.average = MovingAverage(self.trained, 0.0)

    def restart(self, tensors: dict[str, Tensor]) -> None:
        """Continue from `result_tensors` with an empty optimizer state, average and drift of codes."""
        self.load_result(tensors)
        self.average = MovingAverage(self.trained, self.config.ema_decay)
        self.optimizer.state.clear()
        if self.updates:
            self.updates.restart()
        self.warmup_start = self.steps_done

    def state_tensors(self) -> dict[str, dict[str, Tensor]]:
        """Return everything that the next step depends on, by file; Adam's state as `moment.parameter`."""
        names = {id(tensor): name for name, tensor in self.trained.tensors.items()}
        adam = self.optimizer.state.items()
        return {
            "parameters": {**self.trained.tensors, **self._codes()},
            "optimizer": {f"{key}.{names[id(tensor)]}": state[key] for tensor, state in adam for key in MOMENTS},
            "average": self.average.tensors,
            "code_updates": self.updates.state_dict() if self.updates else {},
        }

    def load_state(self, tensors: dict[str, dict[str, Tensor]], steps_done: int, scaler: dict) -> None:
        """Restore `state_tensors` after `steps_done` steps, bit for bit."""
        held = dict(self.loss_fn.student.named_parameters())
        for name, value in tensors["parameters"].items():
            held[name].data.copy_(value)
        for key, value in tensors["optimizer"].items():
            moment, _, name = key.partition(".")
            tensor = self.trained.tensors[name]
            self.optimizer.state[tensor][moment] = value.clone().to("cpu" if moment == "step" else tensor.device)
        self.average.load(tensors["average"])
        if self.updates:
            self.updates.load_state_dict(tensors["code_updates"])
        self.scaler.load_state_dict(scaler)
        self.steps_done = steps_done


def sum_over_ranks(tensors: Sequence[Tensor], ranks: Ranks) -> None:
    """Replace tensors by their sums over all processes, in place; all processes get the same bytes."""
    for bucket in buckets(tensors if ranks.world > 1 else [], BUCKET_VALUES):
        flat = torch.cat([tensor.flatten() for tensor in bucket])
        ranks.all_reduce(flat)
        for tensor, total in zip(bucket, flat.split([tensor.numel() for tensor in bucket]), strict=True):
            tensor.copy_(total.view_as(tensor))


def buckets(tensors: Sequence[Tensor], values: int) -> Iterator[list[Tensor]]:
    """Yield consecutive tensors that have at most `values` values together; a larger tensor has its own bucket."""
    held: list[Tensor] = []
    for tensor in tensors:
        if held and sum(one.numel() for one in held) + tensor.numel() > values:
            yield held
            held = []
        held.append(tensor)
    if held:
        yield held
