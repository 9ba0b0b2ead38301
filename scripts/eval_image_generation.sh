#!/usr/bin/env bash
# Generate the evaluation images twice, with the quantized UNet and in full precision, from the same noise.
#
#     bash scripts/eval_image_generation.sh                                     # 128 prompts, 4 images each
#     PROMPTS=coco.csv SAMPLES=1 LIMIT=5000 bash scripts/eval_image_generation.sh
#     MODEL=assets/shapes-xl PROFILE=small bash scripts/eval_image_generation.sh
#
# The fine-tuned UNet is used if there is one. The paper's prompts are published elsewhere: scripts/fetch_prompts.py
# brings PartiPrompts (128 of them, 4 images each) and COCO captions (5,000, 1 image each). Further flags go to
# generate.py, both times.
set -euo pipefail
source "$(dirname "$0")/recipe.sh"

case "$PROFILE" in
sdxl) settings=(--num_samples_per_prompt "${SAMPLES:-4}" --bs 8 --limit "${LIMIT:-0}") ;;
small) settings=(--num_samples_per_prompt "${SAMPLES:-1}" --bs 64 --limit "${LIMIT:-256}") ;;
esac
"${LAUNCH[@]}" generate.py "$MODEL" "$PROMPTS" --teacher \
    "${SAMPLING[@]}" "${settings[@]}" --output_dir "$OUT/images-full" --resume "$@"
"${LAUNCH[@]}" generate.py "$MODEL" "$LAST" "$PROMPTS" \
    "${SAMPLING[@]}" "${settings[@]}" --output_dir "$OUT/images-$(basename "$LAST")" --resume "$@"
