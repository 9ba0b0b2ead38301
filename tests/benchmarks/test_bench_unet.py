"""The UNet benchmark on a tiny UNet, its random models, and what it weighs."""

import json

import bench_unet
import pytest
import rivals
import torch
from conftest import tiny_unet
from random_unets import empty_coded, random_coded, random_plain, stored_bits
from sdxl import CONFIG

from vqdm.additive.code import CodeSpec
from vqdm.layers.quantized import quantized_layers
from vqdm.storage.hf import mark_quantized

TINY = ["--height", "64", "--width", "128", "--batch", "2", "--steps", "1", "--tokens", "5", "--device", "cpu"]


def lines(capsys, words):
    bench_unet.main([*TINY, *words])
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


@pytest.mark.parametrize("quantized", [False, True])
def test_every_variant_has_its_row_or_its_reason(quantized, tmp_path, capsys, monkeypatch):
    def unable(unet):
        raise ImportError("no such package\nat all")

    monkeypatch.setattr(bench_unet, "RIVALS", {"missing": unable, "half": lambda unet: unet})
    unet = tiny_unet("sdxl")
    if quantized:
        unet = random_coded(dict(unet.config), CodeSpec(2, 4, 4), torch.float32, "cpu")
        mark_quantized(unet)
    unet.save_pretrained(tmp_path / "unet")
    words = ["--model", str(tmp_path), "--code", "2x4g4", "--paths", "torch", "native", "--backends", "missing", "half"]
    first, *rest = lines(capsys, [*words, *(["--plot", str(tmp_path / "p.png")] if quantized else [])])
    assert first["model"] == str(tmp_path) and first["dtype"] == "float32" and first["height"] == 64
    assert rest[0] == {"variant": "missing", "skipped": "ImportError: no such package"}
    rows = {row["variant"]: row for row in rest[1:]}
    assert list(rows) == ["full precision", "ours torch", "ours native", "half"]
    assert rows["full precision"]["ratio"] == 1 and all(row["least_ms"] > 0 for row in rows.values())
    plain, ours = (rows[name]["weights_mb"] for name in ("full precision", "ours native"))
    assert abs(plain - 4e-6 * sum(tensor.numel() for tensor in tiny_unet("sdxl").parameters())) < 0.03 and ours < plain
    assert rows["half"]["peak_mb"] > plain and 2 < rows["ours torch"]["stored_bits"] < 4
    assert (tmp_path / "p.png").exists() == quantized


def test_a_random_model_is_as_large_as_it_says_and_its_step_is_finite():
    config = dict(tiny_unet("sdxl").config)
    plain = random_plain(config, torch.bfloat16, "cpu")
    ours = random_coded(config, CodeSpec(1, 6, 4), torch.bfloat16, "cpu")
    codes = sum(layer.codes.numel() for layer in quantized_layers(ours).values())
    weights = sum(layer._rows * layer._columns for layer in quantized_layers(ours).values())
    scales = sum(2 * layer._rows for layer in quantized_layers(ours).values())
    assert stored_bits(ours) == 8 * (codes + scales + 2 * 64 * 4) / weights
    assert {tensor.dtype for tensor in plain.parameters()} == {torch.bfloat16}
    assert next(iter(quantized_layers(ours).values())).scales.dtype == torch.float16
    for unet in (plain, ours):
        step = bench_unet.unet_inputs(unet, 1, 64, 64, 3)
        with torch.no_grad():
            found = unet(**step).sample
        assert found.shape == (1, 4, 8, 8) and found.isfinite().all() and found.float().std() > 1e-3


@pytest.mark.long
def test_sdxl_at_three_bits_holds_less_than_its_bound():
    unet = empty_coded(CONFIG, CodeSpec(1, 12, 4), torch.float16)
    assert len(quantized_layers(unet)) == 771 and 3 < stored_bits(unet) < 3.02
    assert sum(tensor.nbytes for tensor in unet.parameters()) < 1.3e9


def test_gguf_bytes_are_those_of_the_format():
    weight = torch.randn(3, 64)
    weight[1, :32] = 0
    packed = rivals.q4_0(weight)
    assert packed.shape == (3, 2 * 18)
    blocks = packed.view(3, 2, 18)
    scale, nibbles = blocks[..., :2].contiguous().view(torch.float16), blocks[..., 2:]
    levels = torch.cat([nibbles & 15, nibbles >> 4], dim=-1).float() - 8
    error = (levels * scale.float()).view(3, 64) - weight
    assert (error.view(3, 2, 32).abs() <= 1.01 * scale.abs()).all()


def test_bytes_of_tensors_that_share_memory_count_once():
    model = torch.nn.Linear(4, 8, bias=False)
    model.twin = torch.nn.Parameter(model.weight.detach())
    model.register_buffer("other", torch.zeros(3))
    assert rivals.held_bytes(model) == 4 * 4 * 8 + 4 * 3


@pytest.mark.parametrize("name", rivals.RIVALS)
def test_rivals_that_are_installed_come_near_the_plain_layer(name):
    pytest.importorskip(name.split()[0])
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(128, 128)).bfloat16().requires_grad_(False)
    model.dtype = torch.bfloat16
    x = torch.randn(4, 128, dtype=torch.bfloat16)
    wanted = model(x)
    found = rivals.RIVALS[name](model)(x)
    assert not torch.equal(found, wanted) and (found - wanted).norm() < 0.7 * wanted.norm()
