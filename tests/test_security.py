"""What docs/security.md promises, checked on the source and on what the programs write."""

from __future__ import annotations

import ast
import json
import resource
import shlex
import shutil
import struct
import sys
import zipfile
import zlib
from contextlib import contextmanager
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from convert import main as convert
from finetune import main as finetune
from generate import main as generate
from hypothesis import given, settings
from hypothesis import strategies as st
from main_text2image import main as quantize
from metrics import main as metrics
from mutations import npy, zipped
from PIL import Image
from test_hf import quantized_unet

from vqdm.cli import run_script
from vqdm.diffusion.model_folders import find_denoiser, load_denoiser
from vqdm.documents import parse_yaml, printable
from vqdm.errors import RunError, UserError
from vqdm.images import is_inside
from vqdm.metrics.frechet import load_statistics
from vqdm.metrics.image_sets import open_images
from vqdm.metrics.report import embedded, escaped, pair
from vqdm.tracking import MASK, own_command, redacted

SOURCES = sorted(
    path
    for place in ("src", "scripts", "benchmarks", "assets/make", ".")
    for path in (Path(place).glob("*.py") if place == "." else Path(place).rglob("*.py"))
)
# The one file that knows how pickles are made, and reads those of the original without what they name.
PICKLE_READER = Path("src/vqdm/storage/original.py")
TOKEN = "hf_" + "S3cretS3cretS3cret"
KEY = "0123456789abcdef" * 2 + "01234567"


# ------------------------------------------------------------------------------------------------ the source


def calls(tree: ast.AST) -> list[tuple[str, dict[str, object]]]:
    """(dotted name, constant keyword arguments) of every call in a file."""
    found = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    return [
        (ast.unparse(node.func), {word.arg: getattr(word.value, "value", word.value) for word in node.keywords})
        for node in found
    ]


@pytest.mark.parametrize("path", SOURCES, ids=str)
def test_nothing_runs_strings_or_reads_pickles(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    names = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module}
    forbidden = {"marshal", "shelve", "dill", "cloudpickle"} | (set() if path == PICKLE_READER else {"pickle"})
    assert not names & forbidden
    for name, words in calls(tree):
        assert name not in ("eval", "exec", "compile", "os.system", "os.popen", "yaml.load", "yaml.unsafe_load"), name
        assert "trust_remote_code" not in words and words.get("shell") is not True, name
        if name == "torch.load":
            assert words.get("weights_only") is True or path == PICKLE_READER, name
        if name == "np.load":
            assert words.get("allow_pickle") is False, name


def test_only_one_place_may_record_the_command_line():
    """`own_command` leaves tokens out; whoever writes sys.argv by itself does not."""
    users = [path for path in SOURCES if path.is_relative_to("src") and "sys.argv" in path.read_text(encoding="utf-8")]
    assert {path.name for path in users} <= {"tracking.py"}


# ------------------------------------------------------------------------------------------------ pickles and code


