"""Score images: from folders to metrics.json, per_image.csv and report.html.

Order of the work: open the sets, check that a comparison measures the denoiser alone, plan metrics and networks, then
one pass per network over this rank's shard, gather, and write. Only the first rank searches for networks; it
broadcasts the plan.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from importlib import metadata
from pathlib import Path

from vqdm.config import COMPONENTS
from vqdm.documents import read_json
from vqdm.errors import UserError
from vqdm.fidelity import SMALLEST_FOR_LPIPS, SMALLEST_FOR_SSIM, load_lpips
from vqdm.images import NAN
from vqdm.metrics import networks
from vqdm.metrics.catalogue import FLAGS, METRICS, NAMES, NEEDS
from vqdm.metrics.config import MetricsConfig
from vqdm.metrics.encoders import exact, load_encoder, load_image_reward
from vqdm.metrics.frechet import (
    FeatureStatistics,
    check_tags,
    check_width,
    feature_statistics,
    frechet_distance,
    kid,
    load_statistics,
    save_statistics,
)
from vqdm.metrics.image_sets import ImageLoader, ImageSet, Key, mismatches, open_images, shared_keys
from vqdm.metrics.networks import Network, Unavailable
from vqdm.metrics.report import ReportData, write_page
from vqdm.metrics.results import (
    SCHEMA,
    Score,
    ScoreTable,
    cosines,
    global_psnr,
    lpips_score,
    mean_score,
    pair_table,
    per_image_csv,
    pixel_scores,
    short_name,
    text_table,
    truncated,
    winrate,
)
from vqdm.parallel import Ranks, launched
from vqdm.storage.files import locked, probe, save_json, save_text, sweep
from vqdm.storage.hub import is_offline
from vqdm.tracking import Tracker, log_info, own_command, versions

# ----------------------------------------------------------------------------------------------------------------- plan
#
# Before anything slow starts: which metrics can be computed, and where their networks are.

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
        advice = "" if download or is_offline(config.local_files_only) else ", --metrics downloads it"
        raise Unavailable(f"{reason}; {FLAGS[slot]} names another{advice}") from None


def find_statistics_network(config: MetricsConfig, found: dict[str, Network]) -> Network:
    """Return the network of `--save_stats`. Raises UserError if it is not found."""
    try:
        return found.get("features") or find_network(config, "features", download=True)
    except Unavailable as reason:
        raise UserError(f"--save_stats {config.save_stats}: {reason}") from None


LIBRARIES = {"torchmetrics": "torchmetrics", "torchvision": "torchvision", "open_clip": "open_clip_torch"}
LIBRARIES |= {"torch_fidelity": "torch-fidelity"}  # module → distribution


@dataclass(frozen=True)
class ScoreResult:
    """The result of a finished run.

    Attributes:
        skipped: metric → why.
        report: path of report.html; None without a report.
    """

    folder: Path
    scores: list[Score]
    skipped: dict[str, str]
    warnings: list[str]
    report: Path | None


@dataclass
class ScoreRun:
    """What the passes of one run share, and what they find."""

    config: MetricsConfig
    loader: ImageLoader
    images: ImageSet
    reference: ImageSet | None
    target: ImageSet | FeatureStatistics | None
    plan: ScorePlan
    mismatches: list[str]
    table: ScoreTable = field(default_factory=dict)
    scores: dict[str, Score] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)

    @property
    def pairs(self) -> list[Key]:
        return shared_keys(self.images, self.reference)


def score_images(config: MetricsConfig) -> ScoreResult | None:
    """Run the whole job; return None after a dry run, and on every rank but the first.

    Raises:
        UserError: bad input, found before anything slow starts.
        RunError: an image cannot be read.
    """
    images = open_images(config.images, "IMAGES")
    if images.path.is_file() and not config.output_dir:
        raise UserError(f"IMAGES {config.images} is a zip file, which takes no result; give --output_dir")
    check_folder(config.folder)
    reference = open_images(config.reference, "--reference") if config.reference else None
    target = open_target(config.fid_reference) if config.fid_reference else None
    differing = check_pairs(images, reference, config.force) if reference else []
    given = {"IMAGES": images, "--reference": reference, "--fid_reference": target}
    sets = {flag: one for flag, one in given.items() if isinstance(one, ImageSet)}
    notes = [note for one in sets.values() for note in one.notes] + check_problems(sets, config.force)
    if reference and reference.run.get("full_precision") is False:
        notes.append(f"--reference: {reference.path} holds images of a quantized UNet, not of the full-precision model")
    with launched(config.device) as ranks:
        plan = ranks.broadcast(make_plan(config, images, reference, target) if ranks.main else None)
        log_info(describe(config, images, ranks, plan))
        for flag, one in sets.items() if ranks.main else ():
            one.check(flag)
        if config.dry_run:
            for note in notes:
                log_info(f"warning: {note}")
            return None
        with locked(config.folder) if ranks.main else nullcontext():
            try:
                probe(config.folder)  # before the work rather than after it
            except OSError as error:
                raise UserError(f"--output_dir {config.folder} cannot be written: {error.strerror}") from None
            loader = ImageLoader(ranks, config.bs, config.threads)
            run = ScoreRun(config, loader, images, reference, target, plan, differing)
            run.warnings += [*notes, *(f"compared by --force: {line}" for line in differing)]
            with exact():
                measure(run)
            return finish(run) if ranks.main else None


# --------------------------------------------------------------------------------------------- inputs


def check_folder(folder: Path) -> None:
    """Raise UserError where the folder of the result, or one above it, is a file."""
    nearest = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not nearest.is_dir():
        raise UserError(f"--output_dir {nearest} is a file; give a folder")


def open_target(path: str) -> ImageSet | FeatureStatistics:
    """Open `--fid_reference`: statistics, a folder or a zip file."""
    if path.lower().endswith(".npz"):
        if not Path(path).is_file():
            raise UserError(f"--fid_reference: {path} is not found")
        return load_statistics(Path(path), "--fid_reference")
    return open_images(path, "--fid_reference")


def check_pairs(images: ImageSet, reference: ImageSet, force: bool) -> list[str]:
    """Return lines about differences beside the denoiser.

    Raises:
        UserError: there are any and `force` is off, or no image has a partner.
    """
    if not shared_keys(images, reference):
        raise UserError(f"--reference {reference.path} has no image with an id and sample of {images.path}")
    found = mismatches(images, reference)
    if found and not force:
        raise UserError(f"--reference {reference.path} does not match: {'; '.join(found)}; --force scores it anyway")
    return found


def check_problems(sets: dict[str, ImageSet], force: bool) -> list[str]:
    """Return lines about images that failed when they were generated.

    Raises:
        UserError: some held NaN and `force` is off: two of them would be equal.
    """
    lines = []
    for flag, one in sets.items():
        problems = one.problems()
        if problems.get(NAN) and not force:
            raise UserError(
                f"{flag} {one.path}: {problems[NAN]} of {len(one.entries)} images held NaN and are black; generate "
                "them again with --dtype float32 or bfloat16; --force scores them anyway"
            )
        if problems:
            counts = ", ".join(f"{count} {problem}" for problem, count in problems.items())
            lines.append(f"{flag}: images with a problem are among those scored: {counts}")
    return lines


def describe(config: MetricsConfig, images: ImageSet, ranks: Ranks, plan: ScorePlan) -> str:
    """Return one line: how many images, which metrics, and the folder of the result."""
    prompts = len({entry.id for entry in images.entries.values()})
    processes = f"{ranks.world} {ranks.device.type} process{'es' if ranks.world > 1 else ''}"
    return (
        f"{len(images.entries)} images of {prompts} prompts, {', '.join(plan.networks) or 'statistics'}, "
        f"on {processes}, into {config.folder}"
    )


# --------------------------------------------------------------------------------------------- passes


def measure(run: ScoreRun) -> None:
    """Run all passes, then gather the table of all ranks in the order of the images, and on the first rank score it."""
    score_sets(run)  # first: statistics that do not fit are refused before anything slow
    tables = [table for name in run.plan.networks for table in score_each(run, name)]
    merged: ScoreTable = {}
    for part in (one for parts in run.loader.ranks.all_gather(tables) for one in parts):
        for key, row in part.items():
            merged[key] = merged.get(key, {}) | row
    run.table = {key: merged[key] for key in run.images.entries if key in merged}
    if run.loader.ranks.main:
        score_columns(run)


def score_sets(run: ScoreRun) -> None:
    """Score the metrics of whole sets, and save statistics; each set passes through the network once."""
    names = [name for name in run.plan.networks if name in SET_METRICS]
    if not names and run.plan.statistics is None:
        return
    config = run.config
    network = run.plan.networks[names[0]] if names else run.plan.statistics
    encoder = load_encoder(network, run.loader.ranks.device)
    tags = {"preprocess": encoder.preprocess, "weights_sha256": network.sha256}
    if isinstance(run.target, FeatureStatistics) and {"fid", "kid"} & set(names):
        path = Path(config.fid_reference)
        if not check_tags(run.target, tags, path, "--fid_reference"):
            run.warnings.append(f"--fid_reference {path} has no tags; its preprocessing may differ")
    keep = config.save_features or "kid" in names
    known: dict[tuple, FeatureStatistics] = {}

    def statistics(images: ImageSet, keys: list[Key]) -> FeatureStatistics:
        place = images.path, len(keys)
        if place not in known:
            known[place] = feature_statistics(
                run.loader, images, keys, encoder, tags | {"dataset": images.path.name}, keep
            )
        return known[place]

    ours = statistics(run.images, list(run.images.entries))
    if ours.count <= ours.width and {"fid", "fid_fp"} & set(names):
        run.warnings.append(
            f"{ours.count} images are too few for {ours.width} features: Fréchet distances are biased upwards; "
            "compare them only at equal N"
        )
    for name in names:
        if name == "fid_fp":
            run.scores[name] = set_score(
                run, name, network, statistics(run.images, run.pairs), statistics(run.reference, run.pairs)
            )
            continue
        if isinstance(run.target, FeatureStatistics):
            check_width(run.target, ours.width, Path(config.fid_reference), "--fid_reference")
            theirs = run.target
        else:
            theirs = statistics(run.target, list(run.target.entries))
        run.scores[name] = set_score(run, name, network, ours, theirs)
    if run.plan.statistics is not None and run.loader.ranks.main:
        save_statistics(ours if config.save_features else replace(ours, features=None), Path(config.save_stats))


def set_score(run: ScoreRun, name: str, network: Network, ours: FeatureStatistics, theirs: FeatureStatistics) -> Score:
    """Compute one distance; only that of Inception's features is called FID, others carry width and network."""
    preprocess = ours.about["preprocess"]
    extra = {"n_reference": theirs.count, "preprocess": preprocess}
    if name == "kid":
        value, extra["std"] = kid(ours.features, theirs.features, run.config.seed)
        label = f"{METRICS[name].title}[{preprocess}]"
    else:
        value = frechet_distance(ours, theirs)
        inception = network.kind == "inception"
        label = f"FID-{ours.count}[{preprocess}]" if inception else f"FD-{ours.width}[{short_name(network)}]"
        label += " to full precision" if name == "fid_fp" else ""
    return Score(name, label, value, ours.count, network=network.name, extra=extra)


