"""Settings of metrics, and of the comparison of runs."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from vqdm.config import ProgramConfig, argument, check_flags, flag, output_dir
from vqdm.errors import UserError
from vqdm.fidelity import LPIPS_FILES
from vqdm.metrics.catalogue import NAMES, refusal

_images = partial(flag, group="images and metrics")
_networks = partial(flag, group="networks (each a folder or file, or a name on the hub)")
_report = partial(flag, group="report")


@dataclass(frozen=True, kw_only=True)
class MetricsConfig(ProgramConfig):
    """Settings of `metrics.job`.

    Raises:
        UserError: an unknown metric, a value that is not allowed, or settings that contradict each other.
    """

    images: str = argument("generated images: a folder, or a zip file")
    output_dir: str | None = output_dir(None, "folder of the result (default: metrics inside IMAGES)")
    reference: str | None = _images(
        None, "images of the full-precision model, of the same prompts and seeds", metavar="IMAGES_FP", common=True
    )
    fid_reference: str | None = _images(
        None,
        "real or reference images for fid, kid, ...: folder, zip or .npz",
        metavar="PATH",
        common=True,
    )
    metrics: tuple[str, ...] | None = _images(
        None,
        f"out of {', '.join(NAMES)} (default: all that need no download)",
        metavar="NAME",
        common=True,
    )
    force: bool = _images(False, "score pairs although their settings differ, and images with NaN", common=True)
    save_stats: str | None = _images(
        None, "write the statistics of IMAGES for a later --fid_reference", metavar="FILE.npz", common=True
    )
    save_features: bool = _images(False, "also write features to FILE.npz; kid needs them", needs=("save_stats",))
    bs: int = _images(16, "batch size", ge=1, common=True, aliases=("batch_size",))
    threads: int = _images(4, "threads that decode images", ge=1, le=256)
    clip_model: str = _networks("ViT-H-14", "open_clip architecture, or folder or hub name", common=True)
    clip_pretrained: str = _networks("laion2b_s32b_b79k", "open_clip tag, or file of weights", common=True)
    fid_features: str = _networks("inception", "inception, a file of its weights, or an encoder")
    fid_mode: str | None = _networks(
        None,
        "how images are resized to Inception's 299 pixels (default: clean)",
        choices=("clean", "legacy", "pytorch", "vqdm"),
    )
    pickscore_model: str = _networks("yuvalkirstain/PickScore_v1", "CLIP of pickscore")
    image_reward_model: str = _networks("THUDM/ImageReward", "folder with ImageReward.pt")
    lpips_net: str = _networks("alex", "backbone of LPIPS", choices=tuple(LPIPS_FILES))
    lpips_weights: str | None = _networks(None, "default: torchvision's, in torch.hub's folder", metavar="FILE.pth")
    report_images: int = _report(
        64, "worst images in report.html, and as many random ones; 0 = no report", ge=0, common=True
    )
    report_size: int = _report(
        512, "longer side of the images in report.html, in pixels", ge=16, needs=("report_images",)
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.metrics:  # several words, or commas; frozen for everyone else
            names = tuple(name for word in self.metrics for name in re.split(r"[,\s]+", word) if name)
            object.__setattr__(self, "metrics", names)
        unknown = [name for name in self.metrics or () if name not in NAMES]
        if unknown:
            raise UserError(refusal(unknown[0]))
        usual = MetricsConfig.clip_pretrained
        if self.clip_pretrained != usual and ("/" in self.clip_model or Path(self.clip_model).is_dir()):
            raise UserError(
                f"--clip_pretrained {self.clip_pretrained} is for an architecture of open_clip; --clip_model "
                f"{self.clip_model} has its own weights"
            )
        if self.fid_mode and self.fid_features != "inception" and not Path(self.fid_features).is_file():
            raise UserError(
                f"--fid_mode {self.fid_mode} is for Inception; --fid_features {self.fid_features} has its own"
            )

    @property
    def folder(self) -> Path:
        return Path(self.output_dir) if self.output_dir else Path(self.images) / "metrics"


@dataclass(frozen=True, kw_only=True)
class CompareConfig:
    """Settings of `metrics.py compare`. Raises UserError if there are not as many names as runs."""

    runs: tuple[str, ...] = argument("image folder with metrics, or a metrics.json", metavar="RUN")
    output_dir: str = output_dir("out/comparison")
    names: tuple[str, ...] | None = flag(
        None, "name of each RUN in the table (default: its folder's)", "table and figure", metavar="NAME", common=True
    )
    plot: tuple[str, ...] | None = flag(
        None, "metrics of the figure (default: the usual ones)", "table and figure", metavar="METRIC", common=True
    )
    force: bool = flag(False, "compare although networks or numbers of images differ", "table and figure", common=True)

    def __post_init__(self) -> None:
        check_flags(self)
        if self.names and len(self.names) != len(self.runs):
            raise UserError(f"--names gives {len(self.names)} names for {len(self.runs)} runs")
