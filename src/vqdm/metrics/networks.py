"""Find the networks behind the scores before any work starts: a folder, a file, or a name on the hub.

huggingface_hub and torch.hub find and download. Only tensors are unpickled, and the SHA-256 of every weight file goes
into the result.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import torch

from vqdm.documents import first_line
from vqdm.fidelity import LPIPS_FILES
from vqdm.storage.files import file_sha256
from vqdm.storage.hub import is_offline

INCEPTION_FILES = ("weights-inception-2015-12-05-6726825d.pth", "pt_inception-2015-12-05-6726825d.pth")
INCEPTION_URL = f"https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/{INCEPTION_FILES[0]}"
INCEPTION_SHA256 = "6726825d"
TORCHVISION_URL = "https://download.pytorch.org/models/"
REWARD_FILE = "ImageReward.pt"
REWARD_TOKENIZER = "google-bert/bert-base-uncased"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.txt")
CLIP_PROCESSOR = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
SMALL_FILES = ("*.json", "*.txt", "*.model")
SAFE_WEIGHTS = ("open_clip_model.safetensors", "model*.safetensors")
PICKLED_WEIGHTS = ("open_clip_pytorch_model.bin", "pytorch_model*.bin")


class Unavailable(Exception):
    """A metric or network that is unavailable; the message has the reason."""


@dataclass(frozen=True)
class Network:
    """A network that was found.

    Attributes:
        kind: inception, open_clip, transformers, image_reward or lpips.
        name: the name in labels.
        source: folder or file to load, or an open_clip architecture.
        sha256: of the weights; of several files, over their digests.
        options: what else the loader needs.
    """

    kind: str
    name: str
    source: str
    sha256: str
    options: dict = field(default_factory=dict)


def digest(files: Iterable[Path]) -> str:
    """Return the SHA-256 of a file, or over those of several in order of their names."""
    parts = [file_sha256(path) for path in sorted(files, key=lambda path: path.name)]
    return parts[0] if len(parts) == 1 else hashlib.sha256("".join(parts).encode()).hexdigest()


def check_digest(path: Path, start: str) -> str:
    """Return the digest of a published file, whose name carries the first digits.

    Raises:
        Unavailable: it is another file.
    """
    found = file_sha256(path)
    if not found.startswith(start):
        raise Unavailable(f"{path} has SHA-256 {found[:8]}…, the published file {start}…")
    return found


def _fetched(name: str, here: bool, fetch: Callable[[], str | Path]) -> Path:
    """Return what `fetch` finds or downloads. Raises Unavailable for every way in which it fails."""
    try:
        return Path(fetch())
    except Exception as error:  # the hub, its client and the connection know a dozen kinds
        reason = "" if here else f" and cannot be downloaded ({first_line(error)})"
        raise Unavailable(f"{name} is not on this machine{reason}") from None


def _from_hub(name: str, local_files_only: bool, *choices: tuple[str, ...]) -> Path:
    """Return the snapshot of a hub name with the files of the first choice of patterns that it has."""
    from huggingface_hub import snapshot_download

    if name.startswith((".", "/", "~")) or name.count("/") != 1:
        raise Unavailable(f"{name} is not found; give a folder, or a hub name like owner/name")
    here = is_offline(local_files_only)
    for patterns in choices:
        fetch = partial(snapshot_download, name, allow_patterns=[*SMALL_FILES, *patterns], local_files_only=here)
        folder = _fetched(name, here, fetch)
        if any(file for pattern in patterns for file in folder.glob(pattern)):
            break
    return folder


def _hub_file(repository: str, name: str, local_files_only: bool) -> Path:
    from huggingface_hub import hf_hub_download

    here = is_offline(local_files_only)
    fetch = partial(hf_hub_download, repository, name, local_files_only=here)
    return _fetched(f"{repository}/{name}", here, fetch)


def _torch_hub_file(url: str, names: Iterable[str], local_files_only: bool) -> Path:
    """Return the first of `names` in the folder of torch.hub, or download the file of `url` into it."""
    folder, name = Path(torch.hub.get_dir()) / "checkpoints", url.rpartition("/")[2]
    found = next((folder / one for one in names if (folder / one).is_file()), None)
    if found:
        return found
    if is_offline(local_files_only):
        raise Unavailable(f"{name} is not in the folder of torch.hub, {folder}")

    def fetch() -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(url, str(folder / name), progress=False)
        return folder / name

    return _fetched(name, False, fetch)


# --------------------------------------------------------------------------------------------- encoders


def find_encoder(name: str, local_files_only: bool) -> Network:
    """Find an image encoder: a folder of open_clip or transformers (CLIP, DINOv2), or a hub name of such.

    Raises:
        Unavailable: it is not found, or is something else.
    """
    folder, label = Path(name), Path(name).name
    if not folder.is_dir():
        folder, label = _from_hub(name, local_files_only, SAFE_WEIGHTS, PICKLED_WEIGHTS), name
    if (folder / "open_clip_config.json").is_file():
        files = _weights(folder, SAFE_WEIGHTS[0], PICKLED_WEIGHTS[0])
        return Network("open_clip", label, f"local-dir:{folder}", digest(files), {"pretrained": None})
    try:
        kind = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("model_type")
    except (OSError, ValueError, AttributeError):
        kind = None
    if kind not in ("clip", "dinov2"):
        raise Unavailable(f"{name} is a {kind or 'folder without config.json'}; allowed are open_clip, CLIP and DINOv2")
    files = _weights(folder, SAFE_WEIGHTS[1], PICKLED_WEIGHTS[1])
    return Network("transformers", label, str(folder), digest(files), {"model_type": kind})


def _weights(folder: Path, *patterns: str) -> list[Path]:
    """Return the files of the first pattern that has any."""
    found = next((files for pattern in patterns if (files := sorted(folder.glob(pattern)))), [])
    if not found:
        raise Unavailable(f"{folder} holds no weights ({' or '.join(patterns)})")
    return found


def find_open_clip(model: str, pretrained: str, local_files_only: bool) -> Network:
    """Find a CLIP model: a folder or hub name, or an open_clip architecture with a tag or file of weights.

    Raises:
        Unavailable: it is not found, or the tag does not exist.
    """
    import open_clip

    if Path(model).is_dir() or "/" in model:
        return find_encoder(model, local_files_only)
    label = f"{model}/{Path(pretrained).stem if Path(pretrained).is_file() else pretrained}"
    if Path(pretrained).is_file():
        file = Path(pretrained)
    elif model not in open_clip.list_models():
        raise Unavailable(f"{model} is neither a folder nor an architecture of open_clip")
    elif pretrained not in (tags := open_clip.list_pretrained_tags_by_model(model)):
        raise Unavailable(f"{pretrained} is neither a file nor a tag of {model}; allowed are {', '.join(tags)}")
    else:
        repository, _, name = open_clip.get_pretrained_cfg(model, pretrained)["hf_hub"].rpartition("/")
        file = _open_clip_file(repository, name, local_files_only)
    return Network("open_clip", label, model, digest([file]), {"pretrained": pretrained})


def _open_clip_file(repository: str, name: str, local_files_only: bool) -> Path:
    """Return the weight file of a tag, in the order in which open_clip itself looks for it."""
    safe = f"{Path(name).stem}.safetensors" if name else "open_clip_model.safetensors"
    try:
        return _hub_file(repository, safe, local_files_only)
    except Unavailable:
        return _hub_file(repository, name or "open_clip_pytorch_model.bin", local_files_only)


def find_pickscore(name: str, local_files_only: bool) -> Network:
    """Find PickScore's CLIP model, with the processor of the model it was tuned from if it has none of its own."""
    network = find_encoder(name, local_files_only)
    if network.kind == "open_clip" or (Path(network.source) / "preprocessor_config.json").is_file():
        return network
    processor = _from_hub(CLIP_PROCESSOR, local_files_only, ())
    return replace(network, options=network.options | {"processor": str(processor)})


