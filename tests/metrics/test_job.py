import csv
import json
import math
import re
import shlex
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import metrics
import numpy as np
import open_clip
import pytest
import torch
from metrics import COMPARE_PARSER, PARSER, main
from PIL import Image
from settings_read import settings_read, undeclared
from tiny_runs import PROMPTS, pixels, write_folder
from torch_fidelity import calculate_metrics
from torchvision.models import inception_v3

from vqdm.cli import run_script
from vqdm.images import png_bytes
from vqdm.metrics import encoders, networks
from vqdm.metrics.config import MetricsConfig
from vqdm.metrics.encoders import load_inception

SHAPES = ["--clip_model", "assets/shapes-clip", "--fid_features", "assets/shapes-clip"]


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("folders")
    return {
        "FULL": write_folder(root / "full", 0, True),
        "QUANTIZED": write_folder(root / "quantized", 20, False),
        "OTHER": write_folder(root / "other", 5, False, seed=9),
    }


def score(*words, out: Path) -> int:
    line = [*map(str, words), "--output_dir", str(out), "--report_images", "0"]
    return run_script(main, line)


def result(out: Path) -> dict:
    return json.loads((out / "metrics.json").read_text())


@pytest.fixture(scope="module")
def finished(folders, tmp_path_factory) -> Path:
    """The quantized folder scored against the full-precision one by everything that shapes-clip can serve."""
    out = tmp_path_factory.mktemp("finished") / "out"
    words = [folders["QUANTIZED"], "--reference", folders["FULL"], "--fid_reference", folders["FULL"], *SHAPES]
    words += ["--pickscore_model", "assets/shapes-clip", "--bs", 3]
    read = set()
    with pytest.MonkeyPatch.context() as patch, settings_read(MetricsConfig, read):
        patch.setenv("HF_HUB_OFFLINE", "1")
        assert score(*words, out=out) == 0
    assert not undeclared(PARSER, [*map(str, words), "--report_images", "0"], read)
    return out


def test_pair_scores_are_those_of_numpy(finished):
    squared = [
        np.mean((pixels(i, k, 20) / 255 - pixels(i, k, 0) / 255) ** 2) for i in range(len(PROMPTS)) for k in range(2)
    ]
    metrics = result(finished)["metrics"]
    assert metrics["psnr"]["value"] == pytest.approx(np.mean([10 * math.log10(1 / one) for one in squared]), rel=1e-5)
    assert metrics["psnr_global"]["value"] == pytest.approx(10 * math.log10(1 / np.mean(squared)), rel=1e-5)
    assert metrics["psnr"]["better"] == "higher" and metrics["psnr"]["n"] == 8
    low, high = metrics["psnr"]["interval"]
    assert low < metrics["psnr"]["value"] < high
    assert 0 < metrics["ssim"]["value"] < 1


def test_clip_scores_are_those_of_open_clip(finished):
    model, _, prepare = open_clip.create_model_and_transforms("local-dir:assets/shapes-clip")
    tokenizer = open_clip.get_tokenizer("local-dir:assets/shapes-clip")
    with torch.no_grad():
        texts = model.eval().encode_text(tokenizer(PROMPTS), normalize=True)
        means = {}
        for noise in (20, 0):
            images = [prepare(Image.fromarray(pixels(i, k, noise))) for i in range(len(PROMPTS)) for k in range(2)]
            features = model.encode_image(torch.stack(images), normalize=True)
            means[noise] = 100 * (features * texts.repeat_interleave(2, 0)).sum(1)
    clip = result(finished)["metrics"]["clip"]
    assert clip["label"] == "CLIP score[shapes-clip]"
    assert clip["value"] == pytest.approx(means[20].mean().item(), abs=1e-3)
    assert clip["reference"] == pytest.approx(means[0].mean().item(), abs=1e-3)
    assert clip["difference"] == pytest.approx(clip["value"] - clip["reference"], abs=1e-6)
    wins = result(finished)["metrics"]["pickscore_winrate"]
    assert wins["value"] == pytest.approx((means[20] > means[0]).float().mean().item())
    assert 0 < wins["mean_probability"] < 1


