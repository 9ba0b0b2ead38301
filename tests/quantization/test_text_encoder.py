import copy
import json
import shlex

import pytest
import torch
from conftest import tiny_pipeline
from diffusers import DiffusionPipeline
from main_text2image import main
from test_quantized import random_code
from tiny_runs import file_hashes
from tiny_transformers import SIZE, tiny_transformer_pipeline
from torch import nn
from transformers import T5Config, T5EncoderModel

import vqdm
from vqdm.additive.code import CodeSpec
from vqdm.cli import run_script
from vqdm.diffusion.hessians import record_hessians, shared_inputs
from vqdm.diffusion.pipelines import sample
from vqdm.diffusion.sensitivity import output_effects
from vqdm.errors import UserError
from vqdm.layers.quantized import QuantizedLinear, quantized_layers, swap
from vqdm.prompts import choose, load_prompts
from vqdm.quantization import text_encoder as texts
from vqdm.quantization.text_encoder import (
    TextCalibration,
    embedding_errors,
    encode,
    encoded_again,
    singles,
    text_layers,
)
from vqdm.storage.hf import mark_text_quantized

SPEC = CodeSpec(2, 4, 4)
PROMPTS = ["a circle", "a big red circle", "a star and a big green heart", "a blue star", "a red star"]
SAMPLED = {"height": 32, "width": 32, "num_inference_steps": 1}
FEW = shlex.split(
    "--num_codebooks 2 --nbits_per_codebook 4 --in_group_size 4 --max_epochs 1 --beam_size 1 --init_max_iter 1 "
    "--calibration_nsamples 10 --evaluation_nsamples 3 --visualize_nsamples 1 --num_inference_steps 1 "
    "--xtx_batch_size 4 --layer_filter mid_block.*attn1.to_q --components unet,text_encoder,text_encoder_2"
)

pytestmark = pytest.mark.usefixtures("one_thread")


def pipeline_of(family: str) -> DiffusionPipeline:
    pipeline = tiny_pipeline(family) if family in ("sdxl", "sd15") else tiny_transformer_pipeline(family)
    for part in pipeline.components.values():
        if isinstance(part, nn.Module):
            part.eval().requires_grad_(False)
    return pipeline


# ------------------------------------------------------------------------------------------- layers

LINEARS = {  # of one block of each kind of text encoder
    "sdxl": ("text_encoder", 2 * 6),
    "flux": ("text_encoder_2", 6),
    "sana": ("text_encoder", 7),
    "qwen-image": ("text_encoder", 7),
    "z-image": ("text_encoder", 2 * 7),
    "flux2-dev": ("text_encoder", 31 * 7),
    "wan": ("text_encoder", 7),
}


@pytest.mark.parametrize("family", LINEARS)
def test_every_linear_of_the_blocks_that_read_text_is_a_layer(family):
    part, count = LINEARS[family]
    model = getattr(pipeline_of(family), part)
    layers = text_layers(model, SPEC)
    assert len(layers) == count and all(isinstance(model.get_submodule(one.name), nn.Linear) for one in layers)
    assert not any("vis" in layer.name or "lm_head" in layer.name for layer in layers)
    assert len({layer.block for layer in layers}) == count // (7 if count % 7 == 0 else 6)


def test_a_model_without_blocks_or_with_layers_that_do_not_divide_is_refused():
    with pytest.raises(UserError, match="Linear has no blocks of layers that read text"):
        text_layers(nn.Linear(4, 4), SPEC)
    with pytest.raises(UserError, match=r"layer .*layers.0.self_attn.k_proj: in_group_size 5"):
        text_layers(tiny_pipeline("sdxl").text_encoder, CodeSpec(2, 4, 5))


# ------------------------------------------------------------------------------------------- recording


