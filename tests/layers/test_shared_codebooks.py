"""Layers that share codebooks: one copy in the model, in its files and on its device."""

import copy

import pytest
import torch
from conftest import tiny_unet
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file, save_file
from test_quantized import random_code
from torch import nn

from vqdm.additive.code import CodeSpec
from vqdm.layers.quantized import cast_plain, dequantize_layers, quantized_layers, swap
from vqdm.storage.hf import VqdmConfig, mark_quantized

SPEC = CodeSpec(2, 4, 4, shared_codebooks="unet_2x4_1x4")


def share(model, names):
    """Swap layers to random codes that share codebooks; returns their dequantized matrices."""
    matrices = {}
    for name in names:
        layer = swap(model, name, SPEC)
        code = random_code(SPEC, layer._rows, layer._columns)
        code.codebooks = torch.randn(SPEC.codebooks_shape, generator=torch.Generator().manual_seed(7)).half()
        layer.shared[0].fill(SPEC.shared_codebooks, code.codebooks)
        layer.set_code(code)
        matrices[name] = code.dequantize()
    return matrices


@pytest.fixture
def model():
    return nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 8), nn.Conv2d(4, 4, 3))


def test_the_model_holds_one_copy(model):
    matrices = share(model, ["0", "1", "2"])
    for name, matrix in matrices.items():
        torch.testing.assert_close(model.get_submodule(name).decoded_matrix(), matrix, rtol=2e-3, atol=2e-3)
    names = [name for name in model.state_dict() if "codebook" in name]
    assert names == ["codebook_banks.unet_2x4_1x4"]
    assert sum(p.numel() for p in model.codebook_banks.parameters()) == 2 * 16 * 4
    assert all("codebooks" not in layer.stored_tensors() for layer in quantized_layers(model).values())


def test_a_copy_has_its_own_codebooks(model):
    share(model, ["0"])
    other = copy.deepcopy(model)
    with torch.no_grad():
        model.codebook_banks.unet_2x4_1x4.zero_()
    assert model[0].weight.abs().sum() == 0 and other[0].weight.abs().sum() > 0
    assert other[0].shared[0] is other.codebook_banks


def test_codes_of_other_shared_codebooks_are_refused(model):
    share(model, ["0"])
    code = random_code(SPEC, 16, 8)
    with pytest.raises(ValueError, match="codebooks other than the shared unet_2x4_1x4"):
        model[0].set_code(code)


def test_shared_codebooks_of_another_shape_are_refused(model):
    share(model, ["0"])
    with pytest.raises(ValueError, match=r"unet_2x4_1x4 are \(2, 16, 1, 4\); a layer needs \(1, 16, 1, 4\)"):
        swap(model, "1", SPEC.changed(num_codebooks=1))


def test_casting_leaves_shared_codebooks_and_dequantizing_drops_them(model):
    matrices = share(model, ["0"])
    cast_plain(model, torch.float64)
    assert model.codebook_banks.unet_2x4_1x4.dtype == torch.float16 and model[1].weight.dtype == torch.float64
    dequantize_layers(model)
    assert not hasattr(model, "codebook_banks")
    torch.testing.assert_close(model[0].weight.float(), matrices["0"], rtol=2e-3, atol=2e-3)


def test_a_unet_keeps_its_shared_codebooks_in_its_files(tmp_path):
    unet = tiny_unet("sdxl")
    prefix = "mid_block.attentions.0.transformer_blocks.0.attn1."
    share(unet, [prefix + "to_q", prefix + "to_k"])
    config = mark_quantized(unet)
    assert config.to_dict()["format_version"] == 2 == VqdmConfig(**config.to_dict()).format_version
    unet.save_pretrained(tmp_path)
    names = [name for name in load_file(tmp_path / "diffusion_pytorch_model.safetensors") if "codebook" in name]
    assert names == ["codebook_banks.unet_2x4_1x4"]
    again = UNet2DConditionModel.from_pretrained(tmp_path)
    torch.testing.assert_close(
        again.get_submodule(prefix + "to_k").weight.float(), unet.get_submodule(prefix + "to_k").weight.float()
    )
    again.dequantize()
    assert not quantized_layers(again) and "codebook_banks" not in dict(again.named_children())


def test_missing_shared_codebooks_are_an_error_that_names_it(tmp_path):
    unet = tiny_unet("sdxl")
    share(unet, ["mid_block.attentions.0.transformer_blocks.0.attn1.to_q"])
    mark_quantized(unet)
    unet.save_pretrained(tmp_path)
    path = tmp_path / "diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    del tensors["codebook_banks.unet_2x4_1x4"]
    save_file(tensors, path, {"format": "pt"})
    with pytest.raises(ValueError, match=r"codebook_banks\.unet_2x4_1x4"):
        UNet2DConditionModel.from_pretrained(tmp_path)
