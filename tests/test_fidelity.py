import logging
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torchmetrics
import torchvision
from PIL import Image
from torch import nn
from torchmetrics.functional.image import peak_signal_noise_ratio
from torchmetrics.image import StructuralSimilarityIndexMeasure
from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity

from vqdm.errors import UserError
from vqdm.fidelity import (
    LPIPS_FILES,
    SMALLEST_FOR_LPIPS,
    decibels,
    load_lpips,
    lpips,
    pair_scores,
    psnr,
    squared_errors,
    ssim,
    to_tensor,
)


def test_pair_scores_equal_numpy():
    rng = np.random.default_rng(0)
    first, second = rng.random((3, 3, 4, 5), dtype=np.float32), rng.random((3, 3, 4, 5), dtype=np.float32)
    scores = pair_scores(torch.from_numpy(first), torch.from_numpy(second))
    squared = ((first - second) ** 2).reshape(3, -1).mean(1)
    assert scores["mse"] == pytest.approx(squared.mean(), rel=1e-5)
    assert scores["mae"] == pytest.approx(np.abs(first - second).mean(), rel=1e-5)
    assert scores["psnr_db"] == pytest.approx(np.mean([10 * math.log10(1 / one) for one in squared]), rel=1e-5)


def test_equal_images_have_a_finite_psnr():
    images = torch.rand(2, 3, 4, 4)
    assert pair_scores(images, images)["psnr_db"] == pytest.approx(100.0)


def test_to_tensor_keeps_pixels():
    pixels = np.arange(2 * 3 * 3, dtype=np.uint8).reshape(2, 3, 3)
    tensor = to_tensor([Image.fromarray(pixels)])
    assert tensor.shape == (1, 3, 2, 3)
    assert torch.equal((tensor[0] * 255).round().byte().permute(1, 2, 0), torch.from_numpy(pixels))


def test_lpips_is_left_out_where_its_weights_are_not(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    assert lpips(torch.rand(1, 3, 32, 32), torch.rand(1, 3, 32, 32)) is None


def test_lpips_leaves_out_images_that_its_backbone_reduces_to_nothing(tmp_path, monkeypatch):
    """An evaluation on the smallest images must not fail on machines that have the weights."""
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / LPIPS_FILES["alex"]).touch()
    assert lpips(torch.rand(1, 3, 40, 30), torch.rand(1, 3, 40, 30)) is None


@pytest.mark.parametrize("net", ["alex", "vgg"])
def test_the_smallest_images_for_lpips_leave_each_layer_one_pixel(net, tmp_path):
    smallest = SMALLEST_FOR_LPIPS[net]
    save_backbone(net, tmp_path / "x.pth")
    distance = load_lpips(net, tmp_path / "x.pth", torch.device("cpu"))
    assert distance(torch.rand(1, 3, smallest, smallest), torch.rand(1, 3, smallest, smallest)).isfinite().all()
    with pytest.raises(RuntimeError, match="too small"):
        distance(torch.rand(1, 3, smallest, smallest - 1), torch.rand(1, 3, smallest, smallest - 1))


def test_decibels():
    assert decibels(1, 100) == pytest.approx(-20)
    assert decibels(0, 1) < -250


