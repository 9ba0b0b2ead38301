"""Small runs and folders that several tests start from."""

import hashlib
import json
import shlex
from pathlib import Path

import numpy as np
from PIL import Image

from vqdm.images import png_bytes

FAST = shlex.split(
    "--calibration_nsamples 10 --evaluation_nsamples 3 --visualize_nsamples 2 --num_inference_steps 2 "
    "--xtx_batch_size 5"
)
ADDITIVE = shlex.split(
    "--num_codebooks 2 --nbits_per_codebook 4 --in_group_size 4 --max_epochs 1 --beam_size 2 --init_max_iter 3"
)

PROMPTS = ["a big red circle", "a small blue star <script>alert(1)</script>", 'a "striped" green cross', "a heart"]
SIDE = 24


def command(model, prompts, out, *extra: str) -> list[str]:
    """A quick run: of additive codes, or of trellis codes with a small table where `--target_bits` is given."""
    code = ["--state_bits", "8"] if "--target_bits" in extra else ADDITIVE
    return [str(model), str(prompts), str(prompts), "--output_dir", str(out), *FAST, *code, *extra]


def file_hashes(out: Path) -> dict[str, str]:
    """Digest of every file of the pipeline; the summary holds times and is left out."""
    files = [path for path in out.rglob("*") if path.is_file() and path.parent != out]
    return {str(path.relative_to(out)): hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(files)}


def pixels(index: int, sample: int, noise: float) -> np.ndarray:
    """A smooth image of its own for each key, with noise on it."""
    rng = np.random.default_rng(10 * index + sample)
    small = Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8))
    smooth = np.asarray(small.resize((SIDE, SIDE), Image.Resampling.BICUBIC), dtype=float)
    return np.clip(smooth + noise * rng.normal(size=smooth.shape), 0, 255).round().astype(np.uint8)


def write_folder(path: Path, noise: float, full_precision: bool, samples: int = 2, **changes) -> Path:
    """A folder as generate.py writes it; the manifest's order is not that of the keys."""
    path.mkdir(parents=True)
    rows = []
    for index, prompt in reversed(list(enumerate(PROMPTS))):
        for sample in range(samples):
            file = f"{index:06d}_{sample:02d}.png"
            (path / file).write_bytes(png_bytes(Image.fromarray(pixels(index, sample, noise)), {}))
            about = {"index": index, "sample": sample, "id": f"p{index}", "prompt": prompt, "seed": index}
            about |= {"negative_prompt": None, "settings": {"guidance_scale": 5.0}, "problem": None} | changes
            rows.append(about | {"file": file, "sha256": "0"})
    (path / "manifest.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = {"settings": {"dtype": "float32", "model_sha256": "m"}, "full_precision": full_precision}
    (path / "run.json").write_text(json.dumps(run))
    return path
