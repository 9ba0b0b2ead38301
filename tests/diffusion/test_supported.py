"""Models that cannot be calibrated are refused with a line, from their config.json files alone."""

import json
import shutil

import pytest
import torch
from conftest import tiny_unet
from torch import nn

from vqdm.diffusion.model_folders import check_loaded, check_supported, quantized_by
from vqdm.errors import UserError


@pytest.fixture
def changed(pipelines, tmp_path):
    """A copy of a pipeline's configuration files, without a weight, one of which is changed."""

    def of(file: str, change: dict) -> str:
        shutil.copytree(pipelines["sdxl"], tmp_path, ignore=shutil.ignore_patterns("*.safetensors"), dirs_exist_ok=True)
        config = json.loads((tmp_path / file).read_text())
        (tmp_path / file).write_text(json.dumps(config | change))
        return str(tmp_path)

    return of


@pytest.mark.parametrize("family", ["sdxl", "turbo", "sd15", "sd21"])
def test_text_to_image_pipelines_pass(pipelines, family):
    check_supported(str(pipelines[family]), None, False)


@pytest.mark.parametrize("method", ["vqdm", "bitsandbytes", "torchao", "gguf", "quanto", "sdnq", "anything"])
def test_a_quantized_unet_is_refused(changed, method):
    model = changed("unet/config.json", {"quantization_config": {"quant_method": method}})
    with pytest.raises(UserError) as refused:
        check_supported(model, None, False, role=", which is the teacher")
    line = f"MODEL {model} is quantized itself ({method}); give the full-precision model, which is the teacher"
    assert str(refused.value) == line


@pytest.mark.parametrize("file", ["quantization_config.json", "quanto_qmap.json"])
def test_files_beside_the_weights_count_too(changed, file):
    model = changed("unet/config.json", {"quantization_config": None})
    check_supported(model, None, False)
    with open(f"{model}/unet/{file}", "w") as beside:
        beside.write("{}")
    with pytest.raises(UserError, match=f"is quantized itself .{file}."):
        check_supported(model, None, False)


def test_a_quantized_text_encoder_stays_and_is_logged(changed, caplog):
    caplog.set_level("INFO", "vqdm")
    check_supported(changed("text_encoder/config.json", {"quantization_config": {"quant_method": "bnb"}}), None, False)
    assert "text_encoder of MODEL" in caplog.text and "is quantized (bnb) and stays as it is" in caplog.text


REFUSED = {
    "no UNet": ("model_index.json", {"unet": [None, None]}, "has no UNet; vqdm quantizes UNets"),
    "another UNet": (
        "model_index.json",
        {"unet": ["diffusers", "UNetMotionModel"]},
        "has a UNetMotionModel as its",
    ),
    "inpainting": ("unet/config.json", {"in_channels": 9}, "its UNet takes 9 channels and the VAE gives 4"),
    "pix2pix": ("unet/config.json", {"in_channels": 8}, "its UNet takes 8 channels and the VAE gives 4"),
    "classes": ("unet/config.json", {"num_class_embeds": 10}, "its UNet has num_class_embeds 10"),
    "class type": ("unet/config.json", {"class_embed_type": "timestep"}, "its UNet has class_embed_type 'timestep'"),
    "images": ("unet/config.json", {"encoder_hid_dim_type": "image_proj"}, "has encoder_hid_dim_type 'image_proj'"),
    "Kandinsky": ("unet/config.json", {"addition_embed_type": "image"}, "its UNet has addition_embed_type 'image'"),
}
for name in (
    "StableDiffusionXLInpaintPipeline",
    "StableDiffusionXLImg2ImgPipeline",
    "StableDiffusionInstructPix2PixPipeline",
    "StableDiffusionXLControlNetPipeline",
    "StableDiffusionXLPAGPipeline",
    "KandinskyV22Pipeline",
    "StableUnCLIPPipeline",
):
    REFUSED[name] = ("model_index.json", {"_class_name": name}, f"is a {name}, which is unsupported")


@pytest.mark.parametrize(("file", "change", "words"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_calibrated_is_refused(changed, file, change, words):
    with pytest.raises(UserError, match=words):
        check_supported(changed(file, change), None, False)


class Subclass(nn.Parameter):
    """As other libraries hold their weights in."""


INTEGERS = nn.Parameter(torch.zeros(16, 4, 3, 3, dtype=torch.int8), requires_grad=False)


@pytest.mark.parametrize("weight", [Subclass(torch.zeros(16, 4, 3, 3)), INTEGERS], ids=["class", "int8"])
def test_a_loaded_unet_is_looked_at_too(weight):
    unet = tiny_unet("sdxl")
    check_loaded(unet.half(), "m")
    unet.conv_in.weight = weight
    with pytest.raises(UserError, match=r"MODEL m is quantized itself \((Subclass|int8)\)"):
        check_loaded(unet, "m")
    assert quantized_by(tiny_unet("sdxl").to(torch.float8_e4m3fn)) == "float8_e4m3fn"
