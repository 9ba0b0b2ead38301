"""What docs/compatibility.md says, on a tiny pipeline whose UNet and text encoder are quantized."""

import copy

import accelerate
import pytest
import torch
from conftest import tiny_pipeline, tiny_unet
from diffusers import DiffusionPipeline, StableDiffusionXLPipeline
from diffusers.utils import convert_state_dict_to_diffusers
from numerics import assert_close_outputs, assert_same_tensors
from test_banks import SPEC as BANK_SPEC
from test_banks import share
from test_hf import picture, quantized_unet, run
from test_hf_text import quantized_text_encoder

import vqdm
from vqdm.diffusion.blocks import select_layers
from vqdm.layers.quantized import quantized_layers
from vqdm.layers.rounded import rounded_layers
from vqdm.storage.hf import mark_quantized

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("compatibility")
    pipeline = tiny_pipeline("sdxl")
    parts = {part: quantized_text_encoder(part) for part in ("text_encoder", "text_encoder_2")}
    pipeline.register_modules(unet=quantized_unet(rest_nbits=8), **parts)
    pipeline.save_pretrained(path)
    return path


@pytest.fixture
def pipeline(folder):
    loaded = DiffusionPipeline.from_pretrained(folder, dtype=torch.float32)
    loaded.set_progress_bar_config(disable=True)
    return loaded


# ------------------------------------------------------------------------------------------- adapters

LORA_TARGETS = {"linear": ["to_q", "ff.net.2"], "conv": ["conv1", "conv2"], "8 bit": ["time_emb_proj"]}


def with_lora(unet, targets):
    """A trainable adapter of random weights on a frozen UNet."""
    peft = pytest.importorskip("peft")
    unet.requires_grad_(False)
    unet.add_adapter(peft.LoraConfig(r=2, lora_alpha=2, target_modules=targets))
    torch.manual_seed(0)
    for tensor in trainable(unet).values():
        tensor.data.normal_(std=0.3)
    return unet


def trainable(unet):
    return {name: tensor for name, tensor in unet.named_parameters() if tensor.requires_grad}


def save_lora(unet, path):
    from peft.utils import get_peft_model_state_dict

    layers = convert_state_dict_to_diffusers(get_peft_model_state_dict(unet))
    StableDiffusionXLPipeline.save_lora_weights(path, unet_lora_layers=layers)


@pytest.mark.parametrize("targets", LORA_TARGETS.values(), ids=LORA_TARGETS)
def test_lora_trains_saves_and_loads(pipeline, tmp_path, targets):
    plain = run(pipeline.unet)
    unet = with_lora(copy.deepcopy(pipeline.unet), targets)
    tensors = trainable(unet)
    assert tensors and all("lora" in name and tensor.dtype == torch.float32 for name, tensor in tensors.items())
    sample, tokens = torch.randn(1, 4, 8, 8), torch.randn(1, 5, 64)
    added = {"text_embeds": torch.randn(1, 32), "time_ids": torch.ones(1, 6)}
    unet(sample, 500, tokens, added_cond_kwargs=added).sample.square().mean().backward()
    assert all(tensor.grad is not None for tensor in tensors.values())
    assert any(tensor.grad.abs().sum() > 0 for tensor in tensors.values())
    adapted = run(unet)
    assert not torch.allclose(adapted, plain, atol=1e-3)
    save_lora(unet, tmp_path)
    pipeline.load_lora_weights(tmp_path)
    assert_close_outputs(run(pipeline.unet), adapted)
    pipeline.unload_lora_weights()
    assert torch.equal(run(pipeline.unet), plain)


@pytest.mark.parametrize("safe", [False, True])
@pytest.mark.parametrize("targets", LORA_TARGETS.values(), ids=LORA_TARGETS)
def test_fuse_lora_refuses_and_changes_nothing(pipeline, targets, safe):
    with_lora(pipeline.unet, targets)
    adapted = run(pipeline.unet)
    with pytest.raises(RuntimeError, match="no adapter can be fused into it"):
        pipeline.fuse_lora(components=["unet"], safe_fusing=safe)
    assert torch.equal(run(pipeline.unet), adapted)