class Payload:
    """Creates a file where it is unpickled."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self):
        return Path.touch, (self.mark,)


def test_pickles_in_statistics_are_refused(tmp_path):
    mark = tmp_path / "mark"
    array = np.array([Payload(mark)], dtype=object)
    (tmp_path / "s.npz").write_bytes(zipped({"mu.npy": npy(array), "sigma.npy": npy(np.eye(1))}))
    with pytest.raises(UserError, match=r"s\.npz is not a file of statistics"):
        load_statistics(tmp_path / "s.npz", "--fid_reference")
    assert not mark.exists()


@pytest.mark.parametrize("name", ["diffusion_pytorch_model.bin", "diffusion_pytorch_model.safetensors"])
def test_pickles_of_weights_are_refused(tmp_path, pipelines, name):
    mark, model = tmp_path / "mark", tmp_path / "model"
    shutil.copytree(pipelines["sd15"], model)
    (model / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    torch.save({"conv_in.weight": Payload(mark)}, model / "unet" / name)
    (tmp_path / "p.txt").write_text("a\n")
    assert run_script(generate, [str(model), str(tmp_path / "p.txt"), "--output_dir", str(tmp_path / "out")]) == 2
    assert not mark.exists()


def test_code_in_a_model_folder_is_not_run(tmp_path, pipelines, capsys):
    mark, model = tmp_path / "mark", tmp_path / "model"
    shutil.copytree(pipelines["sd15"], model)
    index = json.loads((model / "model_index.json").read_text())
    (model / "own.py").write_text(f"open({str(mark)!r}, 'w')\nclass Own: pass\n")
    (model / "model_index.json").write_text(json.dumps(index | {"_class_name": ["own", "Own"], "unet": ["own", "Own"]}))
    (tmp_path / "p.txt").write_text("a\n")
    assert run_script(generate, [str(model), str(tmp_path / "p.txt"), "--output_dir", str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err.count("\n") == 1 and not mark.exists()


# ------------------------------------------------------------------------------------------------ paths and archives


@pytest.mark.parametrize(
    "name", ["", ".", "..", "a/../../b", "/etc/passwd", "a\\..\\b", "a\0b", "\ud800", "a" * 300, 3]
)
def test_such_names_are_not_inside(name):
    assert not is_inside(name)


def write_manifest(folder: Path, file: str) -> None:
    row = {"index": 0, "sample": 0, "file": file, "sha256": "0"}
    (folder / "manifest.jsonl").write_text(json.dumps(row) + "\n")


def test_a_manifest_cannot_name_files_outside(tmp_path):
    folder = tmp_path / "set"
    folder.mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "secret.png")
    (folder / "link.png").symlink_to(tmp_path / "secret.png")
    for file, words in (("../secret.png", "1 of 1 lines are not rows"), ("link.png", "outside of the folder")):
        write_manifest(folder, file)
        with pytest.raises(UserError, match=words):
            open_images(str(folder), "IMAGES")


def test_a_folder_may_hold_links_that_its_owner_made(tmp_path):
    (tmp_path / "set").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    (tmp_path / "set" / "link.png").symlink_to(tmp_path / "a.png")
    assert len(open_images(str(tmp_path / "set"), "IMAGES").entries) == 1


def test_archives_are_read_in_place(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    data = (tmp_path / "a.png").read_bytes()
    (tmp_path / "set.zip").write_bytes(zipped({"../up.png": data, "/root.png": data}))
    found = open_images(str(tmp_path / "set.zip"), "IMAGES")
    assert [found.load(entry).size for entry in found.entries.values()] == [(8, 8)]  # names with .. are left out
    assert {path.name for path in tmp_path.iterdir()} == {"a.png", "set.zip"}


def test_a_picture_of_too_many_pixels_is_refused_before_it_is_decoded(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    data = bytearray((tmp_path / "a.png").read_bytes())
    data[16:24] = struct.pack(">II", 9000, 9000)
    data[29:33] = struct.pack(">I", zlib.crc32(bytes(data[12:29])))
    (tmp_path / "a.png").write_bytes(bytes(data))
    found = open_images(str(tmp_path), "IMAGES")
    with pytest.raises(RunError, match="9000 × 9000 pixels"):
        found.load(next(iter(found.entries.values())))


def test_only_usual_decoders_see_a_picture(tmp_path):
    """PIL would hand an EPS file to Ghostscript, whatever its name."""
    Image.new("RGB", (8, 8)).save(tmp_path / "a.eps")
    (tmp_path / "a.eps").rename(tmp_path / "a.png")
    found = open_images(str(tmp_path), "IMAGES")
    with pytest.raises(RunError, match="cannot be read as an image"):
        found.load(next(iter(found.entries.values())))


# ------------------------------------------------------------------------------------------------ bounds

ABSURD = {
    "layers_per_block": {"layers_per_block": 10**8},
    "channels": {"block_out_channels": [2**40, 2**40]},
    "depth": {"transformer_layers_per_block": [10**7, 1]},
    "blocks": {"down_block_types": ["DownBlock2D"] * 10**5, "block_out_channels": [8] * 10**5},
    "codebooks": {"quantization_config": {"nbits_per_codebook": 16, "num_codebooks": 16, "groupwise_codebooks": True}},
}


@contextmanager
def little_memory(more: int):
    """Inside, this process gets `more` bytes of address space beyond what it has."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + more, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


