#!/usr/bin/env bash
# Quantize the pipeline that ships with the repository to 3 stored bits a weight, and show what it gained and lost.
#
#     bash scripts/demo.sh [OUTPUT_DIR]
set -euo pipefail
source "$(dirname "$0")/install.sh" requirements.txt
export HF_HUB_OFFLINE=1
out="${1:-out/demo}"
python main_text2image.py assets/shapes-xl prompts/shapes_calibration.csv prompts/shapes_evaluation.csv \
    --output_dir "$out" --resume \
    --target_bits 3 \
    --num_inference_steps 20 --guidance_scale 3 \
    --calibration_nsamples 128 --calibration_nsteps 5 --evaluation_nsamples 24 --visualize_nsamples 16
python scripts/show_result.py "$out"
