"""The programs on emulated GPUs: no tensor meets one of another device, in any type, and every run ends well.

A few chains run always; all of them, and runs that are killed and resumed, with `-m long`.
"""

import json
import shlex
import signal
import sys
from functools import partial

import pytest
import torch
from gpu_programs import CHAINS, FINETUNE, GENERATE, OWN, SAMPLED, TARGET, finetuned, generated, quantized
from programs import digests
from tiny_transformers import FAMILIES, quantized_flux, tiny_transformer_pipeline

LONG = pytest.mark.long
ONCE = "--finetune_max_epochs 1 "
QUICK = {
    "quantize": quantized(
        OWN + "--device cuda:1 --dtype float16 --unquantized_nbits 8 "
        "--num_intermediate_finetunes 1 --finetune_nsamples 2 --finetune_batch_size 2"
    ),
    "quantize to a target": quantized(TARGET + "--dtype auto"),
    "finetune auto": finetuned(ONCE + "--visualize_step 2 --finetune_method student+teacher"),
    "finetune float16": finetuned(ONCE + "--dtype float16 --update_codes --decode call --device cuda:1"),
    "generate": generated("--offload sequential"),
    "metrics": CHAINS["metrics cuda:1"],
}

TRANSFORMERS = "--calibration_nsamples 2 --height 32 --width 32 "
FEW = "--layer_filter (blocks|layers).0.*(mod|norm|to_q|ff(?!.conv_depth)|mlp|w1) "
ALLOCATED = "--layer_filter (blocks|layers).0.*to_q --target_bits 6 --state_bits 8 --sensitivity_points 2 "


def transformer(family: str, given, out) -> list[list]:
    """Quantize, fine-tune, and generate with a tiny transformer of a family."""
    model, prompts, size = out.parent / family, given.prompts, shlex.split("--height 32 --width 32")
    tiny_transformer_pipeline(family).save_pretrained(model)
    tuned, options = out.parent / f"{family}-tuned", OWN + SAMPLED + TRANSFORMERS + FEW
    return [
        ["main_text2image", model, prompts, prompts, "--output_dir", out, *shlex.split(options)],
        ["finetune", model, out, prompts, prompts, "--output_dir", tuned, *size, *shlex.split(FINETUNE + ONCE)],
        ["generate", model, tuned, prompts, "--output_dir", out.parent / "images", *size, *shlex.split(GENERATE)],
    ]


def test_a_transformer(on_gpus, materials, tmp_path):
    run_chain(lambda given, out: transformer("qwen-image", given, out)[:1], on_gpus, materials, tmp_path / "out")


@pytest.mark.parametrize(
    "options", [ALLOCATED + "--offload ram", pytest.param(OWN + FEW + "--offload disk", marks=LONG)]
)
def test_a_transformer_block_by_block(options, on_gpus, materials, tmp_path):
    """One block on the GPU, in the backward passes for what layers are worth too."""

    def chain(given, out):
        line = transformer("flux", given, out)[0]
        return [[*line[: line.index("--num_codebooks")], *shlex.split(SAMPLED + TRANSFORMERS + options)]]

    run_chain(chain, on_gpus, materials, tmp_path / "out")


@pytest.mark.long
@pytest.mark.parametrize("family", FAMILIES)
def test_each_family_of_transformers(family, on_gpus, materials, tmp_path):
    run_chain(partial(transformer, family), on_gpus, materials, tmp_path / "out")


@pytest.mark.long
@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_of_each_family(family, on_gpus, materials, tmp_path):
    """For what layers are worth to the output: on a GPU activations are computed twice, and must come out alike."""

    def allocate(given, out) -> list[list]:
        line = transformer(family, given, out)[0]
        return [[*line[:6], *shlex.split(SAMPLED + TRANSFORMERS + ALLOCATED)]]

    run_chain(allocate, on_gpus, materials, tmp_path / "out")


RESUMED = ("quantize auto", "quantize intermediate", "finetune float16", "finetune codes float16")


@pytest.mark.parametrize("name", QUICK)
def test_program(name, on_gpus, materials, tmp_path):
    run_chain(QUICK[name], on_gpus, materials, tmp_path / "out")


PLACES = {
    "quantize": quantized(TARGET + "--dtype float16"),
    "finetune": finetuned(
        ONCE + "--dtype float16 --finetune_method real+teacher --real_images {images} --scheduler ddim"
    ),
}


