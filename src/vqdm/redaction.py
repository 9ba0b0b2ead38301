"""Access tokens stay out of files, logs and messages, whether the command line or the environment held them."""

from __future__ import annotations

import os
import re
import shlex
import sys
from collections.abc import Mapping

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
    """`text` with `[hidden]` in place of what looks like an access token, or is one of the environment's."""
    for secret in secrets(os.environ):
        text = text.replace(secret, MASK)
    for pattern, replacement in _PATTERNS:
        text = pattern.sub(replacement, text)
    return text


def secrets(environment: Mapping[str, str]) -> list[str]:
    """Values of variables whose names say that they are secret, the longest first."""
    found = {value for name, value in environment.items() if SECRET_NAME.search(name) and len(value) >= SHORTEST}
    return sorted(found, key=lambda value: (-len(value), value))


def own_command() -> str:
    """The command line of this process, as it may be recorded."""
    return redacted(shlex.join(sys.argv))


def without_secrets(environment: Mapping[str, str]) -> dict[str, str]:
    """An environment for a process that has no business with tokens."""
    return {name: value for name, value in environment.items() if not SECRET_NAME.search(name)}
