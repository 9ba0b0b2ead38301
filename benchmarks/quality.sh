#!/usr/bin/env bash
# Images and scores of several quantized folders of the small pipeline: one table, one figure, with the noise floor.
#
#     bash benchmarks/quality.sh out/bits/ours-4 out/bits/ours-3 out/bits/ours-2
#
# 256 held-out prompts, 10 steps; OUT is out/quality unless set. Images that exist are not generated again.
set -euo pipefail
export MODEL=assets/shapes-xl PROFILE=small OUT="${OUT:-out/quality}"
for folder in "$@"; do
    QUANTIZED="$folder" bash scripts/eval_image_generation.sh
    QUANTIZED="$folder" bash scripts/metric_calculation.sh
done
# Full precision against itself at another batch size: the effect of rounding alone on the scores.
python generate.py "$MODEL" prompts/shapes_test.csv --teacher --num_inference_steps 10 --guidance_scale 3 \
    --limit "${LIMIT:-256}" --bs 10 --output_dir "$OUT/images-floor" --resume
python metrics.py "$OUT/images-floor" --reference "$OUT/images-full" --metrics clip fid_fp psnr ssim \
    --clip_model assets/shapes-clip --fid_features assets/shapes-clip
folders=()
for folder in "$@"; do folders+=("$OUT/images-$(basename "$folder")"); done
python metrics.py compare "$OUT/images-floor" "${folders[@]}" --output_dir "$OUT/comparison"