@pytest.mark.parametrize("family", ["sd15", *LINEARS, "flux2"])
def test_recorded_calls_and_arguments_give_the_embeddings_again(family):
    """Those that the denoiser is called with, whatever templates, padding and layers the pipeline takes."""
    pipeline, seen = pipeline_of(family), []
    name = "unet" if hasattr(pipeline, "unet") else "transformer"
    made = encode(pipeline, PROMPTS[:3], SAMPLED)
    assert "encode_prompt" not in pipeline.__dict__ and not getattr(pipeline, name)._forward_pre_hooks
    hook = lambda _, args, given: seen.append((args, given))  # noqa: E731
    getattr(pipeline, name).register_forward_pre_hook(hook, with_kwargs=True)
    sample(pipeline, list(PROMPTS[:3]), 0, 0, SAMPLED | {"output_type": "latent"})
    called = [one for args, given in seen for one in torch.utils._pytree.tree_leaves((args, given))]
    called = [one for one in called if isinstance(one, torch.Tensor) and one.is_floating_point()]
    assert made.calls.keys() >= {"text_encoder"}
    for vectors in texts.vectors(made.results).values():
        for one in vectors:
            some = one[:2]
            assert any(_holds(other, some) for other in called) or not some.any()
    again = encoded_again(pipeline, made, torch.device("cpu"))
    assert not embedding_errors([made.results], [again])  # not one tensor differs
    for part in made.calls:
        held = TextCalibration(pipeline, part, [made], [])
        name = text_layers(held.model, SPEC)[0].name
        change = {name: torch.ones_like(held.model.get_submodule(name).weight)}
        module, calls = held.effects(1)
        assert output_effects(module, change, calls, torch.Generator().manual_seed)[name] > 0


def _holds(tensor: torch.Tensor, rows: torch.Tensor) -> bool:
    """Whether the vectors of a tensor include all of some."""
    if tensor.dim() < 2 or tensor.shape[-1] != rows.shape[-1]:
        return False
    return all((tensor.reshape(-1, tensor.shape[-1]) - row).abs().amax(1).min() < 1e-5 for row in rows)


@pytest.mark.parametrize(
    ("family", "part", "padded"), [("z-image", "text_encoder", False), ("flux", "text_encoder_2", True)]
)
def test_hessians_count_the_tokens_that_the_denoiser_sees(family, part, padded):
    """Z-Image cuts padding off; FLUX attends to it."""
    pipeline = pipeline_of(family)
    encodings = [encode(pipeline, PROMPTS[:3], SAMPLED), encode(pipeline, PROMPTS[3:], SAMPLED)]
    held = TextCalibration(pipeline, part, encodings, [])
    model, (training, _) = held.model, held.calls()
    layers = text_layers(model, SPEC)
    first = next(training[0].divided(1))()
    groups = shared_inputs(model, layers, first)
    found = record_hessians(model, groups, first, training, [])
    name, rows = layers[-1].name, []
    model.get_submodule(name).register_forward_pre_hook(lambda _, args: rows.append(args[0]))
    for encoding in encodings:
        for call in encoding.calls[part]:
            with torch.no_grad():
                model(**call)
            if not padded:
                rows[-1] = rows[-1][call["attention_mask"].bool()]
    rows = torch.cat([one.flatten(0, -2) for one in rows])
    leader = next(group[0].name for group in groups if name in {one.name for one in group})
    torch.testing.assert_close(found[leader][0], rows.T @ rows / len(rows), rtol=1e-4, atol=1e-5)


# ------------------------------------------------------------------------------------------- errors


