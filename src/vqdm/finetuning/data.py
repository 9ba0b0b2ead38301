"""Datasets of fine-tuning: prompts, real images with captions, and the points that are recorded from them.

Letters: N images, S steps.
"""

from __future__ import annotations

import hashlib
import os
import random
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from diffusers import DiffusionPipeline
from PIL import Image, ImageOps
from torch import Tensor, nn

from vqdm.devices import BatchSize
from vqdm.diffusion.denoisers import compute_dtype, denoiser_name, denoiser_of, output_of
from vqdm.diffusion.pipelines import image_size, is_flow_matching, parts_in_use, sample
from vqdm.diffusion.sampling import EVALUATION_SEED_OFFSET, record_evaluation
from vqdm.diffusion.trajectories import (
    CallRecorder,
    Trajectories,
    by_kind,
    collate,
    collate_outputs,
    join,
    spread_points,
)
from vqdm.documents import first_line, read_text
from vqdm.errors import RunError, UserError
from vqdm.finetuning.config import FinetuneConfig, sources
from vqdm.images import BESIDE, FORMATS, SUFFIXES, check_image, is_hidden, is_sheet, listed, read_image, save_png
from vqdm.layers.quantized import decoded_once
from vqdm.parallel import Ranks
from vqdm.prompts import choose, load_prompts, load_rows, log_notes
from vqdm.storage.run_folder import span_name, spans, wait_for_file
from vqdm.tracking import log_info, progress_bar

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
    """Raise UserError if a scheduler does not define by alphas_cumprod how much noise a timestep has."""
    kind = type(scheduler).__name__
    if is_flow_matching(scheduler):
        raise UserError(f"--finetune_method is real, but {kind} is of flow matching; allowed are teacher, student")
    if not hasattr(scheduler, "alphas_cumprod"):
        raise UserError(f"--finetune_method real needs a scheduler with alphas_cumprod; {kind} lacks it")


@torch.no_grad()
def noised_images(pipeline: DiffusionPipeline, images: list[CaptionedImage], seed: int, settings: dict) -> Trajectories:
    """Return the points √ᾱ_t · x + √(1 - ᾱ_t) · ε at every timestep of the scheduler; image k's noise has `seed + k`.

    Schedulers whose noise grows while the signal stays (Euler) scale the denoiser's input to the same points.

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
    first = first_calls(pipeline, [image.caption for image in images], settings)
    return first.at(noisy.to(denoiser_of(pipeline).dtype), timesteps)


def encode_images(pipeline: DiffusionPipeline, files: list[Path], settings: dict) -> Tensor:
    """Encode images, cropped to the size of sampling, to latents: float32 [N, C, h, w] on the CPU.

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
    """The denoiser has been called once."""


def first_calls(pipeline: DiffusionPipeline, prompts: list[str], settings: dict) -> Trajectories:
    """Return the denoiser's first call, recorded from one sampling step."""

    def stop(*_) -> None:
        raise _Called

    with CallRecorder(denoiser_of(pipeline), len(prompts)) as recorder:
        hook = denoiser_of(pipeline).register_forward_hook(stop)
        try:
            with suppress(_Called):
                sample(pipeline, prompts, 0, 0, settings | {"output_type": "latent"})
        finally:
            hook.remove()
    return recorder.trajectories()


# ------------------------------------------------------------------------------------------------------ recorded points
#
# How recorded points are made and stored, and in which order training uses them.
#
# A point is one call of one sampling trajectory, with all its guidance branches. Trajectories are sampled with the
# teacher or the student, or made from real images by adding noise. They are recorded in chunks of prompts, one file per
# chunk; the content of a chunk does not depend on the process that records it.
#
# Letters: N prompts, J calls of a trajectory, A guidance branches, B points in a batch.

HELD_OUT_SEED_OFFSET, TRAINING_SEED_OFFSET = 2_000_000, 3_000_000  # far from those of calibration and evaluation


class Point(NamedTuple):
    """A call of one of the trajectories of a part."""

    part: int
    prompt: int
    call: int


class Batch(NamedTuple):
    """B points: keyword arguments of a call, and the teacher's output [A·B, ...], None if not recorded."""

    count: int
    call: dict
    teacher_output: Tensor | None


