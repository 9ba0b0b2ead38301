"""Requests for images: one per image, complete and independent of the others; and how batches of them are generated.

A batch that is out of memory is halved.
"""

from __future__ import annotations

import hashlib
import inspect
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import groupby

import torch
from diffusers import DiffusionPipeline
from PIL import Image

from vqdm.devices import BatchSize
from vqdm.diffusion.pipelines import call_arguments, generators, image_size, parts_in_use
from vqdm.documents import described, shortened
from vqdm.errors import UserError
from vqdm.images import GeneratedImage, generated_images
from vqdm.prompts import ID_COLUMNS, SETTING_COLUMNS, plain_name

SETTINGS = ("guidance_scale", "num_inference_steps", "height", "width")
LARGEST_SEED = 2**63 - 1
# Other names of the columns that are used, in letters alone.
MISNAMED = dict.fromkeys(("negative", "negprompt", "neg", "negativeprompts", "uncond"), "negative_prompt")
MISNAMED |= dict.fromkeys(("guidance", "cfg", "cfgscale", "guidancescales"), "guidance_scale")
MISNAMED |= dict.fromkeys(("steps", "numsteps", "inferencesteps", "samplingsteps"), "num_inference_steps")
MISNAMED |= {"seeds": "seed", "imageseed": "seed", "h": "height", "w": "width"}
MISNAMED |= {name.replace("_", ""): name for name in SETTING_COLUMNS}


@dataclass(frozen=True)
class Request:
    """The request for one image.

    Attributes:
        index: number of the prompt in its file, from 0.
        sample: number of the image among those of the prompt, from 0.
        id: the prompt's name, unique in its file.
        seed: of the generator of all noise of this image.
        settings: `SETTINGS` by name; None leaves one to the pipeline.
    """

    index: int
    sample: int
    id: str
    prompt: str
    negative_prompt: str | None
    seed: int
    settings: dict

    @property
    def key(self) -> tuple[int, int]:
        return self.index, self.sample


def seed_of(base: int, prompt_id: str, sample: int) -> int:
    """Return 63 bits of SHA-256: an image's seed depends on neither order, batch, subset nor number of processes."""
    digest = hashlib.sha256(f"{base}|{prompt_id}|{sample}".encode()).digest()
    return int.from_bytes(digest[:8], "big") & LARGEST_SEED


def make_requests(
    rows: list[dict], samples: int, base_seed: int, negative_prompt: str | None, settings: dict, source: str
) -> list[Request]:
    """Make `samples` requests per row, in order; columns of a row override the settings for all.

    Args:
        rows: as `prompts.load_rows` gives them. Columns that are used, where a cell is not empty: `id`, `seed`,
            `negative_prompt`, `guidance_scale`, `num_inference_steps`, `height`, `width`.
        settings: for all rows, `SETTINGS` by name.

    Raises:
        UserError: a cell that is not a number or out of range, naming `source`, row and column.
    """
    requests = []
    for index, (row, name) in enumerate(zip(rows, prompt_ids(rows), strict=True)):
        own = overrides(row, f"PROMPTS: {source}: {getattr(row, 'place', f'row {index + 1}')}")
        wanted = {key: own.get(key, settings[key]) for key in SETTINGS}
        negative = own.get("negative_prompt", negative_prompt)
        for sample in range(samples):
            seed = _own_seed(own["seed"], sample) if "seed" in own else seed_of(base_seed, name, sample)
            requests.append(Request(index, sample, name, row["prompt"], negative, seed, wanted))
    return requests


def prompt_ids(rows: list[dict]) -> list[str]:
    """Return a name per row: its `id` (or `item_id`) where every row has one of its own, else its number."""
    for column in ID_COLUMNS:
        names = _texts(rows, column)
        if all(names) and len(set(names)) == len(names):
            return names
    return [str(index) for index in range(len(rows))]


def _texts(rows: list[dict], column: str) -> list[str]:
    """Return the cells of a column, "" where there is none; names of columns differ in case and blanks."""
    cells = [{plain_name(name): value for name, value in row.items()}.get(column) for row in rows]
    return ["" if value is None else str(value).strip() for value in cells]


def unused_columns(rows: list[dict]) -> list[str]:
    """Return lines about columns of a prompt file that are not used although their names suggest it."""
    lines, names = [], dict.fromkeys(name for row in rows for name in row)
    for name in names:
        wanted = MISNAMED.get(re.sub(r"[^a-z]", "", str(name).lower()))
        if wanted and plain_name(name) != wanted:
            lines.append(f"column {name} is not used; rename it to {wanted} if it should be")
    columns = {plain_name(name) for name in names}.intersection(ID_COLUMNS)
    if columns and prompt_ids(rows) == [str(index) for index in range(len(rows))]:
        ids = _texts(rows, next(column for column in ID_COLUMNS if column in columns))
        common, count = Counter(ids).most_common(1)[0]
        if count > 1:
            found = f"{count} rows share {shortened(common, 40)}" if common else f"{count} rows have none"
            lines.append(f"ids are not used, since {found}; prompts are numbered from 0 instead")
    return lines


