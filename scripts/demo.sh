#!/usr/bin/env bash
# All steps on the pipeline that ships with the repository: quantize it to 2 stored bits per weight, generate 256
# images with it and in full precision, and score them against each other.
#
#     bash scripts/demo.sh [OUTPUT_DIR]
#     MODEL=assets/shapes-mmdit bash scripts/demo.sh out/demo-mmdit      # the small diffusion transformer
set -euo pipefail
source "$(dirname "$0")/install.sh" requirements.txt
export HF_HUB_OFFLINE=1
if [ "$(getconf _NPROCESSORS_ONLN)" -ge 2 ] && python -c "import sys, torch; sys.exit(torch.cuda.is_available())"; then
    # on a CPU two processes of one thread each give the same result sooner than one of two threads
    export LAUNCH="${LAUNCH:-torchrun --standalone --nproc_per_node 2}" OMP_NUM_THREADS=1
fi
export MODEL="${MODEL:-assets/shapes-xl}" PROFILE=small BITS=2 OUT="${1:-out/demo}"
bash scripts/quantization.sh
bash scripts/eval_image_generation.sh
python scripts/show_result.py "$OUT/quantized"
bash scripts/metric_calculation.sh
