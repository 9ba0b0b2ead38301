"""The page's content without a browser, and its behaviour in headless Chromium where there is one."""

import base64
import csv
import hashlib
import io
import json
import math
import re
import time
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from browser import Browser, program
from PIL import Image

from vqdm.metrics.image_sets import ImageEntry, ImageSet
from vqdm.metrics.report import GAIN, ReportData, data_uri, embedded, sampled, worst, write_page
from vqdm.metrics.results import Score

EVIL = '</script><script>window.broken=1</script><img src=x onerror="window.broken=2"> {{DATA}} \u2028 "q" & \'s\''
PROMPTS = [f"a red circle number {k}" for k in range(10)] + [EVIL, "=HYPERLINK(1), a star"]
COUNT = len(PROMPTS)


def write_set(folder: Path, shift: int) -> ImageSet:
    folder.mkdir()
    images = {}
    for k, prompt in enumerate(PROMPTS):
        file = f"{k:06d} #00.png"
        Image.new("RGB", (16, 16), (10 * k, 100 + shift * k, 50)).save(folder / file)
        images[str(k), 0] = ImageEntry(str(k), 0, file, {"prompt": prompt, "problem": "black" if k == 3 else None})
    return ImageSet(folder, images, {})


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> Path:
    """A report of twelve pairs; the k-th image is k grey levels away from its partner, its clip score k lower."""
    root = tmp_path_factory.mktemp("report")
    images, reference = write_set(root / "images", 1), write_set(root / "reference", 0)
    table = {(str(k), 0): {"psnr": 50.0 - k, "clip": 30.0 - k, "clip_reference": 25.0} for k in range(COUNT)}
    scores = [
        Score(
            "clip", "CLIP score[ViT-H-14/laion2b_s32b_b79k]", 24.5, COUNT, (20, 28), 25.0, -0.5, (-0.9, -0.1), "tiny"
        ),
        Score("psnr", "PSNR (dB)", 44.5, COUNT, (40, 48)),
    ]
    record = {
        "images": "images", "reference": "reference", "num_images": COUNT, "num_prompts": COUNT,
        "full_precision": False, "reference_full_precision": True,
        "size": {"effective_bits_unet": 3.14, "bytes_of_unet": 5e6},
        "run": {"settings": {"model": "a<b>", "quantized": "out/<i>q</i>", "sampling": {"guidance_scale": 5}}},
        "warnings": ["<u>careful</u>"], "skipped": {"lpips": "no <weights>"},
        "networks": {"clip": {"name": "tiny", "sha256": "ab" * 32}},
        "versions": {"vqdm": "1"}, "command": "metrics.py <x>",
    }  # fmt: skip
    path = root / "report.html"
    material = ReportData(record, scores, table, images, reference, root, 512)
    path.write_text(write_page(material, COUNT, 0), encoding="utf-8")
    return path


class Tags(HTMLParser):
    """Which elements a page has."""

    def __init__(self, text: str):
        super().__init__()
        self.found = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))


def test_nothing_of_a_prompt_or_setting_becomes_markup(page):
    tags = Tags(page.read_text()).found
    assert [tag for tag, _ in tags].count("script") == 2
    assert not [tag for tag, attrs in tags if tag in ("i", "u", "b>", "weights", "x") or "onerror" in attrs]


def test_the_page_asks_for_nothing_and_admits_its_own_script_only(page):
    text = page.read_text()
    own = re.findall(r"<script>(.*?)</script>", text, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(own[0].encode()).digest()).decode()
    assert f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'" in text
    outside = [one for _, attrs in Tags(text).found for one in (attrs.get("src"), attrs.get("href")) if one]
    assert set(outside) == {"data:,"} and "http" not in text.replace("http-equiv", "").replace("http://www.w3.org", "")


def test_data_survive_their_embedding():
    value = {"prompt": EVIL, "number": 0.25}
    assert json.loads(embedded(value)) == value and "<" not in embedded(value)


def test_links_are_relative_and_quoted(page):
    data = json.loads(re.search(r'type="application/json">(.*?)</script>', page.read_text(), re.DOTALL)[1])
    row = data["rows"][1]
    assert row["file"] == "images/000001%20%2300.png" and row["reference_file"].startswith("reference/")


def decoded(uri: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2])))


