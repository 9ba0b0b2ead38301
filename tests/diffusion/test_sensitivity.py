import pytest
import torch
from conftest import tiny_unet

from vqdm.additive.code import CodeSpec
from vqdm.diffusion.blocks import matrix_of, select_layers, weight_of
from vqdm.diffusion.sensitivity import output_effect, outputs, replaced_weight, spread_over_noise
from vqdm.diffusion.trajectories import Trajectories


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


def test_the_effect_is_that_of_the_changed_weight_alone(unet, calls):
    layers = select_layers(unet, "default", 0, CodeSpec(1, 2, 4), {})
    for layer in (layers[0], next(layer for layer in layers if layer.kind == "linear")):
        module = unet.get_submodule(layer.name)
        before, expected = module.weight.clone(), outputs(unet, calls)
        matrix = matrix_of(module, True)
        assert output_effect(unet, layer, matrix, calls, expected) == 0
        small = output_effect(unet, layer, 0.99 * matrix, calls, expected)
        large = output_effect(unet, layer, 0.9 * matrix, calls, expected)
        assert torch.equal(module.weight, before)
        assert large == pytest.approx(100 * small, rel=0.3)  # quadratic
        with torch.no_grad():
            module.weight.mul_(0.9)
            changed = outputs(unet, calls)
            module.weight.copy_(before)
        error = sum((a - b).square().sum() for a, b in zip(changed, expected, strict=True))
        assert large == pytest.approx((error / sum(b.square().sum() for b in expected)).item(), rel=1e-4)


def test_the_weight_comes_back_after_an_exception(unet):
    layer = select_layers(unet, "default", 0, CodeSpec(1, 2, 4), {})[0]
    weight = unet.get_submodule(layer.name).weight
    before = weight.clone()
    with pytest.raises(KeyError), replaced_weight(unet, layer, torch.zeros(layer.rows, layer.columns)):
        assert weight.abs().sum() == 0
        raise KeyError
    assert torch.equal(weight, before)


@pytest.mark.parametrize(("prompts", "steps", "count"), [(5, 10, 4), (2, 20, 16), (1, 3, 16)])
def test_points_are_spread_over_prompts_and_steps(prompts, steps, count):
    trajectories = Trajectories(torch.zeros(prompts, steps, 1, 1, 1), torch.arange(steps), {})
    points = spread_over_noise(trajectories, count)
    assert len(points) == min(count, prompts * steps)
    assert {n for n, _ in points} == set(range(min(count, prompts)))
    found = [s for _, s in points]
    assert found == sorted(found) and 0 <= found[0] <= steps // 2 <= found[-1] < steps
