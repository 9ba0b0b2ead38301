import json
import math
import shlex

import pytest
import torch
from main_text2image import main
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, T5Config, T5EncoderModel

import vqdm
from train_text import known_words, make_tokenizer
from vqdm.cli import run_script
from vqdm.devices import BatchSize
from vqdm.diffusion.sensitivity import output_effects
from vqdm.errors import UserError
from vqdm.layers.quantized import QuantizedLinear, quantized_layers
from vqdm.prompts import choose
from vqdm.quantization import language_model as jobs
from vqdm.quantization.language_model import LanguageModel, TextSequences, perplexity, token_sequences

TEXTS = [
    f"a {size} {color} {shape}"
    for size in ("big", "small")
    for color in ("red", "blue", "green")
    for shape in ("circle", "star", "heart", "cross")
]
ADDITIVE = shlex.split(
    "--num_codebooks 2 --nbits_per_codebook 6 --in_group_size 4 --max_epochs 1 --beam_size 1 --init_max_iter 3"
)
COUNTS = ["--calibration_nsamples", "20", "--evaluation_nsamples", "8", "--xtx_batch_size", "2"]

pytestmark = pytest.mark.usefixtures("one_thread")


def tiny_language_model() -> LanguageModel:
    """A LLaMA that has learned a few sentences: an error of its layers costs perplexity."""
    torch.manual_seed(0)
    tokenizer = make_tokenizer(known_words())
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=24,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    held = LanguageModel(LlamaForCausalLM(config), tokenizer)
    sequences, optimizer = token_sequences(3 * TEXTS, held), torch.optim.AdamW(held.model.parameters(), 1e-2)
    for _ in range(60):
        optimizer.zero_grad()
        held.model(input_ids=sequences, labels=sequences).loss.backward()
        optimizer.step()
    held.model.eval().requires_grad_(False)
    return held


@pytest.fixture(scope="module")
def language_model() -> LanguageModel:
    return tiny_language_model()


@pytest.fixture(scope="module")
def folder(language_model, tmp_path_factory):
    path = tmp_path_factory.mktemp("language") / "model"
    language_model.model.save_pretrained(path)
    language_model.tokenizer.save_pretrained(path)
    (path.parent / "texts.txt").write_text("\n".join(TEXTS) + "\n")
    return path


@pytest.fixture(scope="module")
def finished(folder):
    """A run of the program, and its words."""
    out, texts = folder.parent / "out", str(folder.parent / "texts.txt")
    words = [str(folder), texts, texts, "--output_dir", str(out), *ADDITIVE, *COUNTS]
    assert run_script(main, words) == 0
    return out, words


def plain_perplexity(model: nn.Module, sequences: torch.Tensor) -> float:
    losses = []
    for tokens in sequences:
        p = model(input_ids=tokens[None]).logits[0].double().log_softmax(-1)
        losses += [-p[t, tokens[t + 1]].item() for t in range(len(tokens) - 1)]
    return math.exp(sum(losses) / len(losses))


# ------------------------------------------------------------------------------------------- texts


