"""report.html: scores, settings and images of a run in one file that opens from disk and needs no network.

Text of prompt files is escaped: in the page by `html.escape`, in its data by writing < as \\u003c, and the script of
the page inserts it as text. A content security policy admits that script only.
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

from vqdm.config import COMPONENTS, label
from vqdm.metrics.catalogue import METRICS
from vqdm.metrics.image_sets import ImageEntry, ImageSet, Key, resized
from vqdm.metrics.results import Score, ScoreTable, interval_text, number, spread_text

# Metrics by which the worst images are found, the best one first; those of text count by their difference.
WORST_BY = ("lpips", "ssim", "psnr", "pickscore", "clip", "image_reward")
# The difference is stored amplified by this factor, and amplified further by the page without visible rounding.
GAIN = 2
LOSSLESS_SIDE = 256


@dataclass(frozen=True)
class ReportData:
    """The data of a page.

    Attributes:
        record: content of metrics.json.
        folder: of the page; links to image files are relative to it.
        side: pixels of the longer side of the images in the page.
    """

    record: dict
    scores: Sequence[Score]
    table: ScoreTable
    images: ImageSet
    reference: ImageSet | None
    folder: Path
    side: int


def write_page(page: ReportData, limit: int, seed: int) -> str:
    """Write the whole page.

    Args:
        limit: number of the worst images by the best metric that was computed, and of random ones for the vote.
        seed: of the random ones.
    """
    record, scores = page.record, page.scores
    metric = next((name for name in WORST_BY if any(name in row for row in page.table.values())), None)
    data = page_data(page, rows_of(page, metric, limit, seed), metric)
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
        "SETTINGS": settings_list(record),
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
    """Write JSON that cannot end the script element around it."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")


# --------------------------------------------------------------------------------------------- which images


def worst(keys: Sequence[Key], table: ScoreTable, metric: str | None) -> list[Key]:
    """Sort keys, the worst first; by the loss against the reference image if the metric has one."""
    if metric is None:
        return list(keys)
    sign = 1 if METRICS[metric].higher else -1

    def badness(key: Key) -> float:
        row = table.get(key, {})
        return sign * (row[metric] - row.get(f"{metric}_reference", 0.0)) if metric in row else math.inf

    return sorted(keys, key=badness)


def sampled(keys: Sequence[Key], limit: int, seed: int) -> list[Key]:
    """Sample keys without replacement; a second image of a prompt only after every prompt has one."""
    shuffled = [keys[k] for k in np.random.default_rng(seed).permutation(len(keys))]
    earlier: Counter[str] = Counter()
    turns = {}
    for key in shuffled:
        turns[key] = earlier[key[0]]
        earlier[key[0]] += 1
    return sorted(shuffled, key=turns.get)[:limit]


def rows_of(page: ReportData, metric: str | None, limit: int, seed: int) -> list[dict]:
    """Return the rows of the page in the order of the images, each with its number and whether it is a random one."""
    keys = list(page.images.entries)
    chosen_at_random = set(sampled(keys, limit, seed))
    chosen = chosen_at_random | set(worst(keys, page.table, metric)[:limit])
    return [
        row_of(page, key) | {"number": number, "sampled": key in chosen_at_random}
        for number, key in enumerate(keys)
        if key in chosen
    ]


def row_of(page: ReportData, key: Key) -> dict:
    """Return the row of one image."""
    images, reference, side = page.images, page.reference, page.side
    entry = images.entries[key]
    ours = images.load(entry)
    scores = {name: rounded(value) for name, value in page.table.get(key, {}).items()}
    row = {"id": entry.id, "sample": entry.sample, "prompt": entry.prompt, "scores": scores}
    row |= {"problem": entry.row.get("problem"), "image": data_uri(ours, side)}
    row |= {"file": link(images, entry, page.folder)}
    partner = reference and reference.entries.get(key)
    if partner:
        theirs = reference.load(partner)
        gap = ImageChops.difference(ours, resized(theirs, ours.size)).point(lambda level: min(255, GAIN * level))
        row |= {"reference": data_uri(theirs, side), "reference_file": link(reference, partner, page.folder)}
        row |= {"difference": data_uri(gap, side)}
    return row


