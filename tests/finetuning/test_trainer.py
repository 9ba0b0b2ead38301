"""Steps of training: divided batches, formats, what a loss does, and what is written back."""

from itertools import pairwise

import pytest
import recorded
import tiny_students
import torch
from diffusers import UNet2DConditionModel

from vqdm.errors import RunError, UserError
from vqdm.finetuning.code_updates import CodeUpdates, CodeUpdateSettings
from vqdm.finetuning.config import OptimizerConfig
from vqdm.finetuning.evaluation import evaluate
from vqdm.finetuning.trainer import (
    LEARNING_RATES,
    SMALLEST_SCALE,
    DistillationLoss,
    Diverged,
    _cast,
    choose_learning_rate,
    kinds_of,
    parameter_groups,
    rounded_to,
    schedule_factor,
    stored_types,
    trainable,
    types_on_disk,
    write_back,
)
from vqdm.layers.quantized import SHARED_CODEBOOKS, quantized_layers


def train(unet, points, steps: int, **options):
    """Train `steps` steps of eight points each."""
    trainer = tiny_students.trainer(unet, steps, **options)
    every = points.all()
    for k in range(steps):
        trainer.step(points, [every[(8 * k + i) % len(every)] for i in range(8)])
    return trainer


@pytest.mark.parametrize("name", [*tiny_students.FORMATS, "rounded"])
def test_every_format_learns_and_stays_what_it_is(name, tmp_path):
    spec = tiny_students.FORMATS.get(name, tiny_students.FORMATS["own"])
    unet = tiny_students.student(spec, rounded=name == "rounded")
    types, before, points = stored_types(unet), tiny_students.codes(unet), tiny_students.points(tiny_students.teacher())
    trainer = tiny_students.trainer(unet, 0)
    first = evaluate(trainer.loss_fn, points, points.all()).loss
    train(unet, points, 8)
    write_back(unet, types)
    assert evaluate(trainer.loss_fn, points, points.all()).loss < 0.95 * first
    assert stored_types(unet) == types and not any(tensor.requires_grad for tensor in unet.parameters())
    unet.save_pretrained(tmp_path)
    loaded = UNet2DConditionModel.from_pretrained(tmp_path)
    for key, tensor in tiny_students.codes(loaded).items():
        assert torch.equal(tensor, before[key]), key
    assert loaded.config.quantization_config.to_dict() == unet.config.quantization_config.to_dict()
    for key, tensor in unet.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], tensor), key


@pytest.mark.parametrize("decode", ["step", "call"])
@pytest.mark.parametrize("changing", [False, True])
def test_columns_of_a_trellis_without_bits_stay_zero(decode, changing):
    points, unet = (
        tiny_students.points(tiny_students.teacher()),
        tiny_students.student(tiny_students.FORMATS["trellis"]),
    )
    layers = quantized_layers(unet)
    before = {name: layer.input_scales.detach().clone() for name, layer in layers.items()}
    updates = CodeUpdates(unet, CodeUpdateSettings(code_lr=0.3, code_fraction=0.5)) if changing else None
    train(unet, points, 3, decode=decode, updates=updates, ema_decay=0.5)
    for name, layer in layers.items():
        empty, scales = layer.code_widths == 0, layer.input_scales
        assert empty.any() and not scales[empty].any() and not layer.decoded_matrix()[:, empty].any()
        assert (scales != before[name])[~empty].float().mean() > 0.9


@pytest.mark.parametrize("decode", ["step", "call"])
@pytest.mark.parametrize("local", [1, 3])
def test_micro_batches_add_up_to_one_batch(local, decode):
    points = tiny_students.points(tiny_students.teacher())
    spec = tiny_students.FORMATS["shared"]
    whole, parts = tiny_students.student(spec), tiny_students.student(spec)
    big = tiny_students.trainer(whole, local=8)
    small = tiny_students.trainer(parts, local=local, decode=decode)
    chosen = points.all()[3:11]
    first, second = big.step(points, chosen), small.step(points, chosen)
    assert second.loss == pytest.approx(first.loss, rel=1e-5)
    assert second.gradient_norm == pytest.approx(first.gradient_norm, rel=1e-4)
    for name, tensor in big.trained.tensors.items():
        gap = (small.trained.tensors[name].grad - tensor.grad).norm()
        assert gap <= 1e-4 * tensor.grad.norm() + 1e-7, name


