"""Distances between two sets of features: the Fréchet distance (FID) and the kernel distance (KID).

torch-fidelity computes both. Own code fits the Gaussians, since no library sums the features of several processes
without keeping them, takes features of any encoder, and reads and writes files of statistics.

Letters: N images, d features, mu mean [d], S covariance [d, d] with N - 1 in its denominator.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import vqdm
from vqdm.documents import first_line
from vqdm.errors import RunError, UserError
from vqdm.metrics.encoders import Encoder
from vqdm.metrics.image_sets import ImageLoader, ImageSet, Key
from vqdm.storage.files import save_bytes

TAGS = ("preprocess", "weights_sha256", "dataset")
KID_SUBSETS, KID_SUBSET_SIZE = 100, 1000
MOST_BYTES = 2**32  # of the arrays of a file of statistics together, once they are unpacked


class FeatureMoments:
    """Sums from which mean and covariance follow, in float64; memory does not grow with the number of images.

    Sums of several processes merge by `+`.
    """

    def __init__(self, width: int):
        self.count = 0
        self.total = torch.zeros(width, dtype=torch.float64)
        self.products = torch.zeros(width, width, dtype=torch.float64)

    def add(self, features: Tensor) -> None:
        """Add features [N, d] of any floating dtype."""
        # GPUs of Apple and some of Intel know no float64.
        rows = (features if features.device.type in ("cpu", "cuda") else features.cpu()).double()
        self.count += len(rows)
        self.total += rows.sum(0).cpu()
        self.products += (rows.T @ rows).cpu()

    def __add__(self, other: FeatureMoments) -> FeatureMoments:
        both = FeatureMoments(len(self.total))
        both.count = self.count + other.count
        both.total = self.total + other.total
        both.products = self.products + other.products
        return both

    def mean(self) -> Tensor:
        """Return the mean, float64 [d]."""
        return self.total / self.count

    def covariance(self) -> Tensor:
        """Return the covariance, float64 [d, d], with N - 1. Raises ZeroDivisionError for a single image."""
        mean = self.mean()
        return (self.products - self.count * torch.outer(mean, mean)) / (self.count - 1)


@dataclass(frozen=True)
class FeatureStatistics:
    """A Gaussian fitted to features, and where they come from.

    Attributes:
        mean, covariance: float64 [d] and [d, d].
        count: images; None for a file without that number.
        about: `preprocess` and `weights_sha256` of the network, `dataset`, `tool_version`; empty for an untagged file.
        features: float32 [N, d] if kept.
    """

    mean: Tensor
    covariance: Tensor
    count: int | None
    about: dict[str, str] = field(default_factory=dict)
    features: Tensor | None = None

    @property
    def width(self) -> int:
        return len(self.mean)


def feature_statistics(
    loader: ImageLoader, images: ImageSet, keys: Sequence[Key], encoder: Encoder, about: dict, keep: bool
) -> FeatureStatistics:
    """Compute mean and covariance of the features of images, the same on every rank.

    Args:
        about: tags of the statistics.
        keep: keep the features too; otherwise memory does not grow with their number.

    Raises:
        RunError: fewer than two images, or features that are not finite.
    """
    if len(keys) < 2:
        raise RunError(f"{images.path} has {len(keys)} images; a distance of sets needs 2 at least")
    moments, kept = None, []
    batches = loader.batches(keys, lambda key: encoder.prepare(images.load(images.entries[key])), images.path.name)
    for _, pixels in batches:
        features = encoder.images(torch.stack(pixels).to(loader.ranks.device))  # [n, d]
        moments = moments or FeatureMoments(features.shape[1])
        moments.add(features)
        if keep:
            kept.append(features.float().cpu())
    whole, *others = [part for part in loader.ranks.all_gather(moments) if part is not None]
    for part in others:
        whole = whole + part
    if not whole.products.isfinite().all():
        raise RunError(f"the features of {images.path} are not finite")
    features = None
    if keep:
        features = torch.empty(len(keys), len(whole.total))
        parts = loader.ranks.all_gather(torch.cat(kept) if kept else None)
        for rank, part in enumerate(parts):  # rank r of R had images r, r + R, r + 2R, …
            if part is not None:
                features[rank :: len(parts)] = part
    return FeatureStatistics(whole.mean(), whole.covariance(), whole.count, about, features)


# --------------------------------------------------------------------------------------------- distances


def frechet_distance(first: FeatureStatistics, second: FeatureStatistics) -> float:
    """Compute |mu1 - mu2|² + tr S1 + tr S2 - 2 tr (S1 S2)^½, at least 0 (Heusel et al., arXiv 1706.08500, eq. 6)."""
    from torch_fidelity.metric_fid import KEY_METRIC_FID, fid_statistics_to_metric

    both = ({"mu": one.mean.numpy(), "sigma": one.covariance.numpy()} for one in (first, second))
    return max(fid_statistics_to_metric(*both, verbose=False)[KEY_METRIC_FID], 0.0)


def kid(first: Tensor, second: Tensor, seed: int) -> tuple[float, float]:
    """Compute the kernel Inception distance × 1000 (Bińkowski et al., arXiv 1801.01401) of features [N, d], [M, d].

    Returns:
        Mean and standard deviation of the unbiased MMD² over 100 pairs of subsets, of 1000 images each or of all of
        the smaller set, kernel (x·y/d + 1)³.
    """
    from torch_fidelity.metric_kid import KEY_METRIC_KID_MEAN, KEY_METRIC_KID_STD, kid_features_to_metric

    size = min(KID_SUBSET_SIZE, len(first), len(second))
    options = {"kid_subsets": KID_SUBSETS, "kid_subset_size": size, "rng_seed": seed, "verbose": False}
    found = kid_features_to_metric(first.double(), second.double(), **options)
    return 1000 * found[KEY_METRIC_KID_MEAN], 1000 * found[KEY_METRIC_KID_STD]


# --------------------------------------------------------------------------------------------- files


def save_statistics(statistics: FeatureStatistics, path: Path) -> None:
    """Write an .npz with `mu` and `sigma`, as other tools read it, and with `n`, tags and features."""
    arrays = {"mu": statistics.mean.numpy(), "sigma": statistics.covariance.numpy(), "n": np.int64(statistics.count)}
    arrays |= {name: np.str_(value) for name, value in statistics.about.items()}
    arrays["tool_version"] = np.str_(f"vqdm {vqdm.__version__}")
    if statistics.features is not None:
        arrays["features"] = statistics.features.numpy()
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    save_bytes(buffer.getvalue(), path)


def load_statistics(path: Path, flag: str) -> FeatureStatistics:
    """Read an .npz of this or another tool.

    Raises:
        UserError: it cannot be read, or holds no finite `mu` and `sigma` of fitting shapes.
    """
    try:
        arrays = _read_npz(path, ("mu", "sigma", "n", "features", *TAGS))
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
    return FeatureStatistics(mean, covariance, count, about, features)


def _read_npz(path: Path, names: Sequence[str]) -> dict[str, np.ndarray]:
    """Read the arrays of these names. Raises OSError, or ValueError for a damaged, pickled or too large file."""
    try:
        with np.load(path, allow_pickle=False) as file:
            if sum(member.file_size for member in file.zip.infolist()) > MOST_BYTES:
                raise ValueError(f"its arrays take more than {MOST_BYTES} bytes")
            return {name: file[name] for name in names if name in file.files}
    except OSError:
        raise
    except Exception as error:  # archives, decompressors and the parser of headers know a dozen kinds
        raise ValueError(first_line(error)) from None


def _numbers(arrays: dict[str, np.ndarray], name: str) -> Tensor:
    """Return an array as float64. Raises KeyError if it is missing, ValueError unless it holds finite real numbers."""
    if arrays[name].dtype.kind not in "fiu":
        raise ValueError(f"{name} is of type {arrays[name].dtype}")
    values = torch.from_numpy(arrays[name].astype(np.float64)).clone()  # aligned as torch's own tensors are
    if not values.isfinite().all():
        raise ValueError(f"{name} holds values that are not finite")
    return values


def check_tags(statistics: FeatureStatistics, about: dict[str, str], path: Path, flag: str) -> bool:
    """Return whether the tags of a file are those of the features here; False if it has none.

    Raises:
        UserError: it was made with another network or preprocessing.
    """
    for name in ("preprocess", "weights_sha256"):
        ours, theirs = about[name], statistics.about.get(name)
        if theirs is not None and theirs != ours:
            raise UserError(f"{flag}: {path} was made with {name} {theirs}, here it is {ours}")
    return {"preprocess", "weights_sha256"} <= statistics.about.keys()


def check_width(statistics: FeatureStatistics, width: int, path: Path, flag: str) -> None:
    """Raise UserError for a file of a network with another number of features."""
    if statistics.width != width:
        raise UserError(f"{flag}: {path} has {statistics.width} features, the network here {width}")
