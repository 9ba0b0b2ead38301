"""Fine-tune a quantized UNet towards the full-precision one. The result is the best step, the start among them.

    python finetune.py assets/shapes-xl out/shapes-2bit prompts/shapes_calibration.csv prompts/shapes_evaluation.csv \\
        --num_inference_steps 20 --guidance_scale 3 --output_dir out/shapes-2bit-tuned

    accelerate launch finetune.py stabilityai/stable-diffusion-xl-base-1.0 out/sdxl-3bit coco.csv coco_eval.csv \\
        --finetune_nsamples 512 --finetune_batch_size 64 --local_batch_size 2 --use_checkpointing

MODEL is the teacher; the student begins as QUANTIZED, and the result is a folder of the same format. --resume continues
after the last checkpoint.
"""

from __future__ import annotations

import argparse
import logging
import sys
from dataclasses import fields

from vqdm.cli import Parser, Refused, add_sampling_flags, add_shared_flags, learning_rate, real, run_script, whole
from vqdm.config import SamplingConfig, generate_command
from vqdm.finetuning.code_updates import CodeUpdateSettings
from vqdm.finetuning.config import DECODE, LR_SCHEDULERS, TIMESTEP_SAMPLING, FinetuneConfig, OptimizerConfig
from vqdm.finetuning.job import finetune

REFUSED = {
    "--model_path": "give the model as the first positional argument",
    "--load": "give the quantized folder as the second positional argument",
    "--quantized_model": "give the quantized folder as the second positional argument",
    "--lr": "it is called --finetune_lr, and relative",
    "--amp_dtype": "--dtype is the type that both UNets compute in; parameters are kept in float32",
    "--gradient_checkpointing": "it is called --use_checkpointing",
    "--microbatch_size": "it is called --local_batch_size",
    "--devices": "choose GPUs with CUDA_VISIBLE_DEVICES",
    "--offload_activations": "--use_checkpointing and --local_batch_size bound their memory",
    "--skip_out_loss": "the error of the UNet's output is always reported",
    "--print_frequency": "every step is a line of training.jsonl",
}


def build_parser() -> Parser:
    """All flags, grouped."""
    parser = Parser(__doc__, "MODEL QUANTIZED CALIBRATION_PROMPTS EVALUATION_PROMPTS")
    parser.add_argument("model", metavar="MODEL", help="the teacher's pipeline: a folder, or a name on the hub")
    parser.add_argument("quantized", metavar="QUANTIZED", help="quantized pipeline folder, or its unet folder")
    prompts = "prompt file (.txt .csv .tsv .json .jsonl .yaml .parquet), or a datasets id"
    parser.add_argument("calibration_prompts", metavar="CALIBRATION_PROMPTS", help=prompts + "; learned from")
    parser.add_argument("evaluation_prompts", metavar="EVALUATION_PROMPTS", help=prompts + "; only measured on")
    _add_data_flags(parser.add_argument_group("what is learned from"))
    _add_step_flags(parser.add_argument_group("steps"))
    _add_code_flags(parser.add_argument_group("codes"))
    _add_memory_flags(parser.add_argument_group("memory"))
    _add_watch_flags(parser.add_argument_group("evaluation, stopping, keeping"))
    add_sampling_flags(parser.add_argument_group("sampling"))
    add_shared_flags(parser, output="out/finetuned")
    for flag, advice in REFUSED.items():
        parser.add_argument(flag, action=Refused, advice=advice)
    return parser


def _add_data_flags(group: argparse._ArgumentGroup) -> None:
    default = _defaults(FinetuneConfig)
    group.add_argument(
        "--finetune_method",
        default=default["finetune_method"],
        metavar="{teacher,student,real}",
        help="whose trajectories: the teacher's; the student's, sampled anew every epoch; those of real pictures with "
        "noise; or several that take turns, as teacher+student",
    )
    group.add_argument("--real_images", metavar="FOLDER", help="captioned pictures, for --finetune_method real")
    group.add_argument(
        "--timestep_sampling",
        choices=TIMESTEP_SAMPLING,
        default=default["timestep_sampling"],
        help="beta: t ~ 1000 Beta(3, 1), mostly noise; error: where the held-out error is large",
    )
    group.add_argument(
        "--finetune_nsamples", type=whole(1), default=default["finetune_nsamples"], help="trajectories an epoch"
    )
    group.add_argument(
        "--finetune_max_epochs",
        type=whole(1),
        default=default["finetune_max_epochs"],
        help="epochs, each of fresh prompts while there are any, and of fresh noise",
    )
    group.add_argument("--max_steps", type=whole(0), default=default["max_steps"], help="steps at most; 0 = no limit")
    group.add_argument(
        "--held_out_nsamples",
        type=whole(1),
        default=default["held_out_nsamples"],
        help="calibration prompts never trained on: held-out points of them choose the step to keep",
    )
    group.add_argument(
        "--held_out_points", type=whole(1), default=default["held_out_points"], help="held-out points, about"
    )
    group.add_argument(
        "--evaluation_nsamples", type=whole(1), default=default["evaluation_nsamples"], help="prompts measured on"
    )
    group.add_argument(
        "--visualize_nsamples", type=whole(0), default=default["visualize_nsamples"], help="pairs in image_pairs.png"
    )


