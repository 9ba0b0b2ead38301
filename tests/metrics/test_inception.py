"""The Inception network and the four resizes against torch-fidelity, pytorch's own resize, and plain loops."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from vqdm.errors import UserError
from vqdm.metrics.inception import PREPARE, SIDE, empty_inception, load_inception

fidelity = pytest.importorskip("torch_fidelity", reason="torch-fidelity (requirements-dev.txt) is not installed")


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A file of random weights whose features differ from picture to picture."""
    torch.manual_seed(0)
    net = empty_inception()
    for module in net.modules():
        if isinstance(module, torch.nn.Conv2d):
            torch.nn.init.kaiming_normal_(module.weight)
    path = tmp_path_factory.mktemp("inception") / "weights.pth"
    torch.save(net.state_dict(), path)
    return path


def picture(width: int, height: int) -> Image.Image:
    rng = np.random.default_rng(width)
    small = Image.fromarray(rng.integers(0, 256, (9, 9, 3), dtype=np.uint8))
    return small.resize((width, height), Image.Resampling.BICUBIC)


def test_features_and_legacy_resize_are_those_of_torch_fidelity(weights):
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    theirs = FeatureExtractorInceptionV3("inception-v3-compat", ["2048"], feature_extractor_weights_path=str(weights))
    ours = load_inception(weights, torch.device("cpu"))
    images = [picture(64, 64), picture(400, 330)]
    for image in images:
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None]
        with torch.no_grad():
            expected = theirs(pixels)[0]
            features = ours(PREPARE["legacy"](image)[None])
        assert features.shape == (1, 2048) and expected.std() > 0.1
        assert torch.allclose(features, expected, rtol=1e-4, atol=1e-4)


def test_pytorch_mode_is_the_plain_interpolation():
    image = picture(512, 512)
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None] / 255
    expected = 2 * F.interpolate(pixels, size=(SIDE, SIDE), mode="bilinear", align_corners=False)[0] - 1
    assert torch.equal(PREPARE["pytorch"](image), expected)


def test_clean_mode_keeps_fractions_and_stays_in_range():
    image = picture(512, 384)
    out = PREPARE["clean"](image)
    levels = out * 128 + 128
    rounded = torch.from_numpy(np.array(image.resize((SIDE, SIDE), Image.Resampling.BICUBIC))).permute(2, 0, 1)
    assert out.shape == (3, SIDE, SIDE) and out.dtype == torch.float32
    assert (levels - rounded).abs().max() < 2 and (levels != levels.round()).float().mean() > 0.9
    assert levels.min() >= 0 and levels.max() <= 255


def test_vqdm_mode_takes_the_middle():
    image = Image.new("RGB", (1024, 512), "black")
    image.paste((255, 255, 255), (256, 0, 768, 512))
    assert (PREPARE["vqdm"](image)[:, :, 8:-8] > 0.99).all()


@pytest.mark.parametrize("size", [(640, 427), (427, 640), (640, 480), (300, 257), (64, 90)])
def test_vqdm_mode_rounds_sizes_as_the_paper_s_code(size):
    """It is torchvision's Resize and CenterCrop; most pictures of COCO are not square."""
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))
    width, height = (256 if side == min(size) else int(256 * side / min(size)) for side in size)
    left, top = (round((side - 256) / 2) for side in (width, height))
    resized = image.resize((width, height), Image.Resampling.LANCZOS)
    expected = PREPARE["pytorch"](resized.crop((left, top, left + 256, top + 256)))
    assert torch.equal(PREPARE["vqdm"](image), expected)


def test_modes_differ():
    image = picture(640, 640)
    outs = [prepare(image) for prepare in PREPARE.values()]
    assert all((a - b).abs().max() > 1e-3 for k, a in enumerate(outs) for b in outs[:k])


def test_a_file_of_something_else_is_refused(tmp_path):
    torch.save({"a": torch.zeros(1)}, tmp_path / "x.pth")
    with pytest.raises(UserError, match="does not hold Inception's weights"):
        load_inception(tmp_path / "x.pth", torch.device("cpu"))