def test_the_loss_is_the_mean_squared_error():
    points, unet = tiny_students.points(tiny_students.teacher()), tiny_students.student(tiny_students.FORMATS["own"])
    chosen = points.all()[:5]
    batch = points.batch(chosen, tiny_students.CPU, torch.float32)
    with torch.no_grad():
        wanted = (unet(**batch.call).sample - batch.teacher_output).square().mean().item()
    trainer = tiny_students.trainer(unet, local=2)
    assert trainer.step(points, chosen).loss == pytest.approx(wanted, rel=1e-5)
    assert evaluate(trainer.loss_fn, points, chosen).loss != wanted  # it has moved


def test_kinds_with_a_learning_rate_of_zero_stay():
    points, unet = tiny_students.points(tiny_students.teacher()), tiny_students.student(tiny_students.FORMATS["own"])
    before = {name: tensor.clone() for name, tensor in unet.named_parameters()}
    train(unet, points, 2, codebook_lr=0.0, weight_lr=0.0, bias_lr=0.0)
    moved = {name for name, tensor in unet.named_parameters() if not torch.equal(tensor.float(), before[name].float())}
    assert moved == {f"{name}.scales" for name in tiny_students.NAMES}


def test_gradients_are_clipped_together():
    points, unet = tiny_students.points(tiny_students.teacher()), tiny_students.student(tiny_students.FORMATS["own"])
    trainer = tiny_students.trainer(unet, max_grad_norm=1e-3)
    norm = trainer.step(points, points.all()[:4]).gradient_norm
    left = torch.stack([tensor.grad.norm() for tensor in trainer.trained]).norm().item()
    assert norm > 1e-2 and left == pytest.approx(1e-3, rel=1e-3)


def test_the_average_is_the_result():
    points, unet = tiny_students.points(tiny_students.teacher()), tiny_students.student(tiny_students.FORMATS["own"])
    trainer = train(unet, points, 3, ema_decay=0.9, finetune_lr=1e-3)
    name = f"{tiny_students.NAMES[0]}.codebooks"
    raw, averaged = trainer.trained.tensors[name].detach().clone(), trainer.average.tensors[name].clone()
    assert not torch.equal(raw, averaged)
    assert torch.equal(trainer.result_tensors()[name], averaged)
    with trainer.average.applied():
        assert torch.equal(trainer.trained.tensors[name], averaged)
    assert torch.equal(trainer.trained.tensors[name], raw)
    trainer.average.swap()
    assert torch.equal(trainer.trained.tensors[name], averaged)


def test_average_follows_its_formula():
    points, unet = tiny_students.points(tiny_students.teacher()), tiny_students.student(tiny_students.FORMATS["own"])
    trainer = tiny_students.trainer(unet, ema_decay=0.15)
    name = f"{tiny_students.NAMES[0]}.scales"
    wanted = trainer.trained.tensors[name].detach().clone()
    for step in (1, 2):
        trainer.step(points, points.all()[:4])
        decay = min(0.15, (1 + step) / (10 + step))
        wanted = decay * wanted + (1 - decay) * trainer.trained.tensors[name].detach()
    torch.testing.assert_close(trainer.average.tensors[name], wanted)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_masters_stay_in_float32_under_autocast(dtype):
    points, unet = tiny_students.points(tiny_students.teacher()), tiny_students.student(tiny_students.FORMATS["shared"])
    exact = tiny_students.trainer(tiny_students.student(tiny_students.FORMATS["shared"]))
    trainer = tiny_students.trainer(unet, dtype=dtype)
    found, wanted = (one.step(points, points.all()[:4]) for one in (trainer, exact))
    assert found.loss != wanted.loss and found.loss == pytest.approx(wanted.loss, rel=0.05)
    assert all(tensor.dtype == tensor.grad.dtype == torch.float32 for tensor in trainer.trained)


class Overflowing(CodeUpdates):
    """Has an infinite gradient, of a decoded weight alone, in the first step."""

    overflowed = False

    def gradients(self) -> list[torch.Tensor]:
        found = super().gradients()
        if not self.overflowed:
            self.overflowed, found[0][0, 0] = True, torch.inf
        return found


