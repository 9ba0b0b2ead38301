import copy
import json
from dataclasses import replace

import pytest
import torch
from conftest import tiny_unet
from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel
from diffusers.quantizers import auto
from numerics import assert_close_outputs, assert_same_tensors
from safetensors.torch import load_file, save_file
from test_quantized import SPECS, random_code

from vqdm.additive import trellis
from vqdm.additive.code import CodeSpec
from vqdm.diffusion.blocks import select_layers, unquantized_layers
from vqdm.layers.int8 import int8_layers, quantize_int8
from vqdm.layers.quantized import QuantizedConv2d, cast_plain, float_scales, quantized_layers, swap
from vqdm.storage.hf import VqdmConfig, mark_quantized

pytestmark = pytest.mark.usefixtures("odd_addresses")
VICTIM = "mid_block.resnets.0.conv1.codebooks"
ROUNDED_VICTIM = "time_embedding.linear_1.values"


def quantized_unet(spec=SPECS[0], overrides=None, unquantized_nbits=16) -> UNet2DConditionModel:
    """A tiny SDXL UNet with random codes."""
    unet = tiny_unet("sdxl")
    layers = select_layers(unet, "default", 0, spec, overrides or {})
    for layer in layers:
        swap(unet, layer.name, layer.spec).set_code(random_code(layer.spec, layer.rows, layer.columns))
    if unquantized_nbits == 8:
        for name in unquantized_layers(unet, layers):
            quantize_int8(unet, name)
    mark_quantized(unet)
    return unet


def run(unet) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    added = {"text_embeds": torch.randn(1, 32, generator=generator), "time_ids": torch.ones(1, 6)}
    sample, tokens = torch.randn(1, 4, 8, 8, generator=generator), torch.randn(1, 5, 64, generator=generator)
    with torch.no_grad():
        return unet(sample, 500, tokens, added_cond_kwargs=added).sample


def image_of(pipeline) -> torch.Tensor:
    """Final latents of one prompt."""
    settings = {"num_inference_steps": 2, "output_type": "latent", "generator": torch.Generator().manual_seed(0)}
    return pipeline("a red star", **settings).images


@pytest.mark.parametrize("spec", SPECS)
def test_round_trip_is_exact(tmp_path, spec):
    unet = quantized_unet(spec)
    unet.save_pretrained(tmp_path)
    again = UNet2DConditionModel.from_pretrained(tmp_path)
    assert_same_tensors(again, unet)
    assert_close_outputs(run(again), run(unet))


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
    assert_same_tensors(again.unet, pipeline.unet)
    assert_close_outputs(image_of(again), image_of(pipeline))


def test_without_the_format_known_loading_fails_and_names_it(tmp_path, pipelines, monkeypatch):
    pipeline = StableDiffusionXLPipeline.from_pretrained(pipelines["sdxl"])
    pipeline.unet = quantized_unet()
    pipeline.save_pretrained(tmp_path)
    for known in (auto.AUTO_QUANTIZER_MAPPING, auto.AUTO_QUANTIZATION_CONFIG_MAPPING):
        monkeypatch.delitem(known, "vqdm")
    with pytest.raises(ValueError, match="vqdm"):
        StableDiffusionXLPipeline.from_pretrained(tmp_path)


@pytest.mark.parametrize("device_map", ["cpu", "auto", {"": "cpu"}], ids=str)
def test_device_maps(tmp_path, device_map):
    unet = quantized_unet(unquantized_nbits=8)
    unet.save_pretrained(tmp_path)
    again = UNet2DConditionModel.from_pretrained(tmp_path, device_map=device_map, dtype=torch.float32)
    assert_close_outputs(run(again), run(unet))


