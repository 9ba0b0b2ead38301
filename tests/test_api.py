"""One Python call does what the program does."""

import copy
import json

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from main_text2image import main
from tiny_runs import file_hashes

import vqdm
from vqdm.api import QuantizationReport, quantize
from vqdm.cli import run_script
from vqdm.errors import UserError
from vqdm.layers.quantized import quantized_layers
from vqdm.prompts import default_file, load_prompts

PROMPTS = [f"a big red circle number {i}" for i in range(12)]
SETTINGS = dict(
    num_codebooks=2,
    nbits_per_codebook=4,
    in_group_size=4,
    layer_filter=r".*attn1\.to_q",
    num_inference_steps=2,
    max_epochs=1,
    init_max_iter=3,
    xtx_batch_size=5,
)
COUNTS = dict(calibration_nsamples=10, evaluation_nsamples=3, visualize_nsamples=2)


def flags(settings: dict) -> list[str]:
    return [word for name, value in settings.items() for word in (f"--{name}", str(value))]


@pytest.fixture(scope="module")
def written(pipelines, prompt_file, tmp_path_factory):
    """The folder that the program writes."""
    out = tmp_path_factory.mktemp("script") / "out"
    line = [str(pipelines["sdxl"]), str(prompt_file), str(prompt_file), "--output_dir", str(out)]
    assert run_script(main, [*line, *flags(SETTINGS | COUNTS)]) == 0
    return out


def test_a_loaded_pipeline_gives_the_programs_bytes_and_stays_as_it_is(written, pipelines, tmp_path):
    pipeline = DiffusionPipeline.from_pretrained(pipelines["sdxl"])
    modules, before = dict(pipeline.components), copy.deepcopy(pipeline.unet.state_dict())
    config, trainable = dict(pipeline.config), [one.requires_grad for one in pipeline.unet.parameters()]
    quantized, report = quantize(pipeline, PROMPTS, None, PROMPTS, tmp_path / "out", **SETTINGS, **COUNTS)
    assert file_hashes(tmp_path / "out") == file_hashes(written)
    assert all(pipeline.components[name] is part for name, part in modules.items())
    assert pipeline.unet.state_dict().keys() == before.keys() and dict(pipeline.config) == config
    assert all(torch.equal(value, before[name]) for name, value in pipeline.unet.state_dict().items())
    assert [one.requires_grad for one in pipeline.unet.parameters()] == trainable
    assert quantized is not pipeline and quantized.vae is pipeline.vae and quantized.device == pipeline.device
    saved = DiffusionPipeline.from_pretrained(written)
    call = dict(num_inference_steps=2, output_type="np")
    images = [one("a red circle", generator=torch.manual_seed(0), **call).images for one in (quantized, saved)]
    np.testing.assert_allclose(*images, atol=1e-4)  # in memory and from a file: equal within rounding
    summary = json.loads((written / "summary.json").read_text())
    assert report.bits_per_weight == summary["effective_bits_layers"]
    assert report.error_db == pytest.approx(summary["unet_output_error_db"], abs=0.01)
    assert report.bytes_after == summary["bytes_of_unet"]
    assert report.bytes_before == sum(4 * one.numel() for one in pipeline.unet.parameters())
    assert [row["name"] for row in report.layers] == [row["name"] for row in summary["layers"]]
    assert report.seconds["total"] > 0 and report.median_error_db < 0
    again, same = quantize(pipeline, PROMPTS, None, PROMPTS, tmp_path / "out", resume=True, **SETTINGS, **COUNTS)
    assert same == report and len(quantized_layers(again.unet)) == len(report.layers)
    pipeline.unet.conv_in.bias.data += 1
    with pytest.raises(UserError, match="WEIGHTS differ from those of the run"):
        quantize(pipeline, PROMPTS, None, PROMPTS, tmp_path / "out", resume=True, **SETTINGS, **COUNTS)


