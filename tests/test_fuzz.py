"""Whatever a file holds, reading it ends in success or in one line that names it: no other exception, hang, or bomb.

The short form runs a few cases a target, always the same; the long form 5,150 cases, always others.
"""

from __future__ import annotations

import copy
import io
import json
import resource
import signal
import struct
import tempfile
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from conftest import tiny_unet
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from main_text2image import PARSER
from mutations import (
    broken_bytes,
    broken_json,
    broken_lines,
    broken_npz,
    broken_safetensors,
    broken_table,
    broken_value,
    broken_yaml,
    zipped,
)
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as tensor_bytes
from test_hf import quantized_unet
from test_quantized import SPECS, random_code

from vqdm.diffusion.blocks import Layer, select_layers
from vqdm.diffusion.hessians import HessianStore
from vqdm.diffusion.model_folders import find_denoiser, load_denoiser
from vqdm.errors import RunError, UserError
from vqdm.generation.requests import make_requests
from vqdm.images import ImageFolder, check_layout
from vqdm.metrics.comparison import compare, incomparable, latex, markdown, read_run, table_csv
from vqdm.metrics.frechet import frechet_distance, load_statistics
from vqdm.metrics.image_sets import mismatches, open_images
from vqdm.metrics.job import model_size
from vqdm.metrics.report import facts, title_of
from vqdm.metrics.report import settings_list as settings_text
from vqdm.prompts import load_rows
from vqdm.quantization.config import read_overrides
from vqdm.quantization.recording import digest
from vqdm.storage.files import CHECK, load_checked_json, save_checked, save_checked_json
from vqdm.storage.hf import VqdmConfig, build_layers
from vqdm.storage.run_folder import RunFolder, check_claim

SECONDS = 60  # no case takes a tenth of it
GROWTH = 2**30  # bytes that all cases of a target may add to the process

LAYER = Layer("mid_block.a.b", "mid_block", "linear", 8, 16, SPECS[0])
ROWS = [
    {"index": k, "sample": 0, "id": f"p{k}", "prompt": f"a red circle {k}", "negative_prompt": None, "seed": k,
     "settings": {"guidance_scale": 5.0, "height": 8}, "file": f"{k:06d}_00.png", "sha256": "0", "problem": None}
    for k in range(3)
]  # fmt: skip
RUN = {
    "settings": {"model": "m", "quantized": "q", "dtype": "float32", "model_sha256": "0", "sampling": {"height": 8}},
    "full_precision": False, "scheduler": {"_class_name": "EulerDiscreteScheduler"}, "device": "cpu",
}  # fmt: skip
ENTRY = {"label": "PSNR (dB)", "value": 20.0, "n": 8, "interval": [19.0, 21.0], "reference": None}
METRICS = {
    "schema": 1, "images": "a", "full_precision": False, "reference_full_precision": True, "mismatches": [],
    "size": {"effective_bits_unet": 3.0, "bytes_of_unet": 10, "bytes_of_original_unet": 50}, "run": RUN,
    "metrics": {"psnr": ENTRY, "clip": ENTRY | {"label": "CLIP", "reference": 21.0}},
}  # fmt: skip
FLAGS = {
    "num_codebooks": 2,
    "seed": 3,
    "lr": 0.01,
    "resume": True,
    "encoder": "ldl",
    "variant": "fp16",
    "overrides": None,
}
OVERRIDES = {r".*\.to_q": {"num_codebooks": 5, "group_channels": True}, r".*conv1": None}


# ------------------------------------------------------------------------------------------------ targets


def prompts(kind: str):
    """Prompt files of one kind, read and made into requests as generate.py does."""
    row = {"prompt": "a red circle", "id": "x", "seed": 3, "height": 64, "guidance_scale": 1.5, "negative_prompt": "b"}
    documents = [[row, row | {"id": "y"}], ["a", "b"], {"x": "a", "y": "b"}, {"prompt": ["a", "b"], "seed": [1, 2]}]

    def run(draw, folder: Path) -> None:
        path = folder / f"prompts.{kind}"
        if kind in ("csv", "tsv"):
            path.write_bytes(broken_table(draw, {"csv": ",", "tsv": "\t"}[kind]))
        elif kind == "parquet":
            path.write_bytes(broken_parquet(draw))
        elif kind == "jsonl":
            path.write_bytes(broken_lines(draw, [row] * 3))
        elif kind == "txt":
            path.write_bytes(broken_bytes(draw, "a red circle\nein grüner Stern\n".encode()))
        else:
            write = broken_yaml if kind == "yaml" else broken_json
            path.write_bytes(write(draw, draw(st.sampled_from(documents))))
        use_rows(load_rows(str(path), "PROMPTS"), str(path), folder)

    return run


