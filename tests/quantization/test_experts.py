"""Pipelines of two denoisers, as Wan 2.2: each calibrated on its own calls, both through all programs."""

import json
import shutil
from pathlib import Path

import convert
import generate
import main_text2image
import metrics
import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from test_families import QUANTIZE, SCORES, pixels, run
from tiny_runs import file_hashes
from tiny_transformers import SIZE, wan

import vqdm
from vqdm.additive.code import CodeSpec
from vqdm.cli import run_script
from vqdm.diffusion.blocks import Layer
from vqdm.diffusion.hessians import HessianStore
from vqdm.diffusion.model_folders import denoisers_for
from vqdm.diffusion.pipelines import sample
from vqdm.errors import RunError, UserError
from vqdm.layers.quantized import quantized_layers
from vqdm.prompts import choose
from vqdm.quantization import layerwise
from vqdm.storage.files import load_checked_json

STEPS = [*SIZE, "--num_inference_steps", "3", "--device", "cpu"]  # of which the first is the first expert's
ONE_LAYER = ["--layer_filter", r"blocks\.\d\.attn1\.to_q", *QUANTIZE]
PROMPTS = ["a circle", "a big red circle"]
EXPERTS = ["transformer", "transformer_2"]

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return saved(tmp_path_factory.mktemp("experts") / "model")


def saved(folder: Path, index: dict | None = None, **parts) -> Path:
    """A pipeline of two experts with other parts, or another `model_index.json`."""
    torch.manual_seed(0)
    pipeline = wan(experts=2)
    pipeline.register_modules(**parts)
    pipeline.save_pretrained(folder)
    held = json.loads((folder / "model_index.json").read_text()) | (index or {})
    (folder / "model_index.json").write_text(json.dumps(held))
    return folder


@pytest.fixture
def prompts(tmp_path) -> Path:
    path = tmp_path / "prompts.txt"
    path.write_text("\n".join(PROMPTS))
    return path


def command(model, prompts, out, *words) -> list:
    return [model, prompts, prompts, "--output_dir", out, *STEPS, *words]


def summary(folder: Path) -> dict:
    return json.loads((folder / "summary.json").read_text())


def test_both_experts_through_all_programs(model, tmp_path, prompts):
    few = tmp_path / "few"
    every = ["--components", ",".join([*EXPERTS, "text_encoder"])]
    run(main_text2image, *command(model, prompts, few, *QUANTIZE, *every))
    found = summary(few)
    assert found["component"] == "transformer" and list(found["text_encoders"]) == ["text_encoder"]
    assert found["layers_quantized"] == len(found["layers"]) == 40
    assert {row["component"] for row in found["layers"]} == set(EXPERTS)
    sizes = {name: [file.stat().st_size for file in few.glob(f"{name}/*.safetensors")] for name in EXPERTS}
    for name in EXPERTS:
        assert found[f"{name}_output_error_db"] < -5
        assert found[f"bytes_of_{name}"] == sum(sizes[name]) < 0.75 * found[f"bytes_of_original_{name}"]
    assert found["bytes_of_pipeline"] == sum(file.stat().st_size for file in few.glob("*/*.safetensors"))
    card = (few / "README.md").read_text()
    assert "its transformer and transformer_2 at" in card and "| transformer_2 on disk |" in card
    one = tmp_path / "one"  # the first expert is the same without the second
    run(main_text2image, *command(model, prompts, one, *QUANTIZE, "--components", "transformer"))
    own, others = file_hashes(one), file_hashes(few)
    differ = {name.split("/")[0] for name in own.keys() | others.keys() if own.get(name) != others.get(name)}
    assert differ == {"text_encoder", "transformer_2"}
    images = {"full": [], "few": [few], "one": [one], "folder": [few / "transformer_2"]}
    for name, more in images.items():
        run(generate, model, *more, prompts, "--output_dir", tmp_path / f"{name}-images", "--bs", "2", *STEPS)
    assert len({pixels(tmp_path / f"{name}-images").tobytes() for name in images}) == 4
    made = tmp_path / "few-images"
    run(metrics, made, "--reference", tmp_path / "full-images", "--output_dir", tmp_path / "scores", *SCORES)
    size = json.loads((tmp_path / "scores" / "metrics.json").read_text())["size"]
    assert all(size[f"bytes_of_{name}"] == found[f"bytes_of_{name}"] for name in EXPERTS)
    run(convert, "dequantize", few, "--output_dir", tmp_path / "plain")
    run(generate, tmp_path / "plain", prompts, "--output_dir", tmp_path / "same", "--bs", "2", *STEPS)
    assert np.abs(pixels(tmp_path / "same") - pixels(made)).max() <= 2


