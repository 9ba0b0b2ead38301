"""Every metric by name: which direction is better, what it needs, its network, and its exact definition."""

from __future__ import annotations

from dataclasses import dataclass

# What a metric can need beside the images → how a user gives it.
NEEDS = {
    "prompts": "prompts, which the manifest of generate.py holds",
    "reference": "--reference",
    "fid_reference": "--fid_reference",
}
# Network → the flag that names it.
FLAGS = {
    "features": "--fid_features",
    "clip": "--clip_model",
    "pickscore": "--pickscore_model",
    "image_reward": "--image_reward_model",
    "lpips": "--lpips_weights",
}


@dataclass(frozen=True)
class Metric:
    """One row of the catalogue.

    Attributes:
        title: the name in tables, before that of the network.
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


_FRECHET = "Fréchet distance of Gaussians fitted to the features of the network, float64, N-1 in the covariances"
METRICS = {
    "clip": Metric("CLIP score", True, 2, ("prompts",), "clip", "100 · cosine of prompt and image, not clamped"),
    "pickscore": Metric(
        "PickScore", True, 3, ("prompts",), "pickscore", "exp(logit_scale) · cosine of prompt and image"
    ),
    "pickscore_winrate": Metric(
        "PickScore wins",
        True,
        3,
        ("prompts", "reference"),
        "pickscore",
        "share of pairs in which the image scores above the full-precision one; equal scores count half",
    ),
    "image_reward": Metric(
        "Reward",
        True,
        3,
        ("prompts",),
        "image_reward",
        "ImageReward v1.0 of prompt and image, in standard deviations of its authors; it reads 35 tokens of a prompt",
    ),
    "fid": Metric("FID", False, 3, ("fid_reference",), "features", _FRECHET),
    "fid_fp": Metric(
        "FID", False, 3, ("reference",), "features", f"{_FRECHET}; against the images of the full-precision model"
    ),
    "kid": Metric(
        "KID",
        False,
        3,
        ("fid_reference",),
        "features",
        "1000 · unbiased MMD², kernel (x·y/d + 1)³, mean over 100 pairs of subsets of 1000 or of all",
    ),
    "lpips": Metric(
        "LPIPS", False, 4, ("reference",), "lpips", "learned perceptual distance at full resolution, version 0.1"
    ),
    "psnr": Metric("PSNR (dB)", True, 2, ("reference",), None, "mean over images of 10·log10(1/MSE), each ≤ 100 dB"),
    "psnr_global": Metric("PSNR of mean MSE (dB)", True, 2, ("reference",), None, "10·log10(1/mean MSE)"),
    "ssim": Metric(
        "SSIM", True, 4, ("reference",), None, "Gaussian window 11, sigma 1.5, K1 0.01, K2 0.03, RGB in [0, 1]"
    ),
}
# Scores that come with another one → that one.
COMPANIONS = {"pickscore_winrate": "pickscore", "psnr_global": "psnr"}
NAMES = tuple(name for name in METRICS if name not in COMPANIONS)

# Metric, or flag of its network, that earlier versions had → what to use instead.
REMOVED = {
    "hpsv2": "use pickscore or image_reward",
    "mind": "use fid or kid",
    "cmmd": "use fid with --fid_features and a CLIP model, such as openai/clip-vit-large-patch14-336",
    "fd_dinov2": "use fid with --fid_features facebook/dinov2-large",
    "clip_i": "use lpips",
    "dino_i": "use lpips",
}
REMOVED_FLAGS = {
    "--hpsv2_weights": REMOVED["hpsv2"],
    "--cmmd_model": REMOVED["cmmd"],
    "--fd_dinov2_model": REMOVED["fd_dinov2"],
    "--clip_i_model": REMOVED["clip_i"],
    "--dino_i_model": REMOVED["dino_i"],
}


def refusal(name: str) -> str:
    """Return the line that refuses a name given to `--metrics`."""
    if name in REMOVED:
        return f"--metrics: {name} is no longer a metric; {REMOVED[name]}"
    return f"--metrics: {name} is not a metric; allowed are {', '.join(NAMES)}"