def data_uri(image: Image.Image, side: int) -> str:
    """Return the image as WebP inside a URI, no larger than `side`; small ones without loss."""
    image = image.copy()
    image.thumbnail((side, side), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    image.save(buffer, "WEBP", lossless=max(image.size) <= LOSSLESS_SIDE, quality=90)
    return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode()


def link(images: ImageSet, entry: ImageEntry, folder: Path) -> str | None:
    """Return the path of a file relative to the page; none into a zip file."""
    if images.path.is_file():
        return None
    return quote(Path(os.path.relpath(images.path / entry.file, folder)).as_posix())


def rounded(value: float) -> float:
    """Round to six digits, which are more than any score is worth and keep the page small."""
    return float(f"{value:.6g}")


# --------------------------------------------------------------------------------------------- the page's data


def page_data(page: ReportData, rows: list[dict], metric: str | None) -> dict:
    """Return the data of the script: rows, and every column of scores with all its values."""
    columns, values = page_columns(page)
    record, entries = page.record, page.images.entries.values()
    shown = json.dumps([record["images"], record["reference"], [(row["id"], row["sample"]) for row in rows]])
    return {
        "names": set_names(record),
        "columns": columns,
        "values": values,
        "rows": rows,
        "total": len(entries),
        "several": len({entry.sample for entry in entries}) > 1,
        "sort": f"{metric}_change" if f"{metric}_change" in columns else metric,
        "gain": GAIN,
        # Votes are kept in the browser under this name.
        "key": hashlib.sha256(shown.encode()).hexdigest()[:16],
    }


def page_columns(page: ReportData) -> tuple[dict[str, dict], dict[str, list[float]]]:
    """Return the columns of the table with all their values; NAME_change is the gap to the reference image."""
    labels = {score.name: score.label for score in page.scores}
    columns, values = {}, {}
    for name, metric in METRICS.items():
        found = [(row[name], row.get(f"{name}_reference")) for row in page.table.values() if name in row]
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
    """Return the names of the two sets."""
    return {
        "image": "quantized" if record["full_precision"] is False else "scored",
        "reference": "full precision" if record["reference_full_precision"] else "reference",
    }


# --------------------------------------------------------------------------------------------- the page's text


def title_of(record: dict) -> str:
    settings = record["run"].get("settings") or {}
    return settings.get("quantized") or settings.get("model") or record["images"]


def facts(record: dict) -> str:
    """Return the line of facts about the run."""
    size = record["size"]
    settings = record["run"].get("settings") or {}
    items = {"images": record["num_images"], "prompts": record["num_prompts"]}
    held = [part for part in COMPONENTS if f"effective_bits_{part}" in size]
    for part in COMPONENTS:
        if part in held:
            of = f", {label(part)}" if len(held) > 1 else ""
            items |= {f"bits per weight{of}": f"{size[f'effective_bits_{part}']:.2f}"}
        if f"bytes_of_{part}" in size:
            items |= {f"MB {label(part)}": f"{size[f'bytes_of_{part}'] / 1e6:.1f}"}
    lines = [f"<li><b>{escaped(value)}</b> {name}</li>" for name, value in items.items()]
    if settings.get("quantized") and settings.get("model"):
        lines.append(f"<li>from <b>{escaped(settings['model'])}</b></li>")
    if record["reference"]:
        lines.append(f"<li>against <b>{escaped(record['reference'])}</b></li>")
    return "".join(lines)


def warnings(lines: Sequence[str]) -> str:
    if not lines:
        return ""
    return f'<div class="warnings" role="note"><ul>{"".join(f"<li>{escaped(line)}</li>" for line in lines)}</ul></div>'


def score_table(scores: Sequence[Score]) -> str:
    """Write a row per score; columns that none fills are left out."""
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
    """Return whether the difference is better or worse than none, by its whole interval."""
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


def settings_list(record: dict) -> str:
    """Write the settings of generation, and the versions of scoring."""
    shown = dict(record["run"].get("settings") or {})
    shown |= shown.pop("sampling", None) or {}
    scheduler = record["run"].get("scheduler") or {}
    shown |= {"scheduler class": scheduler.get("_class_name"), "device": record["run"].get("device")}
    shown |= {f"{name} version": version for name, version in record["versions"].items()}
    return "".join(pair(name, value) for name, value in shown.items() if value is not None)


def pair(name: str, value) -> str:
    return f"<dt>{escaped(name)}</dt><dd>{escaped(value)}</dd>"
