"""Score pictures: from folders to metrics.json, per_image.csv and report.html.

Order of work: open the sets, check that a comparison measures the UNet alone, find the networks, then one pass a
network over this rank's share, gather, and write. Only the first rank looks for networks, and tells the others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path

import open_clip
import torchmetrics
import torchvision

from vqdm.documents import read_json
from vqdm.errors import UserError
from vqdm.images import NAN
from vqdm.metrics.catalogue import METRICS
from vqdm.metrics.config import MetricsConfig
from vqdm.metrics.encoders import exact, load_encoder
from vqdm.metrics.fidelity import SMALLEST_FOR_LPIPS, load_lpips
from vqdm.metrics.frechet import Statistics, load_statistics
from vqdm.metrics.image_reward import load_image_reward
from vqdm.metrics.image_sets import PictureSet, mismatches, open_pictures, shared_keys
from vqdm.metrics.measuring import (
    SMALLEST_FOR_SSIM,
    Work,
    cosines,
    pixel_table,
    similarity_table,
    text_table,
    truncated,
)
from vqdm.metrics.report import Material, write_page
from vqdm.metrics.results import SCHEMA, Score, Table, global_psnr, mean_score, per_image_csv, winrate
from vqdm.metrics.score_job import Job, Plan
from vqdm.metrics.score_plan import make_plan
from vqdm.metrics.score_sets import SET_METRICS, set_pass
from vqdm.parallel import Ranks, launched
from vqdm.redaction import own_command
from vqdm.storage.files import locked, probe, save_json, save_text, sweep
from vqdm.tracking import Tracker, log_info
from vqdm.versions import versions


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


def score_images(config: MetricsConfig) -> Scored | None:
    """Run the whole job; None after a dry run, and on every rank but the first.

    Raises:
        UserError: bad input, found before anything slow starts.
        RunError: a picture cannot be read.
    """
    images = open_pictures(config.images, "IMAGES")
    check_place(config, images)
    reference = open_pictures(config.reference, "--reference") if config.reference else None
    target = open_target(config.fid_reference) if config.fid_reference else None
    differing = check_pairs(images, reference, config.force) if reference else []
    given = {"IMAGES": images, "--reference": reference, "--fid_reference": target}
    sets = {flag: one for flag, one in given.items() if isinstance(one, PictureSet)}
    check_finite(sets, config.force)
    with launched(config.device) as ranks:
        plan = ranks.broadcast(make_plan(config, images, reference, target) if ranks.main else None)
        log_info(describe(config, images, ranks, plan))
        notes = [note for one in sets.values() for note in one.notes]
        notes += [line for flag, one in sets.items() for line in problem_lines(flag, one)]
        if config.dry_run:
            for note in notes:
                log_info(f"warning: {note}")
            return None
        with locked(config.folder) if ranks.main else nullcontext():
            check_writable(config.folder)
            job = Job(config, Work(ranks, config.bs, config.threads), images, reference, target, plan, differing)
            job.warnings += [*notes, *(f"compared by --force: {line}" for line in differing)]
            with exact():
                measure(job)
            return finish(job) if ranks.main else None


# --------------------------------------------------------------------------------------------- what is given


def open_target(path: str) -> PictureSet | Statistics:
    """What `--fid_reference` names: statistics, a folder or a zip file."""
    if path.lower().endswith(".npz"):
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


def check_finite(sets: dict[str, PictureSet], force: bool) -> None:
    """Raise UserError for images that held NaN when they were generated: two of them are alike for no good reason."""
    for flag, one in sets.items():
        count = one.problems().get(NAN, 0)
        if count and not force:
            raise UserError(
                f"{flag} {one.path}: {count} of {len(one.pictures)} images held NaN and are black; generate them again "
                "with --dtype float32 or bfloat16; --force scores them all the same"
            )


def problem_lines(flag: str, pictures: PictureSet) -> list[str]:
    """A line about images that went wrong when they were generated, where there are any."""
    words = ", ".join(f"{count} {problem}" for problem, count in pictures.problems().items())
    return [f"{flag}: pictures that went wrong are among those scored: {words}"] if words else []


def check_place(config: MetricsConfig, images: PictureSet) -> None:
    """Raise UserError where the result would go into IMAGES, which is a file."""
    if images.path.is_file() and not config.output_dir:
        raise UserError(f"IMAGES {config.images} is a zip file, which takes no result; give --output_dir")


def check_writable(folder: Path) -> None:
    """Raise UserError where results cannot be written, before the work rather than after it."""
    try:
        probe(folder)
    except OSError as error:
        raise UserError(f"--output_dir {folder} cannot be written: {error.strerror}") from None


def describe(config: MetricsConfig, images: PictureSet, ranks: Ranks, plan: Plan) -> str:
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
    for part in (one for parts in job.work.ranks.all_gather(tables) for one in parts):
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
        net = network.options["net"]
        lpips = load_lpips(net, Path(network.source), job.work.ranks.device)
        yield pixel_table(job.work, job.images, job.reference, job.pairs, lpips, SMALLEST_FOR_LPIPS[net])
    elif name in ("clip_i", "dino_i"):
        encoder = load_encoder(network, job.work.ranks.device)
        yield similarity_table(job.work, name, encoder, job.images, job.reference, job.pairs)
    elif name in ("clip", "pickscore", "hpsv2"):
        encoder = load_encoder(network, job.work.ranks.device)
        score = cosines(encoder, encoder.scale if name == "pickscore" else 100.0)
        yield text_table(job.work, name, encoder.prepare, score, job.images, job.reference)
        warn_of_long_prompts(job, name, encoder.overlong)
    elif name == "image_reward":
        model = load_image_reward(network, job.work.ranks.device)
        yield text_table(job.work, name, model.prepare, model.columns, job.images, job.reference)
        warn_of_long_prompts(job, name, model.overlong)


def warn_of_long_prompts(job: Job, name: str, overlong: Callable[[str], bool]) -> None:
    cut = truncated(overlong, job.images)
    if cut:
        job.warnings.append(f"{name}: {cut} prompts are longer than the network reads, and were cut off there")


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
    for name, smallest in (("ssim", SMALLEST_FOR_SSIM), ("lpips", SMALLEST_FOR_LPIPS[job.config.lpips_net])):
        if name in chosen and name not in job.scores:
            job.warnings.append(f"{name}: pictures of less than {smallest} pixels have none")


def finish(job: Job) -> Scored:
    """Write everything, and log it where a tracker is asked for."""
    config, folder = job.config, job.config.folder
    sweep(folder, below=False)
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
        "command": own_command(),
    }


def model_size(run: dict) -> dict:
    """Bits and bytes of the UNet that drew, as its own summary.json says; empty where there is none."""
    quantized = (run.get("settings") or {}).get("quantized")
    for folder in (Path(quantized), Path(quantized).parent) if quantized else ():
        try:
            summary = read_json(folder / "summary.json")
        except (OSError, ValueError):
            continue
        # A run of others may name any folder here; nothing but these numbers is taken from it.
        names = ("effective_bits_unet", "effective_bits_layers", "bytes_of_unet", "bytes_of_original_unet")
        held = {name: summary.get(name) for name in names} if isinstance(summary, dict) else {}
        return {name: value for name, value in held.items() if isinstance(value, int | float)}
    return {}
