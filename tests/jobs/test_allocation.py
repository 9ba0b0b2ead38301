"""Bits divided among layers, shared codebooks and the Hessian cache, on a tiny pipeline."""

import json
import re
from dataclasses import replace

import pytest
import torch
from diffusers import DiffusionPipeline
from main_text2image import main
from test_quantize import command, file_hashes

from vqdm.additive.code import CodeSpec
from vqdm.cli import run_script
from vqdm.diffusion.blocks import Layer
from vqdm.errors import UserError
from vqdm.jobs.allocation import Choices, divided
from vqdm.jobs.banks import choose_layers, shared
from vqdm.jobs.plan import bank_bits, layer_bits
from vqdm.layers.quantized import quantized_layers

ONLY = ["--layer_filter", r"mid_block.*attn1\.to|mid_block.*conv1"]


def shrink(patch):
    patch.setattr("vqdm.jobs.menu.MEASURED", {4: (3, 6), 2: (4, 6)})
    patch.setattr("vqdm.jobs.menu.USUAL", (4, 6))
    patch.setattr("vqdm.jobs.menu.LARGEST", 7)


@pytest.fixture(autouse=True)
def small_menu(monkeypatch):
    shrink(monkeypatch)


def target(pipelines, prompts, out, *extra):
    """The command without the flags of the format, which --target_bits decides."""
    words = command(pipelines["sdxl"], prompts, out)
    dropped = {"--num_codebooks", "--nbits_per_codebook", "--in_group_size"}
    kept = [word for before, word in zip(["", *words], words, strict=False) if not dropped & {before, word}]
    return [*kept, *ONLY, *extra]


@pytest.fixture(scope="module")
def planned(pipelines, prompt_file, tmp_path_factory):
    """A run to 2.5 bits that keeps its Hessians."""
    folder = tmp_path_factory.mktemp("planned")
    with pytest.MonkeyPatch.context() as patch:
        shrink(patch)
        cache = ["--hessian_cache", str(folder / "cache")]
        assert run_script(main, target(pipelines, prompt_file, folder / "out", "--target_bits", "2.5", *cache)) == 0
    return folder


def test_the_target_is_kept_with_banks_and_scales(planned):
    summary = json.loads((planned / "out" / "summary.json").read_text())
    assert 2.2 < summary["effective_bits_layers"] <= 2.5
    unet = DiffusionPipeline.from_pretrained(planned / "out").unet
    layers = quantized_layers(unet)
    bits = sum(layer.stored_bits for layer in layers.values())
    bits += sum(16 * bank.numel() for bank in unet.codebook_banks.parameters())
    weights = sum(layer._rows * layer._columns for layer in layers.values())
    assert summary["effective_bits_layers"] == pytest.approx(bits / weights)
    assert len({layer.spec for layer in layers.values()}) > 1


def test_every_layers_line_counts_its_share_of_the_bank(planned):
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

    monkeypatch.setattr("vqdm.jobs.recording.calibration_trajectories", fail)
    cache = ["--hessian_cache", str(planned / "cache")]
    assert run_script(main, [*command(pipelines["sdxl"], prompt_file, tmp_path / "out"), *ONLY, *cache]) == 0
    monkeypatch.setattr("vqdm.jobs.recording.digest", lambda prompts: "other prompts")
    again = [*command(pipelines["sdxl"], prompt_file, tmp_path / "again"), *ONLY, *cache]
    assert run_script(main, again) == 2


