"""Quantize the UNet of a text-to-image pipeline to 2-4 bits a weight.

    python main_text2image.py assets/shapes-xl prompts/shapes_calibration.csv prompts/shapes_evaluation.csv \\
        --num_codebooks 2 --nbits_per_codebook 6 --in_group_size 4 --output_dir out/shapes-3bit

    python main_text2image.py stabilityai/stable-diffusion-xl-base-1.0 coco.csv coco_eval.csv --output_dir out/sdxl-3bit

The result is a diffusers pipeline folder: `import vqdm`, then `from_pretrained`. --dry_run shows the layers, their bits
and the predicted size without doing anything.
"""

from __future__ import annotations

import argparse
import logging
import sys
from dataclasses import fields
from pathlib import Path

from vqdm.additive.code import CodeSpec
from vqdm.additive.config import ENCODERS, SolverConfig
from vqdm.cli import Parser, Refused, add_sampling_flags, add_shared_flags, learning_rate, real, run_script, whole
from vqdm.config import BetweenConfig, QuantizeConfig, SamplingConfig, generate_command, read_overrides
from vqdm.errors import UserError
from vqdm.finetuning.intermediate import block_finetuner
from vqdm.quantization.job import quantize
from vqdm.storage.hub import open_repository, push_folder

_LATER = "finetune.py has it, for the finished result"
REFUSED = {
    "--model_path": "give the model as the first positional argument",
    "--devices": "choose GPUs with CUDA_VISIBLE_DEVICES",
    "--code_dtype": "codes are stored packed, at exactly --nbits_per_codebook bits",
    "--offload_activations": "nothing needs offloading: Hessians are bounded by --hessian_memory_gb",
    "--use_faiss": "k-means runs in torch",
    "--skip_out_loss": "the error of the UNet's output is always reported",
    "--print_frequency": "one line a layer is printed",
    "--finetune_method": _LATER,
    "--finetune_relative_mse_tolerance": _LATER,
    "--finetune_keep_best": _LATER,
    "--use_checkpointing": _LATER,
}


def build_parser() -> Parser:
    """All flags, grouped."""
    parser = Parser(__doc__, "MODEL CALIBRATION_PROMPTS EVALUATION_PROMPTS")
    parser.add_argument("model", metavar="MODEL", help="diffusers pipeline: a folder, or a name on the hub")
    prompts = "prompt file (.txt .csv .tsv .json .jsonl .yaml .parquet), or a datasets id"
    parser.add_argument("calibration_prompts", metavar="CALIBRATION_PROMPTS", help=prompts)
    parser.add_argument("evaluation_prompts", metavar="EVALUATION_PROMPTS", help=prompts + "; not used to calibrate")
    _add_format_flags(parser.add_argument_group("format (2x8, 3x8 and 4x8 at group 8 are the paper's 2, 3 and 4 bits)"))
    _add_bits_flags(parser.add_argument_group("bits where they matter"))
    _add_layer_flags(parser.add_argument_group("layers"))
    _add_calibration_flags(parser.add_argument_group("calibration and evaluation"))
    add_sampling_flags(parser.add_argument_group("sampling"))
    _add_solver_flags(parser.add_argument_group("layer solver"))
    _add_between_flags(parser.add_argument_group("fine-tuning between blocks (of the result: finetune.py)"))
    _add_keeping_flags(parser.add_argument_group("keeping and going on"))
    _add_hub_flags(parser.add_argument_group("hub"))
    add_shared_flags(parser, output="out/quantized")
    for flag, advice in REFUSED.items():
        parser.add_argument(flag, action=Refused, advice=advice)
    return parser


def _add_format_flags(group: argparse._ArgumentGroup) -> None:
    spec = CodeSpec()
    group.add_argument("--num_codebooks", type=whole(1, 16), default=spec.num_codebooks, help="codes a group")
    group.add_argument("--nbits_per_codebook", type=whole(1, 16), default=spec.nbits_per_codebook, help="bits a code")
    group.add_argument("--in_group_size", type=whole(1, 64), default=spec.in_group_size, help="inputs a group")
    group.add_argument("--out_group_size", type=whole(1, 64), default=spec.out_group_size, help="outputs a group")
    group.add_argument(
        "--scale_nbits", type=whole(0, 16), default=0, help="0: a scale a row; 1-8, 16: a scale a group, of these bits"
    )
    group.add_argument(
        "--codebook_value_nbits", type=whole(1, 16), default=16, help="1-8 quantizes codebook values; 16 keeps them"
    )
    group.add_argument(
        "--codebook_value_num_groups", type=whole(1), default=1, help="tables that quantized values are split over"
    )
    group.add_argument("--groupwise_codebooks", action="store_true", help="own codebooks for every group of inputs")
    group.add_argument("--input_channel_scales", action="store_true", help="also a scale for every input")
    group.add_argument(
        "--group_channels",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="groups of a convolution run over channels at one kernel location (on by default)",
    )
    group.add_argument(
        "--rest_nbits",
        type=int,
        choices=(16, 8),
        default=16,
        help="8: every Linear and Conv2d that is not quantized, but conv_in and conv_out, is stored in 8 bit with a "
        "16-bit scale an output: time_embedding, add_embedding, time_emb_proj, and what filters and overrides leave",
    )


