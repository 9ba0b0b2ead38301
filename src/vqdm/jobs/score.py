"""Score pictures: from folders to metrics.json, per_image.csv and report.html.

Order of work: open the sets, check that a comparison measures the UNet alone, find the networks, then one pass a
network over this rank's share, gather, and write. Only the first rank looks for networks, and tells the others.
"""

from __future__ import annotations

import json
import logging
import shlex
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

import open_clip
import torch
import torchmetrics
import torchvision

from vqdm.errors import UserError
from vqdm.parallel import Ranks, launched
from vqdm.scores import networks
from vqdm.scores.catalogue import FLAGS, METRICS, NAMES, NEEDS
from vqdm.scores.encoders import Encoder, exact, load_encoder
from vqdm.scores.fidelity import load_lpips
from vqdm.scores.frechet import (
    Statistics,
    check_tags,
    check_width,
    frechet_distance,
    load_statistics,
    save_statistics,
)
from vqdm.scores.kernels import cmmd, kid, mind
from vqdm.scores.measuring import SMALLEST_FOR_SSIM, Work, fit, pixel_table, similarity_table, text_table, truncated
from vqdm.scores.networks import Missing, Network
from vqdm.scores.picture_sets import Key, PictureSet, mismatches, open_pictures, shared_keys
from vqdm.scores.report import Material, write_page
from vqdm.scores.results import (
    SCHEMA,
    Score,
    Table,
    global_psnr,
    label_of,
    mean_score,
    per_image_csv,
    short_name,
    winrate,
)
from vqdm.storage.atomic import save_json, save_text
from vqdm.tracking import Tracker, say
from vqdm.versions import versions

FID_MODES = ("clean", "legacy", "pytorch", "vqdm")
SET_METRICS = ("fid", "fid_fp", "kid", "mind", "fd_dinov2", "cmmd")
log = logging.getLogger("vqdm")


@dataclass(frozen=True)
class ScoreConfig:
    """Everything that `score_images` needs; the flags of `metrics.py` by the same names.

    Attributes:
        output_dir: None is `metrics` inside IMAGES.
        metrics: names of the catalogue, each an error where it cannot be had; None is all that can be had without a
            download.
        force: score pairs although more than the UNet differs between them.
        report_images: worst pictures in the report, and as many drawn by lot for the vote; 0 writes no report.
        report_size: pixels of the longer side of pictures inside the report.

    Raises:
        UserError: an unknown metric, or settings that contradict each other.
    """

    images: str
    output_dir: str | None = None
    reference: str | None = None
    fid_reference: str | None = None
    metrics: tuple[str, ...] | None = None
    fid_mode: str | None = None
    fid_features: str = "inception"
    save_stats: str | None = None
    clip_model: str = "ViT-H-14"
    clip_pretrained: str = "laion2b_s32b_b79k"
    cmmd_model: str = "openai/clip-vit-large-patch14-336"
    fd_dinov2_model: str = "facebook/dinov2-large"
    pickscore_model: str = "yuvalkirstain/PickScore_v1"
    hpsv2_weights: str | None = None
    lpips_net: str = "alex"
    lpips_weights: str | None = None
    clip_i_model: str = "openai/clip-vit-large-patch14"
    dino_i_model: str = "facebook/dinov2-base"
    bs: int = 16
    threads: int = 4
    seed: int = 0
    device: str = "auto"
    local_files_only: bool = False
    force: bool = False
    report_images: int = 64
    report_size: int = 512
    report_to: str = "none"
    dry_run: bool = False

    def __post_init__(self) -> None:
        unknown = [name for name in self.metrics or () if name not in NAMES]
        if unknown:
            raise UserError(f"--metrics: {unknown[0]} is not a metric; allowed are {', '.join(NAMES)}")
        if self.fid_mode and self.fid_features != "inception" and not Path(self.fid_features).is_file():
            raise UserError(
                f"--fid_mode {self.fid_mode} is for Inception; --fid_features {self.fid_features} has its own"
            )

    @property
    def folder(self) -> Path:
        return Path(self.output_dir) if self.output_dir else Path(self.images) / "metrics"


