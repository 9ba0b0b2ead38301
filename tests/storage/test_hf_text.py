import copy
import json
import re
from functools import partial

import pytest
import torch
from conftest import tiny_pipeline
from diffusers import StableDiffusionXLPipeline
from numerics import assert_close_outputs, assert_same_tensors
from safetensors.torch import load_file, save_file
from test_hf import image_of, quantized_unet
from test_quantized import SPECS, random_code
from tiny_transformers import gemma3, language_sizes, mistral, qwen3, qwen_image, t5
from torch import nn
from transformers import CLIPTextModel, CLIPTextModelWithProjection, Gemma2Config, Gemma2Model

from train_text import known_words, make_tokenizer
from vqdm.additive.code import CodeSpec
from vqdm.layers.int8 import int8_layers, quantize_int8
from vqdm.layers.quantized import QuantizedLinear, quantized_layers, swap
from vqdm.quantization.text_encoder import text_layers
from vqdm.storage.hf import FORMAT_VERSION, mark_text_quantized, short_name

pytestmark = pytest.mark.usefixtures("odd_addresses")
KINDS = {"text_encoder": CLIPTextModel, "text_encoder_2": CLIPTextModelWithProjection}
IDS = torch.tensor([[1, 2, 3, 4, 5]])
VICTIM = "encoder.layers.1.mlp.fc1.codebooks"


def quantized_text_encoder(part: str, spec=SPECS[0]) -> nn.Module:
    """A tiny text encoder with random codes, and one layer in 8 bit."""
    model = getattr(tiny_pipeline("sdxl"), part).eval()
    first = text_layers(model, spec)[0]
    quantize_int8(model, first.name)
    return random_text_encoder(model, spec)


def random_text_encoder(model: nn.Module, spec=SPECS[0]) -> nn.Module:
    """The model with random codes in its text layers, but for those that are int8; in place."""
    for layer in text_layers(model, spec):
        if hasattr(model.get_submodule(layer.name), "stored_tensors"):
            continue
        swap(model, layer.name, spec).set_code(random_code(spec, layer.rows, layer.columns))
    mark_text_quantized(model)
    return model


def run(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS, output_hidden_states=True).hidden_states[-1]


@pytest.mark.parametrize("part", KINDS)
@pytest.mark.parametrize("options", [{}, {"max_shard_size": "20KB"}])
def test_round_trip_is_exact(tmp_path, part, options):
    model = quantized_text_encoder(part)
    model.save_pretrained(tmp_path, **options)
    again = KINDS[part].from_pretrained(tmp_path)
    assert len(quantized_layers(again)) == 11 and len(int8_layers(again)) == 1
    again.save_pretrained(tmp_path / "again")
    for twin in (again, copy.deepcopy(again), KINDS[part].from_pretrained(tmp_path / "again")):
        assert_same_tensors(twin, model)
        assert_close_outputs(run(twin), run(model))


LANGUAGE = {
    "T5": t5,
    "Gemma 2": lambda tokenizer: Gemma2Model(Gemma2Config(**language_sizes(tokenizer, 1), head_dim=16)),
    "Gemma 3": partial(gemma3, layers=1),
    "Qwen2.5-VL": lambda _: qwen_image().text_encoder,
    "Qwen3": partial(qwen3, layers=1),
    "Qwen3 without a head": lambda tokenizer: qwen3(tokenizer, 1).model,
    "Mistral": partial(mistral, layers=1),
}


@pytest.mark.parametrize("name", LANGUAGE)
def test_language_models_come_back(name, tmp_path):
    """Whatever names transformers gives the layers in the model and the tensors in its files."""
    torch.manual_seed(0)
    model = LANGUAGE[name](make_tokenizer(known_words())).eval().requires_grad_(False)
    random_text_encoder(model, CodeSpec(1, 6, 4, scale_nbits=4))
    count = len(quantized_layers(model))
    assert count == (6 if name == "T5" else 7)
    model.save_pretrained(tmp_path, max_shard_size="60KB")
    held = json.loads((tmp_path / "config.json").read_text())["quantization_config"]["layers"]
    assert all(re.fullmatch(r"(layers|encoder\.block)\.0\..*", layer) for layer in held)
    again = type(model).from_pretrained(tmp_path)
    assert len(quantized_layers(again)) == count
    assert_same_tensors(again, model)
    again.save_pretrained(tmp_path / "again")
    assert_same_tensors(type(model).from_pretrained(tmp_path / "again"), model)
    run_on = lambda one: one(input_ids=IDS, output_hidden_states=True).hidden_states[-1]  # noqa: E731
    assert_close_outputs(run_on(again), run_on(model))


