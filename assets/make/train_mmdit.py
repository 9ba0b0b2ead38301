"""Train the small diffusion transformer with flow matching, and write the finished pipeline folder.

    python assets/make/train_mmdit.py --parts assets/shapes-xl --work build/mmdit --compile
    python assets/make/train_mmdit.py --parts assets/shapes-xl --work build/mmdit --finish assets/shapes-mmdit

The autoencoder, the tokenizer and both text encoders are those of PARTS. Killed and started again, it goes on from the
last checkpoint, and `--steps` may then be another: the learning rate is constant until its last quarter. `--finish`
writes the averaged weights in fp16 as a StableDiffusion3Pipeline without its third text encoder and stops.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionXLPipeline,
)
from diffusers.models.attention_processor import Attention
from torch import Tensor
from torch.nn import functional as F
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from models import make_mmdit
from scenes import caption
from train_text import tokenize
from train_unet import Trainer, cached_latents, training_scenes

ABSENT_TOKENS = 256  # zeros that StableDiffusion3Pipeline puts after the caption for a missing third text encoder
EMPTY_SHARE = 0.1  # of captions replaced by "", for guidance
AVERAGE_DECAY = 0.9995


def with_projection(encoder: CLIPTextModel) -> CLIPTextModelWithProjection:
    """Return SDXL's first text encoder as SD3 takes it: with a projection, which is the identity."""
    projected = CLIPTextModelWithProjection(encoder.config)
    state = {
        name if name.startswith("text_model.") else f"text_model.{name}": t for name, t in encoder.state_dict().items()
    }
    projected.load_state_dict(state | {"text_projection.weight": torch.eye(encoder.config.hidden_size)})
    return projected.eval()


class Captioner:
    """Captions to SD3's conditioning, with the frozen text encoders of a pipeline folder."""

    def __init__(self, parts: Path):
        source = StableDiffusionXLPipeline.from_pretrained(parts, dtype=torch.float32)
        self.tokenizer, self.vae = source.tokenizer, source.vae
        self.first, self.second = with_projection(source.text_encoder), source.text_encoder_2.eval()

    @torch.no_grad()
    def __call__(self, captions: list[str]) -> tuple[Tensor, Tensor]:
        """Return token features [B, T + 1, D], the last for all absent tokens, and pooled features [B, D]."""
        ids = tokenize(self.tokenizer, captions)
        outputs = [encoder(ids, output_hidden_states=True) for encoder in (self.first, self.second)]
        tokens = torch.cat([output.hidden_states[-2] for output in outputs], dim=-1)
        return F.pad(tokens, (0, 0, 0, 1)), torch.cat([output.text_embeds for output in outputs], dim=-1)


class CountedAttention:
    """SD3's joint attention in which the last context token stands for `count` equal ones: a quarter of the time.

    Equal tokens stay equal from block to block; `count` equal keys weigh as one whose logit is larger by log(count).
    """

    def __init__(self, count: int):
        self.bias = math.log(count)

    def __call__(self, attn: Attention, hidden_states: Tensor, encoder_hidden_states: Tensor, attention_mask=None):
        def heads(x: Tensor) -> Tensor:
            return x.unflatten(-1, (attn.heads, -1)).transpose(1, 2)  # [B, S, heads·d] → [B, heads, S, d]

        image, context = hidden_states, encoder_hidden_states
        q, k = attn.norm_q(heads(attn.to_q(image))), attn.norm_k(heads(attn.to_k(image)))
        q = torch.cat([q, attn.norm_added_q(heads(attn.add_q_proj(context)))], dim=2)
        k = torch.cat([k, attn.norm_added_k(heads(attn.add_k_proj(context)))], dim=2)
        v = torch.cat([heads(attn.to_v(image)), heads(attn.add_v_proj(context))], dim=2)
        logits = q @ k.transpose(2, 3) * q.shape[-1] ** -0.5  # products are faster here than the fused attention
        logits[..., -1] += self.bias
        mixed = logits.softmax(-1).to(v.dtype) @ v
        mixed = mixed.transpose(1, 2).flatten(2)  # [B, heads, S, d] → [B, S, heads·d]
        image, context = mixed.split([image.shape[1], context.shape[1]], dim=1)
        context = context if attn.context_pre_only else attn.to_add_out(context)
        return attn.to_out[0](image), context


