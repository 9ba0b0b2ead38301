"""What shapes alone say of a UNet, against real calls of it."""

import pytest
import torch
from conftest import FAMILIES, meta_unet, tiny_unet
from sdxl import CONFIG

from vqdm.additive.code import CodeSpec
from vqdm.diffusion.blocks import select_layers
from vqdm.diffusion.hessians import shared_inputs
from vqdm.diffusion.shapes import input_groups, meta_call
from vqdm.quantization.plan import hessian_bytes

SPEC = CodeSpec(1, 3, 4)


def names(groups) -> list[list[str]]:
    return [[layer.name for layer in group] for group in groups]


@pytest.mark.parametrize("family", FAMILIES)
def test_shared_inputs_are_those_of_a_real_call(family):
    unet = tiny_unet(family)
    layers, meta = select_layers(unet, "default", 0, SPEC, {}), meta_unet(unet.config, torch.bfloat16)
    call = {
        name: {key: torch.randn(one.shape) for key, one in value.items()}
        if isinstance(value, dict)
        else torch.randn(value.shape)
        for name, value in meta_call(meta, 8, 8).items()
    }
    assert names(input_groups(meta, layers, 8, 8)) == names(shared_inputs(unet, layers, call))
    assert meta.dtype == torch.bfloat16 and all(tensor.is_meta for tensor in meta.parameters())


def test_a_unet_with_other_arguments_counts_every_layer():
    meta = meta_unet(dict(tiny_unet("sd15").config) | {"class_embed_type": "timestep", "_use_default_values": []})
    layers = select_layers(meta, "default", 0, SPEC, {})
    assert names(input_groups(meta, layers, 8, 8)) == [[layer.name] for layer in layers]


def test_the_hessians_of_sdxl():
    """492 inputs of 771 layers; 8 bytes each for half of a matrix."""
    unet = meta_unet(CONFIG)
    layers = select_layers(unet, "default", 0, SPEC, {})
    groups = input_groups(unet, layers, 128, 128)
    assert (len(layers), len(groups)) == (771, 492)
    whole = sum(8 * group[0].columns ** 2 for group in groups)
    assert hessian_bytes(groups, 8.0, all_kept=True) == pytest.approx(whole / 2, rel=1e-3)
    assert 2e9 < hessian_bytes(groups, 8.0, all_kept=False) < 8e9
    assert hessian_bytes(groups, 0.1, all_kept=False) == pytest.approx(4 * 23040**2, rel=1e-3)  # one at least
