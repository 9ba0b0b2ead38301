"""What a user sees of libraries' logs and warnings, on a terminal."""

import logging
import warnings

import diffusers
import numpy as np
import pytest
import torch
import transformers
from conftest import tiny_pipeline

from vqdm.cli import run_script
from vqdm.diffusion.pipelines import log_truncated

LONG = "a big red circle " * 20


def output(capfd, work, level="INFO") -> str:
    """What a program prints whose main function is `work`."""

    def main(_):
        logging.getLogger().setLevel(level)
        work()

    capfd.readouterr()
    assert run_script(main) == 0
    said = capfd.readouterr()
    assert said.err == ""
    return said.out


def test_warnings_are_a_line_without_a_path(capfd):
    out = output(
        capfd, lambda: warnings.warn("two\nlines of /x/lib/site-packages/torch/a.py", UserWarning, stacklevel=1)
    )
    assert out == "warning: two lines of torch/a.py\n"


@pytest.mark.parametrize("kind", [DeprecationWarning, FutureWarning])
def test_what_is_meant_for_developers_is_at_debug(capfd, kind):
    def warn():
        warnings.simplefilter("always")
        warnings.warn("old", kind, stacklevel=1)

    assert output(capfd, warn) == ""
    assert "old" in output(capfd, warn, "DEBUG")


@pytest.mark.parametrize("library", [diffusers, transformers])
def test_loggers_of_libraries(capfd, library):
    logger = library.utils.logging.get_logger(f"{library.__name__}.x")
    assert output(capfd, lambda: logger.warning("a\n b")) == "warning: a b\n"
    assert output(capfd, lambda: logging.getLogger("httpx").info("HTTP Request: GET")) == ""
    root = logging.getLogger(library.__name__)  # outside of programs they keep their handlers
    assert root.handlers and not root.propagate


def test_our_own_lines_stay_as_they_are(capfd):
    assert output(capfd, lambda: logging.getLogger("vqdm").info("a\n  b")) == "a\n  b\n"


def test_other_processes_leave_warnings_to_the_first(capfd, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    assert output(capfd, lambda: warnings.warn("x", stacklevel=1)) == ""


def test_a_16_bit_pipeline_moves_to_the_cpu_without_a_warning(capfd):
    pipeline = tiny_pipeline("sd15")
    assert output(capfd, lambda: pipeline.to("cpu", torch.float16) and pipeline.to("cpu")) == ""


def test_not_a_number_in_an_image_is_not_warned_of_by_numpy(capfd):
    assert output(capfd, lambda: np.array([np.nan]).astype(np.uint8)) == ""


@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_long_prompts_are_one_line(capfd, family):
    pipeline = tiny_pipeline(family)
    pipeline.set_progress_bar_config(disable=True)
    prompts = ["a small star", LONG, "a heart", LONG + "on a heart"]

    def work():
        log_truncated(pipeline, [*prompts, *prompts])
        for prompt in prompts:
            pipeline(prompt, num_inference_steps=1, output_type="latent")

    (line,) = output(capfd, work).splitlines()
    assert line.startswith("warning: 2 of 4 prompts are longer than the 24 tokens that a text encoder reads")
    assert f"the first begins '{LONG[:40]}" in line


def test_prompts_that_fit_are_not_mentioned(capfd):
    pipeline = tiny_pipeline("sdxl")
    assert output(capfd, lambda: log_truncated(pipeline, ["", "a heart"])) == ""
    assert output(capfd, lambda: log_truncated(pipeline, [])) == ""