def score_each(run: ScoreRun, name: str) -> Iterator[ScoreTable]:
    """Yield this rank's rows of a metric that has a value per image; nothing for a metric of sets."""
    network, loader, device = run.plan.networks[name], run.loader, run.loader.ranks.device
    if name == "psnr" or (name == "ssim" and "psnr" not in run.plan.networks):
        yield pair_table(loader, "pixels", pixel_scores, run.images, run.reference, run.pairs)
    elif name == "lpips":
        net = network.options["net"]
        score = lpips_score(load_lpips(net, Path(network.source), device), SMALLEST_FOR_LPIPS[net])
        yield pair_table(loader, name, score, run.images, run.reference, run.pairs)
    elif name in ("clip", "pickscore"):
        encoder = load_encoder(network, device)
        score = cosines(encoder, encoder.scale if name == "pickscore" else 100.0)
        yield text_table(loader, name, encoder.prepare, score, run.images, run.reference)
        warn_of_long_prompts(run, name, encoder.overlong)
    elif name == "image_reward":
        model = load_image_reward(network, device)
        yield text_table(loader, name, model.prepare, model.columns, run.images, run.reference)
        warn_of_long_prompts(run, name, model.overlong)


def warn_of_long_prompts(run: ScoreRun, name: str, overlong: Callable[[str], bool]) -> None:
    """Add a warning about prompts that the network reads in part only."""
    cut = truncated(overlong, run.images)
    if cut:
        run.warnings.append(f"{name}: {cut} prompts are longer than the network reads, and were truncated")


