"""Bits divided among layers as trellis codes, shared codebooks and the Hessian cache, on a tiny pipeline."""

import itertools
import json
import math
import random
import re

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, UNet2DConditionModel
from generate import main as generate
from main_text2image import PARSER, main
from PIL import Image
from settings_read import settings_read, undeclared
from tiny_runs import command, file_hashes
from tiny_transformers import tiny_transformer_pipeline

import vqdm
from vqdm.additive.code import CodeSpec
from vqdm.additive.trellis import allowed_widths
from vqdm.additive.trellis_solve import Curve
from vqdm.cli import run_script
from vqdm.diffusion.blocks import Layer
from vqdm.diffusion.sampling import output_error, record_evaluation
from vqdm.layers.quantized import quantized_layers
from vqdm.quantization.allocation import (
    LEAST_BITS,
    allocate,
    corrected,
    divide,
    lower_hull,
    offered,
    segment_bits,
    trellis_layer,
    width_total,
)
from vqdm.quantization.config import QuantizeConfig
from vqdm.quantization.plan import layer_bits
from vqdm.quantization.shared_codebooks import choose_layers, shared

ONLY = ["--layer_filter", r"mid_block.*attn1\.to|mid_block.*conv1"]


def target(pipelines, prompts, out, *extra):
    return command(pipelines["sdxl"], prompts, out, *ONLY, *extra)


@pytest.fixture(scope="module")
def read() -> set[str]:
    """Settings that the planned run has read."""
    return set()


@pytest.fixture(scope="module")
def planned(pipelines, prompt_file, tmp_path_factory, read):
    """A run to 3 bits that keeps its Hessians."""
    folder = tmp_path_factory.mktemp("planned")
    cache = ["--hessian_cache", str(folder / "cache")]
    words = target(pipelines, prompt_file, folder / "out", "--target_bits", "3", *cache)
    with settings_read(QuantizeConfig, read):
        assert run_script(main, words) == 0
    return folder


def test_a_setting_that_trellis_codes_ignore_says_so(planned, read, pipelines, prompt_file):
    assert not undeclared(PARSER, target(pipelines, prompt_file, planned, "--target_bits", "3"), read)


def counted_bits(unet):
    """Bits per weight of all quantized layers and what they share, as the model holds them."""
    layers = quantized_layers(unet)
    bits = sum(layer.stored_bits for layer in layers.values())
    bits += sum(16 * codebooks.numel() for codebooks in unet.codebook_banks.parameters())
    return bits / sum(layer._rows * layer._columns for layer in layers.values())


def test_the_target_is_kept_with_table_widths_and_scales(planned):
    summary = json.loads((planned / "out" / "summary.json").read_text())
    assert 2.95 < summary["effective_bits_layers"] <= 3
    unet = DiffusionPipeline.from_pretrained(planned / "out").unet
    assert summary["effective_bits_layers"] == pytest.approx(counted_bits(unet))
    layers = quantized_layers(unet).values()
    specs = [layer.spec for layer in layers]
    assert len(set(specs)) > 1 and {(spec.is_trellis, spec.nbits_per_codebook) for spec in specs} == {(True, 8)}
    assert all(layer.spec.code_bits_per_weight(layer._columns) >= LEAST_BITS for layer in layers)
    assert summary["unet_output_error_db"] < -8


def test_every_layers_line_counts_its_share_of_the_table(planned):
    rows = [json.loads(line) for line in (planned / "out" / "layers.jsonl").read_text().splitlines()]
    summary = json.loads((planned / "out" / "summary.json").read_text())
    bits = sum(row["bits_per_weight"] * row["rows"] * row["columns"] for row in rows)
    assert bits / summary["weights_quantized"] == pytest.approx(summary["effective_bits_layers"])