def test_embedding_errors_are_means_over_vectors_that_changed():
    """Against loops over prompts and tokens."""
    generator = torch.Generator().manual_seed(0)
    tokens, pooled, ids = torch.randn(2, 3, 4, generator=generator), torch.randn(2, 5), torch.rand(3, 3)
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    moved, other = tokens + torch.randn(2, 3, 4, generator=generator), pooled + 0.1
    found = embedding_errors([[(tokens, mask, pooled, ids)]], [[(moved, mask, other, ids)]])
    each = []
    for n, t in ((0, 0), (0, 1), (1, 0)):
        each.append(((moved[n, t] - tokens[n, t]) ** 2).sum() / (tokens[n, t] ** 2).sum())
    assert found["tokens"] == pytest.approx(float(sum(each)) / 3, rel=1e-5)
    each = [((other[n] - pooled[n]) ** 2).sum() / (pooled[n] ** 2).sum() for n in range(2)]
    assert found["pooled"] == pytest.approx(float(sum(each)) / 2, rel=1e-5)
    lists = embedding_errors([[([tokens[0], tokens[1, :1]], [])]], [[([moved[0], moved[1, :1]], [])]])
    assert lists.keys() == {"tokens"}


def test_effects_of_layers_are_errors_of_embeddings():
    """Of small changes, of one layer at a time; the last block of SDXL's first encoder has no effect: it is cut off."""
    pipeline = pipeline_of("sdxl")
    encoding = encode(pipeline, PROMPTS, SAMPLED)
    for part, unused in (("text_encoder", ".1."), ("text_encoder_2", None)):
        held = TextCalibration(pipeline, part, [encoding], [])
        generator = torch.Generator().manual_seed(0)
        names = [layer.name for layer in text_layers(held.model, SPEC) if layer.name.endswith(("v_proj", "fc2"))]
        changes = {
            name: 1e-3 * torch.randn(held.model.get_submodule(name).weight.shape, generator=generator) for name in names
        }
        module, calls = held.effects(len(PROMPTS))
        assert len(calls) == len(PROMPTS)
        effects = output_effects(module, changes, 12 * calls, torch.Generator().manual_seed)
        for name, change in changes.items():
            weight = held.model.get_submodule(name).weight
            with torch.no_grad():
                weight += change
                errors = embedding_errors([encoding.results], [encoded_again(pipeline, encoding, "cpu")])
                weight -= change
            # "tokens" and "pooled" count alike, and a kind that a layer does not move is without error.
            wanted = sum(errors.values()) / (1 if part == "text_encoder" else 2)
            if unused and unused in name:
                assert effects[name] == 0 and wanted < 1e-12  # what is left of taking the change back
            else:
                assert effects[name] == pytest.approx(wanted, rel=0.5) and wanted > 0, name


def test_a_batch_is_divided_into_its_prompts():
    pipeline = pipeline_of("qwen-image")
    each = list(singles(encode(pipeline, PROMPTS[:3], SAMPLED)))
    alone = [encode(pipeline, [prompt], SAMPLED) for prompt in PROMPTS[:3]]
    assert [one.arguments for one in each] == [one.arguments for one in alone]


# ------------------------------------------------------------------------------------------- the program


@pytest.fixture(scope="module")
def finished(pipelines, prompt_file, tmp_path_factory):
    out = tmp_path_factory.mktemp("texts") / "out"
    words = [str(pipelines["sdxl"]), str(prompt_file), str(prompt_file), "--output_dir", str(out), *FEW]
    assert run_script(main, words) == 0
    return out, words


def test_the_folder_holds_quantized_encoders_and_the_summary_their_bytes(finished):
    out, words = finished
    summary, pipeline = json.loads((out / "summary.json").read_text()), DiffusionPipeline.from_pretrained(out)
    before = DiffusionPipeline.from_pretrained(words[0])
    bytes_in = lambda folder, part: sum(file.stat().st_size for file in folder.glob(f"{part}/*.safetensors"))  # noqa: E731
    for part in ("text_encoder", "text_encoder_2"):
        figures = summary["text_encoders"][part]
        layers = quantized_layers(getattr(pipeline, part))
        assert len(layers) == len(figures["layers"]) == figures["layers_quantized"] == 12
        assert figures["bytes"] == bytes_in(out, part) < figures["bytes_of_original"]
        bits = sum(layer.stored_bits for layer in layers.values())
        assert figures["effective_bits_layers"] == pytest.approx(bits / figures["weights_quantized"])
    assert summary["bytes_of_pipeline"] == bytes_in(out, "*")
    settings = {"num_inference_steps": 1}
    prompts = choose(load_prompts(words[2], ""), 3, 0, "", "")
    teacher = encode(before, prompts, settings)
    errors = embedding_errors([teacher.results], [encoded_again(pipeline, teacher, torch.device("cpu"))])
    expected = 10 * torch.tensor(sum(errors.values()) / 2).log10().item()
    assert summary["embeddings_error_db"]["all"] == pytest.approx(expected, abs=0.01) and expected < -5