def make_trainer(work: Path, lr: float) -> Trainer:
    """Return the trainer of a new transformer, of which every block begins as the identity (AdaLN-Zero: DiT, §3.2)."""
    model = make_mmdit()
    for block in model.transformer_blocks:
        for norm in (block.norm1, block.norm1_context):
            torch.nn.init.zeros_(norm.linear.weight)
    torch.nn.init.zeros_(model.proj_out.weight)
    model.set_attn_processor(CountedAttention(ABSENT_TOKENS))
    return Trainer(model, work, lr, beta=0.98, decay=AVERAGE_DECAY)


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Warm-up over 300 steps, constant, then linear to zero over the last quarter."""
    return peak * min(1.0, (step + 1) / 300, (steps - step) / (0.25 * steps))


def flow_loss(
    forward, latents: Tensor, conditioning: tuple[Tensor, Tensor], generator: torch.Generator, dtype: torch.dtype
) -> Tensor:
    """Mean squared error of the velocity at stratified logit-normal times (arXiv 2403.03206, §2 and §3.1)."""
    tokens, pooled = conditioning
    size = len(latents)
    uniform = (torch.arange(size) + torch.rand(size, generator=generator)) / size
    sigmas = torch.special.ndtri(uniform.clamp(1e-4, 1 - 1e-4)).sigmoid()[:, None, None, None]  # [B, 1, 1, 1] in (0, 1)
    noise = torch.randn(latents.shape, generator=generator)
    noisy = (1 - sigmas) * latents + sigmas * noise
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        velocity = forward(noisy, tokens, pooled, 1000 * sigmas.flatten()).sample
    return (velocity.float() - (noise - latents)).square().mean()


def train(options) -> None:
    torch.manual_seed(0)
    scenes = training_scenes(options.scenes)
    captioner, trainer = Captioner(options.parts), make_trainer(options.work, options.lr)
    latents = cached_latents(options.work, scenes, captioner.vae)
    trainer.load()
    dtype = getattr(torch, options.dtype)
    forward = torch.compile(trainer.model, dynamic=False) if options.compile else trainer.model

    def batch_loss() -> Tensor:
        rows = torch.randint(len(scenes), (options.batch,), generator=trainer.generator)
        texts = [
            "" if trainer.rng.random() < EMPTY_SHARE else caption(scenes[row], trainer.rng) for row in rows.tolist()
        ]
        return flow_loss(forward, latents[rows].float(), captioner(texts), trainer.generator, dtype)

    trainer.fit(options.steps, lambda step: learning_rate(step, options.steps, options.lr), batch_loss)


def finish(options) -> None:
    """Write the averaged transformer and its companions as an fp16 pipeline folder."""
    parts = StableDiffusionXLPipeline.from_pretrained(options.parts, dtype=torch.float32)
    transformer = SD3Transformer2DModel.from_config(make_mmdit().config)
    transformer.load_state_dict(torch.load(options.work / "checkpoint.pt", weights_only=True)["average"])
    vae = AutoencoderKL.from_config(parts.vae.config, shift_factor=0.0)  # SD3's pipeline adds it to the latents
    vae.load_state_dict(parts.vae.state_dict())
    pipeline = StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=vae,
        text_encoder=with_projection(parts.text_encoder),
        tokenizer=parts.tokenizer,
        text_encoder_2=parts.text_encoder_2,
        tokenizer_2=parts.tokenizer,
        text_encoder_3=None,
        tokenizer_3=None,
    )
    pipeline.to(torch.float16).save_pretrained(options.finish, max_shard_size="14MB")
    for path in options.finish.glob("*/config.json"):  # diffusers notes where a part was loaded from
        config = {name: value for name, value in json.loads(path.read_text()).items() if name != "_name_or_path"}
        path.write_text(json.dumps(config, indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--parts", type=Path, required=True, help="pipeline folder with the other components")
    parser.add_argument("--steps", type=int, default=4500)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--scenes", type=int, default=28000)
    parser.add_argument("--lr", type=float, default=8e-4)
    parser.add_argument("--compile", action="store_true")
    types = {"choices": ("float32", "bfloat16"), "default": "float32"}
    parser.add_argument("--dtype", **types, help="of products; bfloat16 is faster where the processor has it (AMX)")
    parser.add_argument("--finish", type=Path, metavar="FOLDER")
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    finish(options) if options.finish else train(options)


if __name__ == "__main__":
    main()