def test_a_device_map_that_spills_to_disk(tmp_path):
    """What accelerate puts on the disk comes back a layer at a time."""
    unet = quantized_unet()
    unet.save_pretrained(tmp_path / "unet")
    parts = {name: "cpu" for name, _ in unet.named_children()} | {"mid_block": "disk"}
    options = {"device_map": parts, "offload_folder": tmp_path / "disk", "dtype": torch.float32}
    again = UNet2DConditionModel.from_pretrained(tmp_path / "unet", **options)
    assert again.mid_block.resnets[0].conv1.codes.device.type == "meta"
    assert_close_outputs(run(again), run(unet))


def test_half_precision_load(tmp_path):
    quantized_unet().save_pretrained(tmp_path)
    half = UNet2DConditionModel.from_pretrained(tmp_path, dtype=torch.float16)
    layer = half.mid_block.resnets[0].conv1
    assert layer.codes.dtype == torch.uint8 and layer.codebooks.dtype == torch.float16


@pytest.mark.parametrize("options", [{}, {"max_shard_size": "50KB"}, {"variant": "fp16"}])
def test_layers_in_8_bit_come_back(tmp_path, options):
    unet = quantized_unet(overrides={".*conv1": None}, unquantized_nbits=8)
    unet.save_pretrained(tmp_path, **options)
    again = UNet2DConditionModel.from_pretrained(tmp_path, variant=options.get("variant"))
    names = set(int8_layers(again))
    assert {"time_embedding.linear_1", "add_embedding.linear_2", "mid_block.resnets.1.conv1"} <= names
    assert names == set(int8_layers(unet)) and not {"conv_in", "conv_out"} & names
    assert_same_tensors(again, unet)
    assert_close_outputs(run(again), run(unet))
    unet.dequantize()
    assert not int8_layers(unet) and (run(unet.float()) - run(again)).norm() < 0.02 * run(again).norm()


@pytest.mark.parametrize(("unquantized_nbits", "version"), [(16, 1), (8, 2)])
def test_a_file_is_of_the_oldest_version_that_holds_it(tmp_path, unquantized_nbits, version):
    quantized_unet(unquantized_nbits=unquantized_nbits).save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert written["format_version"] == version and ("rounded" in written) == (version == 2)


