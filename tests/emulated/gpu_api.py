"""What users do in Python with a quantized pipeline, on emulated GPUs; a function is a test of test_emulated_api.py."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import pytest
import tiny_students
import torch
from diffusers import DiffusionPipeline
from diffusers.utils import convert_state_dict_to_diffusers
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from tiny_transformers import flux_image, quantized_flux

from vqdm.additive import scoring
from vqdm.additive import scoring_triton as kernels
from vqdm.additive.solve import SolverConfig, solve_layer
from vqdm.devices import check_float64, peak_memory, pick_device, pick_dtype
from vqdm.diffusion.pipelines import parts_in_use
from vqdm.diffusion.sensitivity import output_effects
from vqdm.diffusion.streams import BlockSwapper
from vqdm.errors import UserError
from vqdm.finetuning.loop import Checkpoints
from vqdm.layers.decode import decode, set_decode_backend
from vqdm.layers.quantized import decoded_once, quantized_layers
from vqdm.parallel import launched
from vqdm.quantization.text_encoder import TextCalibration, embedding_errors, encode, encoded_again

FIRST, SECOND = torch.device("cuda", 0), torch.device("cuda", 1)
STEPS = {"num_inference_steps": 2, "output_type": "pt"}


def loaded(folder: str, **options) -> DiffusionPipeline:
    pipeline = DiffusionPipeline.from_pretrained(folder, **options)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def image_of(pipeline: DiffusionPipeline, generator: torch.Generator | None = None) -> torch.Tensor:
    generator = generator or torch.Generator().manual_seed(0)
    return pipeline("a red circle", generator=generator, **STEPS).images.float().cpu()


def use_on_both_devices(folder: str) -> None:
    """`pipe.to` either GPU with kernels of Triton gives the CPU's image; 16 bit and generators on the GPU work."""
    wanted = image_of(loaded(folder))
    for device in ("cuda", "cuda:1"):
        pipeline = loaded(folder).to(device)
        set_decode_backend("triton")
        torch.testing.assert_close(image_of(pipeline), wanted, rtol=1e-3, atol=1e-3)
        set_decode_backend(None)
        half = loaded(folder, dtype=torch.bfloat16).to(device)
        assert image_of(half, torch.Generator(device).manual_seed(0)).isfinite().all()
        with decoded_once(half.unet):
            assert image_of(half).isfinite().all()


def place_parts_on_different_devices(folder: str) -> None:
    """The UNet on the second GPU, all else on the first, as a device map may put them."""
    pipeline = loaded(folder, device_map="balanced")
    assert image_of(pipeline).isfinite().all()
    unet = loaded(folder).unet.to(SECOND)
    set_decode_backend("triton")
    for layer in quantized_layers(unet).values():
        assert layer.weight.device == SECOND


def offload_models(folder: str) -> None:
    wanted = image_of(loaded(folder))
    for device in (FIRST, SECOND):
        pipeline = loaded(folder)
        pipeline.enable_model_cpu_offload(device=device)
        torch.testing.assert_close(image_of(pipeline), wanted, rtol=1e-3, atol=1e-3)
        assert pipeline.unet.device.type == "cpu"


def offload_layers_in_turn(folder: str) -> None:
    wanted, pipeline = image_of(loaded(folder)), loaded(folder)
    pipeline.enable_sequential_cpu_offload(device=SECOND)
    torch.testing.assert_close(image_of(pipeline), wanted, rtol=1e-3, atol=1e-3)


def offload_groups(folder: str) -> None:
    """Codebooks that layers share are offloaded too, and are there when a layer decodes."""
    wanted = image_of(loaded(folder))
    for kind in ({"offload_type": "leaf_level"}, {"offload_type": "block_level", "num_blocks_per_group": 1}):
        for use_stream in (False, True):
            pipeline = loaded(folder)
            for part in (pipeline.text_encoder, pipeline.text_encoder_2, pipeline.vae):
                part.to(SECOND)
            pipeline.unet.enable_group_offload(onload_device=SECOND, use_stream=use_stream, **kind)
            torch.testing.assert_close(image_of(pipeline), wanted, rtol=1e-3, atol=1e-3)
            assert {tensor.device.type for tensor in pipeline.unet.parameters()} == {"cpu"}


