"""Networks that give a vector for a picture, some for a text too, behind one face; float32, TF32 off, no gradients."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from safetensors import SafetensorError
from torch import Tensor

from vqdm.documents import first_line
from vqdm.errors import UserError
from vqdm.metrics.inception import PREPARE, load_inception
from vqdm.metrics.networks import Network


@dataclass(frozen=True)
class Encoder:
    """What the scores need of a network.

    Attributes:
        prepare: an RGB picture → float32 [3, H, W], on the CPU.
        images: [N, 3, H, W] on the device → features [N, d].
        preprocess: how `prepare` works, in a word that statistics files carry.
        texts: prompts → features [N, d]; None where the network knows no texts.
        overlong: whether a prompt is cut off at the network's longest text.
        scale: exp(logit_scale) of a CLIP model.
    """

    prepare: Callable[[Image.Image], Tensor]
    images: Callable[[Tensor], Tensor]
    preprocess: str
    texts: Callable[[list[str]], Tensor] | None = None
    overlong: Callable[[str], bool] | None = None
    scale: float = 100.0


@contextmanager
def exact() -> Iterator[None]:
    """No gradients, and float32 that is float32: without TF32, in convolutions or matrix products."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.inference_mode(), torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            yield
    finally:
        torch.set_float32_matmul_precision(before)


def load_encoder(network: Network, device: torch.device) -> Encoder:
    """The network, on its device.

    Raises:
        UserError: its files do not hold what they should.
    """
    try:
        return _LOADERS[network.kind](network, device)
    except (OSError, ValueError, RuntimeError, KeyError, ImportError, SafetensorError) as error:
        if isinstance(error, (UserError, torch.OutOfMemoryError)):
            raise
        raise UserError(f"{network.source} cannot be loaded as {network.kind}: {first_line(error)}") from None


def _inception(network: Network, device: torch.device) -> Encoder:
    mode = network.options["mode"]
    return Encoder(PREPARE[mode], load_inception(Path(network.source), device), mode)


# --------------------------------------------------------------------------------------------- open_clip


def _open_clip(network: Network, device: torch.device) -> Encoder:
    import open_clip

    with _quiet():
        model, _, prepare = open_clip.create_model_and_transforms(
            network.source,
            pretrained=network.options["pretrained"],
            image_resize_mode=network.options.get("resize"),
            weights_only=True,
        )
        tokenizer = open_clip.get_tokenizer(network.source)
    model = model.eval().requires_grad_(False).to(device)
    return Encoder(
        prepare=prepare,
        images=model.encode_image,
        preprocess=f"open_clip {model.visual.image_size}",
        texts=lambda prompts: model.encode_text(tokenizer(prompts).to(device)),
        overlong=lambda prompt: _open_clip_length(tokenizer, prompt) > model.context_length,
        scale=model.logit_scale.exp().item(),
    )


@contextmanager
def _quiet() -> Iterator[None]:
    """open_clip tells every step of loading to the root logger."""
    logging.disable(logging.INFO)
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)


def _open_clip_length(tokenizer, prompt: str) -> int:
    """Tokens of an uncut prompt, start and end included."""
    if hasattr(tokenizer, "tokenizer"):
        ids = tokenizer.tokenizer(tokenizer.clean_fn(prompt), truncation=False, padding=False).input_ids
        return len(ids)
    return len(tokenizer.encode(prompt)) + 2


# --------------------------------------------------------------------------------------------- transformers


def _transformers(network: Network, device: torch.device) -> Encoder:
    from transformers import AutoImageProcessor, AutoTokenizer, CLIPModel, Dinov2Model

    kind = {"clip": CLIPModel, "dinov2": Dinov2Model}[network.options["model_type"]]
    model = kind.from_pretrained(network.source, dtype=torch.float32, local_files_only=True)
    model = model.eval().requires_grad_(False).to(device)
    files = network.options.get("processor", network.source)
    processor = AutoImageProcessor.from_pretrained(files, backend="pil", local_files_only=True)
    frame = network.options.get("frame", "processor")
    prepare, preprocess = _framed(processor, frame), f"transformers {frame} {_side(processor)}"
    if kind is Dinov2Model:
        return Encoder(prepare, lambda pixels: model(pixels).pooler_output, preprocess)
    tokenizer = AutoTokenizer.from_pretrained(files, local_files_only=True)
    longest = model.config.text_config.max_position_embeddings
    return Encoder(
        prepare=prepare,
        images=lambda pixels: _pooled(model.get_image_features(pixel_values=pixels)),
        preprocess=preprocess,
        texts=lambda prompts: _pooled(model.get_text_features(**_tokens(tokenizer, prompts, longest).to(device))),
        overlong=lambda prompt: len(tokenizer(prompt).input_ids) > longest,
        scale=model.logit_scale.exp().item(),
    )


def _framed(processor, frame: str) -> Callable[[Image.Image], Tensor]:
    """Preparation by the processor, of the picture's middle square, or of the whole squeezed into a square."""

    def prepare(image: Image.Image) -> Tensor:
        options = {}
        if frame == "square":
            side = min(image.size)
            left, top = (image.width - side) // 2, (image.height - side) // 2
            image = image.crop((left, top, left + side, top + side))
        elif frame == "squash":
            image = image.resize((_side(processor),) * 2, Image.Resampling.BICUBIC)
            options = {"do_resize": False, "do_center_crop": False}
        return torch.as_tensor(processor(images=image, return_tensors="pt", **options)["pixel_values"][0])

    return prepare


def _side(processor) -> int:
    """Pixels of the square that a processor hands over."""
    size = dict(getattr(processor, "crop_size", None) or processor.size)
    return size.get("height") or size["shortest_edge"]


def _tokens(tokenizer, prompts: list[str], longest: int):
    # Cut by the tokenizer, which keeps the end-of-text token that CLIP reads its result from.
    return tokenizer(prompts, padding=True, truncation=True, max_length=longest, return_tensors="pt")


def _pooled(output) -> Tensor:
    """transformers from 5.0 on wraps the features."""
    return getattr(output, "pooler_output", output)


_LOADERS = {"inception": _inception, "open_clip": _open_clip, "transformers": _transformers}


def unit(features: Tensor) -> Tensor:
    """Rows of length one, float32."""
    return F.normalize(features.float(), dim=-1)