def _add_step_flags(group: argparse._ArgumentGroup) -> None:
    default, rates = _defaults(FinetuneConfig), _defaults(OptimizerConfig)
    group.add_argument(
        "--finetune_batch_size",
        type=whole(1),
        default=default["finetune_batch_size"],
        help="points a step, of all processes together; a point is both guidance branches",
    )
    group.add_argument(
        "--finetune_lr",
        type=learning_rate,
        default=rates["finetune_lr"],
        metavar="{auto,X}",
        help="Adam's learning rate, relative to the size of what it moves; auto: in proportion to the held-out error "
        "before training (see docs/finetune.md)",
    )
    group.add_argument("--finetune_adam_beta1", type=real(0, 1), default=rates["finetune_adam_beta1"], help="as Adam's")
    group.add_argument("--finetune_adam_beta2", type=real(0, 1), default=rates["finetune_adam_beta2"], help="as Adam's")
    group.add_argument(
        "--lr_scheduler", choices=LR_SCHEDULERS, default=rates["lr_scheduler"], help="schedule of the learning rate"
    )
    group.add_argument(
        "--lr_warmup_steps", type=whole(0), default=rates["lr_warmup_steps"], help="steps of linear warmup"
    )
    for kind, what in (
        ("codebook", "codebooks"),
        ("scale", "scales"),
        ("weight", "weights that are not quantized"),
        ("bias", "biases and norms (not relative)"),
    ):
        name = f"{kind}_lr"
        group.add_argument(
            f"--{name}",
            type=real(0),
            default=rates[name],
            help=f"times the learning rate, for {what}; 0 leaves them",
        )
    group.add_argument(
        "--max_grad_norm", type=real(0), default=rates["max_grad_norm"], help="clip gradients to this norm; 0 = never"
    )
    group.add_argument(
        "--ema_decay", type=real(0, 1), default=rates["ema_decay"], help="keep this moving average; 0 = none"
    )


def _add_code_flags(group: argparse._ArgumentGroup) -> None:
    default = CodeUpdateSettings()
    group.add_argument(
        "--update_codes",
        action="store_true",
        help="codes learn too: more memory and time a step, the same format (see docs/finetune.md)",
    )
    group.add_argument(
        "--code_lr", type=float, default=default.code_lr, help="how far a step pulls, in units of the code's grid"
    )
    group.add_argument(
        "--code_memory", type=float, default=default.code_memory, help="what a step leaves of the pull so far"
    )
    group.add_argument("--code_beta", type=float, default=default.code_beta, help="of averages of squared gradients")
    group.add_argument(
        "--code_fraction", type=float, default=default.code_fraction, help="of all groups, encoded anew each step"
    )
    group.add_argument("--code_beam_size", type=int, default=default.code_beam_size, help="hypotheses kept")
    group.add_argument(
        "--code_trust_ratio",
        type=float,
        default=default.code_trust_ratio,
        help="most that a layer's weights change in a step, relative to their norm",
    )


def _add_memory_flags(group: argparse._ArgumentGroup) -> None:
    default = _defaults(FinetuneConfig)
    group.add_argument(
        "--local_batch_size", type=whole(1), default=default["local_batch_size"], help="points at once a process"
    )
    group.add_argument(
        "--xtx_batch_size", type=whole(1), default=default["xtx_batch_size"], help="prompts sampled at once"
    )
    group.add_argument("--use_checkpointing", action="store_true", help="gradient checkpointing: less memory, slower")
    group.add_argument(
        "--decode",
        choices=DECODE,
        default=default["decode"],
        help="step: weights are decoded once a step, and kept with their gradients in float32; "
        "call: in every call, forward and backward",
    )
    group.add_argument(
        "--target_cache_gb",
        type=real(0),
        default=default["target_cache_gb"],
        help="the teacher's outputs on an epoch's points are kept on disk if they fit; else it stays in memory",
    )