@pytest.mark.parametrize("part", KINDS)
def test_stored_names_hold_no_path_of_a_version(tmp_path, part):
    quantized_text_encoder(part).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert "encoder.layers.0.self_attn.v_proj" in config["layers"] and config["format_version"] == 2
    assert all(name.startswith("encoder.layers.") for name in (*config["layers"], *config["rounded"]))


@pytest.mark.parametrize("part", KINDS)
def test_files_of_another_version_load(tmp_path, part):
    """Tensors under `text_model.` load where the model's names lack it, and the other way round."""
    model = quantized_text_encoder(part)
    model.save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    prefixed = any(name.startswith("text_model.") for name in tensors)
    renamed = {short_name(name) if prefixed else f"text_model.{name}": tensor for name, tensor in tensors.items()}
    save_file(renamed, path, {"format": "pt"})
    assert_same_tensors(KINDS[part].from_pretrained(tmp_path), model)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_another_type_casts_plain_tensors_only(tmp_path, dtype):
    quantized_text_encoder("text_encoder").save_pretrained(tmp_path)
    model = CLIPTextModel.from_pretrained(tmp_path, dtype=dtype)
    layer = next(iter(quantized_layers(model).values()))
    assert layer.codes.dtype == torch.uint8 and layer.codebooks.dtype == torch.float16
    assert layer.bias.dtype == model.dtype == dtype
    assert run(model).isfinite().all()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda tensors, name: tensors.pop(name), f"lacks 1 tensors, the first is {VICTIM}"),
        (lambda tensors, _: tensors.update(ghost=torch.ones(1)), "holds 1 unknown tensors, the first is ghost"),
        (lambda tensors, name: tensors.update({name: tensors[name][:1].clone()}), f"tensor {VICTIM} .* is F16"),
    ],
    ids=["missing", "extra", "wrong shape"],
)
@pytest.mark.parametrize("part", KINDS)
def test_a_wrong_checkpoint_is_an_error_that_names_the_tensor(tmp_path, part, change, words):
    quantized_text_encoder(part).save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    change(tensors, next(name for name in tensors if name.endswith(VICTIM)))
    save_file(tensors, path, {"format": "pt"})
    with pytest.raises(ValueError, match=words):
        KINDS[part].from_pretrained(tmp_path)


def test_a_newer_version_is_refused(tmp_path):
    quantized_text_encoder("text_encoder").save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"]["format_version"] = FORMAT_VERSION + 1
    path.write_text(json.dumps(config))
    with pytest.raises(ValueError, match=f"format_version is {FORMAT_VERSION + 1}"):
        CLIPTextModel.from_pretrained(tmp_path)


@pytest.mark.parametrize("part", KINDS)
def test_dequantize_gives_a_plain_model(tmp_path, part):
    model = quantized_text_encoder(part)
    expected = run(model)
    plain = model.dequantize()
    assert not quantized_layers(plain) and not int8_layers(plain)
    assert (run(plain) - expected).norm() < 0.02 * expected.norm()
    plain.save_pretrained(tmp_path)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
    assert_same_tensors(KINDS[part].from_pretrained(tmp_path), plain)


def test_a_pipeline_with_everything_quantized_comes_back(tmp_path):
    pipeline = tiny_pipeline("sdxl")
    parts = {part: quantized_text_encoder(part) for part in KINDS} | {"unet": quantized_unet(unquantized_nbits=8)}
    pipeline.register_modules(**parts)
    pipeline.save_pretrained(tmp_path)
    again = StableDiffusionXLPipeline.from_pretrained(tmp_path)
    assert isinstance(again.text_encoder.get_submodule("encoder.layers.0.mlp.fc1"), QuantizedLinear)
    for part in ("unet", "vae", *KINDS):
        assert_same_tensors(getattr(again, part), getattr(pipeline, part))
    assert_close_outputs(image_of(again), image_of(pipeline))
    assert json.loads((tmp_path / "model_index.json").read_text())["text_encoder"][0] == "transformers"