def test_the_plan_can_be_passed_back(planned, pipelines, prompt_file, tmp_path):
    plan = planned / "out" / "plan.json"
    cache = ["--hessian_cache", str(planned / "cache")]
    words = [*command(pipelines["sdxl"], prompt_file, tmp_path / "out"), *ONLY, *cache, "--overrides", str(plan)]
    assert run_script(main, words) == 0
    first, second = file_hashes(planned / "out"), file_hashes(tmp_path / "out")
    assert {name: first[name] for name in first if name.startswith("unet")} == {
        name: second[name] for name in second if name.startswith("unet")
    }


def test_a_second_run_records_nothing(planned, pipelines, prompt_file, tmp_path, monkeypatch):
    def fail(*_):
        raise AssertionError("calibrated again")

    monkeypatch.setattr("vqdm.quantization.recording.calibration_trajectories", fail)
    cache = ["--hessian_cache", str(planned / "cache")]
    assert run_script(main, [*command(pipelines["sdxl"], prompt_file, tmp_path / "out"), *ONLY, *cache]) == 0
    monkeypatch.setattr("vqdm.quantization.recording.digest", lambda prompts: "other prompts")
    again = [*command(pipelines["sdxl"], prompt_file, tmp_path / "again"), *ONLY, *cache]
    assert run_script(main, again) == 2


def test_a_killed_run_goes_on_to_the_same_bytes(planned, pipelines, prompt_file, tmp_path, monkeypatch):
    from vqdm.quantization import layerwise as quantize

    out = tmp_path / "out"
    words = target(pipelines, prompt_file, out, "--target_bits", "3", "--hessian_cache", str(planned / "cache"))
    for place in ("make_shared_codebooks", "quantize_block"):
        with monkeypatch.context() as patch:
            patch.setattr(quantize, place, lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
            assert run_script(main, [*words, "--resume"]) == 130
    assert run_script(main, [*words, "--resume"]) == 0
    first, second = file_hashes(planned / "out"), file_hashes(out)
    assert {name for name in first if first[name] != second[name]} <= {"work"}


def test_codes_are_loaded_only_where_the_shared_codebooks_are_the_same(pipelines, prompt_file, tmp_path, capsys):
    share = [*ONLY, "--share_codebooks", "unet"]
    assert run_script(main, [*command(pipelines["sdxl"], prompt_file, tmp_path / "first"), *share]) == 0
    for seed, taken in (("0", 6), ("1", 0)):
        words = [*command(pipelines["sdxl"], prompt_file, tmp_path / seed), *share, "--load", str(tmp_path / "first")]
        assert run_script(main, [*words, "--seed", seed]) == 0
        assert f"{taken} of 6 layers are taken from it" in capsys.readouterr().out


@pytest.mark.parametrize("how", ["kind", "unet"])
def test_constant_rate_with_shared_codebooks(how, pipelines, prompt_file, tmp_path):
    words = [*command(pipelines["sdxl"], prompt_file, tmp_path / "out"), *ONLY, "--share_codebooks", how]
    assert run_script(main, words) == 0
    unet = DiffusionPipeline.from_pretrained(tmp_path / "out").unet
    names = {name for name, _ in unet.codebook_banks.named_parameters()}
    assert names == ({"unet_2x4_1x4"} if how == "unet" else {"linear_2x4_1x4", "conv_2x4_1x4"})
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["unet_output_error_db"] < -5


def test_layers_with_an_override_keep_it(pipelines, prompt_file, tmp_path):
    plan = tmp_path / "plan.json"
    plan.write_text(json.dumps({".*to_q": {"num_codebooks": 3, "nbits_per_codebook": 2, "in_group_size": 2}}))
    words = target(pipelines, prompt_file, tmp_path / "out", "--target_bits", "3", "--overrides", str(plan))
    assert run_script(main, words) == 0
    layers = quantized_layers(DiffusionPipeline.from_pretrained(tmp_path / "out").unet)
    for name, layer in layers.items():
        kept = (layer.spec.num_codebooks, layer.spec.nbits_per_codebook) == (3, 2)
        assert kept == bool(re.fullmatch(".*to_q", name))


def test_layers_are_coded_as_well_as_predicted(pipelines, prompt_file, tmp_path, monkeypatch):
    """Within a fifth of a decibel, though effects are measured with 8 state bits, which leave 0.3 to 0.8 dB more."""
    seen = []

    def divided(job, layers, curves, costs):
        found = divide(job, layers, curves, costs)
        seen.append({one.name: float(curves[one.name].at(np.array([width_total(one)]))[0]) for one in found[0]})
        return found

    monkeypatch.setattr("vqdm.quantization.allocation.divide", divided)
    flags = ["--target_bits", "6", "--layer_filter", r"ff\.net\.0\.proj", "--state_bits", "12"]
    assert run_script(main, target(pipelines, prompt_file, tmp_path / "out", *flags)) == 0
    rows = [json.loads(line) for line in (tmp_path / "out" / "layers.jsonl").read_text().splitlines()]
    off = [10 * math.log10(seen[1][row["name"]] / row["error"]) for row in rows]
    assert len(seen) == 2 and len(off) == 4 and max(map(abs, off)) < 0.2


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--code", "trellis"], "--code trellis needs --target_bits"),
        (["--code", "additive", "--target_bits", "3"], "--code additive does not go with --target_bits"),
        (
            ["--share_codebooks", "unet", "--target_bits", "3"],
            "--share_codebooks unet has no effect with --target_bits",
        ),
        (
            ["--target_bits", "2", "--num_codebooks", "2"],
            "--num_codebooks 2 has no effect with --target_bits",
        ),
        (["--share_codebooks", "unet", "--encoder", "beam"], "--share_codebooks needs --encoder ldl"),
        (
            ["--hessian_cache", "x", "--calibration_latents", "student"],
            "--hessian_cache is of the full-precision model",
        ),
        (["--share_codebooks", "unet", "--groupwise_codebooks"], "--share_codebooks goes neither with"),
        (["--target_bits", "0"], "--target_bits: 0 is out of range; allowed are numbers above 0 up to 16"),
    ],
)
def test_contradictions_are_one_line(flags, words, pipelines, prompt_file, tmp_path, capsys):
    assert run_script(main, target(pipelines, prompt_file, tmp_path / "out", *flags)) == 2
    err = capsys.readouterr().err
    assert words in err and len(err.strip().splitlines()) == 1


