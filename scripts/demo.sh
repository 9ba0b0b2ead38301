#!/usr/bin/env bash
# All steps on the pipeline that ships with the repository: quantize it to 2 stored bits per weight, generate 256
# images with it and in full precision, and score them against each other.
#
#     bash scripts/demo.sh [OUTPUT_DIR]
set -euo pipefail
source "$(dirname "$0")/install.sh" requirements.txt
export HF_HUB_OFFLINE=1
export MODEL=assets/shapes-xl PROFILE=small BITS=2 OUT="${1:-out/demo}"
bash scripts/quantization.sh
bash scripts/eval_image_generation.sh
python scripts/show_result.py "$OUT/quantized"
bash scripts/metric_calculation.sh
