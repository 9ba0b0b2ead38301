from itertools import pairwise

import classroom
import pytest
import torch

from vqdm.errors import RunError, UserError
from vqdm.finetuning.config import OptimizerConfig
from vqdm.finetuning.evaluation import Errors
from vqdm.finetuning.optimizer import LEARNING_RATES, adam, learning_rate, rate_factor, set_rate
from vqdm.finetuning.parameters import as_stored, kinds_of, stored_types, trainable, types_on_disk, write_back
from vqdm.layers.shared_codebooks import SHARED_CODEBOOKS


def test_kinds():
    unet = classroom.student(classroom.FORMATS["shared"], rounded=True)
    kinds, name = kinds_of(unet), classroom.NAMES[0]
    assert kinds[f"{SHARED_CODEBOOKS}.bank"] == "codebook" and kinds[f"{name}.scales"] == "scale"
    assert kinds["time_embedding.linear_1.scales"] == "scale" and kinds["conv_in.weight"] == "weight"
    assert kinds["conv_norm_out.weight"] == kinds[f"{name}.bias"] == "bias"
    assert f"{name}.codes" not in kinds and len(kinds) == sum(p.is_floating_point() for p in unet.parameters())
    tables = kinds_of(classroom.student(classroom.FORMATS["value_tables"]))
    assert tables[f"{name}.codebook_values"] == "codebook"


def test_rates_are_relative_but_for_biases():
    unet = classroom.student(classroom.FORMATS["own"])
    config = OptimizerConfig(codebook_lr=1.0, scale_lr=2.0, weight_lr=0.0, bias_lr=0.5)
    trained = trainable(unet, config)
    optimizer = adam(trained, config)
    set_rate(optimizer, 0.01)
    rates = {id(tensor): group["lr"] for group in optimizer.param_groups for tensor in group["params"]}
    assert len(rates) == len(trained.tensors) and "conv_in.weight" not in trained.tensors
    for name, tensor in trained.tensors.items():
        size, kind = tensor.detach().square().mean().sqrt().item(), trained.kinds[name]
        wanted = {"bias": 0.005, "codebook": 0.01 * size, "scale": 0.02 * size}[kind]
        assert rates[id(tensor)] == pytest.approx(wanted, rel=0 if kind == "bias" else 0.42)
    assert all(tensor.dtype == torch.float32 for tensor in unet.parameters() if tensor.is_floating_point())


def test_types_go_back_to_what_was_stored(tmp_path):
    unet = classroom.student(classroom.FORMATS["own"])
    types = stored_types(unet)
    assert set(types.values()) == {torch.float16, torch.float32}
    unet.save_pretrained(tmp_path)
    assert types_on_disk(tmp_path) == types
    trained = trainable(unet, OptimizerConfig())
    write_back(unet, types)
    assert stored_types(unet) == types
    trained.tensors[f"{classroom.NAMES[0]}.scales"].data = torch.full((32,), 1e6)
    with pytest.raises(RunError, match=r"conv1\.scales has grown beyond what torch.float16 holds"):
        write_back(unet, types)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"finetune_adam_beta2": 1.0}, "--finetune_adam_beta2 is 1.0"),
        ({"finetune_lr": 0.0}, "--finetune_lr is 0.0; allowed are numbers above 0 up to 1, and auto"),
        ({"finetune_lr": "fast"}, "--finetune_lr is 'fast'; allowed are numbers above 0 up to 1, and auto"),
    ],
)
def test_impossible_settings(settings, words):
    with pytest.raises(UserError, match=words):
        OptimizerConfig(**settings)


def test_rates_warm_up_and_fall():
    config = OptimizerConfig(lr_scheduler="linear", lr_warmup_steps=3)
    assert [rate_factor(k, 10, config) for k in range(5)] == pytest.approx([0.25, 0.45, 0.6, 0.7, 0.6])
    cosine = OptimizerConfig(lr_warmup_steps=0)
    assert [rate_factor(k, 2, cosine) for k in (0, 1, 2)] == pytest.approx([1.0, 0.5, 0.0])
    assert rate_factor(9, 10, OptimizerConfig(lr_scheduler="constant", lr_warmup_steps=0)) == 1.0


def test_stored_values_can_be_measured_in_the_type_that_is_computed_in():
    """A model that is stored in 16 bit still runs in float32 afterwards, with the values that will be read back."""
    unet = classroom.student(classroom.FORMATS["own"])
    types = {name: torch.float16 for name in stored_types(unet)}
    wanted = {name: tensor.half().float() for name, tensor in unet.named_parameters() if name in types}
    write_back(unet, types, torch.float32)
    held = dict(unet.named_parameters())
    assert all(held[name].dtype == torch.float32 and torch.equal(held[name], wanted[name]) for name in types)
    write_back(unet, types)
    assert all(held[name].dtype == torch.float16 for name in types)


def errors_of(db: float) -> Errors:
    """Four prompts that are all at `db`."""
    energy = torch.ones(2, 4, dtype=torch.float64)
    return Errors(energy * 10 ** (db / 10), energy, energy, torch.arange(4), torch.zeros(4, dtype=torch.int64))


def test_the_learning_rate_falls_with_the_error_that_is_left():
    rates = [learning_rate(OptimizerConfig(), errors_of(db)) for db in (-50.0, -60.0, -70.0)]
    assert all(one / two == pytest.approx(10**0.5, rel=0.05) for one, two in pairwise(rates))
    assert [learning_rate(OptimizerConfig(), errors_of(db)) for db in (-200.0, 3.0)] == list(LEARNING_RATES)
    assert learning_rate(OptimizerConfig(finetune_lr=0.03), errors_of(-60.0)) == 0.03


def test_parameters_are_as_stored_inside_and_exact_outside():
    unet = classroom.student(classroom.FORMATS["own"])
    types = stored_types(unet)
    trained = trainable(unet, OptimizerConfig())
    scales = trained.tensors[f"{classroom.NAMES[0]}.scales"]
    scales.data.mul_(1 + 1e-5)  # less than float16 distinguishes
    exact = scales.detach().clone()
    with as_stored(trained, types):
        assert torch.equal(scales, exact.half().float()) and not torch.equal(scales, exact)
    assert torch.equal(scales, exact)
