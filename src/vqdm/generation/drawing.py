"""Drawing requested pictures in batches that shrink when memory does not suffice."""

from __future__ import annotations

import gc
import inspect
from collections.abc import Callable, Iterator
from itertools import groupby

import torch
from diffusers import DiffusionPipeline
from PIL import Image

from vqdm.diffusion.pipelines import generators, picture_size
from vqdm.errors import RunError
from vqdm.generation.requests import Request
from vqdm.images import GeneratedImage, generated_images
from vqdm.tracking import log_info


def alike(requests: list[Request]) -> list[list[Request]]:
    """Requests in groups that one pipeline call can draw: equal settings, negative prompts for all or for none."""
    ordered = sorted(requests, key=_call_key)
    return [list(group) for _, group in groupby(ordered, key=_call_key)]


def _call_key(request: Request) -> tuple:
    # None and "" are different negative prompts to diffusers, and None does not compare with numbers.
    settings = [(value is not None, value or 0) for value in request.settings.values()]
    return request.negative_prompt is None, *settings


def drawn_in_batches(
    draw: Callable[[list[Request]], list[GeneratedImage]], groups: list[list[Request]], size: int
) -> Iterator[tuple[list[Request], list[GeneratedImage]]]:
    """Yield (requests, pictures) batch by batch; where memory ends, the size is halved for good and the batch repeated.

    Raises:
        RunError: memory does not suffice for a single picture.
    """
    for group in groups:
        done = 0
        while done < len(group):
            batch = group[done : done + size]
            pictures = _unless_out_of_memory(draw, batch)
            if pictures is None:
                size = _halved(len(batch))
                continue
            yield batch, pictures
            done += len(batch)


def _unless_out_of_memory(draw: Callable, batch: list[Request]) -> list[GeneratedImage] | None:
    """What `draw` gives, or None when it ran out of memory."""
    try:
        return draw(batch)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
    # Outside the handler: while the exception lives, its frames hold the tensors that should go.
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return None


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether an error means that memory, of a GPU or of the machine, did not suffice."""
    words = str(error).lower()
    return isinstance(error, torch.OutOfMemoryError) or "out of memory" in words or "not enough memory" in words


def _halved(size: int) -> int:
    if size == 1:
        raise RunError("memory does not suffice for one picture; try --offload model, or smaller --height and --width")
    log_info(f"out of memory with {size} pictures at once; going on with {size // 2}")
    return size // 2


@torch.no_grad()
def draw(pipeline: DiffusionPipeline, batch: list[Request]) -> list[GeneratedImage]:
    """Pictures of requests that are alike, each from its own CPU generator."""
    negative = None if batch[0].negative_prompt is None else [request.negative_prompt for request in batch]
    result = pipeline(
        prompt=[request.prompt for request in batch],
        negative_prompt=negative,
        generator=generators(0, [request.seed for request in batch]),
        output_type="pt",
        **call_settings(pipeline, batch[0].settings),
    )
    return generated_images(result)


def call_settings(pipeline: DiffusionPipeline, settings: dict) -> dict:
    """The settings that are given, as keyword arguments of the pipeline call. Raises UserError as `picture_size`."""
    given = {name: value for name, value in settings.items() if value is not None}
    height, width = picture_size(pipeline, given.get("height"), given.get("width"))
    # Some pipelines fall back to their own size unless both sides are given.
    return given | {"height": height, "width": width} if given.keys() & {"height", "width"} else given


def settings_used(pipeline: DiffusionPipeline, request: Request, image: Image.Image) -> dict:
    """The settings of a request with the pipeline's own defaults and the picture's size filled in."""
    parameters = inspect.signature(pipeline.__call__).parameters
    used = {name: parameters[name].default if value is None else value for name, value in request.settings.items()}
    return used | {"height": image.height, "width": image.width}
