"""Make the small pipeline's tokenizer and train its two text encoders to understand scene captions.

    python assets/make/train_text.py --work build/shapes

Both encoders learn to tell, from the end-of-text token of the layers that SDXL reads (the last but one, and the
projected last), what stands where: shape, colour, fill and size of the left/upper and of the right/lower thing, the
layout and the background. Writes WORK/{tokenizer,text_encoder,text_encoder_2}; prints accuracy on held-out scenes.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, trainers
from tokenizers.pre_tokenizers import ByteLevel
from torch import Tensor, nn
from transformers import CLIPTokenizer

from models import MAX_TOKENS, make_text_encoders
from scenes import (
    BACKGROUNDS,
    COLOURS,
    FILLS,
    PLACES,
    SHAPES,
    SIZES,
    Scene,
    caption,
    sample_scene,
    sample_split,
    split_of,
)

THING_FIELDS = {"shape": SHAPES, "colour": tuple(COLOURS), "fill": FILLS, "size": tuple(SIZES)}
LAYOUTS = (*PLACES, "left of", "above")
FIELDS = [len(values) + 1 for values in THING_FIELDS.values()] * 2 + [len(LAYOUTS), len(BACKGROUNDS), 2]


def labels_of(scene: Scene) -> list[int]:
    """One class index per field; things in canonical order, index 0 for a thing that is absent."""
    scene, out = scene.canonical(), []
    for place in range(2):
        thing = scene.things[place] if place < len(scene.things) else None
        out += [1 + values.index(getattr(thing, name)) if thing else 0 for name, values in THING_FIELDS.items()]
    return [*out, LAYOUTS.index(scene.layout), list(BACKGROUNDS).index(scene.background), int(scene.gradient)]


def make_tokenizer(words: list[str]) -> CLIPTokenizer:
    """A CLIP tokenizer over all bytes, with byte-pair merges learned until each known word is one token."""
    alphabet = sorted(ByteLevel.alphabet())  # a set: its order would change the merges from run to run
    learner = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    learner.pre_tokenizer = ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=5000, min_frequency=1, end_of_word_suffix="</w>", initial_alphabet=alphabet, show_progress=False
    )
    learner.train_from_iterator(words, trainer)
    state = json.loads(learner.to_str())["model"]
    pieces = dict.fromkeys([*alphabet, *(letter + "</w>" for letter in alphabet), *state["vocab"]])
    vocab = {piece: index for index, piece in enumerate([*sorted(pieces), "<|startoftext|>", "<|endoftext|>"])}
    return CLIPTokenizer(vocab=vocab, merges=[tuple(pair) for pair in state["merges"]], model_max_length=MAX_TOKENS)


def known_words() -> list[str]:
    rng = random.Random(0)
    return sorted({word for _ in range(5000) for word in caption(sample_scene(rng), rng).split()})


def tokenize(tokenizer: CLIPTokenizer, captions: list[str]) -> Tensor:
    """Token ids [B, MAX_TOKENS], padded as the pipeline pads them."""
    return tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt").input_ids


class Reader(nn.Module):
    """Linear heads on what SDXL takes from each encoder; training only."""

    def __init__(self, encoders: tuple[nn.Module, nn.Module]):
        super().__init__()
        self.encoders = nn.ModuleList(encoders)
        first, second = (encoder.config.hidden_size for encoder in encoders)
        self.heads = nn.ModuleList(nn.Linear(width, sum(FIELDS)) for width in (first, second, second))

    def forward(self, ids: Tensor) -> list[Tensor]:
        outputs = [encoder(ids, output_hidden_states=True) for encoder in self.encoders]
        end = (ids == self.encoders[0].config.eos_token_id).int().argmax(-1)
        rows = torch.arange(len(ids))
        features = [output.hidden_states[-2][rows, end] for output in outputs] + [outputs[1].text_embeds]
        return [head(feature) for head, feature in zip(self.heads, features, strict=True)]


def field_losses(logits: Tensor, labels: Tensor) -> Tensor:
    parts = logits.split(FIELDS, dim=-1)
    return sum(nn.functional.cross_entropy(part, labels[:, k]) for k, part in enumerate(parts))


def whole_scene_right(logits: Tensor, labels: Tensor) -> float:
    guess = torch.stack([part.argmax(-1) for part in logits.split(FIELDS, dim=-1)], dim=-1)
    return (guess == labels).all(-1).float().mean().item()


def training_batch(tokenizer, rng: random.Random, size: int) -> tuple[Tensor, Tensor]:
    scenes = []
    while len(scenes) < size:
        scene = sample_scene(rng)
        if split_of(scene) == "training":
            scenes.append(scene)
    return tokenize(tokenizer, [caption(s, rng) for s in scenes]), torch.tensor([labels_of(s) for s in scenes])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=2000)
    options = parser.parse_args()
    torch.manual_seed(0)
    rng = random.Random(0)
    tokenizer = make_tokenizer(known_words())
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    reader = Reader(make_text_encoders(len(tokenizer), bos, eos))
    optimizer = torch.optim.AdamW(reader.parameters(), lr=2e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, options.steps, pct_start=0.1)
    held_out = sample_split("evaluation", 512, seed=0)
    held_out_ids = tokenize(tokenizer, [caption(scene, random.Random(i)) for i, scene in enumerate(held_out)])
    held_out_labels = torch.tensor([labels_of(scene) for scene in held_out])
    began = time.time()
    for step in range(options.steps + 1):
        ids, labels = training_batch(tokenizer, rng, 64)
        loss = sum(field_losses(logits, labels) for logits in reader(ids))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(reader.parameters(), 1.0)
        if step < options.steps:
            optimizer.step()
            schedule.step()
        if step % 250 == 0:
            with torch.no_grad():
                right = [whole_scene_right(logits, held_out_labels) for logits in reader(held_out_ids)]
            print(json.dumps({"step": step, "loss": loss.item(), "right": right, "s": time.time() - began}), flush=True)
    tokenizer.save_pretrained(options.work / "tokenizer")
    for name, encoder in zip(("text_encoder", "text_encoder_2"), reader.encoders, strict=True):
        encoder.save_pretrained(options.work / name)


if __name__ == "__main__":
    main()