def _add_bits_flags(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--target_bits",
        type=real(0, 16),
        metavar="BITS",
        help="stored bits per weight of the quantized layers, such as 2.5, divided among layers and columns by what "
        "each is worth, as trellis codes; the plan is written to plan.json",
    )
    group.add_argument(
        "--code",
        choices=("additive", "trellis"),
        help="sums of codebook entries, as in the paper, or trellis codes, which need --target_bits (default: trellis "
        "with --target_bits, else additive)",
    )
    group.add_argument(
        "--state_bits",
        type=int,
        choices=(8, 10, 12),
        default=12,
        help="bits of a trellis state; with 10, coding takes a third of the time for 0.1 dB more error; the table "
        "that all layers share takes 16 * 2^BITS bits",
    )
    group.add_argument(
        "--share_codebooks",
        choices=("none", "kind", "unet"),
        default="none",
        help="additive codes: layers store codebooks of their own, or share them among linear layers and among "
        "convolutions, or among all",
    )
    group.add_argument(
        "--sensitivity_points", type=whole(1), default=64, help="recorded points that a layer's worth is measured on"
    )


def _add_layer_flags(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--layer_filter",
        default="default",
        metavar="{default,all,linear_only,conv_only,REGEX}",
        help="which layers; a regular expression is searched for in their dotted names",
    )
    group.add_argument("--min_channels", type=whole(0), default=0, help="leave layers with fewer channels alone")
    group.add_argument(
        "--overrides", metavar="FILE", help="JSON or YAML: name or regex -> format settings, or null to leave alone"
    )


