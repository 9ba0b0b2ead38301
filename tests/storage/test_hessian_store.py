import json

import pytest
import torch

from vqdm.additive.code import CodeSpec
from vqdm.diffusion.blocks import Layer
from vqdm.errors import RunError, UserError
from vqdm.storage.hessian_store import HessianStore

SETTINGS = {"model": "abc", "sampling": {"num_inference_steps": 2}}


def layer(name, kind="linear", **changes):
    return Layer(name, "mid_block", kind, 4, 4, CodeSpec(**changes))


def test_layers_that_share_an_input_share_a_file(tmp_path):
    store = HessianStore(tmp_path / "new", SETTINGS)
    hessian, other = torch.rand(4, 4), torch.rand(4, 4)
    store.save([layer("a"), layer("b")], hessian, other)
    store.save([layer("c")], other, None)
    again = HessianStore(tmp_path / "new", SETTINGS)
    assert layer("b") in again and layer("d") not in again
    found = again.load(layer("b"))
    assert torch.equal(found[0], hessian) and torch.equal(found[1], other)
    assert again.load(layer("c"))[1] is None
    assert again.groups([layer("a"), layer("c"), layer("b")]) == [[layer("a"), layer("b")], [layer("c")]]
    assert len(list((tmp_path / "new").glob("*.safetensors"))) == 2


def test_the_order_of_a_convolutions_columns_counts(tmp_path):
    store = HessianStore(tmp_path, SETTINGS)
    store.save([layer("a", "conv")], torch.eye(4), None)
    assert layer("a", "conv", group_channels=False) not in store
    assert layer("a", "conv") in store


def test_other_settings_are_named(tmp_path):
    HessianStore(tmp_path, SETTINGS).save([layer("a")], torch.eye(4), None)
    with pytest.raises(UserError, match=r"of another run: num_inference_steps was 2, now 3; choose"):
        HessianStore(tmp_path, {"model": "abc", "sampling": {"num_inference_steps": 3}})


@pytest.mark.parametrize("content", ["{", "[]", json.dumps({"settings": SETTINGS})])
def test_a_damaged_index_is_named(tmp_path, content):
    (tmp_path / "hessians.json").write_text(content)
    with pytest.raises(UserError, match=r"hessians\.json is damaged"):
        HessianStore(tmp_path, SETTINGS)


def test_a_missing_or_cut_file_is_named(tmp_path):
    store = HessianStore(tmp_path, SETTINGS)
    store.save([layer("a")], torch.eye(4), None)
    path = tmp_path / "a.safetensors"
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(RunError, match=r"a\.safetensors is missing or damaged"):
        store.load(layer("a"))
    path.unlink()
    with pytest.raises(RunError, match=r"a\.safetensors is missing or damaged"):
        store.load(layer("a"))
