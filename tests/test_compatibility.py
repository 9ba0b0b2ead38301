"""What docs/compatibility.md says, on a tiny pipeline whose UNet and text encoder are quantized."""

import copy
import pickle

import accelerate
import pytest
import torch
from conftest import tiny_pipeline, tiny_unet
from diffusers import (
    AutoPipelineForImage2Image,
    ControlNetModel,
    ControlNetUnionModel,
    DiffusionPipeline,
    StableDiffusionXLAdapterPipeline,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLInpaintPipeline,
    StableDiffusionXLPipeline,
    T2IAdapter,
    UNetMotionModel,
)
from diffusers.utils import convert_state_dict_to_diffusers
from numerics import assert_close_outputs, assert_same_tensors
from test_hf import image_of, quantized_unet, run
from test_hf_text import quantized_text_encoder
from test_shared_codebooks import SPEC as SHARED_SPEC
from test_shared_codebooks import share

import vqdm  # noqa: F401 (teaches diffusers the format)
from vqdm.diffusion.blocks import select_layers
from vqdm.layers.int8 import int8_layers
from vqdm.layers.quantized import quantized_layers
from vqdm.storage.hf import mark_quantized

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("compatibility")
    pipeline = tiny_pipeline("sdxl")
    parts = {part: quantized_text_encoder(part) for part in ("text_encoder", "text_encoder_2")}
    pipeline.register_modules(unet=quantized_unet(unquantized_nbits=8), **parts)
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
    assert not quantized_layers(unet) and not int8_layers(unet)
    pipeline.fuse_lora(components=["unet"])
    pipeline.unload_lora_weights()
    torch.testing.assert_close(run(unet), adapted, rtol=1e-3, atol=1e-3)


def test_save_lora_adapter(pipeline, tmp_path):
    unet = with_lora(pipeline.unet, ["to_q"])
    unet.save_lora_adapter(tmp_path)
    assert list(tmp_path.glob("*.safetensors")) and unet.is_quantized


def test_set_adapters_weighs_them(pipeline):
    plain = run(pipeline.unet)
    unet = with_lora(pipeline.unet, ["to_q"])
    adapted = run(unet)
    unet.set_adapters(["default"], [0.0])
    torch.testing.assert_close(run(unet), plain)
    unet.set_adapters(["default"], [1.0])
    torch.testing.assert_close(run(unet), adapted)


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


def test_ip_adapter(pipeline):
    weights = ip_adapter(pipeline.unet)
    pipeline.load_ip_adapter(weights, subfolder="", weight_name="", image_encoder_folder=None)

    def draw(value):
        embeddings = [torch.stack([torch.zeros(1, 32), torch.linspace(-value, value, 32)[None]])]
        settings = {"generator": torch.Generator().manual_seed(0), "ip_adapter_image_embeds": embeddings}
        return pipeline("a red star", num_inference_steps=1, output_type="latent", **settings).images

    assert quantized_layers(pipeline.unet) and not torch.allclose(draw(1.0), draw(0.0))


# ------------------------------------------------------------------------------------------- moving and casting


def test_moving_keeps_the_picture(pipeline):
    expected = image_of(pipeline)
    assert torch.equal(image_of(pipeline.to("cpu")), expected)


CASTS = {
    "pipe.to(dtype)": (lambda pipe: pipe.to(torch.bfloat16), torch.bfloat16),
    "pipe.to(device, dtype)": (lambda pipe: pipe.to("cpu", torch.bfloat16), torch.bfloat16),
    "unet.to(dtype)": (lambda pipe: pipe.unet.to(torch.float64), torch.float64),
    "half": (lambda pipe: (pipe.unet.half(), pipe.text_encoder.half()), torch.float16),
    "float": (lambda pipe: (pipe.unet.half().float(), pipe.text_encoder.half().float()), torch.float32),
}


@pytest.mark.parametrize(("cast", "dtype"), CASTS.values(), ids=CASTS)
def test_casting_is_as_on_a_plain_model_and_leaves_codes(pipeline, folder, cast, dtype):
    cast(pipeline)
    layer = pipeline.unet.mid_block.resnets[0].conv1
    assert layer.codes.dtype == torch.uint8 and pipeline.unet.time_embedding.linear_1.values.dtype == torch.int8
    assert layer.bias.dtype == layer.weight.dtype == pipeline.unet.dtype == dtype and pipeline.unet.is_quantized
    pipeline.to(torch.float32)
    assert image_of(pipeline).isfinite().all()