@pytest.fixture(scope="module")
def good(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("good")
    quantized_unet().save_pretrained(folder)
    return folder


@pytest.mark.skipif(not Path("/proc/self/statm").is_file(), reason="needs Linux to know its address space")
@pytest.mark.parametrize("name", ABSURD)
def test_absurd_shapes_are_refused_before_anything_is_allocated(tmp_path, good, name):
    """Codebooks as declared last would take 2 TB."""
    shutil.copytree(good, tmp_path / "absurd")
    config = json.loads((good / "config.json").read_text())
    code = config["quantization_config"]["code"] | ABSURD[name].get("quantization_config", {})
    config |= ABSURD[name] | {"quantization_config": config["quantization_config"] | {"code": code}}
    (tmp_path / "absurd" / "config.json").write_text(json.dumps(config))
    with little_memory(2**28), pytest.raises(UserError, match="QUANTIZED"):
        load_denoiser(find_denoiser(str(tmp_path / "absurd")), torch.float32)


def test_a_zip_bomb_of_statistics_is_refused(tmp_path):
    path = tmp_path / "bomb.npz"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("mu.npy", npy(np.zeros(2)))
        archive.writestr("sigma.npy", npy(np.zeros((2, 2))))
    data = path.read_bytes().replace(struct.pack("<I", 160), struct.pack("<I", 2**32 - 2))
    path.write_bytes(data)
    with pytest.raises(UserError, match="not a file of statistics"):
        load_statistics(path, "--fid_reference")


def test_aliases_of_yaml_are_refused():
    """A few lines of them stand for more values than memory holds."""
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{k}: &a{k} [{', '.join([f'*a{k - 1}'] * 9)}]" for k in range(1, 10)]
    with pytest.raises(ValueError, match=r"line 2: \*a0 is an alias; write its value out"):
        parse_yaml("\n".join(lines))
    assert parse_yaml("a: &x {b: [1, 2]}\nc: '*x'\n") == {"a": {"b": [1, 2]}, "c": "*x"}


# ------------------------------------------------------------------------------------------------ words on screen


class Text(HTMLParser):
    """Elements and text of a page."""

    def __init__(self, page: str):
        super().__init__()
        self.elements, self.text = [], ""
        self.feed(page)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, attrs))

    def handle_data(self, data):
        self.text += data


SPECIAL = st.text(st.sampled_from("<>&'\"/ =abscript-!\u2028\u2029{}\0\n\r"), max_size=60)


@settings(max_examples=200, deadline=None, derandomize=True, database=None)
@given(st.one_of(SPECIAL, st.text(max_size=60)))
def test_no_text_becomes_markup(text):
    page = Text(pair("name", text))
    assert page.elements == [("dt", []), ("dd", [])]
    assert page.text == "name" + text
    attribute = Text(f'<a title="{escaped(text)}">x</a>')
    assert [tag for tag, _ in attribute.elements] == ["a"] and len(attribute.elements[0][1]) == 1
    data = embedded({text: [text]})
    assert json.loads(data) == {text: [text]} and "<" not in data and "\u2028" not in data
    assert all(sign.isprintable() for sign in printable(text))


# ------------------------------------------------------------------------------------------------ tokens


@pytest.mark.parametrize(
    ("line", "left"),
    [
        (f"curl -H 'Authorization: Bearer {KEY}' x", f"curl -H 'Authorization: Bearer {MASK}' x"),
        (f"tool --hf_token {KEY} --seed 3", f"tool --hf_token {MASK} --seed 3"),
        (f"tool --api-key={KEY} y", f"tool --api-key={MASK} y"),
        (f"WANDB_API_KEY={KEY} run", f"WANDB_API_KEY={MASK} run"),
        (f"https://user:{KEY}@host/x", f"https://{MASK}@host/x"),
        (f"push {TOKEN} now", f"push {MASK} now"),
    ],
)
def test_tokens_are_masked(line, left):
    assert redacted(line) == left


