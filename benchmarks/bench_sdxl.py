"""SDXL at its true size: phases of quantizing a part of it, beside the plan, and what they extrapolate to. JSON.

    OMP_NUM_THREADS=1 python benchmarks/bench_sdxl.py --work out/sdxl-random
    OMP_NUM_THREADS=1 python benchmarks/bench_sdxl.py --work out/sdxl-random --widest 11520

Makes a pipeline of SDXL's true configuration with random weights in bfloat16 (6.9 GB of disk, once), then runs
`main_text2image.py` on a part of it: few points, a few layers of every kind and one convolution of `--widest` columns;
on a CPU small images. A line per phase: the most bytes of tensors that lived at once (counted by a dispatch mode; with
the weights of the denoiser, and of VAE or text encoders while it samples), the plan's figure for it, the process's RAM,
seconds; and of all layers at 1024² the plan's figures, and its hours times measured over planned seconds of the part.
Random weights say nothing of errors. RAM on a CPU at 23,040 columns: about 24 GB, at 11,520 about 13 GB.
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import wraps
from pathlib import Path
from unittest.mock import patch

import torch
from diffusers import AutoencoderKL, EulerDiscreteScheduler, StableDiffusionXLPipeline
from main_text2image import main as quantize_main
from random_unets import random_plain
from sdxl import CONFIG
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from vqdm.cli import run_script
from vqdm.devices import Need
from vqdm.diffusion.shapes import LiveBytes
from vqdm.quantization import allocation, block, job, recording

# Phases of the plan and the functions in which their tensors live.
WATCHED = (
    ("teacher", job, "teacher_evaluation"),
    ("hessians", recording.HessianRecorder, "record"),
    ("allocation", allocation, "expected_curves"),
    ("allocation", allocation, "coding_errors"),
    ("allocation", allocation, "output_effects"),
    ("layers", block, "quantize_groups"),
    ("evaluation", job, "student_images"),
)
SAMPLING = ("teacher", "evaluation")  # phases that begin with the text encoders on the device, and then have the VAE
# Convolutions by their columns, and layers of the other kinds.
WIDEST = {
    23040: r"up_blocks\.0\.resnets\.0\.conv1",
    17280: r"up_blocks\.0\.resnets\.2\.conv1",
    11520: r"mid_block\.resnets\.0\.conv1",
    2880: r"down_blocks\.0\.resnets\.0\.conv1",
}
OTHERS = (
    r"(down_blocks\.1|mid_block)\.attentions\.0\.transformer_blocks\.0\."
    r"(attn1\.to_q|attn2\.to_k|ff\.net\.0\.proj|ff\.net\.2)"
)
STATE_BITS: list[str] = []  # further flags: those of smaller codes, for smaller models
SHARED = dict(vocab_size=49408, max_position_embeddings=77, bos_token_id=0, eos_token_id=1, pad_token_id=1)
VAE = dict(
    down_block_types=("DownEncoderBlock2D",) * 4,
    up_block_types=("UpDecoderBlock2D",) * 4,
    block_out_channels=(128, 256, 512, 512),
    layers_per_block=2,
    sample_size=1024,
    scaling_factor=0.13025,
)


def text_encoder(kind: type, width: int, layers: int, heads: int, act: str) -> CLIPTextModel:
    """A text encoder of one of SDXL's two sizes, random."""
    sizes = dict(hidden_size=width, intermediate_size=4 * width, num_hidden_layers=layers, num_attention_heads=heads)
    config = CLIPTextConfig(hidden_act=act, projection_dim=width, **sizes, **SHARED)
    with torch.device("meta"):
        model = kind(config)
    model = model.to(torch.bfloat16).to_empty(device="cpu")
    for tensor in model.parameters():
        tensor.data.normal_(std=0.02)
    for name, buffer in model.named_buffers():
        if name.endswith("position_ids"):
            buffer.copy_(torch.arange(buffer.shape[-1])[None])  # [1, T]
    return model


def make_pipeline(folder: Path, tokenizer: Path) -> None:
    """Write a random SDXL in bfloat16, with the tokenizer of another folder."""
    torch.manual_seed(0)
    words = CLIPTokenizer.from_pretrained(tokenizer, model_max_length=77)
    SHARED.update(bos_token_id=words.bos_token_id, eos_token_id=words.eos_token_id, pad_token_id=words.pad_token_id)
    pipeline = StableDiffusionXLPipeline(
        vae=AutoencoderKL(**VAE),
        text_encoder=text_encoder(CLIPTextModel, 768, 12, 12, "quick_gelu"),
        text_encoder_2=text_encoder(CLIPTextModelWithProjection, 1280, 32, 20, "gelu"),
        tokenizer=words,
        tokenizer_2=words,
        unet=random_plain(CONFIG, torch.bfloat16, "cpu"),
        scheduler=EulerDiscreteScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear"),
        add_watermarker=False,
    )
    pipeline.vae.to(torch.bfloat16)
    pipeline.save_pretrained(folder)


