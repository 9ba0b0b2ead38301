"""Measure a finished pipeline folder, and upload it to the Hugging Face hub with a model card."""

from __future__ import annotations

import os
import shlex
from pathlib import Path

from huggingface_hub import HfApi, constants, get_token
from torch import nn

from vqdm.config import COMPONENTS, label
from vqdm.documents import first_line
from vqdm.errors import RunError, UserError
from vqdm.layers.quantized import SHARED_CODEBOOKS, quantized_layers

# Files with paths of this machine and data of the run; the card has the figures.
KEPT_HERE = [".vqdm-lock*", "run.json", "summary.json", "layers*.jsonl", "plan*.json", "training.jsonl"]
# Half-quantized denoisers, images of intermediate steps, and trackers' files: tensorboard's under the program's name.
KEPT_HERE += ["work/*", "snapshots/*", "images/*", "wandb/*", "vqdm-*/*", "runs/*"]


def is_offline(local_files_only: bool = False) -> bool:
    """Return whether the hub is not to be asked, by a flag or by the user's environment, in the hub's own words."""
    given = os.environ.get("HF_HUB_OFFLINE") or os.environ.get("TRANSFORMERS_OFFLINE") or ""
    return local_files_only or given.upper() in constants.ENV_VARS_TRUE_VALUES


def open_repository(name: str, private: bool) -> str:
    """Create or find the repository, before the work starts; return its whole name, `owner/name`.

    Only the first of several processes asks the hub; the others get `name` back.

    Raises:
        UserError: offline, not logged in, or the hub refuses the name or the token.
    """
    if not _first_process():
        return name
    if is_offline():
        raise UserError("--push_to_hub needs the hub, but HF_HUB_OFFLINE is set")
    if get_token() is None:
        raise UserError("--push_to_hub needs a token: log in with `hf auth login`, or set HF_TOKEN")
    try:
        return HfApi().create_repo(name, private=private, exist_ok=True).repo_id
    except Exception as error:  # the client's own errors, and those of the connection below it
        raise UserError(f"--hub_model_id {name}: {first_line(error)}") from None


def push_folder(folder: Path, name: str) -> str:
    """Upload a pipeline folder to a repository of `open_repository`; return its address.

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
        raise RunError(f"{folder} is finished but not on the hub: {first_line(error)}; {again}") from None
    return address


def _first_process() -> bool:
    return os.environ.get("RANK", "0") == "0"


def stored_sizes(denoiser: nn.Module, component: str, parameters: int, staged: Path) -> dict[str, float]:
    """Return bits per weight of the saved tensors, and bytes of the denoiser's files.

    Args:
        parameters: number of the full-precision denoiser's parameters.
    """

    def bits(module: nn.Module) -> int:
        return sum(8 * tensor.element_size() * tensor.numel() for tensor in module.parameters())

    layers = quantized_layers(denoiser).values()
    weights = sum(layer._rows * layer._columns for layer in layers)
    shared = getattr(denoiser, SHARED_CODEBOOKS, None)
    code_bits = sum(layer.stored_bits for layer in layers) + (bits(shared) if shared else 0)
    return {
        "weights_quantized": weights,
        "effective_bits_layers": code_bits / weights,
        f"effective_bits_{component}": bits(denoiser) / parameters,
        f"bytes_of_{component}": sum(file.stat().st_size for file in staged.glob(f"{component}/*.safetensors")),
    }


def sizes_together(sizes: dict[str, dict[str, float]]) -> dict[str, float]:
    """Return what `stored_sizes` found of the quantized denoisers, by component, as a run's summary holds it.

    Of two experts, figures without a component's name in their key are of both; each has its own beside.
    """
    weights = sum(one["weights_quantized"] for one in sizes.values())
    bits = sum(one["weights_quantized"] * one["effective_bits_layers"] for one in sizes.values())
    found = {key: value for one in sizes.values() for key, value in one.items()}
    if len(sizes) == 1:
        return found
    own = {f"effective_bits_layers_{name}": one["effective_bits_layers"] for name, one in sizes.items()}
    return found | {"weights_quantized": weights, "effective_bits_layers": bits / weights} | own


def quantized_denoisers(summary: dict) -> list[str]:
    """Return the names of the denoisers that a run's summary has figures of."""
    return [name for name in COMPONENTS if f"effective_bits_{name}" in summary]