def test_set_scores_carry_their_network_and_never_the_name_fid(finished):
    metrics = result(finished)["metrics"]
    assert metrics["fid"]["label"] == "FD-256[shapes-clip]"
    assert metrics["fid_fp"]["label"] == "FD-256[shapes-clip] to full precision"
    assert metrics["fid"]["value"] == pytest.approx(metrics["fid_fp"]["value"]) and metrics["fid"]["value"] > 1
    assert metrics["fid"]["interval"] is None and metrics["fid"]["n_reference"] == 8


def test_the_record_is_whole(finished):
    whole = result(finished)
    assert (whole["num_images"], whole["num_prompts"], whole["full_precision"]) == (8, 4, False)
    assert whole["reference_full_precision"] is True and whole["schema"] == 1
    assert len(whole["networks"]["clip"]["sha256"]) == 64
    assert {"python", "torch", "open_clip", "torchmetrics", "torch_fidelity"} <= whole["versions"].keys()
    assert all({"value", "n", "better", "definition", "label"} <= one.keys() for one in whole["metrics"].values())
    assert "alexnet-owt-7be5be79.pth" in whole["skipped"]["lpips"] and "--lpips_weights" in whole["skipped"]["lpips"]
    assert any(line.startswith("8 images are too few for 256 features") for line in whole["warnings"])


def test_every_image_has_its_line(finished):
    with open(finished / "per_image.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 8 and rows[0]["id"] == "p3" and rows[2]["prompt"] == 'a "striped" green cross'
    mean = np.mean([float(row["psnr"]) for row in rows])
    assert mean == pytest.approx(result(finished)["metrics"]["psnr"]["value"])
    assert {"clip", "clip_reference", "ssim"} <= rows[0].keys()


@pytest.mark.parametrize("paired", [True, False])
def test_the_report_is_written_with_and_without_a_reference(folders, tmp_path, capsys, paired):
    out = tmp_path / "out"
    words = [str(folders["QUANTIZED"]), *SHAPES, "--report_images", "3", "--output_dir", str(out)]
    assert run_script(main, words + (["--reference", str(folders["FULL"])] if paired else [])) == 0
    assert f"report: {out / 'report.html'}" in capsys.readouterr().out
    text = (out / "report.html").read_text()
    rows = json.loads(re.search(r'type="application/json">(.*?)</script>', text, re.DOTALL)[1])["rows"]
    assert 3 <= len(rows) <= 6 and sum(row["sampled"] for row in rows) == 3
    assert all(("difference" in row) == paired for row in rows)
    assert (out / rows[0]["file"]).is_file()


def test_two_processes_give_the_same_figures(finished, folders, tmp_path):
    out = tmp_path / "out"
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "metrics.py"]
    words = [folders["QUANTIZED"], "--reference", folders["FULL"], "--fid_reference", folders["FULL"], *SHAPES]
    words += ["--pickscore_model", "assets/shapes-clip", "--device", "cpu"]
    words += ["--bs", 3, "--report_images", 0, "--output_dir", out]
    subprocess.run([*launch, *map(str, words)], check=True, capture_output=True, timeout=900)
    one, two = result(finished)["metrics"], result(out)["metrics"]
    assert one.keys() == two.keys()
    for name in one:
        assert two[name]["value"] == pytest.approx(one[name]["value"], rel=1e-4, abs=1e-6), name
        assert two[name]["n"] == one[name]["n"]
    table_of_one, table_of_two = ((folder / "per_image.csv").read_text().splitlines() for folder in (finished, out))
    assert [line.split(",")[:2] for line in table_of_one] == [line.split(",")[:2] for line in table_of_two]


