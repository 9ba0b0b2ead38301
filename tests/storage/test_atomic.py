"""Files that notice damage, and leftovers of killed writers."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from processors import is_odd
from safetensors.torch import load_file

from vqdm.storage import atomic
from vqdm.storage.atomic import (
    UNFINISHED,
    Damaged,
    load_sealed,
    load_sealed_json,
    save_bytes,
    save_sealed,
    save_sealed_json,
    save_tensors,
    sweep,
)

TENSORS = {"a": torch.arange(6.0).view(2, 3), "b": torch.tensor(3, dtype=torch.int64), "c": torch.ones(5).bfloat16()}


def test_sealed_tensors_come_back(tmp_path):
    path = tmp_path / "t.safetensors"
    save_sealed(TENSORS | {"turned": TENSORS["a"].T, "none": torch.empty(0, 4)}, path, {"about": "x"})
    tensors, metadata = load_sealed(path)
    assert metadata == {"about": "x"} and torch.equal(tensors["turned"], TENSORS["a"].T)
    assert all(
        torch.equal(tensors[name], tensor) and tensors[name].dtype == tensor.dtype for name, tensor in TENSORS.items()
    )


def test_sealed_tensors_lie_where_torch_allocates(tmp_path, odd_addresses):
    """So that a resumed run computes as one that kept them in memory, on processors that tell addresses apart."""
    path = tmp_path / "t.safetensors"
    save_sealed(TENSORS, path)
    assert any(map(is_odd, load_file(path).values())) and not any(map(is_odd, load_sealed(path)[0].values()))


def test_any_flipped_bit_and_any_cut_is_noticed(tmp_path):
    path = tmp_path / "t.safetensors"
    save_sealed(TENSORS, path, {"about": "x"})
    content = path.read_bytes()
    for place in range(len(content)):
        path.write_bytes(content[:place] + bytes([content[place] ^ 1 << place % 8]) + content[place + 1 :])
        try:
            tensors, metadata = load_sealed(path)
        except Damaged:
            continue
        same = all(torch.equal(tensors[name], tensor) for name, tensor in TENSORS.items())
        assert same and metadata == {"about": "x"}, f"byte {place}"  # blanks that pad the header mean nothing
    for length in range(0, len(content), 7):
        path.write_bytes(content[:length])
        with pytest.raises(Damaged):
            load_sealed(path)


def test_a_file_without_a_checksum_is_not_taken(tmp_path):
    save_tensors(TENSORS, tmp_path / "t.safetensors")
    with pytest.raises(Damaged, match="checksum"):
        load_sealed(tmp_path / "t.safetensors")


def test_sealed_json(tmp_path):
    path, value = tmp_path / "v.json", {"b": [1, 2.5, None], "a": "ü"}
    save_sealed_json(value, path)
    assert load_sealed_json(path) == value
    for text in (path.read_text().replace("2.5", "2.25"), path.read_text()[:-9], "[]", "{}", json.dumps(value)):
        path.write_text(text)
        with pytest.raises(Damaged):
            load_sealed_json(path)


def test_leftovers_are_swept_and_nothing_else(tmp_path):
    (tmp_path / "below").mkdir()
    names = [f".a.json.12{UNFINISHED}", f"below/.b.png.7{UNFINISHED}", "a.json", ".hidden", "below/b.png"]
    for name in names:
        (tmp_path / name).touch()
    sweep(tmp_path, below=False)
    assert [(tmp_path / name).exists() for name in names] == [False, True, True, True, True]
    sweep(tmp_path)
    assert [(tmp_path / name).exists() for name in names] == [False, False, True, True, True]


def test_a_live_writers_file_is_not_swept(tmp_path, monkeypatch):
    """Neither one of a process that is alive here, nor one of another machine that was written to a moment ago."""
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    here = atomic._host()
    alive, other = f".a.{here}-{child.pid}-ab12cd{UNFINISHED}", f".b.{'0' * 8}-{child.pid}-ab12cd{UNFINISHED}"
    for name in (alive, other):
        (tmp_path / name).touch()
    sweep(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {alive, other}
    child.kill()
    child.wait()
    sweep(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {other}
    os.utime(tmp_path / other, (0, 0))
    sweep(tmp_path)
    assert not list(tmp_path.iterdir())


def test_temporary_names_differ_between_machines_and_fit(tmp_path, monkeypatch):
    names, replace = [], Path.replace
    monkeypatch.setattr(Path, "replace", lambda self, target: names.append(self.name) or replace(self, target))
    for host in ("a" * 63, "b" * 63):
        atomic._host.cache_clear()
        monkeypatch.setattr("socket.gethostname", lambda host=host: host)
        save_bytes(b"", tmp_path / ("x" * 200 + ".json"))
    atomic._host.cache_clear()
    hosts = {name.rsplit(".", 2)[1].split("-")[0] for name in names}
    assert len(hosts) == 2 and all(f"-{os.getpid()}-" in name for name in names)


def test_errors_name_the_file(tmp_path, monkeypatch):
    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match=r"No space left on device: .*v\.json"):
        save_sealed_json(1, tmp_path / "v.json")
    assert not list(tmp_path.iterdir())
