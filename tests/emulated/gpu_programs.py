"""Command lines of the programs for emulated GPUs, on a tiny pipeline; each row is a chain of runs in one folder."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from pathlib import Path

from programs import Materials

SAMPLED = "--num_inference_steps 2 --xtx_batch_size 2 --evaluation_nsamples 2 --visualize_nsamples 1 "
OWN = "--num_codebooks 1 --nbits_per_codebook 3 --in_group_size 4 --max_epochs 1 --beam_size 1 --init_max_iter 1 "
TARGET = "--target_bits 6 --state_bits 8 --sensitivity_points 2 --layer_filter mid_block.*attn1.to_(q|k) "
FEW = "--layer_filter (down_blocks.0.resnets.0|mid_block.resnets.0|up_blocks.1.resnets.0).conv1 "
QUANTIZE = SAMPLED + "--calibration_nsamples 4 " + FEW
FINETUNE = (
    SAMPLED
    + "--finetune_nsamples 2 --held_out_nsamples 1 --held_out_points 2 --finetune_batch_size 2 --local_batch_size 2 "
    "--finetune_max_epochs 2 --eval_step 2 --checkpointing_steps 1 --finetune_lr 0.001 "
)
BLOCKS = "--finetune_scope blocks --block_steps 2 --block_points 2 "
GENERATE = "--num_inference_steps 1 --bs 2 --limit 2 "
SHAPES = "assets/shapes-clip"
METRICS = f"--fid_features {SHAPES} --clip_model {SHAPES} --pickscore_model {SHAPES} "
METRICS += "--bs 3 --report_images 2 "

QUANTIZATIONS = {
    "auto": OWN,
    "bfloat16": OWN + "--dtype bfloat16",
    "float16": OWN + "--dtype float16",
    "float32": OWN + "--dtype float32",
    "cuda:1": OWN + "--device cuda:1",
    "beam": OWN + "--encoder beam --beam_size 2 --dtype float16",
    "student": OWN + "--calibration_latents student --unquantized_nbits 8 --eval_step 1 --snapshot_step 1",
    "target_bits": TARGET + "--unquantized_nbits 8",
    "target_bits float16": TARGET + "--dtype float16",
    "shared cache": OWN + "--share_codebooks unet --hessian_cache {out}-cache",
    "text encoders": OWN + "--components unet,text_encoder,text_encoder_2 --dtype float16",
    "intermediate": OWN + "--num_intermediate_finetunes 1 --finetune_nsamples 2 --finetune_batch_size 2",
    "intermediate float16": OWN
    + "--num_intermediate_finetunes 2 --finetune_nsamples 2 --finetune_batch_size 2 --dtype float16",
}
FINETUNINGS = {
    "auto": "",
    "float16": "--dtype float16 --visualize_step 2 --finetune_keep_best",
    "bfloat16": "--dtype bfloat16 --visualize_step 2 --ema_decay 0.9 --decode call",
    "float32": "--dtype float32 --update_codes --decode call",
    "cuda:1": "--device cuda:1 --update_codes --dtype float16",
    "codes float16": "--dtype float16 --update_codes --finetune_method student+teacher --use_checkpointing",
    "codes only": "--dtype float16 --update_codes --codebook_lr 0 --scale_lr 0 --weight_lr 0 --bias_lr 0",
    "student": "--finetune_method student --timestep_sampling error --target_cache_gb 0",
    "real": "--finetune_method real+teacher --real_images {images} --scheduler ddim --target_cache_gb 0",
    "blocks": BLOCKS + "--dtype bfloat16 --update_codes",
    "blocks float16": BLOCKS + "--dtype float16 --block_cache disk --decode call --device cuda:1",
    "real float16": "--finetune_method real --real_images {images} --dtype float16 --scheduler ddim",
}
GENERATIONS = {
    "auto": "",
    "float16": "--dtype float16",
    "float32 cuda:1": "--dtype float32 --device cuda:1",
    "model offload": "--offload model",
    "sequential offload": "--offload sequential --dtype float16",
    "model offload cuda:1": "--offload model --device cuda:1",
}
CONVERSIONS = {"dequantize": "", "dequantize bfloat16": "--dtype bfloat16"}

Chain = Callable[[Materials, Path], list[list]]


def words(line: str, given: Materials, out: Path) -> list[str]:
    return [word.format(out=out, images=given.images) for word in shlex.split(line)]


def quantized(options: str) -> Chain:
    """Quantize, then take up a finished run."""

    def chain(given: Materials, out: Path) -> list[list]:
        line = ["main_text2image", given.model, given.prompts, given.prompts, "--output_dir", out]
        line += words(QUANTIZE + options, given, out)
        return [line, [*line, "--resume"]]

    return chain


def finetuned(options: str) -> Chain:
    def chain(given: Materials, out: Path) -> list[list]:
        line = ["finetune", given.model, given.quantized, given.prompts, given.prompts, "--output_dir", out]
        shared = FINETUNE.replace("--finetune_max_epochs 2 ", "") if BLOCKS in options else FINETUNE
        return [line + words(shared + options, given, out)]

    return chain


def generated(options: str) -> Chain:
    def chain(given: Materials, out: Path) -> list[list]:
        line = ["generate", given.model, given.quantized, given.prompts, "--output_dir", out]
        return [line + words(GENERATE + options, given, out)]

    return chain


def scored(options: str) -> Chain:
    def chain(given: Materials, out: Path) -> list[list]:
        line = ["metrics", given.images, "--reference", given.reference, "--fid_reference", given.reference]
        return [[*line, "--output_dir", out, *words(METRICS + options, given, out)]]

    return chain


def converted(options: str) -> Chain:
    def chain(given: Materials, out: Path) -> list[list]:
        return [["convert", "dequantize", given.quantized, "--output_dir", out, *words(options, given, out)]]

    return chain


CHAINS: dict[str, Chain] = {
    **{f"quantize {name}": quantized(options) for name, options in QUANTIZATIONS.items()},
    **{f"finetune {name}": finetuned(options) for name, options in FINETUNINGS.items()},
    **{f"generate {name}": generated(options) for name, options in GENERATIONS.items()},
    **{f"convert {name}": converted(options) for name, options in CONVERSIONS.items()},
    "metrics": scored(""),
    "metrics cuda:1": scored("--device cuda:1"),
}
