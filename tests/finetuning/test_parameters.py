import pytest
import tiny_students
import torch

from vqdm.errors import RunError, UserError
from vqdm.finetuning.config import OptimizerConfig
from vqdm.finetuning.parameters import (
    kinds_of,
    parameter_groups,
    rounded_to,
    stored_types,
    trainable,
    types_on_disk,
    write_back,
)
from vqdm.layers.quantized import SHARED_CODEBOOKS


def test_kinds():
    unet = tiny_students.student(tiny_students.FORMATS["shared"], rounded=True)
    kinds, name = kinds_of(unet), tiny_students.NAMES[0]
    assert kinds[f"{SHARED_CODEBOOKS}.bank"] == "codebook" and kinds[f"{name}.scales"] == "scale"
    assert kinds["time_embedding.linear_1.scales"] == "scale" and kinds["conv_in.weight"] == "weight"
    assert kinds["conv_norm_out.weight"] == kinds[f"{name}.bias"] == "bias"
    assert f"{name}.codes" not in kinds and len(kinds) == sum(p.is_floating_point() for p in unet.parameters())
    tables = kinds_of(tiny_students.student(tiny_students.FORMATS["value_tables"]))
    assert tables[f"{name}.codebook_values"] == "codebook"


def test_learning_rates_are_relative_except_those_of_biases():
    unet = tiny_students.student(tiny_students.FORMATS["own"])
    config = OptimizerConfig(codebook_lr=1.0, scale_lr=2.0, weight_lr=0.0, bias_lr=0.5)
    trained = trainable(unet, config)
    groups = parameter_groups(trained, config)
    found = {id(tensor): 0.01 * group["lr_factor"] for group in groups for tensor in group["params"]}
    assert len(found) == len(trained.tensors) and "conv_in.weight" not in trained.tensors
    for name, tensor in trained.tensors.items():
        size, kind = tensor.detach().square().mean().sqrt().item(), trained.kinds[name]
        wanted = {"bias": 0.005, "codebook": 0.01 * size, "scale": 0.02 * size}[kind]
        assert found[id(tensor)] == pytest.approx(wanted, rel=0 if kind == "bias" else 0.42)
    assert all(tensor.dtype == torch.float32 for tensor in unet.parameters() if tensor.is_floating_point())


def test_types_go_back_to_what_was_stored(tmp_path):
    unet = tiny_students.student(tiny_students.FORMATS["own"])
    types = stored_types(unet)
    assert set(types.values()) == {torch.float16, torch.float32}
    unet.save_pretrained(tmp_path)
    assert types_on_disk(tmp_path) == types
    trained = trainable(unet, OptimizerConfig())
    write_back(unet, types)
    assert stored_types(unet) == types
    trained.tensors[f"{tiny_students.NAMES[0]}.scales"].data = torch.full((32,), 1e6)
    with pytest.raises(RunError, match=r"conv1\.scales exceeds the range of torch.float16"):
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


def test_stored_values_can_be_measured_in_the_type_that_is_computed_in():
    """A model that is stored in 16 bit still runs in float32 afterwards, with the values that will be read back."""
    unet = tiny_students.student(tiny_students.FORMATS["own"])
    types = {name: torch.float16 for name in stored_types(unet)}
    wanted = {name: tensor.half().float() for name, tensor in unet.named_parameters() if name in types}
    write_back(unet, types, torch.float32)
    held = dict(unet.named_parameters())
    assert all(held[name].dtype == torch.float32 and torch.equal(held[name], wanted[name]) for name in types)
    write_back(unet, types)
    assert all(held[name].dtype == torch.float16 for name in types)


def test_parameters_are_rounded_inside_and_exact_outside():
    unet = tiny_students.student(tiny_students.FORMATS["own"])
    types = stored_types(unet)
    trained = trainable(unet, OptimizerConfig())
    scales = trained.tensors[f"{tiny_students.NAMES[0]}.scales"]
    scales.data.mul_(1 + 1e-5)  # less than float16 distinguishes
    exact = scales.detach().clone()
    with rounded_to(types, trained):
        assert torch.equal(scales, exact.half().float()) and not torch.equal(scales, exact)
    assert torch.equal(scales, exact)
