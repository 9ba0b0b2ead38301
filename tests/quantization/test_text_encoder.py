import copy

import pytest
import torch
from conftest import tiny_pipeline

import vqdm
from vqdm import CodeSpec, SolverConfig
from vqdm.additive.solve import solve_layer
from vqdm.layers.quantized import quantized_layers
from vqdm.quantization.text_encoder import text_layers

FAST = SolverConfig(CodeSpec(2, 4, 4), max_epochs=2, beam_size=2, init_max_iter=3)
PROMPTS = [f"a big red circle number {i}" for i in range(20)]


def hidden(model, ids):
    with torch.no_grad():
        return model(ids, output_hidden_states=True).hidden_states[-1]


def test_a_quantized_model_is_not_quantized_again():
    pipeline = tiny_pipeline("sdxl")
    vqdm.quantize_text_encoder(pipeline.text_encoder, pipeline.tokenizer, PROMPTS[:2], FAST)
    with pytest.raises(ValueError, match=r"CLIPTextModel is quantized itself \(vqdm\); give the full-precision model"):
        vqdm.quantize_text_encoder(pipeline.text_encoder, pipeline.tokenizer, PROMPTS[:2], FAST)


@pytest.mark.parametrize("part", ["text_encoder", "text_encoder_2"])
def test_every_linear_of_the_transformer_is_quantized_and_reported_on(part):
    pipeline = tiny_pipeline("sdxl")
    model, tokenizer = getattr(pipeline, part), pipeline.tokenizer
    original = copy.deepcopy(model)
    reports = vqdm.quantize_text_encoder(model, tokenizer, PROMPTS, FAST, batch_size=2)
    assert list(reports) == list(quantized_layers(model)) and len(reports) == 12
    assert all(0 < report.error < 0.2 and report.held_out_error > 0 for report in reports.values())
    ids = tokenizer(PROMPTS[:4], padding="max_length", max_length=24, return_tensors="pt").input_ids
    expected, got = hidden(original, ids), hidden(model, ids)
    assert 0 < (got - expected).norm() < 0.3 * expected.norm()  # two bits per weight


def test_equal_seeds_give_equal_codes_and_others_do_not():
    def codes(seed):
        pipeline = tiny_pipeline("sdxl")
        vqdm.quantize_text_encoder(pipeline.text_encoder, pipeline.tokenizer, PROMPTS[:4], FAST, seed)
        return quantized_layers(pipeline.text_encoder)["encoder.layers.0.mlp.fc1"].codes

    assert torch.equal(codes(1), codes(1)) and not torch.equal(codes(1), codes(2))


def test_later_layers_are_calibrated_on_the_quantized_earlier_ones(monkeypatch):
    pipeline = tiny_pipeline("sdxl")
    model, hessians = pipeline.text_encoder, []

    def solve(weight, hessian, *rest):
        hessians.append(hessian)
        return solve_layer(weight, hessian, *rest)

    monkeypatch.setattr("vqdm.quantization.text_encoder.solve_layer", solve)
    reports = vqdm.quantize_text_encoder(model, pipeline.tokenizer, PROMPTS[:3], FAST)
    name, seen = "encoder.layers.1.self_attn.q_proj", []
    model.get_submodule(name).register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    hidden(model, pipeline.tokenizer(PROMPTS[:3], padding="max_length", max_length=24, return_tensors="pt").input_ids)
    rows = seen[0].flatten(0, 1)
    torch.testing.assert_close(hessians[list(reports).index(name)], rows.T @ rows / len(rows))


@pytest.mark.parametrize(
    ("prompts", "spec", "words"),
    [
        ([], CodeSpec(2, 4, 4), "prompts is empty"),
        (PROMPTS, CodeSpec(2, 4, 5), r"layer .*encoder.layers.0.self_attn.k_proj: in_group_size 5"),
    ],
)
def test_bad_input_is_named(prompts, spec, words):
    pipeline = tiny_pipeline("sdxl")
    with pytest.raises(ValueError, match=words):
        vqdm.quantize_text_encoder(pipeline.text_encoder, pipeline.tokenizer, prompts, SolverConfig(spec))


def test_another_kind_of_model_is_refused():
    with pytest.raises(ValueError, match="UNet2DConditionModel has no encoder layers"):
        text_layers(tiny_pipeline("sdxl").unet, FAST)