@contextmanager
def counted() -> Iterator[dict[str, list[int]]]:
    """Inside, the program notes by phase the most bytes of tensors that each watched function had alive at once."""
    peaks: dict[str, list[int]] = {phase: [] for phase, _, _ in WATCHED}

    def watched(function, some: list[int]):
        @wraps(function)
        def count(*args, **kwargs):
            with LiveBytes() as live:
                result = function(*args, **kwargs)
            some.append(live.peak)
            return result

        return count

    with ExitStack() as stack:
        for phase, place, name in WATCHED:
            stack.enter_context(patch.object(place, name, watched(getattr(place, name), peaks[phase])))
        yield peaks


@contextmanager
def planned() -> Iterator[list]:
    """Inside, (shapes, needs) of every plan that the program makes are appended to the list."""
    found, make = [], job.plan

    def plan(config, shapes, *args) -> list[Need]:
        needs = make(config, shapes, *args)
        found.append((shapes, needs))
        return needs

    with patch.object(job, "plan", plan):
        yield found


def command(options: argparse.Namespace, out: Path, *more: str) -> list[str]:
    """Words of main_text2image.py, with the prompts of the package."""
    words = [str(options.model), "--output_dir", str(out), "--target_bits", str(options.bits), *STATE_BITS, *more]
    return [*words, "--device", options.device, "--dtype", options.dtype, "--ignore_budget"]


def part_flags(options: argparse.Namespace) -> list[str]:
    """Flags of main_text2image.py for the part that is run."""
    layers = options.layers or f"{OTHERS}|{WIDEST[options.widest]}"
    few = {
        "height": options.size,
        "width": options.size,
        "num_inference_steps": 2,
        "calibration_nsamples": 3,
        "calibration_nsteps": 1,
        "evaluation_nsamples": 1,
        "visualize_nsamples": 0,
        "sensitivity_points": 2,
        "xtx_batch_size": 1,
        "layer_filter": layers,
    }
    return [word for name, value in few.items() for word in (f"--{name}", str(value))]


def whole_plan(options: argparse.Namespace) -> dict[str, Need]:
    """The plan of docs/sdxl.md's command, by phase, from shapes alone."""
    recipe = "--guidance_scale 5 --num_inference_steps 50 --calibration_nsamples 64 --calibration_nsteps 10"
    words = command(options, options.work / "whole", "--dry_run", "--xtx_batch_size", "4", *recipe.split())
    with planned() as found:
        status = run_script(quantize_main, words)
    if status:
        raise SystemExit(status)
    return {need.phase: need for need in found[0][1]}


def rows(options: argparse.Namespace) -> Iterator[dict]:
    """Run the part; a row per phase."""
    out = options.work / "part"
    if options.model is None:
        options.model = options.work / "model"
        if not (options.model / "model_index.json").is_file():
            make_pipeline(options.model, options.tokenizer)
    whole = whole_plan(options)
    shutil.rmtree(out, ignore_errors=True)
    began = time.process_time()
    with counted() as peaks, planned() as found:
        status = run_script(quantize_main, command(options, out, *part_flags(options)))
    if status:
        raise SystemExit(status)
    shapes, needs = found[0]
    summary = json.loads((out / "summary.json").read_text())
    for need in needs:
        seconds, all_layers = summary["seconds"].get(need.phase), whole[need.phase]
        reached = summary["peak_memory_bytes_by_phase"].get(need.phase, {}).get("reached", {})
        lived = max(peaks[need.phase]) if peaks.get(need.phase) else None
        if lived is not None:
            beside = max(shapes.vae + lived, shapes.text) if need.phase in SAMPLING else lived
            lived = shapes.denoiser + beside
        yield {
            "phase": need.phase,
            "part_live_gb": gb(lived),
            "part_planned_gb": gb(need.device),
            "part_rss_gb": gb(reached.get("host")),
            "part_gpu_gb": gb(reached.get("cuda")),
            "part_seconds": seconds,
            "part_planned_seconds": round(need.seconds, 1),
            "whole_planned_gb": gb(all_layers.device),
            "whole_planned_disk_gb": gb(all_layers.disk),
            "whole_hours": seconds and need.seconds and round(all_layers.seconds * seconds / need.seconds / 3600, 2),
        }
    written = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    used = {"size": options.size, "columns": max(row["columns"] for row in summary["layers"])}
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    yield used | {
        "layers": summary["layers_quantized"],
        "rss_gb": gb(peak),
        "written_gb": gb(written),
        "cpu_seconds": round(time.process_time() - began),
    }


def gb(count: float | None) -> float | None:
    return None if count is None else round(count / 1e9, 3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    cuda = torch.cuda.is_available()
    parser.add_argument("--work", type=Path, default=Path("out/sdxl-random"), help="folder of the model and the runs")
    parser.add_argument("--model", type=Path, help="another pipeline's folder (default: a random SDXL, made in --work)")
    parser.add_argument("--tokenizer", type=Path, default=Path("assets/shapes-xl/tokenizer"))
    parser.add_argument("--size", type=int, default=1024 if cuda else 128, help="height and width of the part's images")
    parser.add_argument("--widest", type=int, choices=sorted(WIDEST), default=23040, help="columns of a convolution")
    parser.add_argument("--layers", metavar="REGEX", help="the part's layers, instead of those for --widest")
    parser.add_argument("--bits", type=float, default=3.0)
    parser.add_argument("--device", default="cuda" if cuda else "cpu")
    parser.add_argument("--dtype", default="bfloat16", choices=("float32", "float16", "bfloat16"))
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    for row in rows(options):
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
