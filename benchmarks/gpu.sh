#!/usr/bin/env bash
# What a GPU is needed for, in one command: kernels against their definitions, then times. Without a GPU all of it runs small.
#
#     bash benchmarks/gpu.sh [OUTPUT_DIR]        # pip install bitsandbytes torchao sdnq gguf, for the packages to compare with
#
# A part that fails does not stop the others; the last line names it, and the status is 1.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
out="${1:-out/gpu}"
python="${PYTHON:-python}"
failed=""
mkdir -p "$out"

part() {
    local name="$1"
    shift
    echo "== $name: $*"
    "$@" 2>"$out/$name.err" | tee "$out/$name.jsonl" || failed+=" $name"
}

kernels=(tests/layers/test_decode_triton.py tests/additive/test_scoring_triton.py tests/additive/test_several_layers.py tests/test_triton.py)
part kernels "$python" -m pytest -q -p no:cacheprovider "${kernels[@]}"
if "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    nvidia-smi --query-gpu=name,memory.total,driver_version --format=csv,noheader
    codes=(1x12g4 2x6g4 3x8g8 2x12g8)
    part decode "$python" benchmarks/bench_decode.py --device cuda --dtype float16 --codes "${codes[@]}" --repeats 30
    sdxl=("$python" benchmarks/bench_unet.py --model sdxl-random --height 1024 --width 1024 --batch 2 --steps 20)
    part unet "${sdxl[@]}" --plot "$out/unet.png"
    part unet-2x6 "${sdxl[@]}" --code 2x6g4 --backends
    part unet-offload "${sdxl[@]}" --group_offload --paths auto --backends
    part unet-compiled "${sdxl[@]}" --compile --backends
    shapes=(1280x1280 10240x1280 1280x5120 1280x11520)
    part solver "$python" benchmarks/bench_solver.py --device cuda --shapes "${shapes[@]}" --codes 1x12g4s --extrapolate
    part solver-batch "$python" benchmarks/bench_solver.py --device cuda --shapes 1280x1280 --codes 1x12g4s 3x8g8 --batch 16
    part phases "$python" benchmarks/bench_sdxl.py --device cuda --work "$out/sdxl"
else
    part decode "$python" benchmarks/bench_decode.py --shapes 64x64 64x64x3x3 --codes 1x6g4 --tokens 64 --repeats 2
    part unet "$python" benchmarks/bench_unet.py --model assets/shapes-xl --code 1x6g4 --steps 1 --plot "$out/unet.png"
    part unet-offload "$python" benchmarks/bench_unet.py --model assets/shapes-xl --code 1x6g4 --steps 1 --group_offload --paths auto --backends
    part solver "$python" benchmarks/bench_solver.py --shapes 32x32 --codes 1x4g4s --max_epochs 1
    part solver-batch "$python" benchmarks/bench_solver.py --shapes 32x32 --codes 1x4g4s --max_epochs 2 --batch 2
    small=(--model assets/shapes-xl --size 64 --bits 6 --layers 'mid_block.*attn1.to_q')
    part phases "$python" benchmarks/bench_sdxl.py --device cpu --dtype float32 --work "$out/sdxl" "${small[@]}"
fi
"$python" benchmarks/tables.py "$out" >"$out/RESULTS.md"
echo "results in $out, as tables in $out/RESULTS.md${failed:+; failed:$failed}"
[ -z "$failed" ]
