"""Files that once ended in a traceback, a hang or terabytes, one a case; found by tests/test_fuzz.py, or by reading."""

import json
import struct
import zlib

import numpy as np
import pytest
import torch
from mutations import lying_npy, npy, zipped
from PIL import Image
from test_quantized import SPECS, random_code

from vqdm.additive.code import CodeSpec
from vqdm.diffusion.blocks import Layer
from vqdm.diffusion.hessians import HessianStore
from vqdm.diffusion.model_folders import find_denoiser
from vqdm.diffusion.pipelines import check_model
from vqdm.documents import parse_json, parse_yaml, read_text
from vqdm.errors import RunError, UserError
from vqdm.images import check_layout, read_rows
from vqdm.metrics.comparison import read_run
from vqdm.metrics.frechet import load_statistics
from vqdm.metrics.image_sets import open_images
from vqdm.prompts import load_rows
from vqdm.quantization.allocation import planned, read_plan
from vqdm.storage.files import save_checked_json, save_tensors
from vqdm.storage.hf import VqdmConfig
from vqdm.storage.run_folder import RunFolder, check_claim

DEEP = "[" * 5_000 + "]" * 5_000
LAYER = Layer("mid_block.a.b", "mid_block", "linear", 8, 16, SPECS[0])
ROW = {"index": 0, "sample": 0, "file": "a.png", "sha256": "0"}


# ------------------------------------------------------------------------------------------------ documents


@pytest.mark.parametrize("text", [DEEP, '{"a":' * 50_000, "9" * 5000])
def test_json_that_python_gives_up_on(text):
    with pytest.raises(ValueError):
        parse_json(text)


YAML = (
    "!!bool perhaps",
    "!!timestamp never",
    '!!int ""',
    '!!float ""',
    "2001-99-99",
    "\0",
    "[" * 900,
    "!!python/name:os.x",
)


@pytest.mark.parametrize("text", YAML)
def test_yaml_that_python_gives_up_on(text):
    with pytest.raises(ValueError):
        parse_yaml(text)


def test_a_device_without_end_is_not_read_to_it():
    with pytest.raises(ValueError, match="more than 100000 bytes"):
        read_text("/dev/zero", 10**5)


# ------------------------------------------------------------------------------------------------ prompts


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("p.json", '["\\ud800"]', "row 1: its prompt holds half a surrogate pair"),
        ("p.json", '[{"prompt": "a", "id": "\\udfff"}]', "row 1: its id holds half a surrogate pair"),
        ("p.json", DEEP, "nested too deeply"),
        ("p.jsonl", DEEP, "nested too deeply"),
        ("p.json", '[{"prompt": ["a"]}]', "its prompt is a list"),
        ("p.yaml", "- prompt: 0x" + "f" * 6000, "row 1 cannot be written as JSON"),
        ("p.yaml", "- prompt: &a [*a]", "line 1: \\*a is an alias; write its value out"),
        ("p.csv", "a\nb\n", "no column named"),
    ],
)
def test_prompts(tmp_path, name, text, words):
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=words) as caught:
        load_rows(str(tmp_path / name), "PROMPTS")
    assert "\n" not in str(caught.value)


def test_short_rows_of_a_wide_table_take_no_room(tmp_path):
    """Twenty thousand columns times as many rows would be 4·10^8 cells, tens of gigabytes."""
    path = tmp_path / "p.csv"
    path.write_text("prompt," + ",".join(f"c{k}" for k in range(20_000)) + "\n" + "a\n" * 20_000)
    rows = load_rows(str(path), "PROMPTS")
    assert len(rows) == 20_000 and rows[0] == {"prompt": "a"}


def test_separators_of_unicode_end_no_line(tmp_path):
    row = ROW | {"prompt": "a\u2028b\x85c"}
    (tmp_path / "p.jsonl").write_text(json.dumps(row, ensure_ascii=False) + "\n", encoding="utf-8")
    assert read_rows(tmp_path / "p.jsonl") == [row]
    assert load_rows(str(tmp_path / "p.jsonl"), "PROMPTS")[0]["prompt"] == row["prompt"]