def variable_unet() -> UNet2DConditionModel:
    """A tiny SDXL UNet with random codes of variable rate that share codebooks."""
    unet = tiny_unet("sdxl")
    spec = CodeSpec(1, 6, 4, shared_codebooks="unet_0to6_1x4")
    codebooks = torch.randn(CodeSpec(1, 6, 4, shared_codebooks="shared", row_bits=1).codebooks_shape).half()
    for layer in select_layers(unet, "default", 0, spec, {}):
        own = spec.changed(row_bits=2 * (layer.columns // 4) + 1)
        quantized = swap(unet, layer.name, own)
        quantized.shared[0].fill(own.shared_codebooks, codebooks)
        quantized.set_code(replace(random_code(own, layer.rows, layer.columns), codebooks=codebooks))
    mark_quantized(unet)
    return unet


def test_variable_rate_is_version_3_and_round_trips(tmp_path):
    unet = variable_unet()
    unet.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["quantization_config"]["format_version"] == 3
    again = UNet2DConditionModel.from_pretrained(tmp_path)
    assert_same_tensors(again, unet)
    assert_close_outputs(run(again), run(unet), gain=100)  # the entries are of size one


@pytest.mark.parametrize("change", [lambda widths: widths.flip(0) + 1, lambda widths: widths * 0 + 255])
def test_widths_that_would_read_elsewhere_are_refused(tmp_path, change):
    variable_unet().save_pretrained(tmp_path)
    path, name = tmp_path / "diffusion_pytorch_model.safetensors", "mid_block.resnets.0.conv1.code_widths"
    tensors = load_file(path)
    save_file(tensors | {name: change(tensors[name])}, path, {"format": "pt"})
    with pytest.raises(ValueError, match=f"{name} do not add up to row_bits"):
        UNet2DConditionModel.from_pretrained(tmp_path)


def trellis_unet(scales: str = "logarithms") -> UNet2DConditionModel:
    """A tiny SDXL UNet with random rings of a trellis in every layer; columns of width 0 and of many widths."""
    unet, generator = tiny_unet("sdxl"), torch.Generator().manual_seed(0)
    spec = CodeSpec(1, 6, 1, input_channel_scales=True, shared_codebooks="trellis_6")
    for layer in select_layers(unet, "default", 0, spec, {}):
        T = trellis.segment_rows(layer.rows)
        allowed = torch.tensor(trellis.allowed_widths(T, 6))
        widths = allowed[torch.randint(len(allowed), (layer.columns,), generator=generator)]
        own = spec.changed(
            segment_rows=T, segment_bits=int(widths.sum()) * T // 4, log_scales=True, scale_exponent=layer.rows % 5 - 6
        )
        quantized = swap(unet, layer.name, own)
        quantized.shared[0].fill("trellis_6", trellis.table(6).view(1, -1, 1, 1))
        tensors = quantized.stored_tensors()
        tensors["code_widths"].copy_(widths)
        for name, low, high in (
            ("codes", 0, 256),
            ("scale_logarithms", 120, 136),
            ("input_scale_logarithms", 110, 140),
        ):
            tensors[name].copy_(torch.randint(low, high, tensors[name].shape, generator=generator))
    if scales == "float16":
        float_scales(unet)
    mark_quantized(unet)
    return unet


@pytest.mark.parametrize("scales", ["logarithms", "float16"])
def test_trellis_codes_are_version_4_and_round_trip(tmp_path, scales):
    unet = trellis_unet(scales)
    unet.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert config["format_version"] == 4 and config["code"].get("log_scales", False) == (scales == "logarithms")
    again = UNet2DConditionModel.from_pretrained(tmp_path)
    before, after = unet.state_dict(), again.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    specs = [{name: layer.spec for name, layer in quantized_layers(one).items()} for one in (unet, again)]
    assert specs[0] == specs[1] and len(set(specs[0].values())) > 3
    assert_close_outputs(run(again), run(unet), gain=10)


def exchanged(widths):
    """One width up and another down by one, so that one of them is less than a bit."""
    changed = widths.clone()
    changed[(widths == 4).nonzero()[0]] -= 1
    changed[(widths == 5).nonzero()[0]] += 1
    return changed


@pytest.mark.parametrize("change", [lambda widths: widths + 1, lambda widths: widths * 0, exchanged])
def test_widths_that_no_trellis_has_are_refused(tmp_path, change):
    trellis_unet().save_pretrained(tmp_path)
    path, name = tmp_path / "diffusion_pytorch_model.safetensors", "mid_block.resnets.0.conv1.code_widths"
    tensors = load_file(path)
    assert (change(tensors[name]) != tensors[name]).any()
    save_file(tensors | {name: change(tensors[name])}, path, {"format": "pt"})
    with pytest.raises(ValueError, match=f"{name} do not add up to segment_bits"):
        UNet2DConditionModel.from_pretrained(tmp_path)


def test_casting_what_is_plain_leaves_stored_tensors_alone():
    unet = quantized_unet(unquantized_nbits=8)
    cast_plain(unet, torch.bfloat16)
    assert unet.time_embedding.linear_1.scales.dtype == unet.mid_block.resnets[0].conv1.codebooks.dtype == torch.float16
    assert unet.time_embedding.linear_1.bias.dtype == unet.conv_in.weight.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda tensors: tensors.pop(ROUNDED_VICTIM), f"lacks 1 tensors, the first is {ROUNDED_VICTIM}"),
        (lambda tensors: tensors.update({ROUNDED_VICTIM: tensors[ROUNDED_VICTIM][:1].clone()}), ROUNDED_VICTIM),
        (lambda tensors: tensors.pop(VICTIM), f"lacks 1 tensors, the first is {VICTIM}"),
        (lambda tensors: tensors.update(ghost=tensors[VICTIM].clone()), "holds 1 unknown tensors, the first is ghost"),
        (lambda tensors: tensors.update({VICTIM: tensors[VICTIM][:1].clone()}), VICTIM),
    ],
    ids=["missing 8 bit", "wrong shape 8 bit", "missing", "extra", "wrong shape"],
)
def test_a_wrong_checkpoint_is_an_error_that_names_the_tensor(tmp_path, change, words):
    quantized_unet(unquantized_nbits=8).save_pretrained(tmp_path)
    path = tmp_path / "diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, {"format": "pt"})
    with pytest.raises((ValueError, RuntimeError), match=words):
        UNet2DConditionModel.from_pretrained(tmp_path)


