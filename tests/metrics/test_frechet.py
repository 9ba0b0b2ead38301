"""Moments and distances against numpy, the closed form of known Gaussians, scipy's matrix root and the libraries."""

import numpy as np
import pytest
import scipy.linalg
import torch
from processors import is_odd
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
from torch_fidelity.metric_kid import kid_features_to_metric
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.kid import KernelInceptionDistance

from vqdm.errors import UserError
from vqdm.metrics import frechet
from vqdm.metrics.frechet import (
    FeatureMoments,
    FeatureStatistics,
    check_tags,
    check_width,
    frechet_distance,
    kid,
    load_statistics,
    save_statistics,
)

TAGS = {"preprocess": "clean", "weights_sha256": "ab"}


def features(count: int, width: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(width, width, generator=generator)
    return torch.randn(count, width, generator=generator) @ mixing + seed


def fitted(rows: torch.Tensor) -> FeatureStatistics:
    moments = FeatureMoments(rows.shape[1])
    for part in rows.split(7):
        moments.add(part)
    return FeatureStatistics(moments.mean(), moments.covariance(), moments.count)


def by_matrix_root(first: FeatureStatistics, second: FeatureStatistics) -> float:
    """The published formula, literally."""
    root = scipy.linalg.sqrtm(first.covariance.numpy() @ second.covariance.numpy()).real
    traces = first.covariance.trace() + second.covariance.trace() - 2 * np.trace(root)
    return float((first.mean - second.mean).square().sum() + traces)


def test_streaming_moments_are_those_of_two_passes():
    rows = features(100, 6, 3)
    fit = fitted(rows)
    assert np.allclose(fit.mean, rows.double().numpy().mean(0), rtol=1e-13)
    assert np.allclose(fit.covariance, np.cov(rows.double().numpy(), rowvar=False), rtol=1e-11)


def test_merged_moments_are_those_of_all():
    rows = features(50, 5, 1)
    parts = [FeatureMoments(5), FeatureMoments(5)]
    for part, own in zip(parts, (rows[:20], rows[20:]), strict=True):
        part.add(own)
    both, whole = parts[0] + parts[1], fitted(rows)
    assert both.count == 50
    assert torch.allclose(both.covariance(), whole.covariance, rtol=1e-12)


def test_distance_of_known_gaussians():
    """With commuting covariances the distance is |mu1 - mu2|² + Σ (√a - √b)²."""
    first, second = torch.tensor([1.0, 4.0, 9.0]).double(), torch.tensor([4.0, 4.0, 1.0]).double()
    mean = torch.tensor([1.0, -2.0, 0.5]).double()
    turn = torch.linalg.qr(features(3, 3, 0).double())[0]
    a = FeatureStatistics(torch.zeros(3).double(), turn @ first.diag() @ turn.T, None)
    b = FeatureStatistics(mean, turn @ second.diag() @ turn.T, None)
    expected = mean.square().sum() + (first.sqrt() - second.sqrt()).square().sum()
    assert frechet_distance(a, b) == pytest.approx(expected.item(), abs=1e-10)


@pytest.mark.parametrize("count", [200, 6])
def test_distance_is_the_published_formula(count):
    """Also where there are fewer images than features, and the covariance is singular."""
    a, b = fitted(features(count, 8, 0)), fitted(features(150, 8, 1))
    assert frechet_distance(a, b) == pytest.approx(by_matrix_root(a, b), rel=1e-6)
    assert frechet_distance(a, b) == pytest.approx(frechet_distance(b, a), rel=1e-6)


def test_distance_to_itself_is_zero():
    a = fitted(features(60, 8, 0))
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-6)


class Passed(torch.nn.Module):
    """Features as they come."""

    num_features = 8

    def forward(self, rows):
        return rows


def test_distance_is_that_of_torchmetrics():
    first, second = features(90, 8, 0), features(70, 8, 1)
    metric = FrechetInceptionDistance(feature=Passed()).set_dtype(torch.float64)
    metric.update(first.double(), real=True)
    metric.update(second.double(), real=False)
    assert frechet_distance(fitted(first), fitted(second)) == pytest.approx(metric.compute().item(), rel=1e-6)


def test_files_bring_back_what_was_saved(tmp_path):
    rows = features(30, 4, 0)
    fit = fitted(rows)
    saved = FeatureStatistics(fit.mean, fit.covariance, fit.count, TAGS | {"dataset": "d"}, rows)
    save_statistics(saved, tmp_path / "x.npz")
    read = load_statistics(tmp_path / "x.npz", "--fid_reference")
    assert torch.equal(read.mean, fit.mean) and torch.equal(read.covariance, fit.covariance)
    assert not any(map(is_odd, (read.mean, read.covariance)))  # what numpy allocates often is
    assert (read.count, read.about) == (30, saved.about) and torch.equal(read.features, rows)
    with np.load(tmp_path / "x.npz") as file:
        assert {"mu", "sigma", "n", "preprocess", "weights_sha256", "dataset", "tool_version"} <= set(file.files)