@dataclass(frozen=True)
class Plan:
    """What can be scored.

    Attributes:
        networks: metric → its network; None for metrics of pixels.
        skipped: metric → why it cannot be had.
        statistics: network of `--save_stats` where it is asked for.
    """

    networks: dict[str, Network | None]
    skipped: dict[str, str]
    statistics: Network | None = None


@dataclass
class Job:
    """What the passes of one run share, and what they find."""

    config: ScoreConfig
    work: Work
    images: PictureSet
    reference: PictureSet | None
    target: PictureSet | Statistics | None
    plan: Plan
    mismatches: list[str]
    table: Table = field(default_factory=dict)
    scores: dict[str, Score] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)

    @property
    def pairs(self) -> list[Key]:
        return shared_keys(self.images, self.reference)


@dataclass(frozen=True)
class Scored:
    """What a finished run has to say.

    Attributes:
        skipped: metric → why.
        report: None where none was asked for.
    """

    folder: Path
    scores: list[Score]
    skipped: dict[str, str]
    warnings: list[str]
    report: Path | None


def score_images(config: ScoreConfig) -> Scored | None:
    """Run the whole job; None after a dry run, and on every rank but the first.

    Raises:
        UserError: bad input, found before anything slow starts.
        RunError: a picture cannot be read.
    """
    images = open_pictures(config.images, "IMAGES")
    reference = open_pictures(config.reference, "--reference") if config.reference else None
    target = open_target(config.fid_reference) if config.fid_reference else None
    differing = check_pairs(images, reference, config.force) if reference else []
    with launched(config.device) as ranks:
        plan = ranks.agreed(make_plan(config, images, reference, target) if ranks.main else None)
        say(describe(config, images, ranks, plan))
        if config.dry_run:
            return None
        check_writable(config.folder)
        job = Job(config, Work(ranks, config.bs, config.threads), images, reference, target, plan, differing)
        job.warnings += [f"compared by --force: {line}" for line in differing]
        with exact():
            measure(job)
        return finish(job) if ranks.main else None


# --------------------------------------------------------------------------------------------- what is given


def open_target(path: str) -> PictureSet | Statistics:
    """What `--fid_reference` names: statistics, a folder or a zip file."""
    if path.endswith(".npz"):
        if not Path(path).is_file():
            raise UserError(f"--fid_reference: {path} is not there")
        return load_statistics(Path(path), "--fid_reference")
    return open_pictures(path, "--fid_reference")


def check_pairs(images: PictureSet, reference: PictureSet, force: bool) -> list[str]:
    """Lines about what differs beside the UNet.

    Raises:
        UserError: there are any and `force` is off, or no picture has a partner.
    """
    if not shared_keys(images, reference):
        raise UserError(f"--reference {reference.path} has no picture with an id and sample of {images.path}")
    found = mismatches(images, reference)
    if found and not force:
        raise UserError(
            f"--reference {reference.path} does not match: {'; '.join(found)}; --force scores it all the same"
        )
    return found


def check_writable(folder: Path) -> None:
    """Raise UserError where results cannot be written, before the work rather than after it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output_dir {folder} cannot be written: {error.strerror}") from None


# --------------------------------------------------------------------------------------------- the plan


def make_plan(
    config: ScoreConfig, images: PictureSet, reference: PictureSet | None, target: PictureSet | Statistics | None
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


def check_kernel(name: str, network: Network | None) -> None:
    """Raise Missing for KID of other features than Inception's, to whose scale its kernel is made."""
    if name == "kid" and network.kind != "inception":
        raise Missing(f"needs Inception's features, which --fid_features {network.name} has not")