def test_sequences_hold_the_joined_texts_in_order(language_model):
    tokenizer, found = language_model.tokenizer, token_sequences(TEXTS, language_model)
    joined = [
        t for text in TEXTS for t in [*tokenizer(text, add_special_tokens=False).input_ids, tokenizer.eos_token_id]
    ]
    assert found.shape == (len(joined) // 24, 24) and found.flatten().tolist() == joined[: found.numel()]
    assert token_sequences(TEXTS[:2], language_model).shape[0] == 1  # shorter than a sequence: all of it
    with pytest.raises(UserError, match="the texts have 1 tokens; give longer ones, or more"):
        token_sequences([""], language_model)


def test_perplexity_is_that_of_a_loop_for_any_batch_size(language_model):
    sequences = token_sequences(TEXTS, language_model)
    expected = plain_perplexity(language_model.model, sequences)
    assert 1 < expected < 10  # it has learned the sentences
    for size in (1, 3):
        assert perplexity(language_model.model, sequences, BatchSize(size)) == pytest.approx(expected, rel=1e-5)


def test_effects_are_twice_the_divergence(language_model):
    """KL(p ‖ q) of the tokens' probabilities before and after a small change of one layer."""
    model, sequences = language_model.model, token_sequences(TEXTS, language_model)
    module, calls = TextSequences(model, sequences, 2).effects(3)
    assert len(calls) == 3
    generator = torch.Generator().manual_seed(0)
    name = "model.layers.0.mlp.down_proj"
    weight = model.get_submodule(name).weight
    change = 3e-3 * torch.randn(weight.shape, generator=generator)
    effect = output_effects(module, {name: change}, 40 * calls, torch.Generator().manual_seed)[name]
    energy = sum(module(**call()).double().square().sum().item() for call in calls)
    before = model(input_ids=sequences[:3]).logits.double().log_softmax(-1)
    weight += change
    after = model(input_ids=sequences[:3]).logits.double().log_softmax(-1)
    weight -= change
    divergence = (before.exp() * (before - after)).sum().item()
    assert effect * energy / 2 == pytest.approx(divergence, rel=0.35)


# ------------------------------------------------------------------------------------------- the program


def test_the_folder_loads_in_transformers_and_generates(finished, folder, language_model):
    out, _ = finished
    model, tokenizer = AutoModelForCausalLM.from_pretrained(out), AutoTokenizer.from_pretrained(out)
    assert len(quantized_layers(model)) == 14 and not isinstance(model.lm_head, QuantizedLinear)
    written = model.generate(**tokenizer("a big", return_tensors="pt", add_special_tokens=False), max_new_tokens=4)
    assert written.shape[1] > 2
    summary = json.loads((out / "summary.json").read_text())
    assert summary["bytes_of_model"] == (out / "model.safetensors").stat().st_size < summary["bytes_of_original_model"]
    assert summary["layers_quantized"] == 14 and "perplexity" in (out / "README.md").read_text()
    held = LanguageModel(model, tokenizer)
    sequences = token_sequences(choose(TEXTS, 8, 0, "", ""), held)
    assert summary["perplexity"] == pytest.approx(plain_perplexity(model, sequences), rel=1e-3)
    plain = plain_perplexity(language_model.model, sequences)
    assert summary["perplexity_before"] == pytest.approx(plain, rel=1e-4)
    assert 0.9 * plain < summary["perplexity"] < 2 * plain  # three bits per weight; by luck it may be the lower one
    again = model.dequantize()
    assert plain_perplexity(again, sequences) == pytest.approx(summary["perplexity"], rel=1e-2)


def test_a_run_that_is_stopped_ends_with_the_same_bytes(finished, tmp_path, monkeypatch):
    (out, words), again = finished, tmp_path / "again"
    words = [str(again) if word == str(out) else word for word in words]
    with monkeypatch.context() as patched:
        patched.setattr(jobs, "mark_text_quantized", lambda _: (_ for _ in ()).throw(KeyboardInterrupt))
        assert run_script(main, words) == 130
    assert len(list((again / "work" / "layers").glob("*.safetensors"))) == 14
    assert run_script(main, [*words, "--resume"]) == 0
    assert (again / "model.safetensors").read_bytes() == (out / "model.safetensors").read_bytes()
    assert run_script(main, [*words, "--resume"]) == 0  # finished: it is loaded


def test_a_dry_run_lists_the_layers(finished, tmp_path, capsys):
    words = [*finished[1], "--output_dir", str(tmp_path / "dry"), "--dry_run"]
    assert run_script(main, words) == 0
    assert "model.layers.1.mlp.down_proj" in capsys.readouterr().out and not (tmp_path / "dry").exists()


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--guidance_scale 3", "--guidance_scale is of pipelines"),
        ("--components unet", "--components is of pipelines"),
        ("--unquantized_nbits 8", "--unquantized_nbits is of pipelines"),
        ("--num_intermediate_finetunes 1", "--num_intermediate_finetunes is of pipelines"),
    ],
)
def test_flags_of_pipelines_are_refused(flags, words, finished, tmp_path, capsys):
    given = [*finished[1], "--output_dir", str(tmp_path / "out"), *flags.split()]
    assert run_script(main, given) == 2
    assert words in capsys.readouterr().err and not (tmp_path / "out").exists()


# ------------------------------------------------------------------------------------------- from Python


def test_a_loaded_model_is_quantized_to_a_target_and_not_changed(language_model):
    before = {name: tensor.clone() for name, tensor in language_model.model.state_dict().items()}
    settings = dict(state_bits=8, sensitivity_points=4, calibration_nsamples=0, evaluation_nsamples=8)
    model, report = vqdm.quantize(language_model.model, TEXTS, 4, TEXTS, tokenizer=language_model.tokenizer, **settings)
    assert len(quantized_layers(model)) == 14 and not quantized_layers(language_model.model)
    assert all(torch.equal(before[name], tensor) for name, tensor in language_model.model.state_dict().items())
    assert report.bits_per_weight <= 4 and report.error_db is None and report.text_encoders == {}
    sequences = token_sequences(choose(TEXTS, 8, 0, "", ""), language_model)
    assert report.perplexity_before == pytest.approx(plain_perplexity(language_model.model, sequences), rel=1e-4)
    assert report.perplexity_after == pytest.approx(plain_perplexity(model, sequences), rel=1e-3)
    assert report.perplexity_after < 1.2 * report.perplexity_before


def test_other_models_and_a_missing_tokenizer_are_refused(language_model):
    other = T5EncoderModel(T5Config(vocab_size=8, d_model=8, d_kv=8, d_ff=8, num_layers=1, num_heads=1))
    with pytest.raises(
        UserError, match="pipeline is a T5EncoderModel; give a causal language model, or a pipeline and"
    ):
        vqdm.quantize(other, TEXTS)
    with pytest.raises(UserError, match="tokenizer is None"):
        vqdm.quantize(language_model.model, TEXTS)
