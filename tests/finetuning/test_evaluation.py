import json
import statistics

import pytest
import recorded
import tiny_students
from PIL import Image

from vqdm.diffusion.sampling import error_spread, output_error, point_errors
from vqdm.finetuning.evaluation import BINS, Throughput, duration, evaluate, read_log, save_loss_plot


def test_errors_are_those_of_the_whole_and_of_each_quarter():
    points, unet = tiny_students.points(tiny_students.teacher()), tiny_students.student(tiny_students.FORMATS["own"])
    trainer = tiny_students.trainer(unet, local=3)
    errors = evaluate(trainer.loss_fn, points, points.all())
    part = points.parts[0]
    assert errors.db == pytest.approx(output_error(unet, part, 4), abs=1e-3)
    for k, db in enumerate(errors.db_by_timestep):  # timesteps 49, 366, 682 and 999
        assert db == pytest.approx(output_error(unet, part.between(250 * k, 250 * k + 250), 4), abs=1e-3)
    few = evaluate(trainer.loss_fn, points, [point for point in points.all() if point.call == 0])
    assert few.db_by_timestep[:3] == [None] * 3 and few.loss_by_timestep == pytest.approx([few.loss] * BINS)


def test_the_median_is_over_prompts_and_the_spread_over_outputs():
    points, unet = tiny_students.points(tiny_students.teacher()), tiny_students.student(tiny_students.FORMATS["own"])
    group = points.parts[0].groups[0]
    for call in group.calls:
        group.batched[call.output][0] *= 30  # an outlier
    trainer = tiny_students.trainer(unet)
    errors, part = evaluate(trainer.loss_fn, points, points.all()), points.parts[0]
    assert errors.by_point == pytest.approx(error_spread(*point_errors(unet, part, 4)), abs=1e-3)
    each = [output_error(unet, recorded.some(part, slice(n, n + 1)), 4) for n in range(part.shape[0])]
    assert errors.median_db == pytest.approx(statistics.median(each), abs=1e-3)
    assert errors.figures == {"db": errors.db, "median_db": errors.median_db} and errors.median_db < errors.db - 1


def test_a_log_is_cut_where_a_run_is_resumed(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_text("".join(json.dumps({"step": k}) + "\n" for k in range(5)) + '{"step": 3, "lo')
    assert read_log(path, 2) == [{"step": 0}, {"step": 1}, {"step": 2}]
    assert len(path.read_text().splitlines()) == 3
    assert read_log(tmp_path / "none.jsonl", 5) == []


def test_a_plot_of_few_rows(tmp_path):
    found = {"held_out_loss": 0.2, "held_out_db": -7.0, "held_out_db_by_timestep": [None, -3.0, None, -8.0]}
    rows = [{"step": 0} | found, {"step": 1, "loss": 0.3}, {"step": 1} | found]
    save_loss_plot(rows, tmp_path / "loss.png")
    with Image.open(tmp_path / "loss.png") as image:
        assert len(image.convert("RGB").getcolors(10**6)) > 20


def test_time_left_follows_the_speed():
    speed = Throughput(total=10)
    speed.tick(1, 8)
    speed.seconds = 2.0
    assert speed.tick(4, 8)["seconds_left"] == pytest.approx(6 * 1.8, abs=0.5)
    assert duration(3 * 3600 + 65) == "3:01:05"