def score_columns(run: ScoreRun) -> None:
    """Compute the scores of the columns of the table, and order all scores as the catalogue."""
    seed, table, chosen = run.config.seed, run.table, run.plan.networks
    for name, network in chosen.items():
        if name not in SET_METRICS and any(name in row for row in table.values()):
            run.scores[name] = mean_score(name, table, network, seed)
    if "psnr" in chosen:
        run.scores["psnr_global"] = global_psnr(table, seed)
    if "pickscore" in chosen and run.reference:
        run.scores["pickscore_winrate"] = winrate(table, chosen["pickscore"], seed)
    run.scores = {name: run.scores[name] for name in METRICS if name in run.scores}
    for name, smallest in (("ssim", SMALLEST_FOR_SSIM), ("lpips", SMALLEST_FOR_LPIPS[run.config.lpips_net])):
        if name in chosen and name not in run.scores:
            run.warnings.append(f"{name}: images of less than {smallest} pixels have none")


# --------------------------------------------------------------------------------------------- results


def finish(run: ScoreRun) -> ScoreResult:
    """Write the files of the result, and log it to a tracker if there is one."""
    config, folder, scores = run.config, run.config.folder, list(run.scores.values())
    sweep(folder, below=False)
    result = record(run)
    save_json(result, folder / "metrics.json")
    save_text(per_image_csv(list(run.images.entries.values()), run.table), folder / "per_image.csv")
    report = None
    if config.report_images:
        report = folder / "report.html"
        data = ReportData(result, scores, run.table, run.images, run.reference, folder, config.report_size)
        save_text(write_page(data, config.report_images, config.seed), report)
    tracker = Tracker(config.report_to, "vqdm-metrics", folder, asdict(config))
    tracker.log({name: score.value for name, score in run.scores.items()})
    tracker.finish()
    return ScoreResult(folder, scores, run.plan.skipped, run.warnings, report)


