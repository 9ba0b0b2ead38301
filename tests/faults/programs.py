"""The programs that the tests of faults start, kill and resume: a row each. A new program is a new row.

Each works on a tiny pipeline, for a second or two.
"""

from __future__ import annotations

import hashlib
import json
import shlex
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from vqdm.images import read_rows

QUANTIZE = shlex.split(
    "--num_codebooks 1 --nbits_per_codebook 3 --in_group_size 4 --calibration_nsamples 4 --evaluation_nsamples 2 "
    "--visualize_nsamples 1 --num_inference_steps 2 --max_epochs 1 --beam_size 1 --init_max_iter 1 --xtx_batch_size 2 "
    "--device cpu --layer_filter '(down_blocks.1|mid_block).*attn1.to_[qkv]|down_blocks.0.resnets.0.conv1'"
)
GENERATE = shlex.split("--num_inference_steps 1 --bs 2 --num_samples_per_prompt 2 --limit 4 --device cpu")
FINETUNE = shlex.split(
    "--finetune_nsamples 2 --held_out_nsamples 1 --held_out_points 2 --evaluation_nsamples 1 --visualize_nsamples 1 "
    "--num_inference_steps 2 --xtx_batch_size 2 --finetune_batch_size 2 --local_batch_size 2 --finetune_max_epochs 2 "
    "--eval_step 2 --checkpointing_steps 1 --finetune_method student+teacher --finetune_keep_best --update_codes "
    "--device cpu"
)  # two epochs of two steps, a checkpoint after each
METRICS = shlex.split("--metrics psnr ssim --report_images 2 --device cpu")


@dataclass(frozen=True)
class Materials:
    """What programs work on: a pipeline folder, a quantized one, a prompt file, and two folders of images."""

    model: Path
    quantized: Path
    prompts: Path
    images: Path
    reference: Path


@dataclass(frozen=True)
class Program:
    """One program of the table.

    Attributes:
        words: script and arguments for an output folder, without --resume.
        results: files of a finished output folder, relative → digest; the same in every run.
        kept: files that count as done in an unfinished folder; a resumption must not make them again.
        unkept: files that are there without counting as done, and are made again: a batch for each process at most.
        resumes: whether it has --resume; what has not starts again.
        ranks_agree: whether any number of processes gives the same bytes; else the same number does.
    """

    words: Callable[[Materials, Path], list]
    results: Callable[[Path], dict[str, str]]
    kept: Callable[[Path], set[Path]]
    unkept: Callable[[Path], int] = lambda out: 0
    resumes: bool = True
    ranks_agree: bool = True


def digests(out: Path, *patterns: str) -> dict[str, str]:
    files = sorted(path for pattern in patterns for path in out.glob(pattern) if path.is_file())
    assert files, f"{out} holds no result"
    return {str(path.relative_to(out)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def pieces(out: Path) -> set[Path]:
    """Layers, Hessians and recorded batches."""
    return {path for path in out.glob("work/*/*.safetensors") if not path.name.startswith(".")}


def checkpoints(out: Path) -> set[Path]:
    """What is recorded, and whole checkpoints."""
    return pieces(out) | set(out.glob("checkpoint-[0-9]*/*"))


def rows_of(out: Path) -> dict[str, str]:
    """Picture → digest, by the manifests as far as they are."""
    return {row["file"]: row["sha256"] for path in out.glob("manifest*.jsonl") for row in read_rows(path)}


def whole_pictures(out: Path) -> dict[str, str]:
    """Results of `generate.py`; every row of the manifest is that of its file."""
    found = digests(out, "*.png", "manifest.jsonl")
    assert rows_of(out) == {name: digest for name, digest in found.items() if name.endswith(".png")}
    assert not list(out.glob("manifest.*.jsonl"))
    return found


def pictures_with_rows(out: Path) -> set[Path]:
    return {out / name for name in rows_of(out) if (out / name).is_file()}


def pictures_without_rows(out: Path) -> int:
    return len({path.name for path in out.glob("[0-9]*.png")} - rows_of(out).keys())


def scores(out: Path) -> dict[str, str]:
    """Results of `metrics.py`; the report and the command line tell where they were made."""
    values = json.loads((out / "metrics.json").read_text())["metrics"]
    return (
        digests(out, "per_image.csv")
        | {"metrics": json.dumps(values)}
        | {"report": str((out / "report.html").stat().st_size > 0)}
    )


def quantize(given: Materials, out: Path) -> list:
    return ["main_text2image", given.model, given.prompts, given.prompts, "--output_dir", out, *QUANTIZE]


def generate(given: Materials, out: Path) -> list:
    return ["generate", given.model, given.prompts, "--output_dir", out, *GENERATE]


def finetune(given: Materials, out: Path) -> list:
    return ["finetune", given.model, given.quantized, given.prompts, given.prompts, "--output_dir", out, *FINETUNE]


def metrics(given: Materials, out: Path) -> list:
    return ["metrics", given.images, "--reference", given.reference, "--output_dir", out, *METRICS]


PROGRAMS = {
    "quantize": Program(quantize, results=lambda out: digests(out, "*/*", "image_pairs.png"), kept=pieces),
    "finetune": Program(
        finetune, results=lambda out: digests(out, "*/*", "image_pairs.png"), kept=checkpoints, ranks_agree=False
    ),
    "generate": Program(generate, results=whole_pictures, kept=pictures_with_rows, unkept=pictures_without_rows),
    "metrics": Program(metrics, results=scores, kept=lambda out: set(), resumes=False),
}
BATCH = 2  # of generate
