"""Steps in pieces, in one process."""

import pytest
import torch

from vqdm.errors import RunError
from vqdm.parallel import Ranks
from vqdm.storage import pieces as module
from vqdm.storage.pieces import pieces, span_name, spans


def test_only_missing_pieces_are_made(tmp_path):
    made = []

    def make(name):
        made.append(name)
        return {"value": torch.tensor(float(name))}

    values = lambda names: [part["value"].item() for part in pieces(Ranks(), tmp_path, names, make)]  # noqa: E731
    assert values(["2", "1"]) == [2.0, 1.0]
    assert values(["1", "3", "2"]) == [1.0, 3.0, 2.0]
    assert made == ["2", "1", "3"]
    (tmp_path / "3.safetensors").write_bytes(b"spoiled")
    with pytest.raises(RunError, match=r"3\.safetensors is damaged .*; delete it and run again with --resume"):
        values(["3"])


def test_spans_keep_what_is_there_and_fill_the_gaps(tmp_path):
    found = lambda size, first=0, count=10: spans(Ranks(), tmp_path, first, count, size)  # noqa: E731
    assert found(4) == [(0, 4), (4, 4), (8, 2)]
    (tmp_path / f"{span_name(4, 4)}.safetensors").touch()
    (tmp_path / f".{span_name(0, 4)}.safetensors.7.vqdm-tmp").touch()
    assert found(4) == [(0, 4), (4, 4), (8, 2)]
    assert found(3) == [(0, 3), (3, 1), (4, 4), (8, 2)]
    assert found(100) == [(0, 4), (4, 4), (8, 2)]
    assert found(3, first=6, count=5) == [(6, 3), (9, 2)]
    (tmp_path / f"{span_name(6, 3)}.safetensors").touch()
    for size in (1, 3, 4):
        covered = [item for first, count in found(size) for item in range(first, first + count)]
        assert covered == list(range(10))


def test_a_file_that_never_appears_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "SECONDS_TO_APPEAR", 0.0)
    with pytest.raises(RunError, match=r"x\.safetensors does not appear; all machines must share"):
        module.read(tmp_path / "x.safetensors")