FROZEN = {
    "codes and the rest": {"codebook_lr": 0.0, "scale_lr": 0.0},
    "codes alone": {"codebook_lr": 0.0, "scale_lr": 0.0, "weight_lr": 0.0, "bias_lr": 0.0},
}


@pytest.mark.parametrize("frozen", FROZEN)
@pytest.mark.parametrize(("dtype", "decode"), [(torch.float32, "call"), (torch.float16, "step")])
def test_infinite_gradients_of_codes_are_seen(dtype, decode, frozen):
    """float16 skips the step and takes a smaller scale; other types cannot be helped."""
    points, unet = tiny_students.points(tiny_students.teacher()), tiny_students.student(tiny_students.FORMATS["own"])
    updates = Overflowing(unet, CodeUpdateSettings(code_lr=0.3, code_fraction=0.5))
    trainer = tiny_students.trainer(unet, 20, decode=decode, updates=updates, dtype=dtype, **FROZEN[frozen])
    before = {name: tensor.clone() for name, tensor in unet.named_parameters()}
    chosen = points.all()[:4]
    if dtype == torch.float16:
        scale = 2.0**16  # that scalers begin with
        assert trainer.step(points, chosen).codes == {}
        assert trainer.scaler.get_scale() == scale / 2
    else:
        with pytest.raises(Diverged, match="the gradient is not finite at step 1"):
            trainer.step(points, chosen)
    assert all(torch.equal(tensor, before[name]) for name, tensor in unet.named_parameters())
    assert all(drift.u.isfinite().all() for drift in updates.drifts.values())
    assert sum(trainer.step(points, chosen).codes["groups_changed"] for _ in range(3)) > 0


def test_a_gradient_that_overflows_at_every_scale_ends_training():
    points, unet = tiny_students.points(tiny_students.teacher()), tiny_students.student(tiny_students.FORMATS["own"])
    trainer = tiny_students.trainer(unet, dtype=torch.float16)
    unet.conv_in.bias.register_hook(lambda gradient: gradient * torch.inf)
    trainer.scaler = torch.amp.GradScaler("cpu", init_scale=4 * SMALLEST_SCALE)
    with pytest.raises(Diverged, match="the gradient is not finite at step 3"):
        for _ in range(9):
            trainer.step(points, points.all()[:1])


def test_gradient_checkpointing_changes_nothing():
    points, spec = tiny_students.points(tiny_students.teacher()), tiny_students.FORMATS["own"]
    plain, frugal = tiny_students.student(spec), tiny_students.student(spec)
    frugal.enable_gradient_checkpointing()
    found, wanted = (tiny_students.trainer(unet).step(points, points.all()[:4]) for unet in (frugal, plain))
    assert found.gradient_norm == pytest.approx(wanted.gradient_norm, rel=1e-5)


def test_a_loss_that_is_not_finite_ends_training():
    points, unet = tiny_students.points(tiny_students.teacher()), tiny_students.student(tiny_students.FORMATS["own"])
    group = points.parts[0].groups[0]
    group.batched[group.calls[0].output][0] = torch.nan
    trainer = tiny_students.trainer(unet)
    with pytest.raises(Diverged, match="the loss is nan at step 1"):
        trainer.step(points, points.all()[:4])


def test_the_teacher_computes_outputs_that_are_not_recorded():
    teacher, spec = tiny_students.teacher(), tiny_students.FORMATS["own"]
    points = tiny_students.points(teacher)
    wanted = tiny_students.trainer(tiny_students.student(spec)).step(points, points.all()[:4])
    points.parts[0] = recorded.without_outputs(points.parts[0])
    trainer = tiny_students.trainer(tiny_students.student(spec))
    trainer.loss_fn = DistillationLoss(trainer.loss_fn.student, teacher, torch.float32, 8, tiny_students.ALONE)
    assert trainer.step(points, points.all()[:4]).loss == pytest.approx(wanted.loss, rel=1e-4)


