"""What is derived of denoisers, and what their table adds."""

import pytest
import torch
from diffusers import AuraFlowTransformer2DModel
from tiny_transformers import FAMILIES, flux, sana, tiny_transformer_pipeline
from torch import nn

from vqdm.additive.code import CodeSpec
from vqdm.diffusion.blocks import select_layers, unquantized_layers
from vqdm.diffusion.denoisers import block_names, block_of, compute_dtype, is_known, noise_levels
from vqdm.diffusion.hessians import record_hessians, shared_inputs
from vqdm.diffusion.pipelines import image_size
from vqdm.diffusion.sampling import output_error, record_evaluation
from vqdm.diffusion.shapes import guidance_calls, input_groups, meta_call, meta_denoiser, prompt_tokens

SPEC = CodeSpec(1, 3, 4)
PROMPTS = ["a circle", "a big red circle", "a star and a big green heart"]
FIRST_AND_LAST = {
    "flux": ("transformer_blocks.0", "single_transformer_blocks.1"),
    "sd3": ("transformer_blocks.0", "transformer_blocks.1"),
    "pixart": ("transformer_blocks.0", "transformer_blocks.1"),
    "sana": ("transformer_blocks.0", "transformer_blocks.1"),
    "qwen-image": ("transformer_blocks.0", "transformer_blocks.1"),
    "z-image": ("noise_refiner.0", "layers.1"),
    "flux2": ("transformer_blocks.0", "single_transformer_blocks.1"),
    "wan": ("blocks.0", "blocks.1"),
}


def chosen(model: nn.Module, layer_filter: str = "default") -> list:
    return select_layers(model, layer_filter, 0, SPEC, {})


def sizes(value, name: str):
    """The sizes of the tensors of an argument; texts in lists differ in their lengths."""
    if isinstance(value, torch.Tensor):
        return list(value.shape)[1 if name == "cap_feats" else 0 :]
    if isinstance(value, dict):
        return {key: sizes(one, key) for key, one in value.items()}
    return [sizes(one, name) for one in value] if isinstance(value, list | tuple) else value


@pytest.mark.parametrize("family", FAMILIES)
def test_recorded_calls_give_the_recorded_outputs(family):
    """Prompts of different lengths in batches of two, with all that the pipeline calls its transformer with."""
    pipeline = tiny_transformer_pipeline(family)
    model = pipeline.transformer.eval()
    settings = {"num_inference_steps": 2, "height": 32, "width": 32}
    recorded, images = record_evaluation(pipeline, PROMPTS, 0, settings, 2)
    prompts, calls = recorded.shape
    assert (prompts, len(images)) == (3, 3) and calls in (2, 4)
    assert 990 < recorded.timesteps[0] <= 1000 and recorded.timesteps[-1] < recorded.timesteps[0]
    assert output_error(model, recorded, 3) < -80
    blocks = block_names(model)
    assert (blocks[0], blocks[-1]) == FIRST_AND_LAST[family] and is_known(model)
    first = recorded.inputs(recorded.points()[:1], "cpu", torch.float32)
    groups = shared_inputs(model, chosen(model), first)
    reached = {layer.name for group in groups for layer in group}
    inside = [name for name, one in model.named_modules() if isinstance(one, nn.Linear) and name.startswith("trans")]
    meta, tokens = meta_denoiser(type(model), model.config), prompt_tokens(pipeline)
    branches, calls_of_step = guidance_calls(pipeline, None)
    tokens = first.get("encoder_hidden_states", torch.empty(0, tokens)).shape[1] if family == "qwen-image" else tokens
    called = meta_call(meta, 16, 16, branches, tokens)
    first.pop("encoder_hidden_states_mask", None)  # of Qwen-Image, where prompts of a batch differ in length
    assert {name: sizes(value, name) for name, value in first.items()} == {
        name: sizes(value, name) for name, value in called.items()
    }
    assert calls == 2 * calls_of_step
    assert {tuple(group) for group in input_groups(meta, chosen(model), 16, 16)} == {tuple(group) for group in groups}
    assert reached >= {name for name in inside if block_of(model, name) in blocks}


