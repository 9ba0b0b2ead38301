"""The emulated GPUs refuse what CUDA refuses, and allow what it allows."""

import gpu_checks
import pytest

CAUGHT = "check_a_violation_that_is_caught_is_reported"
CHECKS = [name for name in vars(gpu_checks) if name.startswith("check_") and name != CAUGHT]


@pytest.mark.parametrize("name", CHECKS)
def test_(name, launcher, tmp_path):
    process = launcher.start(["gpu_checks", name, "--loglevel", "DEBUG"], emulated=True)
    assert process.wait() == 0, process.said()


def test_a_violation_that_is_caught_is_reported(on_gpus):
    on_gpus(["gpu_checks", CAUGHT], violations="add.Tensor got [((2,), 'cuda:0'), ((2,), 'cpu')]")
