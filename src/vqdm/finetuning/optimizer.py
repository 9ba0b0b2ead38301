"""Adam, its learning rate and schedule, the average of parameters, and all of that as plain tensors."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from vqdm.finetuning.config import AUTO, OptimizerConfig
from vqdm.finetuning.evaluation import Errors
from vqdm.finetuning.parameters import Trained, parameter_groups

MOMENTS = ("exp_avg", "exp_avg_sq", "step")
LEARNING_RATE_OF_ERROR = 0.05  # of the median prompt's relative error, as an amplitude
LEARNING_RATES = (1e-5, 2e-3)  # the least and the most that is chosen


def adam(trained: Trained, config: OptimizerConfig) -> torch.optim.Adam:
    """Adam (arXiv 1412.6980) over all parameters whose rate is not 0."""
    betas = (config.finetune_adam_beta1, config.finetune_adam_beta2)
    return torch.optim.Adam(parameter_groups(trained, config), betas=betas)


def learning_rate(config: OptimizerConfig, errors: Errors) -> float:
    """`finetune_lr`; where it is "auto", in proportion to the error that `errors` says is left.

    Adam's steps are as long for a small gradient as for a large one: each moves every parameter by about the learning
    rate, relative to its size, and the outputs with them. Steps that move outputs by more than their error do harm.
    """
    if config.finetune_lr != AUTO:
        return config.finetune_lr
    least, most = LEARNING_RATES
    return float(f"{min(most, max(least, LEARNING_RATE_OF_ERROR * 10 ** (errors.median_db / 20))):.2g}")


def rate_factor(step: int, total: int, config: OptimizerConfig, began: int = 0) -> float:
    """Part of the learning rate that a step has; steps count from 0. Linear warmup, then the schedule down to 0.

    The warmup is that of Adam's moments, which began with step `began`.
    """
    done = step / max(1, total)
    falling = {"cosine": 0.5 * (1 + math.cos(math.pi * done)), "linear": 1 - done, "constant": 1.0}
    warm = min(1.0, (step - began + 1) / (config.lr_warmup_steps + 1))
    return warm * falling[config.lr_scheduler]


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Give every group its part of a learning rate."""
    for group in optimizer.param_groups:
        group["lr"] = group["full_rate"] * rate


def optimizer_tensors(optimizer: torch.optim.Optimizer, trained: Trained) -> dict[str, Tensor]:
    """Adam's state as `moment.parameter` → tensor."""
    names = {id(tensor): name for name, tensor in trained.tensors.items()}
    return {
        f"{moment}.{names[id(tensor)]}": state[moment]
        for tensor, state in optimizer.state.items()
        for moment in MOMENTS
    }


def load_optimizer(optimizer: torch.optim.Optimizer, trained: Trained, tensors: dict[str, Tensor]) -> None:
    """The inverse of `optimizer_tensors`, in place."""
    for key, value in tensors.items():
        moment, _, name = key.partition(".")
        tensor = trained.tensors[name]
        device = "cpu" if moment == "step" else tensor.device
        optimizer.state[tensor][moment] = value.clone().to(device)


class Average:
    """Exponential moving average of parameters; codes are not averaged: averaged codebooks decode the newest codes.

    Attributes:
        decay: 0 keeps no average: the parameters themselves are then what `shown` shows.
        tensors: name → averaged values.
    """

    def __init__(self, trained: Trained, decay: float):
        self.trained, self.decay = trained, decay
        held = trained.tensors.items() if decay else ()
        self.tensors = {name: tensor.detach().clone() for name, tensor in held}

    def update(self, step: int) -> None:
        """Take in the parameters after `step` steps; early on the average forgets faster."""
        if self.decay:
            average = get_ema_multi_avg_fn(min(self.decay, (1 + step) / (10 + step)))
            average(list(self.tensors.values()), [tensor.detach() for tensor in self.trained], step)

    @contextmanager
    def shown(self) -> Iterator[None]:
        """Inside, the model has the averaged values."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    def adopt(self) -> None:
        """Put the average in the place of the parameters."""
        if self.decay:
            self._exchange()

    def _exchange(self) -> None:
        for name, averaged in self.tensors.items():
            held: nn.Parameter = self.trained.tensors[name]
            self.tensors[name], held.data = held.data, averaged

    def load(self, tensors: dict[str, Tensor]) -> None:
        for name, value in tensors.items():
            self.tensors[name].copy_(value)