def use_rows(rows: list[dict], source: str, folder: Path) -> None:
    """What the programs do with rows: seeds, digests, manifests, names of files."""
    sampling = dict.fromkeys(("guidance_scale", "num_inference_steps", "height", "width"))
    requests = make_requests(rows, 2, 0, None, sampling, source)
    digest([row["prompt"] for row in rows])
    json.dumps(rows, default=str)
    ImageFolder(folder / "out", "geneval").write_prompt_files(dict(enumerate(rows[:3])))
    check_layout("dpg", [request.id for request in requests], 1)
    for request in requests[:3]:
        (folder / f"{request.id}.png").write_text(json.dumps(vars(request), ensure_ascii=False), encoding="utf-8")


def broken_parquet(draw) -> bytes:
    columns = {
        "text": ["a", "b", None], "numbers": [1.5, float("nan"), None], "bytes": [b"\xff", b"", None],
        "lists": [["a"], [], None], "structs": [{"a": 1}, {"a": None}, None], "none": [None] * 3,
    }  # fmt: skip
    names = draw(st.lists(st.sampled_from(["prompt", "id", "seed", "other"]), min_size=1, max_size=4))
    arrays = [pyarrow.array(columns[draw(st.sampled_from(sorted(columns)))]) for _ in names]
    buffer = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_arrays(arrays, names), buffer)
    data = buffer.getvalue()
    return broken_bytes(draw, data) if draw(st.booleans()) else data


def config_file(draw, folder: Path) -> None:
    path = folder / "flags.yaml"
    path.write_bytes(broken_yaml(draw, FLAGS))
    PARSER.parse(["model", "a.txt", "b.txt", "--config", str(path)])


def overrides_file(draw, folder: Path) -> None:
    path = folder / "overrides.yaml"
    path.write_bytes(broken_yaml(draw, OVERRIDES))
    for layer in select_layers(META_UNET, "default", 0, SPECS[0], read_overrides(str(path))):
        layer.spec.tensor_shapes(layer.rows, layer.columns)


def quantization_config(draw, folder: Path) -> None:
    """Of a library, so that any ValueError is a promise kept."""
    values = broken_value(draw, UNET_CONFIG["quantization_config"] | {"rounded": ["time_embedding.linear_1"]})
    values = values if isinstance(values, dict) else {"code": values, "layers": {}}
    try:
        config = VqdmConfig(**{"code": {}, "layers": {}} | values)
        unet = copy.deepcopy(META_UNET)
        build_layers(unet, config)
        json.dumps(config.to_dict())
    except ValueError as error:
        raise UserError(str(error)) from None


def unet_config(draw, folder: Path) -> None:
    (folder / "unet").mkdir()
    (folder / "unet" / "config.json").write_bytes(broken_json(draw, UNET_CONFIG))
    (folder / "unet" / WEIGHTS).write_bytes(UNET_BYTES)
    load_denoiser(find_denoiser(str(folder)), torch.float32)


def unet_tensors(draw, folder: Path) -> None:
    (folder / "config.json").write_text(json.dumps(UNET_CONFIG))
    (folder / WEIGHTS).write_bytes(broken_safetensors(draw, UNET_BYTES))
    load_denoiser(find_denoiser(str(folder)), torch.float32)


def picture_bytes(kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (9, 7), (200, 10, 30)).save(buffer, kind)
    return buffer.getvalue()


def manifest(draw, folder: Path) -> None:
    """A folder of generate.py, scored and resumed."""
    write_set(draw, folder)
    ImageFolder(folder).finished([(0, 0), (1, 0)])
    opened = open_images(str(folder), "IMAGES")
    mismatches(opened, opened)
    opened.problems()
    for entry in opened.entries.values():
        assert (folder / entry.file).resolve().is_relative_to(folder.resolve())
        opened.load(entry)


def zipped_manifest(draw, folder: Path) -> None:
    """The same folder in a zip file."""
    write_set(draw, folder)
    top = draw(st.sampled_from(["", "top/"]))
    data = zipped({top + path.name: path.read_bytes() for path in sorted(folder.iterdir())})
    (folder / "set.zip").write_bytes(broken_bytes(draw, data) if draw(st.booleans()) else data)
    opened = open_images(str(folder / "set.zip"), "IMAGES")
    mismatches(opened, opened)
    for entry in opened.entries.values():
        opened.load(entry)