def _add_watch_flags(group: argparse._ArgumentGroup) -> None:
    default = _defaults(FinetuneConfig)
    group.add_argument(
        "--finetune_relative_mse_tolerance",
        type=real(0, 1),
        default=default["finetune_relative_mse_tolerance"],
        help="stop after an epoch that lowers the held-out loss by a smaller share; 0 = never",
    )
    group.add_argument(
        "--finetune_keep_best",
        action=argparse.BooleanOptionalAction,
        default=default["finetune_keep_best"],
        help="the result is the step with the least held-out error, step 0 among them (the default); "
        "--no-finetune_keep_best: the last step",
    )
    group.add_argument(
        "--early_stopping_patience",
        type=whole(0),
        default=default["early_stopping_patience"],
        help="stop after N evaluations without a better one than before; 0 = never",
    )
    group.add_argument(
        "--eval_step", type=whole(0), default=default["eval_step"], help="evaluate on held-out points every N steps"
    )
    group.add_argument(
        "--visualize_step", type=whole(0), default=default["visualize_step"], help="draw pairs every N steps; 0 = never"
    )
    group.add_argument(
        "--checkpointing_steps",
        type=whole(0),
        default=default["checkpointing_steps"],
        help="write a checkpoint every N steps; 0 = never",
    )
    group.add_argument(
        "--checkpoints_total_limit", type=whole(1), default=default["checkpoints_total_limit"], help="kept of them"
    )
    group.add_argument("--resume", action="store_true", help="go on after the last checkpoint in --output_dir")


def _defaults(kind: type) -> dict:
    """Field → default."""
    return {field.name: field.default for field in fields(kind)}


def to_config(values: dict) -> FinetuneConfig:
    """Flags to settings. Raises UserError where they contradict each other."""
    nested = {"sampling": SamplingConfig(**_pick(SamplingConfig, values))}
    nested |= {"optimizer": OptimizerConfig(**_pick(OptimizerConfig, values))}
    codes = CodeUpdateSettings(**_pick(CodeUpdateSettings, values))
    return FinetuneConfig(
        **_pick(FinetuneConfig, values | nested), code_updates=codes if values["update_codes"] else None
    )


def _pick(kind: type, values: dict) -> dict:
    """The values that are fields of a dataclass."""
    return {field.name: values[field.name] for field in fields(kind) if field.name in values}


def main(argv: list[str] | None = None) -> None:
    """Parse, build, call, say where the result is."""
    options = build_parser().parse(argv)
    logging.getLogger().setLevel(options.loglevel)
    config = to_config(vars(options))
    summary = finetune(config)
    if summary:
        print(report(config, summary))


def report(config: FinetuneConfig, summary: dict) -> str:
    """Where the result is, and in the last line what was gained."""
    changed = summary["groups_changed"] / summary["groups"] if summary["groups"] else 0
    codes = f", {100 * changed:.2f} % of the groups have other codes" if config.code_updates else ""
    names = {"sum": "unet_output_error_db", "median": "unet_output_error_median_db"}
    pairs = {name: (summary[f"{key}_before"], summary[f"{key}_after"]) for name, key in names.items()}
    errors = "; ".join(f"{name} {pair[0]:.2f} dB before, {pair[1]:.2f} dB after" for name, pair in pairs.items())
    learning_rate = f"learning rate {summary['learning_rate']:g}"
    learning_rate += f", reduced {summary['learning_rate_reductions']}×" if summary["learning_rate_reductions"] else ""
    kept = f"step {summary['step_kept']} of {summary['steps']}" if summary["step_kept"] else "step 0: nothing gained"
    risen = [name for name, (before, after) in pairs.items() if after > before + 0.01]
    advice = f"; the {' and the '.join(risen)} got worse: compare images, or try a lower --finetune_lr"
    return (
        f"result: {config.output_dir}, image pairs: {config.output_dir}/image_pairs.png\n"
        f"generate images with it: {generate_command(config, config.evaluation_prompts)}\n"
        f"UNet-output error on evaluation prompts: {errors}; {learning_rate}; kept {kept}{codes}"
        f"{advice if risen else ''}"
    )


if __name__ == "__main__":
    sys.exit(run_script(main))
