"""The shipped pipeline: a genuine SDXL pipeline in fp16 that shows what it is asked."""

import random
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, StableDiffusionXLPipeline, UNet2DConditionModel
from safetensors.torch import load_file
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from evaluate_pipeline import held_out_scenes, load_pipeline, sample, summary, verdicts
from scenes import caption, sample_split
from train_vae import measure, render_many

FOLDER = Path("assets/shapes-xl")


def judged(count: int, steps: int) -> dict:
    """Shares of right images over `count` held-out prompts, half of one thing and half of two."""
    scenes = held_out_scenes(count, None)
    captions = [caption(scene, random.Random(index)) for index, scene in enumerate(scenes)]
    options = Namespace(bs=16, steps=steps, guidance_scale=3.0)
    images = sample(load_pipeline(str(FOLDER), torch.device("cpu"), torch.float32), captions, options)
    return summary(images, scenes, verdicts(images, scenes))


def test_it_is_a_genuine_sdxl_pipeline():
    pipeline = StableDiffusionXLPipeline.from_pretrained(FOLDER)
    assert isinstance(pipeline.unet, UNet2DConditionModel) and pipeline.unet.config.addition_embed_type == "text_time"
    assert isinstance(pipeline.vae, AutoencoderKL) and pipeline.vae_scale_factor == 4
    assert isinstance(pipeline.text_encoder, CLIPTextModel)
    assert isinstance(pipeline.text_encoder_2, CLIPTextModelWithProjection)
    assert 12e6 < sum(tensor.numel() for tensor in pipeline.unet.parameters()) < 16e6
    assert pipeline.tokenizer("a big red circle").input_ids != pipeline.tokenizer("a big red star").input_ids


def test_files_are_fp16_and_small():
    files = list(FOLDER.glob("*/*.safetensors"))
    assert all(file.stat().st_size < 15e6 for file in files)
    kinds = {tensor.dtype for file in files for tensor in load_file(file).values() if tensor.is_floating_point()}
    assert kinds == {torch.float16}


def test_the_autoencoder_keeps_unseen_images():
    vae = StableDiffusionXLPipeline.from_pretrained(FOLDER, dtype=torch.float32).vae
    assert measure(vae, render_many(sample_split("test", 32, seed=9), seed=9))["psnr"] > 28


def test_most_images_show_what_was_asked():
    shares = judged(16, steps=15)
    assert shares["single_right"] >= 0.75 and shares["pair_right"] >= 0.5


@pytest.mark.long
def test_quality_over_256_unseen_prompts():
    shares = judged(256, steps=30)
    assert shares["single_right"] >= 0.95 and shares["pair_right"] >= 0.70
