import copy
import json

import pytest
import torch
from conftest import tiny_unet
from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from test_quantized import SPECS, random_code

from vqdm.diffusion.blocks import select_layers
from vqdm.layers.quantized import QuantizedConv2d, quantized_layers, swap
from vqdm.storage.hf import VqdmConfig, mark_quantized

VICTIM = "mid_block.resnets.0.conv1.codebooks"


def quantized_unet(spec=SPECS[0], overrides=None) -> UNet2DConditionModel:
    """A tiny SDXL UNet with random codes."""
    unet = tiny_unet("sdxl")
    for layer in select_layers(unet, "default", 0, spec, overrides or {}):
        swap(unet, layer.name, layer.spec).set_code(random_code(layer.spec, layer.rows, layer.columns))
    mark_quantized(unet)
    return unet


def run(unet) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    added = {"text_embeds": torch.randn(1, 32, generator=generator), "time_ids": torch.ones(1, 6)}
    sample, tokens = torch.randn(1, 4, 8, 8, generator=generator), torch.randn(1, 5, 64, generator=generator)
    with torch.no_grad():
        return unet(sample, 500, tokens, added_cond_kwargs=added).sample


def picture(pipeline) -> torch.Tensor:
    """Final latents of one prompt."""
    settings = {"num_inference_steps": 2, "output_type": "latent", "generator": torch.Generator().manual_seed(0)}
    return pipeline("a red star", **settings).images


@pytest.mark.parametrize("spec", SPECS)
def test_round_trip_is_exact(tmp_path, spec):
    unet = quantized_unet(spec)
    unet.save_pretrained(tmp_path)
    again = UNet2DConditionModel.from_pretrained(tmp_path)
    before, after = unet.state_dict(), again.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert torch.equal(run(unet), run(again))


def test_layers_may_differ(tmp_path):
    unet = quantized_unet(overrides={r".*\.to_q": {"num_codebooks": 5}, r".*conv1": {"nbits_per_codebook": 3}})
    unet.save_pretrained(tmp_path)
    again = UNet2DConditionModel.from_pretrained(tmp_path)
    specs = {name: layer.spec for name, layer in quantized_layers(unet).items()}
    assert specs == {name: layer.spec for name, layer in quantized_layers(again).items()}
    assert len(set(specs.values())) == 3


def test_whole_pipeline_with_stock_diffusers(tmp_path, pipelines):
    pipeline = StableDiffusionXLPipeline.from_pretrained(pipelines["sdxl"])
    pipeline.unet = quantized_unet()
    pipeline.save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["unet"] == ["diffusers", "UNet2DConditionModel"]
    again = StableDiffusionXLPipeline.from_pretrained(tmp_path)
    assert isinstance(again.unet.mid_block.resnets[0].conv1, QuantizedConv2d)
    assert torch.equal(picture(pipeline), picture(again))


def test_half_precision_load(tmp_path):
    quantized_unet().save_pretrained(tmp_path)
    half = UNet2DConditionModel.from_pretrained(tmp_path, dtype=torch.float16)
    layer = half.mid_block.resnets[0].conv1
    assert layer.codes.dtype == torch.uint8 and layer.codebooks.dtype == torch.float16


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda tensors: tensors.pop(VICTIM), f"lacks 1 tensors, the first is {VICTIM}"),
        (lambda tensors: tensors.update(ghost=tensors[VICTIM].clone()), "holds 1 unknown tensors, the first is ghost"),
        (lambda tensors: tensors.update({VICTIM: tensors[VICTIM][:1].clone()}), VICTIM),
    ],
    ids=["missing", "extra", "wrong shape"],
)
def test_a_wrong_checkpoint_is_an_error_that_names_the_tensor(tmp_path, change, words):
    quantized_unet().save_pretrained(tmp_path)
    path = tmp_path / "diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, {"format": "pt"})
    with pytest.raises((ValueError, RuntimeError), match=words):
        UNet2DConditionModel.from_pretrained(tmp_path)


def test_sharded_files_load(tmp_path):
    unet = quantized_unet()
    unet.save_pretrained(tmp_path, max_shard_size="100KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    assert torch.equal(run(unet), run(UNet2DConditionModel.from_pretrained(tmp_path)))


def test_variants_and_deepcopy(tmp_path):
    unet = quantized_unet()
    unet.save_pretrained(tmp_path, variant="fp16")
    assert [path.name for path in tmp_path.glob("*.safetensors")] == ["diffusion_pytorch_model.fp16.safetensors"]
    assert torch.equal(run(UNet2DConditionModel.from_pretrained(tmp_path, variant="fp16")), run(copy.deepcopy(unet)))


def test_dequantize_gives_a_plain_model(tmp_path):
    unet = quantized_unet()
    expected = run(unet)
    unet.dequantize()
    assert not quantized_layers(unet)
    assert (run(unet.float()) - expected).norm() < 0.02 * expected.norm()
    unet.save_pretrained(tmp_path)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda config: config.update(format_version=99), "format_version is 99"),
        (lambda config: config["layers"].update({"no.such": {}}), "names layer no.such"),
        (lambda config: config["layers"].update({"mid_block": {}}), "which is a UNetMidBlock2DCrossAttn"),
        (lambda config: config["code"].update(num_codebooks=0), "num_codebooks is 0"),
        (lambda config: config["code"].update(colour=1), "no such setting: colour"),
    ],
)
def test_bad_configurations_are_refused(tmp_path, change, words):
    quantized_unet().save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    change(config["quantization_config"])
    path.write_text(json.dumps(config))
    with pytest.raises(ValueError, match=words):
        UNet2DConditionModel.from_pretrained(tmp_path)


def test_config_is_plain_json():
    config = VqdmConfig.of(quantized_unet())
    text = json.dumps(config.to_dict())
    assert VqdmConfig(**json.loads(text)).to_dict() == config.to_dict()
