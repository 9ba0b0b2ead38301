#!/usr/bin/env bash
# Quantize a UNet to BITS stored bits per weight; with FORMAT=paper in the paper's format, calibration and search budget.
#
#     bash scripts/quantization.sh                                              # SDXL at 3 bits per weight
#     BITS=2.5 LAUNCH="accelerate launch" bash scripts/quantization.sh          # 2.5 bits, on all GPUs
#     FORMAT=paper BITS=4 bash scripts/quantization.sh                          # 4x8 bits per group of 8
#     MODEL=assets/shapes-xl PROFILE=small bash scripts/quantization.sh         # the small pipeline
#
# The paper searches codes with ENCODER=beam, and samples again before every block with LATENTS=student; the defaults
# here end with a lower error, sooner (benchmarks/RESULTS.md). Further flags go to main_text2image.py.
set -euo pipefail
source "$(dirname "$0")/recipe.sh"

case "$PROFILE-${FORMAT:-target}" in
sdxl-target)
    settings=(
        --target_bits "$BITS"
        --calibration_nsamples 64 --calibration_nsteps 10 --xtx_batch_size 4
        --evaluation_nsamples 32 --visualize_nsamples 16
    )
    ;;
sdxl-paper)
    settings=(
        --num_codebooks "$BITS" --nbits_per_codebook 8 --in_group_size 8 --out_group_size 1 --scale_nbits 0 --group_channels
        --calibration_nsamples 256 --calibration_nsteps 0 --evaluation_nsamples 32 --visualize_nsamples 16 --xtx_batch_size 4
        --calibration_latents "${LATENTS:-teacher}" --encoder "${ENCODER:-ldl}" --beam_size 8
        --init_max_iter 100 --lr 1e-4 --steps_per_epoch 100 --relative_mse_tolerance 0.01
    )
    ;;
small-target)
    settings=(
        --target_bits "$BITS"
        --calibration_nsamples 128 --calibration_nsteps 5 --hessian_samples_per_input 12
        --evaluation_nsamples 24 --visualize_nsamples 16
    )
    ;;
*)
    echo "error: FORMAT is ${FORMAT:-target}; allowed are target, and with PROFILE=sdxl paper" >&2
    exit 2
    ;;
esac
"${LAUNCH[@]}" main_text2image.py "$MODEL" "$CALIBRATION" "$EVALUATION" \
    "${SAMPLING[@]}" "${settings[@]}" --output_dir "$QUANTIZED" --resume "$@"
