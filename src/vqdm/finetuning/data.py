"""Datasets of fine-tuning: prompts to train on, held-out and evaluation prompts, and real images with captions.

Letters: N images, S steps.
"""

from __future__ import annotations

import hashlib
import os
import random
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from diffusers import DiffusionPipeline
from PIL import Image, ImageOps
from torch import Tensor

from vqdm.diffusion.pipelines import image_size, parts_in_use, sample
from vqdm.diffusion.trajectories import CallRecorder, Trajectories
from vqdm.documents import first_line, read_text
from vqdm.errors import RunError, UserError
from vqdm.finetuning.config import FinetuneConfig
from vqdm.images import BESIDE, FORMATS, SUFFIXES, check_image, is_hidden, is_sheet, listed, read_image
from vqdm.prompts import choose, load_prompts, load_rows, log_notes
from vqdm.tracking import log_info

T = TypeVar("T")
FLAG = "--real_images"
MANIFEST = "manifest.jsonl"  # of generate.py
TABLES = ("metadata.jsonl", "metadata.csv", MANIFEST)
NAME_COLUMNS = ("file_name", "file")


class CaptionedImage(NamedTuple):
    """An image file and its caption."""

    file: Path
    caption: str


@dataclass(frozen=True)
class Datasets:
    """Disjoint sets of prompts, and images.

    Attributes:
        training: prompts of the trajectories that are trained on.
        held_out: prompts of the same file; their error chooses the step to keep.
        evaluation: prompts of another file; they measure the result and choose nothing.
        images: real images with captions; empty unless they are trained on.
    """

    training: list[str]
    held_out: list[str]
    evaluation: list[str]
    images: list[CaptionedImage]
    seed: int

    def training_prompts(self, first: int, count: int) -> list[str]:
        """Return `count` prompts of the endless training sequence: every prompt once per pass, reshuffled each pass."""
        return reshuffled(self.training, first, count, f"{self.seed}:prompts")

    def training_images(self, first: int, count: int) -> list[CaptionedImage]:
        """Return `count` images of the endless training sequence, in the same way."""
        return reshuffled(self.images, first, count, f"{self.seed}:pictures")

    @property
    def digest(self) -> str:
        """SHA-256 of all prompts, and of file names and captions of the images."""
        lines = [*self.training, *self.held_out, *self.evaluation, *map(str, self.images)]
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def load_datasets(config: FinetuneConfig) -> Datasets:
    """Read prompt files and image folder.

    Raises:
        UserError: a file cannot be read or holds too few prompts or images; names the flag.
    """
    evaluation = load_prompts(config.evaluation_prompts, "EVALUATION_PROMPTS")
    count, source = config.evaluation_nsamples, config.evaluation_prompts
    evaluation = choose(evaluation, count, config.seed, source, "--evaluation_nsamples")
    every = load_prompts(config.calibration_prompts, "CALIBRATION_PROMPTS")
    usable = [prompt for prompt in every if prompt not in set(evaluation)]
    found = f"{config.calibration_prompts} holds {len(usable)} prompts"
    if len(usable) < len(every):
        found += f" besides {len(every) - len(usable)} evaluation prompts"
        log_info(f"{found}; evaluation prompts are neither trained on nor held out")
    if config.held_out_nsamples >= len(usable):
        raise UserError(
            f"--held_out_nsamples is {config.held_out_nsamples}, but {found}; some must be left to train on"
        )
    order = random.Random(f"{config.seed}:held out").sample(usable, len(usable))
    held_out = order[: config.held_out_nsamples]
    training = [prompt for prompt in order[config.held_out_nsamples :] if prompt not in set(held_out)]
    if config.finetune_nsamples > len(training):
        raise UserError(
            f"--finetune_nsamples is {config.finetune_nsamples}, but {found}, {len(training)} of them not held out"
        )
    images = load_captioned_images(config.real_images) if config.real_images else []
    return Datasets(training, held_out, evaluation, images, config.seed)


