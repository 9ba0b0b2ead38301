"""report.html: scores, settings and pictures of a run in one file that opens from disk and needs no network.

Everything that a prompt file says is escaped: in the page by `html.escape`, in its data by writing < as \\u003c, and
the page's script puts it in as text. A content security policy admits the page's own script only.
"""

from __future__ import annotations

import base64
import hashlib
import html
import io
import json
import math
import os
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from urllib.parse import quote

import numpy as np
from PIL import Image, ImageChops

from vqdm.metrics.catalogue import METRICS
from vqdm.metrics.image_sets import Key, Picture, PictureSet
from vqdm.metrics.measuring import resized
from vqdm.metrics.results import Score, Table, interval_text, number, spread_text

# Metrics by which the worst pictures are found, best judge first; those of text count by their difference.
WORST_BY = ("lpips", "dino_i", "clip_i", "ssim", "psnr", "pickscore", "clip", "hpsv2", "image_reward")
# The difference is stored amplified this much, so that the page can amplify it further without showing rounding.
GAIN = 2
LOSSLESS_SIDE = 256


@dataclass(frozen=True)
class Material:
    """What a page is made of.

    Attributes:
        record: content of metrics.json.
        folder: where the page will lie; links to the picture files are relative to it.
        side: pixels of the longer side of the pictures in the page.
    """

    record: dict
    scores: Sequence[Score]
    table: Table
    images: PictureSet
    reference: PictureSet | None
    folder: Path
    side: int


def write_page(material: Material, limit: int, seed: int) -> str:
    """The whole page.

    Args:
        limit: so many of the worst pictures by the best judge that was measured, and as many drawn by lot for the vote.
        seed: of the lot.
    """
    record, scores = material.record, material.scores
    judge = next((name for name in WORST_BY if any(name in row for row in material.table.values())), None)
    data = page_data(material, rows_of(material, judge, limit, seed), judge)
    script = part("page.js")
    pieces = {
        "TITLE": escaped(title_of(record)),
        "STYLE": part("page.css"),
        "SCRIPT": script,
        "SCRIPT_SHA256": base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        "FACTS": facts(record),
        "WARNINGS": warnings(record["warnings"]),
        "SCORES": score_table(scores),
        "DEFINITIONS": definitions(scores, record["networks"]),
        "SKIPPED": skipped(record["skipped"]),
        "SETTINGS": settings(record),
        "FOOTER": escaped(f"vqdm {record['versions']['vqdm']} · {record['command']}"),
        "DATA": embedded(data),
    }
    # One pass: text that is put in is never searched for further marks.
    return re.sub(r"\{\{(\w+)\}\}", lambda mark: pieces[mark[1]], part("page.html"))


def part(name: str) -> str:
    return (files("vqdm.metrics") / "report_page" / name).read_text(encoding="utf-8")


def escaped(value) -> str:
    return html.escape(str(value))


def embedded(value) -> str:
    """JSON that cannot end the script element it stands in."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")


# --------------------------------------------------------------------------------------------- which pictures


def worst(keys: Sequence[Key], table: Table, judge: str | None) -> list[Key]:
    """Keys with the worst first; by the loss against the full-precision picture where the judge has one."""
    if judge is None:
        return list(keys)
    sign = 1 if METRICS[judge].higher else -1

    def badness(key: Key) -> float:
        row = table.get(key, {})
        return sign * (row[judge] - row.get(f"{judge}_reference", 0.0)) if judge in row else math.inf

    return sorted(keys, key=badness)


def by_lot(keys: Sequence[Key], limit: int, seed: int) -> list[Key]:
    """Keys drawn without replacement; a second picture of a prompt only when every prompt has one."""
    shuffled = [keys[k] for k in np.random.default_rng(seed).permutation(len(keys))]
    earlier: Counter[str] = Counter()
    turns = {}
    for key in shuffled:
        turns[key] = earlier[key[0]]
        earlier[key[0]] += 1
    return sorted(shuffled, key=turns.get)[:limit]


def rows_of(material: Material, judge: str | None, limit: int, seed: int) -> list[dict]:
    """The page's rows in the order of the pictures, each with its number and whether it was drawn by lot."""
    keys = list(material.images.pictures)
    drawn = set(by_lot(keys, limit, seed))
    chosen = drawn | set(worst(keys, material.table, judge)[:limit])
    return [
        row_of(material, key) | {"number": number, "by_lot": key in drawn}
        for number, key in enumerate(keys)
        if key in chosen
    ]


