"""Plan a run before anything slow starts: which metrics can be computed, and where their networks are."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from vqdm.errors import UserError
from vqdm.metrics import networks
from vqdm.metrics.catalogue import FLAGS, METRICS, NAMES, NEEDS
from vqdm.metrics.config import MetricsConfig
from vqdm.metrics.frechet import FeatureStatistics
from vqdm.metrics.image_sets import ImageSet, shared_keys
from vqdm.metrics.networks import Network, Unavailable

SET_METRICS = ("fid", "fid_fp", "kid")


@dataclass(frozen=True)
class ScorePlan:
    """Metrics that are computed, and those that are not.

    Attributes:
        networks: metric → its network; None for metrics of pixels.
        skipped: metric → why it is unavailable.
        statistics: network of `--save_stats`, if that is given.
    """

    networks: dict[str, Network | None]
    skipped: dict[str, str]
    statistics: Network | None = None


def make_plan(
    config: MetricsConfig, images: ImageSet, reference: ImageSet | None, target: ImageSet | FeatureStatistics | None
) -> ScorePlan:
    """Decide which metrics are computed; each network is searched for once.

    Raises:
        UserError: one that `--metrics` names, or `--save_stats` needs, is unavailable.
    """
    chosen, skipped, found = {}, {}, {}
    for name in config.metrics or NAMES:
        try:
            check_inputs(name, images, reference, target)
            slot = METRICS[name].network
            if slot and slot not in found:
                found[slot] = find_network(config, slot, download=config.metrics is not None)
            if name == "kid" and found[slot].kind != "inception":  # its kernel is made for the scale of those features
                raise Unavailable(f"needs Inception's features, which --fid_features {found[slot].name} has not")
            chosen[name] = found[slot] if slot else None
        except Unavailable as reason:
            if config.metrics:
                raise UserError(f"--metrics {name} is unavailable: {reason}") from None
            skipped[name] = str(reason)
    statistics = find_statistics_network(config, found) if config.save_stats else None
    if not chosen and not statistics:
        raise UserError(f"nothing can be scored: {'; '.join(f'{name}: {reason}' for name, reason in skipped.items())}")
    return ScorePlan(chosen, skipped, statistics)


def check_inputs(
    name: str, images: ImageSet, reference: ImageSet | None, target: ImageSet | FeatureStatistics | None
) -> None:
    """Raise Unavailable for a metric whose inputs are missing, or are too few for a covariance."""
    given = {"prompts": images.has_prompts, "reference": reference is not None, "fid_reference": target is not None}
    missing = [need for need in METRICS[name].needs if not given[need]]
    if missing:
        raise Unavailable(f"needs {NEEDS[missing[0]]}")
    if name == "kid" and isinstance(target, FeatureStatistics) and target.features is None:
        raise Unavailable("needs features, which this --fid_reference .npz does not hold")
    if name in SET_METRICS:
        sides = [shared_keys(images, reference)] if name == "fid_fp" else [images.entries]
        sides += [target.entries] if name != "fid_fp" and isinstance(target, ImageSet) else []
        if min(map(len, sides)) < 2:
            raise Unavailable("needs at least two images in each set")


def find_network(config: MetricsConfig, slot: str, download: bool) -> Network:
    """Find the network of a name of `FLAGS`.

    Raises:
        Unavailable: it is not found; the message names the flag for another one.
    """
    here = config.local_files_only or not download
    finders = {
        "features": partial(networks.find_features, config.fid_features, config.fid_mode or "clean", here),
        "clip": partial(networks.find_open_clip, config.clip_model, config.clip_pretrained, here),
        "pickscore": partial(networks.find_pickscore, config.pickscore_model, here),
        "image_reward": partial(networks.find_image_reward, config.image_reward_model, here),
        "lpips": partial(networks.find_lpips, config.lpips_net, config.lpips_weights, here),
    }
    try:
        return finders[slot]()
    except Unavailable as reason:
        advice = "" if download or networks.offline(config.local_files_only) else ", --metrics downloads it"
        raise Unavailable(f"{reason}; {FLAGS[slot]} names another{advice}") from None


def find_statistics_network(config: MetricsConfig, found: dict[str, Network]) -> Network:
    """Return the network of `--save_stats`. Raises UserError if it is not found."""
    try:
        return found.get("features") or find_network(config, "features", download=True)
    except Unavailable as reason:
        raise UserError(f"--save_stats {config.save_stats}: {reason}") from None