def test_timesteps_of_every_token_are_recorded():
    """As Wan 2.2 of 5 B parameters takes them; images may be of the size that its pipeline's call names."""
    pipeline = tiny_transformer_pipeline("wan-5b")
    recorded, _ = record_evaluation(pipeline, PROMPTS, 0, {"num_inference_steps": 2, "height": 32, "width": 32}, 2)
    first = recorded.inputs([(0, 0)], "cpu", torch.float32)
    assert first["timestep"].shape == (1, 8 * 8) and first["hidden_states"].shape == (1, 4, 1, 16, 16)
    assert output_error(pipeline.transformer, recorded, 3) < -80
    assert recorded.inputs([(0, 0)], "cpu", torch.float32, [3.0])["timestep"].unique().tolist() == [3]
    assert image_size(pipeline, None, None) == (480, 832) and image_size(pipeline, 32, None) == (32, 832)


def test_fused_and_modulating_layers_are_quantized_and_ends_are_not():
    model = flux().transformer
    names = {layer.name for layer in chosen(model)}
    assert {f"single_transformer_blocks.0.{name}" for name in ("proj_out", "proj_mlp", "norm.linear")} <= names
    assert {"transformer_blocks.0.norm1.linear", "transformer_blocks.0.attn.add_q_proj"} <= names
    left = unquantized_layers(model, chosen(model))
    assert {"context_embedder", "time_text_embed.timestep_embedder.linear_1"} <= set(left)
    assert not {"x_embedder", "proj_out", "norm_out.linear"} & (set(left) | names)
    assert block_of(model, "x_embedder.weight") == "stem" and block_of(model, "proj_out.bias") == "head"


def test_convolutions_in_groups_are_left_to_8_bit():
    model = sana().transformer
    layers = chosen(model)
    assert {layer.kind for layer in layers} == {"linear", "conv"}
    assert "transformer_blocks.0.ff.conv_depth" in unquantized_layers(model, layers)


def test_inputs_that_are_equal_share_a_hessian_though_each_block_makes_its_own():
    pipeline = tiny_transformer_pipeline("flux")
    recorded, _ = record_evaluation(pipeline, PROMPTS, 0, {"num_inference_steps": 1, "height": 32, "width": 32}, 3)
    model, layers = pipeline.transformer, chosen(pipeline.transformer)
    call = recorded.inputs([(0, 0)], "cpu", torch.float32)
    groups = shared_inputs(model, layers, call)
    shared = next(group for group in groups if group[0].name == "transformer_blocks.0.norm1.linear")
    assert {layer.name for layer in shared} == {layer.name for layer in layers if "norm" in layer.name}
    hessians = record_hessians(model, [[layer] for layer in shared], call, [lambda: call], [])
    first, *others = [found for found, _ in hessians.values()]
    assert len(others) == 3 and all(torch.equal(first, other) for other in others)


def test_a_class_without_a_row_is_derived():
    model = AuraFlowTransformer2DModel(
        sample_size=8,
        num_mmdit_layers=1,
        num_single_dit_layers=1,
        attention_head_dim=8,
        num_attention_heads=4,
        caption_projection_dim=32,
        joint_attention_dim=32,
        pos_embed_max_size=16,
    )
    assert not is_known(model)
    assert block_names(model) == ["joint_transformer_blocks.0", "single_transformer_blocks.0"]
    assert len(chosen(model)) > 10
    assert noise_levels(model, [1.0, 0.25]) == [1000, 250] and noise_levels(model, [999.0, 1.0]) == [999, 1]


def test_the_type_is_that_of_layers_that_are_not_kept_in_float32():
    model = flux().transformer.to(torch.bfloat16)
    assert compute_dtype(model) == torch.bfloat16
    model.time_text_embed.float()
    model._keep_in_fp32_modules = ["time_text_embed"]
    assert compute_dtype(model) == torch.bfloat16
    assert "time_text_embed.timestep_embedder.linear_1" not in unquantized_layers(model, chosen(model))