@dataclass(frozen=True)
class Points:
    """Points of several parts, which may come from other models or images; `chosen` are those in use, or all."""

    parts: list[Trajectories]
    chosen: list[Point] | None = None

    def all(self) -> list[Point]:
        """Return all points in use, part by part, prompt by prompt."""
        if self.chosen is not None:
            return self.chosen
        return [Point(k, n, s) for k, part in enumerate(self.parts) for n, s in part.points()]

    def timestep(self, point: Point) -> float:
        """Return a point's timestep, from 0 (no noise) to 1000."""
        return self.parts[point.part].timesteps[point.call].item()

    def alike(self, places: Sequence[int], points: Sequence[Point]) -> list[list[int]]:
        """Return places in a list of points, divided into those that one call can take; each keeps its order."""
        return by_kind(places, lambda place: self.parts[points[place].part].kind(points[place][1:]))

    def batch(self, points: Sequence[Point], device: torch.device, dtype: torch.dtype) -> Batch:
        """Collate B points of one kind on `device`; floating-point inputs are in `dtype`."""
        picked = [(self.parts[k], n, j) for k, n, j in points]
        call = collate(picked, device, dtype)
        if not all(part.has_outputs for part, *_ in picked):
            return Batch(len(points), call, None)
        return Batch(len(points), call, collate_outputs(picked, device))


# ------------------------------------------------------------------------------------------- selection and order


