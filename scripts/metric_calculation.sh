#!/usr/bin/env bash
# Score the images of eval_image_generation.sh, and put all scored folders into one table.
#
#     bash scripts/metric_calculation.sh
#     FID_REFERENCE=coco.npz bash scripts/metric_calculation.sh                 # FID to real images as well
#     MODEL=assets/shapes-xl PROFILE=small bash scripts/metric_calculation.sh
#
# Networks that are not on this machine are downloaded. FID_REFERENCE is a folder, a zip or the .npz that
# "metrics.py IMAGES --save_stats" wrote; --fid_mode vqdm resizes as the paper does. Further flags go to metrics.py.
set -euo pipefail
source "$(dirname "$0")/recipe.sh"

case "$PROFILE" in
sdxl) settings=(--metrics clip pickscore fid_fp lpips psnr ssim) ;;
small)
    settings=(--clip_model assets/shapes-clip --fid_features assets/shapes-clip)
    settings+=(--metrics clip fid_fp psnr ssim)
    ;;
esac
if [ -n "${FID_REFERENCE:-}" ]; then settings+=(fid --fid_reference "$FID_REFERENCE"); fi

images="$OUT/images-$(basename "$LAST")"
"${LAUNCH[@]}" metrics.py "$images" --reference "$OUT/images-full" "${settings[@]}" "$@"
scored=()
for folder in "$OUT"/images-*; do
    if [ -f "$folder/metrics/metrics.json" ]; then scored+=("$folder"); fi
done
python metrics.py compare "${scored[@]}" --output_dir "$OUT/comparison"
echo "report: $images/metrics/report.html"
