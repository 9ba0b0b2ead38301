"""What quantized UNets of other packages are charged, and the rows that compare them."""

import json
import sys

import bench_rivals
import pytest
import torch
from conftest import tiny_unet
from random_unets import random_coded, stored_bits
from torch import nn

from vqdm.additive.code import CodeSpec
from vqdm.layers.quantized import quantized_layers
from vqdm.storage.hf import mark_quantized


class Halved(nn.Linear):
    """A linear layer of another package: its weight in 8 bit, which nobody can run."""

    def __init__(self, layer: nn.Linear):
        nn.Module.__init__(self)
        self.register_buffer("weight", layer.weight.data.to(torch.int8))
        self.bias = layer.bias


def test_bits_are_those_of_the_tensors_that_replace_weights():
    plain = tiny_unet("sdxl")
    assert bench_rivals.bits_of(plain, plain) == {"bits_of_quantized_weights": None, "bits_of_model": 16}
    ours = random_coded(dict(plain.config), CodeSpec(2, 4, 4), torch.float32, "cpu")
    layers = quantized_layers(ours).values()
    weights = sum(layer._rows * layer._columns for layer in layers)
    assert bench_rivals.changed_weights(ours, plain) == weights
    assert bench_rivals.bits_of(ours, plain)["bits_of_quantized_weights"] == pytest.approx(stored_bits(ours))


def test_other_packages_pay_for_what_they_change_alone():
    plain, other = tiny_unet("sdxl"), tiny_unet("sdxl")
    for name, layer in plain.named_modules():
        if type(layer) is nn.Linear:
            other.set_submodule(name, Halved(layer))
    linear = sum(layer.weight.numel() for layer in plain.modules() if type(layer) is nn.Linear)
    parameters = sum(tensor.numel() for tensor in plain.parameters())
    found = bench_rivals.bits_of(other, plain)
    assert found["bits_of_quantized_weights"] == pytest.approx(8)
    assert found["bits_of_model"] == pytest.approx(16 - 8 * linear / parameters)


def test_every_package_has_its_row_or_its_reason(pipelines, prompt_file, tmp_path, capsys, monkeypatch):
    def unable(unet):
        raise ImportError("no such package\nat all")

    ours = random_coded(dict(tiny_unet("sdxl").config), CodeSpec(2, 4, 4), torch.float32, "cpu")
    mark_quantized(ours)
    ours.save_pretrained(tmp_path / "ours")
    monkeypatch.setattr(bench_rivals, "RIVALS", {"missing": unable, "same": lambda unet: unet})
    words = ["--quantized", str(tmp_path / "ours"), "--nsamples", "1", "--num_inference_steps", "1", "--bs", "1"]
    plot = tmp_path / "plot.png"
    words = [str(pipelines["sdxl"]), str(prompt_file), *words, "--plot", str(plot)]
    monkeypatch.setattr(sys, "argv", ["bench_rivals.py", *words])
    bench_rivals.main()
    rows = {row["model"]: row for row in map(json.loads, capsys.readouterr().out.splitlines())}
    assert rows["missing"]["unable"] == "ImportError: no such package"
    assert rows["same"]["output_error_db"] < -100
    assert -70 < rows["bfloat16"]["output_error_db"] < -30 < rows["vqdm ours"]["output_error_db"]
    assert rows["vqdm ours"]["bits_of_model"] < 16 and plot.is_file()
