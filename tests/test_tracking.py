import json
import logging

from vqdm.tracking import JsonLines, Stopwatch, Tracker, bar, peak_memory


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


def test_stopwatch_adds_up_phases(monkeypatch):
    times = iter([0.0, 1.0, 10.0, 12.0, 20.0, 20.5])
    monkeypatch.setattr("vqdm.tracking.time.perf_counter", lambda: next(times))
    clock = Stopwatch()
    for phase in ("solving", "solving", "evaluation"):
        with clock(phase):
            pass
    assert clock.phases == {"solving": 3.0, "evaluation": 0.5}


def test_bars_are_silent_without_a_terminal(capsys):
    assert list(bar(range(3), what="layers")) == [0, 1, 2]
    assert capsys.readouterr().err == ""


def test_peak_memory_is_at_least_what_python_takes():
    assert peak_memory()["host"] > 10**7
