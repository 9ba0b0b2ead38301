"""What a result was made with."""

from __future__ import annotations

import platform

import diffusers
import torch
import transformers

import vqdm


def versions() -> dict[str, str]:
    """Library → version, for summaries and run records."""
    modules = {"vqdm": vqdm, "torch": torch, "diffusers": diffusers, "transformers": transformers}
    return {"python": platform.python_version()} | {name: module.__version__ for name, module in modules.items()}
