"""Codes that learn: what changes, what is remembered, and that it helps."""

import pytest
import torch
from tiny_students import FORMATS, codes, points, student, teacher, trainer
from torch import nn

from vqdm.additive.code import AdditiveCode, CodeSpec, SharedCodebooks
from vqdm.additive.solve import SolverConfig, solve_layer
from vqdm.additive.trellis import table
from vqdm.errors import UserError
from vqdm.finetuning.code_updates import CodeUpdates, CodeUpdateSettings
from vqdm.layers.quantized import QuantizedLinear, SharedCodebookModule, float_scales, quantized_layers

BOLD = CodeUpdateSettings(code_lr=0.3, code_fraction=0.5, code_trust_ratio=0.5)


def linear_problem(spec=None):
    """A model of one coded layer, inputs [N, I], and a plain layer's outputs."""
    spec = spec or CodeSpec(2, 4, 4)
    generator = torch.Generator().manual_seed(4)
    plain = nn.Linear(16, 8, bias=False)
    plain.weight.data = torch.randn(8, 16, generator=generator)
    layer = QuantizedLinear.like(plain, spec)
    shape = (8, 16 // spec.in_group_size, spec.num_codebooks)
    codes_ = torch.randint(spec.entries, shape, generator=generator)
    books = torch.randn(spec.codebooks_shape, generator=generator)
    layer.set_code(AdditiveCode(spec, codes_, books, torch.ones(8, 1)))
    x = torch.randn(256, 16, generator=generator)
    return nn.Sequential(layer), x, plain(x).detach()


def run(model, x, y, updates, steps):
    """The losses of some steps on all inputs."""
    losses = []
    for _ in range(steps):
        updates.zero_grad()
        loss = (model(x) - y).square().mean()
        loss.backward()
        updates.step()
        losses.append(loss.item())
    return losses


def test_the_loss_falls_by_codes_alone():
    model, x, y = linear_problem()
    updates = CodeUpdates(model, BOLD)
    before = model[0].stored_tensors()
    others = {name: tensor.clone() for name, tensor in before.items() if name != "codes"}
    losses = run(model, x, y, updates, 60)
    assert losses[-1] < 0.35 * losses[0]
    assert all(torch.equal(tensor, model[0].stored_tensors()[name]) for name, tensor in others.items())


def trellis_problem(log_scales):
    """Like `linear_problem`, with trellis codes of other weights than those of the outputs; one column is 0."""
    generator = torch.Generator().manual_seed(4)
    W = torch.randn(96, 40, generator=generator) * 0.02
    W[:, 3] = 0
    spec = CodeSpec(
        1, 8, 1, input_channel_scales=True, shared_codebooks="trellis_8", segment_rows=96, segment_bits=2 * 40 * 96
    ).changed(log_scales=True, scale_exponent=-6)
    codebooks = SharedCodebooks(table(8).view(1, -1, 1, 1), W.numel())
    code, _ = solve_layer(W, torch.eye(40), SolverConfig(spec), generator, shared=codebooks)
    model = nn.Sequential(QuantizedLinear.like(nn.Linear(40, 96, bias=False), spec))
    model[0].shared = (SharedCodebookModule(),)
    model[0].shared[0].reserve(spec, torch.device("cpu"))
    model[0].shared[0].fill("trellis_8", codebooks.codebooks)
    model[0].set_code(code)
    if not log_scales:
        float_scales(model)
    x = torch.randn(256, 40, generator=generator)
    wanted = W + 0.01 * torch.randn(96, 40, generator=generator)
    return model, x, x @ wanted.T


@pytest.mark.parametrize("log_scales", [True, False])
def test_rings_of_a_trellis_are_searched_again_and_the_loss_falls(log_scales):
    model, x, y = trellis_problem(log_scales)
    layer, updates = model[0], CodeUpdates(model, BOLD)
    others = {name: tensor.clone() for name, tensor in layer.stored_tensors().items() if name != "codes"}
    first = layer.code()
    losses = run(model, x, y, updates, 12)
    assert losses[-1] < 0.75 * losses[0]
    assert all(torch.equal(tensor, layer.stored_tensors()[name]) for name, tensor in others.items())
    code = layer.code()
    assert torch.equal(AdditiveCode.unpack(code.spec, (96, 40), code.pack(), code.codebooks).codes, code.codes)
    changed = (code.codes != first.codes)[..., 0].any(0)
    assert updates.changed_groups() == (40, int(changed.sum())) and changed.sum() > 10
    assert not changed[code.widths == 0].any()


def test_a_trellis_changes_no_more_than_the_trust_ratio():
    model, x, y = trellis_problem(log_scales=True)
    updates = CodeUpdates(model, CodeUpdateSettings(code_lr=1.0, code_fraction=1.0, code_trust_ratio=0.2))
    norm, changes = model[0].decoded_matrix().detach().norm(), []
    for _ in range(4):
        before = model[0].decoded_matrix().detach()
        run(model, x, y, updates, 1)
        changes.append((model[0].decoded_matrix().detach() - before).norm() / norm)
    assert 0.1 < max(changes) <= 0.2001


@pytest.mark.parametrize("spec", FORMATS.values(), ids=FORMATS)
def test_training_is_better_with_code_updates(spec):
    recorded = points(teacher())
    losses = []
    for changing in (False, True):
        unet = student(spec)
        learner, before = trainer(unet, total=8, finetune_lr=2e-3), codes(unet)
        learner.updates = CodeUpdates(unet, BOLD) if changing else None
        steps = [learner.step(recorded, recorded.all()[:8]) for _ in range(8)]
        losses.append(steps[-1].loss)
        after = codes(unet)
        changed = {name for name in before if not torch.equal(before[name], after[name])}
        assert changed == ({name for name in before if name.endswith(".codes")} if changing else set())
    assert losses[1] < losses[0]


def test_changes_are_counted_and_pack_exactly():
    model, x, y = linear_problem(CodeSpec(2, 5, 4))
    layer, updates = model[0], CodeUpdates(model, BOLD)
    first = layer.code().codes.clone()
    for _ in range(4):
        updates.zero_grad()
        (model(x) - y).square().mean().backward()
        before = layer.code().codes.clone()
        step = updates.step()
        code = layer.code()
        assert step.changed == int((code.codes != before).any(2).sum()) and step.tried == before[..., 0].numel() // 2
        assert code.codes.min() >= 0 and code.codes.max() < 32
        assert torch.equal(AdditiveCode.unpack(code.spec, (8, 16), code.pack()).codes, code.codes)
        assert updates.changed_groups() == (first[..., 0].numel(), int((code.codes != first).any(2).sum()))


def test_a_layer_changes_no_more_than_the_trust_ratio():
    model, x, y = linear_problem()
    updates = CodeUpdates(model, CodeUpdateSettings(code_lr=1.0, code_fraction=1.0, code_trust_ratio=0.2))
    norm, changes = model[0].decoded_matrix().detach().norm(), []
    for _ in range(8):
        before = model[0].decoded_matrix().detach()
        run(model, x, y, updates, 1)
        changes.append((model[0].decoded_matrix().detach() - before).norm() / norm)
    assert 0.1 < max(changes) <= 0.2001


def test_going_on_from_a_saved_state_is_going_on():
    straight, x, y = linear_problem()
    updates = CodeUpdates(straight, BOLD)
    run(straight, x, y, updates, 5)
    again, _, _ = linear_problem()
    again.load_state_dict({name: tensor.clone() for name, tensor in straight.state_dict().items()})
    resumed = CodeUpdates(again, BOLD)
    resumed.load_state_dict({name: tensor.clone() for name, tensor in updates.state_dict().items()})
    assert run(straight, x, y, updates, 5) == run(again, x, y, resumed, 5)
    assert torch.equal(straight[0].codes, again[0].codes)
    states = updates.state_dict(), resumed.state_dict()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_equal_gradients_make_equal_changes():
    runs = []
    for _ in range(2):
        model, x, y = linear_problem()
        runs.append((run(model, x, y, CodeUpdates(model, BOLD), 6), model[0].codes.clone()))
    assert runs[0][0] == runs[1][0] and torch.equal(runs[0][1], runs[1][1])


def test_gradients_of_parts_add_up_to_those_of_the_whole():
    model, x, y = linear_problem()
    updates, found = CodeUpdates(model), []
    for parts in (1, 4):
        updates.zero_grad()
        for some, wanted in zip(x.chunk(parts), y.chunk(parts), strict=True):
            ((model(some) - wanted).square().mean() / parts).backward()
        found.append(updates.gradients()[0].clone())
    W = model[0].decoded_matrix().detach().requires_grad_()
    (x @ W.T - y).square().mean().backward()
    torch.testing.assert_close(found, [W.grad, W.grad])


def test_layers_that_share_codebooks_keep_them():
    spec = FORMATS["shared"]
    unet = student(spec)
    codebooks = unet.codebook_banks("shared").clone()
    updates = CodeUpdates(unet, BOLD)
    generator = torch.Generator().manual_seed(0)
    for gradient in updates.gradients():
        gradient.copy_(torch.randn(gradient.shape, generator=generator))
    before = codes(unet)
    assert updates.step().changed > 0
    assert torch.equal(unet.codebook_banks("shared"), codebooks)
    assert sum(not torch.equal(before[name], after) for name, after in codes(unet).items()) == len(
        quantized_layers(unet)
    )


def test_no_gradient_changes_nothing_and_closing_leaves_nothing():
    model, x, _ = linear_problem()
    before, updates = model[0].codes.clone(), CodeUpdates(model)
    assert updates.step().changed == 0 and torch.equal(model[0].codes, before)
    updates.close()
    assert model[0].latent is None and not model(x).requires_grad


def test_latents_take_no_room():
    model, _, _ = linear_problem()
    CodeUpdates(model)
    assert model[0].latent.untyped_storage().nbytes() == 4


@pytest.mark.parametrize(
    "setting",
    [
        {"code_lr": 0},
        {"code_memory": 1.1},
        {"code_beta": 1},
        {"code_fraction": 2},
        {"code_beam_size": 0},
        {"code_trust_ratio": 0},
    ],
)
def test_impossible_settings_are_named(setting):
    with pytest.raises(UserError, match=f"--{next(iter(setting))} is"):
        CodeUpdateSettings(**setting)


def test_a_model_without_codes_is_refused():
    with pytest.raises(ValueError, match="no quantized layer"):
        CodeUpdates(nn.Sequential(nn.Linear(4, 4)))
