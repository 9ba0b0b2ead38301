"""Settings of fine-tuning: frozen, checked, printed, and saved beside the result before work starts."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from vqdm.config import (
    PROMPT_FILE,
    RunConfig,
    argument,
    check_flags,
    flag,
    flags_in,
    ignore_budget,
    image_pairs,
    optional_flags,
    output_dir,
)
from vqdm.errors import UserError

SOURCES = ("teacher", "student", "real")
AUTO = "auto"
UNSUPPORTED_FLAGS = {
    "--model_path": "give the model as the first positional argument",
    "--load": "give the quantized folder as the second positional argument",
    "--quantized_model": "give the quantized folder as the second positional argument",
    "--lr": "it is called --finetune_lr, and relative",
    "--amp_dtype": "--dtype is the type that both models compute in; parameters are kept in float32",
    "--gradient_checkpointing": "it is called --use_checkpointing",
    "--microbatch_size": "it is called --local_batch_size",
    "--devices": "choose GPUs with CUDA_VISIBLE_DEVICES",
    "--offload_activations": "--use_checkpointing and --local_batch_size bound their memory",
    "--skip_out_loss": "the error of the output is always reported",
    "--print_frequency": "every step is a line of training.jsonl",
}

_of_parameters = partial(flag, needs=("codebook_lr or scale_lr or weight_lr or bias_lr",))
_data = partial(flag, group="training data")
_training = partial(flag, group="optimization")
_whole = partial(_training, needs=("not finetune_scope blocks",))
_blocks = partial(flag, group="block by block", needs=("not finetune_scope denoiser",))
_memory = partial(flag, group="memory")
_evaluation = partial(flag, group="evaluation, early stopping, checkpoints")


@dataclass(frozen=True)
class OptimizerConfig:
    """How parameters are optimized. Raises UserError, naming the flag, on a value that is not allowed.

    The learning rate is that of biases and norms. Codebooks, scales and unquantized weights use it times their own
    root mean square, so that it means a relative change.
    """

    finetune_lr: float | str = flag(
        AUTO,
        "learning rate, relative to the size of what it trains; auto: by the held-out error before training",
        gt=0,
        le=1,
        words=(AUTO,),
        common=True,
    )
    finetune_adam_beta1: float = _of_parameters(0.9, "Adam's beta1", ge=0, lt=1)
    finetune_adam_beta2: float = _of_parameters(0.95, "Adam's beta2", ge=0, lt=1)
    lr_scheduler: str = flag("cosine", "LR schedule", choices=("cosine", "linear", "constant"))
    lr_warmup_steps: int = flag(10, "steps of linear LR warmup", ge=0)
    codebook_lr: float = flag(1.0, "learning rate of codebooks, as a multiple of --finetune_lr; 0 freezes them", ge=0)
    scale_lr: float = flag(1.0, "the same of scales", ge=0)
    weight_lr: float = flag(0.5, "the same of weights that are not quantized", ge=0)
    bias_lr: float = flag(0.05, "the same of biases and norms, not relative to their size", ge=0)
    max_grad_norm: float = _of_parameters(0.0, "clip the gradient norm; 0 = never", ge=0)
    ema_decay: float = _of_parameters(
        0.0, "decay of an exponential moving average, which is evaluated and saved; 0 = none", ge=0, lt=1
    )

    def __post_init__(self) -> None:
        check_flags(self)

    @property
    def moves_parameters(self) -> bool:
        """Whether any kind of parameter has a learning rate."""
        return max(self.codebook_lr, self.scale_lr, self.weight_lr, self.bias_lr) > 0


@dataclass(frozen=True)
class CodeUpdateSettings:
    """How codes are updated. Raises UserError, naming the flag, on a value that is not allowed.

    A step moves the drift of each weight along its gradient. The grid is the row's root mean square weight over
    2^(bits per weight). A `code_memory` of 1 sums all steps, as straight-through latents do; 0 keeps the newest step
    alone, as PV-Tuning does.
    """

    code_lr: float = flag(0.03, "root mean square of a step of the drift, in units of the grid of the codes", gt=0)
    code_memory: float = flag(0.98, "momentum: share of the earlier drift that a step keeps", ge=0, le=1)
    code_beta: float = flag(0.95, "decay of the average of squared gradients", ge=0, lt=1)
    code_fraction: float = flag(0.02, "share of all groups that are encoded again in a step", gt=0, le=1)
    code_beam_size: int = flag(4, "beam size of the encoding", ge=1, le=1024)
    code_trust_ratio: float = flag(
        0.01, "largest change of a layer's weights in a step, relative to their norm", gt=0, le=1
    )

    def __post_init__(self) -> None:
        check_flags(self)


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig(RunConfig):
    """Settings of `finetuning.job`.

    Raises:
        UserError: a value that is not allowed, or settings that contradict each other, naming the flags.
    """

    model: str = argument("pipeline of the teacher: a folder, one .safetensors file, or a name on the hub")
    quantized: str = argument("quantized pipeline folder, or its denoiser's folder")
    calibration_prompts: str = argument(PROMPT_FILE)
    evaluation_prompts: str = argument(PROMPT_FILE + "; not trained on")
    output_dir: str = output_dir("out/finetuned")
    finetune_method: str = _data(
        "teacher",
        "trajectories to train on: the teacher's; the student's, sampled again every epoch; real images with noise; or "
        "several in turn, as teacher+student",
        metavar="{teacher,student,real}",
    )
    real_images: str | None = _data(None, "captioned images, for --finetune_method real", metavar="FOLDER")
    timestep_sampling: str = _data(
        "uniform",
        "beta: t ~ 1000 Beta(3, 1), mostly noise; error: where the held-out error is large",
        choices=("uniform", "beta", "error"),
    )
    finetune_nsamples: int = _data(192, "trajectories per epoch", ge=1, common=True)
    held_out_nsamples: int = _data(
        16, "calibration prompts that are not trained on: their error chooses the step to keep", ge=1
    )
    held_out_points: int = _data(128, "points of held-out trajectories, approximately", ge=1)
    finetune_scope: str = _training(
        "auto",
        "denoiser: all of it together; blocks: one after another, each towards the teacher's output of that block, for "
        "models that do not fit; auto: by free memory",
        choices=("auto", "denoiser", "blocks"),
    )
    finetune_max_epochs: int = _whole(
        4, "epochs, each with new prompts, if there are enough, and new noise", ge=1, common=True
    )
    max_steps: int = _whole(0, "limit of steps; 0 = none", ge=0)
    block_steps: int = _blocks(100, "steps per block", ge=1)
    block_points: int = _blocks(
        256, "points to train blocks on, approximately; what blocks return for them waits", ge=1
    )
    block_cache: str = _blocks("auto", "where it waits; auto: by free memory", choices=("auto", "ram", "disk"))
    finetune_batch_size: int = _training(
        32, "batch size, of all processes together; a point is both guidance branches", ge=1, common=True
    )
    optimizer: OptimizerConfig = flags_in(OptimizerConfig, "optimization")
    code_updates: CodeUpdateSettings | None = optional_flags(
        "update_codes",
        "train codes too: more memory and time per step (see docs/finetune.md)",
        "codes",
        common=True,
    )
    local_batch_size: int | None = _memory(
        None,
        "batch size per process; gradients accumulate (default: up to 8, by free memory)",
        ge=1,
        common=True,
    )
    xtx_batch_size: int = _memory(16, "batch size of sampling, in prompts", ge=1)
    use_checkpointing: bool | None = _memory(
        None,
        "gradient checkpointing: less memory, slower (default: by free memory)",
        needs=("not finetune_scope blocks",),
    )
    decode: str = _memory(
        "auto",
        "step: decode weights once per step, and keep them and their gradients in float32; call: decode them in each "
        "forward and backward pass; auto: by free memory",
        choices=("auto", "step", "call"),
    )
    target_cache_gb: float = _memory(
        32.0,
        "disk for the teacher's outputs of an epoch; if they do not fit, the teacher stays in memory",
        ge=0,
        needs=("not finetune_scope blocks",),
    )
    ignore_budget: bool = ignore_budget()
    evaluation_nsamples: int = _evaluation(32, "evaluation prompts", ge=1)
    visualize_nsamples: int | None = _evaluation(
        None, "image pairs in image_pairs.png; default: 16, or all evaluation prompts if they are fewer", ge=0
    )
    eval_step: int = _evaluation(25, "evaluation interval (steps), on held-out points", ge=0)
    visualize_step: int = _evaluation(
        0,
        "interval of image pairs (steps); 0 = never",
        ge=0,
        needs=("not visualize_nsamples 0", "not finetune_scope blocks"),
    )
    finetune_relative_mse_tolerance: float = _evaluation(
        0.0, "stop after an epoch that lowers the held-out loss by a smaller share; 0 = never", ge=0, le=1
    )
    finetune_keep_best: bool = _evaluation(
        True, "keep the step with the least held-out error, step 0 among them; else the last step"
    )
    early_stopping_patience: int = _evaluation(4, "stop after N evaluations without an improvement; 0 = never", ge=0)
    checkpointing_steps: int = _evaluation(100, "checkpoint interval (steps); 0 = never", ge=0)
    checkpoints_total_limit: int = _evaluation(2, "checkpoints to keep", ge=1, needs=("checkpointing_steps",))

    def __post_init__(self) -> None:
        super().__post_init__()
        if ("real" in sources(self.finetune_method)) != (self.real_images is not None):
            raise UserError("--finetune_method real and --real_images FOLDER are given together, or neither")
        if not (self.optimizer.moves_parameters or self.code_updates):
            raise UserError(
                "nothing would be trained: --codebook_lr, --scale_lr, --weight_lr and --bias_lr are all 0; "
                "set one of them above 0, or add --update_codes"
            )
        shown = image_pairs(self.evaluation_nsamples, self.visualize_nsamples, self.sampling)
        object.__setattr__(self, "visualize_nsamples", shown)


def sources(method: str) -> tuple[str, ...]:
    """Return the trajectories that `--finetune_method` names, joined by plus signs. Raises UserError if unknown."""
    names = tuple(method.split("+"))
    if not set(names) <= set(SOURCES) or len(set(names)) < len(names):
        raise UserError(
            f"--finetune_method is {method!r}; allowed are {', '.join(SOURCES)}, or several of them joined by '+'"
        )
    return names