def sample_images(count: int, seed: int) -> torch.Tensor:
    """Smooth random images in [0, 1], float32 [N, 3, 32, 40]."""
    small = torch.rand(count, 3, 8, 10, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.interpolate(small, size=(32, 40), mode="bicubic").clamp(0, 1)


def test_psnr_of_known_noise_and_of_torchmetrics():
    plain = torch.full((2, 3, 8, 8), 0.5)
    noisy = plain + torch.tensor([0.1, 0.01])[:, None, None, None]
    assert psnr(squared_errors(plain, noisy)).tolist() == pytest.approx([20, 40], rel=1e-5)
    first, second = sample_images(3, 0), sample_images(3, 1)
    theirs = [
        peak_signal_noise_ratio(b[None], a[None], data_range=1.0).item() for a, b in zip(first, second, strict=True)
    ]
    assert psnr(squared_errors(first, second)).tolist() == pytest.approx(theirs, rel=1e-6)


def test_ssim_of_a_pair_is_that_of_torchmetrics_and_needs_no_batch():
    first, second = sample_images(3, 0), sample_images(3, 1)
    metric = StructuralSimilarityIndexMeasure(data_range=1.0)
    metric.update(second, first)
    assert ssim(first, second).mean().item() == pytest.approx(metric.compute().item(), rel=1e-6)
    assert ssim(first, second)[1].item() == pytest.approx(ssim(first[1:2], second[1:2]).item(), rel=1e-5)
    assert ssim(first, first).tolist() == pytest.approx([1.0] * 3)


def save_backbone(net: str, path: Path) -> nn.Module:
    """Write a file of torchvision's with random layers; its classifier, which LPIPS leaves out, is small on disk."""
    torch.manual_seed(0)
    build = {"alex": torchvision.models.alexnet, "vgg": torchvision.models.vgg16}[net]
    with torch.device("meta"):
        empty = build(weights=None)
    layers = {
        "alex": lambda: torchvision.models.AlexNet(num_classes=1).features,
        "vgg": lambda: torchvision.models.vgg.make_layers(torchvision.models.vgg.cfgs["D"]),
    }[net]()
    state = {name: torch.zeros(1).expand(value.shape) for name, value in empty.state_dict().items()}
    torch.save(state | {f"features.{name}": value for name, value in layers.state_dict().items()}, path)
    return layers


@pytest.mark.parametrize("net", ["alex", "vgg"])
def test_lpips_is_that_of_torchmetrics_with_the_backbone_of_the_file(net, tmp_path, monkeypatch):
    layers = save_backbone(net, tmp_path / "backbone.pth")
    first, second = sample_images(2, 0).repeat(1, 1, 2, 2), sample_images(2, 1).repeat(1, 1, 2, 2)
    folder = torch.hub.get_dir()
    ours = load_lpips(net, tmp_path / "backbone.pth", torch.device("cpu"))
    assert torch.hub.get_dir() == folder
    monkeypatch.setattr(torchmetrics.functional.image.lpips, "_get_tv_model_features", lambda *_, **__: layers)
    metric = LearnedPerceptualImagePatchSimilarity(net_type=net, normalize=True, reduction="none")
    expected = metric(second, first).tolist()
    assert ours(first, second).tolist() == pytest.approx(expected, rel=1e-5) and min(expected) > 1e-4
    assert ours(first[:1], second[:1]).tolist() == pytest.approx(expected[:1], rel=1e-4)


class Payload:
    """Creates a file where it is unpickled."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self):
        return Path.touch, (self.mark,)


def test_a_backbone_is_not_unpickled(tmp_path):
    torch.save({"features.0.weight": Payload(tmp_path / "mark")}, tmp_path / "x.pth")
    with pytest.raises(UserError, match=r"x\.pth does not hold LPIPS's backbone alex"):
        load_lpips("alex", tmp_path / "x.pth", torch.device("cpu"))
    assert not (tmp_path / "mark").exists()


def test_lpips_refuses_another_backbone(tmp_path):
    torch.save({"features.0.weight": torch.zeros(1)}, tmp_path / "x.pth")
    with pytest.raises(UserError, match=r"x\.pth does not hold LPIPS's backbone alex"):
        load_lpips("alex", tmp_path / "x.pth", torch.device("cpu"))


def test_lpips_of_the_cached_backbone_is_the_mean_over_pairs(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    (tmp_path / "checkpoints").mkdir()
    path = tmp_path / "checkpoints" / LPIPS_FILES["alex"]
    save_backbone("alex", path)
    first, second = sample_images(9, 0).repeat(1, 1, 2, 2), sample_images(9, 1).repeat(1, 1, 2, 2)
    one_by_one = load_lpips("alex", path, torch.device("cpu"))(first, second)
    assert lpips(first, second) == pytest.approx(one_by_one.mean().item(), rel=1e-5)


def test_a_damaged_cached_backbone_is_a_warning(tmp_path, monkeypatch, caplog):
    """It must not end a quantization at its last step."""
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / LPIPS_FILES["alex"]).write_bytes(b"PK cut off")
    with caplog.at_level(logging.WARNING, "vqdm"):
        assert lpips(torch.rand(1, 3, 32, 32), torch.rand(1, 3, 32, 32)) is None
    assert "LPIPS is left out" in caplog.text and LPIPS_FILES["alex"] in caplog.text


def test_without_torchmetrics_lpips_is_left_out_with_a_warning(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / LPIPS_FILES["alex"]).touch()
    monkeypatch.setitem(sys.modules, "torchmetrics.image.lpip", None)
    with caplog.at_level(logging.WARNING, "vqdm"):
        assert pair_scores(torch.rand(1, 3, 32, 32), torch.rand(1, 3, 32, 32))["lpips"] is None
    assert "LPIPS is left out" in caplog.text
