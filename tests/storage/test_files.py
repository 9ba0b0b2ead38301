"""Files that notice damage, and leftovers of killed writers."""

import hashlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from processors import is_odd
from safetensors.torch import load_file

from vqdm.errors import UserError
from vqdm.images import ImageFolder
from vqdm.parallel import Ranks
from vqdm.storage import files as atomic
from vqdm.storage import files as locks
from vqdm.storage.files import (
    LOCK,
    SAMPLE_BYTES,
    UNFINISHED,
    CorruptFileError,
    file_sha256,
    folder_fingerprint,
    load_checked,
    load_checked_json,
    locked,
    pipeline_fingerprint,
    save_bytes,
    save_checked,
    save_checked_json,
    save_tensors,
    sweep,
)
from vqdm.storage.run_folder import RunFolder

TENSORS = {"a": torch.arange(6.0).view(2, 3), "b": torch.tensor(3, dtype=torch.int64), "c": torch.ones(5).bfloat16()}


def test_checked_tensors_come_back(tmp_path):
    path = tmp_path / "t.safetensors"
    save_checked(TENSORS | {"turned": TENSORS["a"].T, "none": torch.empty(0, 4)}, path, {"about": "x"})
    tensors, metadata = load_checked(path)
    assert metadata == {"about": "x"} and torch.equal(tensors["turned"], TENSORS["a"].T)
    assert all(
        torch.equal(tensors[name], tensor) and tensors[name].dtype == tensor.dtype for name, tensor in TENSORS.items()
    )


def test_checked_tensors_lie_where_torch_allocates(tmp_path, odd_addresses):
    """So that a resumed run computes as one that kept them in memory, on processors that tell addresses apart."""
    path = tmp_path / "t.safetensors"
    save_checked(TENSORS, path)
    assert any(map(is_odd, load_file(path).values())) and not any(map(is_odd, load_checked(path)[0].values()))


def test_any_flipped_bit_and_any_cut_is_noticed(tmp_path):
    path = tmp_path / "t.safetensors"
    save_checked(TENSORS, path, {"about": "x"})
    content = path.read_bytes()
    for place in range(len(content)):
        path.write_bytes(content[:place] + bytes([content[place] ^ 1 << place % 8]) + content[place + 1 :])
        try:
            tensors, metadata = load_checked(path)
        except CorruptFileError:
            continue
        same = all(torch.equal(tensors[name], tensor) for name, tensor in TENSORS.items())
        assert same and metadata == {"about": "x"}, f"byte {place}"  # blanks that pad the header mean nothing
    for length in range(0, len(content), 7):
        path.write_bytes(content[:length])
        with pytest.raises(CorruptFileError):
            load_checked(path)


def test_a_file_without_a_checksum_is_not_taken(tmp_path):
    save_tensors(TENSORS, tmp_path / "t.safetensors")
    with pytest.raises(CorruptFileError, match="checksum"):
        load_checked(tmp_path / "t.safetensors")


def test_checked_json(tmp_path):
    path, value = tmp_path / "v.json", {"b": [1, 2.5, None], "a": "ü"}
    save_checked_json(value, path)
    assert load_checked_json(path) == value
    for text in (path.read_text().replace("2.5", "2.25"), path.read_text()[:-9], "[]", "{}", json.dumps(value)):
        path.write_text(text)
        with pytest.raises(CorruptFileError):
            load_checked_json(path)


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
        save_checked_json(1, tmp_path / "v.json")
    assert not list(tmp_path.iterdir())


