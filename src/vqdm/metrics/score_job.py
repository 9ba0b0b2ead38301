"""What the steps of scoring share: settings, the plan that follows from them, and what was found so far."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from vqdm.errors import UserError
from vqdm.metrics.catalogue import NAMES
from vqdm.metrics.frechet import Statistics
from vqdm.metrics.image_sets import Key, PictureSet, shared_keys
from vqdm.metrics.measuring import Work
from vqdm.metrics.networks import Network
from vqdm.metrics.results import Score, Table

FID_MODES = ("clean", "legacy", "pytorch", "vqdm")


@dataclass(frozen=True)
class ScoreConfig:
    """Everything that `score_images` needs; the flags of `metrics.py` by the same names.

    Attributes:
        output_dir: None is `metrics` inside IMAGES.
        metrics: names of the catalogue, each an error where it cannot be had; None is all that can be had without a
            download.
        force: score pairs although more than the UNet differs between them.
        report_images: worst pictures in the report, and as many drawn by lot for the vote; 0 writes no report.
        report_size: pixels of the longer side of pictures inside the report.

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
    cmmd_model: str = "openai/clip-vit-large-patch14-336"
    fd_dinov2_model: str = "facebook/dinov2-large"
    pickscore_model: str = "yuvalkirstain/PickScore_v1"
    hpsv2_weights: str | None = None
    image_reward_model: str = "THUDM/ImageReward"
    lpips_net: str = "alex"
    lpips_weights: str | None = None
    clip_i_model: str = "openai/clip-vit-large-patch14"
    dino_i_model: str = "facebook/dinov2-base"
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
            raise UserError(f"--metrics: {unknown[0]} is not a metric; allowed are {', '.join(NAMES)}")
        if self.save_features and not self.save_stats:
            raise UserError("--save_features is about the file of --save_stats, which is not given")
        if self.fid_mode and self.fid_features != "inception" and not Path(self.fid_features).is_file():
            raise UserError(
                f"--fid_mode {self.fid_mode} is for Inception; --fid_features {self.fid_features} has its own"
            )

    @property
    def folder(self) -> Path:
        return Path(self.output_dir) if self.output_dir else Path(self.images) / "metrics"


@dataclass(frozen=True)
class Plan:
    """What can be scored.

    Attributes:
        networks: metric → its network; None for metrics of pixels.
        skipped: metric → why it cannot be had.
        statistics: network of `--save_stats` where it is asked for.
    """

    networks: dict[str, Network | None]
    skipped: dict[str, str]
    statistics: Network | None = None


@dataclass
class Job:
    """What the passes of one run share, and what they find."""

    config: ScoreConfig
    work: Work
    images: PictureSet
    reference: PictureSet | None
    target: PictureSet | Statistics | None
    plan: Plan
    mismatches: list[str]
    table: Table = field(default_factory=dict)
    scores: dict[str, Score] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)

    @property
    def pairs(self) -> list[Key]:
        return shared_keys(self.images, self.reference)