def test_injected_statistics_give_what_torchmetrics_gives(tmp_path):
    reference, ours = features(90, 8, 0), features(70, 8, 1)
    np.savez(tmp_path / "x.npz", mu=reference.double().mean(0), sigma=np.cov(reference.double().numpy(), rowvar=False))
    read = load_statistics(tmp_path / "x.npz", "--fid_reference")
    metric = FrechetInceptionDistance(feature=Passed()).set_dtype(torch.float64)
    metric.real_features_sum = read.mean * 90
    metric.real_features_cov_sum = read.covariance * 89 + 90 * torch.outer(read.mean, read.mean)
    metric.real_features_num_samples = torch.tensor(90)
    metric.update(ours.double(), real=False)
    assert frechet_distance(fitted(ours), read) == pytest.approx(metric.compute().item(), rel=1e-6)


@pytest.mark.parametrize(
    ("about", "message"),
    [
        ({"preprocess": "legacy", "weights_sha256": "ab"}, "preprocess legacy, here it is clean"),
        ({"preprocess": "clean", "weights_sha256": "cd"}, "weights_sha256 cd, here it is ab"),
    ],
)
def test_statistics_of_another_kind_are_refused(tmp_path, about, message):
    fit = fitted(features(30, 4, 0))
    with pytest.raises(UserError, match=message):
        check_tags(FeatureStatistics(fit.mean, fit.covariance, 30, about), TAGS, tmp_path, "--fid_reference")


def test_untagged_statistics_are_taken_but_known_as_such(tmp_path):
    fit = fitted(features(30, 4, 0))
    assert check_tags(fit, TAGS, tmp_path, "--fid_reference") is False
    assert check_tags(FeatureStatistics(fit.mean, fit.covariance, 30, TAGS), TAGS, tmp_path, "x") is True
    check_width(fit, 4, tmp_path, "--fid_reference")
    with pytest.raises(UserError, match="has 4 features, the network here 5"):
        check_width(fit, 5, tmp_path, "--fid_reference")


def test_files_of_something_else_are_refused(tmp_path):
    (tmp_path / "text.npz").write_text("no")
    np.savez(tmp_path / "other.npz", a=np.zeros(3))
    np.savez(tmp_path / "shape.npz", mu=np.zeros(3), sigma=np.zeros((2, 2)))
    np.savez(tmp_path / "pickle.npz", mu=np.array([{}], dtype=object), sigma=np.zeros((1, 1)))
    for path in sorted(tmp_path.iterdir()):
        with pytest.raises(UserError, match=r"--fid_reference: .* is not a file of statistics"):
            load_statistics(path, "--fid_reference")


def test_distance_is_that_of_torch_fidelity():
    first, second = features(90, 8, 0), features(70, 8, 1)
    both = (fid_features_to_statistics(rows.double()) for rows in (first, second))
    theirs = fid_statistics_to_metric(*both, verbose=False)["frechet_inception_distance"]
    assert frechet_distance(fitted(first), fitted(second)) == pytest.approx(theirs, rel=1e-9)


# --------------------------------------------------------------------------------------------- kernel distance


def normal(count: int, width: int, seed: int, shift: float = 0.0) -> torch.Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed)) + shift


def test_kid_is_a_thousand_times_that_of_torch_fidelity(monkeypatch):
    monkeypatch.setattr(frechet, "KID_SUBSET_SIZE", 50)
    x, y = normal(120, 6, 0), normal(110, 6, 1, 0.5)
    theirs = kid_features_to_metric(x.double(), y.double(), kid_subset_size=50, rng_seed=4, verbose=False)
    assert kid(x, y, seed=4) == pytest.approx([1000 * one for one in theirs.values()], rel=1e-12)


def test_kid_is_its_double_sum():
    x, y = normal(5, 3, 0).double(), normal(5, 3, 1).double()

    def k(a, b):
        return (float(a @ b) / 3 + 1) ** 3

    within = sum(k(a[i], a[j]) for a in (x, y) for i in range(5) for j in range(5) if i != j) / 20
    across = sum(k(a, b) for a in x for b in y) / 25
    assert kid(x, y, 0)[0] == pytest.approx(1000 * (within - 2 * across), rel=1e-9)


def test_kid_of_whole_sets_is_that_of_torchmetrics():
    """With subsets as large as the sets, no random choice is left."""
    x, y = normal(40, 6, 0), normal(40, 6, 1, 0.5)
    metric = KernelInceptionDistance(feature=Passed(), subsets=2, subset_size=40)
    metric.update(x, real=True)
    metric.update(y, real=False)
    value, deviation = kid(y, x, seed=0)
    assert value == pytest.approx(1000 * metric.compute()[0].item(), rel=1e-4)
    assert deviation == pytest.approx(0, abs=1e-9)


def test_kid_is_repeatable_and_of_equal_sets_near_zero(monkeypatch):
    monkeypatch.setattr(frechet, "KID_SUBSET_SIZE", 50)
    x, y = normal(200, 6, 0), normal(150, 6, 1)
    assert kid(x, y, 3) == kid(x, y, 3) != kid(x, y, 4)
    value, deviation = kid(x, y, 3)
    assert deviation > 0 and abs(value) < 3 * deviation < kid(x, y + 1, 3)[0]
