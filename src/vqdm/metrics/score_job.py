"""Settings of scoring."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from vqdm.errors import UserError
from vqdm.metrics.catalogue import NAMES, refusal

FID_MODES = ("clean", "legacy", "pytorch", "vqdm")


@dataclass(frozen=True)
class ScoreConfig:
    """Everything that `score_images` needs; the flags of `metrics.py` by the same names.

    Attributes:
        output_dir: None is `metrics` inside IMAGES.
        metrics: names of the catalogue, each an error if it is unavailable; None is all that need no download.
        force: score pairs although more than the denoiser differs between them.
        report_images: worst images in the report, and as many random ones for the vote; 0 writes no report.
        report_size: pixels of the longer side of images inside the report.

    Raises:
        UserError: an unknown metric, or settings that contradict each other.
    """

    images: str
    output_dir: str | None = None
    reference: str | None = None
    fid_reference: str | None = None
    metrics: tuple[str, ...] | None = None
    fid_mode: str | None = None
    fid_features: str = "inception"
    save_stats: str | None = None
    save_features: bool = False
    clip_model: str = "ViT-H-14"
    clip_pretrained: str = "laion2b_s32b_b79k"
    pickscore_model: str = "yuvalkirstain/PickScore_v1"
    image_reward_model: str = "THUDM/ImageReward"
    lpips_net: str = "alex"
    lpips_weights: str | None = None
    bs: int = 16
    threads: int = 4
    seed: int = 0
    device: str = "auto"
    local_files_only: bool = False
    force: bool = False
    report_images: int = 64
    report_size: int = 512
    report_to: str = "none"
    dry_run: bool = False

    def __post_init__(self) -> None:
        unknown = [name for name in self.metrics or () if name not in NAMES]
        if unknown:
            raise UserError(refusal(unknown[0]))
        if self.save_features and not self.save_stats:
            raise UserError("--save_features is about the file of --save_stats, which is not given")
        if self.fid_mode and self.fid_features != "inception" and not Path(self.fid_features).is_file():
            raise UserError(
                f"--fid_mode {self.fid_mode} is for Inception; --fid_features {self.fid_features} has its own"
            )

    @property
    def folder(self) -> Path:
        return Path(self.output_dir) if self.output_dir else Path(self.images) / "metrics"