def spread(points: Points, count: int) -> list[Point]:
    """Return about `count` points: equally many per prompt (at least one), at timesteps that shift between prompts."""
    sizes = [part.shape[0] for part in points.parts]
    each, firsts = max(1, count // sum(sizes)), accumulate(sizes, initial=0)
    parts = enumerate(zip(points.parts, firsts, strict=False))
    return [Point(k, n, s) for k, (part, first) in parts for n, s in spread_points(part, each, first)]


def split_held_out(points: Points) -> tuple[list[Point], list[Point]]:
    """Split into training and held-out points: every tenth prompt is held out, or the last if there are fewer than ten.

    Of a single prompt every tenth point is held out, or the last; a single point is in both lists.
    """
    every = points.all()
    keys = [point[:2] for point in every]
    if len(set(keys)) == 1:
        keys = every
    held_out = set(list(dict.fromkeys(keys))[9::10] or keys[-1:])
    training = [point for point, key in zip(every, keys, strict=True) if key not in held_out]
    return training or every, [point for point, key in zip(every, keys, strict=True) if key in held_out]


def shuffled(points: Points, weights: Sequence[float] | None, seed: str) -> list[Point]:
    """Return all points in random order; with `weights`, one per point, as many sampled with replacement."""
    every, generator = points.all(), random.Random(seed)
    if weights is None:
        return generator.sample(every, len(every))
    return generator.choices(every, weights, k=len(every))


def timestep_weights(points: Points, sampling: str, loss_by_timestep: Sequence[float] = ()) -> list[float] | None:
    """Return a sampling weight per point, None for uniform sampling.

    beta: t / 1000 as Beta(3, 1), with density 3·(t/1000)² (BitsFusion, arXiv 2406.04333).
    error: the student's mean squared error in t's bin of `loss_by_timestep`, bins of equal width.
    """
    if sampling == "uniform":
        return None
    timesteps = [points.timestep(point) for point in points.all()]
    if sampling == "beta":
        return [3 * (t / 1000) ** 2 for t in timesteps]
    return [loss_by_timestep[bin_of(t, len(loss_by_timestep))] for t in timesteps]


def bin_of(timestep: float, bins: int) -> int:
    """Return the bin of equal width that a timestep in [0, 1000] falls into."""
    return min(int(timestep * bins / 1000), bins - 1)


# ------------------------------------------------------------------------------------------- recording


@dataclass(frozen=True)
class Chunk:
    """Items `first` to `first + count` of the endless sequence of prompts or images, for one source of trajectories."""

    source: str
    first: int
    count: int

    @property
    def items(self) -> range:
        return range(self.first, self.first + self.count)


def divided(names: Sequence[str], first: int, count: int) -> list[Chunk]:
    """Divide `count` items from `first` on evenly among the sources; the batch size has no influence."""
    ends = [first + count * k // len(names) for k in range(len(names) + 1)]
    parts = zip(names, ends, ends[1:], strict=False)
    return [Chunk(source, start, end - start) for source, start, end in parts if end > start]


def record_points(
    folder: Path, parts: Sequence[Chunk], size: BatchSize, record: Callable[[Chunk], Trajectories], ranks: Ranks
) -> Points:
    """Load the points of all parts, in chunks of at most `size`; each chunk not in `folder` is recorded by one rank.

    A chunk that is out of memory is recorded in halves.

    Raises:
        RunError: recorded latents hold NaN, or a file of another process does not appear or is damaged.
    """
    places = [(part.source, spans(ranks, folder, part.first, part.count, size.value)) for part in parts]
    chunks = [Chunk(source, *span) for source, found in places for span in found]
    files = [folder / f"{span_name(chunk.first, chunk.count)}.safetensors" for chunk in chunks]
    missing = ranks.broadcast([k for k, file in enumerate(files) if not file.is_file()])

    def record_some(source: str, items: range) -> Trajectories:
        return record(Chunk(source, items.start, len(items)))

    for k in progress_bar(ranks.shard(missing), description=f"recording points: {folder.name}"):
        found = join([part for _, part in size.batches(partial(record_some, chunks[k].source), chunks[k].items)])
        if not found.is_finite():
            source = chunks[k].source
            raise RunError(f"{source} trajectories hold NaN or infinity; use another --dtype (float32 or bfloat16)")
        found.save(files[k])
    ranks.barrier()
    for file in files:
        wait_for_file(file)
    return Points([Trajectories.load(file) for file in files])


@dataclass(frozen=True)
class TrajectoryRecorder:
    """Records the points of a fine-tuning into the run's working folder, and loads those that exist.

    Attributes:
        pipeline: with the teacher as its denoiser.
        student: the denoiser in training.
        folder: has a folder for the held-out points, one for the evaluation points, and one per epoch.
    """

    config: FinetuneConfig
    datasets: Datasets
    pipeline: DiffusionPipeline
    student: nn.Module
    folder: Path
    ranks: Ranks
    size: BatchSize

    def held_out(self) -> Points:
        """Return the teacher's trajectories and outputs on the held-out prompts."""
        prompts, seed = self.datasets.held_out, self.config.seed + HELD_OUT_SEED_OFFSET

        def record(chunk: Chunk) -> Trajectories:
            some = prompts[chunk.first : chunk.first + chunk.count]
            return sample_points(
                self.pipeline, denoiser_of(self.pipeline), some, seed + chunk.first, self._settings, True
            )

        return self._recorded("held_out", divided(["teacher"], 0, len(prompts)), record)

    def evaluation(self) -> Points:
        """Return the teacher's trajectories and outputs on the evaluation prompts; saves its images beside them.

        Raises:
            RunError: as `record_evaluation`.
        """
        prompts, seed = self.datasets.evaluation, self.config.seed + EVALUATION_SEED_OFFSET

        def record(chunk: Chunk) -> Trajectories:
            some = prompts[chunk.first : chunk.first + chunk.count]
            found, images = record_evaluation(self.pipeline, some, seed + chunk.first, self._settings, self.size)
            for k, image in enumerate(images):
                save_png(image, self.folder / "evaluation" / f"{chunk.first + k:06d}.png")
            return found

        return self._recorded("evaluation", divided(["teacher"], 0, len(prompts)), record)

    def teacher_images(self) -> list[Image.Image]:
        """Load the teacher's images of the evaluation prompts, in their order."""
        return [Image.open(file).convert("RGB") for file in sorted((self.folder / "evaluation").glob("*.png"))]

    def epoch(self, epoch: int, keep_outputs: bool) -> Points:
        """Return an epoch's training points; student trajectories are sampled with the student in its present state.

        The teacher leaves the device if all its outputs are recorded with the points.
        """
        first, count = epoch * self.config.finetune_nsamples, self.config.finetune_nsamples
        parts = divided(sources(self.config.finetune_method), first, count)
        teacher = denoiser_of(self.pipeline)
        if self.config.finetune_scope != "blocks":
            teacher.to(self.ranks.device)
        points = self._recorded(f"epoch-{epoch:04d}", parts, lambda chunk: self._training_chunk(chunk, keep_outputs))
        if all(part.has_outputs for part in points.parts):  # an interrupted run may have recorded none
            teacher.to("cpu")
        return points

    def _training_chunk(self, chunk: Chunk, keep_outputs: bool) -> Trajectories:
        seed, teacher = self.config.seed + TRAINING_SEED_OFFSET + chunk.first, denoiser_of(self.pipeline)
        if chunk.source == "real":
            images = self.datasets.training_images(chunk.first, chunk.count)
            part = noised_images(self.pipeline, images, seed, self._settings)
        else:
            denoiser = self.student if chunk.source == "student" else teacher
            prompts = self.datasets.training_prompts(chunk.first, chunk.count)
            outputs = keep_outputs and denoiser is teacher
            part = sample_points(self.pipeline, denoiser, prompts, seed, self._settings, outputs)
        if keep_outputs and not part.has_outputs:
            part = with_teacher_outputs(teacher, part, chunk.count)
        return part

    def delete_epochs(self, before: int) -> None:
        """Delete the points of all epochs before number `before`."""
        for folder in self.folder.glob("epoch-*") if self.ranks.main else ():
            if int(folder.name.removeprefix("epoch-")) < before:
                shutil.rmtree(folder)

    def keeps_outputs(self, points: Points) -> bool:
        """Return whether the teacher outputs of an epoch of points like these fit --target_cache_gb and the disk."""
        need = points.parts[0].output_bytes() * self.config.finetune_nsamples
        free = shutil.disk_usage(self.folder).free
        fits = self.ranks.broadcast(need <= 1e9 * self.config.target_cache_gb and 2 * need < free)
        where = "kept on disk" if fits else "computed at every step"
        log_info(f"teacher outputs: {need / 1e9:.2f} GB per epoch, {where}")
        return fits

    @property
    def _settings(self) -> dict:
        return self.config.sampling.call()

    def _recorded(self, name: str, parts: list[Chunk], record: Callable[[Chunk], Trajectories]) -> Points:
        return record_points(self.folder / name, parts, self.size, record, self.ranks)


def sample_points(
    pipeline: DiffusionPipeline, denoiser: nn.Module, prompts: list[str], seed: int, settings: dict, outputs: bool
) -> Trajectories:
    """Sample with `denoiser` in the pipeline, and record inputs and, on request, outputs; prompt k has `seed + k`."""
    with with_denoiser(pipeline, denoiser), CallRecorder(denoiser, len(prompts), outputs) as recorder:
        sample(pipeline, prompts, seed, 0, settings | {"output_type": "latent"})
    return recorder.trajectories()


@contextmanager
def with_denoiser(pipeline: DiffusionPipeline, denoiser: nn.Module) -> Iterator[None]:
    """Inside, the pipeline samples with another denoiser, with its weights decoded once.

    It computes in the type of the one it replaces, under autocast. Text encoders and VAE are not under autocast,
    because VAEs that choose float32 (they overflow in 16 bit) would lose it.
    """
    name, own, forward = denoiser_name(pipeline), denoiser_of(pipeline), denoiser.forward
    device, dtype = denoiser.device, compute_dtype(own)

    def autocast_forward(*args, **kwargs):
        with autocast(device, dtype):
            return forward(*args, **kwargs)

    if denoiser is not own:
        denoiser.forward = autocast_forward
        setattr(pipeline, name, denoiser)
    try:
        with torch.no_grad(), decoded_once(denoiser):
            yield
    finally:
        if denoiser is not own:
            del denoiser.forward
            setattr(pipeline, name, own)


def autocast(device: torch.device, dtype: torch.dtype) -> AbstractContextManager:
    """Return torch's autocast to `dtype`; nothing for float32."""
    return nullcontext() if dtype == torch.float32 else torch.autocast(device.type, dtype)


@torch.no_grad()
def with_teacher_outputs(teacher: nn.Module, part: Trajectories, size: int) -> Trajectories:
    """Return the trajectories with the teacher's outputs at all points, `size` per batch, typed as the latents."""
    found = {}
    for points in part.batches(part.points(), size):
        call = part.inputs(points, teacher.device, teacher.dtype)
        output = output_of(teacher(**call))  # [A·B, ...]
        output = output.unflatten(0, (-1, len(points))).transpose(0, 1).to("cpu", part.dtype)  # [B, A, ...]
        found |= dict(zip(points, output, strict=True))
    return part.with_outputs(found)
