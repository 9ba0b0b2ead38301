"""The student in training: its parameters, optimizer and average, moved by one step after another."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
from torch import Tensor, nn

from vqdm.errors import RunError
from vqdm.finetuning.code_updates import CodeUpdates
from vqdm.finetuning.config import OptimizerConfig
from vqdm.finetuning.optimizer import Average, adam, load_optimizer, optimizer_tensors, rate_factor, set_rate
from vqdm.finetuning.parameters import Trained
from vqdm.finetuning.points import Point, Points
from vqdm.finetuning.step import Lesson, add_up, add_up_number
from vqdm.layers.quantized import held_weights, quantized_layers

SMALLEST_SCALE = 2.0**-16  # of the loss in float16; a gradient that overflows even then is not a matter of scale


class Diverged(RunError):
    """Training has gone wrong, and going on is of no use."""


class Step(NamedTuple):
    """What a step tells: loss of its batch, norm of the gradient, rate, and what happened to codes."""

    loss: float
    gradient_norm: float
    rate: float
    codes: dict[str, int]


class Trainer:
    """Moves a student towards its teacher.

    Args:
        config: where its learning rate is "auto", `learning_rate` is to be set before the first step.
        total: steps of the whole training, for the schedule.
        decode: "step" decodes weights once a step and keeps them, with their gradients, in float32 meanwhile; "call"
            decodes in every call, forward and backward.
        updates: changes codes after each step; None leaves them as they are.
    """

    def __init__(
        self,
        lesson: Lesson,
        trained: Trained,
        config: OptimizerConfig,
        total: int,
        decode: str = "step",
        updates: CodeUpdates | None = None,
    ):
        self.lesson, self.trained, self.config, self.total, self.updates = lesson, trained, config, total, updates
        self.optimizer, self.learning_rate = adam(trained, config), config.finetune_lr
        # Never stepped: what the scaler unscales and checks, which Adam's parameters are a part of.
        latents = updates.latents() if updates else []
        self.scaled = torch.optim.SGD([{"params": [*trained, *latents]}], lr=0.0)
        self.average = Average(trained, config.ema_decay)
        self.decode = decode
        self.scaler = torch.amp.GradScaler(lesson.ranks.device.type, enabled=lesson.dtype == torch.float16)
        self.done = self.began = 0

    def step(self, points: Points, chosen: Sequence[Point]) -> Step:
        """Learn from a batch of points.

        Raises:
            Diverged: the loss or the gradient is not finite.
        """
        factor = rate_factor(self.done, self.total, self.config, self.began)
        set_rate(self.optimizer, factor * self.learning_rate)
        loss = self._gradients(points, chosen)
        if not math.isfinite(loss):
            raise Diverged(f"the loss is {loss} at step {self.done + 1}")
        norm, finite = self._clipped()
        scale = self.scaler.get_scale() if self.scaler.is_enabled() else 0.0
        if not finite and scale <= SMALLEST_SCALE:
            raise Diverged(f"the gradient is not finite at step {self.done + 1}")
        codes = {}
        if finite:
            self.optimizer.step()
            if self.updates:
                codes = {f"groups_{name}": count for name, count in self.updates.step(factor)._asdict().items()}
        self.scaler.update()  # a smaller scale after a gradient that is not finite
        self.done += 1
        self.average.update(self.done)
        return Step(loss, norm, factor * self.learning_rate, codes)

    def _gradients(self, points: Points, chosen: Sequence[Point]) -> float:
        """Set the gradients of the batch, of all processes together; returns its loss."""
        self.optimizer.zero_grad()
        if self.updates:
            self.updates.zero_grad()
        one = torch.ones((), device=self.lesson.ranks.device)
        with self._holding():
            loss = self.lesson.backward(points, chosen, self.scaler.scale(one).item())
        for tensor in self.trained:
            tensor.grad = torch.zeros_like(tensor) if tensor.grad is None else tensor.grad
        add_up(self._all_gradients(), self.lesson.ranks)
        return add_up_number(loss, self.lesson.ranks)

    def _holding(self) -> AbstractContextManager:
        return held_weights(self.lesson.student) if self.decode == "step" else nullcontext()

    def _all_gradients(self) -> list[Tensor]:
        latents = self.updates.gradients() if self.updates else []
        return [tensor.grad for tensor in self.trained] + list(latents)

    def _clipped(self) -> tuple[float, bool]:
        """Undo the scaling, and clip; returns the parameters' norm before, and whether all gradients are finite."""
        self.scaler.unscale_(self.scaled)
        limit = self.config.max_grad_norm or math.inf
        norm = nn.utils.clip_grad_norm_(list(self.trained), limit).item()
        latents = self.updates.gradients() if self.updates else []
        return norm, math.isfinite(norm) and math.isfinite(nn.utils.get_total_norm(latents).item())

    # ------------------------------------------------------------------------------------ as tensors

    def shown_tensors(self) -> dict[str, Tensor]:
        """What would be saved now: averaged parameters, or the parameters where there is no average, and codes."""
        return dict(self.average.tensors or self.trained.tensors) | self._codes()

    def _codes(self) -> dict[str, Tensor]:
        if not self.updates:
            return {}
        layers = quantized_layers(self.lesson.student).items()
        return {f"{name}.codes": layer.codes for name, layer in layers}

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Put in the place of parameters and codes what `shown_tensors` gave; the average is dropped."""
        held = dict(self.lesson.student.named_parameters())
        for name, value in tensors.items():
            held[name].data.copy_(value)
        self.average = Average(self.trained, 0.0)

    def restart(self, tensors: dict[str, Tensor]) -> None:
        """Continue with what `shown_tensors` gave, without any memory of earlier steps."""
        self.restore(tensors)
        self.average = Average(self.trained, self.config.ema_decay)
        self.optimizer.state.clear()
        if self.updates:
            self.updates.restart()
        self.began = self.done

    def state_tensors(self) -> dict[str, dict[str, Tensor]]:
        """Everything that the next step depends on, by file."""
        return {
            "parameters": {**self.trained.tensors, **self._codes()},
            "optimizer": optimizer_tensors(self.optimizer, self.trained),
            "average": self.average.tensors,
            "code_updates": self.updates.state_dict() if self.updates else {},
        }

    def load_state(self, tensors: dict[str, dict[str, Tensor]], done: int, scaler: dict) -> None:
        """The inverse of `state_tensors`, after `done` steps."""
        held = dict(self.lesson.student.named_parameters())
        for name, value in tensors["parameters"].items():
            held[name].data.copy_(value)
        load_optimizer(self.optimizer, self.trained, tensors["optimizer"])
        self.average.load(tensors["average"])
        if self.updates:
            self.updates.load_state_dict(tensors["code_updates"])
        self.scaler.load_state_dict(scaler)
        self.done = done
