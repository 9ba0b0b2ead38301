#!/usr/bin/env bash
# Quantize the small pipeline at several numbers of bits, with vqdm and with the published procedure, on the same Hessians.
#
#     bash benchmarks/bits.sh [OUTPUT_DIR]
#     MODEL=assets/shapes-mmdit bash benchmarks/bits.sh out/mmdit
#     python benchmarks/bench_bits.py --ours out/bits/ours-* --plain out/bits/plain-* --plot docs/bits.png
set -euo pipefail
out="${1:-out/bits}"

run() {
    local name="$1"
    shift
    python main_text2image.py "${MODEL:-assets/shapes-xl}" prompts/shapes_calibration.csv prompts/shapes_evaluation.csv \
        --output_dir "$out/$name" --resume --hessian_cache "$out/hessians" \
        --num_inference_steps 20 --guidance_scale 3 --calibration_nsamples 192 --calibration_nsteps 5 \
        --evaluation_nsamples 24 --visualize_nsamples 16 "$@"
}

for bits in 2 2.5 3 4; do
    run "ours-$bits" --target_bits "$bits"
done
for books in 2 3 4; do
    run "plain-${books}x8g8" --encoder beam --num_codebooks "$books"
done
run plain-2x6g4 --encoder beam --num_codebooks 2 --nbits_per_codebook 6 --in_group_size 4
run plain-2x4g4 --encoder beam --num_codebooks 2 --nbits_per_codebook 4 --in_group_size 4