@pytest.mark.parametrize("change", ["lacks", "holds"])
def test_shards_that_are_not_what_their_index_says_are_refused(tmp_path, change):
    quantized_unet().save_pretrained(tmp_path, max_shard_size="100KB")
    index = json.loads((tmp_path / "diffusion_pytorch_model.safetensors.index.json").read_text())
    path = tmp_path / index["weight_map"][VICTIM]
    tensors = load_file(path)
    if change == "holds":
        tensors["ghost"] = tensors[VICTIM].clone()
    else:
        del tensors[VICTIM]
    save_file(tensors, path, {"format": "pt"})
    with pytest.raises(ValueError, match=f"{change} 1 .*, the first is {'ghost' if change == 'holds' else VICTIM}"):
        UNet2DConditionModel.from_pretrained(tmp_path)


def test_a_whole_pipeline_in_shards_of_a_variant(tmp_path, pipelines):
    pipeline = StableDiffusionXLPipeline.from_pretrained(pipelines["sdxl"])
    pipeline.unet = quantized_unet()
    pipeline.save_pretrained(tmp_path, variant="fp16", max_shard_size="100KB")
    assert len(list(tmp_path.glob("unet/*.fp16-*.safetensors"))) > 1
    again = StableDiffusionXLPipeline.from_pretrained(tmp_path, variant="fp16", dtype=torch.bfloat16)
    layer = again.unet.mid_block.resnets[0].conv1
    assert layer.codes.dtype == torch.uint8 and layer.bias.dtype == again.vae.dtype == torch.bfloat16
    assert image_of(again).isfinite().all()


def test_a_pickled_checkpoint_is_refused(tmp_path):
    unet = quantized_unet()
    unet.save_pretrained(tmp_path)
    (tmp_path / "diffusion_pytorch_model.safetensors").unlink()
    torch.save(unet.state_dict(), tmp_path / "diffusion_pytorch_model.bin")
    with pytest.raises(ValueError, match=r"diffusion_pytorch_model\.bin is not a safetensors file"):
        UNet2DConditionModel.from_pretrained(tmp_path)


def test_sharded_files_load(tmp_path):
    unet = quantized_unet()
    unet.save_pretrained(tmp_path, max_shard_size="100KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    assert_same_tensors(UNet2DConditionModel.from_pretrained(tmp_path), unet)


def test_variants_and_deepcopy(tmp_path):
    unet = quantized_unet()
    unet.save_pretrained(tmp_path, variant="fp16")
    assert [path.name for path in tmp_path.glob("*.safetensors")] == ["diffusion_pytorch_model.fp16.safetensors"]
    again = UNet2DConditionModel.from_pretrained(tmp_path, variant="fp16")
    for twin in (again, copy.deepcopy(again), copy.deepcopy(unet)):
        assert_same_tensors(twin, unet)
        assert_close_outputs(run(twin), run(unet))


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
        (lambda config: config.update(format_version=5), "format_version is 5; this vqdm reads 1 to 4"),
        (lambda config: config.update(rounded=["no.such"]), "names layer no.such"),
        (lambda config: config.update(rounded=[VICTIM[:-10]]), "which is a QuantizedConv2d"),
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
    config = VqdmConfig.of(quantized_unet(unquantized_nbits=8))
    text = json.dumps(config.to_dict())
    assert VqdmConfig(**json.loads(text)).to_dict() == config.to_dict()
