"""Settings of fine-tuning: frozen, checked, printed, and saved beside the result before work starts."""

from __future__ import annotations

from dataclasses import dataclass, field

from vqdm.config import RunConfig, check_pictures
from vqdm.errors import UserError
from vqdm.finetuning.code_updates import CodeUpdateSettings

SOURCES = ("teacher", "student", "real")
TIMESTEP_SAMPLING = ("uniform", "beta", "error")
LR_SCHEDULERS = ("cosine", "linear", "constant")
DECODE = ("step", "call")
AUTO = "auto"


@dataclass(frozen=True)
class OptimizerConfig:
    """How parameters move. Raises UserError, naming the flag, on impossible settings.

    Attributes:
        finetune_lr: Adam's learning rate, or "auto": chosen by the error before training. It is that of biases and
            norms; codebooks, scales and plain weights move by it times their own root mean square, so that it means a
            relative change.
        codebook_lr, scale_lr, weight_lr, bias_lr: factors of it by kind of parameter; 0 leaves a kind as it is.
        lr_warmup_steps: steps in which it rises from 0.
        max_grad_norm: gradients are scaled down to this norm; 0 = never.
        ema_decay: of the average of parameters that is evaluated and saved; 0 = the last ones.
    """

    finetune_lr: float | str = AUTO
    finetune_adam_beta1: float = 0.9
    finetune_adam_beta2: float = 0.95
    lr_scheduler: str = "cosine"
    lr_warmup_steps: int = 10
    codebook_lr: float = 1.0
    scale_lr: float = 1.0
    weight_lr: float = 0.5
    bias_lr: float = 0.05
    max_grad_norm: float = 0.0
    ema_decay: float = 0.0

    def __post_init__(self) -> None:
        for name in ("finetune_adam_beta1", "finetune_adam_beta2", "ema_decay"):
            if not 0 <= getattr(self, name) < 1:
                raise UserError(f"--{name} is {getattr(self, name)}; allowed are numbers from 0 to below 1")
        number = isinstance(self.finetune_lr, int | float) and self.finetune_lr > 0
        if self.finetune_lr != AUTO and not number:
            raise UserError(f"--finetune_lr is {self.finetune_lr!r}; allowed are {AUTO} and numbers above 0")

    @property
    def moves_parameters(self) -> bool:
        """Whether any kind of parameter has a learning rate."""
        return max(self.codebook_lr, self.scale_lr, self.weight_lr, self.bias_lr) > 0


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig(RunConfig):
    """Everything that `finetuning.job` needs; the flags of `finetune.py` by the same names.

    Raises:
        UserError: settings that contradict each other, naming the flags.
    """

    quantized: str
    calibration_prompts: str
    evaluation_prompts: str
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    code_updates: CodeUpdateSettings | None = None
    finetune_method: str = "teacher"
    real_images: str | None = None
    timestep_sampling: str = "uniform"
    finetune_nsamples: int = 192
    finetune_max_epochs: int = 4
    max_steps: int = 0
    finetune_batch_size: int = 32
    local_batch_size: int = 8
    xtx_batch_size: int = 16
    use_checkpointing: bool = False
    decode: str = "step"
    target_cache_gb: float = 32.0
    held_out_nsamples: int = 16
    held_out_points: int = 128
    evaluation_nsamples: int = 32
    visualize_nsamples: int = 16
    finetune_relative_mse_tolerance: float = 0.0
    finetune_keep_best: bool = True
    early_stopping_patience: int = 4
    eval_step: int = 25
    visualize_step: int = 0
    checkpointing_steps: int = 100
    checkpoints_total_limit: int = 2

    def __post_init__(self) -> None:
        sources(self.finetune_method)
        if ("real" in sources(self.finetune_method)) != (self.real_images is not None):
            raise UserError("--finetune_method real and --real_images FOLDER are given together, or neither")
        if not (self.optimizer.moves_parameters or self.code_updates):
            raise UserError(
                "nothing would be trained: --codebook_lr, --scale_lr, --weight_lr and --bias_lr are all 0; "
                "set one of them above 0, or add --update_codes"
            )
        check_pictures(self.evaluation_nsamples, self.visualize_nsamples, self.sampling)


def sources(method: str) -> tuple[str, ...]:
    """The trajectories that `--finetune_method` names, joined by plus signs. Raises UserError on an unknown one."""
    names = tuple(method.split("+"))
    if not set(names) <= set(SOURCES) or len(set(names)) < len(names):
        raise UserError(
            f"--finetune_method is {method!r}; allowed are {', '.join(SOURCES)}, or several of them joined by '+'"
        )
    return names
