"""Every metric by name: which way is better, what it needs, which network, and its exact definition."""

from __future__ import annotations

from dataclasses import dataclass

# What a metric can need beside the pictures → how a user gives it.
NEEDS = {
    "prompts": "prompts, which the manifest of generate.py holds",
    "reference": "--reference",
    "fid_reference": "--fid_reference",
}
# Network → the flag that names it.
FLAGS = {
    "features": "--fid_features",
    "dinov2": "--fd_dinov2_model",
    "cmmd": "--cmmd_model",
    "clip": "--clip_model",
    "pickscore": "--pickscore_model",
    "hpsv2": "--hpsv2_weights",
    "image_reward": "--image_reward_model",
    "lpips": "--lpips_weights",
    "clip_i": "--clip_i_model",
    "dino_i": "--dino_i_model",
}


@dataclass(frozen=True)
class Metric:
    """One row of the catalogue.

    Attributes:
        title: its name in tables, before the network's.
        higher: whether more is better.
        decimals: in tables.
        needs: names of `NEEDS`.
        network: name of `FLAGS`; None for metrics of pixels.
        definition: one sentence.
    """

    title: str
    higher: bool
    decimals: int
    needs: tuple[str, ...]
    network: str | None
    definition: str

    @property
    def better(self) -> str:
        return "higher" if self.higher else "lower"

    @property
    def arrow(self) -> str:
        return "↑" if self.higher else "↓"


_FRECHET = (
    "Fréchet distance of Gaussians fitted to the network's features, float64, N-1 in the covariances, "
    "by eigenvalues of a symmetric matrix"
)
METRICS = {
    "clip": Metric("CLIP score", True, 2, ("prompts",), "clip", "100 · cosine of prompt and picture, not clamped"),
    "pickscore": Metric(
        "PickScore", True, 3, ("prompts",), "pickscore", "exp(logit_scale) · cosine of prompt and picture"
    ),
    "pickscore_winrate": Metric(
        "PickScore wins",
        True,
        3,
        ("prompts", "reference"),
        "pickscore",
        "share of pairs in which the picture scores above the full-precision one; equal scores count half",
    ),
    "hpsv2": Metric("HPS", True, 2, ("prompts",), "hpsv2", "HPSv2.1: 100 · cosine of prompt and picture"),
    "image_reward": Metric(
        "Reward",
        True,
        3,
        ("prompts",),
        "image_reward",
        "ImageReward v1.0 of prompt and picture, in its authors' standard deviations; it reads 35 tokens of a prompt",
    ),
    "fid": Metric("FID", False, 3, ("fid_reference",), "features", _FRECHET),
    "fid_fp": Metric(
        "FID", False, 3, ("reference",), "features", f"{_FRECHET}; against the full-precision model's pictures"
    ),
    "kid": Metric(
        "KID",
        False,
        3,
        ("fid_reference",),
        "features",
        "1000 · unbiased MMD², kernel (x·y/d + 1)³, mean over 100 pairs of subsets of 1000 or of all",
    ),
    "mind": Metric(
        "MIND",
        False,
        3,
        ("fid_reference",),
        "features",
        "3d · mean squared gap of sorted projections on 1000 random directions",
    ),
    "fd_dinov2": Metric("FD", False, 3, ("fid_reference",), "dinov2", f"{_FRECHET}; DINOv2, pictures squeezed square"),
    "cmmd": Metric(
        "CMMD",
        False,
        3,
        ("fid_reference",),
        "cmmd",
        "1000 · biased MMD² of unit CLIP vectors of the middle square, Gaussian kernel, sigma 10",
    ),
    "lpips": Metric(
        "LPIPS", False, 4, ("reference",), "lpips", "learned perceptual distance at full resolution, version 0.1"
    ),
    "psnr": Metric(
        "PSNR (dB)", True, 2, ("reference",), None, "mean over pictures of 10·log10(1/MSE), each 100 dB at most"
    ),
    "psnr_global": Metric("PSNR of mean MSE (dB)", True, 2, ("reference",), None, "10·log10(1/mean MSE)"),
    "ssim": Metric(
        "SSIM", True, 4, ("reference",), None, "Gaussian window 11, sigma 1.5, K1 0.01, K2 0.03, RGB in [0, 1]"
    ),
    "clip_i": Metric("CLIP-I", True, 4, ("reference",), "clip_i", "cosine of the two pictures' CLIP vectors"),
    "dino_i": Metric("DINO-I", True, 4, ("reference",), "dino_i", "cosine of the two pictures' DINOv2 vectors"),
}
# Scores that come with another one → that one.
COMPANIONS = {"pickscore_winrate": "pickscore", "psnr_global": "psnr"}
NAMES = tuple(name for name in METRICS if name not in COMPANIONS)
