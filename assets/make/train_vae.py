"""Train the small pipeline's autoencoder on renders.

    python assets/make/train_vae.py --work build/shapes
    python assets/make/train_vae.py --work build/shapes --decoder_only --lr 1e-3

Writes WORK/vae (a diffusers folder), resuming from an existing one, and prints the reconstruction PSNR on held-out
scenes.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from pathlib import Path

import torch
from diffusers import AutoencoderKL

from models import make_vae
from scenes import render, sample_scene, sample_split


def render_many(scenes: list, seed: int) -> torch.Tensor:
    """uint8 [N, 3, 64, 64], rendered 256 at a time."""
    generator = torch.Generator().manual_seed(seed)
    chunks = [render(scenes[i : i + 256], generator) for i in range(0, len(scenes), 256)]
    return torch.cat([(chunk * 255).round().byte() for chunk in chunks])


def batch(images: torch.Tensor, size: int, generator: torch.Generator) -> torch.Tensor:
    """`size` random images in [-1, 1], channels last; whole ones, because group norms see the share of background."""
    rows = torch.randint(len(images), (size,), generator=generator)
    return (images[rows].float() / 127.5 - 1).to(memory_format=torch.channels_last)


def loss_of(vae, pixels: torch.Tensor) -> torch.Tensor:
    """L1 and squared error of pixels and of their differences, and a light pull of the latents to N(0, 1).

    Saturated pixels count up to five times, or the few coloured ones would drown in gray background.
    """
    posterior = vae.encode(pixels).latent_dist
    saturation = (pixels.amax(1, keepdim=True) - pixels.amin(1, keepdim=True)) / 2  # [B, 1, S, S] in [0, 1]
    error = (vae.decode(posterior.sample()).sample - pixels) * (1 + 4 * saturation)
    edges = error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
    kl = 0.5 * (posterior.mean**2 + posterior.var - 1 - posterior.logvar).mean()
    return error.abs().mean() + error.square().mean() + 0.5 * edges + 5e-4 * kl


@torch.no_grad()
def measure(vae, images: torch.Tensor) -> dict[str, float]:
    """PSNR in dB on [0, 1] pixels, and the latents' spread."""
    pixels = images.float() / 127.5 - 1
    latents = vae.encode(pixels).latent_dist.mode()
    mse = ((vae.decode(latents).sample - pixels) / 2).square().mean()
    return {"psnr": float(-10 * mse.log10()), "latent_std": float(latents.std()), "latent_mean": float(latents.mean())}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--batch", type=int, default=6)
    parser.add_argument("--decoder_only", action="store_true", help="keep the latents as they are")
    parser.add_argument("--lr", type=float, default=1.5e-3)
    options = parser.parse_args()
    torch.manual_seed(0)
    rng, generator = random.Random(0), torch.Generator().manual_seed(0)
    images = render_many([sample_scene(rng) for _ in range(6000)], seed=1)
    held_out = render_many(sample_split("evaluation", 128, seed=0), seed=2)
    earlier = options.work / "vae"
    vae = AutoencoderKL.from_pretrained(earlier) if earlier.exists() else make_vae()
    vae.to(memory_format=torch.channels_last).train()
    if options.decoder_only:
        vae.encoder.requires_grad_(False)
        vae.quant_conv.requires_grad_(False)
    optimizer = torch.optim.AdamW([p for p in vae.parameters() if p.requires_grad], lr=options.lr, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, options.lr, options.steps, pct_start=0.05)
    began = time.time()
    for step in range(options.steps):
        loss = loss_of(vae, batch(images, options.batch, generator))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 100 == 0:
            row = {"step": step, "loss": round(loss.item(), 4), "seconds": round(time.time() - began)}
            print(json.dumps(row | measure(vae, held_out)), flush=True)
    figures = measure(vae, held_out)
    if not options.decoder_only:
        vae.register_to_config(scaling_factor=round(1 / figures["latent_std"], 5))
    vae.save_pretrained(options.work / "vae")
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
