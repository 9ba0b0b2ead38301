"""A wheel of the repository holds all files, and runs a quantized model where only its dependencies are installed."""

import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from importlib.metadata import PackageNotFoundError, distribution, distributions
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement
from safetensors.torch import load_file
from test_hf import quantized_unet

ROOT = Path(__file__).parents[1]
PROGRAM = """
import sys
sys.path[:0] = sys.argv[1:3]
import vqdm
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import save_file

unet = UNet2DConditionModel.from_pretrained(sys.argv[3])
assert vqdm.__file__.startswith(sys.argv[1]), vqdm.__file__
inputs = torch.load(sys.argv[4], weights_only=True)
with torch.no_grad():
    save_file({"sample": unet(**inputs).sample.contiguous()}, sys.argv[5])
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Built from a copy, since setuptools writes beside the sources."""
    folder = tmp_path_factory.mktemp("wheel")
    copied = folder / "repository"
    shutil.copytree(ROOT / "src", copied / "src", ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copied)
    options = ["--no-deps", "--no-build-isolation", "--disable-pip-version-check", "--quiet", "--wheel-dir"]
    subprocess.run([sys.executable, "-m", "pip", "wheel", *options, str(folder), str(copied)], check=True)
    (found,) = folder.glob("*.whl")
    return found


def needed(requirements: list[str], extras: frozenset[str] = frozenset(), found: set | None = None) -> set:
    """(name, extras) of the installed distributions that requirements name, and those that these need in turn."""
    found = set() if found is None else found
    for line in map(Requirement, requirements):
        key = (line.name.lower().replace("_", "-"), frozenset(line.extras))
        wanted = not line.marker or any(line.marker.evaluate({"extra": extra}) for extra in (extras or {""}))
        if not wanted or key in found:
            continue
        try:
            below = distribution(line.name).requires or []
        except PackageNotFoundError:
            continue
        found.add(key)
        needed(below, key[1], found)
    return found


def only(needs: set, folder: Path) -> Path:
    """A folder of links to what these distributions installed."""
    packages = Path(sysconfig.get_paths()["purelib"])
    names = {
        Path(file).parts[0] for name, _ in needs for file in distribution(name).files or [] if ".." not in str(file)
    }
    folder.mkdir()
    for name in names - {"__pycache__"}:
        os.symlink(packages / name, folder / name)
    return folder


def test_a_wheel_holds_every_file_of_the_package(wheel):
    source = ROOT / "src"
    wanted = {path for path in (source / "vqdm").rglob("*") if path.is_file() and path.suffix != ".pyc"}
    held = {name for name in zipfile.ZipFile(wheel).namelist() if name.startswith("vqdm/")}
    assert held == {path.relative_to(source).as_posix() for path in wanted}
    assert {Path(name).suffix for name in held} >= {".py", ".c", ".h", ".html"}


def test_a_quantized_unet_runs_with_the_runtime_alone(wheel, tmp_path):
    installed, quantized = tmp_path / "installed", quantized_unet()
    options = ["--no-deps", "--no-index", "--disable-pip-version-check", "--quiet", "--target"]
    subprocess.run([sys.executable, "-m", "pip", "install", *options, str(installed), str(wheel)], check=True)
    (ours,) = distributions(path=[str(installed)])
    needs = needed(ours.requires)
    assert not {"scipy", "matplotlib", "torchvision", "torchmetrics", "wandb"} & {name for name, _ in needs}
    packages = only(needs, tmp_path / "packages")
    quantized.save_pretrained(tmp_path / "unet")
    inputs = {
        "sample": torch.randn(1, 4, 8, 8),
        "timestep": torch.tensor(7),
        "encoder_hidden_states": torch.randn(1, 5, quantized.config.cross_attention_dim),
    }
    if quantized.config.addition_embed_type:
        size = quantized.config.projection_class_embeddings_input_dim - 6 * quantized.config.addition_time_embed_dim
        inputs["added_cond_kwargs"] = {"text_embeds": torch.randn(1, size), "time_ids": torch.ones(1, 6)}
    torch.save(inputs, tmp_path / "inputs.pt")
    words = [installed, packages, tmp_path / "unet", tmp_path / "inputs.pt", tmp_path / "out.safetensors"]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    # Without `site`, nothing that this environment has installed is on the path.
    command = [sys.executable, "-S", "-c", PROGRAM, *map(str, words)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    with torch.no_grad():
        wanted = quantized(**inputs).sample
    torch.testing.assert_close(load_file(tmp_path / "out.safetensors")["sample"], wanted)