HOLDER = """
import sys
from pathlib import Path
from vqdm.storage.files import locked
with locked(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def holder(tmp_path):
    """A process that holds the lock of tmp_path/out."""
    words = [sys.executable, "-c", HOLDER, str(tmp_path / "out")]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout.readline() == "held\n"
        yield child
        child.kill()


def test_a_held_folder_is_refused_and_its_holder_named_until_it_is_killed(tmp_path, holder):
    out = tmp_path / "out"
    with pytest.raises(UserError) as refused, locked(out):
        pass
    assert str(refused.value) == (
        f"--output_dir {out} is in use by process {holder.pid} on {socket.gethostname()}; "
        "wait until it has ended, or choose another folder"
    )
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    assert list(out.iterdir()) == [out / LOCK]
    with locked(out):
        assert str(os.getpid()) in (out / LOCK).read_text()
    assert not list(out.iterdir())


def test_a_new_run_takes_a_folder_that_a_kill_left_with_its_lock_only(tmp_path):
    (tmp_path / LOCK).touch()
    folder = RunFolder(str(tmp_path))
    with folder.lock(Ranks()):
        folder.open({}, {}, False, 0)
    assert {path.name for path in tmp_path.iterdir()} == {"run.json", "work"}


def test_nothing_is_written_into_a_foreign_folder(tmp_path):
    (tmp_path / "mine.txt").touch()
    with pytest.raises(UserError, match="is not a run of vqdm"):
        RunFolder(str(tmp_path)).lock(Ranks())
    assert len(list(tmp_path.iterdir())) == 1


def test_the_first_rank_holds_it_for_all(tmp_path):
    folder = RunFolder(str(tmp_path))
    with folder.lock(Ranks(0, 2)), folder.lock(Ranks(1, 2)):
        assert (tmp_path / LOCK).is_file()
        with pytest.raises(UserError, match="in use by"), folder.lock(Ranks(0, 2)):
            pass


def test_shards_share_a_folder_and_each_is_held_once(tmp_path):
    first, second = (ImageFolder(tmp_path, shard=(number, 2)) for number in (0, 1))
    with first.held(Ranks()), second.held(Ranks()), pytest.raises(UserError, match="in use by"):
        second.held(Ranks()).__enter__()


def test_who_waits_goes_on_when_the_holder_has_ended(tmp_path, monkeypatch):
    monkeypatch.setattr(locks, "SECONDS_BETWEEN_TRIES", 0.01)
    order = []

    def wait():
        with locked(tmp_path, "--hessian_cache", wait=True):
            order.append("second")

    waiting = threading.Thread(target=wait)
    with locked(tmp_path):
        waiting.start()
        waiting.join(0.2)
        order.append("first")
    waiting.join(20)
    assert order == ["first", "second"]


def test_a_file_system_without_locks_is_warned_of(tmp_path, monkeypatch, caplog):
    def unsupported(*_, **__):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(locks.FileLock, "acquire", unsupported)
    with caplog.at_level("WARNING", "vqdm"), locked(tmp_path):
        assert not list(tmp_path.iterdir())


def test_file_sha256(tmp_path):
    (tmp_path / "a").write_bytes(b"abc")
    assert file_sha256(tmp_path / "a") == hashlib.sha256(b"abc").hexdigest()


def test_every_part_of_a_component_counts(tmp_path):
    weights = bytearray(20 * SAMPLE_BYTES)
    seen = set()
    for step in range(5):
        if step == 2:
            weights[0] = 1
        if step == 3:
            weights[-1] = 1
        (tmp_path / "config.json").write_text(f'{{"a": {min(step, 1)}}}')
        (tmp_path / "model.safetensors").write_bytes(weights if step < 4 else weights + b"x")
        seen.add(folder_fingerprint(tmp_path))
    assert len(seen) == 5
    (tmp_path / "image.png").write_bytes(b"x")
    assert folder_fingerprint(tmp_path) in seen


def test_pipeline_counts_its_components_and_nothing_else(tmp_path):
    (tmp_path / "unet").mkdir()
    (tmp_path / "unet" / "config.json").write_text("{}")
    (tmp_path / "model_index.json").write_text('{"_class_name": "X", "unet": ["diffusers", "U"], "gone": [null, null]}')
    before = pipeline_fingerprint(tmp_path)
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "run.json").write_text("{}")
    assert pipeline_fingerprint(tmp_path) == before
    (tmp_path / "unet" / "config.json").write_text('{"a": 1}')
    assert pipeline_fingerprint(tmp_path) != before