@pytest.mark.parametrize("components", [[], ["--components", "transformer_2"]], ids=["both", "second"])
def test_an_expert_is_calibrated_on_its_own_calls(model, tmp_path, prompts, components):
    """Hessians of all points, as hooks on the layers of a pipeline that samples the prompts find them."""
    cache = tmp_path / "cache"
    every = ["--calibration_nsteps", "0", "--hessian_samples_per_input", "0", "--hessian_cache", cache]
    run(main_text2image, *command(model, prompts, tmp_path / "out", *ONE_LAYER, *every, *components))
    pipeline, sums, names = DiffusionPipeline.from_pretrained(model), {}, components[1:] or EXPERTS
    pipeline.set_progress_bar_config(disable=True)

    def add(name: str, inputs: torch.Tensor) -> None:
        rows = inputs.flatten(0, -2).double()
        total, count = sums.get(name, (0, 0))
        sums[name] = (total + rows.T @ rows, count + len(rows))

    for name in names:
        layer = getattr(pipeline, name).blocks[1].attn1.to_q
        layer.register_forward_pre_hook(lambda _, args, name=name: add(name, args[0]))
    settings = {"num_inference_steps": 3, "height": 32, "width": 32, "output_type": "latent"}
    order = choose(PROMPTS, 2, 0, "CALIBRATION_PROMPTS", "--calibration_nsamples")
    sample(pipeline, order, 0, 0, settings)
    assert {name: count for name, (_, count) in sums.items()} == {
        name: 2 * 2 * steps * 64 for name, steps in zip(EXPERTS, (1, 2), strict=True) if name in names
    }
    for name, (total, count) in sums.items():
        folder = cache / name if name == "transformer_2" else cache
        store = HessianStore(folder, load_checked_json(folder / "hessians.json")["settings"])
        layer = Layer("blocks.1.attn1.to_q", "blocks.1", "linear", 32, 32, CodeSpec())
        hessian, held_out = store.load(layer)
        torch.testing.assert_close(hessian.double(), total / count, rtol=1e-4, atol=1e-4)
        assert held_out is None  # of fewer than ten points


TARGET = ["--target_bits", "4", "--state_bits", "8", "--sensitivity_points", "2"]


@pytest.mark.parametrize("words", [[], TARGET, ["--calibration_latents", "student"]], ids=["codes", "bits", "student"])
def test_a_run_is_resumed_in_its_second_expert(model, tmp_path, prompts, words, monkeypatch):
    words = [*words, *(ONE_LAYER[-8:] if words == TARGET else ONE_LAYER), "--unquantized_nbits", "8"]
    run(main_text2image, *command(model, prompts, tmp_path / "whole", *words))
    usual, begun = layerwise.quantize_block, []

    def killed(job, *args):
        begun.append(job.component)
        if begun.count("transformer_2") == 2:
            raise RunError("killed")
        return usual(job, *args)

    again = [str(word) for word in command(model, prompts, tmp_path / "again", *words)]
    monkeypatch.setattr(layerwise, "quantize_block", killed)
    assert run_script(main_text2image.main, again) == 1
    assert not (tmp_path / "again" / "work" / "hessians").exists()  # of the first expert, which is done
    monkeypatch.setattr(layerwise, "quantize_block", usual)
    assert run_script(main_text2image.main, [*again, "--resume"]) == 0
    assert file_hashes(tmp_path / "again") == file_hashes(tmp_path / "whole")
    tables = ["layers.jsonl", "layers_transformer_2.jsonl"]
    tables += ["plan.json", "plan_transformer_2.json"] if "--target_bits" in words else []
    found = {file.name for file in (tmp_path / "again").glob("*.json*")}
    assert found == {*tables, "run.json", "summary.json", "model_index.json"}
    assert run_script(main_text2image.main, [*again, "--resume"]) == 0  # finished


@pytest.mark.parametrize("missing", EXPERTS)
@pytest.mark.parametrize("index", ["null", "missing"])
def test_a_pipeline_without_one_of_its_experts(tmp_path, prompts, missing, index):
    """As people keep it; it stays without one."""
    (left,) = {*EXPERTS} - {missing}
    held = {"boundary_ratio": 1.0 if missing == "transformer" else None}
    model = saved(tmp_path / "model", held, **{missing: None})
    if index == "missing":
        names = json.loads((model / "model_index.json").read_text())
        (model / "model_index.json").write_text(json.dumps({k: v for k, v in names.items() if k != missing}))
    out = tmp_path / "out"
    run(main_text2image, *command(model, prompts, out, *ONE_LAYER))
    assert summary(out)["component"] == left and not (out / missing).exists()
    again = DiffusionPipeline.from_pretrained(out)
    assert len(quantized_layers(getattr(again, left))) == 2 and getattr(again, missing) is None
    run(generate, model, out, prompts, "--output_dir", tmp_path / "images", "--limit", "1", *STEPS)