def test_small_images_are_kept_exactly_and_large_ones_are_reduced():
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 48, 3), dtype=np.uint8))
    assert np.array_equal(np.asarray(decoded(data_uri(noise, 512)).convert("RGB")), np.asarray(noise))
    assert decoded(data_uri(noise.resize((1024, 768)), 512)).size == (512, 384)


def test_the_difference_is_exact_times_its_gain(page):
    data = json.loads(re.search(r'type="application/json">(.*?)</script>', page.read_text(), re.DOTALL)[1])
    gap = np.asarray(decoded(data["rows"][7]["difference"]).convert("RGB"))
    assert (gap == [0, GAIN * 7, 0]).all()


def test_the_worst_come_first_by_their_loss():
    table = {("a", 0): {"clip": 5.0, "clip_reference": 1.0}, ("b", 0): {"clip": 6.0, "clip_reference": 9.0}}
    assert worst(list(table), table, "clip") == [("b", 0), ("a", 0)]
    table = {("a", 0): {"lpips": 0.1}, ("b", 0): {"lpips": 0.3}, ("c", 0): {}}
    assert worst(list(table), table, "lpips")[0] == ("b", 0)


def test_the_lot_takes_every_prompt_before_any_twice():
    keys = [(prompt, sample) for prompt in "abcde" for sample in range(3)]
    drawn = sampled(keys, 7, 0)
    assert len(set(drawn)) == 7 and {key[0] for key in drawn[:5]} == set("abcde")
    assert drawn == sampled(keys, 7, 0) != sampled(keys, 7, 1) and len(sampled(keys, 99, 0)) == 15


# --------------------------------------------------------------------------------------------- in a browser

in_browser = pytest.mark.skipif(program() is None, reason="no Chromium on this machine (apt-get install chromium)")


@pytest.fixture(scope="module")
def chromium(page, tmp_path_factory):
    folder = tmp_path_factory.mktemp("downloads")
    with Browser(folder) as browser:
        browser.open(page)
        browser.downloads = folder
        yield browser


def prompts_shown(browser: Browser) -> list[str]:
    return browser.evaluate("[...document.querySelectorAll('#rows > li > .prompt')].map((one) => one.textContent)")


def choose(browser: Browser, name: str, value: str) -> None:
    browser.evaluate(f"(() => {{ const one = document.getElementById({name!r}); one.value = {value!r};"
                     "one.dispatchEvent(new Event(one.id === 'text' ? 'input' : 'change')); })()")  # fmt: skip


@in_browser
def test_it_opens_from_disk_and_sorts_and_filters(chromium):
    shown = prompts_shown(chromium)
    assert shown[0] == PROMPTS[-1] and shown[1] == EVIL and len(shown) == COUNT
    choose(chromium, "order", "best")
    assert prompts_shown(chromium)[0] == PROMPTS[0]
    choose(chromium, "show", "clip higher")
    assert len(prompts_shown(chromium)) == 5
    choose(chromium, "show", "problem")
    assert prompts_shown(chromium) == [PROMPTS[3]]
    choose(chromium, "show", "all")
    choose(chromium, "text", "STAR")
    assert prompts_shown(chromium) == [PROMPTS[-1]]
    choose(chromium, "text", "no such words")
    assert chromium.evaluate("!document.getElementById('nothing').hidden")
    choose(chromium, "text", "")
    assert chromium.evaluate("window.broken === undefined") and not chromium.complaints()
    assert all(address.startswith(("file:", "data:")) for address in chromium.requests())


@in_browser
def test_the_sliders_amplify_and_wipe(chromium):
    gain = "document.querySelector('#rows input[type=range]')"
    chromium.evaluate(f"{gain}.value = 16; {gain}.dispatchEvent(new Event('input'))")
    assert chromium.evaluate(f"{gain}.closest('figure').querySelector('img').style.filter") == "brightness(8)"
    assert "difference ×16" in chromium.evaluate(f"{gain}.closest('figure').textContent")
    chromium.evaluate("document.querySelector('#rows button.frame').click()")
    assert chromium.evaluate("document.getElementById('viewer').open")
    chromium.evaluate("(() => { const one = document.querySelector('#viewer .wipe'); one.value = 25;"
                      "one.dispatchEvent(new Event('input')); })()")  # fmt: skip
    assert chromium.evaluate("document.querySelector('.stage').style.getPropertyValue('--cut')") == "25%"
    chromium.press("Escape")
    assert not chromium.evaluate("document.getElementById('viewer').open")