def test_fuse_lora_refuses_for_text_encoders(pipeline):
    peft = pytest.importorskip("peft")
    pipeline.text_encoder.add_adapter(peft.LoraConfig(r=2, target_modules=["v_proj"]))
    with pytest.raises(RuntimeError, match="no adapter can be fused into it"):
        pipeline.fuse_lora(components=["text_encoder"])


@pytest.mark.parametrize("targets", LORA_TARGETS.values(), ids=LORA_TARGETS)
def test_fuse_lora_merges_truly_after_dequantize(pipeline, targets):
    unet = with_lora(pipeline.unet, targets)
    adapted = run(unet)
    unet.dequantize()
    assert not quantized_layers(unet) and not rounded_layers(unet)
    pipeline.fuse_lora(components=["unet"])
    pipeline.unload_lora_weights()
    torch.testing.assert_close(run(unet), adapted, rtol=1e-3, atol=1e-3)


def test_save_lora_adapter_inside_allow_casting(pipeline, tmp_path):
    unet = with_lora(pipeline.unet, ["to_q"])
    with pytest.raises(ValueError, match="Casting a quantized model"):
        unet.save_lora_adapter(tmp_path)
    with vqdm.allow_casting(unet):
        unet.save_lora_adapter(tmp_path)
    assert list(tmp_path.glob("*.safetensors")) and unet.is_quantized


def ip_adapter(unet) -> dict:
    """Random weights of an IP-Adapter for every cross-attention."""
    generator, weights = torch.Generator().manual_seed(0), {}
    names = [name for name in unet.attn_processors if "attn2" in name]
    for index, name in enumerate(names):
        inner = unet.get_submodule(name.removesuffix(".processor")).inner_dim
        for part in ("to_k_ip", "to_v_ip"):
            weights[f"{2 * index + 1}.{part}.weight"] = torch.randn(inner, 64, generator=generator)
    image = {"proj.weight": torch.randn(256, 32, generator=generator), "proj.bias": torch.zeros(256)}
    image |= {"norm.weight": torch.ones(64), "norm.bias": torch.zeros(64)}
    return {"image_proj": image, "ip_adapter": weights}


def test_ip_adapter_inside_allow_casting(pipeline):
    weights = ip_adapter(pipeline.unet)
    with vqdm.allow_casting(pipeline.unet):
        pipeline.load_ip_adapter(weights, subfolder="", weight_name="", image_encoder_folder=None)

    def draw(value):
        embeddings = [torch.stack([torch.zeros(1, 32), torch.linspace(-value, value, 32)[None]])]
        settings = {"generator": torch.Generator().manual_seed(0), "ip_adapter_image_embeds": embeddings}
        return pipeline("a red star", num_inference_steps=1, output_type="latent", **settings).images

    assert quantized_layers(pipeline.unet) and not torch.allclose(draw(1.0), draw(0.0))


# ------------------------------------------------------------------------------------------- moving and offloading


def test_moving_keeps_the_picture_and_casting_is_refused(pipeline):
    expected = picture(pipeline)
    assert torch.equal(picture(pipeline.to("cpu")), expected)  # nothing moves
    with pytest.raises(ValueError, match="Casting a quantized model"):
        pipeline.to(torch.float16)


@pytest.fixture(params=["own", "shared"])
def offloaded(pipeline, request):
    """A pipeline whose layers have codebooks of their own, or share a bank that is a module of the UNet."""
    if request.param == "shared":
        unet = tiny_unet("sdxl")
        share(unet, [layer.name for layer in select_layers(unet, "default", 0, BANK_SPEC, {})])
        mark_quantized(unet)
        pipeline.register_modules(unet=unet)
    return pipeline


