"""Triton's compiler takes the kernels for GPUs that need not be here: the interpreter accepts more than it does."""

import os
import subprocess
import sys

import pytest

COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from vqdm.additive import kernels
from vqdm.layers import decode_kernel


def compile(kernel, types, constants):
    signature = dict(zip(kernel.arg_names, types + ["constexpr"] * len(constants), strict=True))
    source = triton.compiler.ASTSource(kernel, signature, constants)
    assert triton.compile(source, target=GPUTarget("cuda", 90, 32)).asm["cubin"]


floats = ["*fp32"] * 3
compile(
    kernels._best_entries,
    [*floats, "*i64", "i32", "i32", "i32", "i32"],
    dict(count=8, PRECISION="ieee", **kernels._blocks(8, 256, 8, 8)),
)
halves = ["*fp16"] * 2
for M, b, g, written, scales in [(2, 12, 8, "*fp16", 0), (6, 9, 4, "*fp32", 1), (1, 12, 4, "*bf16", 2)]:
    constants = dict(M=M, b=b, p=1, g=g, OWN_CODEBOOKS=scales == 1, SCALES=scales, scale_bits=4)
    compile(
        decode_kernel._decode,
        ["*u8", *halves, "*u8", "*fp16", written, "i32", "i32"],
        constants | dict(INPUT_SCALES=scales == 1, BLOCK=2048 // g, BLOCK_D=g),
    )
"""


def test_kernels_compile_for_a_gpu():
    pytest.importorskip("triton")
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    done = subprocess.run([sys.executable, "-c", COMPILE], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
