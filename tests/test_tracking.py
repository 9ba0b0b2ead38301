import json
import logging
import sys
import threading
import time
from types import ModuleType, SimpleNamespace

import pytest
from PIL import Image
from tqdm import tqdm

from vqdm import tracking
from vqdm.devices import peak_memory
from vqdm.tracking import JsonLines, Stopwatch, Tracker, progress_bar


def test_json_lines_append(tmp_path):
    for row in ({"a": 1}, {"a": 2}):
        JsonLines(tmp_path / "deep" / "rows.jsonl").write(row)
    lines = (tmp_path / "deep" / "rows.jsonl").read_text().splitlines()
    assert [json.loads(line)["a"] for line in lines] == [1, 2]


def test_a_failing_tracker_is_a_warning_once(tmp_path, caplog):
    tracker = Tracker("none", "x", tmp_path, {})

    class Broken:
        def log(self, *_, **__):
            raise ConnectionError("no network")

    tracker.inner = Broken()
    with caplog.at_level(logging.WARNING, "vqdm"):
        tracker.log({"loss": 1.0})
        tracker.log({"loss": 2.0})
        tracker.images("x", [])
        tracker.finish()
    assert len(caplog.records) == 1 and "no network" in caplog.text


@pytest.mark.parametrize("rank", ["0", "1"])
def test_one_process_of_several_logs_also_before_they_have_joined(monkeypatch, caplog, rank):
    monkeypatch.setenv("RANK", rank)
    with caplog.at_level(logging.INFO, logger="vqdm"):
        tracking.log_info("4 prompts")
    assert caplog.messages == (["4 prompts"] if rank == "0" else [])


def test_stopwatch_adds_up_phases(monkeypatch):
    times = iter([0.0, 1.0, 10.0, 12.0, 20.0, 20.5])
    monkeypatch.setattr("vqdm.tracking.time.perf_counter", lambda: next(times))
    clock = Stopwatch()
    for phase in ("layers", "layers", "evaluation"):
        with clock(phase):
            pass
    assert clock.phases == {"layers": 3.0, "evaluation": 0.5}


def test_bars_are_silent_without_a_terminal(capsys):
    assert list(progress_bar(range(3), description="layers")) == [0, 1, 2]
    assert capsys.readouterr().err == ""


def test_peak_memory_is_at_least_what_python_takes():
    assert peak_memory()["host"] > 10**7


def fake_wandb(fails_at: str, error: BaseException) -> ModuleType:
    """A module like wandb in which one step fails."""

    def step(name: str, result=None):
        def act(*_, **__):
            if name == fails_at:
                raise error
            return result

        return act

    config = SimpleNamespace(update=step("config"))
    run = SimpleNamespace(config=config, log=step("log"), finish=step("finish"), name="x")
    module = ModuleType("wandb")
    module.init, module.config, module.Image = step("init", run), config, step("images")
    return module


@pytest.mark.parametrize("stage", ["init", "config", "log", "images", "finish"])
@pytest.mark.parametrize(
    "error", [ConnectionError("no network, key hf_" + "a" * 20), SystemExit(1)], ids=["down", "exit"]
)
def test_a_wandb_that_fails_at_any_step_never_stops_the_job(tmp_path, monkeypatch, caplog, stage, error):
    monkeypatch.setitem(sys.modules, "wandb", fake_wandb(stage, error))
    with caplog.at_level(logging.WARNING, "vqdm"):
        tracker = Tracker("wandb", "x", tmp_path, {"seed": 0})
        for step in range(3):
            tracker.log({"loss": 1.0}, step=step)
        tracker.images("pairs", [Image.new("RGB", (2, 2))])
        tracker.finish()
    lines = [record.getMessage() for record in caplog.records if record.name == "vqdm"]
    assert len(lines) == 1 and "tracking is off from here on" in lines[0] and "hf_a" not in lines[0]


def test_a_missing_wandb_is_a_warning(tmp_path, monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with caplog.at_level(logging.WARNING, "vqdm"):
        Tracker("wandb", "x", tmp_path, {}).finish()
    assert "tracking is off from here on" in caplog.text


def test_a_tracker_that_never_closes_is_left_behind(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr("vqdm.tracking.CLOSING_SECONDS", 0.05)
    tracker, gate = Tracker("none", "x", tmp_path, {}), threading.Event()
    tracker.inner = SimpleNamespace(finish=gate.wait)
    with caplog.at_level(logging.WARNING, "vqdm"):
        tracker.finish()
    gate.set()
    assert "is left behind" in caplog.text and tracker.inner is None


def test_long_steps_are_logged_where_no_terminal_shows_them(monkeypatch, caplog):
    """Nested ones in one line, with the time left; none once they are done, or nobody holds them."""
    monkeypatch.setattr(tracking, "LOG_SECONDS", 0.01)
    monkeypatch.setattr(tracking.LoggedBar, "_thread", None)  # that of an earlier test sleeps
    monkeypatch.setattr("sys.stderr.isatty", lambda: False, raising=False)

    def wait_for(words: str) -> None:
        while words not in caplog.text:
            time.sleep(0.01)

    with caplog.at_level(logging.INFO, "vqdm"):
        for block in progress_bar(range(2), description="blocks"):
            if block == 1:
                wait_for("blocks: 1 of 2, ")
                assert " so far, about " in caplog.text
            with progress_bar(total=5, description="layers") as bar:
                bar.update(2)
                wait_for("; layers: 2 of 5, ")
                bar.update(3)
            caplog.clear()
        progress_bar(total=3, description="left behind").update()
    assert not tracking.LoggedBar._open


def test_the_time_left_of_a_step():
    bar = tracking.LoggedBar(total=40, desc="Hessians")
    bar.start_t -= 100
    assert bar.line() == "Hessians: 0 of 40, 01:40 so far"
    bar.update(10)
    assert bar.line() == "Hessians: 10 of 40, 01:40 so far, about 05:00 left"
    bar.close()
    assert not tracking.LoggedBar._open


def test_a_terminal_shows_bars(monkeypatch):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    assert type(progress_bar(total=3)) is tqdm