def test_model_offload(offloaded):
    pipeline = offloaded
    expected = picture(pipeline)
    pipeline.enable_model_cpu_offload(device="cpu")
    assert_close_outputs(picture(pipeline), expected)


def test_sequential_offload(offloaded):
    """Part by part with what the pipeline's method calls, which itself wants a device with a number."""
    pipeline, expected = offloaded, picture(offloaded)
    for part in (pipeline.unet, pipeline.vae, pipeline.text_encoder, pipeline.text_encoder_2):
        accelerate.cpu_offload(part, CPU)
    assert {tensor.device.type for tensor in pipeline.unet.parameters()} == {"meta"}
    assert_close_outputs(picture(pipeline), expected)


@pytest.mark.parametrize("options", [{"offload_type": "leaf_level"}, {"num_blocks_per_group": 1}])
def test_group_offload(offloaded, options):
    pipeline, expected = offloaded, picture(offloaded)
    options = {"offload_type": "block_level"} | options
    pipeline.unet.enable_group_offload(onload_device=CPU, offload_device=CPU, **options)
    assert_close_outputs(picture(pipeline), expected)


# ------------------------------------------------------------------------------------------- the rest


def test_attention_slicing_and_vae_tiling(pipeline):
    expected = picture(pipeline)
    pipeline.enable_attention_slicing(1)
    pipeline.vae.enable_tiling()
    pipeline.vae.enable_slicing()
    torch.testing.assert_close(picture(pipeline), expected, rtol=1e-3, atol=1e-3)
    assert pipeline("a red star", num_inference_steps=1, output_type="np").images.shape == (1, 16, 16, 3)


def test_deepcopy_draws_the_same_and_shares_nothing(pipeline):
    twin = copy.deepcopy(pipeline)
    for part in ("unet", "vae", "text_encoder", "text_encoder_2"):
        assert_same_tensors(getattr(twin, part), getattr(pipeline, part))
    assert_close_outputs(picture(twin), picture(pipeline))
    ours, theirs = (next(iter(quantized_layers(one.unet).values())) for one in (pipeline, twin))
    theirs.codebooks.data.zero_()
    assert ours.codebooks.abs().sum() > 0


def test_gradient_checkpointing_gives_the_same_gradient(pipeline):
    unet = pipeline.unet.train().requires_grad_(False)

    def gradient():
        torch.manual_seed(0)
        sample = torch.randn(1, 4, 8, 8, requires_grad=True)
        added = {"text_embeds": torch.randn(1, 32), "time_ids": torch.ones(1, 6)}
        unet(sample, 500, torch.randn(1, 5, 64), added_cond_kwargs=added).sample.sum().backward()
        return sample.grad

    expected = gradient()
    unet.enable_gradient_checkpointing()
    torch.testing.assert_close(gradient(), expected, rtol=1e-4, atol=1e-4)


def test_fused_projections_give_the_same(pipeline):
    expected = run(pipeline.unet)
    pipeline.unet.fuse_qkv_projections()
    torch.testing.assert_close(run(pipeline.unet), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    "name", ["mid_block.attentions.0.proj_in", "mid_block.resnets.0.conv1", "time_embedding.linear_1"]
)
def test_each_kind_of_layer_compiles_in_one_graph(pipeline, name):
    layer = pipeline.unet.get_submodule(name)
    x = torch.randn(2, layer.in_features) if hasattr(layer, "in_features") else torch.randn(1, layer.in_channels, 8, 8)
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(layer, fullgraph=True, backend="eager")(x), layer(x))


@pytest.mark.long
def test_compile_in_one_graph(pipeline):
    expected = run(pipeline.unet)
    pipeline.unet.compile(fullgraph=True, backend="eager")
    torch.testing.assert_close(run(pipeline.unet), expected, rtol=1e-4, atol=1e-4)
