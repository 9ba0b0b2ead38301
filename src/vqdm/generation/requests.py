"""What is to be drawn: one request a picture, complete and independent of every other."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from dataclasses import dataclass

from vqdm.documents import shortened
from vqdm.errors import UserError
from vqdm.prompts import ID_COLUMNS, SETTING_COLUMNS, plain_name

SETTINGS = ("guidance_scale", "num_inference_steps", "height", "width")
LARGEST_SEED = 2**63 - 1
# What others call the columns that act, in letters alone.
MISNAMED = dict.fromkeys(("negative", "negprompt", "neg", "negativeprompts", "uncond"), "negative_prompt")
MISNAMED |= dict.fromkeys(("guidance", "cfg", "cfgscale", "guidancescales"), "guidance_scale")
MISNAMED |= dict.fromkeys(("steps", "numsteps", "inferencesteps", "samplingsteps"), "num_inference_steps")
MISNAMED |= {"seeds": "seed", "imageseed": "seed", "h": "height", "w": "width"}
MISNAMED |= {name.replace("_", ""): name for name in SETTING_COLUMNS}


@dataclass(frozen=True)
class Request:
    """One picture.

    Attributes:
        index: number of the prompt in its file, from 0.
        sample: number of the picture among those of the prompt, from 0.
        id: the prompt's name, unique in its file.
        seed: of the generator that draws all noise of this picture.
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
    """63 bits of SHA-256: a picture's seed depends on neither order, batch, subset nor number of processes."""
    digest = hashlib.sha256(f"{base}|{prompt_id}|{sample}".encode()).digest()
    return int.from_bytes(digest[:8], "big") & LARGEST_SEED


def make_requests(
    rows: list[dict], samples: int, base_seed: int, negative_prompt: str | None, settings: dict, source: str
) -> list[Request]:
    """`samples` requests a row, in order; columns of a row overrule what is given for all.

    Args:
        rows: as `prompts.load_rows` gives them. Columns that act, where a cell is not empty: `id`, `seed`,
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
    """A name a row: its `id` (or `item_id`) where every row has one of its own, else its number."""
    for column in ID_COLUMNS:
        names = _texts(rows, column)
        if all(names) and len(set(names)) == len(names):
            return names
    return [str(index) for index in range(len(rows))]


def _texts(rows: list[dict], column: str) -> list[str]:
    """The cells of a column, "" where there is none; names of columns differ in case and blanks."""
    cells = [{plain_name(name): value for name, value in row.items()}.get(column) for row in rows]
    return ["" if value is None else str(value).strip() for value in cells]


def unused_columns(rows: list[dict]) -> list[str]:
    """Lines about columns of a prompt file that do not act although they look as if they should."""
    lines, names = [], dict.fromkeys(name for row in rows for name in row)
    for name in names:
        wanted = MISNAMED.get(re.sub(r"[^a-z]", "", str(name).lower()))
        if wanted and plain_name(name) != wanted:
            lines.append(f"column {name} does not act; rename it to {wanted} if it should")
    columns = {plain_name(name) for name in names}.intersection(ID_COLUMNS)
    if columns and prompt_ids(rows) == [str(index) for index in range(len(rows))]:
        ids = _texts(rows, next(column for column in ID_COLUMNS if column in columns))
        common, count = Counter(ids).most_common(1)[0]
        if count > 1:
            found = f"{count} rows share {shortened(common, 40)}" if common else f"{count} rows have none"
            lines.append(f"ids are not used, since {found}; prompts are numbered from 0 instead")
    return lines


def overrides(row: dict, where: str) -> dict:
    """The cells of a row that overrule settings, as numbers and text; empty cells do not.

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
    """A picture's height or width. Raises UserError unless a positive multiple of 8."""
    if value < 8 or value % 8:
        raise UserError(f"{where} is {value}; allowed are multiples of 8")
    return value


def _own_seed(seed: int, sample: int) -> int:
    return (seed + sample) & LARGEST_SEED


def _number(kind: type, low: float, high: float):
    def parse(value, where: str):
        try:
            number = kind(str(value)) if kind is float else _whole(value)
        except ValueError:
            raise UserError(f"{where} is {value!r}; allowed are numbers from {low} to {high}") from None
        if not low <= number <= high:
            raise UserError(f"{where} is {value}; allowed are numbers from {low} to {high}")
        return number

    return parse


def _whole(value) -> int:
    """A whole number, also where a table holds it as 512.0; text goes through int, which keeps all 63 bits.

    Spreadsheets and data frames write the whole numbers of a column with empty cells so.
    """
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return int(re.sub(r"\.0*$", "", str(value).strip()))


def _text(value, where: str) -> str:
    if not isinstance(value, str):
        raise UserError(f"{where} is {shortened(value)}; expected text in quotes")
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
