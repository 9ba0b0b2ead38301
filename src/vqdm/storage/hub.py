"""A finished pipeline folder on the Hugging Face hub."""

from __future__ import annotations

import os
import shlex
from pathlib import Path

from huggingface_hub import HfApi, constants, get_token

from vqdm.errors import RunError, UserError

# Paths of this machine and the data of the run; the card has the figures.
KEPT_HERE = [".vqdm-lock*", "run.json", "summary.json", "layers.jsonl", "plan.json", "training.jsonl"]
# Half-quantized UNets, images of steps in between, and what trackers write: tensorboard under the program's name.
KEPT_HERE += ["work/*", "snapshots/*", "images/*", "wandb/*", "vqdm-*/*", "runs/*"]


def open_repository(name: str, private: bool) -> str:
    """Make the repository, or find it, before the work whose result it is for; its whole name, `owner/name`.

    Only the first of several processes asks the hub; the others get `name` back.

    Raises:
        UserError: offline, not logged in, or the hub refuses the name or the token.
    """
    if not _first_process():
        return name
    if constants.HF_HUB_OFFLINE:
        raise UserError("--push_to_hub needs the hub, but HF_HUB_OFFLINE is set")
    if get_token() is None:
        raise UserError("--push_to_hub needs a token: log in with `hf auth login`, or set HF_TOKEN")
    try:
        return HfApi().create_repo(name, private=private, exist_ok=True).repo_id
    except Exception as error:  # the client's own errors, and those of the connection below it
        raise UserError(f"--hub_model_id {name}: {_first_line(error)}") from None


def push_folder(folder: Path, name: str) -> str:
    """Upload a pipeline folder to a repository that `open_repository` made; its address.

    Raises:
        RunError: the upload failed; the folder is unchanged, and the line says how to try again.
    """
    address = f"{constants.ENDPOINT}/{name}"
    if not _first_process():
        return address
    try:
        HfApi().upload_folder(
            repo_id=name, folder_path=folder, ignore_patterns=KEPT_HERE, commit_message="Add the quantized pipeline"
        )
    except Exception as error:  # as above
        again = f"`{shlex.join(['hf', 'upload', name, str(folder)])}` or the same command with --resume tries again"
        raise RunError(f"{folder} is finished but not on the hub: {_first_line(error)}; {again}") from None
    return address


def _first_process() -> bool:
    return os.environ.get("RANK", "0") == "0"


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).partition("\n")[0]
