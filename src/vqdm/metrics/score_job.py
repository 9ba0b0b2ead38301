"""What the steps of scoring share: settings, the plan that follows from them, and what was found so far."""

from __future__ import annotations

from dataclasses import dataclass, field

from vqdm.metrics.config import MetricsConfig
from vqdm.metrics.frechet import Statistics
from vqdm.metrics.image_sets import Key, PictureSet, shared_keys
from vqdm.metrics.measuring import Work
from vqdm.metrics.networks import Network
from vqdm.metrics.results import Score, Table


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

    config: MetricsConfig
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
