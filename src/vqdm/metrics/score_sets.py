"""Scores of whole sets: each set goes once through the network that several metrics share."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path

from vqdm.metrics.catalogue import METRICS
from vqdm.metrics.encoders import Encoder, load_encoder, unit
from vqdm.metrics.frechet import Statistics, check_tags, check_width, frechet_distance, save_statistics
from vqdm.metrics.image_sets import Key, PictureSet
from vqdm.metrics.kernel_distances import cmmd, kid, mind
from vqdm.metrics.measuring import fit
from vqdm.metrics.networks import Network
from vqdm.metrics.results import Score, label_of, short_name
from vqdm.metrics.score_job import Job

SET_METRICS = ("fid", "fid_fp", "kid", "mind", "fd_dinov2", "cmmd")


def set_pass(job: Job, slot: str, names: list[str]) -> None:
    """Metrics of sets that share a network: each set goes through it once."""
    saving = slot == "features" and job.plan.statistics is not None
    if not names and not saving:
        return
    network = job.plan.networks[names[0]] if names else job.plan.statistics
    encoder = load_encoder(network, job.work.ranks.device)
    keep = job.config.save_features or any(name in ("kid", "mind", "cmmd") for name in names)
    sets = Sets(job, network, encoder, keep)
    if isinstance(job.target, Statistics) and any("fid_reference" in METRICS[name].needs for name in names):
        sets.check_target()
    ours = sets.of(job.images)
    if any(name.startswith(("fid", "fd")) for name in names):
        warn_of_rank(job, ours)
    for name in names:
        job.scores[name] = set_score(job, name, network, ours, sets)
    if saving and job.work.ranks.main:
        kept = ours if job.config.save_features else replace(ours, features=None)
        save_statistics(kept, Path(job.config.save_stats))


@dataclass
class Sets:
    """Statistics of picture sets by one network, each computed once."""

    job: Job
    network: Network
    encoder: Encoder
    keep: bool
    known: dict = field(default_factory=dict)

    def of(self, pictures: PictureSet, keys: list[Key] | None = None) -> Statistics:
        keys = keys or list(pictures.pictures)
        name = (pictures.path, len(keys))
        if name not in self.known:
            about = self.tags() | {"dataset": pictures.path.name}
            self.known[name] = fit(self.job.work, pictures, keys, self.encoder, about, self.keep)
        return self.known[name]

    def tags(self) -> dict[str, str]:
        return {"preprocess": self.encoder.preprocess, "weights_sha256": self.network.sha256}

    def target(self) -> Statistics:
        """Of `--fid_reference`."""
        target = self.job.target
        if isinstance(target, PictureSet):
            return self.of(target)
        check_width(target, self.of(self.job.images).width, Path(self.job.config.fid_reference), "--fid_reference")
        return target

    def check_target(self) -> None:
        """Raise UserError where the file of `--fid_reference` was made otherwise; warn where it does not say how."""
        path = Path(self.job.config.fid_reference)
        if not check_tags(self.job.target, self.tags(), path, "--fid_reference"):
            line = f"--fid_reference {path} does not say how it was made; its preprocessing may differ"
            self.job.warnings.append(line)


def set_score(job: Job, name: str, network: Network, ours: Statistics, sets: Sets) -> Score:
    """One distance between the pictures and the set that the metric compares them with."""
    if name == "fid_fp":
        ours, theirs = sets.of(job.images, job.pairs), sets.of(job.reference, job.pairs)
    else:
        theirs = sets.target()
    extra = {"n_reference": theirs.count, "preprocess": sets.encoder.preprocess}
    if name == "kid":
        value, extra["std"] = kid(ours.features, theirs.features, job.config.seed)
    elif name == "mind":
        value = mind(ours.features, theirs.features, job.config.seed)
    elif name == "cmmd":
        value = cmmd(*(unit(one.features) for one in (ours, theirs)))
    else:
        value = frechet_distance(ours, theirs)
    label = set_label(name, network, ours, sets.encoder.preprocess)
    return Score(name, label, value, ours.count, network=network.name, extra=extra)


def set_label(name: str, network: Network, ours: Statistics, preprocess: str) -> str:
    """FID only for Inception's features; those of any other network say how many they are, and whose."""
    if network.kind == "inception":
        number = f"-{ours.count}" if name.startswith("fid") else ""
        label = f"{METRICS[name].title}{number}[{preprocess}]"
    elif name == "cmmd":
        label = label_of(name, network)
    else:
        title = "FD" if name.startswith(("fid", "fd")) else METRICS[name].title
        label = f"{title}-{ours.width}[{short_name(network)}]"
    return f"{label} to full precision" if name == "fid_fp" else label


def warn_of_rank(job: Job, ours: Statistics) -> None:
    if ours.count <= ours.width:
        job.warnings.append(
            f"{ours.count} pictures are too few for {ours.width} features: Fréchet distances are biased upwards; "
            "compare them only at equal N"
        )