def test_casting_to_what_codebooks_would_not_survive_is_refused(pipeline):
    expected = run(pipeline.unet)
    with pytest.raises(ValueError, match=r"cannot be cast to torch\.float8_e4m3fn"):
        pipeline.to(torch.float8_e4m3fn)
    with pytest.raises(ValueError, match="enable_layerwise_casting would round the codebooks"):
        pipeline.unet.enable_layerwise_casting(torch.float8_e4m3fn, torch.float32)
    assert torch.equal(run(pipeline.unet), expected)


# ------------------------------------------------------------------------------------------- other pipelines and models

FROM_PIPE = {
    "image to image": lambda pipe: StableDiffusionXLImg2ImgPipeline.from_pipe(pipe),
    "with a type": lambda pipe: StableDiffusionXLImg2ImgPipeline.from_pipe(pipe, dtype=torch.bfloat16),
    "inpainting": lambda pipe: StableDiffusionXLInpaintPipeline.from_pipe(pipe),
    "auto": lambda pipe: AutoPipelineForImage2Image.from_pipe(pipe),
    "T2I-Adapter": lambda pipe: StableDiffusionXLAdapterPipeline.from_pipe(
        pipe, adapter=T2IAdapter(channels=[16, 32], num_res_blocks=1, downscale_factor=2)
    ),
}


@pytest.mark.parametrize("make", FROM_PIPE.values(), ids=FROM_PIPE)
def test_from_pipe_shares_the_quantized_unet(pipeline, make):
    other = make(pipeline)
    assert other.unet is pipeline.unet and quantized_layers(other.unet) and other.unet.is_quantized


def test_image_to_image_generates(pipeline):
    other = StableDiffusionXLImg2ImgPipeline.from_pipe(pipeline)
    other.set_progress_bar_config(disable=True)
    settings = {"strength": 0.5, "num_inference_steps": 4, "output_type": "np"}
    images = other("a red star", image=torch.zeros(1, 3, 16, 16), **settings).images
    assert images.shape == (1, 16, 16, 3) and not (images == images[0, 0, 0]).all()


COPIES = {
    "ControlNetModel": (ControlNetModel.from_unet, "mid_block.resnets.0.conv1"),
    "ControlNetUnionModel": (ControlNetUnionModel.from_unet, "mid_block.resnets.0.conv1"),
    "UNetMotionModel": (UNetMotionModel.from_unet2d, "up_blocks.0.resnets.0.conv1"),
}


@pytest.mark.parametrize(("copied", "name"), COPIES.values(), ids=COPIES)
def test_what_copies_a_unets_weights_gets_them_decoded(pipeline, copied, name):
    decoded = pipeline.unet.get_submodule(name).weight.detach().clone()
    other = copied(pipeline.unet)
    assert not quantized_layers(other) and not int8_layers(other) and quantized_layers(pipeline.unet)
    assert torch.equal(other.get_submodule(name).weight, decoded)


def test_what_copies_weights_refuses_adapters(pipeline):
    with pytest.raises(ValueError, match=r"holds an adapter at .*to_q; remove it first: unload_lora_weights\(\)"):
        ControlNetModel.from_unet(with_lora(pipeline.unet, ["to_q"]))


def test_a_pipeline_loads_around_a_quantized_unet(pipeline, folder):
    again = DiffusionPipeline.from_pretrained(folder, unet=pipeline.unet, dtype=torch.float32)
    assert again.unet is pipeline.unet
    torch.testing.assert_close(image_of(again), image_of(pipeline), rtol=1e-3, atol=1e-3)


# ------------------------------------------------------------------------------------------- saving

EXTRAS = {
    "LoRA": lambda pipe: with_lora(pipe.unet, ["to_q"]),
    "LoRA on a text encoder": lambda pipe: pipe.text_encoder.add_adapter(
        pytest.importorskip("peft").LoraConfig(r=2, target_modules=["v_proj"])
    ),
    "IP-Adapter": lambda pipe: pipe.load_ip_adapter(
        ip_adapter(pipe.unet), subfolder="", weight_name="", image_encoder_folder=None
    ),
    "fused projections": lambda pipe: pipe.unet.fuse_qkv_projections(),
}


@pytest.mark.parametrize("add", EXTRAS.values(), ids=EXTRAS)
def test_a_model_with_something_added_is_not_saved(pipeline, tmp_path, add):
    """Its folder could not be loaded; nothing is written."""
    add(pipeline)
    with pytest.raises(ValueError, match=r"with which a saved folder cannot be loaded; remove it first: unload_"):
        pipeline.save_pretrained(tmp_path / "out")
    assert not (tmp_path / "out").exists()


