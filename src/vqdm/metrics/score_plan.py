"""Which metrics can be had from what is given, and where their networks are; found before anything slow."""

from __future__ import annotations

from functools import partial

from vqdm.errors import UserError
from vqdm.metrics import networks
from vqdm.metrics.catalogue import FLAGS, METRICS, NAMES, NEEDS
from vqdm.metrics.config import MetricsConfig
from vqdm.metrics.frechet import Statistics
from vqdm.metrics.image_sets import PictureSet, shared_keys
from vqdm.metrics.networks import Missing, Network
from vqdm.metrics.score_job import Plan
from vqdm.metrics.score_sets import SET_METRICS


def make_plan(
    config: MetricsConfig, images: PictureSet, reference: PictureSet | None, target: PictureSet | Statistics | None
) -> Plan:
    """Which metrics can be had, each network looked for once.

    Raises:
        UserError: one that `--metrics` names, or `--save_stats` needs, cannot be had.
    """
    given = {"prompts": images.has_prompts, "reference": reference is not None, "fid_reference": target is not None}
    chosen, skipped, found = {}, {}, {}
    for name in config.metrics or NAMES:
        try:
            check_needs(name, given, target)
            check_enough(name, images, reference, target)
            slot = METRICS[name].network
            if slot and slot not in found:
                found[slot] = find_network(config, slot, download=config.metrics is not None)
            check_kernel(name, found.get(slot))
            chosen[name] = found[slot] if slot else None
        except Missing as reason:
            if config.metrics:
                raise UserError(f"--metrics {name} cannot be had: {reason}") from None
            skipped[name] = str(reason)
    statistics = find_statistics_network(config, found) if config.save_stats else None
    if not chosen and not statistics:
        raise UserError(f"nothing can be scored: {'; '.join(f'{name}: {reason}' for name, reason in skipped.items())}")
    return Plan(chosen, skipped, statistics)


def check_needs(name: str, given: dict[str, bool], target: PictureSet | Statistics | None) -> None:
    """Raise Missing where a metric's inputs are not given, or are statistics where pictures are needed."""
    lacking = [need for need in METRICS[name].needs if not given[need]]
    if lacking:
        raise Missing(f"needs {NEEDS[lacking[0]]}")
    if isinstance(target, Statistics):
        if name in ("cmmd", "fd_dinov2"):
            raise Missing("needs pictures as --fid_reference, not statistics")
        if name in ("kid", "mind") and target.features is None:
            raise Missing("needs features, which this --fid_reference .npz does not hold")


def check_enough(
    name: str, images: PictureSet, reference: PictureSet | None, target: PictureSet | Statistics | None
) -> None:
    """Raise Missing for a distance of sets of which one holds a single picture, and so has no covariance."""
    if name not in SET_METRICS:
        return
    sides = [shared_keys(images, reference)] if name == "fid_fp" else [images.pictures]
    sides += [target.pictures] if name != "fid_fp" and isinstance(target, PictureSet) else []
    if min(map(len, sides)) < 2:
        raise Missing("needs two pictures of each set at least")


def check_kernel(name: str, network: Network | None) -> None:
    """Raise Missing for KID of other features than Inception's, to whose scale its kernel is made."""
    if name == "kid" and network.kind != "inception":
        raise Missing(f"needs Inception's features, which --fid_features {network.name} has not")


def find_network(config: MetricsConfig, slot: str, download: bool) -> Network:
    """The network of a name of `FLAGS`.

    Raises:
        Missing: it is not at hand; says which flag names another.
    """
    here = config.local_files_only or not download
    finders = {
        "features": partial(networks.find_features, config.fid_features, config.fid_mode or "clean", here),
        "dinov2": partial(networks.find_encoder, config.fd_dinov2_model, here, {"frame": "squash"}),
        "cmmd": partial(networks.find_encoder, config.cmmd_model, here, {"frame": "square"}),
        "clip": partial(networks.find_open_clip, config.clip_model, config.clip_pretrained, here),
        "pickscore": partial(networks.find_pickscore, config.pickscore_model, here),
        "hpsv2": partial(networks.find_hpsv2, config.hpsv2_weights, here),
        "image_reward": partial(networks.find_image_reward, config.image_reward_model, here),
        "lpips": partial(networks.find_lpips, config.lpips_net, config.lpips_weights, here),
        "clip_i": partial(networks.find_encoder, config.clip_i_model, here),
        "dino_i": partial(networks.find_encoder, config.dino_i_model, here),
    }
    try:
        return finders[slot]()
    except Missing as reason:
        advice = "" if download or networks.offline(config.local_files_only) else ", --metrics downloads it"
        raise Missing(f"{reason}; {FLAGS[slot]} names another{advice}") from None


def find_statistics_network(config: MetricsConfig, found: dict[str, Network]) -> Network:
    try:
        return found.get("features") or find_network(config, "features", download=True)
    except Missing as reason:
        raise UserError(f"--save_stats {config.save_stats}: {reason}") from None
