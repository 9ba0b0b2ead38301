"""Train the small pipeline's UNet on cached latents, and write the finished pipeline folder.

    python assets/make/train_unet.py --work build/shapes --steps 12000 --compile
    python assets/make/train_unet.py --work build/shapes --finish assets/shapes-xl

Needs WORK/{vae,tokenizer,text_encoder,text_encoder_2} of the scripts before it. Killed and started again, it goes on
from the last checkpoint. `--finish` writes the averaged weights in fp16 as a StableDiffusionXLPipeline and stops.
"""

from __future__ import annotations

import argparse
import copy
import json
import random
import time
from collections.abc import Callable
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDPMScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from torch import Tensor
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from models import make_scheduler, make_unet
from scenes import caption, sample_scene, split_of
from train_text import tokenize
from train_vae import render_many

TIME_IDS = (64, 64, 0, 0, 64, 64)


def training_scenes(count: int) -> list:
    rng, scenes = random.Random(1), []
    while len(scenes) < count:
        scene = sample_scene(rng)
        if split_of(scene) == "training":
            scenes.append(scene)
    return scenes


@torch.no_grad()
def cached_latents(work: Path, scenes: list, vae: AutoencoderKL) -> Tensor:
    """float16 [N, 4, 16, 16], scaled to unit spread; encoded once and kept in WORK/latents.pt."""
    path = work / "latents.pt"
    if not path.exists():
        vae = vae.to(memory_format=torch.channels_last)
        images, chunks = render_many(scenes, seed=3), []
        for pixels in images.split(64):
            mode = vae.encode(pixels.float() / 127.5 - 1).latent_dist.mode()
            chunks.append((mode * vae.config.scaling_factor).half())
        torch.save(torch.cat(chunks), path)
    return torch.load(path, weights_only=True)


class Captioner:
    """Captions to SDXL's conditioning, with the frozen text encoders."""

    def __init__(self, work: Path):
        self.tokenizer = CLIPTokenizer.from_pretrained(work / "tokenizer")
        self.first = CLIPTextModel.from_pretrained(work / "text_encoder").eval()
        self.second = CLIPTextModelWithProjection.from_pretrained(work / "text_encoder_2").eval()

    @torch.no_grad()
    def __call__(self, captions: list[str], keep: Tensor) -> tuple[Tensor, Tensor]:
        """Token features [B, T, D] and pooled features [B, P]; zeros, as for SDXL's empty prompt, where not `keep`."""
        ids = tokenize(self.tokenizer, captions)
        first = self.first(ids, output_hidden_states=True).hidden_states[-2]
        second = self.second(ids, output_hidden_states=True)
        tokens = torch.cat([first, second.hidden_states[-2]], dim=-1)
        return tokens * keep[:, None, None], second.text_embeds * keep[:, None]


