import logging
import math
from functools import partial

import numpy as np
import pytest
import torch
import torchmetrics
from PIL import Image
from torchmetrics.functional.image import peak_signal_noise_ratio
from torchmetrics.image import StructuralSimilarityIndexMeasure
from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity

from vqdm.errors import UserError
from vqdm.metrics.fidelity import (
    LPIPS_BACKBONE,
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
from vqdm.metrics.image_sets import open_pictures
from vqdm.metrics.measuring import Work, pixel_table
from vqdm.parallel import Ranks


def test_pair_scores_equal_numpy():
    rng = np.random.default_rng(0)
    first, second = rng.random((3, 3, 4, 5), dtype=np.float32), rng.random((3, 3, 4, 5), dtype=np.float32)
    scores = pair_scores(torch.from_numpy(first), torch.from_numpy(second))
    squared = ((first - second) ** 2).reshape(3, -1).mean(1)
    assert scores["mse"] == pytest.approx(squared.mean(), rel=1e-5)
    assert scores["mae"] == pytest.approx(np.abs(first - second).mean(), rel=1e-5)
    assert scores["psnr_db"] == pytest.approx(np.mean([10 * math.log10(1 / one) for one in squared]), rel=1e-5)


def test_equal_pictures_have_a_finite_psnr():
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


def test_lpips_leaves_out_pictures_that_its_backbone_reduces_to_nothing(tmp_path, monkeypatch):
    """An evaluation on the smallest pictures must not fail on machines that have the weights."""
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / LPIPS_BACKBONE).touch()
    assert lpips(torch.rand(1, 3, 40, 30), torch.rand(1, 3, 40, 30)) is None
    for net, smallest in SMALLEST_FOR_LPIPS.items():
        model = torchmetrics.functional.image.lpips._LPIPS(net=net, pnet_rand=True).eval()
        assert model(torch.rand(1, 3, smallest, smallest), torch.rand(1, 3, smallest, smallest)).isfinite().all()
        with pytest.raises(RuntimeError, match="too small"):
            model(torch.rand(1, 3, smallest, smallest - 1), torch.rand(1, 3, smallest, smallest - 1))


def test_lpips_of_a_folder_leaves_out_its_small_pictures(tmp_path):
    for name, side in (("large", 40), ("small", 30)):
        Image.new("RGB", (side, side)).save(tmp_path / f"{name}.png")
    found = open_pictures(str(tmp_path), "IMAGES")
    lpips_of_all = partial(pixel_table, Work(Ranks(), 2, 1), found, found, list(found.pictures))
    table = lpips_of_all(lambda first, second: torch.full((1,), 0.5), SMALLEST_FOR_LPIPS["alex"])
    assert table == {("large", 0): {"lpips": 0.5}, ("small", 0): {}}


def test_decibels():
    assert decibels(1, 100) == pytest.approx(-20)
    assert decibels(0, 1) < -250


def pictures(count: int, seed: int) -> torch.Tensor:
    """Smooth random pictures in [0, 1], float32 [N, 3, 32, 40]."""
    small = torch.rand(count, 3, 8, 10, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.interpolate(small, size=(32, 40), mode="bicubic").clamp(0, 1)


def test_psnr_of_known_noise_and_of_torchmetrics():
    plain = torch.full((2, 3, 8, 8), 0.5)
    noisy = plain + torch.tensor([0.1, 0.01])[:, None, None, None]
    assert psnr(squared_errors(plain, noisy)).tolist() == pytest.approx([20, 40], rel=1e-5)
    first, second = pictures(3, 0), pictures(3, 1)
    theirs = [
        peak_signal_noise_ratio(b[None], a[None], data_range=1.0).item() for a, b in zip(first, second, strict=True)
    ]
    assert psnr(squared_errors(first, second)).tolist() == pytest.approx(theirs, rel=1e-6)


def test_ssim_of_a_pair_is_that_of_torchmetrics_and_needs_no_batch():
    first, second = pictures(3, 0), pictures(3, 1)
    metric = StructuralSimilarityIndexMeasure(data_range=1.0)
    metric.update(second, first)
    assert ssim(first, second).mean().item() == pytest.approx(metric.compute().item(), rel=1e-6)
    assert ssim(first, second)[1].item() == pytest.approx(ssim(first[1:2], second[1:2]).item(), rel=1e-5)
    assert ssim(first, first).tolist() == pytest.approx([1.0] * 3)


@pytest.mark.parametrize("net", ["alex", "vgg"])
def test_lpips_is_that_of_torchmetrics(net, tmp_path, monkeypatch):
    """With one random backbone for both."""
    import torchvision

    torch.manual_seed(0)
    layers = {
        "alex": lambda: torchvision.models.alexnet().features,
        "vgg": lambda: torchvision.models.vgg.make_layers(torchvision.models.vgg.cfgs["D"]),
    }
    backbone = torch.nn.ModuleDict({"features": layers[net]()})
    torch.save(backbone.state_dict(), tmp_path / "backbone.pth")
    first, second = pictures(2, 0).repeat(1, 1, 2, 2), pictures(2, 1).repeat(1, 1, 2, 2)
    monkeypatch.setattr(
        torchmetrics.functional.image.lpips, "_get_tv_model_features", lambda *args, **kwargs: backbone["features"]
    )
    metric = LearnedPerceptualImagePatchSimilarity(net_type=net, normalize=True)
    metric.update(second, first)
    monkeypatch.undo()
    ours = load_lpips(net, tmp_path / "backbone.pth", torch.device("cpu"))(first, second)
    assert ours.shape == (2,) and ours.mean().item() == pytest.approx(metric.compute().item(), rel=1e-5)
    assert ours.mean() > 1e-3


def test_lpips_refuses_another_backbone(tmp_path):
    torch.save({"features.0.weight": torch.zeros(1)}, tmp_path / "x.pth")
    with pytest.raises(UserError, match=r"x\.pth does not hold LPIPS's backbone alex"):
        load_lpips("alex", tmp_path / "x.pth", torch.device("cpu"))


def test_lpips_of_the_cached_backbone_is_the_mean_over_pairs(tmp_path, monkeypatch):
    import torchvision

    torch.manual_seed(0)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    (tmp_path / "checkpoints").mkdir()
    torch.save(torchvision.models.alexnet().state_dict(), tmp_path / "checkpoints" / LPIPS_BACKBONE)
    first, second = pictures(9, 0).repeat(1, 1, 2, 2), pictures(9, 1).repeat(1, 1, 2, 2)
    one_by_one = load_lpips("alex", tmp_path / "checkpoints" / LPIPS_BACKBONE, torch.device("cpu"))(first, second)
    assert lpips(first, second) == pytest.approx(one_by_one.mean().item(), rel=1e-5)


def test_a_damaged_cached_backbone_is_a_warning(tmp_path, monkeypatch, caplog):
    """It must not end a quantization at its last step."""
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / LPIPS_BACKBONE).write_bytes(b"PK cut off")
    with caplog.at_level(logging.WARNING, "vqdm"):
        assert lpips(torch.rand(1, 3, 32, 32), torch.rand(1, 3, 32, 32)) is None
    assert "LPIPS is left out" in caplog.text and LPIPS_BACKBONE in caplog.text