def test_a_path_and_files_need_no_output_folder(written, pipelines, prompt_file, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    quantized, report = quantize(pipelines["sdxl"], prompt_file, None, prompt_file, **SETTINGS, **COUNTS)
    assert not list(tmp_path.iterdir())
    saved = DiffusionPipeline.from_pretrained(written).unet.state_dict()
    assert all(torch.equal(value, saved[name]) for name, value in quantized.unet.state_dict().items())
    assert isinstance(report, QuantizationReport)


def test_prompts_that_ship_with_the_package_are_the_default(pipelines, monkeypatch, caplog):
    """For the call and the program; a shorter list of one's own is used as a whole."""
    asked = []

    def stop(config, finetune_blocks, pipeline, prompts):
        asked.append((config, prompts))
        return pipeline, None

    monkeypatch.setattr("vqdm.quantization.job.quantize", stop)
    pipeline = DiffusionPipeline.from_pretrained(pipelines["sdxl"])
    with caplog.at_level("INFO", "vqdm"):
        quantize(pipeline)
    (config, (calibration, evaluation)), told = asked[0], caplog.text
    assert (len(calibration), len(evaluation)) == (256, 64) and not set(calibration) & set(evaluation)
    assert calibration == load_prompts(default_file("calibration"), "")
    assert (config.target_bits, config.code, config.calibration_nsamples) == (3, "trellis", 256)
    assert (config.evaluation_nsamples, config.visualize_nsamples) == (32, 16)
    assert "no prompts given; using the calibration prompts that ship with vqdm" in told
    quantize(pipeline, PROMPTS, evaluation_prompts=PROMPTS[:3])
    config = asked[1][0]
    assert (config.calibration_nsamples, config.evaluation_nsamples, config.visualize_nsamples) == (12, 3, 3)


def test_the_call_is_of_the_package():
    assert vqdm.quantize is quantize and {"quantize", "QuantizationReport"} <= set(vqdm.__all__)


def test_the_program_uses_the_default_prompts(pipelines, tmp_path, capsys):
    line = [str(pipelines["sdxl"]), "--output_dir", str(tmp_path / "out"), "--dry_run"]
    assert run_script(main, line) == 0
    assert "no CALIBRATION_PROMPTS given; using the calibration prompts that ship" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (
            {"num_inference_step": 3},
            "num_inference_step is not a setting of quantize; did you mean num_inf",
        ),
        ({"dtype": "float16"}, "dtype belongs to a path"),
        ({"prompts": ["a", 3]}, "prompts: entry 2 is 3, a number"),
        ({"prompts": []}, "prompts: it holds no prompt"),
        ({"prompts": "nowhere.txt"}, "prompts: nowhere.txt is not found"),
        ({"evaluation_prompts": 7}, "evaluation_prompts is a number"),
        ({"nbits_per_codebook": 4}, "--nbits_per_codebook 4 has no effect with --target_bits; leave it out"),
        ({"layer_filter": "nope"}, "--layer_filter nope matches no layer"),
        ({"scheduler": "nope"}, "--scheduler is 'nope'; allowed are default"),
        ({"xtx_batch_size": "4"}, "--xtx_batch_size is '4'; allowed are whole numbers from 1"),
        ({"push_to_hub": True}, "push_to_hub is not a setting of quantize"),
        ({"pipeline": 3}, "pipeline is a number; give a loaded pipeline"),
        ({"pipeline": "no/such/folder"}, "MODEL no/such/folder is not found"),
    ],
)
def test_wrong_arguments_are_named(pipelines, settings, words):
    pipeline = settings.pop("pipeline", None) or DiffusionPipeline.from_pretrained(pipelines["sdxl"])
    arguments = dict(prompts=PROMPTS, evaluation_prompts=PROMPTS) | settings
    with pytest.raises(ValueError, match="") as error:
        quantize(pipeline, **arguments)
    assert isinstance(error.value, UserError) and words in str(error.value)