def test_a_folder_against_itself(folders, tmp_path):
    out = tmp_path / "out"
    assert score(folders["FULL"], "--reference", folders["FULL"], *SHAPES, out=out) == 0
    metrics = result(out)["metrics"]
    assert metrics["psnr"]["value"] == pytest.approx(100) and metrics["ssim"]["value"] == pytest.approx(1)
    assert metrics["fid_fp"]["value"] == pytest.approx(0, abs=1e-4)
    assert metrics["clip"]["difference"] == 0 and metrics["clip"]["difference_interval"] == [0, 0]


@pytest.fixture(scope="module")
def inception(tmp_path_factory) -> Path:
    """Random weights under the published file's name, their digest taken for the published one."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "pt_inception-2015-12-05-6726825d.pth"
    net = inception_v3(weights=None, num_classes=1008, aux_logits=False, init_weights=False)
    for module in net.modules():
        if isinstance(module, torch.nn.Conv2d):
            torch.nn.init.kaiming_normal_(module.weight)
    torch.save(net.state_dict(), path)
    return path


def test_inception_scores_and_saved_statistics(folders, inception, tmp_path, monkeypatch, capsys):
    """FeatureStatistics give the distance that the images give; those of another mode are refused."""
    full, other = (write_folder(tmp_path / str(noise), noise, True, samples=1) for noise in (0, 30))
    words = [other, "--fid_features", inception, "--metrics", "fid", "kid", "--fid_reference"]
    assert score(*words, full, out=tmp_path / "refused") == 2
    assert "the published file 6726825d…" in capsys.readouterr().err
    monkeypatch.setattr(networks, "INCEPTION_SHA256", networks.file_sha256(inception)[:8])
    # 64 features rather than 2048: roots of large matrices take seconds.
    fewer = torch.nn.AdaptiveAvgPool1d(64)
    monkeypatch.setattr(encoders, "load_inception", lambda *words: torch.nn.Sequential(load_inception(*words), fewer))
    assert score(*words, full, out=tmp_path / "a") == 0
    stats = ["--fid_features", inception, "--save_stats", tmp_path / "full.npz", "--save_features"]
    assert score(full, *stats, out=tmp_path / "b") == 0
    assert score(*words, tmp_path / "full.npz", out=tmp_path / "c") == 0
    first, second = (result(tmp_path / name)["metrics"] for name in "ac")
    assert first["fid"]["label"] == "FID-4[clean]" and first["kid"]["label"] == "KID[clean]"
    assert second["fid"]["value"] == pytest.approx(first["fid"]["value"], rel=1e-6, abs=1e-9)
    assert second["kid"]["value"] == pytest.approx(first["kid"]["value"], rel=1e-6) and first["kid"]["std"] >= 0
    capsys.readouterr()
    assert score(*words, tmp_path / "full.npz", "--fid_mode", "vqdm", out=tmp_path / "d") == 2
    assert "was made with preprocess clean, here it is vqdm" in capsys.readouterr().err


def test_the_printed_kid_is_that_of_torch_fidelity(inception, tmp_path, monkeypatch):
    """From files to the number: with the resize that torch-fidelity has, the features and the kernel are its own."""
    ours, theirs = (write_folder(tmp_path / str(noise), noise, True, samples=1) for noise in (0, 60))
    monkeypatch.setattr(networks, "INCEPTION_SHA256", networks.file_sha256(inception)[:8])
    words = ["--fid_features", inception, "--fid_mode", "legacy", "--metrics", "kid", "--seed", 7]
    assert score(ours, "--fid_reference", theirs, *words, out=tmp_path / "out") == 0
    options = {"kid": True, "kid_subset_size": 4, "rng_seed": 7, "feature_extractor_weights_path": str(inception)}
    options |= {"cuda": False, "cache": False, "verbose": False, "save_cpu_ram": True}
    found = calculate_metrics(input1=str(ours), input2=str(theirs), **options)
    printed = result(tmp_path / "out")["metrics"]["kid"]
    assert printed["label"] == "KID[legacy]" and abs(printed["value"]) > 1e-3
    assert printed["value"] == pytest.approx(1000 * found["kernel_inception_distance_mean"], rel=1e-3)


def test_plain_images_give_statistics_from_folder_and_zip(folders, tmp_path, capsys):
    """Without a manifest: no prompts and no pairs, but a set."""
    plain = tmp_path / "plain" / "deep"
    plain.mkdir(parents=True)
    with zipfile.ZipFile(tmp_path / "plain.zip", "w") as archive:
        for path in folders["FULL"].glob("*.png"):
            shutil.copy(path, plain)
            archive.write(path, f"deep/{path.name}")
    features = ["--fid_features", "assets/shapes-clip", "--save_stats"]
    assert score(tmp_path / "plain", *features, tmp_path / "folder.npz", out=tmp_path / "a") == 0
    assert score(tmp_path / "plain.zip", *features, tmp_path / "zip.npz", out=tmp_path / "b") == 0
    with np.load(tmp_path / "folder.npz") as first, np.load(tmp_path / "zip.npz") as second:
        assert np.array_equal(first["mu"], second["mu"]) and first["n"] == 8 and first["mu"].shape == (256,)
        assert "features" not in first.files
    assert result(tmp_path / "a")["skipped"]["clip"].startswith("needs prompts")
    untagged = {name: np.load(tmp_path / "zip.npz")[name] for name in ("mu", "sigma")}
    np.savez(tmp_path / "untagged.npz", **untagged)
    capsys.readouterr()
    words = [folders["FULL"], "--fid_reference", tmp_path / "untagged.npz", *SHAPES]
    assert score(*words, "--metrics", "fid", out=tmp_path / "c") == 0
    assert "has no tags; its preprocessing may differ" in capsys.readouterr().out
    assert result(tmp_path / "c")["metrics"]["fid"]["value"] == pytest.approx(0, abs=1e-4)


def test_a_zip_file_needs_a_place_for_the_result(tmp_path, capsys):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("a.png", png_bytes(Image.fromarray(pixels(0, 0, 0)), {}))
    for more in ([], ["--dry_run"]):
        assert run_script(main, [str(tmp_path / "a.zip"), *SHAPES, *more]) == 2
        assert "a.zip is a zip file, which takes no result; give --output_dir" in capsys.readouterr().err


def test_a_single_image_is_scored_by_what_needs_no_set(tmp_path, capsys):
    for name, noise in (("one", 9), ("full", 0)):
        (tmp_path / name).mkdir()
        Image.fromarray(pixels(0, 0, noise)).save(tmp_path / name / "a.png")
    words = [tmp_path / "one", "--reference", tmp_path / "full", "--fid_reference", tmp_path / "full", *SHAPES]
    assert score(*words, out=tmp_path / "out") == 0
    found = result(tmp_path / "out")
    assert set(found["metrics"]) == {"psnr", "psnr_global", "ssim"}
    for name in ("fid", "fid_fp"):
        assert found["skipped"][name] == "needs at least two images in each set"
    assert score(*words, "--metrics", "fid_fp", out=tmp_path / "no") == 2
    assert "--metrics fid_fp is unavailable: needs at least two images" in capsys.readouterr().err


def test_long_prompts_are_counted(tmp_path, capsys):
    folder = write_folder(tmp_path / "long", 0, True, prompt="a big red circle " * 20)
    assert score(folder, *SHAPES, "--metrics", "clip", out=tmp_path / "out") == 0
    assert "clip: 4 prompts are longer than the network reads" in capsys.readouterr().out


def test_forced_comparisons_say_so(folders, tmp_path, capsys):
    words = [folders["OTHER"], "--reference", folders["FULL"], "--metrics", "psnr", "--force"]
    assert score(*words, out=tmp_path / "out") == 0
    line = "warning: compared by --force: seed is 9, the reference's 3 (8 of 8 images)"
    assert line in capsys.readouterr().out and line[9:] in result(tmp_path / "out")["warnings"]
    assert result(tmp_path / "out")["mismatches"] == ["seed is 9, the reference's 3 (8 of 8 images)"]


def test_a_quantized_model_is_no_reference_without_a_word(folders, tmp_path, capsys):
    for name in ("QUANTIZED", "FULL"):
        assert score(folders[name], "--reference", folders[name], "--metrics", "psnr", "--dry_run", out=tmp_path) == 0
        words = f"--reference: {folders[name]} holds images of a quantized UNet, not of the full-precision model"
        assert (words in capsys.readouterr().out) == (name == "QUANTIZED")


def test_problems_of_images_are_counted(tmp_path, capsys):
    folder = write_folder(tmp_path / "black", 0, True, problem="black")
    assert score(folder, *SHAPES, "--metrics", "clip", out=tmp_path / "out") == 0
    assert "images with a problem are among those scored: 8 black" in capsys.readouterr().out


def test_images_that_held_nan_are_refused(tmp_path, capsys):
    """Two black images have a PSNR of 100 dB."""
    sound, broken = (write_folder(tmp_path / str(name), 0, True, problem=name) for name in (None, "nan"))
    for words, flag in (([broken, "--reference", sound], "IMAGES"), ([sound, "--reference", broken], "--reference")):
        assert score(*words, "--metrics", "psnr", out=tmp_path / "out") == 2
        assert f"{flag} {broken}: 8 of 8 images held NaN and are black" in capsys.readouterr().err
    assert score(sound, "--reference", broken, "--metrics", "psnr", "--force", out=tmp_path / "out") == 0
    assert "--reference: images with a problem are among those scored: 8 nan" in capsys.readouterr().out


def test_what_a_set_leaves_out_is_a_warning_of_the_result(tmp_path, capsys):
    folder = tmp_path / "images"
    folder.mkdir()
    for name in ("a.png", "b.gif"):
        Image.new("RGB", (16, 16), "red").save(folder / name)
    (folder / "c.heic").write_bytes(b"x")
    assert score(folder, "--reference", folder, "--metrics", "psnr", "--dry_run", out=tmp_path / "out") == 0
    line = f"IMAGES: {folder}: left out, in formats that are not read: 1 .heic (the first is 'c.heic')"
    assert f"warning: {line}" in capsys.readouterr().out
    assert score(folder, "--reference", folder, "--metrics", "psnr", out=tmp_path / "out") == 0
    assert result(tmp_path / "out")["num_images"] == 2 and line in result(tmp_path / "out")["warnings"]


def test_dry_run_writes_nothing(folders, tmp_path, capsys):
    assert score(folders["FULL"], *SHAPES, "--dry_run", out=tmp_path / "out") == 0
    assert "8 images of 4 prompts, clip, on 1" in capsys.readouterr().out and not (tmp_path / "out").exists()


@pytest.mark.parametrize("flag", ["IMAGES", "--reference", "--fid_reference"])
def test_dry_run_finds_an_image_that_cannot_be_read(folders, tmp_path, capsys, flag):
    folder = shutil.copytree(folders["FULL"], tmp_path / "images")
    (folder / "000001_00.png").write_bytes(b"damaged")
    words = [folder] if flag == "IMAGES" else [folders["FULL"], flag, folder]
    assert score(*words, *SHAPES, "--dry_run", out=tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {flag}: ") and error.endswith(
        "cannot be read as an image: it is damaged, or not an image\n"
    )
    shutil.make_archive(str(tmp_path / "images"), "zip", folder)
    words = [tmp_path / "images.zip"] if flag == "IMAGES" else [folders["FULL"], flag, tmp_path / "images.zip"]
    assert score(*words, *SHAPES, "--dry_run", out=tmp_path / "out") == 2
    assert "000001_00.png cannot be read as an image" in capsys.readouterr().err


def test_a_file_as_the_output_folder_is_refused_early(folders, tmp_path, capsys):
    (tmp_path / "file").touch()
    for out in (tmp_path / "file", tmp_path / "file" / "out"):
        assert score(folders["FULL"], *SHAPES, "--dry_run", out=out) == 2
        assert f"--output_dir {tmp_path / 'file'} is a file; give a folder" in capsys.readouterr().err


def test_another_model_is_named_without_digests(folders, tmp_path, capsys):
    folder = shutil.copytree(folders["FULL"], tmp_path / "images")
    run = json.loads((folder / "run.json").read_text())
    run["settings"]["model_sha256"] = "0" * 64
    (folder / "run.json").write_text(json.dumps(run))
    assert score(folder, "--reference", folders["FULL"], *SHAPES, out=tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert "MODEL differs from the reference's" in error and "0000" not in error


def test_the_size_of_the_model_comes_from_its_summary(folders, tmp_path):
    folder = shutil.copytree(folders["FULL"], tmp_path / "images")
    (tmp_path / "model" / "unet").mkdir(parents=True)
    (tmp_path / "model" / "summary.json").write_text('{"effective_bits_unet": 3.7, "bytes_of_unet": 5, "other": 1}')
    run = json.loads((folder / "run.json").read_text())
    run["settings"]["quantized"] = str(tmp_path / "model" / "unet")
    (folder / "run.json").write_text(json.dumps(run))
    assert score(folder, *SHAPES, out=tmp_path / "out") == 0
    assert result(tmp_path / "out")["size"] == {"effective_bits_unet": 3.7, "bytes_of_unet": 5}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("nowhere", "IMAGES: nowhere is not found"),
        ("src", "IMAGES: src holds no image"),
        ("README.md", "IMAGES: README.md is neither a folder nor a zip file"),
        ("FULL --metrics clop", "--metrics: clop is not a metric; allowed are clip, pickscore"),
        ("FULL --metrics psnr", "--metrics psnr is unavailable: needs --reference"),
        ("FULL --metrics fid", "--metrics fid is unavailable: needs --fid_reference"),
        ("FULL --reference FULL --metrics lpips", "alexnet-owt-7be5be79.pth is not in the folder of torch.hub"),
        (
            "FULL --metrics pickscore",
            "yuvalkirstain/PickScore_v1 is not on this machine; --pickscore_model names another",
        ),
        ("FULL --metrics image_reward --image_reward_model src", "src holds no ImageReward.pt"),
        ("FULL --fid_reference README.md", "README.md is neither a folder, a zip file nor .npz"),
        ("FULL --fid_reference no.npz", "--fid_reference: no.npz is not found"),
        ("FULL --fid_reference FULL --metrics kid SHAPES", "needs Inception's features"),
        ("FULL --fid_mode legacy SHAPES", "--fid_mode legacy is for Inception"),
        (
            "FULL --clip_model a/b --clip_pretrained c",
            "--clip_pretrained c is for an architecture of open_clip; --clip_model a/b has its own weights",
        ),
        ("FULL --save_stats x.npz", "--save_stats x.npz: "),
        ("FULL --save_features SHAPES", "--save_features has no effect without --save_stats; leave it out"),
        ("OTHER --reference FULL", "does not match: seed is 9, the reference's 3 (8 of 8 images); --force"),
        ("FULL --reference assets", "--reference: assets holds no image"),
        ("FULL", "nothing can be scored"),
        ("FULL --metrics hpsv2", "--metrics: hpsv2 is no longer a metric; use pickscore or image_reward"),
        ("FULL --metrics clip,mind", "--metrics: mind is no longer a metric; use fid or kid"),
        ("FULL --metrics cmmd", "cmmd is no longer a metric; use fid with --fid_features and a CLIP model"),
        ("FULL --metrics fd_dinov2", "use fid with --fid_features facebook/dinov2-large"),
        ("FULL --metrics clip_i", "--metrics: clip_i is no longer a metric; use lpips"),
        ("FULL --metrics dino_i", "--metrics: dino_i is no longer a metric; use lpips"),
        ("FULL --hpsv2_weights a.pt", "--hpsv2_weights is not a flag here: use pickscore or image_reward"),
        ("FULL --cmmd_model a", "--cmmd_model is not a flag here: use fid with --fid_features and a CLIP model"),
        ("FULL --fd_dinov2_model a", "is not a flag here: use fid with --fid_features facebook/dinov2-large"),
        ("FULL --clip_i_model a", "--clip_i_model is not a flag here: use lpips"),
        ("FULL --dino_i_model a", "--dino_i_model is not a flag here: use lpips"),
        ("FULL --met psnr", "unrecognized arguments: --met psnr"),
        ("FULL --clip_model assets --metrics clip", "allowed are open_clip, CLIP and DINOv2"),
    ],
)
def test_bad_input_is_one_line(folders, tmp_path, capsys, monkeypatch, words, message):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    known = {name: [str(path)] for name, path in folders.items()} | {"SHAPES": SHAPES}
    line = [part for word in shlex.split(words) for part in known.get(word, [word])]
    assert score(*line, out=tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert message in error and error.startswith("error: ") and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_unfinished_and_damaged_folders(folders, tmp_path, capsys):
    folder = shutil.copytree(folders["FULL"], tmp_path / "images")
    (folder / "manifest.0of1.rank0.jsonl").write_text("")
    assert score(folder, out=tmp_path / "out") == 2
    assert "is not finished; run the same generate.py with --resume" in capsys.readouterr().err
    (folder / "manifest.0of1.rank0.jsonl").unlink()
    (folder / "000001_00.png").write_bytes(b"damaged")
    assert score(folder, *SHAPES, "--metrics", "clip", out=tmp_path / "out") == 2
    assert "000001_00.png cannot be read as an image" in capsys.readouterr().err
    whole = (folders["FULL"] / "000001_00.png").read_bytes()
    (folder / "000001_00.png").write_bytes(whole[: len(whole) // 2])  # the header is sound
    assert score(folder, *SHAPES, "--metrics", "clip", out=tmp_path / "out") == 1
    assert "000001_00.png cannot be read as an image" in capsys.readouterr().err
    (folder / "000001_00.png").unlink()
    assert score(folder, *SHAPES, out=tmp_path / "out") == 2
    assert "000001_00.png and 0 more of its manifest are not found" in capsys.readouterr().err


def test_flags_reach_the_settings():
    words = (
        "I --reference R --fid_reference F.npz --metrics clip psnr --bs 7 --threads 2 --lpips_net vgg --seed 3 --force"
    )
    config = PARSER.parse(shlex.split(words))
    assert (config.images, config.reference, config.fid_reference) == ("I", "R", "F.npz")
    assert (config.metrics, config.bs, config.threads, config.lpips_net) == (("clip", "psnr"), 7, 2, "vgg")
    assert config.seed == 3 and config.force and config.folder == Path("I/metrics")
    assert PARSER.parse(["I", "--metrics", "clip,psnr"]).metrics == ("clip", "psnr")


def test_every_flag_of_the_documents_exists():
    lines = re.findall(r"^(?:python|accelerate launch) metrics\.py (.*)$", Path("docs/metrics.md").read_text(), re.M)
    lines += re.findall(r"^    (?:python|accelerate launch) metrics\.py (.*)$", metrics.__doc__, re.M)
    assert len(lines) > 8
    for words in (shlex.split(line, comments=True) for line in lines):
        if words[0] == "compare":
            COMPARE_PARSER.parse(words[1:])
        else:
            PARSER.parse(words)


def test_help_reads(capsys):
    for parser in (PARSER, COMPARE_PARSER):
        with pytest.raises(SystemExit) as caught:
            parser.parse(["--help"])
        text = capsys.readouterr().out
        assert caught.value.code == 0 and max(map(len, text.splitlines())) <= 120
    assert "compare RUN [RUN ...]" in text


def test_a_tracker_gets_every_value(folders, tmp_path, monkeypatch):
    logged = []
    monkeypatch.setattr("vqdm.metrics.job.Tracker.log", lambda self, values, step=None: logged.append(values))
    words = [folders["QUANTIZED"], "--reference", folders["FULL"], "--metrics", "psnr"]
    assert score(*words, out=tmp_path / "out") == 0
    assert logged == [{name: one["value"] for name, one in result(tmp_path / "out")["metrics"].items()}]
    assert set(logged[0]) == {"psnr", "psnr_global"}
