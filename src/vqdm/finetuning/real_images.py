"""Points from real pictures: their latents with noise, at the timesteps of the scheduler.

Letters: N pictures, S steps.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from diffusers import DiffusionPipeline
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor, nn

from vqdm.diffusion.pipelines import image_size, sample
from vqdm.diffusion.trajectories import Trajectories, TrajectoryRecorder
from vqdm.documents import first_line
from vqdm.errors import RunError, UserError
from vqdm.prompts import load_rows

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
TABLES = ("metadata.jsonl", "metadata.csv", "manifest.jsonl")
NAME_COLUMNS = ("file_name", "file")


class Captioned(NamedTuple):
    """A picture's file and what it shows."""

    file: Path
    caption: str


def captioned_pictures(folder: str) -> list[Captioned]:
    """The pictures of a folder with their captions, sorted by name.

    Captions come from `metadata.jsonl` or `metadata.csv` (columns `file_name` and one that prompt files know, as
    `datasets` has it), from `manifest.jsonl` as generate.py writes it, or from a `.txt` file beside each picture.

    Raises:
        UserError: no folder, no captioned picture in it, or a file that is not there.
    """
    root = Path(folder)
    if not root.is_dir():
        raise UserError(f"--real_images {folder} is not a folder")
    table = next((root / name for name in TABLES if (root / name).is_file()), None)
    found = _from_table(root, table) if table else _from_text_files(root)
    if not found:
        raise UserError(f"--real_images {folder} holds no picture with a caption: neither {', '.join(TABLES)} nor .txt")
    absent = [picture.file for picture in found if not picture.file.is_file()]
    if absent:
        raise UserError(f"--real_images: {table} names {absent[0]}, which is not there")
    return sorted(found)


def _from_table(root: Path, table: Path) -> list[Captioned]:
    rows = load_rows(str(table), "--real_images")
    column = next((name for name in NAME_COLUMNS if name in rows[0]), None)
    if column is None:
        raise UserError(f"--real_images: {table} has no column {' or '.join(NAME_COLUMNS)}")
    return [Captioned(root / str(row[column]), row["prompt"]) for row in rows]


def _from_text_files(root: Path) -> list[Captioned]:
    pictures = [file for file in root.iterdir() if file.suffix.lower() in SUFFIXES]
    texts = [(file, file.with_suffix(".txt")) for file in pictures]
    return [Captioned(file, text.read_text(encoding="utf-8").strip()) for file, text in texts if text.is_file()]


def check_schedule(scheduler) -> None:
    """Raise UserError where a scheduler does not say how much noise a timestep has."""
    if not hasattr(scheduler, "alphas_cumprod"):
        raise UserError(
            f"--finetune_method real needs a scheduler with alphas_cumprod; {type(scheduler).__name__} lacks it"
        )


@torch.no_grad()
def noised_pictures(pipeline: DiffusionPipeline, pictures: list[Captioned], seed: int, settings: dict) -> Trajectories:
    """Points √ᾱ_t · x + √(1 - ᾱ_t) · ε at every timestep of the scheduler; the k-th picture's noise has `seed + k`.

    These are the inputs of the UNet as the scheduler scales them where its noise grows instead of the signal shrinking.
    """
    pipeline.scheduler.set_timesteps(settings.get("num_inference_steps") or 50)
    timesteps = pipeline.scheduler.timesteps.float().cpu()  # [S]
    kept = pipeline.scheduler.alphas_cumprod.cpu().numpy()
    kept = torch.from_numpy(np.interp(timesteps.numpy(), np.arange(len(kept)), kept)).float().view(-1, 1, 1, 1)
    latents = encoded(pipeline, [picture.file for picture in pictures], settings)  # [N, C, h, w]
    shape = (len(timesteps), *latents.shape[1:])
    noise = [torch.randn(shape, generator=torch.Generator().manual_seed(seed + k)) for k in range(len(pictures))]
    noisy = kept.sqrt() * latents.unsqueeze(1) + (1 - kept).sqrt() * torch.stack(noise)  # [N, S, C, h, w]
    captions = [picture.caption for picture in pictures]
    return Trajectories(noisy.to(pipeline.unet.dtype), timesteps, conditioning(pipeline, captions, settings))


def encoded(pipeline: DiffusionPipeline, files: list[Path], settings: dict) -> Tensor:
    """Pictures as the UNet sees them without noise: float32 [N, C, h, w] on the CPU, cut to the size of sampling."""
    height, width = image_size(pipeline, settings.get("height"), settings.get("width"))
    pixels = torch.stack([_pixels(file, (width, height)) for file in files])  # [N, 3, H, W]
    with in_float32(pipeline.vae) as vae:
        latents = vae.encode(pixels.to(vae.device)).latent_dist.mode().cpu()
    config = vae.config
    if config.get("latents_mean") is not None and config.get("latents_std") is not None:
        mean, deviation = (torch.tensor(config[name]).view(1, -1, 1, 1) for name in ("latents_mean", "latents_std"))
        return (latents - mean) * config.scaling_factor / deviation
    return (latents - (config.get("shift_factor") or 0)) * config.scaling_factor


def _pixels(file: Path, size: tuple[int, int]) -> Tensor:
    """float32 [3, H, W] in [-1, 1]: the largest middle part of the right shape, scaled."""
    try:
        with Image.open(file) as image:
            picture = ImageOps.fit(image.convert("RGB"), size, Image.Resampling.LANCZOS)
    except (OSError, UnidentifiedImageError) as error:
        raise RunError(f"--real_images: {file} cannot be read: {first_line(error)}") from None
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1).float() / 127.5 - 1  # [H, W, 3] → [3, H, W]


@contextmanager
def in_float32(module: nn.Module) -> Iterator[nn.Module]:
    """The module in float32 for a while: some autoencoders overflow in 16 bit."""
    dtype = next(module.parameters()).dtype
    try:
        yield module.float()
    finally:
        module.to(dtype)


class _Enough(Exception):
    """The UNet has been called."""


def conditioning(pipeline: DiffusionPipeline, prompts: list[str], settings: dict) -> dict[str, Tensor]:
    """What the pipeline gives its UNet for prompts beside latents, learned from the first call of sampling."""

    def stop(*_) -> None:
        raise _Enough

    with TrajectoryRecorder(pipeline.unet, len(prompts)) as recorder:
        hook = pipeline.unet.register_forward_hook(stop)
        try:
            with suppress(_Enough):
                sample(pipeline, prompts, 0, 0, settings | {"output_type": "latent"})
        finally:
            hook.remove()
    return recorder.conditioning