def test_an_expert_that_is_never_called_stays(tmp_path, prompts):
    """Without a `boundary_ratio` diffusers calls the first expert alone."""
    model = saved(tmp_path / "model", {"boundary_ratio": None})
    run(main_text2image, *command(model, prompts, tmp_path / "out", *ONE_LAYER))
    assert "transformer_2_output_error_db" not in summary(tmp_path / "out")
    assert file_hashes(tmp_path / "out" / "..")["out/transformer_2/config.json"]
    pipeline = DiffusionPipeline.from_pretrained(tmp_path / "out")
    assert quantized_layers(pipeline.transformer) and not quantized_layers(pipeline.transformer_2)


def test_a_loaded_pipeline_keeps_its_experts(model):
    """The result has copies of both, or of the one that is quantized."""
    pipeline, few = DiffusionPipeline.from_pretrained(model), {"layer_filter": ONE_LAYER[1], "visualize_nsamples": 0}
    few |= {"num_inference_steps": 3, "height": 32, "width": 32, "num_codebooks": 1, "nbits_per_codebook": 4}
    before = {name: getattr(pipeline, name) for name in EXPERTS}
    quantized, report = vqdm.quantize(pipeline, PROMPTS, None, PROMPTS[:1], **few)
    sizes = [one["bytes_after"] for one in report.experts.values()]
    assert list(report.experts) == EXPERTS and report.bytes_after == sum(sizes) < report.bytes_before
    assert len(report.layers) == 4 and all(getattr(quantized, name) is not before[name] for name in EXPERTS)
    quantized, report = vqdm.quantize(pipeline, PROMPTS, None, PROMPTS[:1], **few, components=["transformer_2"])
    assert len(report.layers) == 2 and not report.experts and quantized.transformer is before["transformer"]
    assert not any(quantized_layers(one) for one in before.values())


ERRORS = {
    "steps": (
        {},
        ["--num_inference_steps", "1"],
        "transformer_2 is called at timesteps below 875, and none of 1 steps",
    ),
    "high": ({}, ["--max_timestep", "600"], "transformer is called at timesteps from 875 on, and none of 3 steps"),
    "name": ({}, ["--components", "unet"], "has no unet to quantize; allowed are transformer, transformer_2, text_enc"),
    "texts": ({}, ["--components", "text_encoder"], "lacks the denoiser; add transformer or transformer_2"),
    "never": ({"boundary_ratio": None}, ["--components", "transformer_2"], "has no transformer_2 to quantize; allowed"),
    "null": ({"transformer_2": [None, None]}, [], "has no transformer_2, which a boundary_ratio of 0.875 has called"),
    "first": ({"transformer": [None, None]}, [], "has no transformer, which a boundary_ratio of 0.875 has called; add"),
}


@pytest.mark.parametrize(("index", "words", "message"), ERRORS.values(), ids=ERRORS)
def test_what_does_not_fit_is_refused_early(model, tmp_path, prompts, index, words, message, capsys):
    held = json.loads((model / "model_index.json").read_text())
    shutil.copytree(model, tmp_path / "model")
    (tmp_path / "model" / "model_index.json").write_text(json.dumps(held | index))
    words = command(tmp_path / "model", prompts, tmp_path / "out", *ONE_LAYER, *words)
    assert run_script(main_text2image.main, [str(word) for word in words]) == 2
    assert message in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_a_folder_of_one_expert_says_by_its_name_which(model, tmp_path):
    pipeline = DiffusionPipeline.from_pretrained(model)
    for name in ("transformer_2", "other"):
        shutil.copytree(model / "transformer", tmp_path / name)
        config = json.loads((tmp_path / name / "config.json").read_text())
        held = {"quantization_config": {"quant_method": "vqdm"}}
        (tmp_path / name / "config.json").write_text(json.dumps(config | held))
    named = tmp_path / "transformer_2"
    assert denoisers_for(pipeline, str(named), "m") == {"transformer_2": named}
    with pytest.raises(UserError, match="one denoiser, and MODEL m has two experts; name its folder transformer or"):
        denoisers_for(pipeline, str(tmp_path / "other"), "m")
    assert denoisers_for(wan(), str(tmp_path / "other"), "m") == {"transformer": tmp_path / "other"}
    assert denoisers_for(wan(), str(named), "m") == {"transformer": named}
    both = {"transformer": tmp_path / "both" / "transformer", "transformer_2": tmp_path / "both" / "transformer_2"}
    for folder in both.values():
        shutil.copytree(named, folder)
    assert denoisers_for(pipeline, str(tmp_path / "both"), "m") == both
    with pytest.raises(UserError, match="has a transformer_2, and MODEL m has none; they do not fit"):
        denoisers_for(wan(), str(tmp_path / "both"), "m")
