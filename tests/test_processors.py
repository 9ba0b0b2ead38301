"""The stand-ins for other processors do what tests expect of them."""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from conftest import tiny_pipeline
from diffusers import UNet2DConditionModel
from numerics import assert_close_outputs
from processors import is_odd, odd_copy, other_last_bits, path_of_started_programs
from safetensors.torch import load_file, save_file
from test_hf import quantized_unet, run
from torch.nn import functional as F
from transformers import CLIPTextModel


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_an_odd_copy_is_equal_and_lies_at_a_whole_element(dtype):
    tensor = torch.arange(12).view(3, 4).to(dtype)
    copy = odd_copy(tensor)
    assert torch.equal(copy, tensor) and copy.dtype == dtype
    assert copy.data_ptr() % 16 and not copy.data_ptr() % copy.element_size()


def test_odd_addresses_reach_every_loader(tmp_path, odd_addresses):
    quantized_unet().save_pretrained(tmp_path / "unet")
    tiny_pipeline("sdxl").text_encoder.save_pretrained(tmp_path / "text")
    save_file({"a": torch.ones(3)}, tmp_path / "a.safetensors")
    assert is_odd(load_file(tmp_path / "a.safetensors")["a"])
    for kind, part in ((UNet2DConditionModel, "unet"), (CLIPTextModel, "text")):
        model = kind.from_pretrained(tmp_path / part)
        assert all(map(is_odd, model.parameters())), part


@pytest.fixture
def perturbed():
    with other_last_bits():
        yield


x, w, b = (torch.randn(shape, generator=torch.Generator().manual_seed(0)) for shape in ((6, 32), (7, 32), (7,)))
image, kernel = (
    torch.randn(shape, generator=torch.Generator().manual_seed(0)) for shape in ((2, 4, 8, 8), (5, 4, 3, 3))
)
PRODUCTS = {
    "linear": (lambda w: F.linear(x, w, b), w),
    "matmul": (lambda w: x @ w.T, w),
    "batched": (lambda w: torch.einsum("bi,boi->bo", x, w.expand(6, 7, 32)), w),
    "vector": (lambda w: w @ x[0], w),
    "float64": (lambda w: x.double() @ w.T, w.double()),
    "conv2d": (lambda w: F.conv2d(image, w, b[:5]), kernel),
}


@pytest.mark.parametrize(("product", "weight"), PRODUCTS.values(), ids=PRODUCTS)
def test_last_bits_follow_addresses_and_repeat(product, weight):
    plain = product(weight)
    with other_last_bits():
        found, again, other = product(weight), product(weight.clone()), product(odd_copy(weight))
        with ThreadPoolExecutor(1) as threads:
            assert torch.equal(threads.submit(product, weight).result(), found)
    assert torch.equal(found, again) and not torch.equal(found, other)
    assert torch.equal(found, plain) == bool(os.environ.get("VQDM_TEST_PERTURB"))  # which perturbs `plain` as well
    for one in (found, other):
        assert_close_outputs(one, plain)
    assert torch.equal(product(weight), plain)


def test_last_bits_follow_batch_sizes(perturbed):
    assert not torch.equal(F.linear(x, w)[:3], F.linear(x[:3], w))


def test_what_every_order_gives_exactly_stays(perturbed):
    whole = (8 * x).round()
    assert torch.equal(whole @ whole.T, (whole.double() @ whole.double().T).float())
    assert torch.equal(torch.eye(6)[[3, 1]] @ x, x[[3, 1]])
    assert torch.equal(x[:, :1] @ w[:1, :1], x[:, :1] * w[0, 0])


def test_gradients_go_through(perturbed):
    weight = w.clone().requires_grad_()
    F.linear(x, weight).sum().backward()
    assert_close_outputs(weight.grad, x.sum(0).expand(7, 32))


def test_a_model_whose_weights_were_mapped_differs_in_rounding_alone(tmp_path, odd_addresses, perturbed):
    """What an AMD processor shows: equal tensors, unequal last bits."""
    unet = quantized_unet()
    unet.save_pretrained(tmp_path)
    found, expected = run(UNet2DConditionModel.from_pretrained(tmp_path)), run(unet)
    assert not torch.equal(found, expected)
    assert_close_outputs(found, expected, gain=4)  # every product on the way is perturbed, in each of the layers


def test_started_programs_compute_alike():
    environment = os.environ | {"VQDM_TEST_PERTURB": "1", "PYTHONPATH": path_of_started_programs()}
    line = "import torch; print((torch.full((2, 3), 0.1) @ torch.full((3, 2), 0.1)).tolist())"
    found = subprocess.check_output([sys.executable, "-c", line], text=True, env=environment)
    with other_last_bits():
        expected = (torch.full((2, 3), 0.1) @ torch.full((3, 2), 0.1)).tolist()
    assert found.strip() == str(expected)
