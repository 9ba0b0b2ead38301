"""Tiny random pipelines of each family, made from configurations; nothing is downloaded."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is imported, which diffusers does
import processors
from diffusers import (
    AutoencoderKL,
    EulerDiscreteScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from train_text import known_words, make_tokenizer
from vqdm.diffusion.shapes import meta_denoiser

processors.from_environment()
pytest_plugins = ["emulated_stage", "stage"]

FAMILIES = ("sdxl", "turbo", "sd15", "sd21")
_ATTENTION = ("CrossAttnDownBlock2D", "DownBlock2D"), ("UpBlock2D", "CrossAttnUpBlock2D")
_UNETS = {
    "sdxl": dict(
        down_block_types=_ATTENTION[0][::-1],
        up_block_types=_ATTENTION[1][::-1],
        attention_head_dim=(2, 4),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + 32,
        cross_attention_dim=64,
    ),
    "sd15": dict(
        down_block_types=_ATTENTION[0], up_block_types=_ATTENTION[1], attention_head_dim=8, cross_attention_dim=32
    ),
    "sd21": dict(
        down_block_types=_ATTENTION[0],
        up_block_types=_ATTENTION[1],
        attention_head_dim=(2, 4),
        use_linear_projection=True,
        cross_attention_dim=32,
    ),
}


def tiny_unet(family: str) -> UNet2DConditionModel:
    """A UNet of a family's structure, with seeded random weights."""
    torch.manual_seed(0)
    shared = dict(sample_size=8, block_out_channels=(16, 32), layers_per_block=1, norm_num_groups=8)
    return UNet2DConditionModel(**shared, **_UNETS["sdxl" if family == "turbo" else family])


def meta_unet(config: dict, dtype: torch.dtype = torch.float32) -> UNet2DConditionModel:
    """A UNet of a configuration without weights."""
    return meta_denoiser(UNet2DConditionModel, config, dtype)


def tiny_pipeline(family: str) -> StableDiffusionXLPipeline | StableDiffusionPipeline:
    """A whole pipeline of a family that samples 16×16 images."""
    torch.manual_seed(0)
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8),
        norm_num_groups=4,
        sample_size=16,
    )
    tokenizer = make_tokenizer(known_words())
    shared = dict(
        vocab_size=len(tokenizer),
        max_position_embeddings=24,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        projection_dim=32,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    parts = dict(
        vae=vae,
        text_encoder=CLIPTextModel(CLIPTextConfig(**shared)),
        tokenizer=tokenizer,
        unet=tiny_unet(family),
        scheduler=EulerDiscreteScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012),
    )
    if family in ("sd15", "sd21"):
        return StableDiffusionPipeline(
            **parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False
        )
    second = CLIPTextModelWithProjection(CLIPTextConfig(**shared))
    return StableDiffusionXLPipeline(**parts, text_encoder_2=second, tokenizer_2=tokenizer, add_watermarker=False)


@pytest.fixture
def odd_addresses():
    """Every tensor that is read from a safetensors file lies at an odd address; see processors.py."""
    with processors.odd_addresses():
        yield


@pytest.fixture
def triton_device() -> str:
    """Where Triton kernels run: a GPU, or without one the CPU, by Triton's interpreter."""
    if torch.cuda.is_available():
        return "cuda"
    triton = pytest.importorskip("triton")
    assert triton.knobs.runtime.interpret, "Triton was imported before tests/conftest.py asked for its interpreter"
    return "cpu"


@pytest.fixture(scope="module")
def one_thread():
    """torchrun gives every process one thread; sums over two differ in their last bits, and so may a pixel."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def pipelines(tmp_path_factory) -> dict[str, Path]:
    """Family → pipeline folder, float32."""
    root = tmp_path_factory.mktemp("pipelines")
    folders = {family: root / family for family in FAMILIES}
    for family, folder in folders.items():
        tiny_pipeline(family).save_pretrained(folder)
    return folders


@pytest.fixture(scope="session")
def prompt_file(tmp_path_factory) -> Path:
    """Twelve prompts in a text file."""
    path = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    path.write_text("".join(f"a big red circle number {i}\n" for i in range(12)))
    return path
