"""Train the judge of the tests, an attribute classifier, on renders.

    python assets/make/train_judge.py --work build/shapes --out tests/judge/judge.safetensors

Needs WORK/vae. Generated images are never as crisp as renders; that they are judged fairly, some of the training
images are renders that went through the autoencoder, and half are degraded (softened, tinted, noisy). Prints the
accuracy of every field on held-out scenes: renders, degraded renders, and reconstructions.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import random
import time
from pathlib import Path
from types import ModuleType

import torch
from diffusers import AutoencoderKL
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from scenes import Scene, sample_scene, sample_split, split_of
from train_text import field_losses, labels_of
from train_vae import render_many

JUDGE = Path(__file__).resolve().parents[2] / "tests" / "judge" / "judge.py"


def judge_module() -> ModuleType:
    """tests/judge/judge.py, which is not on the import path of these scripts."""
    spec = importlib.util.spec_from_file_location("judge", JUDGE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def training_scenes(count: int, rng: random.Random) -> list[Scene]:
    scenes = []
    while len(scenes) < count:
        scene = sample_scene(rng)
        if split_of(scene) == "training":
            scenes.append(scene)
    return scenes


def degrade(images: Tensor, generator: torch.Generator) -> Tensor:
    """Soften, tint and add noise to images [B, 3, 64, 64] in [0, 1], each by its own random strength."""

    def strength(*shape: int) -> Tensor:
        return torch.rand(len(images), *shape, generator=generator)

    soft = F.interpolate(F.avg_pool2d(images, 2), images.shape[-2:], mode="bilinear")
    images = images.lerp(soft, strength(1, 1, 1))
    images = images * (0.92 + 0.16 * strength(3, 1, 1))
    clouds = torch.randn(len(images), 3, 8, 8, generator=generator) * 0.04 * strength(1, 1, 1)
    images = images + F.interpolate(clouds, images.shape[-2:], mode="bilinear")
    grain = torch.randn(images.shape, generator=generator) * 0.05 * strength(1, 1, 1)
    return (images + grain).clamp(0, 1)


def half_degraded(images: Tensor, generator: torch.Generator) -> Tensor:
    """float32 [B, 3, 64, 64] of uint8 images, the second half of them degraded."""
    clean, rest = (images.float() / 255).chunk(2)
    return torch.cat([clean, degrade(rest, generator)]).to(memory_format=torch.channels_last)


@torch.no_grad()
def reconstructed(folder: Path, images: Tensor) -> Tensor:
    """uint8 images [N, 3, 64, 64], through the autoencoder of `folder` and back."""
    vae, chunks = AutoencoderKL.from_pretrained(folder).to(memory_format=torch.channels_last), []
    for chunk in images.split(64):
        pixels = vae.decode(vae.encode(chunk.float() / 127.5 - 1).latent_dist.mode()).sample
        chunks.append((pixels * 127.5 + 127.5).round().clamp(0, 255).byte())
    return torch.cat(chunks)


def train(model: nn.Module, images: Tensor, labels: Tensor, steps: int) -> None:
    """Cross-entropy of all fields over `steps` batches of 64; one JSON line every 100 steps."""
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, steps, pct_start=0.1)
    began = time.time()
    for step in range(steps):
        rows = torch.randint(len(images), (64,), generator=generator)
        loss = field_losses(model(half_degraded(images[rows], generator)), labels[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 100 == 0:
            print(json.dumps({"step": step, "loss": loss.item(), "seconds": round(time.time() - began)}), flush=True)


def accuracy(judge: ModuleType, model: nn.Module, images: Tensor, scenes: list[Scene]) -> dict[str, float]:
    """Share of images [N, 3, 64, 64] in [0, 1] with each field right, and with all of them right."""
    labels = torch.tensor([labels_of(scene) for scene in scenes])  # [N, 11]
    right = torch.stack(list(judge.judge(images, model).values()), dim=1) == labels
    right = torch.cat([right, right.all(1, keepdim=True)], dim=1).float()  # [N, 12]
    return {name: round(share, 4) for name, share in zip((*judge.NAMES, "all"), right.mean(0).tolist(), strict=True)}


def save(model: nn.Module, path: Path) -> None:
    halves = {k: v.half() if v.is_floating_point() else v for k, v in model.state_dict().items()}
    save_file({name: tensor.contiguous() for name, tensor in halves.items()}, path)


def report(judge: ModuleType, options: argparse.Namespace) -> None:
    """One JSON line of accuracies for each kind of image."""
    held_out, model = sample_split("evaluation", 1000, seed=4), judge.load(options.out)
    renders = render_many(held_out, seed=5)
    kinds = {
        "clean": renders.float() / 255,
        "degraded": degrade(renders.float() / 255, torch.Generator().manual_seed(6)),
        "reconstructed": reconstructed(options.work / "vae", renders).float() / 255,
    }
    for kind, images in kinds.items():
        print(json.dumps({kind: accuracy(judge, model, images, held_out)}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True, metavar="FILE.safetensors")
    parser.add_argument("--scenes", type=int, default=18000)
    parser.add_argument("--reconstructions", type=int, default=9000)
    parser.add_argument("--steps", type=int, default=2000)
    options = parser.parse_args()
    torch.manual_seed(0)
    judge = judge_module()
    scenes = training_scenes(options.scenes, random.Random(4))
    labels, images = torch.tensor([labels_of(scene) for scene in scenes]), render_many(scenes, seed=4)
    rebuilt = reconstructed(options.work / "vae", images[: options.reconstructions])
    model = judge.build().to(memory_format=torch.channels_last)
    train(model, torch.cat([images, rebuilt]), torch.cat([labels, labels[: len(rebuilt)]]), options.steps)
    save(model, options.out)
    report(judge, options)


if __name__ == "__main__":
    main()
