"""Who may write into a folder while another process does."""

import os
import signal
import socket
import subprocess
import sys
import threading

import pytest

from vqdm.errors import UserError
from vqdm.image_folder import ImageFolder
from vqdm.parallel import Ranks
from vqdm.storage import locks
from vqdm.storage.locks import LOCK, locked
from vqdm.storage.runs import RunFolder

HOLDER = """
import sys
from pathlib import Path
from vqdm.storage.locks import locked
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
    with folder.held(Ranks()):
        folder.open({}, {}, False, 0)
    assert {path.name for path in tmp_path.iterdir()} == {"run.json", "work"}


def test_nothing_is_written_into_a_foreign_folder(tmp_path):
    (tmp_path / "mine.txt").touch()
    with pytest.raises(UserError, match="is not a run of vqdm"):
        RunFolder(str(tmp_path)).held(Ranks())
    assert len(list(tmp_path.iterdir())) == 1


def test_the_first_rank_holds_it_for_all(tmp_path):
    folder = RunFolder(str(tmp_path))
    with folder.held(Ranks(0, 2)), folder.held(Ranks(1, 2)):
        assert (tmp_path / LOCK).is_file()
        with pytest.raises(UserError, match="in use by"), folder.held(Ranks(0, 2)):
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
