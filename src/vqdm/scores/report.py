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
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from urllib.parse import quote

from PIL import Image, ImageChops

from vqdm.scores.catalogue import METRICS
from vqdm.scores.measuring import resized
from vqdm.scores.picture_sets import Key, Picture, PictureSet
from vqdm.scores.results import Score, Table, interval_text, number

# Metrics by which the worst pictures are found, best judge first; those of text count by their difference.
WORST_BY = ("lpips", "dino_i", "clip_i", "ssim", "psnr", "pickscore", "clip", "hpsv2")
# The difference is stored amplified this much, so that the page can amplify it further without showing rounding.
GAIN = 2
LOSSLESS_SIDE = 256


def write_page(
    record: dict,
    scores: Sequence[Score],
    table: Table,
    images: PictureSet,
    reference: PictureSet | None,
    folder: Path,
    limit: int,
    side: int,
) -> str:
    """The whole page.

    Args:
        record: content of metrics.json.
        folder: where the page will lie; links to the picture files are relative to it.
        limit: pictures at most, the worst by the best judge that was measured.
        side: pixels of the longer side of the pictures in the page.
    """
    judge = next((name for name in WORST_BY if any(name in row for row in table.values())), None)
    chosen = worst(list(images.pictures), table, judge)[:limit]
    numbers = {key: k for k, key in enumerate(images.pictures)}
    rows = [
        row_of(images.pictures[key], numbers[key], table.get(key, {}), images, reference, folder, side)
        for key in sorted(chosen, key=numbers.get)
    ]
    data = page_data(record, scores, table, images, reference, rows, judge)
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
    return (files("vqdm.scores") / "report_page" / name).read_text(encoding="utf-8")


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
        value = row.get(judge, math.inf)
        return sign * (value - row.get(f"{judge}_reference", 0.0))

    return sorted(keys, key=badness)


def row_of(
    picture: Picture,
    place: int,
    scores: dict[str, float],
    images: PictureSet,
    reference: PictureSet | None,
    folder: Path,
    side: int,
) -> dict:
    """What the page needs of one picture."""
    ours = images.load(picture)
    row = {"id": picture.id, "sample": picture.sample, "number": place, "prompt": picture.prompt}
    row |= {"problem": picture.row.get("problem"), "scores": {name: rounded(value) for name, value in scores.items()}}
    row |= {"picture": data_uri(ours, side), "file": link(images, picture, folder)}
    partner = reference and reference.pictures.get(picture.key)
    if partner:
        theirs = reference.load(partner)
        gap = ImageChops.difference(ours, resized(theirs, ours.size)).point(lambda level: min(255, GAIN * level))
        row |= {"reference": data_uri(theirs, side), "reference_file": link(reference, partner, folder)}
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


def page_data(
    record: dict,
    scores: Sequence[Score],
    table: Table,
    images: PictureSet,
    reference: PictureSet | None,
    rows: list[dict],
    judge: str | None,
) -> dict:
    """What the script reads: rows, and every column of scores with all its values."""
    labels = {score.name: score.label for score in scores}
    columns, values = {}, {}
    for name in METRICS:
        found = [(row[name], row.get(f"{name}_reference")) for row in table.values() if name in row]
        if not found:
            continue
        metric = METRICS[name]
        columns[name] = {"title": labels.get(name, metric.title), "higher": metric.higher, "decimals": metric.decimals}
        values[name] = [rounded(value) for value, _ in found]
        if all(theirs is not None for _, theirs in found):
            title = f"{columns[name]['title']}, change"
            columns[f"{name}_change"] = columns[name] | {"title": title, "of": name}
            values[f"{name}_change"] = [rounded(value - theirs) for value, theirs in found]
    return {
        "names": set_names(record),
        "columns": columns,
        "values": values,
        "rows": rows,
        "total": len(images.pictures),
        "several": len({picture.sample for picture in images.pictures.values()}) > 1,
        "relative": any("of" in column for column in columns.values()),
        "sort": f"{judge}_change" if f"{judge}_change" in columns else judge,
        "gain": GAIN,
        "key": hashlib.sha256(
            json.dumps([record["images"], record["reference"], [row["id"] for row in rows]]).encode()
        ).hexdigest()[:16],
    }


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
        lines.append(f"<li>from <b>{escaped(drawn['model'])}</b></li>")
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
    cells += [f'<td class="value">{number(score.value, digits)}</td>', ranged(interval_text(score.interval, digits))]
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
