"""Train the small CLIP model that scores the small pipeline's images.

    python assets/make/train_clip.py --work build/shapes --out assets/shapes-clip

Needs WORK/tokenizer. Contrastive training over renders and their captions, in batches in which every scene stands
beside a near copy of itself that differs in one detail. Both towers also learn, through linear heads that are thrown
away, to name every attribute. Writes an open_clip folder in fp16; prints the retrieval accuracy on held-out scenes.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from dataclasses import replace
from pathlib import Path

import open_clip
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPTokenizer

from models import MAX_TOKENS
from scenes import Scene, caption, sample_scene, sample_split, split_of
from train_judge import half_degraded
from train_text import FIELDS, THING_FIELDS, field_losses, labels_of, tokenize
from train_vae import render_many

EMBED_DIM = 256
PREPROCESS = {"mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bicubic", "resize_mode": "shortest"}


def model_config(tokenizer: CLIPTokenizer) -> dict:
    """open_clip's `model_cfg`: a narrow ResNet at 64×64 and a two-layer text transformer."""
    text = {"context_length": MAX_TOKENS, "vocab_size": len(tokenizer), "width": 128, "heads": 4, "layers": 2}
    pooling = {"pool_type": "eos", "eos_id": tokenizer.eos_token_id, "hf_tokenizer_name": "shapes-clip"}
    vision = {"image_size": 64, "layers": [1, 1, 1, 1], "width": 16, "head_width": 64}
    return {"embed_dim": EMBED_DIM, "vision_cfg": vision, "text_cfg": text | pooling}


def near_copy(scene: Scene, rng: random.Random) -> Scene:
    """A training scene that differs from `scene` in one detail: an attribute, the layout, or who is where."""
    while True:
        copy = _altered(scene, sample_scene(rng, len(scene.things)), rng)
        kinds = {(thing.shape, thing.colour) for thing in copy.things}
        told_apart = copy.canonical() != scene.canonical() and len(kinds) == len(copy.things)
        if told_apart and split_of(copy) == "training":
            return copy


def _altered(scene: Scene, other: Scene, rng: random.Random) -> Scene:
    """`scene` with one detail of `other`, or with its things swapped."""
    detail = rng.choice(("things", "things", "things", "order", "layout", "background", "gradient"))
    if detail == "order":
        return replace(scene, things=scene.things[::-1])
    if detail != "things":
        return replace(scene, **{detail: getattr(other, detail)})
    index, field = rng.randrange(len(scene.things)), rng.choice(tuple(THING_FIELDS))
    things = list(scene.things)
    things[index] = replace(things[index], **{field: getattr(other.things[index], field)})
    return replace(scene, things=tuple(things))


def scene_pairs(count: int, rng: random.Random) -> list[Scene]:
    """2 * `count` training scenes; each even one is followed by a near copy of it."""
    found = {}
    while len(found) < count:
        scene = sample_scene(rng)
        if split_of(scene) == "training":
            found.setdefault(scene.canonical(), scene)
    return [member for scene in found.values() for member in (scene, near_copy(scene, rng))]


def contrastive_loss(images: Tensor, texts: Tensor, scale: Tensor) -> Tensor:
    """Symmetric cross-entropy over the cosine similarities of [B, D] image and text features."""
    logits = scale * F.normalize(images, dim=-1) @ F.normalize(texts, dim=-1).T  # [B, B]
    wanted = torch.arange(len(logits))
    return (F.cross_entropy(logits, wanted) + F.cross_entropy(logits.T, wanted)) / 2