def vote_for(browser: Browser, wanted: str) -> None:
    """Look at the colours, as a voter does, and press the key of the image that is meant."""
    browser.wait("[...document.querySelectorAll('#booth img')].every((one) => one.complete && one.naturalWidth)")
    levels = browser.evaluate(
        "[...document.querySelectorAll('#booth .side img')].map((image) => {"
        "const pen = new OffscreenCanvas(16, 16).getContext('2d'); pen.drawImage(image, 0, 0);"
        "return pen.getImageData(8, 8, 1, 1).data[1]; })"
    )
    shifted_left = levels[0] > levels[1]
    keys = {True: "ArrowLeft", False: "ArrowRight"}
    browser.press("ArrowDown" if wanted == "tie" else keys[shifted_left == (wanted == "quantized")])


@in_browser
def test_votes_are_counted_for_the_right_side_and_exported(chromium):
    """Sides are swapped at random; whoever always prefers one model must find all votes with it."""
    chromium.evaluate("document.getElementById('vote').click()")
    assert chromium.evaluate("!document.getElementById('ballot').textContent.includes('quantized')")
    first = chromium.evaluate("document.querySelector('#booth .prompt').textContent")
    chromium.press("ArrowLeft")
    chromium.press("Backspace")
    assert chromium.evaluate("document.querySelector('#booth .prompt').textContent") == first
    for _ in range(COUNT):
        # The images of prompt 0 are equal, and no side can be told from the other.
        plain = chromium.evaluate("document.querySelector('#booth .prompt').textContent") == PROMPTS[0]
        vote_for(chromium, "tie" if plain else "quantized")
    assert chromium.evaluate("document.getElementById('booth').hidden")
    verdict = chromium.evaluate("document.getElementById('verdict').textContent").replace("\u00a0", " ")
    share = (COUNT - 0.5) / COUNT
    low, high = wilson(share, COUNT)
    assert verdict.startswith(f"The quantized images are preferred in {100 * share:.1f} % of {COUNT} votes")
    assert f"interval {100 * low:.1f} % to {100 * high:.1f} %. The interval excludes 50 %." in verdict
    chromium.evaluate("document.getElementById('export').click()")
    rows = read_votes(chromium.downloads / "votes.csv")
    assert [row["number"] for row in rows] == [str(k + 1) for k in range(COUNT)]
    assert {row["prompt"] for row in rows} >= {EVIL, "'" + PROMPTS[-1]}
    assert sorted(row["preferred"] for row in rows) == ["quantized"] * (COUNT - 1) + ["tie"]
    assert all(row[row["choice"]] == "quantized" for row in rows if row["choice"] != "tie")
    assert not chromium.complaints()


def wilson(p: float, n: int) -> tuple[float, float]:
    """Wilson (1927), by solving |p - q| = z √(q(1 - q)/n) for q."""
    z = 1.959964
    roots = np.roots([1 + z**2 / n, -(2 * p + z**2 / n), p**2])
    return min(roots), max(roots)


def read_votes(path: Path) -> list[dict]:
    end = time.monotonic() + 30
    while not (path.is_file() and path.stat().st_size) and time.monotonic() < end:
        time.sleep(0.05)
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


@in_browser
def test_votes_are_still_there_after_the_page_is_opened_again(chromium, page):
    chromium.open(page)
    chromium.evaluate("document.getElementById('vote').click()")
    assert chromium.evaluate("!document.getElementById('tally').hidden")
    chromium.evaluate("document.getElementById('again').click()")
    assert chromium.evaluate("document.getElementById('place').textContent") == f"1 of {COUNT}"
    chromium.press("Escape")
    assert chromium.evaluate("document.getElementById('verdict').textContent") == "No vote yet."
    chromium.evaluate("document.getElementById('leave').click()")


@in_browser
@pytest.mark.parametrize("width", [360, 800, 1600])
def test_no_width_makes_it_scroll_sideways(chromium, width):
    size = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": False}
    chromium.send("Emulation.setDeviceMetricsOverride", **size)
    assert chromium.evaluate("document.documentElement.scrollWidth") <= width
    assert math.isclose(chromium.evaluate("document.querySelector('#rows').clientWidth"), min(width, 1180), abs_tol=60)
