"""Weights that are held over several passes give the gradients of passes that decode by themselves."""

import pytest
import tiny_students
import torch

from vqdm.finetuning.config import OptimizerConfig
from vqdm.finetuning.parameters import trainable
from vqdm.layers.held import held_weights
from vqdm.layers.quantized import quantized_layers


def gradients(unet, points, held: bool) -> dict[str, torch.Tensor]:
    """Of the sum of squares of two batches' outputs, by parameter; and of latents."""
    latents = {}
    for name, layer in quantized_layers(unet).items():
        layer.latent = torch.zeros(layer._rows, layer._columns, requires_grad=True)
        latents[name] = layer.latent
    trained = trainable(unet, OptimizerConfig())

    def passes():
        for some in (points.all()[:3], points.all()[3:7]):
            batch = points.batch(some, tiny_students.CPU, torch.float32)
            unet(**batch.call).sample.square().sum().backward()

    if held:
        with held_weights(unet):
            passes()
    else:
        passes()
    return {name: tensor.grad for name, tensor in {**trained.tensors, **latents}.items()}


@pytest.mark.parametrize("spec", tiny_students.FORMATS.values(), ids=list(tiny_students.FORMATS))
def test_gradients_are_those_of_decoding_in_every_call(spec):
    points = tiny_students.points(tiny_students.teacher(), prompts=2)
    wanted = gradients(tiny_students.student(spec), points, held=False)
    found = gradients(tiny_students.student(spec), points, held=True)
    assert wanted.keys() == found.keys() and any("scale" in name for name in found)
    for name, gradient in wanted.items():
        largest = gradient.abs().max().item()
        torch.testing.assert_close(found[name], gradient, rtol=1e-3, atol=1e-4 * largest, msg=name)


def test_nothing_is_left_behind():
    unet = tiny_students.student(tiny_students.FORMATS["own"])
    trained = trainable(unet, OptimizerConfig())
    points = tiny_students.points(tiny_students.teacher(), prompts=2)
    batch = points.batch(points.all()[:2], tiny_students.CPU, torch.float32)
    with pytest.raises(ZeroDivisionError), held_weights(unet):
        unet(**batch.call).sample.square().sum().backward()
        raise ZeroDivisionError
    layers = quantized_layers(unet).items()
    assert all(layer.held is None for _, layer in layers)
    assert all(trained.tensors[f"{name}.codebooks"].grad is None for name, _ in layers)


def test_gradients_agree_with_finite_differences():
    unet = tiny_students.student(tiny_students.FORMATS["own"], tiny_students.NAMES[:1])
    points = tiny_students.points(tiny_students.teacher(), prompts=2)
    batch = points.batch(points.all()[:2], tiny_students.CPU, torch.float32)
    layer = quantized_layers(unet)[tiny_students.NAMES[0]]
    trainable(unet, OptimizerConfig())

    def loss() -> torch.Tensor:
        return (unet(**batch.call).sample.double() - batch.teacher_output).square().mean()

    with held_weights(unet):
        loss().backward()
    for tensor in (layer.codebooks, layer.scales, layer.bias):
        direction = tensor.grad / tensor.grad.norm()
        step = 0.02 * tensor.detach().norm()
        with torch.no_grad():
            tensor += step * direction
            above = loss()
            tensor -= 2 * step * direction
            below = loss()
            tensor += step * direction
        slope = ((above - below) / (2 * step)).item()
        assert slope == pytest.approx(tensor.grad.norm().item(), rel=0.02)
