import os
import subprocess
import sys

import pytest
from conftest import FAMILIES, tiny_unet
from tiny_transformers import tiny_transformer_pipeline
from torch import nn

from vqdm.additive.code import CodeSpec
from vqdm.diffusion.blocks import matrix_of, select_layers, unquantized_layers
from vqdm.diffusion.denoisers import block_of
from vqdm.errors import UserError

SPEC = CodeSpec(num_codebooks=2, nbits_per_codebook=4, in_group_size=4)
LEFT_ALONE = ("conv_in", "conv_out", "time_embedding", "add_embedding", "time_emb_proj")


def names(unet, layer_filter="default", min_channels=0, overrides=None):
    return [layer.name for layer in select_layers(unet, layer_filter, min_channels, SPEC, overrides or {})]


@pytest.mark.parametrize("family", FAMILIES)
def test_default_is_every_matrix_of_the_blocks_but_the_time_projections(family):
    unet = tiny_unet(family)
    every = {name for name, module in unet.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)}
    expected = {name for name in every if not any(word in name for word in LEFT_ALONE)}
    assert set(names(unet)) == expected
    assert set(names(unet, "linear_only")) | set(names(unet, "conv_only")) == expected
    assert not set(names(unet, "linear_only")) & set(names(unet, "conv_only"))
    assert set(names(unet, "all")) == expected | {name for name in every if "time_emb_proj" in name}


@pytest.mark.parametrize("family", FAMILIES)
def test_blocks_run_down_mid_up_in_module_order(family):
    unet = tiny_unet(family)
    blocks = list(dict.fromkeys(block_of(unet, name) for name in names(unet)))
    assert blocks == ["down_blocks.0", "down_blocks.1", "mid_block", "up_blocks.0", "up_blocks.1"]
    tree = [name for name, _ in unet.named_modules()]
    for block in blocks:
        inside = [tree.index(name) for name in names(unet) if block_of(unet, name) == block]
        assert inside == sorted(inside)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_rest_is_what_is_neither_quantized_nor_an_end(family):
    unet = tiny_unet(family)
    layers = select_layers(unet, "default", 0, SPEC, {r"mid_block.*conv1": None})
    every = {name for name, module in unet.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)}
    rest = unquantized_layers(unet, layers)
    assert set(rest) | {layer.name for layer in layers} | {"conv_in", "conv_out"} == every
    assert all(any(word in name for word in (*LEFT_ALONE[2:], "mid_block")) for name in rest)
    assert len(rest) == len(set(rest)) and "mid_block.resnets.0.conv1" in rest


def test_order_does_not_depend_on_the_hash_seed():
    code = "from test_blocks import *; print(names(tiny_unet('sdxl')))"
    path = os.pathsep.join(["tests", "tests/diffusion", "assets/make"])
    outputs = {
        subprocess.run(
            [sys.executable, "-c", code],
            env=os.environ | {"PYTHONHASHSEED": seed, "PYTHONPATH": path},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(outputs) == 1


def test_regex_and_min_channels():
    unet = tiny_unet("sdxl")
    assert names(unet, r"conv_out|attn1\.to_q")[-1] == "conv_out"
    assert names(unet, r"conv_in|mid_block\..*\.to_q")[0] == "conv_in"
    narrow = set(names(unet)) - set(names(unet, min_channels=32))
    assert narrow and all(min(unet.get_submodule(name).weight.shape[:2]) < 32 for name in narrow)


def test_overrides_change_or_drop_layers():
    unet = tiny_unet("sdxl")
    plan = {r".*\.to_q": {"num_codebooks": 5}, r".*\.ff\..*": None}
    layers = {layer.name: layer for layer in select_layers(unet, "default", 0, SPEC, plan)}
    assert all((layer.spec.num_codebooks == 5) == name.endswith("to_q") for name, layer in layers.items())
    assert not any(".ff." in name for name in layers)


@pytest.mark.parametrize(
    ("layer_filter", "spec", "overrides", "words"),
    [
        ("nothing_here", SPEC, {}, "--layer_filter nothing_here matches no layer"),
        ("(", SPEC, {}, "not a regular expression"),
        ("default", CodeSpec(in_group_size=5), {}, r"layer down_blocks.0.resnets.0.conv1: in_group_size 5"),
        ("conv_in", CodeSpec(in_group_size=6), {}, "layer conv_in: in_group_size 6 does not divide its 4 channels"),
        ("default", CodeSpec(out_group_size=3), {}, "out_group_size 3 does not divide"),
        ("default", SPEC, {"typo": None}, "typo matches none"),
        ("default", SPEC, {r".*": {"num_codebooks": 99}}, "num_codebooks is 99"),
        ("default", SPEC, {r".*": None}, "leaves no layer"),
    ],
)
def test_bad_choices_are_named(layer_filter, spec, overrides, words):
    with pytest.raises(UserError, match=words):
        select_layers(tiny_unet("sdxl"), layer_filter, 0, spec, overrides)


def test_matrix_of_runs_taps_outermost():
    conv = nn.Conv2d(3, 2, (1, 2))
    grouped, plain = matrix_of(conv, True), matrix_of(conv, False)
    for tap in range(2):
        for channel in range(3):
            assert (grouped[:, tap * 3 + channel] == conv.weight[:, channel, 0, tap]).all()
            assert (plain[:, channel * 2 + tap] == conv.weight[:, channel, 0, tap]).all()


def test_convolutions_in_groups_are_refused_by_name():
    sana = tiny_transformer_pipeline("sana").transformer
    with pytest.raises(UserError, match=r"conv_depth: a convolution in .* groups cannot be .*leave it out of"):
        select_layers(sana, "conv_depth", 0, CodeSpec(1, 4, 4), {})
    assert not [layer for layer in select_layers(sana, "default", 0, CodeSpec(1, 4, 4), {}) if "depth" in layer.name]
