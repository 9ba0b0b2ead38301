"""Fine-tune a quantized denoiser (UNet or transformer) towards the full-precision one.

    python finetune.py assets/shapes-xl out/shapes-2bit prompts/shapes_calibration.csv prompts/shapes_evaluation.csv \\
        --num_inference_steps 20 --guidance_scale 3 --output_dir out/shapes-2bit-tuned

    accelerate launch finetune.py stabilityai/stable-diffusion-xl-base-1.0 out/sdxl-3bit coco.csv coco_eval.csv \\
        --finetune_nsamples 512 --finetune_batch_size 64

MODEL is the teacher; the student starts from QUANTIZED. The result, the step with the least error on held-out prompts,
is a folder of the same format.
"""

from __future__ import annotations

import sys

from vqdm.cli import Parser, run_script
from vqdm.config import generate_command, label
from vqdm.finetuning.config import UNSUPPORTED_FLAGS, FinetuneConfig
from vqdm.finetuning.job import finetune

PARSER = Parser(FinetuneConfig, __doc__, UNSUPPORTED_FLAGS)


def main(argv: list[str] | None = None) -> None:
    """Parse, fine-tune, print where the result is."""
    config = PARSER.parse(argv)
    summary = finetune(config)
    if summary:
        print(report(config, summary))


def report(config: FinetuneConfig, summary: dict) -> str:
    """Return where the result is, and in the last line what was gained."""
    changed = summary["groups_changed"] / summary["groups"] if summary["groups"] else 0
    codes = f", {100 * changed:.2f} % of the groups have other codes" if config.code_updates else ""
    component = summary.get("component", "unet")
    names = {"sum": f"{component}_output_error_db", "median": f"{component}_output_error_median_db"}
    pairs = {name: (summary[f"{key}_before"], summary[f"{key}_after"]) for name, key in names.items()}
    errors = "; ".join(f"{name} {pair[0]:.2f} dB before, {pair[1]:.2f} dB after" for name, pair in pairs.items())
    if "blocks" in summary:
        gained = sum(row["step_kept"] > 0 for row in summary["blocks"])
        training = f"{gained} of {len(summary['blocks'])} blocks gained"
    else:
        training = f"learning rate {summary['learning_rate']:g}"
        training += f", reduced {summary['learning_rate_reductions']}×" if summary["learning_rate_reductions"] else ""
        kept = (
            f"step {summary['step_kept']} of {summary['steps']}" if summary["step_kept"] else "step 0: nothing gained"
        )
        training += f"; kept {kept}"
    risen = [name for name, (before, after) in pairs.items() if after > before + 0.01]
    advice = f"; the {' and the '.join(risen)} got worse: compare images, or try a lower --finetune_lr"
    return (
        f"result: {config.output_dir}, image pairs: {config.output_dir}/image_pairs.png\n"
        f"generate images with it: {generate_command(config, config.evaluation_prompts)}\n"
        f"{label(component)}-output error on evaluation prompts: {errors}; {training}{codes}"
        f"{advice if risen else ''}"
    )


if __name__ == "__main__":
    sys.exit(run_script(main))