def offload_a_transformer(_: str) -> None:
    """FLUX.1, whole, layer by layer, and block by block as in calibration: then one block at a time is on the GPU."""
    wanted, flux = flux_image(quantized_flux()), quantized_flux()
    flux.enable_model_cpu_offload(device=FIRST)
    torch.testing.assert_close(flux_image(flux).cpu(), wanted, rtol=1e-3, atol=1e-3)
    assert flux.transformer.device.type == "cpu"
    flux = quantized_flux()
    flux.enable_sequential_cpu_offload(device=SECOND)
    torch.testing.assert_close(flux_image(flux).cpu(), wanted, rtol=1e-3, atol=1e-3)
    flux, there = quantized_flux(), []
    swapper = BlockSwapper(flux.transformer, SECOND)
    blocks = [flux.transformer.get_submodule(name) for name in swapper.names]
    for block in blocks:
        block.register_forward_hook(lambda *_: there.append([{one.device for one in b.parameters()} for b in blocks]))
    with parts_in_use(flux):
        torch.testing.assert_close(flux_image(flux).cpu(), wanted, rtol=1e-3, atol=1e-3)
    assert [[SECOND in devices for devices in some] for some in there] == torch.eye(len(blocks)).bool().tolist()
    assert all(len(devices) == 1 for some in there for devices in some)
    swapper.close()
    assert {one.device.type for one in flux.transformer.parameters()} == {"cpu"}


def train_save_and_load_an_adapter(folder: str) -> None:
    pipeline = loaded(folder, dtype=torch.float32).to(SECOND)
    unet = pipeline.unet.requires_grad_(False)
    unet.add_adapter(LoraConfig(r=2, lora_alpha=2, init_lora_weights=False, target_modules=["to_q", "ff.net.2"]))
    trained = [tensor for tensor in unet.parameters() if tensor.requires_grad]
    call = tiny_students.points(tiny_students.teacher(), 1, 1).batch([(0, 0, 0)], SECOND, torch.float32).call
    unet(**call).sample.square().mean().backward()
    torch.optim.AdamW(trained).step()
    wanted = image_of(pipeline)
    layers = convert_state_dict_to_diffusers(get_peft_model_state_dict(unet))
    with tempfile.TemporaryDirectory() as out:
        type(pipeline).save_lora_weights(out, unet_lora_layers=layers)
        for place in (lambda pipe: pipe.to(SECOND), lambda pipe: pipe.enable_model_cpu_offload(device=SECOND)):
            other = loaded(folder, dtype=torch.float32)
            other.load_lora_weights(out)
            place(other)
            torch.testing.assert_close(image_of(other), wanted, rtol=1e-3, atol=1e-3)


def save_and_dequantize(folder: str) -> None:
    pipeline = loaded(folder).to(SECOND)
    wanted = image_of(pipeline)
    with tempfile.TemporaryDirectory() as out:
        pipeline.save_pretrained(out)
        assert torch.equal(image_of(loaded(out).to(SECOND)), wanted)
    pipeline.unet.dequantize()
    pipeline.unet.float()  # decoded weights come in 16 bit
    assert {tensor.device for tensor in pipeline.unet.parameters()} == {SECOND}
    torch.testing.assert_close(image_of(pipeline), wanted, rtol=1e-2, atol=1e-2)


def measure_layers_of_a_text_encoder(folder: str) -> None:
    """Embeddings, and how much a layer moves them, where the encoders are and the denoiser is not."""
    pipeline = loaded(folder, dtype=torch.float16).to(SECOND)
    made = encode(pipeline, ["a red circle", "a star"], {"num_inference_steps": 1})
    pipeline.unet.to("cpu")
    held = TextCalibration(pipeline, "text_encoder_2", [made], [])
    layer = next(one for one, part in held.model.named_modules() if isinstance(part, torch.nn.Linear))
    module, calls = held.effects(2)
    change = {layer: torch.ones(held.model.get_submodule(layer).weight.shape)}
    held.model.requires_grad_(False)
    assert output_effects(module, change, calls, torch.Generator().manual_seed)[layer] > 0
    assert not embedding_errors([made.results], [encoded_again(pipeline, made, SECOND)])
    (call,), _ = held.calls()
    assert call()["input_ids"].device == SECOND