def test_a_run_that_is_stopped_in_its_last_encoder_ends_with_the_same_bytes(finished, tmp_path, monkeypatch):
    (out, words), again = finished, tmp_path / "again"
    words = [str(again) if word == str(out) else word for word in words]
    quantize_layers, parts = texts.quantize_layers, []

    def stopped(job, after):
        parts.append(job.component)
        if job.component == "text_encoder_2":
            raise KeyboardInterrupt
        return quantize_layers(job, after)

    with monkeypatch.context() as patched:
        patched.setattr(texts, "quantize_layers", stopped)
        assert run_script(main, words) == 130
    assert parts == ["text_encoder", "text_encoder_2"] and (again / "layers_text_encoder.jsonl").is_file()
    made = (again / "work" / "text_encoder" / "layers").glob("*.safetensors")
    times = {file: file.stat().st_mtime_ns for file in made}
    assert len(times) == 12

    def untouched(job, after):
        found = quantize_layers(job, after)
        assert job.component != "text_encoder" or {file: file.stat().st_mtime_ns for file in times} == times
        return found

    monkeypatch.setattr(texts, "quantize_layers", untouched)
    assert run_script(main, [*words, "--resume"]) == 0
    assert file_hashes(again) == file_hashes(out)
    assert run_script(main, [*words, "--resume"]) == 0  # finished: its encoders are loaded


def test_a_dry_run_lists_layers_and_bytes_of_each_part(finished, tmp_path, capsys):
    _, words = finished
    assert run_script(main, [*words, "--output_dir", str(tmp_path / "dry"), "--dry_run"]) == 0
    said = capsys.readouterr().out
    assert "text_encoder, a CLIPTextModel:" in said and "text_encoder_2, a CLIPTextModelWithProjection:" in said
    assert said.count("layers.1.mlp.fc2") == 2 and "whole pipeline: about" in said
    assert not (tmp_path / "dry").exists()


def test_a_loaded_pipeline_is_not_changed(tmp_path):
    pipeline, settings = pipeline_of("sdxl"), dict(num_codebooks=2, nbits_per_codebook=4, in_group_size=4, max_epochs=1)
    before = {name: tensor.clone() for name, tensor in pipeline.text_encoder.state_dict().items()}
    settings |= dict(calibration_nsamples=4, evaluation_nsamples=2, num_inference_steps=1, visualize_nsamples=0)
    settings |= dict(components=["unet", "text_encoder"], layer_filter="mid_block.*attn1.to_q", init_max_iter=1)
    quantized, report = vqdm.quantize(pipeline, PROMPTS, None, PROMPTS, **settings)
    assert len(quantized_layers(quantized.text_encoder)) == 12 and quantized.text_encoder_2 is pipeline.text_encoder_2
    assert all(torch.equal(before[name], tensor) for name, tensor in pipeline.text_encoder.state_dict().items())
    assert report.text_encoders["text_encoder"]["layers_quantized"] == 12 and report.embeddings_error_db["all"] < -5
    assert report.pipeline_bytes_after < report.pipeline_bytes_before
    quantized.save_pretrained(tmp_path)
    assert len(quantized_layers(DiffusionPipeline.from_pretrained(tmp_path).text_encoder)) == 12