def record(run: ScoreRun) -> dict:
    """Return the content of metrics.json."""
    config, images, reference = run.config, run.images, run.reference
    return {
        "schema": SCHEMA,
        "images": config.images,
        "reference": config.reference,
        "fid_reference": config.fid_reference,
        "mismatches": run.mismatches,
        "num_images": len(images.entries),
        "num_prompts": len({entry.id for entry in images.entries.values()}),
        "full_precision": images.run.get("full_precision"),
        "reference_full_precision": reference and reference.run.get("full_precision"),
        "size": model_size(images.run),
        "run": images.run,
        "metrics": {name: score.to_dict() for name, score in run.scores.items()},
        "skipped": run.plan.skipped,
        "warnings": run.warnings,
        "networks": {name: asdict(network) for name, network in run.plan.networks.items() if network},
        "settings": asdict(config),
        "versions": versions() | {module: metadata.version(name) for module, name in LIBRARIES.items()},
        "command": own_command(),
    }


def model_size(run: dict) -> dict:
    """Return bits and bytes of the denoiser that made the images, from its summary.json; empty without that file."""
    quantized = (run.get("settings") or {}).get("quantized")
    for folder in (Path(quantized), Path(quantized).parent) if quantized else ():
        try:
            summary = read_json(folder / "summary.json")
        except (OSError, ValueError):
            continue
        # A run of others may name any folder here; nothing but these numbers is taken from it.
        names = ["effective_bits_layers"]
        for part in COMPONENTS:
            names += [f"effective_bits_{part}", f"bytes_of_{part}", f"bytes_of_original_{part}"]
        held = {name: summary.get(name) for name in names} if isinstance(summary, dict) else {}
        return {name: value for name, value in held.items() if isinstance(value, int | float)}
    return {}
