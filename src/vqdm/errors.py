"""The two ways a run can end badly, and the exit status of each."""

from __future__ import annotations


class UserError(ValueError):
    """Something the user gave is wrong: names the flag or file, the value, and what is allowed. Exit status 2."""


class RunError(RuntimeError):
    """The work itself failed: names the layer, file or step. Exit status 1."""
