"""Where the networks behind the scores come from: a folder, a file, or a name on the hub; found before work starts.

Nothing is unpickled but tensors, and the SHA-256 of every weight file goes into the result.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

from vqdm.storage.files import file_sha256

INCEPTION_FILES = ("weights-inception-2015-12-05-6726825d.pth", "pt_inception-2015-12-05-6726825d.pth")
INCEPTION_URL = f"https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/{INCEPTION_FILES[1]}"
INCEPTION_SHA256 = "6726825d"
LPIPS_FILES = {"alex": "alexnet-owt-7be5be79.pth", "vgg": "vgg16-397923af.pth"}
TORCHVISION_URL = "https://download.pytorch.org/models/"
HPS_REPOSITORY, HPS_FILE = "xswu/HPSv2", "HPS_v2.1_compressed.pt"
REWARD_REPOSITORY, REWARD_FILE = "THUDM/ImageReward", "ImageReward.pt"
REWARD_TOKENIZER = "google-bert/bert-base-uncased"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.txt")
CLIP_PROCESSOR = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
SMALL_FILES = ("*.json", "*.txt", "*.model")


class Missing(Exception):
    """A network that is not at hand; the message says why."""


@dataclass(frozen=True)
class Network:
    """A network that was found.

    Attributes:
        kind: inception, open_clip, transformers or lpips.
        name: what it is called in labels.
        source: folder or file to load, or an open_clip architecture.
        sha256: of its weights; of several files, over their digests.
        options: what else its loader needs.
    """

    kind: str
    name: str
    source: str
    sha256: str
    options: dict = field(default_factory=dict)

    def about(self) -> dict:
        """Plain JSON for the record."""
        return asdict(self)


def offline(local_files_only: bool) -> bool:
    return local_files_only or os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")


def digest(files: list[Path]) -> str:
    """SHA-256 of a file, or over those of several in order of their names."""
    parts = [file_sha256(path) for path in sorted(files, key=lambda path: path.name)]
    return parts[0] if len(parts) == 1 else hashlib.sha256("".join(parts).encode()).hexdigest()


def check_digest(path: Path, start: str) -> str:
    """The digest of a file whose name in the literature carries its first digits.

    Raises:
        Missing: it is another file.
    """
    found = file_sha256(path)
    if not found.startswith(start):
        raise Missing(f"{path} has SHA-256 {found[:8]}…, the published file {start}…")
    return found


# --------------------------------------------------------------------------------------------- encoders


def find_encoder(name: str, local_files_only: bool, options: dict | None = None) -> Network:
    """An image encoder: a folder of open_clip or transformers (CLIP, DINOv2), or a hub name of such.

    Raises:
        Missing: it is not there, or is something else.
    """
    folder = Path(name) if Path(name).is_dir() else _from_hub(name, local_files_only)
    label = folder.name if Path(name).is_dir() else name
    if (folder / "open_clip_config.json").is_file():
        files = _weights(folder, ("open_clip_model.safetensors", "open_clip_pytorch_model.bin"))
        settings = dict(options or {}) | {"pretrained": None}
        return Network("open_clip", label, f"local-dir:{folder}", digest(files), settings)
    kind = _model_type(folder)
    if kind not in ("clip", "dinov2"):
        raise Missing(f"{name} is a {kind or 'folder without config.json'}; allowed are open_clip, CLIP and DINOv2")
    files = _weights(folder, ("model*.safetensors", "pytorch_model*.bin"))
    return Network("transformers", label, str(folder), digest(files), dict(options or {}) | {"model_type": kind})


def _model_type(folder: Path) -> str | None:
    try:
        return json.loads((folder / "config.json").read_text(encoding="utf-8")).get("model_type")
    except (OSError, ValueError):
        return None


def _weights(folder: Path, patterns: tuple[str, ...]) -> list[Path]:
    """Files of the first pattern that has any."""
    found = next((files for pattern in patterns if (files := sorted(folder.glob(pattern)))), [])
    if not found:
        raise Missing(f"{folder} holds no weights ({' or '.join(patterns)})")
    return found


def _from_hub(name: str, local_files_only: bool) -> Path:
    """The snapshot of a hub name, with safetensors where there are any."""
    from huggingface_hub import snapshot_download

    if name.startswith((".", "/", "~")) or name.count("/") != 1:
        raise Missing(f"{name} is not there; give a folder, or a hub name like owner/name")
    here = offline(local_files_only)

    def fetch(*weights: str) -> Path:
        return Path(snapshot_download(name, allow_patterns=[*SMALL_FILES, *weights], local_files_only=here))

    folder = _reached(lambda: fetch("model*.safetensors", "open_clip_model.safetensors"), name, here)
    if any(folder.glob("*model*.safetensors")):
        return folder
    return _reached(lambda: fetch("pytorch_model*.bin", "open_clip_pytorch_model.bin"), name, here)


def _reached(action: Callable[[], Path], name: str, local_files_only: bool) -> Path:
    """What a download gives; every way it can fail is one of not being at hand."""
    try:
        return action()
    except Exception as error:
        if offline(local_files_only):
            raise Missing(f"{name} is not on this machine") from None
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise Missing(f"{name} is not on this machine and cannot be downloaded ({lines[0]})") from None


def find_open_clip(model: str, pretrained: str, local_files_only: bool) -> Network:
    """A CLIP model for text and pictures: a folder or hub name, or an open_clip architecture with a tag or file.

    Raises:
        Missing: it is not there, or the tag does not exist.
    """
    if Path(model).is_dir() or "/" in model:
        return find_encoder(model, local_files_only)
    if Path(pretrained).is_file():
        return Network(
            "open_clip",
            f"{model}/{Path(pretrained).stem}",
            model,
            digest([Path(pretrained)]),
            {"pretrained": pretrained},
        )
    file = _open_clip_file(model, pretrained, local_files_only)
    return Network("open_clip", f"{model}/{pretrained}", model, digest([file]), {"pretrained": pretrained})


def _open_clip_file(model: str, tag: str, local_files_only: bool) -> Path:
    """The weight file of an open_clip tag; open_clip itself says where, and whether QuickGELU goes with it."""
    import open_clip

    if model not in open_clip.list_models():
        raise Missing(f"{model} is neither a folder nor an architecture of open_clip")
    tags = open_clip.list_pretrained_tags_by_model(model)
    if tag not in tags:
        raise Missing(f"{tag} is neither a file nor a tag of {model}; allowed are {', '.join(tags)}")
    config = open_clip.get_pretrained_cfg(model, tag)
    if not offline(local_files_only):
        return _reached(lambda: Path(open_clip.download_pretrained(config)), f"{model}/{tag}", False)
    return _reached(lambda: _cached(config.get("hf_hub", "")), f"{model}/{tag}", True)


def _cached(hub_path: str) -> Path:
    """The file of "owner/name/[file]" in the hub's cache. Raises FileNotFoundError."""
    from huggingface_hub import try_to_load_from_cache

    repository, _, file = hub_path.rpartition("/")
    wanted = [file] if file else ["open_clip_model.safetensors", "open_clip_pytorch_model.bin"]
    wanted = [name.rpartition(".")[0] + ".safetensors" for name in wanted] + wanted
    for name in wanted:
        found = try_to_load_from_cache(repository, name) if repository else None
        if isinstance(found, str):
            return Path(found)
    raise FileNotFoundError("it is not in the hub's cache, and the hub is off limits")