def allowed(line):
    """The number of bits that a complaint advises to choose."""
    return re.search(r"choose (\d+\.\d+) or (more|less)", line)[1]


@pytest.mark.parametrize("more", [[], ["--overrides", "PLAN"]])
@pytest.mark.parametrize(
    ("bits", "words"),
    [
        ("0.5", "--target_bits 0.5 is too low: codes of 1 bit with scales take"),
        ("1e-9", "--target_bits 1e-09 is too low: codes of 1 bit"),
        ("15", "--target_bits 15.0 is too high: codes of --state_bits 8 with scales take at most 8."),
    ],
)
def test_a_target_out_of_reach_is_refused_before_anything_is_recorded(
    bits, words, more, pipelines, prompt_file, tmp_path, capsys
):
    """With and without --dry_run; and the bound that the message names is allowed."""
    plan = tmp_path / "plan.json"
    plan.write_text('{".*to_q": {"num_codebooks": 3, "nbits_per_codebook": 2, "in_group_size": 2}}')
    out, more = tmp_path / "out", [str(plan) if word == "PLAN" else word for word in more]
    for dry in (["--dry_run"], []):
        assert run_script(main, target(pipelines, prompt_file, out, "--target_bits", bits, *more, *dry)) == 2
        err = capsys.readouterr().err
        assert err.splitlines()[-1].startswith(f"error: {words}") and not out.exists()
        assert ("overridden layers" in err) == bool(more) and ("larger --state_bits" in err) == (bits == "15")
    fits = ["--target_bits", allowed(err), "--dry_run"]
    assert run_script(main, target(pipelines, prompt_file, out, *more, *fits)) == 0