def find_network(config: ScoreConfig, slot: str, download: bool) -> Network:
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
        "lpips": partial(networks.find_lpips, config.lpips_net, config.lpips_weights, here),
        "clip_i": partial(networks.find_encoder, config.clip_i_model, here),
        "dino_i": partial(networks.find_encoder, config.dino_i_model, here),
    }
    try:
        return finders[slot]()
    except Missing as reason:
        advice = "" if download or networks.offline(config.local_files_only) else ", --metrics downloads it"
        raise Missing(f"{reason}; {FLAGS[slot]} names another{advice}") from None


def find_statistics_network(config: ScoreConfig, found: dict[str, Network]) -> Network:
    try:
        return found.get("features") or find_network(config, "features", download=True)
    except Missing as reason:
        raise UserError(f"--save_stats {config.save_stats}: {reason}") from None


def describe(config: ScoreConfig, images: PictureSet, ranks: Ranks, plan: Plan) -> str:
    """One line: how many pictures, scored by what, where to."""
    prompts = len({picture.id for picture in images.pictures.values()})
    processes = f"{ranks.world} {ranks.device.type} process{'es' if ranks.world > 1 else ''}"
    return (
        f"{len(images.pictures)} pictures of {prompts} prompts, {', '.join(plan.networks) or 'statistics'}, "
        f"on {processes}, into {config.folder}"
    )


# --------------------------------------------------------------------------------------------- passes


def measure(job: Job) -> None:
    """All passes, then the table of all ranks in the order of the pictures."""
    chosen = job.plan.networks
    # Sets come first: statistics that do not fit are refused before anything slow.
    for slot in ("features", "dinov2", "cmmd"):
        set_pass(job, slot, [name for name in chosen if name in SET_METRICS and METRICS[name].network == slot])
    tables = [table for name in chosen for table in picture_pass(job, name)]
    merged: Table = {}
    for part in (one for parts in job.work.ranks.gathered(tables) for one in parts):
        for key, row in part.items():
            merged[key] = merged.get(key, {}) | row
    job.table = {key: merged[key] for key in job.images.pictures if key in merged}
    if job.work.ranks.main:
        collect(job)


def picture_pass(job: Job, name: str) -> Iterator[Table]:
    """This rank's rows of one metric that has a value for each picture; nothing for one that has not."""
    network = job.plan.networks[name]
    if name in ("psnr", "ssim"):
        if name == "psnr" or "psnr" not in job.plan.networks:
            yield pixel_table(job.work, job.images, job.reference, job.pairs, None)
    elif name == "lpips":
        lpips = load_lpips(network.options["net"], Path(network.source), job.work.ranks.device)
        yield pixel_table(job.work, job.images, job.reference, job.pairs, lpips)
    elif name in ("clip_i", "dino_i"):
        encoder = load_encoder(network, job.work.ranks.device)
        yield similarity_table(job.work, name, encoder, job.images, job.reference, job.pairs)
    elif name in ("clip", "pickscore", "hpsv2"):
        encoder = load_encoder(network, job.work.ranks.device)
        scale = encoder.scale if name == "pickscore" else 100.0
        yield text_table(job.work, name, encoder, scale, job.images, job.reference)
        warn_of_long_prompts(job, name, encoder)


def warn_of_long_prompts(job: Job, name: str, encoder: Encoder) -> None:
    cut = truncated(encoder, job.images)
    if cut:
        job.warnings.append(f"{name}: {cut} prompts are longer than the network reads, and were cut off there")


def set_pass(job: Job, slot: str, names: list[str]) -> None:
    """Metrics of sets that share a network: each set goes through it once."""
    saving = slot == "features" and job.plan.statistics is not None
    if not names and not saving:
        return
    network = job.plan.networks[names[0]] if names else job.plan.statistics
    encoder = load_encoder(network, job.work.ranks.device)
    keep = any(name in ("kid", "mind", "cmmd") for name in names)
    sets = Sets(job, network, encoder, keep)
    if isinstance(job.target, Statistics) and any("fid_reference" in METRICS[name].needs for name in names):
        sets.check_target()
    ours = sets.of(job.images)
    if any(name.startswith(("fid", "fd")) for name in names):
        warn_of_rank(job, ours)
    for name in names:
        job.scores[name] = set_score(job, name, network, ours, sets)
    if saving and job.work.ranks.main:
        save_statistics(ours, Path(job.config.save_stats))


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
        value = cmmd(*(torch.nn.functional.normalize(one.features, dim=-1) for one in (ours, theirs)))
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


