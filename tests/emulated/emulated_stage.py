"""Running programs as on a machine with two GPUs. Whatever they violate fails the test, even if they caught it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from launcher import Process

Run = Callable[..., Process]


@pytest.fixture
def on_gpus(launcher, tmp_path) -> Run:
    """Runs a program (or a module with a `main`) to its end, on emulated GPUs in a process of its own."""

    def run(words: list, status: int = 0, violations: str = "", crash: dict | None = None, **env: str) -> Process:
        report = tmp_path / "violations"
        # Triton's interpreter takes seconds for what a GPU does in microseconds: only tests of the kernels use it.
        env = {"EMUCUDA_REPORT": str(report), "VQDM_SCORING": "torch", "VQDM_DECODE": "torch"} | env
        process = launcher.start([*words], env, crash=crash, emulated=True)
        assert process.wait() == status, process.said()
        found = report.read_text() if report.is_file() else ""
        assert violations in found if violations else not found, found
        return process

    return run
