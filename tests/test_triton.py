"""Triton's compiler takes the kernels for GPUs that need not be here: the interpreter accepts more than it does."""

import os
import subprocess
import sys

import pytest

COMPILE = """
import torch
import triton
from triton.backends.compiler import GPUTarget
from vqdm.additive import scoring_triton, viterbi_triton
from vqdm.layers import decode_triton


def compile(kernel, types, constants, capability=90, **options):
    signature = dict(zip(kernel.arg_names, types + ["constexpr"] * len(constants), strict=True))
    source = triton.compiler.ASTSource(kernel, signature, constants)
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    assert compiled.asm["cubin"]
    return compiled


floats = ["*fp32"] * 3
compile(
    scoring_triton._best_entries,
    [*floats, "*i64", "i32", "i32", "i32", "i32"],
    dict(count=8, PRECISION="ieee", **scoring_triton._blocks(8, 256, 8, 8)),
)
halves = ["*fp16"] * 2
for M, b, g, written, scales, variable in [
    (2, 12, 8, "*fp16", 0, False),
    (6, 9, 4, "*fp32", 1, False),
    (1, 12, 4, "*bf16", 2, False),
    (1, 12, 4, "*fp16", 0, True),
]:
    constants = dict(M=M, b=b, p=1, g=g, OWN_CODEBOOKS=scales == 1, SCALES=scales, scale_bits=4)
    compile(
        decode_triton._additive_kernel,
        ["*u8", *halves, "*u8", "*fp16", "*u8", "*i64", written, "i32", "i32", "i32"],
        constants | dict(INPUT_SCALES=scales == 1, VARIABLE=variable, BLOCK=2048 // g, BLOCK_D=g),
    )
for written, logarithms in [("*fp16", True), ("*bf16", False)]:
    scales = ["*u8", "*u8"] if logarithms else ["*fp16", "*fp16"]
    compile(
        decode_triton._trellis_kernel,
        ["*u8", "*fp16", *scales, "*fp32", "*fp32", "*u8", "*i64", written, *["i32"] * 5],
        dict(L=12, LOGARITHMS=logarithms, INPUT_LOGARITHMS=logarithms, ROWS=64, COLUMNS=32),
    )
for L, q, capability in [(12, 8, 89), (12, 10, 90), (14, 34, 90)]:
    options = viterbi_triton.settings(L, q)
    constants = {name: options.pop(name) for name in ("L", "K", "WHOLE")}
    choices = {torch.uint8: "*u8", torch.int16: "*i16"}[viterbi_triton.choice_type(q)]
    types = ["*fp32", "*fp32", "*i32", "*fp32", choices, "i32", "i32", "i32", "i32"]
    compiled = compile(viterbi_triton._viterbi, types, constants, capability, **options)
    assert compiled.metadata.shared <= 48 * 1024  # a program's memory without asking for more
    assert "fma" not in compiled.asm["ptx"]  # sums are those of torch
"""


def test_kernels_compile_for_a_gpu():
    pytest.importorskip("triton")
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    done = subprocess.run([sys.executable, "-c", COMPILE], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