def test_a_restored_state_continues_as_without_a_stop():
    points, spec = tiny_students.points(tiny_students.teacher()), tiny_students.FORMATS["shared"]
    straight = train(tiny_students.student(spec), points, 4, ema_decay=0.5)
    halted = tiny_students.trainer(tiny_students.student(spec), 4, ema_decay=0.5)
    every = points.all()
    for k in range(2):
        halted.step(points, every[8 * k : 8 * k + 8])
    state = {name: {key: one.clone() for key, one in part.items()} for name, part in halted.state_tensors().items()}
    again = tiny_students.trainer(tiny_students.student(spec), 4, ema_decay=0.5)
    again.load_state(state, 2, halted.scaler.state_dict())
    for k in range(2, 4):
        again.step(points, [every[(8 * k + i) % len(every)] for i in range(8)])
    for name, tensor in straight.result_tensors().items():
        assert torch.equal(again.result_tensors()[name], tensor), name


def test_codes_learn_with_all_else_and_go_on_after_a_stop():
    points, spec = tiny_students.points(tiny_students.teacher()), tiny_students.FORMATS["shared"]
    every, unets = points.all(), [tiny_students.student(spec) for _ in range(2)]
    settings = CodeUpdateSettings(code_lr=0.3, code_fraction=0.5)
    before = tiny_students.codes(unets[0])
    straight, halted = (tiny_students.trainer(unet, 4, updates=CodeUpdates(unet, settings)) for unet in unets)
    counts = [straight.step(points, every[4 * k : 4 * k + 4]).codes for k in range(4)]
    for k in range(2):
        halted.step(points, every[4 * k : 4 * k + 4])
    state = {name: {key: one.clone() for key, one in part.items()} for name, part in halted.state_tensors().items()}
    unet = tiny_students.student(spec)
    again = tiny_students.trainer(unet, 4, updates=CodeUpdates(unet, settings))
    again.load_state(state, 2, {})
    for k in range(2, 4):
        again.step(points, every[4 * k : 4 * k + 4])
    assert sum(count["groups_changed"] for count in counts) > 0
    assert any(not torch.equal(before[name], tensor) for name, tensor in tiny_students.codes(unets[0]).items())
    for name, tensor in straight.result_tensors().items():
        assert torch.equal(again.result_tensors()[name], tensor), name


def test_labels_masks_and_timesteps_stay_as_they_are():
    floats, kept = (
        torch.ones(2),
        {"class_labels": torch.arange(2), "mask": torch.ones(2) > 0, "timestep": torch.ones(2)},
    )
    cast = _cast({"sample": floats, "added": {"text_embeds": floats}, **kept}, torch.float16)
    assert cast["sample"].dtype == cast["added"]["text_embeds"].dtype == torch.float16
    assert all(cast[name] is value for name, value in kept.items())


def test_the_learning_rate_warms_up_and_decays():
    config = OptimizerConfig(lr_scheduler="linear", lr_warmup_steps=3)
    assert [schedule_factor(k, 10, config) for k in range(5)] == pytest.approx([0.25, 0.45, 0.6, 0.7, 0.6])
    cosine = OptimizerConfig(lr_warmup_steps=0)
    assert [schedule_factor(k, 2, cosine) for k in (0, 1, 2)] == pytest.approx([1.0, 0.5, 0.0])
    assert schedule_factor(9, 10, OptimizerConfig(lr_scheduler="constant", lr_warmup_steps=0)) == 1.0


def test_the_automatic_learning_rate_is_proportional_to_the_error():
    found = [choose_learning_rate(OptimizerConfig(), db) for db in (-50.0, -60.0, -70.0)]
    assert all(one / two == pytest.approx(10**0.5, rel=0.05) for one, two in pairwise(found))
    assert [choose_learning_rate(OptimizerConfig(), db) for db in (-200.0, 3.0)] == list(LEARNING_RATES)
    assert choose_learning_rate(OptimizerConfig(finetune_lr=0.03), -60.0) == 0.03


def test_kinds():
    unet = tiny_students.student(tiny_students.FORMATS["shared"], rounded=True)
    kinds, name = kinds_of(unet), tiny_students.NAMES[0]
    assert kinds[f"{SHARED_CODEBOOKS}.shared"] == "codebook" and kinds[f"{name}.scales"] == "scale"
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
