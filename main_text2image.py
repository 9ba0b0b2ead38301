"""Quantize the UNet or transformer of a text-to-image pipeline, and its text encoders, to 2-4 bits per weight.

    python main_text2image.py stabilityai/stable-diffusion-xl-base-1.0 --target_bits 3 --output_dir out/sdxl-3bit
    python main_text2image.py assets/shapes-xl prompts/shapes_calibration.csv prompts/shapes_evaluation.csv \\
        --target_bits 2 --num_inference_steps 20 --guidance_scale 3 --output_dir out/shapes-2bit

The result is a folder for `from_pretrained`, after `import vqdm`. MODEL may also be a causal language
model of transformers, and the prompt files any texts.
"""

from __future__ import annotations

import sys
from pathlib import Path

from vqdm.cli import Parser, run_script
from vqdm.config import generate_command, label
from vqdm.finetuning.intermediate import block_finetuner
from vqdm.prompts import default_file
from vqdm.quantization.config import UNSUPPORTED_FLAGS, QuantizeConfig
from vqdm.quantization.job import quantize
from vqdm.quantization.language_model import is_language_model, quantize_language_model
from vqdm.storage.hub import open_repository, push_folder, quantized_denoisers, size_table

PARSER = Parser(QuantizeConfig, __doc__, UNSUPPORTED_FLAGS)


def main(argv: list[str] | None = None) -> None:
    """Parse, quantize, print where the result is."""
    config = PARSER.parse(argv)
    finetune_blocks = block_finetuner(config.intermediate, config.seed)
    pushing = config.hub.push_to_hub and not config.dry_run
    name = config.hub.hub_model_id or Path(config.output_dir).resolve().name
    repository = open_repository(name, config.hub.hub_private) if pushing else None
    if is_language_model(config):
        _, summary = quantize_language_model(config)
    else:
        _, summary = quantize(config, finetune_blocks)
    if summary and "perplexity" in summary:
        print(
            f"{summary['effective_bits_layers']:.3f} bits per weight ({summary['effective_bits_model']:.3f} over the "
            f"whole model), {summary['bytes_of_model'] / 1e6:.2f} MB instead of "
            f"{summary['bytes_of_original_model'] / 1e6:.2f} MB, perplexity of held-out texts "
            f"{summary['perplexity']:.3f} instead of {summary['perplexity_before']:.3f}\nresult: {config.output_dir}"
        )
    elif summary:
        prompts = config.evaluation_prompts or default_file("evaluation")
        components, texts = quantized_denoisers(summary), summary.get("text_encoders") or {}
        if texts or len(components) > 1:
            print(size_table(summary))
        if texts:
            print(f"error of the embeddings on held-out prompts {summary['embeddings_error_db']['all']:.2f} dB")
        for name in components:
            bits = summary.get(f"effective_bits_layers_{name}", summary["effective_bits_layers"])
            print(
                f"{bits:.3f} bits per weight ({summary[f'effective_bits_{name}']:.3f} over the whole {label(name)}), "
                f"{label(name)}-output error {summary[f'{name}_output_error_db']:.2f} dB"
            )
        print(
            f"result: {config.output_dir}, image pairs: {config.output_dir}/image_pairs.png\n"
            f"generate images with it: {generate_command(config, prompts)}"
        )
    if repository:
        print(f"on the hub: {push_folder(Path(config.output_dir), repository)}")


if __name__ == "__main__":
    sys.exit(run_script(main))
