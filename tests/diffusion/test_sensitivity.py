import re

import pytest
import recorded
import torch
from conftest import tiny_unet

from vqdm.additive.code import CodeSpec
from vqdm.diffusion.blocks import matrix_of, select_layers, weight_of
from vqdm.diffusion.sensitivity import following, output_effects, spread_over_noise
from vqdm.errors import RunError

SPEC = CodeSpec(1, 2, 4)


@pytest.fixture(scope="module")
def unet():
    return tiny_unet("sd15").eval().requires_grad_(False)


@pytest.fixture(scope="module")
def calls():
    torch.manual_seed(1)
    return [
        lambda t=t: {
            "sample": torch.full((2, 4, 8, 8), t / 500),
            "timestep": torch.full((2,), t),
            "encoder_hidden_states": torch.ones(2, 3, 32),
        }
        for t in (10, 900)
    ]


@pytest.mark.parametrize("group_channels", [True, False])
def test_weight_of_is_the_inverse_of_matrix_of(unet, group_channels):
    for layer in (unet.conv_in, unet.time_embedding.linear_1):
        matrix = matrix_of(layer, group_channels)
        assert torch.equal(weight_of(matrix, layer.weight.shape, group_channels), layer.weight)


@torch.no_grad()
def outputs(unet, calls):
    return torch.cat([unet(**call()).sample for call in calls])


def test_effects_are_those_of_the_changes_one_at_a_time(unet, calls):
    """The mean of many draws, against the outputs of a changed UNet."""
    layers = select_layers(unet, "default", 0, CodeSpec(1, 2, 4), {})
    names = [layers[0].name, next(layer.name for layer in layers if layer.kind == "linear")]
    modules = [unet.get_submodule(name) for name in names]
    changes = {name: 0.01 * torch.randn_like(module.weight) for name, module in zip(names, modules, strict=True)}
    expected, before = outputs(unet, calls), [module.weight.clone() for module in modules]
    found = output_effects(unet, changes, calls * 300, torch.Generator().manual_seed)
    for name, module, weight in zip(names, modules, before, strict=True):
        assert torch.equal(module.weight, weight) and not module.weight.requires_grad
        with torch.no_grad():
            module.weight.add_(changes[name])
            error = (outputs(unet, calls) - expected).square().sum() / expected.square().sum()
            module.weight.copy_(weight)
        assert found[name] == pytest.approx(error.item(), rel=0.25)


def test_no_two_gradients_exist_at_once(unet, calls):
    """Whatever the number of layers; and none is left."""
    changes, alive, most = changes_of(unet), [], 0

    def seen(weight):
        nonlocal most
        most = max(most, sum(one.grad is not None for one in alive))

    alive += [unet.get_submodule(name).weight.requires_grad_(True) for name in changes]
    hooks = [weight.register_post_accumulate_grad_hook(seen) for weight in alive]
    try:
        output_effects(unet, changes, calls[:1], torch.Generator().manual_seed)
    finally:
        for hook in hooks:
            hook.remove()
    assert most == 1 and all(weight.grad is None and not weight.requires_grad for weight in alive)


def test_a_layer_that_the_output_does_not_depend_on_has_no_effect(calls):
    """Such as those of the text in the last block of Qwen-Image."""
    unet = tiny_unet("sd15").eval().requires_grad_(False)
    changes = dict(list(changes_of(unet).items())[:2])
    unet.add_module("unused", torch.nn.Linear(2, 2))
    found = output_effects(unet, changes | {"unused": torch.ones(2, 2)}, calls[:1], torch.Generator().manual_seed)
    assert found.pop("unused") == 0 and all(effect > 0 for effect in found.values())


@pytest.fixture
def overflowing(calls):
    """A UNet whose outputs float16 holds, but not the gradients of its weights; and float16 calls of it."""
    unet = tiny_unet("sd15").eval().requires_grad_(False)
    unet.conv_out.weight *= 1000
    half = [lambda call=call: {name: value.half() for name, value in call().items()} for call in calls]
    return unet.half(), half


def changes_of(unet) -> dict:
    generator = torch.Generator().manual_seed(3)
    weights = {layer.name: unet.get_submodule(layer.name).weight for layer in select_layers(unet, "all", 0, SPEC, {})}
    return {
        name: (0.01 * weight.float().std() * torch.randn(weight.shape, generator=generator)).to(weight.dtype)
        for name, weight in weights.items()
    }


def test_gradients_that_overflow_float16_are_scaled(overflowing, calls):
    """The effects are those of float32, where single layers' gradients overflow in a first backward pass."""
    unet, half = overflowing
    changes = changes_of(unet)
    weights = [unet.get_submodule(name).weight for name in changes]
    with following(unet, weights):
        gradients = torch.autograd.grad(unet(**half[0]()).sample.float().sum(), weights)
    assert 0 < sum(gradient.isfinite().all().item() for gradient in gradients) < len(gradients)
    found = output_effects(unet, changes, half, torch.Generator().manual_seed)
    changes = {name: change.float() for name, change in changes.items()}
    exact = output_effects(unet.float(), changes, calls, torch.Generator().manual_seed)
    assert sum(found.values()) == pytest.approx(sum(exact.values()), rel=0.05)
    for name, effect in exact.items():
        assert found[name] == pytest.approx(effect, rel=0.3, abs=1e-3 * max(exact.values())), name


@pytest.mark.parametrize("where", ["output", "gradient"])
def test_what_no_scale_helps_is_an_error_that_names_the_layer(overflowing, where):
    unet, half = overflowing
    changes = changes_of(unet)
    names = list(changes)
    if where == "output":
        unet.conv_out.bias += torch.inf
        words = "the denoiser's output holds NaN or infinity in float16; use --dtype bfloat16 or float32"
    else:
        unet.get_submodule(names[5]).weight.requires_grad_().register_hook(lambda gradient: gradient * torch.nan)
        words = f"layer {names[5]}: the gradient of its weight holds NaN or infinity in float16"
    with pytest.raises(RunError, match=re.escape(words)):
        output_effects(unet, changes, half, torch.Generator().manual_seed)


def test_nothing_stays_behind_after_an_exception(unet):
    layer = select_layers(unet, "default", 0, CodeSpec(1, 2, 4), {})[0]

    def fail():
        raise KeyError

    with pytest.raises(KeyError):
        output_effects(unet, {layer.name: torch.zeros(1)}, [fail], torch.Generator().manual_seed)
    assert not any(parameter.requires_grad for parameter in unet.parameters())


@pytest.mark.parametrize(("prompts", "steps", "count"), [(5, 10, 4), (2, 20, 16), (1, 3, 16)])
def test_points_are_spread_over_prompts_and_steps(prompts, steps, count):
    trajectories = recorded.made(torch.zeros(prompts, steps, 1, 1, 1), torch.arange(steps))
    points = spread_over_noise(trajectories, count)
    assert len(points) == min(count, prompts * steps)
    assert {n for n, _ in points} == set(range(min(count, prompts)))
    found = [s for _, s in points]
    assert found == sorted(found) and 0 <= found[0] <= steps // 2 <= found[-1] < steps
