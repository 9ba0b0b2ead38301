import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from vqdm.additive.code import CodeSpec
from vqdm.diffusion.blocks import Layer
from vqdm.errors import RunError, UserError
from vqdm.storage.files import save_checked
from vqdm.storage.hessian_store import HessianStore

SETTINGS = {"model": "abc", "sampling": {"num_inference_steps": 2}}


def layer(name, kind="linear", **changes):
    return Layer(name, "mid_block", kind, 4, 4, CodeSpec(**changes))


def test_layers_that_share_an_input_share_a_file(tmp_path):
    store = HessianStore(tmp_path / "new", SETTINGS)
    hessian, other = (one + one.T for one in torch.rand(2, 4, 4))
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


@pytest.mark.parametrize("columns", [1, 2, 37])
def test_half_of_a_symmetric_matrix_is_stored_and_comes_back_exactly(tmp_path, columns):
    one, store = replace(layer("a"), columns=columns), HessianStore(tmp_path, SETTINGS)
    hessian = torch.randn(columns, columns)
    hessian += hessian.T.clone()
    store.save([one], hessian, 2 * hessian)
    held = load_file(tmp_path / "a.safetensors")
    assert {tensor.numel() for tensor in held.values()} == {columns * (columns + 1) // 2}
    for found, wanted in zip(store.load(one), (hessian, 2 * hessian), strict=True):
        assert torch.equal(found, wanted)


def test_whole_matrices_of_an_earlier_cache_are_read(tmp_path):
    store = HessianStore(tmp_path, SETTINGS)
    store.save([layer("a")], torch.eye(4), None)
    save_checked({"hessian": 3 * torch.eye(4)}, tmp_path / "a.safetensors")
    assert torch.equal(store.load(layer("a"))[0], 3 * torch.eye(4))
    save_checked({"hessian": torch.zeros(9)}, tmp_path / "a.safetensors")
    with pytest.raises(RunError, match=r"a\.safetensors is missing or damaged"):
        store.load(layer("a"))