def find_image_reward(name: str, local_files_only: bool) -> Network:
    """Find ImageReward's file of weights, and BERT's tokenizer if the folder has none."""
    folder = Path(name)
    path = folder / REWARD_FILE if folder.is_dir() else _hub_file(name, REWARD_FILE, local_files_only)
    if not path.is_file():
        raise Unavailable(f"{folder} holds no {REWARD_FILE}")
    own = any((folder / file).is_file() for file in TOKENIZER_FILES)
    tokenizer = folder if own else _from_hub(REWARD_TOKENIZER, local_files_only, ())
    options = {"tokenizer": str(tokenizer)}
    return Network("image_reward", REWARD_FILE.removesuffix(".pt"), str(path), digest([path]), options)


def find_features(name: str, mode: str, local_files_only: bool) -> Network:
    """Find the network of the Fréchet distance: "inception", a file of its weights, or an encoder."""
    if name != "inception" and not Path(name).is_file():
        return find_encoder(name, local_files_only)
    path = Path(name)
    if name == "inception":
        path = _torch_hub_file(INCEPTION_URL, INCEPTION_FILES, local_files_only)
    return Network("inception", "inception", str(path), check_digest(path, INCEPTION_SHA256), {"mode": mode})


def find_lpips(net: str, file: str | None, local_files_only: bool) -> Network:
    """Find the backbone of LPIPS; its heads ship with torchmetrics."""
    name = LPIPS_FILES[net]
    path = Path(file) if file else _torch_hub_file(TORCHVISION_URL + name, [name], local_files_only)
    if not path.is_file():
        raise Unavailable(f"{path} is not found; give {name}")
    start = name.rpartition("-")[2].removesuffix(".pth")
    return Network("lpips", net, str(path), check_digest(path, start), {"net": net})
