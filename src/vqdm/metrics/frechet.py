"""Fréchet distance between two sets of features (Heusel et al., arXiv 1706.08500, equation 6), streaming and exact.

Letters: N pictures, d features, mu mean [d], S covariance [d, d] with N - 1 in its denominator.
"""

from __future__ import annotations

import io
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import vqdm
from vqdm.documents import first_line
from vqdm.errors import UserError
from vqdm.metrics.npz import read_npz
from vqdm.storage.files import save_bytes

TAGS = ("preprocess", "weights_sha256", "dataset")


class Moments:
    """Sums from which mean and covariance follow; float64, so that they add up exactly enough in any order.

    Memory does not grow with the number of pictures; sums of several processes merge by `+`.
    """

    def __init__(self, width: int):
        self.count = 0
        self.total = torch.zeros(width, dtype=torch.float64)
        self.products = torch.zeros(width, width, dtype=torch.float64)

    def add(self, features: Tensor) -> None:
        """Count features [N, d] of any floating type in."""
        # GPUs of Apple and some of Intel know no float64.
        rows = (features if features.device.type in ("cpu", "cuda") else features.cpu()).double()
        self.count += len(rows)
        self.total += rows.sum(0).cpu()
        self.products += (rows.T @ rows).cpu()

    def __add__(self, other: Moments) -> Moments:
        both = Moments(len(self.total))
        both.count = self.count + other.count
        both.total = self.total + other.total
        both.products = self.products + other.products
        return both

    def mean(self) -> Tensor:
        """[d]"""
        return self.total / self.count

    def covariance(self) -> Tensor:
        """[d, d], with N - 1. Raises ZeroDivisionError for a single picture."""
        mean = self.mean()
        return (self.products - self.count * torch.outer(mean, mean)) / (self.count - 1)


@dataclass(frozen=True)
class Statistics:
    """A Gaussian fitted to features, and what they are features of.

    Attributes:
        mean, covariance: float64 [d] and [d, d].
        count: pictures; None where a file does not say.
        about: `preprocess` and `weights_sha256` of the network, `dataset`, `tool_version`; empty for an untagged file.
        features: float32 [N, d] where kept.
    """

    mean: Tensor
    covariance: Tensor
    count: int | None
    about: dict[str, str] = field(default_factory=dict)
    features: Tensor | None = None

    @property
    def width(self) -> int:
        return len(self.mean)


def frechet_distance(first: Statistics, second: Statistics) -> float:
    """|mu1 - mu2|² + tr S1 + tr S2 - 2 tr (S1^½ S2 S1^½)^½, at least 0.

    The root's trace is the sum of the square roots of the eigenvalues of a symmetric matrix, so that it is never
    complex, also for singular covariances.
    """
    values, vectors = torch.linalg.eigh(first.covariance)
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T  # [d, d] = S1^½
    spectrum = torch.linalg.eigvalsh(root @ second.covariance @ root)
    squared = (first.mean - second.mean).square().sum()
    distance = squared + first.covariance.trace() + second.covariance.trace() - 2 * spectrum.clamp(min=0).sqrt().sum()
    return max(distance.item(), 0.0)


# --------------------------------------------------------------------------------------------- files


def save_statistics(statistics: Statistics, path: Path) -> None:
    """An .npz with `mu` and `sigma`, as other tools read it, and beside them what those tools leave out."""
    arrays = {"mu": statistics.mean.numpy(), "sigma": statistics.covariance.numpy(), "n": np.int64(statistics.count)}
    arrays |= {name: np.str_(value) for name, value in statistics.about.items()}
    arrays["tool_version"] = np.str_(f"vqdm {vqdm.__version__}")
    if statistics.features is not None:
        arrays["features"] = statistics.features.numpy()
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    save_bytes(buffer.getvalue(), path)


def load_statistics(path: Path, flag: str) -> Statistics:
    """Read an .npz of this or another tool.

    Raises:
        UserError: it cannot be read, holds no finite `mu` and `sigma` of fitting shapes, or declares arrays that are
            not in it.
    """
    try:
        arrays = read_npz(path, ("mu", "sigma", "n", "features", *TAGS))
        mean, covariance = (_numbers(arrays, name) for name in ("mu", "sigma"))
        features = _numbers(arrays, "features").float() if "features" in arrays else None
        if mean.ndim != 1 or not len(mean) or covariance.shape != (len(mean), len(mean)):
            raise ValueError(f"mu is {tuple(mean.shape)}, sigma {tuple(covariance.shape)}")
        if features is not None and (features.ndim != 2 or features.shape[1] != len(mean)):
            raise ValueError(f"mu is {tuple(mean.shape)}, features {tuple(features.shape)}")
        count = int(arrays["n"].astype(np.int64, casting="same_kind").item()) if "n" in arrays else None
    except (OSError, ValueError, TypeError, KeyError) as error:
        reason = first_line(error)
        raise UserError(f"{flag}: {path} is not a file of statistics (.npz with mu and sigma): {reason}") from None
    about = {name: str(arrays[name]) for name in TAGS if name in arrays}
    return Statistics(mean, covariance, count, about, features)


def _numbers(arrays: dict[str, np.ndarray], name: str) -> Tensor:
    """An array as float64. Raises ValueError where it holds no finite real numbers, KeyError where it is not there."""
    if arrays[name].dtype.kind not in "fiu":
        raise ValueError(f"{name} is of type {arrays[name].dtype}")
    values = torch.from_numpy(arrays[name].astype(np.float64)).clone()  # aligned as torch's own tensors are
    if not values.isfinite().all():
        raise ValueError(f"{name} holds values that are not finite")
    return values


def check_tags(statistics: Statistics, about: dict[str, str], path: Path, flag: str) -> bool:
    """Whether a file says that it was made as the features here are; False where it does not say how.

    Raises:
        UserError: it was made with another network or preprocessing.
    """
    for name in ("preprocess", "weights_sha256"):
        ours, theirs = about[name], statistics.about.get(name)
        if theirs is not None and theirs != ours:
            raise UserError(f"{flag}: {path} was made with {name} {theirs}, here it is {ours}")
    return {"preprocess", "weights_sha256"} <= statistics.about.keys()


def check_width(statistics: Statistics, width: int, path: Path, flag: str) -> None:
    """Raise UserError for a file of another network, as far as its number of features tells."""
    if statistics.width != width:
        raise UserError(f"{flag}: {path} has {statistics.width} features, the network here {width}")
