import os
import sys
from collections import OrderedDict

import pytest
import torch
from original_vqdm import original_layer, original_modules, original_unet, save_original
from torch import nn

from vqdm.additive.code import AdditiveCode
from vqdm.errors import UserError
from vqdm.storage.original import StandIn, load_pickle, stored_layer, tensors_and_specs

SETTINGS = {
    "plain": {},
    "narrow signed codes": dict(code_dtype=torch.int8, nbits=8),
    "wide codes": dict(code_dtype=torch.int64),
    "groupwise": dict(groupwise=True),
    "input scales": dict(input_scales=True),
    "a scale per group": dict(scale_nbits=16),
    "few scales": dict(scale_nbits=2, straight_through=True),
    "indexed scales": dict(scale_nbits=1),
    "lossless scales": dict(scale_nbits=3),
    "quantized values": dict(value_nbits=3, value_groups=4),
    "channels outermost": dict(group_channels=False),
}


def passed_through(value, tmp_path):
    with original_modules():
        torch.save(value, tmp_path / "one.pickle")
    return load_pickle(tmp_path / "one.pickle")


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("plain", [nn.Linear(16, 8), nn.Conv2d(8, 6, (3, 1), bias=False)], ids=["linear", "conv"])
def test_a_layer_decodes_to_the_same_matrix(tmp_path, settings, plain):
    torch.manual_seed(0)
    layer = original_layer(plain, **settings)
    spec, tensors = stored_layer("layer", passed_through(layer, tmp_path))
    matrix = AdditiveCode.unpack(spec, (len(plain.weight), plain.weight[0].numel()), tensors).dequantize()
    torch.testing.assert_close(matrix, layer.quantized_weight().detach(), rtol=2e-3, atol=2e-3)
    if isinstance(plain, nn.Conv2d):
        assert spec.group_channels == settings.get("group_channels", True)
    assert {name: (tuple(t.shape), t.dtype) for name, t in tensors.items()} == spec.tensor_shapes(*matrix.shape)


def test_all_tensors_of_a_unet_are_found_under_their_names(tmp_path):
    unet = original_unet({"mid_block.resnets.0.conv1": {}, "mid_block.attentions.0.proj_in": {}})
    tensors, specs = tensors_and_specs(load_pickle(save_original(unet, tmp_path / "unet.pickle")))
    assert set(specs) == {"mid_block.resnets.0.conv1", "mid_block.attentions.0.proj_in"}
    plain = {name for name in unet.state_dict() if "quantized_weight" not in name and "_dummy" not in name}
    assert plain == {name for name in tensors if not name.endswith(("codes", "codebooks", "scales"))}
    assert torch.equal(tensors["conv_in.weight"], unet.conv_in.weight)


class Trap:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("module", ["os", "posix", "subprocess", "builtins", "torch.utils", "diffusersx", "srcx"])
def test_other_names_are_refused(tmp_path, module, monkeypatch):
    trap = type("system", (), {"__module__": module})
    monkeypatch.setitem(sys.modules, module, sys.modules.get(module) or type(os)(module))
    monkeypatch.setattr(sys.modules[module], "system", trap, raising=False)
    torch.save(OrderedDict(a=trap()), tmp_path / "bad.pickle")
    with pytest.raises(UserError, match=r"the pickle names [\w.]+\.system, which no UNet"):
        load_pickle(tmp_path / "bad.pickle")


def test_nothing_that_a_pickle_asks_for_is_called(tmp_path):
    torch.save(Trap(str(tmp_path / "made")), tmp_path / "bad.pickle")
    with pytest.raises(UserError, match=r"names \w+\.mkdir"):
        load_pickle(tmp_path / "bad.pickle")
    assert not (tmp_path / "made").exists()


def test_stand_ins_import_nothing(tmp_path):
    """A name below `diffusers.` may be anything; it becomes a class that does nothing."""
    layer = nn.Linear(4, 4)
    layer.activation = nn.functional.gelu
    loaded = passed_through(layer, tmp_path)
    assert isinstance(loaded, StandIn) and type(loaded).__name__ == "Linear" and type(loaded) is not nn.Linear
    assert torch.equal(loaded._parameters["weight"], layer.weight)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda path: path.write_bytes(b"not a zip"), "is not a file of torch.save"),
        (lambda path: torch.save({"a": torch.ones(1)}, path), "no layer in it is a quantized one"),
        (lambda path: torch.jit.script(nn.Linear(2, 2)).save(path), "is a TorchScript file"),
        (lambda path: torch.save(nn.Linear(2, 2), path), "no layer in it is a quantized one"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*torch.jit")
def test_other_files_are_refused(tmp_path, make, words):
    make(tmp_path / "file")
    with pytest.raises(UserError, match=words):
        tensors_and_specs(load_pickle(tmp_path / "file"))


def test_a_layer_without_its_parts_is_named(tmp_path):
    layer = original_layer(nn.Linear(8, 8))
    del layer.quantized_weight.codebooks
    with pytest.raises(UserError, match=r"layer some\.name is not one of the original"):
        stored_layer("some.name", passed_through(layer, tmp_path))
    layer = original_layer(nn.Linear(8, 8))
    layer.quantized_weight.codebooks.data[0, 0, 0] = 1e9
    with pytest.raises(UserError, match=r"layer some\.name: its codebooks hold values that are not finite"):
        stored_layer("some.name", passed_through(layer, tmp_path))