def test_a_target_without_a_layer_to_allocate_bits_to_is_refused(pipelines, prompt_file, tmp_path, capsys):
    (tmp_path / "plan.json").write_text('{".*": {"num_codebooks": 1}}')
    flags = ["--target_bits", "3", "--overrides", str(tmp_path / "plan.json"), "--dry_run"]
    assert run_script(main, target(pipelines, prompt_file, tmp_path / "out", *flags)) == 2
    assert "--target_bits has no layer to allocate bits to" in capsys.readouterr().err


def test_the_most_that_a_target_can_be_is_allocated(pipelines, prompt_file, tmp_path, capsys):
    """Every layer gets all state bits."""
    assert run_script(main, target(pipelines, prompt_file, tmp_path / "out", "--target_bits", "16")) == 2
    most = ["--target_bits", allowed(capsys.readouterr().err), "--sensitivity_points", "2"]
    assert run_script(main, target(pipelines, prompt_file, tmp_path / "out", *most)) == 0
    layers = quantized_layers(DiffusionPipeline.from_pretrained(tmp_path / "out").unet).values()
    assert min(layer.spec.code_bits_per_weight(layer._columns) for layer in layers) > 7.9


def test_state_bits_are_those_of_the_codes_and_all_layers_are_coded(pipelines, prompt_file, tmp_path):
    """Time projections and 1×1 convolutions among them."""
    flags = ["--target_bits", "3", "--layer_filter", "all", "--state_bits", "10"]
    assert run_script(main, target(pipelines, prompt_file, tmp_path / "out", *flags)) == 0
    unet = DiffusionPipeline.from_pretrained(tmp_path / "out").unet
    layers = quantized_layers(unet)
    assert {layer.spec.nbits_per_codebook for layer in layers.values()} == {10}
    assert sum("time_emb_proj" in name for name in layers) > 4 and 2.95 < counted_bits(unet) <= 3


