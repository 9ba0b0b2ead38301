"""How a layer's code is searched for; what it looks like is `code.CodeSpec`."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace

from vqdm.additive.code import CodeSpec

ENCODERS = ("ldl", "beam")


@dataclass(frozen=True)
class SolverConfig:
    """Settings of `solve_layer`. Raises ValueError, naming the field, on impossible values.

    Attributes:
        spec: the format of the result.
        encoder: "ldl", error feedback with an in-group beam; "beam", VQDM's beam search over whole rows.
        beam_size: hypotheses kept.
        init_max_iter: Lloyd iterations of the residual k-means.
        init_max_points_per_centroid: k-means sees at most this many points a centroid.
        lr: Adam's rate on codebooks and scales ("beam" only; "ldl" refits them in closed form).
        steps_per_epoch: Adam steps between two code searches ("beam" only).
        max_epochs: rounds of refit and code search at most.
        relative_mse_tolerance: stop when a round's relative gain falls below this.
        damping: added to the Hessian's diagonal where it is factored, times the diagonal's mean.
        shared_damping: the same with shared codebooks, where rows have scales that feedback does not outgrow.
    """

    spec: CodeSpec = field(default_factory=CodeSpec)
    encoder: str = "ldl"
    beam_size: int = 8
    init_max_iter: int = 25
    init_max_points_per_centroid: int = 100
    lr: float = 1e-4
    steps_per_epoch: int = 100
    max_epochs: int = 20
    relative_mse_tolerance: float = 0.01
    damping: float = 0.01
    shared_damping: float = 0.003

    def __post_init__(self) -> None:
        if self.spec.row_bits:
            raise ValueError(f"row_bits is {self.spec.row_bits}; codes of variable rate are loaded but no longer made")
        if self.encoder not in ENCODERS:
            raise ValueError(f"encoder is {self.encoder!r}; allowed are {', '.join(ENCODERS)}")
        for name in ("beam_size", "init_max_iter", "init_max_points_per_centroid", "max_epochs"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; allowed are whole numbers from 1")
        if self.steps_per_epoch < 0:
            raise ValueError(f"steps_per_epoch is {self.steps_per_epoch}; allowed are whole numbers from 0")
        for name in ("lr", "relative_mse_tolerance", "damping", "shared_damping"):
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