def reshuffled(items: Sequence[T], first: int, count: int, seed: str) -> list[T]:
    """Return items `first` to `first + count` of an endless sequence: all items shuffled, reshuffled, and so on."""
    passes = range(first // len(items), -(-(first + count) // len(items)))
    row = [item for k in passes for item in random.Random(f"{seed}:{k}").sample(items, len(items))]
    start = first - passes.start * len(items)
    return row[start : start + count]


# ------------------------------------------------------------------------------------------- folders of images


def load_captioned_images(folder: str) -> list[CaptionedImage]:
    """Find the captioned images of a folder, at any depth, sorted by name; headers of all files are read.

    Captions come from `metadata.jsonl` or `metadata.csv` (columns `file_name` and one of the prompt columns, as in
    `datasets`), from `manifest.jsonl` of generate.py, or from a `.txt` file beside each image. One line of the log
    counts and names what is left out.

    Raises:
        UserError: the folder is missing or has no captioned image, or a table names a missing file, or a file cannot be
            read.
    """
    root = Path(folder)
    if not root.is_dir():
        raise UserError(f"{FLAG} {folder} is not a folder")
    table = next((root / name for name in TABLES if (root / name).is_file()), None)
    names, links = _names(root)
    images = [name for name in names if name.lower().endswith(SUFFIXES) and not is_hidden(name)]
    found, faulty = _from_table(root, table) if table else (_from_text_files(root, images), [])
    used = {os.path.relpath(image.file, root) for image in found} | set(faulty)
    captions = table.name if table else "a .txt file of its name"
    reasons = {
        "black, NaN or replaced by a safety checker": faulty,
        f"without a caption in {captions}": [name for name in images if name not in used and not is_sheet(name)],
        "hidden": [name for name in names if name.lower().endswith(SUFFIXES) and is_hidden(name)],
        "in formats that are not read": [
            name for name in names if not name.lower().endswith(SUFFIXES + BESIDE) and not is_hidden(name)
        ],
        "links to folders or to nothing, which are not followed": links,
    }
    notes = [f"left out, {reason}: {listed(left)}" for reason, left in reasons.items() if left]
    if not found:
        wanted = f"it has neither {', '.join(TABLES)} nor .txt files" if table is None else f"see {table}"
        raise UserError("; ".join([f"{FLAG} {folder} holds no image with a caption: {wanted}", *notes]))
    for image in found:
        try:
            check_image(image.file)
        except ValueError as error:
            allowed = f"allowed are images in {', '.join(FORMATS)}"
            raise UserError(f"{FLAG}: {image.file} cannot be read: {error}; {allowed}") from None
    log_notes(notes, folder, FLAG)
    return sorted(found)


def _names(root: Path) -> tuple[list[str], list[str]]:
    """Return all files at any depth, and links to folders or to nothing, as sorted paths relative to `root`."""

    def fail(error: OSError) -> None:
        raise UserError(f"{FLAG}: {error.filename} cannot be read: {error.strerror}")

    names, links = [], []
    for folder, folders, files in os.walk(root, onerror=fail):
        paths = [Path(folder, name) for name in (*folders, *files)]
        names += [path.relative_to(root).as_posix() for path in paths if path.is_file()]
        links += [path.relative_to(root).as_posix() for path in paths if path.is_symlink() and not path.is_file()]
    return sorted(names), sorted(links)


def _from_table(root: Path, table: Path) -> tuple[list[CaptionedImage], list[str]]:
    """Return the images of a table, and the names of those that generate.py marked as faulty."""
    rows = load_rows(str(table), FLAG)
    column = next((name for name in NAME_COLUMNS if any(row.get(name) for row in rows)), None)
    if column is None:
        raise UserError(f"{FLAG}: {table} has no column {' or '.join(NAME_COLUMNS)}")
    unnamed = next((row for row in rows if not row.get(column)), None)
    if unnamed is not None:
        raise UserError(f"{FLAG}: {table}, {unnamed.place}: no {column}")
    faulty = [str(row[column]) for row in rows if table.name == MANIFEST and row.get("problem")]
    found = [CaptionedImage(root / str(row[column]), row["prompt"]) for row in rows if str(row[column]) not in faulty]
    missing = [image.file for image in found if not image.file.is_file()]
    if missing:
        more = f" and {len(missing) - 1} more files" if len(missing) > 1 else ""
        raise UserError(f"{FLAG}: {table} names {missing[0]}{more}: not found")
    return found, faulty


def _from_text_files(root: Path, images: list[str]) -> list[CaptionedImage]:
    found = []
    for file in map(root.joinpath, images):
        text = file.with_suffix(".txt")
        try:
            caption = read_text(text).strip() if text.is_file() else ""
        except (OSError, ValueError) as error:
            raise UserError(f"{FLAG}: {text} cannot be read: {first_line(error)}") from None
        found += [CaptionedImage(file, caption)] if caption else []
    return found


# ------------------------------------------------------------------------------------------- points from images


def check_scheduler(scheduler) -> None:
    """Raise UserError if a scheduler does not define how much noise a timestep has."""
    if not hasattr(scheduler, "alphas_cumprod"):
        raise UserError(
            f"--finetune_method real needs a scheduler with alphas_cumprod; {type(scheduler).__name__} lacks it"
        )


@torch.no_grad()
def noised_images(pipeline: DiffusionPipeline, images: list[CaptionedImage], seed: int, settings: dict) -> Trajectories:
    """Return the points √ᾱ_t · x + √(1 - ᾱ_t) · ε at every timestep of the scheduler; image k's noise has `seed + k`.

    Schedulers whose noise grows while the signal stays (Euler) scale the UNet's input to the same points.

    Raises:
        RunError: an image file cannot be decoded.
    """
    pipeline.scheduler.set_timesteps(settings.get("num_inference_steps") or 50)
    timesteps = pipeline.scheduler.timesteps.float().cpu()  # [S]
    signal = pipeline.scheduler.alphas_cumprod.cpu().numpy()
    signal = torch.from_numpy(np.interp(timesteps.numpy(), np.arange(len(signal)), signal)).float().view(-1, 1, 1, 1)
    latents = encode_images(pipeline, [image.file for image in images], settings)  # [N, C, h, w]
    shape = (len(timesteps), *latents.shape[1:])
    noise = [torch.randn(shape, generator=torch.Generator().manual_seed(seed + k)) for k in range(len(images))]
    noisy = signal.sqrt() * latents.unsqueeze(1) + (1 - signal).sqrt() * torch.stack(noise)  # [N, S, C, h, w]
    captions = [image.caption for image in images]
    return Trajectories(noisy.to(pipeline.unet.dtype), timesteps, conditioning(pipeline, captions, settings))


def encode_images(pipeline: DiffusionPipeline, files: list[Path], settings: dict) -> Tensor:
    """Encode images, cropped to the size of sampling, to the UNet's latents: float32 [N, C, h, w] on the CPU.

    The VAE computes in float32, because some overflow in 16 bit.
    """
    height, width = image_size(pipeline, settings.get("height"), settings.get("width"))
    pixels = torch.stack([_pixels(file, (width, height)) for file in files])  # [N, 3, H, W]
    vae = pipeline.vae
    with parts_in_use(pipeline):
        latents = vae.float().encode(pixels.to(vae.device)).latent_dist.mode().cpu()
    config = vae.config
    if config.get("latents_mean") is not None and config.get("latents_std") is not None:
        mean, deviation = (torch.tensor(config[name]).view(1, -1, 1, 1) for name in ("latents_mean", "latents_std"))
        return (latents - mean) * config.scaling_factor / deviation
    return (latents - (config.get("shift_factor") or 0)) * config.scaling_factor


def _pixels(file: Path, size: tuple[int, int]) -> Tensor:
    """Return the largest centre crop of the right aspect ratio, resized: float32 [3, H, W] in [-1, 1]."""
    try:
        image = ImageOps.fit(ImageOps.exif_transpose(read_image(file)), size, Image.Resampling.LANCZOS)
    except ValueError as error:
        raise RunError(f"{FLAG}: {file} cannot be read: {error}") from None
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 127.5 - 1  # [H, W, 3] → [3, H, W]


class _Called(Exception):
    """The UNet has been called once."""


def conditioning(pipeline: DiffusionPipeline, prompts: list[str], settings: dict) -> dict[str, Tensor]:
    """Return the UNet's inputs other than latents and timestep: name → [N, A, ...], recorded from one sampling step."""

    def stop(*_) -> None:
        raise _Called

    with CallRecorder(pipeline.unet, len(prompts)) as recorder:
        hook = pipeline.unet.register_forward_hook(stop)
        try:
            with suppress(_Called):
                sample(pipeline, prompts, 0, 0, settings | {"output_type": "latent"})
        finally:
            hook.remove()
    return recorder.conditioning