@pytest.mark.parametrize(
    "line",
    [
        "generate.py model p.csv --revision 0123456789abcdef0123456789abcdef01234567 --seed 5",
        "the tokenizer: vocab.json has 77 tokens, max_token_length 77",
        "MODEL owner/sk-model is a hub name",
    ],
)
def test_ordinary_words_stay(line):
    assert redacted(line) == line


def test_values_of_the_environment_are_masked(monkeypatch):
    monkeypatch.setenv("MY_SERVICE_TOKEN", "plain words")
    monkeypatch.setattr(sys, "argv", ["main.py", "--on_save", "send plain words"])
    assert own_command() == f"main.py --on_save 'send {MASK}'"


def test_no_output_holds_a_token(tmp_path, pipelines, prompt_file, monkeypatch, capfd):
    """All programs, with tokens in the environment and on the command line; every file they write is searched."""
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    fast = (
        "--calibration_nsamples 2 --evaluation_nsamples 2 --visualize_nsamples 1 --num_inference_steps 1 --max_epochs 1"
    )
    fast += " --layer_filter mid_block.*to_q --nbits_per_codebook 4 --init_max_iter 1 --dtype float32"
    little = "--finetune_nsamples 2 --held_out_nsamples 2 --held_out_points 2 --evaluation_nsamples 2"
    little += " --visualize_nsamples 1 --num_inference_steps 1 --finetune_batch_size 2 --local_batch_size 2"
    little += " --finetune_max_epochs 1 --finetune_lr 1e-6 --dtype float32"
    fails = shlex.join(["sh", "-c", "exit 3", "Authorization: Bearer other-secret-value", TOKEN, KEY])
    runs = [
        (quantize, [str(pipelines["sd15"]), *[str(prompt_file)] * 2, *fast.split(), "--on_save", fails]),
        (generate, [str(pipelines["sd15"]), str(prompt_file), "--limit", "2", "--num_inference_steps", "1"]),
        (metrics, [str(tmp_path / "1"), "--reference", str(tmp_path / "1"), "--metrics", "psnr"]),
        (finetune, [str(pipelines["sd15"]), str(tmp_path / "0"), *[str(prompt_file)] * 2, *little.split()]),
        (convert, ["dequantize", str(tmp_path / "0")]),
    ]
    for number, (program, words) in enumerate(runs):
        line = [*words, "--output_dir", str(tmp_path / str(number))]
        monkeypatch.setattr(sys, "argv", [program.__module__ + ".py", *line, "--note", TOKEN])
        assert run_script(program, line) == 0
    out, err = capfd.readouterr()
    written = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert "--on_save failed" in out and len(written) > 20
    for secret in (TOKEN, KEY, "other-secret-value"):
        assert secret not in out + err
        assert not [path for path, data in written.items() if secret.encode() in data]
    for folder in ("0", "3"):
        assert MASK in json.loads((tmp_path / folder / "summary.json").read_text())["command"]
    assert (tmp_path / "4" / "unet" / "config.json").is_file()


def test_a_pickle_is_read_without_tokens_and_its_complaint_holds_none(tmp_path, pipelines, monkeypatch, capfd):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    torch.save({"a": Payload(tmp_path / "mark")}, tmp_path / f"{KEY}-token={TOKEN}.pickle")
    words = ["pickle", str(tmp_path / f"{KEY}-token={TOKEN}.pickle"), "--model", str(pipelines["sd15"])]
    assert run_script(convert, [*words, "--trust_pickle", "--output_dir", str(tmp_path / "out")]) == 2
    out, err = capfd.readouterr()
    assert "which no UNet of the original needs" in err and TOKEN not in out + err
    assert not (tmp_path / "mark").exists() and not (tmp_path / "out").exists()
