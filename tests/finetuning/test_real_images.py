import json

import pytest
import torch
from PIL import Image

from vqdm.diffusion.pipelines import load_pipeline
from vqdm.errors import UserError
from vqdm.finetuning.real_images import Captioned, captioned_pictures, encoded, noised_pictures


@pytest.fixture
def folder(tmp_path):
    for k in range(2):
        Image.new("RGB", (16, 24), (100 * k, 50, 200)).save(tmp_path / f"{k}.png")
    return tmp_path


def test_captions_from_each_kind_of_file(folder):
    wanted = [Captioned(folder / f"{k}.png", f"picture {k}") for k in range(2)]
    for k in range(2):
        (folder / f"{k}.txt").write_text(f"picture {k}\n")
    assert captioned_pictures(str(folder)) == wanted
    rows = [{"file": f"{k}.png", "prompt": f"drawn {k}"} for k in range(2)]
    (folder / "manifest.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert [picture.caption for picture in captioned_pictures(str(folder))] == ["drawn 0", "drawn 1"]
    (folder / "metadata.csv").write_text("file_name,text\n1.png,second\n0.png,first\n")
    assert [picture.caption for picture in captioned_pictures(str(folder))] == ["first", "second"]


def test_folders_that_do_not_serve(folder):
    with pytest.raises(UserError, match="is not a folder"):
        captioned_pictures(str(folder / "none"))
    with pytest.raises(UserError, match="holds no picture with a caption"):
        captioned_pictures(str(folder))
    (folder / "metadata.csv").write_text("file_name,text\n9.png,ninth\n")
    with pytest.raises(UserError, match=r"9\.png, which is not there"):
        captioned_pictures(str(folder))


def test_noise_is_mixed_in_as_the_scheduler_does(folder, pipelines):
    """The Euler scheduler adds noise to a growing variance and scales it back for the UNet."""
    pipeline = load_pipeline(str(pipelines["sdxl"]), torch.device("cpu"), torch.float32)
    pictures = [Captioned(folder / f"{k}.png", f"picture {k}") for k in range(2)]
    settings = {"num_inference_steps": 3, "guidance_scale": 5.0}
    found = noised_pictures(pipeline, pictures, 7, settings)
    latents = encoded(pipeline, [picture.file for picture in pictures], settings)
    scheduler = pipeline.scheduler
    scheduler.set_timesteps(3)
    assert torch.equal(found.timesteps, scheduler.timesteps.float())
    for n in range(2):
        noise = torch.randn(3, *latents.shape[1:], generator=torch.Generator().manual_seed(7 + n))
        for s, t in enumerate(scheduler.timesteps):
            scheduler._step_index = scheduler._begin_index = None
            noisy = scheduler.add_noise(latents[n : n + 1], noise[s : s + 1], t[None])
            wanted = scheduler.scale_model_input(noisy, t)[0]
            torch.testing.assert_close(found.latents[n, s], wanted, rtol=1e-3, atol=1e-3)
    assert found.conditioning["encoder_hidden_states"].shape[:2] == (2, 2)
    assert not pipeline.unet._forward_hooks