def overrides(row: dict, where: str) -> dict:
    """Return the cells of a row that override settings, as numbers and text; empty cells do not.

    Raises:
        UserError: as `make_requests`.
    """
    filled = [(name, value) for name, value in row.items() if value is not None and str(value).strip() != ""]
    cells: dict[str, object] = {}
    for name, value in filled:
        if plain_name(name) in cells and plain_name(name) in SETTING_COLUMNS:
            raise UserError(f"{where} has two columns {plain_name(name)}; leave one out")
        cells[plain_name(name)] = value
    return {name: parse(cells[name], f"{where}: {name}") for name, parse in _COLUMNS.items() if name in cells}


def check_size(value: int, where: str) -> int:
    """Return an image's height or width. Raises UserError unless it is a positive multiple of 8."""
    if value < 8 or value % 8:
        raise UserError(f"{where} is {value}; allowed are multiples of 8")
    return value


def _own_seed(seed: int, sample: int) -> int:
    return (seed + sample) & LARGEST_SEED


def _number(kind: type, low: float, high: float):
    allowed = f"{'whole ' * (kind is int)}numbers from {low}" + ("" if high == LARGEST_SEED else f" to {high}")

    def parse(value, where: str):
        try:
            number = kind(str(value)) if kind is float else _whole(value)
        except ValueError:
            raise UserError(f"{where} is {_shown(value)}; allowed are {allowed}") from None
        if not low <= number <= high:
            most = f" to {high}" if high == LARGEST_SEED and number > high else ""
            raise UserError(f"{where} is {shortened(number)}; allowed are {allowed}{most}")
        return number

    return parse


def _shown(value) -> str:
    return described(value) if isinstance(value, bool | list | dict) else shortened(value)


def _whole(value) -> int:
    """Parse a whole number, also where a table holds it as 512.0; text goes through int, which keeps all 63 bits.

    Spreadsheets and data frames write the whole numbers of a column with empty cells so.
    """
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return int(re.sub(r"\.0*$", "", str(value).strip()))


def _text(value, where: str) -> str:
    if not isinstance(value, str):
        raise UserError(f"{where} is {described(value)}; expected text in quotes")
    return value


def _size(value, where: str) -> int:
    return check_size(_number(int, 8, 2**16)(value, where), where)


_COLUMNS = {
    "seed": _number(int, 0, LARGEST_SEED),
    "negative_prompt": _text,
    "guidance_scale": _number(float, 0, 1000),
    "num_inference_steps": _number(int, 1, 1000),
    "height": _size,
    "width": _size,
}


# ------------------------------------------------------------------------------------------- batches


def alike(requests: list[Request]) -> list[list[Request]]:
    """Group requests that one pipeline call can generate: equal settings, negative prompts for all or for none."""
    ordered = sorted(requests, key=_call_key)
    return [list(group) for _, group in groupby(ordered, key=_call_key)]


def _call_key(request: Request) -> tuple:
    # None and "" are different negative prompts to diffusers, and None does not compare with numbers.
    settings = [(value is not None, value or 0) for value in request.settings.values()]
    return request.negative_prompt is None, *settings


def generate_in_batches(
    generate: Callable[[list[Request]], list[GeneratedImage]], groups: list[list[Request]], size: int
) -> Iterator[tuple[list[Request], list[GeneratedImage]]]:
    """Yield (requests, images) batch by batch; on out of memory, halve the size for good and repeat the batch.

    Raises:
        RunError: out of memory at batch size 1.
    """
    batch_size = BatchSize(size, "try --offload model, or smaller --height and --width")
    for group in groups:
        yield from batch_size.batches(generate, group)


@torch.no_grad()
def generate(pipeline: DiffusionPipeline, batch: list[Request]) -> list[GeneratedImage]:
    """Generate the images of requests that are alike, each from its own CPU generator."""
    negative = None if batch[0].negative_prompt is None else [request.negative_prompt for request in batch]
    with parts_in_use(pipeline):
        result = pipeline(
            prompt=[request.prompt for request in batch],
            generator=generators(0, [request.seed for request in batch]),
            output_type="pt",
            **call_settings(pipeline, batch[0].settings | {"negative_prompt": negative}, len(batch)),
        )
    return generated_images(result)


def call_settings(pipeline: DiffusionPipeline, settings: dict, prompts: int) -> dict:
    """Return the given settings as arguments of the call. Raises UserError as `image_size`, `call_arguments`."""
    given = {name: value for name, value in settings.items() if value is not None}
    height, width = image_size(pipeline, given.get("height"), given.get("width"))
    # Some pipelines fall back to their own size unless both sides are given.
    given |= {"height": height, "width": width} if given.keys() & {"height", "width"} else {}
    return call_arguments(pipeline, given, prompts)


def settings_used(pipeline: DiffusionPipeline, request: Request, image: Image.Image) -> dict:
    """Return the settings of a request, completed by the pipeline's defaults and the image's size."""
    parameters = inspect.signature(pipeline.__call__).parameters
    used = {name: parameters[name].default if value is None else value for name, value in request.settings.items()}
    return used | {"height": image.height, "width": image.width}
