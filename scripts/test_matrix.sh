#!/usr/bin/env bash
# Run the tests that depend on arithmetic as on other processors, numbers of threads and backends (docs/determinism.md).
#
#   bash scripts/test_matrix.sh                     all variants, some minutes each
#   bash scripts/test_matrix.sh sse avx2            some of them
#   TESTS="tests/storage" bash scripts/test_matrix.sh odd    some of the tests
#
# Ends with one line per variant; the exit status is 1 if one failed.
set -euo pipefail
source "$(dirname "$0")/install.sh" requirements.txt requirements-dev.txt
export HF_HUB_OFFLINE=1

# name → environment. MKL and oneDNN are given the vectors of older processors, torch its own kernels for them.
declare -A variants=(
    [odd]="VQDM_TEST_ODD_ADDRESSES=1"
    [perturb]="VQDM_TEST_ODD_ADDRESSES=1 VQDM_TEST_PERTURB=1"
    [sse]="ATEN_CPU_CAPABILITY=default MKL_ENABLE_INSTRUCTIONS=SSE4_2 DNNL_MAX_CPU_ISA=SSE41 VQDM_TEST_ODD_ADDRESSES=1"
    [avx2]="ATEN_CPU_CAPABILITY=avx2 MKL_ENABLE_INSTRUCTIONS=AVX2 DNNL_MAX_CPU_ISA=AVX2 VQDM_TEST_ODD_ADDRESSES=1"
    [compatible]="MKL_CBWR=COMPATIBLE"
    [threads]="OMP_NUM_THREADS=2"
    [torch]="VQDM_DECODE=torch VQDM_SCORING=torch"
    [compiler]="CC=/bin/false"
)
order=(odd perturb sse avx2 compatible threads torch compiler)
tests=(${TESTS:-tests/test_processors.py tests/test_compatibility.py tests/additive tests/layers tests/storage tests/metrics
    tests/diffusion tests/finetuning tests/quantization tests/generation tests/test_conversion.py tests/faults/test_ranks.py tests/faults/test_finetune_ranks.py})

[ $# -gt 0 ] && order=("$@")
results=()
for name in "${order[@]}"; do
    [ -n "${variants[$name]:-}" ] || { echo "error: no variant $name; there are ${!variants[*]}" >&2; exit 2; }
    echo "$name: ${variants[$name]}"
    if env OMP_NUM_THREADS=1 ${variants[$name]} python -m pytest -q -n "${WORKERS:-2}" --dist loadfile "${tests[@]}"; then
        results+=("passed  $name")
    else
        results+=("FAILED  $name")
    fi
done
printf '%s\n' "${results[@]}"
case "${results[*]}" in *FAILED*) exit 1 ;; esac