class Trainer:
    """The model, the throw-away heads and the optimizer."""

    def __init__(self, tokenizer: CLIPTokenizer, steps: int, lr: float):
        self.tokenizer, self.steps = tokenizer, steps
        self.model = open_clip.CLIP(**model_config(tokenizer)).to(memory_format=torch.channels_last)
        self.heads = nn.ModuleList(nn.Linear(EMBED_DIM, sum(FIELDS)) for _ in range(2))
        parameters = [*self.model.parameters(), *self.heads.parameters()]
        self.optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=0.02)
        self.schedule = torch.optim.lr_scheduler.OneCycleLR(self.optimizer, lr, steps, pct_start=0.1)
        self.rng, self.generator = random.Random(7), torch.Generator().manual_seed(7)

    def step(self, pixels: Tensor, scenes: list[Scene]) -> float:
        """One update on uint8 images [B, 3, 64, 64] of `scenes`; returns the contrastive loss."""
        labels = torch.tensor([labels_of(scene) for scene in scenes])  # [B, 11]
        images = self.model.encode_image(2 * half_degraded(pixels, self.generator) - 1)
        texts = self.model.encode_text(tokenize(self.tokenizer, [caption(scene, self.rng) for scene in scenes]))
        contrastive = contrastive_loss(images, texts, self.model.logit_scale.exp())
        named = sum(field_losses(head(x), labels) for head, x in zip(self.heads, (images, texts), strict=True))
        self.optimizer.zero_grad()
        (contrastive + 0.2 * named).backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.schedule.step()
        with torch.no_grad():
            self.model.logit_scale.clamp_(max=4.6)  # CLIP's bound: a scale of 100
        return contrastive.item()


def train(trainer: Trainer, scenes: list[Scene], pairs: int) -> None:
    """Batches of `pairs` scenes and their near copies; one JSON line every 100 steps."""
    pixels, began = render_many(scenes, seed=7), time.time()
    for step in range(trainer.steps):
        picks = torch.randperm(len(scenes) // 2, generator=trainer.generator)[:pairs]
        rows = torch.stack([2 * picks, 2 * picks + 1], dim=1).flatten()  # [2 * pairs], a pair side by side
        rows = rows[torch.randperm(len(rows), generator=trainer.generator)]
        loss = trainer.step(pixels[rows], [scenes[row] for row in rows.tolist()])
        if step % 100 == 0:
            print(json.dumps({"step": step, "loss": loss, "seconds": round(time.time() - began)}), flush=True)


def save(model: nn.Module, tokenizer: CLIPTokenizer, folder: Path) -> None:
    """fp16 weights, configuration and tokenizer: all that open_clip's "local-dir:" reads."""
    folder.mkdir(parents=True, exist_ok=True)
    halves = {name: x.half() if x.is_floating_point() else x for name, x in model.state_dict().items()}
    save_file({name: x.contiguous() for name, x in halves.items()}, folder / "open_clip_model.safetensors")
    config = {"model_cfg": model_config(tokenizer), "preprocess_cfg": PREPROCESS}
    (folder / "open_clip_config.json").write_text(json.dumps(config, indent=2) + "\n")
    tokenizer.save_pretrained(folder)


@torch.no_grad()
def retrieval(folder: Path, scenes: list[Scene]) -> dict[str, float]:
    """Share of captions whose image is the most similar one, and of images whose caption is."""
    model = open_clip.create_model(f"local-dir:{folder}").eval()
    texts = open_clip.get_tokenizer(f"local-dir:{folder}")([caption(s, random.Random(i)) for i, s in enumerate(scenes)])
    pixels = render_many(scenes, seed=9).float() / 127.5 - 1
    images, texts = model.encode_image(pixels, normalize=True), model.encode_text(texts, normalize=True)
    similar, wanted = texts @ images.T, torch.arange(len(scenes))  # [N, N]: captions down, images across
    found = {"text_to_image": similar.argmax(1), "image_to_text": similar.argmax(0)}
    return {name: (best == wanted).float().mean().item() for name, best in found.items()} | {
        "own_similarity": similar.diagonal().mean().item()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=1600)
    parser.add_argument("--pairs", type=int, default=64)
    parser.add_argument("--lr", type=float, default=2e-3)
    options = parser.parse_args()
    torch.manual_seed(0)
    tokenizer = CLIPTokenizer.from_pretrained(options.work / "tokenizer")
    trainer = Trainer(tokenizer, options.steps, options.lr)
    train(trainer, scene_pairs(12000, random.Random(6)), options.pairs)
    save(trainer.model, tokenizer, options.out)
    print(json.dumps(retrieval(options.out, sample_split("test", 256, seed=0))))


if __name__ == "__main__":
    main()