def test_an_id_too_long_for_a_file_is_refused_before_the_work():
    with pytest.raises(UserError, match="more than 200 bytes"):
        check_layout("dpg", ["é" * 150], 1)


# ------------------------------------------------------------------------------------------------ settings and plans


@pytest.mark.parametrize(
    "values",
    [
        {"code": {}, "layers": {}, "rounded": None},
        {"code": {}, "layers": {"a": 3}},
        {"code": {"scale_nbits": True}, "layers": {"a": {}}},
        {"code": {"group_channels": "yes"}, "layers": {"a": {}}},
        {"code": {"shared_codebooks": "../x"}, "layers": {"a": {}}},
        {"code": {}, "layers": {}, "rounded": "abc"},
        {"code": {}, "layers": {}, "format_version": True},
    ],
)
def test_quantization_configs(values):
    with pytest.raises(ValueError):
        VqdmConfig(**values)


def test_shared_codebooks_are_named_by_words():
    assert CodeSpec(shared_codebooks="unet_2x8_1x4").shared_codebooks
    with pytest.raises(ValueError, match="up to 64 letters"):
        CodeSpec(shared_codebooks="../../evil")


@pytest.mark.parametrize("text", ["[]", "3", '{"quantization_config": []}', '{"quantization_config": "vqdm"}', DEEP])
def test_unet_configs(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(UserError, match="QUANTIZED"):
        find_denoiser(str(tmp_path))


@pytest.mark.parametrize("text", ["[]", "{", '{"../up": ["diffusers", "X"]}', DEEP])
def test_model_indices(tmp_path, text):
    (tmp_path / "model_index.json").write_text(text)
    with pytest.raises(UserError, match=r"model_index\.json"):
        check_model(str(tmp_path))


@pytest.mark.parametrize("plan", [[], {}, {LAYER.name: 3}, {LAYER.name: {"num_codebooks": 99}}, {LAYER.name: {"x": 1}}])
def test_plans(tmp_path, plan):
    path = tmp_path / "plan.json"
    save_checked_json(plan, path)
    with pytest.raises(RunError, match=r"plan\.json is damaged"):
        planned([LAYER], read_plan(path), path)


def test_a_plan_that_was_changed(tmp_path):
    path = tmp_path / "plan.json"
    save_checked_json({LAYER.name: {"num_codebooks": 2}}, path)
    path.write_text(path.read_text().replace("2", "3", 1))
    with pytest.raises(RunError, match=r"plan\.json is damaged"):
        read_plan(path)


@pytest.mark.parametrize("text", ["[]", '{"settings": 3}', '{"settings": []}', DEEP])
def test_run_records(tmp_path, text):
    (tmp_path / "run.json").write_text(text)
    with pytest.raises(UserError, match="is damaged"):
        check_claim(tmp_path, {"model": "m"}, True)


@pytest.mark.parametrize("entry", [3, {}, {"label": [], "value": 1, "n": 1, "interval": None, "reference": None}])
def test_scored_runs(tmp_path, entry):
    record = {"schema": 1, "size": {}, "run": {}, "images": "a", "mismatches": [], "metrics": {"psnr": entry}}
    record |= {"full_precision": False, "reference_full_precision": None}
    (tmp_path / "metrics.json").write_text(json.dumps(record))
    with pytest.raises(UserError, match="is not a record"):
        read_run(str(tmp_path))


# ------------------------------------------------------------------------------------------------ tensors


def test_a_layer_of_other_shapes_is_damaged(tmp_path):
    run, code = RunFolder(str(tmp_path)), random_code(LAYER.spec, 8, 32)
    metadata = {"spec": json.dumps(LAYER.spec.to_dict()), "report": "{}"}
    for one, about in ((code, metadata), (random_code(LAYER.spec, 8, 16), metadata | {"report": DEEP})):
        save_tensors(one.pack(), run.layer_path(LAYER.name), about)
        with pytest.raises(RunError, match="is damaged"):
            run.load_layer(LAYER)


def test_hessians_of_other_shapes_or_elsewhere_are_damaged(tmp_path):
    store = HessianStore(tmp_path, {})
    store.save([LAYER], torch.eye(17), None)
    with pytest.raises(RunError, match="missing or damaged"):
        store.load(LAYER)
    for index in ({"settings": 3, "layers": {}}, {"settings": {}, "layers": {LAYER.name: "../../x"}}):
        (tmp_path / "hessians.json").write_text(json.dumps(index))
        with pytest.raises(UserError, match="is damaged"):
            HessianStore(tmp_path, {})


GOOD = {"mu": npy(np.zeros(2)), "sigma": npy(np.eye(2))}
STATISTICS = {
    "terabytes": GOOD | {"mu": lying_npy("<f8", (10**12,))},
    "negative": GOOD | {"mu": lying_npy("<f8", (-1,))},
    "date": GOOD | {"n": npy(np.array("2020", "M8[Y]"))},
    "nan": GOOD | {"mu": npy(np.array([0, np.nan]))},
    "features": GOOD | {"features": npy(np.zeros((3, 5)))},
}


@pytest.mark.parametrize("name", STATISTICS)
def test_statistics(tmp_path, name):
    (tmp_path / "s.npz").write_bytes(zipped({f"{key}.npy": data for key, data in STATISTICS[name].items()}))
    with pytest.raises(UserError, match="is not a file of statistics"):
        load_statistics(tmp_path / "s.npz", "--fid_reference")


def test_damaged_archives_of_statistics(tmp_path):
    data = bytearray(zipped({f"{key}.npy": value for key, value in GOOD.items()}))
    for place in (0, 60, len(data) - 40):
        (tmp_path / "s.npz").write_bytes(bytes(data[:place]) + b"\xff" * 8 + bytes(data[place + 8 :]))
        with pytest.raises(UserError, match="is not a file of statistics"):
            load_statistics(tmp_path / "s.npz", "--fid_reference")


# ------------------------------------------------------------------------------------------------ images


ROWS = ({"file": ["a.png"]}, {"index": {}}, {"sample": "0"}, {"prompt": [1]}, {"file": "../a.png"})


@pytest.mark.parametrize("change", ROWS)
def test_manifests(tmp_path, change):
    (tmp_path / "manifest.jsonl").write_text(json.dumps(ROW | change) + "\n")
    assert read_rows(tmp_path / "manifest.jsonl") == []
    with pytest.raises(UserError, match="1 of 1 lines are not rows of it"):
        open_images(str(tmp_path), "IMAGES")


@pytest.mark.parametrize("run", [[], {"settings": [1]}, {"settings": {"model": 3}}, {"scheduler": "x"}])
def test_runs_of_pictures(tmp_path, run):
    Image.new("RGB", (2, 2)).save(tmp_path / "a.png")
    (tmp_path / "run.json").write_text(json.dumps(run))
    with pytest.raises(UserError, match="is not what"):
        open_images(str(tmp_path), "IMAGES")


def test_a_damaged_zip_file_of_pictures(tmp_path):
    data = bytearray(zipped({"a.png": b"x"}))
    start = data.rindex(b"PK\x01\x02")
    data[start : start + 4] = b"\0\0\0\0"
    (tmp_path / "set.zip").write_bytes(bytes(data))
    with pytest.raises(UserError, match="cannot be read"):
        open_images(str(tmp_path / "set.zip"), "IMAGES")


def test_a_decompression_bomb(tmp_path):
    Image.new("RGB", (2, 2)).save(tmp_path / "a.png")
    data = bytearray((tmp_path / "a.png").read_bytes())
    data[16:24] = struct.pack(">II", 50_000, 50_000)
    data[29:33] = struct.pack(">I", zlib.crc32(bytes(data[12:29])))
    (tmp_path / "a.png").write_bytes(bytes(data))
    found = open_images(str(tmp_path), "IMAGES")
    with pytest.raises(RunError, match="cannot be read as an image"):
        found.load(next(iter(found.entries.values())))
