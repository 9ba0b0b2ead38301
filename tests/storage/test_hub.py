"""Pushing to the hub, against a stand-in for its client that keeps files in a folder."""

import shutil
from pathlib import Path
from types import SimpleNamespace

import main_text2image
import pytest
from conftest import tiny_pipeline
from diffusers import StableDiffusionXLPipeline
from huggingface_hub import ModelCard
from huggingface_hub.utils import filter_repo_objects
from numerics import assert_close_outputs, assert_same_tensors
from test_hf import image_of, quantized_unet

from vqdm.cli import run_script
from vqdm.errors import RunError, UserError
from vqdm.storage import hub
from vqdm.storage.hub import model_card

SUMMARY = {
    "layers_quantized": 3,
    "layers_in_8_bit": 0,
    "effective_bits_layers": 3.0,
    "effective_bits_unet": 3.5,
    "bytes_of_unet": 6e6,
    "unet_output_error_db": -30.0,
    "images": {"count": 2, "psnr_db": 40.0},
}


@pytest.fixture
def remote(tmp_path, monkeypatch):
    """The folder that stands for the hub."""

    class Client:
        def create_repo(self, name, private, exist_ok):
            if " " in name:
                raise ValueError(f"Repo id must use alphanumeric chars: '{name}'\nand more")
            whole = name if "/" in name else f"someone/{name}"
            (tmp_path / "hub" / whole).mkdir(parents=True, exist_ok=exist_ok)
            (tmp_path / "hub" / f"{whole}.private").write_text(str(private))
            return SimpleNamespace(repo_id=whole)

        def upload_folder(self, repo_id, folder_path, ignore_patterns, commit_message):
            assert commit_message
            files = [path.relative_to(folder_path) for path in Path(folder_path).rglob("*") if path.is_file()]
            for file in filter_repo_objects(map(str, files), ignore_patterns=ignore_patterns):
                target = tmp_path / "hub" / repo_id / file
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(Path(folder_path) / file, target)

    monkeypatch.setattr(hub, "HfApi", Client)
    monkeypatch.setattr(hub, "get_token", lambda: "token")
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    return tmp_path / "hub"


def test_what_is_pushed_loads_and_has_its_card_and_no_data_of_the_run(remote, tmp_path):
    pipeline, out = tiny_pipeline("sdxl"), tmp_path / "out"
    pipeline.register_modules(unet=quantized_unet())
    pipeline.save_pretrained(out)
    (out / "README.md").write_text(model_card("some/model", SUMMARY))
    local = ["run.json", "summary.json", "training.jsonl", "work/points.safetensors", "images/step-000001.png"]
    local += ["snapshots/01_mid_block/unet/config.json", "vqdm-quantize/events.out.tfevents.1", "wandb/run-1/logs/a"]
    for name in local:
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_text(str(tmp_path))
    name = hub.open_repository("small", private=True)
    assert name == "someone/small" and (remote / "someone/small.private").read_text() == "True"
    assert hub.push_folder(out, name).endswith("/someone/small")
    pushed = {str(path.relative_to(remote / name)) for path in (remote / name).rglob("*") if path.is_file()}
    assert {"model_index.json", "unet/config.json", "README.md"} <= pushed
    assert not set(local) & pushed
    card = (remote / name / "README.md").read_text()
    assert "base_model: some/model\nbase_model_relation: quantized\n" in card and "import vqdm" in card
    again = StableDiffusionXLPipeline.from_pretrained(remote / name)
    assert_same_tensors(again.unet, pipeline.unet)
    assert_close_outputs(image_of(again), image_of(pipeline))


def test_a_card_for_a_folder_names_no_model_of_the_hub(tmp_path):
    card = model_card(str(tmp_path), SUMMARY)
    assert "base_model" not in card and tmp_path.name in card and str(tmp_path) not in card


def test_the_hub_reads_the_header_of_cards(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    about = {
        "library_name": "diffusers",
        "pipeline_tag": "text-to-image",
        "tags": ["vqdm", "quantized", "text-to-image"],
    }
    assert ModelCard(model_card(".", SUMMARY)).data.to_dict() == about
    assert f"# {tmp_path.name}, its UNet at 3.00 bits" in model_card(".", SUMMARY)
    of_hub = about | {"base_model": "some/model", "base_model_relation": "quantized"}
    assert ModelCard(model_card("some/model", SUMMARY)).data.to_dict() == of_hub


def test_what_stands_in_the_way_is_said_before_the_work(remote, monkeypatch):
    with pytest.raises(UserError, match=r"--hub_model_id a b: Repo id must use alphanumeric chars: 'a b'$"):
        hub.open_repository("a b", private=False)
    monkeypatch.setattr(hub, "get_token", lambda: None)
    with pytest.raises(UserError, match="--push_to_hub needs a token"):
        hub.open_repository("small", private=False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "yes")
    with pytest.raises(UserError, match="HF_HUB_OFFLINE is set"):
        hub.open_repository("small", private=False)
    monkeypatch.setenv("RANK", "1")
    assert hub.open_repository("small", private=False) == "small"


def test_a_failed_upload_says_that_the_folder_is_finished(remote, tmp_path, monkeypatch):
    def broken(*_, **__):
        raise ConnectionError("no route\nto host")

    monkeypatch.setattr(hub.HfApi, "upload_folder", broken)
    with pytest.raises(RunError, match="is finished but not on the hub: no route; `hf upload someone/small"):
        hub.push_folder(tmp_path, "someone/small")


@pytest.mark.parametrize("extra", [["--hub_model_id", "team/named"], []])
def test_the_script_opens_before_and_pushes_after(remote, tmp_path, monkeypatch, capsys, extra):
    name, out = (extra or ["", "someone/result"])[1], tmp_path / "result"

    def quantize(config, finetune_blocks):
        assert (remote / name).is_dir()
        out.mkdir()
        (out / "model_index.json").write_text("{}")
        return None, None

    monkeypatch.setattr(main_text2image, "quantize", quantize)
    words = ["model", "c.txt", "e.txt", "--output_dir", str(out), "--push_to_hub", *extra]
    assert run_script(main_text2image.main, words) == 0
    assert (remote / name / "model_index.json").is_file() and f"/{name}" in capsys.readouterr().out
    monkeypatch.setattr(main_text2image, "quantize", lambda config, finetune_blocks: (None, None))
    shutil.rmtree(remote)
    assert run_script(main_text2image.main, [*words, "--dry_run"]) == 0 and not remote.exists()