class Trainer:
    """Model, its average, optimizer and random state: all that a checkpoint holds."""

    def __init__(self, model: torch.nn.Module, work: Path, lr: float, beta: float = 0.999, decay: float = 0.9993):
        self.path, self.model, self.decay = work / "checkpoint.pt", model, decay
        self.average = copy.deepcopy(model).requires_grad_(False)
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, beta), weight_decay=0.01, fused=True)
        self.generator, self.rng, self.step = torch.Generator().manual_seed(0), random.Random(2), 0

    def save(self) -> None:
        state = {"model": self.model, "average": self.average, "optimizer": self.optimizer}
        state = {name: part.state_dict() for name, part in state.items()}
        state |= {"generator": self.generator.get_state(), "step": self.step}
        torch.save(state, self.path.with_suffix(".tmp"))
        self.path.with_suffix(".tmp").replace(self.path)

    def load(self) -> None:
        if self.path.exists():
            state = torch.load(self.path, weights_only=True)
            for name in ("model", "average", "optimizer"):
                getattr(self, name).load_state_dict(state[name])
            self.generator.set_state(state["generator"])
            self.step, self.rng = state["step"], random.Random(state["step"])

    def update_average(self) -> None:
        decay = min(self.decay, (1 + self.step) / (10 + self.step))
        with torch.no_grad():
            torch._foreach_lerp_(list(self.average.parameters()), list(self.model.parameters()), 1 - decay)

    def fit(self, steps: int, rate: Callable[[int], float], batch_loss: Callable[[], Tensor]) -> None:
        """Take what is left of `steps` steps, `rate(step)` the learning rate; log every 100 and save every 500."""
        began, losses = time.time(), []
        while self.step < steps:
            loss = batch_loss()
            self.optimizer.param_groups[0]["lr"] = rate(self.step)
            self.optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            self.optimizer.step()
            self.step += 1
            self.update_average()
            losses.append(loss.item())
            if self.step % 100 == 0:
                row = {"step": self.step, "loss": sum(losses) / len(losses), "seconds": round(time.time() - began)}
                print(json.dumps(row), flush=True)
                losses.clear()
            if self.step % 500 == 0 or self.step == steps:
                self.save()


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Warm-up over 300 steps, then a cosine to zero."""
    cosine = 0.5 * (1 + torch.cos(torch.tensor(step / steps * torch.pi)).item())
    return peak * min(1.0, (step + 1) / 300) * cosine


def velocity_loss(forward, noising: DDPMScheduler, latents: Tensor, conditioning, generator) -> Tensor:
    """Mean squared error of the velocity at timesteps stratified over the batch."""
    tokens, pooled = conditioning
    size = len(latents)
    noise = torch.randn(latents.shape, generator=generator)
    steps = ((torch.arange(size) + torch.rand(size, generator=generator)) * 1000 / size).long()
    added = {"text_embeds": pooled, "time_ids": torch.tensor([TIME_IDS] * size, dtype=torch.float32)}
    noisy = noising.add_noise(latents, noise, steps).contiguous(memory_format=torch.channels_last)
    guess = forward(noisy, steps, encoder_hidden_states=tokens, added_cond_kwargs=added).sample
    return (guess - noising.get_velocity(latents, noise, steps)).square().mean()


def train(options) -> None:
    torch.manual_seed(0)
    scenes = training_scenes(options.scenes)
    latents = cached_latents(options.work, scenes, AutoencoderKL.from_pretrained(options.work / "vae"))
    captioner = Captioner(options.work)
    trainer = Trainer(make_unet().to(memory_format=torch.channels_last), options.work, options.lr)
    trainer.load()
    forward = torch.compile(trainer.model, dynamic=False) if options.compile else trainer.model
    noising = DDPMScheduler.from_config(make_scheduler().config)

    def batch_loss() -> Tensor:
        rows = torch.randint(len(scenes), (options.batch,), generator=trainer.generator)
        keep = (torch.rand(options.batch, generator=trainer.generator) > 0.1).float()
        conditioning = captioner([caption(scenes[row], trainer.rng) for row in rows.tolist()], keep)
        return velocity_loss(forward, noising, latents[rows].float(), conditioning, trainer.generator)

    trainer.fit(options.steps, lambda step: learning_rate(step, options.steps, options.lr), batch_loss)


def finish(work: Path, folder: Path) -> None:
    """The averaged UNet and its companions as an fp16 pipeline folder."""
    unet = UNet2DConditionModel.from_config(make_unet().config)
    unet.load_state_dict(torch.load(work / "checkpoint.pt", weights_only=True)["average"])
    tokenizer = CLIPTokenizer.from_pretrained(work / "tokenizer")
    pipeline = StableDiffusionXLPipeline(
        vae=AutoencoderKL.from_pretrained(work / "vae"),
        text_encoder=CLIPTextModel.from_pretrained(work / "text_encoder"),
        text_encoder_2=CLIPTextModelWithProjection.from_pretrained(work / "text_encoder_2"),
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        unet=unet,
        scheduler=make_scheduler(),
        add_watermarker=False,
    )
    pipeline.to(torch.float16).save_pretrained(folder, max_shard_size="14MB")
    for path in folder.glob("*/config.json"):  # diffusers notes where a part was loaded from: nobody else's business
        config = {name: value for name, value in json.loads(path.read_text()).items() if name != "_name_or_path"}
        path.write_text(json.dumps(config, indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=12000)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--scenes", type=int, default=28000)
    parser.add_argument("--lr", type=float, default=8e-4)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--finish", type=Path, metavar="FOLDER")
    options = parser.parse_args()
    if options.finish:
        finish(options.work, options.finish)
    else:
        train(options)


if __name__ == "__main__":
    main()
