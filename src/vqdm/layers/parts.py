"""Decoding on the CPU part by part: what a part needs stays in the cache, and parts go to several threads.

Letters as in `vqdm.additive.code`; d = p·g values of an entry; n groups of a part.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from math import gcd

import torch
from torch import Tensor

from vqdm.layers.stored import Stored

GROUPS_AT_ONCE = 2**15  # whose values, and the indices into one codebook, fit in a second-level cache

Fill = Callable[[slice, Tensor], None]


def in_parts(stored: Stored, out: Tensor, fill: Fill) -> None:
    """Decode into `out` [O, I], a CPU tensor of any floating type, by as many threads as torch may use.

    `fill(part, values)` writes the float32 values [n, d] of the row groups `part`, whose codes begin and end with a
    byte. It should release the interpreter's lock.
    """
    R, G = stored.groups
    whole = 8 // gcd(stored.spec.row_bits or G, 8)
    rows = max(whole, GROUPS_AT_ONCE // G // whole * whole)
    parts = [slice(start, min(start + rows, R)) for start in range(0, R, rows)]
    threads = min(torch.get_num_threads(), len(parts))
    run = partial(_fill_part, stored, out, fill)
    if threads == 1:
        for part in parts:
            run(part)
    else:
        list(_pool(os.getpid(), threads).map(run, parts))


@cache
def _pool(process: int, threads: int) -> ThreadPoolExecutor:
    """Threads that stay for the next layer; a forked process needs its own."""
    return ThreadPoolExecutor(threads)


def _fill_part(stored: Stored, out: Tensor, fill: Fill, part: slice) -> None:
    p, g, G = stored.spec.out_group_size, stored.spec.in_group_size, stored.groups[1]
    target = out[part.start * p : part.stop * p]  # [rows·p, I]
    if p == 1 and out.dtype == torch.float32:
        fill(part, target.view(-1, g))
    else:
        values = torch.empty((part.stop - part.start) * G, p * g)
        fill(part, values)
        target.view(-1, p, G, g).copy_(values.view(-1, G, p, g).transpose(1, 2))