def _add_calibration_flags(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--calibration_nsamples", type=whole(0), default=256, help="prompts drawn; 0 = all")
    group.add_argument(
        "--calibration_nsteps", type=whole(0), default=0, help="steps of a trajectory that Hessians see; 0 = all"
    )
    group.add_argument("--evaluation_nsamples", type=whole(1), default=32, help="prompts drawn to measure on")
    group.add_argument("--visualize_nsamples", type=whole(0), default=16, help="picture pairs in image_pairs.png")
    group.add_argument("--xtx_batch_size", type=whole(1), default=16, help="prompts or points a UNet batch")
    group.add_argument(
        "--calibration_latents",
        choices=("teacher", "student"),
        default="teacher",
        help="teacher: sampled once; student: sampled again before every block by the model so far",
    )
    group.add_argument("--min_timestep", type=real(0, 1000), default=0.0, help="calibrate on timesteps from here")
    group.add_argument("--max_timestep", type=real(0, 1000), default=1000.0, help="calibrate on timesteps up to here")
    group.add_argument(
        "--hessian_memory_gb", type=real(0), default=8.0, help="a block is recorded in passes that fit into this"
    )
    group.add_argument(
        "--hessian_samples_per_input",
        type=whole(0),
        default=32,
        help="samples that a Hessian counts, as a multiple of its size, spread over all batches; 0 = all",
    )
    group.add_argument(
        "--hessian_cache",
        metavar="FOLDER",
        help="calibrate with Hessians of the full-precision model, kept here for runs at other bits",
    )


def _add_solver_flags(group: argparse._ArgumentGroup) -> None:
    solver = SolverConfig()
    group.add_argument(
        "--encoder", choices=ENCODERS, default=solver.encoder, help="ldl: error feedback; beam: the paper's search"
    )
    group.add_argument("--beam_size", type=whole(1), default=solver.beam_size, help="hypotheses kept")
    group.add_argument("--init_max_iter", type=whole(1), default=solver.init_max_iter, help="k-means iterations")
    group.add_argument(
        "--init_max_points_per_centroid",
        type=whole(1),
        default=solver.init_max_points_per_centroid,
        help="k-means subsample",
    )
    group.add_argument("--lr", type=real(0, 1), default=solver.lr, help="Adam's rate (beam only)")
    group.add_argument(
        "--steps_per_epoch", type=whole(0), default=solver.steps_per_epoch, help="Adam steps (beam only)"
    )
    group.add_argument(
        "--max_epochs", type=whole(1), default=solver.max_epochs, help="rounds of refit and search at most"
    )
    group.add_argument(
        "--relative_mse_tolerance",
        type=real(0, 1),
        default=solver.relative_mse_tolerance,
        help="stop a layer when a round gains less than this share",
    )


def _add_between_flags(group: argparse._ArgumentGroup) -> None:
    between = BetweenConfig()
    group.add_argument(
        "--num_intermediate_finetunes",
        type=whole(0),
        default=between.num_intermediate_finetunes,
        help="so many times, evenly spread, all that is quantized so far is trained, codes and shared codebooks aside",
    )
    group.add_argument(
        "--finetune_nsamples", type=whole(1), default=between.finetune_nsamples, help="calibration prompts used for it"
    )
    group.add_argument(
        "--finetune_max_epochs", type=whole(1), default=between.finetune_max_epochs, help="epochs each time"
    )
    group.add_argument(
        "--finetune_batch_size", type=whole(1), default=between.finetune_batch_size, help="points a step"
    )
    group.add_argument(
        "--local_batch_size", type=whole(1), default=between.local_batch_size, help="points at once a process"
    )
    group.add_argument(
        "--finetune_lr",
        type=learning_rate,
        default=between.finetune_lr,
        metavar="{auto,X}",
        help="Adam's learning rate, as in finetune.py",
    )
    group.add_argument("--finetune_adam_beta1", type=real(0, 1), default=between.finetune_adam_beta1, help="as Adam's")
    group.add_argument("--finetune_adam_beta2", type=real(0, 1), default=between.finetune_adam_beta2, help="as Adam's")


def _add_keeping_flags(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--resume", action="store_true", help="go on after the last finished layer in --output_dir")
    group.add_argument("--load", metavar="FOLDER", help="take layers from an earlier result and solve only the others")
    group.add_argument(
        "--snapshot_step", type=whole(0), default=0, help="save a loadable UNet every N blocks; 0 = never"
    )
    group.add_argument(
        "--eval_step", type=whole(0), default=0, help="measure the output error every N blocks; 0 = never"
    )
    group.add_argument(
        "--on_save", metavar="COMMAND", help="run this after each save, no shell; {path} becomes what was saved"
    )


def _add_hub_flags(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--push_to_hub", action="store_true", help="upload the finished folder")
    group.add_argument("--hub_model_id", metavar="NAME", help="of the repository (default: the name of --output_dir)")
    group.add_argument("--hub_private", action="store_true", help="a new repository is private")


def to_config(values: dict) -> QuantizeConfig:
    """Flags to settings. Raises UserError where they contradict each other."""
    try:
        solver = SolverConfig(spec=CodeSpec(**_pick(CodeSpec, values)), **_pick(SolverConfig, values))
    except ValueError as error:
        raise UserError(f"--{error}") from None
    sampling = SamplingConfig(**_pick(SamplingConfig, values))
    code = values["code"] or ("additive" if values["target_bits"] is None else "trellis")
    values = values | {"solver": solver, "sampling": sampling, "code": code}
    values = values | {"between": BetweenConfig(**_pick(BetweenConfig, values))}
    values = values | {"overrides": read_overrides(values["overrides"])}
    return QuantizeConfig(**_pick(QuantizeConfig, values))


def _pick(kind: type, values: dict) -> dict:
    """The values that are fields of a dataclass."""
    return {field.name: values[field.name] for field in fields(kind) if field.name in values}


def main(argv: list[str] | None = None) -> None:
    """Parse, build, call, say where the result is."""
    options = build_parser().parse(argv)
    logging.getLogger().setLevel(options.loglevel)
    config = to_config(vars(options))
    finetune_blocks = block_finetuner(config.between, config.seed)
    pushing = options.push_to_hub and not config.dry_run
    name = options.hub_model_id or Path(config.output_dir).resolve().name
    repository = open_repository(name, options.hub_private) if pushing else None
    summary = quantize(config, finetune_blocks)
    if summary:
        print(
            f"{summary['effective_bits_layers']:.3f} bits a weight ({summary['effective_bits_unet']:.3f} over the "
            f"whole UNet), UNet-output error {summary['unet_output_error_db']:.2f} dB\n"
            f"result: {config.output_dir}, picture pairs: {config.output_dir}/image_pairs.png\n"
            f"generate images with it: {generate_command(config, config.evaluation_prompts)}"
        )
    if repository:
        print(f"on the hub: {push_folder(Path(config.output_dir), repository)}")


if __name__ == "__main__":
    sys.exit(run_script(main))