@pytest.mark.parametrize(
    ("components", "words"),
    [
        ("unet,text_encoder_3", "has no text_encoder_3 to quantize; allowed are unet, text_encoder, text_encoder_2"),
        ("unet,vae", "has no vae to quantize"),
        ("text_encoder", "lacks the denoiser; add unet"),
        ("unet,unet", "give different names of parts"),
        ("unet,", "give different names of parts"),
    ],
)
def test_other_names_of_components_are_refused(components, words, finished, tmp_path, capsys):
    given = [*finished[1], "--output_dir", str(tmp_path / "out"), "--components", components]
    assert run_script(main, given) == 2
    assert "--components" in (said := capsys.readouterr().err) and words in said


def test_trellis_codes_of_an_encoder_take_their_bits_by_their_effect(tmp_path, prompt_file):
    """The last block of Z-Image's encoder has none: its embeddings are of the block before."""
    model, out = tmp_path / "model", tmp_path / "out"
    pipeline_of("z-image").save_pretrained(model)
    words = [str(model), str(prompt_file), str(prompt_file), "--output_dir", str(out), *SIZE, *FEW[12:20]]
    words += shlex.split(
        "--target_bits 4 --state_bits 8 --sensitivity_points 4 --components transformer,text_encoder "
        "--xtx_batch_size 4 --calibration_nsamples 8 --layer_filter layers.0.attention.to_q"
    )
    assert run_script(main, words) == 0
    figures = json.loads((out / "summary.json").read_text())["text_encoders"]["text_encoder"]
    bits = {row["name"]: row["bits_per_weight"] for row in figures["layers"]}
    assert figures["effective_bits_layers"] <= 4
    first, last = ([one for name, one in bits.items() if f"layers.{k}." in name] for k in (0, 1))
    assert max(last) < min(first)
    plan = json.loads((out / "plan_text_encoder.json").read_text())
    assert plan.keys() == bits.keys() and (out / "plan.json").is_file()


# ------------------------------------------------------------------------------------------- T5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_t5_with_a_quantized_wo_computes_it_in_float32(dtype, tmp_path):
    """T5 casts the input of `wo` to the type of its weight; values of T5-XXL are beyond what float16 holds."""
    torch.manual_seed(0)
    kind = "gated-gelu"
    config = T5Config(vocab_size=50, d_model=32, d_kv=8, d_ff=32, num_layers=2, num_heads=2, feed_forward_proj=kind)
    model = T5EncoderModel(config).eval().requires_grad_(False)
    for k in range(2):
        feed_forward = model.encoder.block[k].layer[1].DenseReluDense
        feed_forward.wi_0.weight *= 25
        feed_forward.wi_1.weight *= 25
        code = random_code(SPEC, 32, 32)
        code.scales *= 30
        swap(feed_forward, "wo", SPEC).set_code(code)
    mark_text_quantized(model)
    ids, seen = torch.arange(10)[None], []
    model.save_pretrained(tmp_path)
    plain = copy.deepcopy(model).dequantize()
    again = T5EncoderModel.from_pretrained(tmp_path, dtype=dtype)
    wo = again.get_submodule("encoder.block.1.layer.1.DenseReluDense.wo")
    assert isinstance(wo, QuantizedLinear) and wo.weight.dtype == torch.float32
    assert {tensor.dtype for tensor in wo.stored_tensors().values()} == {torch.uint8, torch.float16}
    wo.register_forward_hook(lambda _, args, output: seen.append((args[0].dtype, output.abs().max().item())))
    with torch.no_grad():
        found, expected = again(ids).last_hidden_state, plain(ids).last_hidden_state
    assert seen[0][0] == torch.float32 and seen[0][1] > torch.finfo(torch.float16).max
    assert found.dtype == dtype and found.isfinite().all()
    error = (found.float() - expected).norm() / expected.norm()
    assert error < {torch.float32: 1e-3, torch.bfloat16: 5e-2, torch.float16: 1e-2}[dtype]
