"""Settings of the comparison of runs."""

from __future__ import annotations

from dataclasses import dataclass

from vqdm.errors import UserError


@dataclass(frozen=True)
class CompareConfig:
    """What `compare_runs` needs; the flags of `metrics.py compare` by the same names.

    Attributes:
        names: of the runs in the table; None takes them from the folders.
        plot: metrics of the figure; None takes the most important ones.
        force: compare values of different networks or numbers of images.

    Raises:
        UserError: not as many names as runs.
    """

    runs: tuple[str, ...]
    output_dir: str
    names: tuple[str, ...] | None = None
    plot: tuple[str, ...] | None = None
    force: bool = False

    def __post_init__(self) -> None:
        if self.names and len(self.names) != len(self.runs):
            raise UserError(f"--names gives {len(self.names)} names for {len(self.runs)} runs")
