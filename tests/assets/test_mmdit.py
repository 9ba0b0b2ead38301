"""The training of the small diffusion transformer: exact shortcuts, resumption, and a pipeline that diffusers loads."""

import random
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from safetensors.torch import load_file

from evaluate_pipeline import held_out_scenes, sample, verdicts
from models import make_mmdit
from scenes import caption
from train_mmdit import ABSENT_TOKENS, CountedAttention, finish, learning_rate, make_trainer, train
from vqdm.diffusion.pipelines import load_pipeline

PARTS = Path("assets/shapes-xl")
FOLDER = Path("assets/shapes-mmdit")


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Namespace:
    work = tmp_path_factory.mktemp("mmdit")
    options = Namespace(work=work, parts=PARTS, steps=2, batch=2, scenes=8, lr=1e-3, compile=False, dtype="float32")
    train(options)
    options.finish = work / "pipeline"
    finish(options)
    return options


def test_one_counted_token_weighs_as_many_equal_ones():
    torch.manual_seed(0)
    model, (latents, tokens, pooled) = (
        make_mmdit(),
        (torch.randn(2, 4, 16, 16), torch.randn(2, 6, 192), torch.randn(2, 192)),
    )
    absent, step = torch.zeros(2, ABSENT_TOKENS, 192), torch.tensor([300.0, 700.0])
    with torch.no_grad():
        whole = model(latents, torch.cat([tokens, absent], dim=1), pooled, step).sample
        model.set_attn_processor(CountedAttention(ABSENT_TOKENS))
        short = model(latents, torch.cat([tokens, absent[:, :1]], dim=1), pooled, step).sample
    assert torch.allclose(whole, short, atol=1e-5)


def test_learning_rate_warms_up_stays_and_falls_to_zero():
    assert learning_rate(0, 4000, 1e-3) < 1e-5
    assert learning_rate(300, 4000, 1e-3) == learning_rate(2900, 4000, 1e-3) == 1e-3
    assert learning_rate(3500, 4000, 1e-3) == pytest.approx(0.5e-3)


def test_training_goes_on_from_its_checkpoint(trained):
    before = torch.load(trained.work / "checkpoint.pt", weights_only=True)
    trainer = make_trainer(trained.work, 1e-3)
    trainer.load()
    assert trainer.step == before["step"] == 2
    moved = trainer.model.state_dict()["transformer_blocks.0.ff.net.2.bias"]
    assert torch.equal(moved, before["model"]["transformer_blocks.0.ff.net.2.bias"])


def test_the_finished_folder_is_an_sd3_pipeline_without_its_third_encoder(trained):
    absent = {"text_encoder_3": None, "tokenizer_3": None}  # SD3's class asks for them
    pipeline = StableDiffusion3Pipeline.from_pretrained(trained.finish, dtype=torch.float32, **absent)
    assert 8e6 < pipeline.transformer.num_parameters() < 15e6
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    image = pipeline("a red circle", num_inference_steps=1, generator=generator, output_type="pt").images
    assert image.shape == (1, 3, 64, 64) and image.isfinite().all()
    assert all("_name_or_path" not in path.read_text() for path in trained.finish.glob("*/config.json"))


def test_the_shipped_files_are_fp16_and_of_this_configuration():
    files = list(FOLDER.glob("*/*.safetensors"))
    assert all(file.stat().st_size < 15e6 for file in files)
    state = {name: t for file in files if file.parent.name == "transformer" for name, t in load_file(file).items()}
    expected = {name: tensor.shape for name, tensor in make_mmdit().state_dict().items()}
    assert {name: tensor.shape for name, tensor in state.items()} == expected
    assert {tensor.dtype for tensor in state.values()} == {torch.float16}


def test_the_shipped_one_shows_what_was_asked():
    scenes = held_out_scenes(4, None)
    captions = [caption(scene, random.Random(index)) for index, scene in enumerate(scenes)]
    pipeline = load_pipeline(str(FOLDER), torch.device("cpu"), torch.float32)
    images = sample(pipeline, captions, Namespace(bs=4, steps=8, guidance_scale=3.0))
    assert verdicts(images, scenes).sum() >= 3
