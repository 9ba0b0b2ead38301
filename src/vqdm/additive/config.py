"""How a layer's code is searched for; what it looks like is `code.CodeSpec`."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace

from vqdm.additive.code import CodeSpec
from vqdm.config import check_fields, flag, flags_in

ENCODERS = ("ldl", "beam")


@dataclass(frozen=True)
class SolverConfig:
    """Settings of `solve_layer`. Raises ValueError, naming the field, on impossible values.

    Attributes:
        damping: added to the Hessian's diagonal where it is factored, times the diagonal's mean.
        shared_damping: the same with shared codebooks, where rows have scales that feedback does not outgrow.
    """

    spec: CodeSpec = flags_in(
        CodeSpec, "format of additive codes (2x8, 3x8 and 4x8 at group 8 are the paper's 2, 3 and 4 bits)"
    )
    encoder: str = flag(
        "ldl", "ldl: error feedback with a beam per group; beam: the paper's beam search over rows", choices=ENCODERS
    )
    beam_size: int = flag(8, "beam size of the code search", ge=1)
    init_max_iter: int = flag(25, "iterations of the residual k-means", ge=1)
    init_max_points_per_centroid: int = flag(100, "subsample of k-means, per centroid", ge=1)
    lr: float = flag(1e-4, "learning rate of Adam on codebooks and scales (beam only; ldl solves for them)", ge=0, lt=1)
    steps_per_epoch: int = flag(100, "Adam steps between two code searches (beam only)", ge=0)
    max_epochs: int = flag(20, "limit of rounds of refit and code search", ge=1)
    relative_mse_tolerance: float = flag(
        0.01, "stop a layer after a round with a smaller relative improvement", ge=0, lt=1
    )
    damping: float = 0.01
    shared_damping: float = 0.003

    def __post_init__(self) -> None:
        if self.spec.row_bits:
            raise ValueError(f"row_bits is {self.spec.row_bits}; codes of variable rate are loaded but no longer made")
        check_fields(self)
        for name in ("damping", "shared_damping"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; allowed are numbers from 0 up to 1")

    @property
    def feedback_damping(self) -> float:
        """The damping of this format."""
        return self.shared_damping if self.spec.shared_codebooks else self.damping

    def with_spec(self, spec: CodeSpec) -> SolverConfig:
        """The same search for another format."""
        return replace(self, spec=spec)

    def to_dict(self) -> dict:
        return asdict(self)
