import json
import runpy
import sys

import pytest
import torch
from conftest import tiny_pipeline, tiny_unet
from convert import main
from diffusers import DiffusionPipeline, UNet2DConditionModel
from original_vqdm import original_unet, save_original
from safetensors.torch import load_file
from test_hf import quantized_unet, run
from test_hf_text import quantized_text_encoder
from transformers import CLIPTextModel

from vqdm.additive.code import CodeSpec
from vqdm.cli import run_script
from vqdm.conversion import fill, new_folder
from vqdm.errors import UserError
from vqdm.layers.int8 import int8_layers
from vqdm.layers.quantized import quantized_layers

ORIGINAL = {
    "down_blocks.0.resnets.0.conv1": {},
    "mid_block.attentions.0.transformer_blocks.0.attn1.to_q": {"groupwise": True, "input_scales": True},
    "mid_block.attentions.0.proj_in": {"scale_nbits": 2, "straight_through": True},
    "up_blocks.0.upsamplers.0.conv": {"group_channels": False},
}


@pytest.fixture(scope="module")
def quantized(tmp_path_factory):
    """A pipeline folder with everything quantized."""
    folder = tmp_path_factory.mktemp("convert") / "quantized"
    pipeline = tiny_pipeline("sdxl")
    pipeline.register_modules(
        unet=quantized_unet(unquantized_nbits=8),
        text_encoder=quantized_text_encoder("text_encoder", CodeSpec(1, 8, 8)),
        text_encoder_2=quantized_text_encoder("text_encoder_2", CodeSpec(2, 4, 4)),
    )
    pipeline.save_pretrained(folder)
    return folder


def latents(folder):
    settings = {"num_inference_steps": 2, "output_type": "latent", "generator": torch.Generator().manual_seed(0)}
    return DiffusionPipeline.from_pretrained(folder)("a red star", **settings).images


@pytest.mark.parametrize("part", [".", "unet", "text_encoder_2"])
def test_dequantized_folders_are_plain_and_draw_the_same(quantized, tmp_path, capsys, part):
    out = tmp_path / "plain"
    assert run_script(main, ["dequantize", str(quantized / part), "--output_dir", str(out)]) == 0
    assert "layers of" in capsys.readouterr().out
    for path in out.rglob("config.json"):
        assert "quantization_config" not in json.loads(path.read_text())
    tensors = {name: t for path in out.rglob("*.safetensors") for name, t in load_file(path).items()}
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
    assert not any(name.endswith((".codes", ".values")) for name in tensors)
    if part == ".":
        expected = latents(quantized)
        assert (latents(out) - expected).norm() < 0.005 * expected.norm()
    elif part == "unet":
        expected = run(UNet2DConditionModel.from_pretrained(quantized / "unet"))
        torch.testing.assert_close(run(UNet2DConditionModel.from_pretrained(out)), expected, rtol=1e-4, atol=1e-4)


def test_a_folder_that_another_process_wrote_meanwhile_is_kept(tmp_path):
    with pytest.raises(UserError, match="has been written by another process meanwhile"), new_folder(tmp_path / "out"):
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "theirs").touch()
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "theirs"]


@pytest.mark.parametrize("part", [".", "unet", "text_encoder"])
def test_dequantized_folders_are_in_the_type_of_their_source(quantized, tmp_path, part):
    source, out = tmp_path / "source", tmp_path / "plain"
    DiffusionPipeline.from_pretrained(quantized, dtype=torch.bfloat16).save_pretrained(source)
    assert run_script(main, ["dequantize", str(source / part), "--output_dir", str(out)]) == 0
    tensors = {name: t for path in out.rglob("*.safetensors") for name, t in load_file(path).items()}
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}


def test_dequantized_in_another_type(quantized, tmp_path):
    out = tmp_path / "plain"
    line = ["dequantize", str(quantized / "unet"), "--output_dir", str(out), "--dtype", "bfloat16"]
    assert run_script(main, line) == 0
    assert {tensor.dtype for path in out.glob("*.safetensors") for tensor in load_file(path).values()} == {
        torch.bfloat16
    }