def find_pickscore(name: str, local_files_only: bool) -> Network:
    """PickScore's CLIP model, with the processor of the model it was tuned from where it brings none itself."""
    network = find_encoder(name, local_files_only)
    folder = Path(network.source)
    if network.kind == "open_clip" or (folder / "preprocessor_config.json").is_file():
        return network
    processor = _from_hub(CLIP_PROCESSOR, local_files_only)
    return Network(
        network.kind, network.name, network.source, network.sha256, network.options | {"processor": str(processor)}
    )


def find_hpsv2(file: str | None, local_files_only: bool) -> Network:
    """HPSv2.1: a state dict of open_clip's ViT-H-14; pictures are fitted by their longer side, as its authors do."""
    path = Path(file) if file else _hub_file(HPS_REPOSITORY, HPS_FILE, local_files_only)
    if not path.is_file():
        raise Missing(f"{path} is not there; give {HPS_FILE}")
    options = {"pretrained": str(path), "resize": "longest"}
    return Network("open_clip", path.stem.removesuffix("_compressed"), "ViT-H-14", digest([path]), options)


def find_image_reward(name: str, local_files_only: bool) -> Network:
    """ImageReward's file of weights, and BERT's tokenizer where the folder brings none."""
    folder = Path(name)
    path = folder / REWARD_FILE if folder.is_dir() else _hub_file(name, REWARD_FILE, local_files_only)
    if not path.is_file():
        raise Missing(f"{folder} holds no {REWARD_FILE}")
    own = any((folder / file).is_file() for file in TOKENIZER_FILES)
    tokenizer = folder if own else _tokenizer_from_hub(REWARD_TOKENIZER, local_files_only)
    options = {"tokenizer": str(tokenizer)}
    return Network("image_reward", REWARD_FILE.removesuffix(".pt"), str(path), digest([path]), options)


