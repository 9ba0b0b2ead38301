"""Each family of diffusion transformers, as a tiny random pipeline, through all programs."""

import json
import shlex
from pathlib import Path

import convert
import finetune
import generate
import main_text2image
import metrics
import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, FluxImg2ImgPipeline, PipelineQuantizationConfig, StableDiffusion3Pipeline
from peft import LoraConfig, get_peft_model_state_dict
from PIL import Image
from tiny_transformers import FAMILIES, SIZE, flux_image, quantized_flux, sd3, tiny_transformer_pipeline
from torch import nn

import vqdm
from vqdm.cli import run_script
from vqdm.diffusion.denoisers import block_names
from vqdm.storage.hf import VqdmConfig

SAMPLED = [*SIZE, "--num_inference_steps", "2", "--device", "cpu"]
QUANTIZE = shlex.split(
    "--num_codebooks 1 --nbits_per_codebook 4 --in_group_size 4 --max_epochs 1 --beam_size 1 --init_max_iter 1 "
    "--calibration_nsamples 2 --evaluation_nsamples 1 --visualize_nsamples 1 --xtx_batch_size 2"
)
FINETUNE = shlex.split(
    "--finetune_nsamples 2 --held_out_nsamples 1 --evaluation_nsamples 1 --finetune_batch_size 2 --local_batch_size 2 "
    "--finetune_max_epochs 1 --max_steps 2 --visualize_nsamples 1 --xtx_batch_size 2"
)
SCORES = ["--clip_model", "assets/shapes-clip", "--fid_features", "assets/shapes-clip", "--report_images", "1"]

pytestmark = pytest.mark.usefixtures("one_thread")


def run(program, *words) -> None:
    assert run_script(program.main, [str(word) for word in words]) == 0


def pixels(folder: Path) -> np.ndarray:
    return np.stack([np.asarray(Image.open(file)) for file in sorted(folder.glob("*.png"))]).astype(int)


@pytest.fixture
def prompts(tmp_path) -> Path:
    """Of different lengths, for which some pipelines make tensors of different shapes."""
    path = tmp_path / "prompts.txt"
    path.write_text("a circle\na big red circle\na star and a big green heart\na blue star\na small cross\n")
    return path


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_through_all_programs(family, tmp_path, prompts):
    model, quantized, tuned = tmp_path / "model", tmp_path / "quantized", tmp_path / "tuned"
    pipeline = tiny_transformer_pipeline(family)
    pipeline.save_pretrained(model)
    encoders = [name for name in pipeline.components if name.startswith("text_encoder")]
    parts = ["--components", ",".join(["transformer", *encoders])]
    run(main_text2image, model, prompts, prompts, "--output_dir", quantized, *SAMPLED, *QUANTIZE, *parts)
    summary = json.loads((quantized / "summary.json").read_text())
    blocks = tuple(f"{name}." for name in block_names(pipeline.transformer))
    inside = [one for name, one in pipeline.transformer.named_modules() if name.startswith(blocks)]
    layers = [one for one in inside if isinstance(one, nn.Linear | nn.Conv2d) and getattr(one, "groups", 1) == 1]
    assert summary["layers_quantized"] == len(layers) > 10
    assert summary["transformer_output_error_db"] < -5 and summary["component"] == "transformer"
    assert summary["bytes_of_transformer"] < 0.75 * summary["bytes_of_original_transformer"]
    assert list(summary["text_encoders"]) == encoders and summary["embeddings_error_db"]["all"] < 0
    assert summary["bytes_of_pipeline"] < 0.9 * summary["bytes_of_original_pipeline"]
    run(finetune, model, quantized, prompts, prompts, "--output_dir", tuned, *SAMPLED, *FINETUNE)
    changed = json.loads((tuned / "summary.json").read_text())
    assert changed["transformer_output_error_db"] <= changed["transformer_output_error_db_before"] + 0.01
    for name, more in {"full": [], "few": [tuned]}.items():
        run(generate, model, *more, prompts, "--output_dir", tmp_path / name, "--limit", "2", "--bs", "2", *SAMPLED)
    run(metrics, tmp_path / "few", "--reference", tmp_path / "full", "--output_dir", tmp_path / "scores", *SCORES)
    scored = json.loads((tmp_path / "scores" / "metrics.json").read_text())
    assert scored["size"]["bytes_of_transformer"] == changed["bytes_of_transformer"]
    run(convert, "dequantize", tuned, "--output_dir", tmp_path / "plain")
    run(generate, tmp_path / "plain", prompts, "--output_dir", tmp_path / "same", "--limit", "2", "--bs", "2", *SAMPLED)
    assert np.abs(pixels(tmp_path / "same") - pixels(tmp_path / "few")).max() <= 2