def write_set(draw, folder: Path) -> None:
    """Pictures and a damaged manifest of them."""
    for row in ROWS:
        (folder / row["file"]).write_bytes(picture_bytes())
    (folder / "manifest.jsonl").write_bytes(broken_lines(draw, ROWS))


def run_record(draw, folder: Path) -> None:
    """run.json, of a set to score and of a run to resume."""
    (folder / "a.png").write_bytes(picture_bytes())
    (folder / "run.json").write_bytes(broken_json(draw, RUN))
    with pytest.raises(UserError):
        check_claim(folder, {"model": "m", "overrides": {}}, True)
    opened = open_images(str(folder), "IMAGES")
    record = {"run": opened.run, "images": "x", "size": model_size(opened.run), "reference": None, "versions": {}}
    record |= {"num_images": 1, "num_prompts": 1}
    title_of(record), facts(record), settings_text(record)
    mismatches(opened, opened)


def image_files(draw, folder: Path) -> None:
    """Damaged images in a folder or a zip file."""
    kind = draw(st.sampled_from(["PNG", "JPEG", "BMP", "WEBP", "GIF", "TIFF", "EPS"]))
    data = broken_bytes(draw, picture_bytes(kind)) if draw(st.booleans()) else huge_picture(kind)
    names = st.sampled_from(["a.png", "b/c.jpg", "../escaped.png", "/escaped.png", "a\\b.png", "é.webp"])
    if draw(st.booleans()):
        archive = zipped({draw(names): data, "fine.png": picture_bytes()})
        (folder / "set.zip").write_bytes(broken_bytes(draw, archive) if draw(st.booleans()) else archive)
        found = open_images(str(folder / "set.zip"), "IMAGES")
    else:
        (folder / "a.png").write_bytes(data)
        found = open_images(str(folder), "IMAGES")
    for entry in found.entries.values():
        found.load(entry)


def huge_picture(kind: str) -> bytes:
    """An image whose header claims 50,000 × 50,000 pixels, where that is easy to write."""
    data = bytearray(picture_bytes(kind))
    if kind == "PNG":
        data[16:24] = struct.pack(">II", 50_000, 50_000)
    elif kind == "BMP":
        data[18:26] = struct.pack("<ii", 50_000, 50_000)
    return bytes(data)


def statistics(draw, folder: Path) -> None:
    arrays = {"mu": np.ones(4), "sigma": np.eye(4), "n": np.int64(9), "features": np.ones((9, 4), np.float32)}
    (folder / "s.npz").write_bytes(broken_npz(draw, arrays | {"preprocess": np.str_("clean")}))
    found = load_statistics(folder / "s.npz", "--fid_reference")
    frechet_distance(found, found)


def write_sealed(draw, value, path: Path) -> None:
    """A broken value, mostly with a checksum that fits, as by somebody who knows how it is made."""
    data = broken_json(draw, value)
    try:
        save_checked_json(json.loads(data), path) if draw(st.integers(0, 3)) else path.write_bytes(data)
    except (ValueError, RecursionError):
        path.write_bytes(data)