def test_layers_of_odd_numbers_of_rows_are_coded_loaded_and_generate(pipelines, prompt_file, tmp_path):
    """3, 5 and 33 rows, and 264 of feed-forward; every segment is as long as its layer has rows."""
    pipeline = DiffusionPipeline.from_pretrained(pipelines["sdxl"])
    config = dict(pipeline.unet.config) | {
        "block_out_channels": (3, 5, 33),
        "down_block_types": ("DownBlock2D", "DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
        "attention_head_dim": 3,
        "norm_num_groups": 1,
    }
    torch.manual_seed(0)
    pipeline.unet = UNet2DConditionModel.from_config(config)
    model, out = tmp_path / "model", tmp_path / "out"
    pipeline.save_pretrained(model)
    flags = ["--layer_filter", "(down|mid).*(conv1|to_q|net.0.proj)", "--target_bits", "7", "--sensitivity_points", "4"]
    words = target({"sdxl": model}, prompt_file, out, *flags)
    assert run_script(main, words) == 0
    summary, unet = json.loads((out / "summary.json").read_text()), DiffusionPipeline.from_pretrained(out).unet
    layers = quantized_layers(unet).values()
    assert {(layer._rows, layer.spec.segment_rows) for layer in layers} == {(3, 3), (5, 5), (33, 33), (264, 264)}
    assert summary["effective_bits_layers"] == pytest.approx(counted_bits(unet)) and counted_bits(unet) <= 7
    assert summary["unet_output_error_db"] < -15
    images = [tmp_path / name for name in ("full", "coded")]
    flags = ["--num_inference_steps", "2", "--limit", "2"]
    assert run_script(generate, [str(model), str(prompt_file), "--output_dir", str(images[0]), *flags]) == 0
    assert run_script(generate, [str(model), str(out), str(prompt_file), "--output_dir", str(images[1]), *flags]) == 0
    pixels = [[np.asarray(Image.open(path), float) for path in sorted(folder.rglob("*.png"))] for folder in images]
    assert len(pixels[0]) == len(pixels[1]) == 2
    for full, coded in zip(*pixels, strict=True):
        assert full.std() > 10 and 0 < np.abs(coded - full).mean() < 0.2 * full.std()


# ------------------------------------------------------------------------------------------- without a model


def layer(name, M=1, b=4, rows=64, columns=64):
    return shared(Layer(name, "mid_block", "linear", rows, columns, CodeSpec(M, b, 4)), "unet")


@pytest.mark.parametrize("state_bits", [8, 10, 12])
@pytest.mark.parametrize("columns", [1, 3, 27, 64])
@pytest.mark.parametrize("rows", [1, 2, 4, 6, 7, 13, 64, 96, 640])
def test_every_rate_that_is_offered_is_a_sum_of_widths(rows, columns, state_bits):
    options = offered(trellis_layer(layer("a", rows=rows, columns=columns), state_bits, 2))
    bits = [layer_bits(one) for one in options]
    assert bits == sorted(bits) and options[-1].spec.code_bits_per_weight(columns) == state_bits
    widths = allowed_widths(options[0].spec.segment_rows, state_bits)
    rounding = (widths[-1] - widths[-2]) / 2 if rows == 1 else 0  # the steps of a single row are as long as a state
    assert width_total(options[0]) >= 4 * columns * LEAST_BITS - rounding
    for one in options:
        one.spec.check_shape(rows, columns)
        total = width_total(one)
        assert total * one.spec.segment_rows == 4 * one.spec.segment_bits
        assert total % (widths[-1] - widths[-2]) == 0 and widths[1] <= total <= columns * widths[-1]


def test_curves_are_corrected_by_what_was_found_over_what_was_expected():
    """Not by codes of nearly as many bits per weight as state bits, which are single values."""
    curves, fast_curves = ({"a": Curve(torch.tensor([0, 999]), torch.tensor([e, e]).double())} for e in (0.2, 0.4))
    for bits, error in ((2, 0.1), (7, 0.2)):
        coded = trellis_layer(layer("a", columns=16), 8, bits)
        assert corrected(curves, fast_curves, [coded], {"a": 0.2})["a"].at([300])[0] == pytest.approx(error)


def test_segment_bits_are_about_those_asked_for():
    one = trellis_layer(layer("a", rows=96, columns=64), 8, 2)
    assert one.spec.segment_bits == 2 * 96 * 64
    assert abs(segment_bits(one, 2.31) / (96 * 64) - 2.31) < 0.01


def test_samples_fit_into_memory_and_keep_the_order():
    layers = [layer(str(n), columns=2 ** (n % 5 + 4)) for n in range(80)]
    chosen = choose_layers(layers, 1e-4, seed=0)
    assert chosen == sorted(chosen, key=layers.index) and 0 < len(chosen) <= 48
    assert sum(12 * one.columns**2 for one in chosen) <= 1e5
    assert choose_layers(layers, 1e-4, seed=1) != chosen


def test_names_tell_owner_and_format():
    one = Layer("a", "mid_block", "conv", 64, 64, CodeSpec(2, 8, 4))
    assert shared(one, "none") is one
    assert shared(one, "unet").spec.shared_codebooks == "unet_2x8_1x4"
    assert shared(one, "kind").spec.shared_codebooks == "conv_2x8_1x4"
    assert shared(shared(one, "unet"), "kind").spec.shared_codebooks == "unet_2x8_1x4"
    assert torch.Size(one.spec.codebooks_shape).numel() == 2 * 256 * 4


def test_codes_of_a_plan_are_loaded(planned, pipelines, prompt_file, tmp_path, capsys):
    """The table is the same for every seed."""
    plan = ["--overrides", str(planned / "out" / "plan.json"), "--load", str(planned / "out")]
    words = [*command(pipelines["sdxl"], prompt_file, tmp_path / "out"), *ONLY, *plan, "--seed", "1"]
    assert run_script(main, words) == 0
    assert "6 of 6 layers are taken from it" in capsys.readouterr().out


def instance(seed, layers=4, choices=4):
    rng = random.Random(seed)
    bits = [sorted(rng.sample(range(1, 30), choices)) for _ in range(layers)]
    costs = [[rng.random() * 4.0 ** (-k) for k in range(choices)] for _ in range(layers)]
    return bits, costs


def total(values, chosen):
    return sum(own[choice] for own, choice in zip(values, chosen, strict=True))


@pytest.mark.parametrize("seed", range(20))
def test_no_combination_of_as_many_bits_costs_less_where_no_step_was_left_out(seed):
    """Where every step of the hulls down to some price was bought, the result is optimal for its bits."""
    bits, costs = instance(seed)
    everything = list(itertools.product(range(4), repeat=4))
    hulls = [lower_hull(*layer) for layer in zip(bits, costs, strict=True)]
    steps = sorted(
        ((costs[n][a] - costs[n][b]) / (bits[n][b] - bits[n][a]), bits[n][b] - bits[n][a])
        for n, hull in enumerate(hulls)
        for a, b in itertools.pairwise(hull)
    )[::-1]
    budget = sum(own[hull[0]] for own, hull in zip(bits, hulls, strict=True))
    for _, step in steps:
        budget += step
        chosen = allocate(bits, costs, budget)
        assert total(bits, chosen) == budget
        least = min(total(costs, other) for other in everything if total(bits, other) <= budget)
        assert total(costs, chosen) == pytest.approx(least)


@pytest.mark.parametrize("seed", range(20))
def test_any_budget_is_kept_and_more_is_never_worse(seed):
    bits, costs = instance(seed)
    low, high = sum(map(min, bits)), sum(map(max, bits))
    results = [allocate(bits, costs, budget) for budget in (low, (low + high) // 2, high)]
    assert total(bits, results[0]) == low and total(bits, results[1]) <= (low + high) // 2
    spent = [total(costs, chosen) for chosen in results]
    assert spent[0] >= spent[1] >= spent[2] == pytest.approx(sum(map(min, costs)))


def test_a_budget_below_the_least_is_refused():
    with pytest.raises(ValueError, match="below the least possible, 5"):
        allocate([[2, 4], [3, 9]], [[1.0, 0.5], [1.0, 0.1]], 4)


def test_the_hull_leaves_out_what_a_mixture_beats():
    assert lower_hull([1, 2, 3, 4], [8.0, 7.5, 1.0, 1.0]) == [0, 2]


def test_modulations_take_few_bits_and_hold_at_other_numbers_of_steps():
    """Calibrated at two timesteps: their inputs depend on the timestep alone."""
    pipeline, sizes = tiny_transformer_pipeline("qwen-image"), {"height": 32, "width": 32, "guidance_scale": 1.0}
    few = dict(layer_filter=r"transformer_blocks\.0\..*(_mod|mlp|to_[qkv])", state_bits=8, sensitivity_points=2)
    prompts, unseen = ["a circle", "a big red circle", "a blue star"], ["a small cross"]
    settings = sizes | few | {"num_inference_steps": 2, "visualize_nsamples": 0}
    quantized, report = vqdm.quantize(pipeline, prompts, 3.0, unseen, **settings)
    weights = {layer["name"]: layer["rows"] * layer["columns"] for layer in report.layers}
    bits = {layer["name"]: layer["bits_per_weight"] * weights[layer["name"]] for layer in report.layers}
    mean = lambda names: sum(bits[name] for name in names) / sum(weights[name] for name in names)  # noqa: E731
    modulations = [name for name in weights if "_mod" in name]
    assert len(modulations) == 2 and mean(modulations) < mean(set(weights) - set(modulations)) - 0.3
    errors = {}
    for steps in (2, 7):
        recorded, _ = record_evaluation(pipeline, unseen, 1_000_000, sizes | {"num_inference_steps": steps}, 1)
        errors[steps] = output_error(quantized.transformer, recorded, 4)
    assert errors[2] < -40 and errors[7] < errors[2] + 4
