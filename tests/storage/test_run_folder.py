import shutil
from collections import namedtuple
from dataclasses import replace

import pytest
import torch
from test_quantized import SPECS, random_code

from vqdm.diffusion.blocks import Layer
from vqdm.errors import RunError, UserError
from vqdm.parallel import Ranks
from vqdm.quantization.config import IntermediateConfig, QuantizeConfig
from vqdm.storage import run_folder as module
from vqdm.storage.files import UNFINISHED, save_bytes, save_json
from vqdm.storage.run_folder import RunFolder, check_claim, layer_generator, shards, span_name, spans

LAYER = Layer("mid_block.a.b", "mid_block", "linear", 8, 16, SPECS[0])
SETTINGS = {"seed": 0, "solver": {"spec": {"num_codebooks": 2}}, "output_dir": "x", "overrides": {}}


def test_layers_come_back_exactly(tmp_path):
    folder = RunFolder(str(tmp_path / "out"))
    folder.open(SETTINGS, {}, False, 0)
    assert folder.load_layer(LAYER) is None
    code = random_code(LAYER.spec, LAYER.rows, LAYER.columns)
    folder.save_layer(LAYER, code, {"error": 0.5})
    again = folder.load_layer(LAYER)
    assert again.spec == LAYER.spec and again.report == {"error": 0.5}
    assert all(torch.equal(tensor, again.tensors[name]) for name, tensor in code.pack().items())


def test_a_damaged_layer_file_is_named(tmp_path):
    folder = RunFolder(str(tmp_path / "out"))
    folder.open(SETTINGS, {}, False, 0)
    folder.save_layer(LAYER, random_code(LAYER.spec, 8, 16), {})
    path = folder.layer_path(LAYER.name)
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(RunError, match=r"mid_block\.a\.b\.safetensors is damaged"):
        folder.load_layer(LAYER)


def test_a_run_is_resumed_only_on_request_and_with_equal_settings(tmp_path):
    RunFolder(str(tmp_path)).open(SETTINGS, {}, False, 0)
    with pytest.raises(UserError, match="holds a run already; add --resume"):
        RunFolder(str(tmp_path)).open(SETTINGS, {}, False, 0)
    RunFolder(str(tmp_path)).open(SETTINGS | {"output_dir": "elsewhere"}, {}, True, 0)
    changed = SETTINGS | {"seed": 4, "solver": {"spec": {"num_codebooks": 3}}}
    with pytest.raises(UserError, match="seed was 0, now 4; num_codebooks was 2, now 3"):
        RunFolder(str(tmp_path)).open(changed, {}, True, 0)
    folder = RunFolder(str(tmp_path))
    assert folder.started_with("seed", 1) == SETTINGS["seed"] and folder.started_with("since then", 1) == 1
    (tmp_path / "run.json").write_text("{")
    assert folder.started_with("seed", 1) == 1


def test_foreign_folders_and_files_are_refused(tmp_path):
    (tmp_path / "mine.txt").write_text("keep me")
    with pytest.raises(UserError, match="is not a run of vqdm"):
        RunFolder(str(tmp_path)).open(SETTINGS, {}, False, 0)
    with pytest.raises(UserError, match="is not a run of vqdm"):
        RunFolder(str(tmp_path / "mine.txt")).open(SETTINGS, {}, False, 0)
    with pytest.raises(UserError, match="cannot be written"):
        RunFolder(str(tmp_path / "mine.txt" / "out")).open(SETTINGS, {}, False, 0)
    with pytest.raises(UserError, match="cannot be written"):
        RunFolder("/proc/vqdm").open(SETTINGS, {}, False, 0)


def test_a_run_killed_before_its_claim_is_begun_anew(tmp_path):
    """Its folder holds an empty work/ and files that it did not finish; anything else is foreign."""
    (tmp_path / "work").mkdir()
    for name in (f".run.json.12{UNFINISHED}", f"work/.probe.12{UNFINISHED}"):
        (tmp_path / name).touch()
    RunFolder(str(tmp_path)).open(SETTINGS, {}, False, 0)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["run.json", "work"]
    (tmp_path / "run.json").unlink()
    (tmp_path / "work" / "mine.txt").touch()
    with pytest.raises(UserError, match="is not a run of vqdm"):
        RunFolder(str(tmp_path)).open(SETTINGS, {}, False, 0)


def test_a_full_disk_is_noticed_first(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: namedtuple("Usage", "free")(10**9))
    with pytest.raises(UserError, match=r"1\.00 GB are free, the run needs about 5\.00 GB"):
        RunFolder(str(tmp_path / "out")).open(SETTINGS, {}, False, 5 * 10**9)


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "file"
    save_bytes(b"old", path)

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space"):
        save_bytes(b"new", path)
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


def test_a_layers_random_numbers_depend_on_seed_and_name_only():
    first = torch.rand(3, generator=layer_generator(0, "a"))
    assert torch.equal(first, torch.rand(3, generator=layer_generator(0, "a")))
    assert not torch.equal(first, torch.rand(3, generator=layer_generator(0, "b")))
    assert not torch.equal(first, torch.rand(3, generator=layer_generator(1, "a")))


def test_a_run_goes_on_without_the_hub_but_not_with_another_seed(tmp_path):
    config = QuantizeConfig(
        model="owner/model", calibration_prompts="c.txt", evaluation_prompts="e.txt", output_dir=str(tmp_path)
    )
    save_json({"settings": config.to_dict()}, tmp_path / "run.json")
    check_claim(tmp_path, replace(config, local_files_only=True, device="cpu").to_dict(), resume=True)
    smaller = {"xtx_batch_size": 1, "hessian_memory_gb": 0.5, "visualize_nsamples": 0, "hessian_cache": "elsewhere"}
    smaller["intermediate"] = IntermediateConfig(local_batch_size=1)
    check_claim(tmp_path, replace(config, **smaller).to_dict(), resume=True)
    larger = replace(config, intermediate=IntermediateConfig(finetune_batch_size=1)).to_dict()
    with pytest.raises(UserError, match=r"other settings: finetune_batch_size was 32, now 1$"):
        check_claim(tmp_path, larger, resume=True)
    with pytest.raises(UserError, match=r"was started with other settings: seed was 0, now 1$"):
        check_claim(tmp_path, replace(config, local_files_only=True, seed=1).to_dict(), resume=True)


def test_only_missing_pieces_are_made(tmp_path):
    made = []

    def make(name):
        made.append(name)
        return {"value": torch.tensor(float(name))}

    values = lambda names: [part["value"].item() for part in shards(Ranks(), tmp_path, names, make)]  # noqa: E731
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
        module.read_shard(tmp_path / "x.safetensors")