def test_text_encoders_of_a_pipeline_go_to_aqlm(quantized, tmp_path):
    out = tmp_path / "aqlm"
    assert run_script(main, ["aqlm", str(quantized), "--output_dir", str(out)]) == 0
    for name, bits in (("text_encoder", 8), ("text_encoder_2", 4)):
        config = json.loads((out / name / "config.json").read_text())["quantization_config"]
        assert config["quant_method"] == "aqlm" and config["nbits_per_codebook"] == bits
        assert (out / name / "model.safetensors").is_file()


def test_a_pickle_of_the_original_becomes_a_quantized_folder(pipelines, tmp_path):
    torch.manual_seed(0)
    unet = original_unet(ORIGINAL)
    unet.conv_in.bias.data += 1  # what fine-tuning changed must come along
    pickle, out = save_original(unet, tmp_path / "unet.pickle"), tmp_path / "out"
    line = ["pickle", str(pickle), "--model", str(pipelines["sdxl"]), "--trust_pickle", "--output_dir", str(out)]
    assert run_script(main, line) == 0
    pipeline = DiffusionPipeline.from_pretrained(out)
    assert set(quantized_layers(pipeline.unet)) == set(ORIGINAL)
    torch.testing.assert_close(run(pipeline.unet), run(unet), rtol=1e-2, atol=1e-2)
    assert not int8_layers(pipeline.unet) and "src.aq" not in sys.modules
    assert json.loads((out / "unet" / "config.json").read_text())["quantization_config"]["format_version"] == 1


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (["pickle", "file"], "pickle needs --model"),
        (["pickle", "file", "--model", "sdxl"], "add --trust_pickle if you trust its source"),
        (["pickle", "no/file", "--model", "sdxl", "--trust_pickle"], "pickle no/file is not a file"),
        (["pickle", "README.md", "--model", "sdxl", "--trust_pickle"], "is not a file of torch.save"),
        (["dequantize", "sdxl"], "is not quantized; there is nothing to dequantize"),
        (["dequantize", "tests"], "SOURCE tests is a folder without model_index.json"),
        (["dequantize", "sdxl", "--trust_pickle"], "--trust_pickle has no effect without KIND pickle"),
        (["aqlm", "sdxl"], "holds no quantized text encoder"),
        (["aqlm", "sdxl", "--dtype", "float16"], "--dtype float16 has no effect without KIND dequantize"),
        (["colour", "sdxl"], "invalid choice: 'colour'"),
        (["dequantize", "sdxl", "--output_dir", "tests"], "exists and is not empty"),
    ],
)
def test_bad_input_is_one_line(pipelines, tmp_path, capsys, line, words):
    line = [str(pipelines.get(word, word)) for word in line]
    assert run_script(main, ["--output_dir", str(tmp_path / "out"), *line]) == 2
    error = capsys.readouterr().err
    assert words in error and error.startswith("error: ") and error.count("\n") == 1
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".out.*"))


@pytest.mark.parametrize(("family", "words"), [("sd15", "the checkpoint lacks"), ("sdxl", "size mismatch for mid_")])
def test_a_pickle_of_another_unet_is_refused(tmp_path, family, words):
    unet = original_unet(ORIGINAL)
    unet.mid_block.attentions[0].proj_in.quantized_weight.codebooks.data = torch.zeros(1, 2, 16, 1, 8)
    source = save_original(unet, tmp_path / "unet.pickle")
    with pytest.raises(UserError, match=rf"pickle .*unet\.pickle does not fit --model: .*{words}"):
        fill(tiny_unet(family), str(source))


def test_a_text_encoder_alone_keeps_its_class(quantized, tmp_path):
    out = tmp_path / "plain"
    assert run_script(main, ["dequantize", str(quantized / "text_encoder"), "--output_dir", str(out)]) == 0
    assert type(CLIPTextModel.from_pretrained(out)) is CLIPTextModel


def test_an_interrupted_conversion_promises_no_resumption(monkeypatch, capsys):
    def interrupted(config):
        raise KeyboardInterrupt

    monkeypatch.setattr("vqdm.conversion.convert", interrupted)
    monkeypatch.setattr(sys, "argv", ["convert.py", "dequantize", "somewhere"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path("convert.py", run_name="__main__")
    assert ended.value.code == 130 and capsys.readouterr().err == "error: interrupted; nothing was written\n"