# --------------------------------------------------------------------------------------------- results


def collect(job: Job) -> None:
    """Scores of the columns of the table, in the order of the catalogue."""
    seed, table, chosen = job.config.seed, job.table, job.plan.networks
    for name, network in chosen.items():
        if name not in SET_METRICS and any(name in row for row in table.values()):
            job.scores[name] = mean_score(name, table, network, seed)
    if "psnr" in chosen:
        job.scores["psnr_global"] = global_psnr(table, seed)
    if "pickscore" in chosen and job.reference:
        job.scores["pickscore_winrate"] = winrate(table, chosen["pickscore"], seed)
    job.scores = {name: job.scores[name] for name in METRICS if name in job.scores}
    if "ssim" in chosen and "ssim" not in job.scores:
        job.warnings.append(f"ssim: pictures of less than {SMALLEST_FOR_SSIM} pixels have none")
    problems = job.images.problems()
    if problems:
        words = ", ".join(f"{count} {problem}" for problem, count in problems.items())
        job.warnings.append(f"pictures that went wrong are among those scored: {words}")


def finish(job: Job) -> Scored:
    """Write everything, and log it where a tracker is asked for."""
    config, folder = job.config, job.config.folder
    result = record(job)
    save_json(result, folder / "metrics.json")
    save_text(per_image_csv(list(job.images.pictures.values()), job.table), folder / "per_image.csv")
    report = write_report(job, result) if config.report_images else None
    tracker = Tracker(config.report_to, "vqdm-metrics", folder, asdict(config))
    tracker.log({name: score.value for name, score in job.scores.items()})
    tracker.finish()
    return Scored(folder, list(job.scores.values()), job.plan.skipped, job.warnings, report)


def write_report(job: Job, result: dict) -> Path:
    """report.html; returns its path."""
    config, path = job.config, job.config.folder / "report.html"
    scores = list(job.scores.values())
    material = Material(result, scores, job.table, job.images, job.reference, config.folder, config.report_size)
    page = write_page(material, config.report_images, config.seed)
    save_text(page, path)
    return path


def record(job: Job) -> dict:
    """The content of metrics.json."""
    config = job.config
    used = {name: network for name, network in job.plan.networks.items() if network}
    return {
        "schema": SCHEMA,
        "images": config.images,
        "reference": config.reference,
        "fid_reference": config.fid_reference,
        "mismatches": job.mismatches,
        "pictures": len(job.images.pictures),
        "prompts": len({picture.id for picture in job.images.pictures.values()}),
        "full_precision": job.images.run.get("full_precision"),
        "reference_full_precision": job.reference and job.reference.run.get("full_precision"),
        "size": model_size(job.images.run),
        "run": job.images.run,
        "metrics": {name: score.to_dict() for name, score in job.scores.items()},
        "skipped": job.plan.skipped,
        "warnings": job.warnings,
        "networks": {name: network.about() for name, network in used.items()},
        "settings": asdict(config),
        "versions": versions() | {one.__name__: one.__version__ for one in (torchmetrics, torchvision, open_clip)},
        "command": shlex.join(sys.argv),
    }


def model_size(run: dict) -> dict:
    """Bits and bytes of the UNet that drew, as its own summary.json says; empty where there is none."""
    quantized = (run.get("settings") or {}).get("quantized")
    for folder in (Path(quantized), Path(quantized).parent) if quantized else ():
        try:
            summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        names = ("effective_bits_unet", "effective_bits_layers", "bytes_of_unet", "bytes_of_original_unet")
        return {name: summary[name] for name in names if name in summary}
    return {}