def language_model_card(model: str, summary: dict) -> str:
    """Markdown with the hub's YAML header, as `model_card`, of a language model."""
    hub_name = "" if Path(model).exists() else f"base_model: {model}\nbase_model_relation: quantized\n"
    base = Path(model).absolute().name if Path(model).exists() else model
    return f"""---
library_name: transformers
pipeline_tag: text-generation
tags: [vqdm, quantized]
{hub_name}---

# {base} at {summary["effective_bits_layers"]:.2f} bits per weight

Quantized with vqdm: additive vector quantization (arXiv 2409.00492) of {summary["layers_quantized"]} layers.

| | |
|---|---|
| stored bits per weight, quantized layers | {summary["effective_bits_layers"]:.3f} |
| on disk | {summary["bytes_of_model"] / 1e6:.2f} MB |
| perplexity of held-out texts, before and after | {summary["perplexity_before"]:.3f}, {summary["perplexity"]:.3f} |

```python
import vqdm  # before from_pretrained: teaches transformers the format
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("path/to/this/folder")
```
"""


def size_table(summary: dict) -> str:
    """Format bits and bytes, before and after, of each quantized part of a run's summary, and of the whole pipeline."""
    rows = []
    for name in quantized_denoisers(summary):
        bits = summary.get(f"effective_bits_layers_{name}", summary["effective_bits_layers"])
        rows.append((name, bits, summary[f"bytes_of_original_{name}"], summary[f"bytes_of_{name}"]))
    for name, one in summary.get("text_encoders", {}).items():
        rows.append((name, one["effective_bits_layers"], one["bytes_of_original"], one["bytes"]))
    rows.append(("whole pipeline", None, summary.get("bytes_of_original_pipeline"), summary.get("bytes_of_pipeline")))
    lines = [f"{'':16}  bits per weight   MB before       MB now"]
    for name, bits, *sizes in rows:
        held = ["" if size is None else f"{size / 1e6:.2f}" for size in sizes]
        lines.append(f"{name:16}  {'' if bits is None else f'{bits:.3f}':>15}  {held[0]:>10}  {held[1]:>11}")
    return "\n".join(lines)


def model_card(model: str, summary: dict) -> str:
    """Markdown with the hub's YAML header; it names no base model for a folder or file, which the hub cannot know."""
    hub_name = "" if Path(model).exists() else f"base_model: {model}\nbase_model_relation: quantized\n"
    path = Path(model).absolute()
    base = path.stem if path.is_file() else path.name if path.exists() else model
    images = summary["images"]
    quality = "none: all images have problems" if images["psnr_db"] is None else f"{images['psnr_db']:.2f} dB"
    others = f"; {summary['layers_in_8_bit']} others are int8" if summary["layers_in_8_bit"] else ""
    components, rows = quantized_denoisers(summary), ""
    for component in components:
        error, named = f"{component}_output_error_db", label(component)
        before = summary.get(f"{error}_before")
        tuned = f", fine-tuned; before: {before:.2f} dB" if before is not None else ""
        rows += f"""| stored bits per parameter, whole {named} | {summary[f"effective_bits_{component}"]:.3f} |
| {named} on disk | {summary[f"bytes_of_{component}"] / 1e6:.2f} MB |
| {named}-output error on held-out prompts{tuned} | {summary[error]:.2f} dB |
"""
    for name, one in summary.get("text_encoders", {}).items():
        size = f"{one['effective_bits_layers']:.3f}, {one['bytes'] / 1e6:.2f} MB"
        rows += f"| {name}: stored bits per weight, size | {size} |\n"
    if summary.get("text_encoders"):
        rows += f"| error of the embeddings | {summary['embeddings_error_db']['all']:.2f} dB |\n"
    return f"""---
library_name: diffusers
pipeline_tag: text-to-image
tags: [vqdm, quantized, text-to-image]
{hub_name}---

# {base}, its {" and ".join(map(label, components))} at {summary["effective_bits_layers"]:.2f} bits per weight

Quantized with vqdm: additive vector quantization (arXiv 2409.00492) of {summary["layers_quantized"]} layers{others}.

| | |
|---|---|
| stored bits per weight, quantized layers | {summary["effective_bits_layers"]:.3f} |
{rows}| PSNR of {images["count"]} images at equal seeds | {quality} |

```python
import vqdm  # before from_pretrained: teaches diffusers the format
from diffusers import DiffusionPipeline

pipeline = DiffusionPipeline.from_pretrained("path/to/this/folder")
```
"""