def row_of(material: Material, key: Key) -> dict:
    """What the page needs of one picture."""
    images, reference, side = material.images, material.reference, material.side
    picture = images.pictures[key]
    ours = images.load(picture)
    scores = {name: rounded(value) for name, value in material.table.get(key, {}).items()}
    row = {"id": picture.id, "sample": picture.sample, "prompt": picture.prompt, "scores": scores}
    row |= {"problem": picture.row.get("problem"), "picture": data_uri(ours, side)}
    row |= {"file": link(images, picture, material.folder)}
    partner = reference and reference.pictures.get(key)
    if partner:
        theirs = reference.load(partner)
        gap = ImageChops.difference(ours, resized(theirs, ours.size)).point(lambda level: min(255, GAIN * level))
        row |= {"reference": data_uri(theirs, side), "reference_file": link(reference, partner, material.folder)}
        row |= {"difference": data_uri(gap, side)}
    return row


def data_uri(image: Image.Image, side: int) -> str:
    """The picture as WebP inside a URI, no larger than `side`; small ones without loss."""
    image = image.copy()
    image.thumbnail((side, side), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    image.save(buffer, "WEBP", lossless=max(image.size) <= LOSSLESS_SIDE, quality=90)
    return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode()


def link(pictures: PictureSet, picture: Picture, folder: Path) -> str | None:
    """The file's path as seen from the page; none into a zip file."""
    if pictures.path.is_file():
        return None
    return quote(Path(os.path.relpath(pictures.path / picture.file, folder)).as_posix())


def rounded(value: float) -> float:
    """Six digits are more than any figure is worth, and keep the page small."""
    return float(f"{value:.6g}")


# --------------------------------------------------------------------------------------------- the page's data


def page_data(material: Material, rows: list[dict], judge: str | None) -> dict:
    """What the script reads: rows, and every column of scores with all its values."""
    columns, values = page_columns(material)
    record, pictures = material.record, material.images.pictures.values()
    shown = json.dumps([record["images"], record["reference"], [(row["id"], row["sample"]) for row in rows]])
    return {
        "names": set_names(record),
        "columns": columns,
        "values": values,
        "rows": rows,
        "total": len(pictures),
        "several": len({picture.sample for picture in pictures}) > 1,
        "sort": f"{judge}_change" if f"{judge}_change" in columns else judge,
        "gain": GAIN,
        # Votes are kept in the browser under this name.
        "key": hashlib.sha256(shown.encode()).hexdigest()[:16],
    }


def page_columns(material: Material) -> tuple[dict[str, dict], dict[str, list[float]]]:
    """Columns of the table, and all their values; NAME_change is the gap to the full-precision picture."""
    labels = {score.name: score.label for score in material.scores}
    columns, values = {}, {}
    for name, metric in METRICS.items():
        found = [(row[name], row.get(f"{name}_reference")) for row in material.table.values() if name in row]
        if not found:
            continue
        title = labels.get(name, metric.title)
        columns[name] = {"title": title, "higher": metric.higher, "decimals": metric.decimals}
        values[name] = [rounded(value) for value, _ in found]
        if all(theirs is not None for _, theirs in found):
            columns[f"{name}_change"] = columns[name] | {"title": f"{title}, change", "of": name}
            values[f"{name}_change"] = [rounded(value - theirs) for value, theirs in found]
    return columns, values


def set_names(record: dict) -> dict[str, str]:
    """What the two sets are called."""
    return {
        "picture": "quantized" if record["full_precision"] is False else "scored",
        "reference": "full precision" if record["reference_full_precision"] else "reference",
    }


# --------------------------------------------------------------------------------------------- the page's text


def title_of(record: dict) -> str:
    drawn = record["run"].get("settings") or {}
    return drawn.get("quantized") or drawn.get("model") or record["images"]


def facts(record: dict) -> str:
    """What was scored, in a line."""
    size = record["size"]
    drawn = record["run"].get("settings") or {}
    items = {"pictures": record["pictures"], "prompts": record["prompts"]}
    if "effective_bits_unet" in size:
        items |= {"bits a parameter": f"{size['effective_bits_unet']:.2f}"}
    if "bytes_of_unet" in size:
        items |= {"MB UNet": f"{size['bytes_of_unet'] / 1e6:.1f}"}
    lines = [f"<li><b>{escaped(value)}</b> {name}</li>" for name, value in items.items()]
    if drawn.get("quantized"):
        lines.append(f"<li>from <b>{escaped(drawn.get('model'))}</b></li>")
    if record["reference"]:
        lines.append(f"<li>against <b>{escaped(record['reference'])}</b></li>")
    return "".join(lines)


def warnings(lines: Sequence[str]) -> str:
    if not lines:
        return ""
    return f'<div class="warnings" role="note"><ul>{"".join(f"<li>{escaped(line)}</li>" for line in lines)}</ul></div>'


def score_table(scores: Sequence[Score]) -> str:
    """A row a score; columns that none fills are left out."""
    paired = any(score.reference is not None for score in scores)
    head = ["metric", "value", "", *(["full precision", "difference", ""] if paired else []), "N"]
    cells = "".join(f'<th scope="col">{name}</th>' for name in head)
    body = "".join(score_row(score, paired) for score in scores)
    return f"<table><thead><tr>{cells}</tr></thead><tbody>{body}</tbody></table>"


def score_row(score: Score, paired: bool) -> str:
    digits = score.metric.decimals
    cells = [f'<th scope="row">{escaped(score.label)} {score.metric.arrow}</th>']
    cells += [f'<td class="value">{number(score.value, digits)}</td>', ranged(spread_text(score))]
    if paired:
        change = number(score.difference, digits, "+")
        cells += [f"<td>{number(score.reference, digits)}</td>", f'<td class="{verdict(score)}">{change}</td>']
        cells += [ranged(interval_text(score.difference_interval, digits, "+"))]
    return f"<tr>{''.join(cells)}<td>{score.n}</td></tr>"


def ranged(interval: str) -> str:
    return f'<td class="range">{interval}</td>'


def verdict(score: Score) -> str:
    """Whether the difference is better or worse than none, by its whole interval."""
    if score.difference_interval is None or score.difference_interval[0] <= 0 <= score.difference_interval[1]:
        return ""
    return "better" if (score.difference > 0) == score.metric.higher else "worse"


def definitions(scores: Sequence[Score], networks: dict[str, dict]) -> str:
    lines = []
    for score in scores:
        network = networks.get(score.name)
        weights = f"; {network['name']}, weights SHA-256 {network['sha256'][:12]}…" if network else ""
        lines.append(pair(score.label, f"{score.metric.definition}{weights}"))
    return "".join(lines)


def skipped(reasons: dict[str, str]) -> str:
    if not reasons:
        return ""
    lines = "".join(pair(name, reason) for name, reason in reasons.items())
    return f'<details><summary>Not scored: {len(reasons)}</summary><dl class="pairs">{lines}</dl></details>'


def settings(record: dict) -> str:
    """How the pictures were drawn, and with which versions they were scored."""
    drawn = dict(record["run"].get("settings") or {})
    drawn |= drawn.pop("sampling", None) or {}
    scheduler = record["run"].get("scheduler") or {}
    drawn |= {"scheduler class": scheduler.get("_class_name"), "device": record["run"].get("device")}
    drawn |= {f"{name} version": version for name, version in record["versions"].items()}
    return "".join(pair(name, value) for name, value in drawn.items() if value is not None)


def pair(name: str, value) -> str:
    return f"<dt>{escaped(name)}</dt><dd>{escaped(value)}</dd>"