@pytest.mark.parametrize("name", PLACES)
def test_text_encoders_and_vae_leave_the_gpu_while_they_rest(name, on_gpus, materials, tmp_path):
    on_gpus(["gpu_places", *PLACES[name](materials, tmp_path / "out")[0]])


@pytest.mark.parametrize("name", [pytest.param("finetune blocks", marks=LONG), "finetune blocks float16"])
def test_one_block_of_each_model_is_on_the_gpu(name, on_gpus, materials, tmp_path):
    on_gpus(["gpu_blocks", *CHAINS[name](materials, tmp_path / "out")[0]])


WAITING = (
    "--height 32 --width 32 --num_inference_steps 2 --evaluation_nsamples 1 --visualize_nsamples 0 --dtype bfloat16 "
)
BY_BLOCK = {
    "finetune": "--finetune_scope blocks --block_cache ram --block_steps 1 --block_points 8 --finetune_nsamples 4 "
    "--held_out_nsamples 1 --held_out_points 2 --finetune_batch_size 2 --local_batch_size 2 --finetune_lr 0.01",
    "main_text2image": "--offload ram --calibration_nsamples 4 --layer_filter blocks.0.*to_q "
    "--target_bits 6 --state_bits 8 --sensitivity_points 2",
}


@pytest.mark.long
@pytest.mark.skipif(sys.platform != "linux", reason="where files are mapped is read from /proc")
@pytest.mark.parametrize("program", BY_BLOCK)
def test_what_is_planned_of_ram_is_what_tensors_take(program, on_gpus, tmp_path):
    """Weights that are mapped from files in the type that is computed in are not among them."""
    model, student, prompts = (tmp_path / name for name in ("model", "quantized", "prompts.txt"))
    tiny_transformer_pipeline("flux").to(torch.bfloat16).save_pretrained(model)
    quantized_flux().save_pretrained(student)
    prompts.write_text("\n".join(f"a red circle, number {k}" for k in range(20)))
    given = [model, *([student] if program == "finetune" else []), prompts, prompts, "--output_dir", tmp_path / "out"]
    on_gpus(["gpu_ram", program, *given, *shlex.split(WAITING + BY_BLOCK[program])])


@pytest.mark.long
@pytest.mark.parametrize("name", CHAINS)
def test_matrix(name, on_gpus, materials, tmp_path):
    run_chain(CHAINS[name], on_gpus, materials, tmp_path / "out")


def run_chain(chain, on_gpus, materials, out) -> None:
    for words in chain(materials, out):
        process = on_gpus(words)
        assert "unexpected" not in process.said()
    assert out.is_dir()


@pytest.mark.long
@pytest.mark.parametrize("kernels", ["triton", "triton_tf32"])
def test_quantizing_with_kernels(kernels, on_gpus, materials, tmp_path):
    """In Triton's interpreter, on the second GPU."""
    words = CHAINS["quantize cuda:1"](materials, tmp_path / "out")[0]
    on_gpus(words, VQDM_SCORING=kernels, VQDM_DECODE="triton")


@pytest.mark.long
@pytest.mark.parametrize("name", RESUMED)
@pytest.mark.parametrize("share", [0.3, 0.7])
def test_killed_and_resumed(name, share, on_gpus, materials, tmp_path):
    """The result is the same to the last byte as that of an uninterrupted run."""
    whole, halted = tmp_path / "whole", tmp_path / "halted"
    changes = on_gpus(CHAINS[name](materials, whole)[0], crash={"at": 0, "signal": 0}).changes()
    words = CHAINS[name](materials, halted)[0]
    on_gpus(words, status=-signal.SIGKILL, crash={"at": int(share * changes), "signal": signal.SIGKILL})
    on_gpus([*words, "--resume"])
    assert digests(halted, "*/*.safetensors") == digests(whole, "*/*.safetensors")


@pytest.mark.long
@pytest.mark.parametrize(("kind", "dtype"), [("hopper", "bfloat16"), ("turing", "float16")])
def test_the_automatic_type_is_that_of_the_gpu(kind, dtype, on_gpus, materials, tmp_path):
    on_gpus(CHAINS["generate auto"](materials, tmp_path / "out")[0], EMUCUDA_KIND=kind)
    assert json.loads((tmp_path / "out" / "run.json").read_text())["settings"]["dtype"] == dtype