@pytest.mark.parametrize("index", ["null", "missing"])
def test_stable_diffusion_3_without_its_t5(index, tmp_path, prompts):
    """As people keep it, to spare its 9 GB; it stays without one."""
    torch.manual_seed(0)
    model, quantized = tmp_path / "model", tmp_path / "quantized"
    sd3(third=False).save_pretrained(model)
    held = json.loads((model / "model_index.json").read_text())
    assert held["text_encoder_3"] == [None, None]
    if index == "missing":
        held = {name: value for name, value in held.items() if not name.endswith("_3")}
        (model / "model_index.json").write_text(json.dumps(held))
    few = ["--layer_filter", r"transformer_blocks\.1\.ff\.net\.2", *QUANTIZE]
    run(main_text2image, model, prompts, prompts, "--output_dir", quantized, *SAMPLED, *few)
    run(generate, model, quantized, prompts, "--output_dir", tmp_path / "images", "--limit", "1", *SAMPLED)
    again = DiffusionPipeline.from_pretrained(quantized, text_encoder_3=None, tokenizer_3=None)
    assert again.transformer.is_quantized and not list(quantized.glob("*_3"))
    run(convert, "dequantize", quantized, "--output_dir", tmp_path / "plain")
    few = dict(layer_filter=few[1], num_inference_steps=2, height=32, width=32, output_dir=tmp_path / "again")
    given = StableDiffusion3Pipeline.from_pretrained(model, text_encoder_3=None, tokenizer_3=None)
    _, report = vqdm.quantize(given, ["a circle", "a star"], None, ["a big circle"], **few, visualize_nsamples=0)
    assert len(report.layers) == 1 and given.text_encoder_3 is None


def test_block_by_block_is_the_same_run(tmp_path, prompts):
    """Bits divided by effects, with one block on the device and the inputs of blocks in RAM or on the disk."""
    tiny_transformer_pipeline("flux").save_pretrained(tmp_path / "model")
    few = ["--layer_filter", r"(attn.to_q|ff.net.2|proj_out)", "--target_bits", "5", "--state_bits", "8"]
    few += ["--sensitivity_points", "2", *QUANTIZE[-8:]]
    bits, errors = {}, {}
    for where in ("none", "ram", "disk"):
        folder = tmp_path / where
        words = [prompts, prompts, "--output_dir", folder, *SAMPLED, *few, "--offload", where]
        run(main_text2image, tmp_path / "model", *words)
        plan = json.loads((folder / "plan.json").read_text())
        bits[where] = {name: spec["segment_bits"] for name, spec in plan.items()}
        errors[where] = json.loads((folder / "summary.json").read_text())["transformer_output_error_db"]
    assert bits["ram"] == pytest.approx(bits["disk"], rel=0.05) and len(bits["ram"]) == len(bits["none"]) == 7
    assert errors["ram"] == pytest.approx(errors["disk"], abs=0.5)
    assert errors["ram"] == pytest.approx(errors["none"], abs=3)  # which also records held-out Hessians


@pytest.fixture(scope="module")
def flux(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("flux")
    quantized_flux().save_pretrained(folder, max_shard_size="100KB")
    return folder


def loaded(folder: Path, **given):
    pipeline = DiffusionPipeline.from_pretrained(folder, **given)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def test_a_quantized_transformer_in_use(flux, tmp_path):
    """Shards, group offloading, compiled blocks, and a LoRA that is saved and loaded."""
    pipeline, again = quantized_flux(), loaded(flux)
    expected = flux_image(pipeline)
    assert len(list((flux / "transformer").glob("*.safetensors"))) > 1
    torch.testing.assert_close(flux_image(again), expected, rtol=1e-4, atol=1e-5)
    again.transformer.compile_repeated_blocks(fullgraph=True, backend="eager")
    torch.testing.assert_close(flux_image(again), expected)
    cpu = torch.device("cpu")
    lora = LoraConfig(r=4, lora_alpha=4, target_modules=["to_q", "proj_mlp"], init_lora_weights=False)
    pipeline.transformer.add_adapter(lora)
    adapted, layers = flux_image(pipeline), get_peft_model_state_dict(pipeline.transformer)
    assert not torch.allclose(adapted, expected, atol=1e-3)
    with pytest.raises(ValueError, match=r"an adapter at .* with which a saved folder cannot be loaded"):
        pipeline.save_pretrained(tmp_path / "refused")
    type(pipeline).save_lora_weights(tmp_path / "lora", transformer_lora_layers=layers)
    other = loaded(flux)
    other.transformer.enable_group_offload(cpu, cpu, "block_level", num_blocks_per_group=1)
    other.load_lora_weights(tmp_path / "lora")
    torch.testing.assert_close(flux_image(other), adapted)


def test_a_quantized_transformer_moves_between_pipelines(flux, tmp_path):
    """Loaded with the quantization named, cast, saved again, shared with another pipeline, and dequantized."""
    held = VqdmConfig.of(loaded(flux).transformer)
    named = PipelineQuantizationConfig(quant_mapping={"transformer": held})
    with pytest.warns(UserWarning, match="already has a `quantization_config`"):
        pipeline = loaded(flux, quantization_config=named)
    expected = flux_image(pipeline)
    pipeline.to(torch.bfloat16).to(torch.float32).save_pretrained(tmp_path / "again")
    assert VqdmConfig.of(loaded(tmp_path / "again").transformer).to_dict() == held.to_dict()
    pipeline = loaded(flux)
    other = FluxImg2ImgPipeline.from_pipe(pipeline)
    assert other.transformer is pipeline.transformer and other.transformer.is_quantized
    given = {"image": torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(1)), "num_inference_steps": 2}
    made = flux_image(other, **given)
    assert torch.equal(flux_image(pipeline), expected)
    pipeline.transformer.dequantize()
    pipeline.transformer.float()  # decoded weights come in 16 bit
    torch.testing.assert_close(flux_image(other, **given), made, rtol=1e-3, atol=1e-3)
    tiny_transformer_pipeline("flux").save_pretrained(tmp_path / "plain")
    with pytest.raises(ValueError, match="pre-quantized"):
        loaded(tmp_path / "plain", quantization_config=named)