def _tokenizer_from_hub(name: str, local_files_only: bool) -> Path:
    """The snapshot of a hub name, without its weights."""
    from huggingface_hub import snapshot_download

    here = offline(local_files_only)

    def fetch() -> Path:
        return Path(snapshot_download(name, allow_patterns=list(TOKENIZER_FILES), local_files_only=here))

    return _reached(fetch, name, here)


def _hub_file(repository: str, name: str, local_files_only: bool) -> Path:
    from huggingface_hub import hf_hub_download

    here = offline(local_files_only)
    return _reached(
        lambda: Path(hf_hub_download(repository, name, local_files_only=here)), f"{repository}/{name}", here
    )


# --------------------------------------------------------------------------------------------- files of torch.hub


def find_features(name: str, mode: str, local_files_only: bool) -> Network:
    """The network of the Fréchet distance: "inception", a file of its weights, or an encoder as of `find_encoder`."""
    if name != "inception" and not Path(name).is_file():
        return find_encoder(name, local_files_only)
    path = Path(name) if name != "inception" else _inception_file(local_files_only)
    return Network("inception", "inception", str(path), check_digest(path, INCEPTION_SHA256), {"mode": mode})


def _inception_file(local_files_only: bool) -> Path:
    for name in INCEPTION_FILES:
        path = _checkpoints() / name
        if path.is_file():
            return path
    return _from_url(INCEPTION_URL, local_files_only)


def find_lpips(net: str, file: str | None, local_files_only: bool) -> Network:
    """The backbone of LPIPS; its heads ship with torchmetrics."""
    name = LPIPS_FILES[net]
    path = Path(file) if file else _checkpoints() / name
    if file and not path.is_file():
        raise Missing(f"{file} is not there; give {name}")
    if not path.is_file():
        path = _from_url(TORCHVISION_URL + name, local_files_only)
    start = name.rpartition("-")[2].removesuffix(".pth")
    return Network("lpips", net, str(path), check_digest(path, start), {"net": net})


def _checkpoints() -> Path:
    return Path(torch.hub.get_dir()) / "checkpoints"


def _from_url(url: str, local_files_only: bool) -> Path:
    name = url.rpartition("/")[2]
    target = _checkpoints() / name
    if offline(local_files_only):
        raise Missing(f"{name} is not in torch.hub's folder {target.parent}")

    def fetch() -> Path:
        target.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(url, str(target), progress=False)
        return target

    return _reached(fetch, name, local_files_only)
