"""Sampling with the student in the teacher's pipeline."""

import classroom
import pytest
import torch
from conftest import tiny_pipeline

from vqdm.diffusion.sampling import generate_images
from vqdm.finetuning.config import OptimizerConfig
from vqdm.finetuning.parameters import trainable
from vqdm.finetuning.sources import sampled, using

SETTINGS = {"num_inference_steps": 2}


@pytest.fixture(scope="module")
def pipeline():
    found = tiny_pipeline("sdxl").to(torch.bfloat16)
    found.set_progress_bar_config(disable=True)
    return found


@pytest.fixture
def student():
    """A student in training, so in float32."""
    unet = classroom.student(classroom.FORMATS["own"])
    trainable(unet, OptimizerConfig())
    return unet


def test_the_student_alone_is_under_autocast(pipeline, student):
    """Text encoders and VAE run in their own type, as without a student."""
    own, seen = pipeline.unet, {}
    parts = {"student": student.mid_block, "text": pipeline.text_encoder, "vae": pipeline.vae.decoder}
    hooks = [
        part.register_forward_hook(lambda *_, name=name: seen.update({name: torch.is_autocast_enabled("cpu")}))
        for name, part in parts.items()
    ]
    with using(pipeline, student):
        assert pipeline.unet is student
        assert len(generate_images(pipeline, ["a red circle"], 0, SETTINGS, 1)) == 1
    for hook in hooks:
        hook.remove()
    assert seen == {"student": True, "text": False, "vae": False}
    assert pipeline.unet is own and "forward" not in vars(student)


def test_points_have_the_type_of_the_pipeline(pipeline, student):
    for unet in (pipeline.unet, student):
        points = sampled(pipeline, unet, ["a red circle", "a star"], 0, SETTINGS, True)
        assert points.latents.dtype == points.outputs.dtype == torch.bfloat16
        assert "forward" not in vars(unet)