def solve_layers_of_every_format(_: str) -> None:
    generator = torch.Generator().manual_seed(0)
    W, H = torch.randn(16, 32, generator=generator).to(SECOND), torch.eye(32, device=SECOND)
    for name, spec in tiny_students.FORMATS.items():
        if spec.shared_codebooks:
            continue
        for encoder in ("ldl", "beam"):
            config = SolverConfig(spec=spec, max_epochs=2, beam_size=2, init_max_iter=1, encoder=encoder)
            code, report = solve_layer(W, H, config, torch.Generator().manual_seed(0), held_out=H)
            assert code.codes.device == SECOND and 0 < report.error < 1, (name, encoder)


def launch_kernels_beside_the_current_device(_: str) -> None:
    """With the first GPU as the current one, kernels run on the second, where their tensors are."""
    assert torch.cuda.current_device() == 0
    for spec in tiny_students.FORMATS.values():
        for layer in quantized_layers(tiny_students.student(spec).to(SECOND)).values():
            found = decode(layer._stored(), torch.float32, backend="triton")
            torch.testing.assert_close(found, decode(layer._stored(), torch.float32, backend="torch"))
    residuals, codebook = torch.randn(5, 2, 4, device=SECOND), torch.randn(16, 4, device=SECOND)
    found, wanted = (find(residuals, codebook, 3)[0] for find in (kernels.best_entries, scoring.torch_best_entries))
    torch.testing.assert_close(found.sort().values, wanted.sort().values)
    assert scoring.fused_scoring(codebook) is not None and torch.cuda.current_device() == 0


def launch_a_program_on(device: str, wanted: torch.device) -> None:
    """The chosen device becomes the current one, and is the one that is measured and whose random state is kept."""
    with launched(device) as ranks:
        assert ranks.device == wanted and torch.cuda.current_device() == wanted.index
        assert torch.zeros(1, device="cuda").device == wanted
        assert peak_memory()["cuda"] == peak_memory(ranks.device)["cuda"] == 1 + wanted.index
        torch.cuda.set_device(FIRST)  # what another library may do
        with tempfile.TemporaryDirectory() as out:
            held = Checkpoints(Path(out), 2, ranks.device)
            state = torch.arange(16, dtype=torch.uint8)
            torch.cuda.set_rng_state(state, wanted)
            held.save(1, {}, {"best": {"step": 1}})
            torch.cuda.set_rng_state(state.flip(0), wanted)
            held.load(1)
        assert torch.equal(torch.cuda.get_rng_state(wanted), state)
        assert peak_memory(ranks.device)["cuda"] == 1 + wanted.index


def launch_programs(_: str) -> None:
    launch_a_program_on("auto", FIRST)


def launch_programs_on_the_second(_: str) -> None:
    launch_a_program_on("cuda:1", SECOND)


def leave_the_gpus_alone(_: str) -> None:
    """A run on the CPU neither measures a GPU nor keeps its random state."""
    with launched("cpu") as ranks, tempfile.TemporaryDirectory() as out:
        assert ranks.device.type == "cpu" and peak_memory(ranks.device).keys() == {"host"}
        Checkpoints(Path(out), 2, ranks.device).save(1, {}, {"best": {"step": 1}})
        assert b"cuda" not in (Path(out) / "checkpoint-1" / "random.safetensors").read_bytes()


def choose_types(_: str) -> None:
    """bfloat16 only where the GPU has it."""
    own = torch.bfloat16 if os.environ.get("EMUCUDA_KIND", "hopper") == "hopper" else torch.float16
    assert pick_device("auto").type == "cuda"
    assert [pick_dtype("auto", device) for device in (FIRST, SECOND, torch.device("cpu"))] == [own, own, torch.float32]
    assert pick_dtype("auto", torch.device("mps")) == torch.float16
    assert pick_dtype("float32", FIRST) == torch.float32
    check_float64(SECOND)
    with pytest.raises(UserError, match="--device cuda:2 cannot be used"):
        pick_device("cuda:2")


def main(words: list[str]) -> None:
    globals()[words[0]](*words[1:])