REMOVED = {
    "LoRA": lambda pipe: (with_lora(pipe.unet, ["to_q"]), pipe.unload_lora_weights()),
    "IP-Adapter": lambda pipe: (EXTRAS["IP-Adapter"](pipe), pipe.unload_ip_adapter()),
    "fused projections": lambda pipe: (pipe.unet.fuse_qkv_projections(), pipe.unet.unfuse_qkv_projections()),
}


@pytest.mark.parametrize("names", [["LoRA", "IP-Adapter"]], ids=str)
def test_a_model_is_saved_again_once_it_is_removed(pipeline, tmp_path, names):
    for name in names:
        REMOVED[name](pipeline)
    pipeline.unet.save_pretrained(tmp_path)
    torch.testing.assert_close(run(type(pipeline.unet).from_pretrained(tmp_path)), run(pipeline.unet))


@pytest.mark.parametrize("save", [lambda pipe: pipe.save_pretrained, lambda pipe: pipe.unet.save_pretrained])
@pytest.mark.parametrize("options", [{"safe_serialization": False}, {"use_flashpack": True}], ids=str)
def test_other_files_than_safetensors_are_not_written(pipeline, tmp_path, save, options):
    with pytest.raises(ValueError, match=r"saved as safetensors; leave out safe_serialization=False"):
        save(pipeline)(tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_pickle_gives_the_same_model(pipeline):
    again = pickle.loads(pickle.dumps(pipeline.unet))
    torch.testing.assert_close(run(again), run(pipeline.unet))
    assert again.is_quantized and quantized_layers(again).keys() == quantized_layers(pipeline.unet).keys()


def test_load_state_dict_takes_a_quantized_state(pipeline):
    twin = copy.deepcopy(pipeline.unet)
    twin.mid_block.resnets[0].conv1.codebooks.data.zero_()
    twin.load_state_dict(pipeline.unet.state_dict())
    assert_close_outputs(run(twin), run(pipeline.unet))


def test_the_methods_of_plain_models_are_the_libraries_own(tmp_path):
    unet = tiny_unet("sdxl")
    assert unet.to(torch.float16).dtype == unet.half().dtype == torch.float16
    unet.float().save_pretrained(tmp_path, safe_serialization=False)
    assert list(tmp_path.glob("*.bin")) and not quantized_layers(ControlNetModel.from_unet(unet))


# ------------------------------------------------------------------------------------------- offloading


@pytest.fixture(params=["own", "shared"])
def offloaded(pipeline, request):
    """A pipeline whose layers have codebooks of their own, or share some that are a module of the UNet."""
    if request.param == "shared":
        unet = tiny_unet("sdxl")
        share(unet, [layer.name for layer in select_layers(unet, "default", 0, SHARED_SPEC, {})])
        mark_quantized(unet)
        pipeline.register_modules(unet=unet)
    return pipeline


def test_model_offload(offloaded):
    pipeline = offloaded
    expected = image_of(pipeline)
    pipeline.enable_model_cpu_offload(device="cpu")
    assert_close_outputs(image_of(pipeline), expected)


def test_sequential_offload(offloaded):
    """Part by part with what the pipeline's method calls, which itself wants a device with a number."""
    pipeline, expected = offloaded, image_of(offloaded)
    for part in (pipeline.unet, pipeline.vae, pipeline.text_encoder, pipeline.text_encoder_2):
        accelerate.cpu_offload(part, CPU)
    assert {tensor.device.type for tensor in pipeline.unet.parameters()} == {"meta"}
    assert_close_outputs(image_of(pipeline), expected)


@pytest.mark.parametrize("options", [{"offload_type": "leaf_level"}, {"num_blocks_per_group": 1}])
def test_group_offload(offloaded, options):
    pipeline, expected = offloaded, image_of(offloaded)
    options = {"offload_type": "block_level"} | options
    pipeline.unet.enable_group_offload(onload_device=CPU, offload_device=CPU, **options)
    assert_close_outputs(image_of(pipeline), expected)


# ------------------------------------------------------------------------------------------- the rest


def test_attention_slicing_and_vae_tiling(pipeline):
    expected = image_of(pipeline)
    pipeline.enable_attention_slicing(1)
    pipeline.vae.enable_tiling()
    pipeline.vae.enable_slicing()
    torch.testing.assert_close(image_of(pipeline), expected, rtol=1e-3, atol=1e-3)
    assert pipeline("a red star", num_inference_steps=1, output_type="np").images.shape == (1, 16, 16, 3)


def test_deepcopy_draws_the_same_and_shares_nothing(pipeline):
    twin = copy.deepcopy(pipeline)
    for part in ("unet", "vae", "text_encoder", "text_encoder_2"):
        assert_same_tensors(getattr(twin, part), getattr(pipeline, part))
    assert_close_outputs(image_of(twin), image_of(pipeline))
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