def seal_tensors(draw, path: Path) -> None:
    """Give a broken safetensors file a checksum that fits, mostly, where it can be read."""
    try:
        with safe_open(path, "pt") as file:
            tensors, about = {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118
        if draw(st.integers(0, 3)):
            save_checked(tensors, path, {name: text for name, text in (about or {}).items() if name != CHECK})
    except (SafetensorError, OSError, ValueError, TypeError):
        pass


def layer_file(draw, folder: Path) -> None:
    run = RunFolder(str(folder / "out"))
    path = run.layer_path(LAYER.name)
    path.parent.mkdir(parents=True)
    about = {"spec": json.dumps(LAYER.spec.to_dict()), "report": json.dumps({"error": 0.5})}
    if draw(st.booleans()):
        about[draw(st.sampled_from(sorted(about)))] = broken_json(draw, LAYER.spec.to_dict()).decode(errors="replace")
    data = tensor_bytes(random_code(LAYER.spec, LAYER.rows, LAYER.columns).pack(), about)
    path.write_bytes(broken_safetensors(draw, data))
    seal_tensors(draw, path)
    done = run.load_layer(LAYER)
    assert done.spec == LAYER.spec
    assert {name: tensor.shape for name, tensor in done.tensors.items()} == {
        name: torch.Size(shape) for name, (shape, _) in LAYER.spec.tensor_shapes(8, 16).items()
    }


def hessian_cache(draw, folder: Path) -> None:
    settings_ = {"model": "m", "seed": 0}
    store = HessianStore(folder, settings_)
    store.save([LAYER], torch.eye(16), torch.eye(16))
    if draw(st.booleans()):
        write_sealed(draw, load_checked_json(folder / "hessians.json"), folder / "hessians.json")
    else:
        path = folder / f"{LAYER.name}.safetensors"
        path.write_bytes(broken_safetensors(draw, path.read_bytes()))
        seal_tensors(draw, path)
    store = HessianStore(folder, settings_)
    if LAYER in store:
        hessian, held_out = store.load(LAYER)
        assert hessian.shape == (16, 16) and (held_out is None or held_out.shape == (16, 16))
        store.groups([LAYER])


def plan(draw, folder: Path) -> None:
    from vqdm.quantization.allocation import planned, read_plan

    path = folder / "plan.json"
    write_sealed(draw, {LAYER.name: {"num_codebooks": 1, "shared_codebooks": "unet", "segment_bits": 0}}, path)
    for layer in planned([LAYER], read_plan(path), path):
        layer.spec.tensor_shapes(8, 16)


def scored_run(draw, folder: Path) -> None:
    (folder / "metrics.json").write_bytes(broken_json(draw, METRICS))
    runs = [read_run(str(folder)), read_run(str(folder), "other")]
    incomparable(runs)
    for write in (markdown, latex, table_csv):
        write(compare(runs)).encode()


def model_index(draw, folder: Path) -> None:
    from vqdm.diffusion.pipelines import check_model
    from vqdm.storage.files import pipeline_fingerprint

    index = {
        "_class_name": "StableDiffusionXLPipeline",
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": [None, None],
    }
    (folder / "unet").mkdir()
    (folder / "model_index.json").write_bytes(broken_json(draw, index))
    check_model(str(folder))
    pipeline_fingerprint(folder)


WEIGHTS = "diffusion_pytorch_model.safetensors"
UNET_CONFIG: dict = {}
UNET_BYTES = b""
META_UNET: torch.nn.Module | None = None
FAST = {f"prompts.{kind}": prompts(kind) for kind in ("txt", "csv", "tsv", "json", "jsonl", "yaml", "parquet")} | {
    one.__name__: one
    for one in (
        config_file, overrides_file, quantization_config, manifest, zipped_manifest, run_record, image_files,
        statistics, layer_file, hessian_cache, plan, scored_run, model_index,
    )
}  # fmt: skip
SLOW = {one.__name__: one for one in (unet_config, unet_tensors)}


@pytest.fixture(scope="module", autouse=True)
def unet_files(tmp_path_factory):
    """The files of a small quantized UNet, for the targets that damage them."""
    global UNET_CONFIG, UNET_BYTES, META_UNET
    folder = tmp_path_factory.mktemp("unet")
    quantized_unet().save_pretrained(folder)
    UNET_CONFIG, UNET_BYTES = json.loads((folder / "config.json").read_text()), (folder / WEIGHTS).read_bytes()
    META_UNET = tiny_unet("sdxl").to("meta")


# ------------------------------------------------------------------------------------------------ the rule


@contextmanager
def watched():
    """Fail where something computes for a minute; the time of others on the machine does not count."""

    def alarm(*_):
        raise AssertionError(f"not done after {SECONDS} seconds of computing")

    before = signal.signal(signal.SIGPROF, alarm)
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


def peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def check(target, draw) -> None:
    """One case: success, or an error that the programs print as one line."""
    with tempfile.TemporaryDirectory() as folder, watched():
        case = Path(folder) / "case"
        case.mkdir()
        try:
            target(draw, case)
        except (UserError, RunError) as error:
            line = str(error)
            assert line.strip() and "\n" not in line.strip(), line[:300]
        assert [path.name for path in Path(folder).iterdir()] == ["case"], "something was written outside"


ALWAYS = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.large_base_example, HealthCheck.filter_too_much]


def fuzz(target, cases: int, fixed: bool) -> None:
    """`cases` cases of a target."""

    @settings(max_examples=cases, deadline=None, derandomize=fixed, database=None, suppress_health_check=ALWAYS)
    @given(st.data())
    def run(data):
        check(target, data.draw)

    before = peak_bytes()
    run()
    assert peak_bytes() - before < GROWTH


@pytest.mark.parametrize("name", FAST)
def test_broken_files_end_in_a_line(name):
    fuzz(FAST[name], 12, True)


@pytest.mark.parametrize("name", SLOW)
def test_broken_models_end_in_a_line(name):
    fuzz(SLOW[name], 5, True)


@pytest.mark.long
@pytest.mark.parametrize("name", FAST | SLOW)
def test_many_broken_files_end_in_a_line(name):
    fuzz((FAST | SLOW)[name], 200 if name in SLOW else 250, False)
