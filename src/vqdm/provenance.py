"""Record what a result was made with: versions and the command line, without the access tokens in it."""

from __future__ import annotations

import os
import platform
import re
import shlex
import sys
from collections.abc import Mapping

import diffusers
import torch
import transformers

import vqdm

MASK = "[hidden]"
SECRET_NAME = re.compile(r"(?:TOKEN|API_?KEY|SECRET|PASSWORD|PASSWD)(?:_ACCESS)?(?:_KEY)?$", re.IGNORECASE)
SHORTEST = 8  # characters of a secret: shorter values would mask parts of ordinary words

_NAME = r"[\w.-]*(?:token|api[_-]?key|secret|password|passwd)"
_PATTERNS = (
    # name=value and "name: value" anywhere, "--name value" on a command line
    (re.compile(rf"((?:{_NAME}\s*[=:]|--{_NAME}\s)\s*['\"]?)[^\s'\"&;,]+", re.IGNORECASE), rf"\1{MASK}"),
    (re.compile(r"(\b(?:bearer|basic)\s+)[\w.~+/=-]+", re.IGNORECASE), rf"\1{MASK}"),
    (re.compile(r"(\b[a-z][a-z0-9+.-]*://)[^\s/@]+@", re.IGNORECASE), rf"\1{MASK}@"),
    (re.compile(r"\b(?:hf_|api_org_|ghp_|gho_|github_pat_|glpat-|sk-|xox[abp]-|wandb_v1_|AKIA)[\w-]{8,}"), MASK),
)


def redacted(text: str) -> str:
    """Return `text` with `[hidden]` in place of what looks like an access token, or is one of the environment's."""
    for secret in secrets(os.environ):
        text = text.replace(secret, MASK)
    for pattern, replacement in _PATTERNS:
        text = pattern.sub(replacement, text)
    return text


def secrets(environment: Mapping[str, str]) -> list[str]:
    """Return the values of variables with names of secrets, the longest first."""
    found = {value for name, value in environment.items() if SECRET_NAME.search(name) and len(value) >= SHORTEST}
    return sorted(found, key=lambda value: (-len(value), value))


def own_command() -> str:
    """Return the command line of this process, as it may be recorded."""
    return redacted(shlex.join(sys.argv))


def versions() -> dict[str, str]:
    """Return library → version, for summaries and run records."""
    modules = {"vqdm": vqdm, "torch": torch, "diffusers": diffusers, "transformers": transformers}
    return {"python": platform.python_version()} | {name: module.__version__ for name, module in modules.items()}