def test_a_killed_run_goes_on_to_the_same_bytes(planned, pipelines, prompt_file, tmp_path, monkeypatch):
    from vqdm.jobs import quantize

    out = tmp_path / "out"
    words = target(pipelines, prompt_file, out, "--target_bits", "2.5", "--hessian_cache", str(planned / "cache"))
    for place in ("make_banks", "solve_block"):
        with monkeypatch.context() as patch:
            patch.setattr(quantize, place, lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
            assert run_script(main, [*words, "--resume"]) == 130
    assert run_script(main, [*words, "--resume"]) == 0
    first, second = file_hashes(planned / "out"), file_hashes(out)
    assert {name for name in first if first[name] != second[name]} <= {"work"}


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


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--target_bits", "2", "--share_codebooks", "none"], "--target_bits needs --share_codebooks kind or unet"),
        (
            ["--target_bits", "2", "--num_codebooks", "2"],
            "--target_bits chooses formats itself; leave out --num_codebooks",
        ),
        (["--share_codebooks", "unet", "--encoder", "beam"], "--share_codebooks needs --encoder ldl"),
        (
            ["--hessian_cache", "x", "--calibration_latents", "student"],
            "--hessian_cache is of the full-precision model",
        ),
        (["--share_codebooks", "unet", "--groupwise_codebooks"], "--share_codebooks goes neither with"),
        (["--target_bits", "0.1"], "--target_bits 0.1 is too low: codes and scales alone take"),
    ],
)
def test_contradictions_are_one_line(flags, words, pipelines, prompt_file, tmp_path, capsys):
    assert run_script(main, target(pipelines, prompt_file, tmp_path / "out", *flags)) == 2
    err = capsys.readouterr().err
    assert words in err and len(err.strip().splitlines()) == 1


# ------------------------------------------------------------------------------------------- without a model


def layer(name, M=1, b=4, rows=64, columns=64):
    return shared(Layer(name, "mid_block", "linear", rows, columns, CodeSpec(M, b, 4)), "unet")


def choices(name, effect, rows=64):
    options = [layer(name, 1, b, rows) for b in (4, 8, 12)]
    return Choices(options, [layer_bits(one) for one in options], [effect * 4.0 ** -(b / 4) for b in (4, 8, 12)])


def test_bits_go_where_the_effect_is():
    found = divided([choices("a", 1.0, 4096), choices("b", 1e-3, 4096)], 3.0)
    assert found[0].spec.nbits_per_codebook > found[1].spec.nbits_per_codebook
    weights = 2 * 4096 * 64
    assert sum(map(layer_bits, found)) + bank_bits(found) <= 3.0 * weights


def test_a_bank_that_is_not_worth_its_bits_is_left_out():
    """4,096 entries of four values are 16 times the layer's weights."""
    found = divided([choices("a", 1.0), choices("b", 1.0)], 6.0)
    assert all(one.spec.nbits_per_codebook < 12 for one in found)
    assert any(one.spec.nbits_per_codebook == 12 for one in divided([choices("a", 1.0, 2**14)], 4.0))


def test_an_impossible_target_names_the_least():
    with pytest.raises(UserError, match=r"--target_bits 0\.5 is too low: codes and scales alone take 1\.250"):
        divided([choices("a", 1.0)], 0.5)


def test_shared_codebooks_that_are_too_large_are_named():
    """Sixteen entries of four values are a quarter of a bit for each of 64×64 weights, and one for 16×64."""
    small = choices("a", 1.0, 16)
    with pytest.raises(
        UserError, match=r"shared codebooks take 1\.000 bits per weight .* and codes and scales 1\.250"
    ) as e:
        divided([small], 2.0)
    assert str(e.value).endswith("choose more layers (--layer_filter), or 2.250 or more")
    assert divided([small], 2.2501)
    kinds = [replace(one, spec=one.spec.changed(shared_codebooks=f"linear_{k}")) for k, one in enumerate(small.layers)]
    with pytest.raises(UserError, match=r"choose --share_codebooks unet, more layers"):
        divided([replace(small, layers=kinds)], 2.0)


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


def test_codes_are_loaded_only_where_the_bank_is_the_same(planned, pipelines, prompt_file, tmp_path, capsys):
    plan = ["--overrides", str(planned / "out" / "plan.json"), "--load", str(planned / "out")]
    words = [*command(pipelines["sdxl"], prompt_file, tmp_path / "same"), *ONLY, *plan]
    assert run_script(main, [*words, "--hessian_cache", str(planned / "cache")]) == 0
    assert "6 of 6 layers are taken from there" in capsys.readouterr().out
    words = [*command(pipelines["sdxl"], prompt_file, tmp_path / "other"), *ONLY, *plan, "--seed", "1"]
    assert run_script(main, words) == 0
    assert "0 of 6 layers are taken from there" in capsys.readouterr().out
