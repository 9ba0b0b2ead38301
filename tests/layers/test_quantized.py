import copy
import pickle

import pytest
import tiny_students
import torch
from numerics import random_widths
from torch import nn
from torch._dynamo.testing import CompileCounter
from torch._subclasses.fake_tensor import FakeTensorMode

from vqdm.additive import trellis
from vqdm.additive.code import AdditiveCode, CodeSpec, first_entries
from vqdm.finetuning.config import OptimizerConfig
from vqdm.finetuning.trainer import trainable
from vqdm.layers.quantized import (
    QuantizedConv2d,
    QuantizedLinear,
    SharedCodebookModule,
    decoded_once,
    float_scales,
    held_weights,
    quantized_layers,
    swap,
)

SPECS = [
    CodeSpec(2, 4, 4),
    CodeSpec(3, 5, 8),
    CodeSpec(1, 8, 4, out_group_size=2, scale_nbits=4),
    CodeSpec(2, 4, 4, groupwise_codebooks=True, codebook_value_nbits=6, input_channel_scales=True),
    CodeSpec(2, 3, 4, group_channels=False, scale_nbits=16),
]


def random_code(spec: CodeSpec, rows: int, columns: int) -> AdditiveCode:
    """A code of random values."""
    generator = torch.Generator().manual_seed(0)
    R, G = rows // spec.out_group_size, columns // spec.in_group_size
    sets = (G,) if spec.groupwise_codebooks else ()
    shape = (*sets, spec.num_codebooks, spec.entries, spec.out_group_size, spec.in_group_size)
    codes, widths = torch.randint(0, 2**spec.nbits_per_codebook, (R, G, spec.num_codebooks), generator=generator), None
    if spec.row_bits:
        widths = random_widths(G, spec.row_bits, spec.nbits_per_codebook, generator)
        codes = codes % 2 ** widths[:, None] + first_entries(widths)[:, None]
    return AdditiveCode(
        spec,
        codes,
        torch.randn(shape, generator=generator).half().float(),  # what shared codebooks hold
        torch.rand(R, G if spec.scale_nbits else 1, generator=generator) + 0.5,
        torch.rand(columns, generator=generator) + 0.5 if spec.input_channel_scales else None,
        widths,
    ).stored()


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("bias", [True, False])
def test_linear_equals_a_plain_layer_of_the_decoded_weight(spec, bias):
    plain = nn.Linear(16, 8, bias=bias)
    layer, code = QuantizedLinear.like(plain, spec), random_code(spec, 8, 16)
    layer.set_code(code)
    x = torch.randn(3, 5, 16)
    torch.testing.assert_close(layer(x), nn.functional.linear(x, code.dequantize(), plain.bias))
    assert isinstance(layer, nn.Linear) and "weight" not in dict(layer.named_parameters())


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize(
    "options",
    [
        dict(kernel_size=3, padding=1),
        dict(kernel_size=3, stride=2, padding=1),
        dict(kernel_size=(1, 3), dilation=2, padding="same", padding_mode="reflect"),
        dict(kernel_size=1, bias=False),
        dict(kernel_size=(3, 2), stride=(2, 3), padding=(0, 2), dilation=(1, 2)),
        dict(kernel_size=(2, 4), padding="same"),
        dict(kernel_size=3, padding="valid", dilation=2),
        dict(kernel_size=3, stride=2, padding=1, padding_mode="circular"),
    ],
)
def test_conv_equals_a_plain_layer_of_the_decoded_weight(spec, options):
    plain = nn.Conv2d(8, 4, **options)
    taps = plain.kernel_size[0] * plain.kernel_size[1]
    layer, code = QuantizedConv2d.like(plain, spec), random_code(spec, 4, 8 * taps)
    layer.set_code(code)
    matrix = code.dequantize()
    if spec.group_channels:
        kernel = matrix.view(4, *plain.kernel_size, 8).permute(0, 3, 1, 2)
    else:
        kernel = matrix.view(4, 8, *plain.kernel_size)
    plain.weight.data = kernel.contiguous()
    x = torch.randn(2, 8, 7, 9)
    torch.testing.assert_close(layer(x), plain(x))
    torch.testing.assert_close(layer.weight.float(), kernel, rtol=1e-3, atol=1e-3)


def test_stored_bits_are_those_of_the_tensors():
    layer = QuantizedLinear(64, 32, CodeSpec(3, 5, 8))
    codes, codebooks, scales = 32 * 8 * 3 * 5, 3 * 32 * 8 * 16, 32 * 16
    assert layer.stored_bits == codes + codebooks + scales
    held = sum(8 * p.element_size() * p.numel() for p in layer.parameters())
    assert held == layer.stored_bits


def test_swap_by_dotted_name_keeps_the_bias_and_the_mode():
    model = nn.Sequential(nn.Sequential(nn.Linear(8, 8)), nn.Conv2d(8, 8, 1)).eval()
    bias = model[0][0].bias
    swapped = swap(model, "0.0", CodeSpec(2, 4, 4))
    swap(model, "1", CodeSpec(2, 4, 4))
    assert swapped.bias is bias and not swapped.training
    assert list(quantized_layers(model)) == ["0.0", "1"]


def test_deepcopy_and_state_dict_keep_the_weight():
    layer = QuantizedLinear.like(nn.Linear(16, 8), SPECS[0])
    layer.set_code(random_code(SPECS[0], 8, 16))
    twin = copy.deepcopy(layer)
    other = QuantizedLinear.like(nn.Linear(16, 8), SPECS[0])
    other.load_state_dict(layer.state_dict())
    assert torch.equal(twin.weight, layer.weight) and torch.equal(other.weight, layer.weight)


def test_decoded_once_keeps_weights_inside_only():
    model = nn.Sequential(QuantizedLinear.like(nn.Linear(16, 8), SPECS[0]))
    model[0].set_code(random_code(SPECS[0], 8, 16))
    x = torch.randn(2, 16)
    with torch.no_grad(), decoded_once(model):
        first = model(x)
        kept = model[0]._decoded
        assert torch.equal(model(x), first) and model[0]._decoded is kept is not None
    assert model[0]._decoded is None
    torch.testing.assert_close(model(x), first)


def test_gradients_reach_codebooks_also_inside_decoded_once():
    layer = QuantizedLinear.like(nn.Linear(16, 8), SPECS[0])
    layer.set_code(random_code(SPECS[0], 8, 16))
    layer.codebooks = nn.Parameter(layer.codebooks.float())
    with decoded_once(layer):
        layer(torch.randn(2, 16)).square().sum().backward()
    assert layer.codebooks.grad.abs().sum() > 0


def test_a_code_of_another_shape_is_refused():
    layer = QuantizedLinear.like(nn.Linear(16, 8), SPECS[0])
    with pytest.raises(ValueError, match="codebooks has shape"):
        layer.set_code(random_code(CodeSpec(2, 4, 8), 8, 32))


@pytest.mark.parametrize("learned", [False, True])
def test_a_model_compiles_to_one_graph(learned):
    model = nn.Sequential(nn.Conv2d(8, 4, 3, padding=1, padding_mode="reflect"), nn.SiLU(), nn.Linear(8, 8))
    for name, shape in (("0", (4, 72)), ("2", (8, 8))):
        swap(model, name, SPECS[0]).set_code(random_code(SPECS[0], *shape))
        layer = model.get_submodule(name)
        layer.scales = nn.Parameter(layer.scales.float(), learned)
    x = torch.randn(2, 8, 6, 8)
    with torch.set_grad_enabled(learned):
        found = torch.compile(model, fullgraph=True, backend="aot_eager")(x)
        torch.testing.assert_close(found, model(x))
    assert found.requires_grad == (learned or any(p.requires_grad for p in model.parameters() if learned))


class Block(nn.Module):
    """A block of two layers, to be compiled for all blocks of its class."""

    def __init__(self, specs: tuple[CodeSpec, CodeSpec]):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(16, 8), nn.SiLU(), nn.Linear(8, 16))
        for name, spec, shape in zip("02", specs, ((8, 16), (16, 8)), strict=True):
            swap(self.layers, name, spec).set_code(random_code(spec, *shape))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.layers(x)


@pytest.mark.parametrize("grad", [False, True])
def test_blocks_of_other_bits_share_a_graph(grad):
    specs = [CodeSpec(1 + n % 3, 2 + n, 4, scale_nbits=4 * (n % 2)) for n in range(12)]
    blocks, counter, x = nn.ModuleList(Block((spec, specs[0])) for spec in specs), CompileCounter(), torch.randn(3, 16)
    blocks.requires_grad_(False)
    torch._dynamo.reset()
    with torch.set_grad_enabled(grad):
        expected = [block(x) for block in blocks]
        for block in blocks:
            block.compile(fullgraph=True, backend=counter, dynamic=False)
        if not grad:  # with gradients, codebooks of other sizes are looked at
            torch.testing.assert_close([block(x) for block in blocks], expected, rtol=0, atol=0)
            assert counter.frame_count == 1
        else:
            torch.testing.assert_close([block(x) for block in blocks[:4]], expected[:4], rtol=0, atol=0)


def test_a_compiled_copy_is_another_layer():
    layer = QuantizedLinear.like(nn.Linear(16, 8), SPECS[0])
    layer.set_code(random_code(SPECS[0], 8, 16))
    compiled, x = torch.compile(layer, fullgraph=True, backend="eager"), torch.randn(2, 16)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        other.codebooks.data += 1
        with torch.no_grad():
            torch.testing.assert_close(compiled(x), layer(x), rtol=0, atol=0)
            found = torch.compile(other, fullgraph=True, backend="eager")(x)
            torch.testing.assert_close(found, other(x), rtol=0, atol=0)
            assert not torch.allclose(other(x), layer(x))


def test_compiled_layers_keep_what_they_decode_once(monkeypatch):
    layer = QuantizedLinear.like(nn.Linear(16, 8), SPECS[0])
    layer.set_code(random_code(SPECS[0], 8, 16))
    compiled, x = torch.compile(layer, fullgraph=True, backend="eager"), torch.randn(2, 16)
    with torch.no_grad(), decoded_once(layer):
        expected = compiled(x)
        monkeypatch.setattr("vqdm.layers.quantized.decode", None)
        torch.testing.assert_close(compiled(x), expected, rtol=0, atol=0)


def test_an_exported_program_needs_no_layer():
    layer = QuantizedLinear.like(nn.Linear(16, 8), SPECS[0])
    layer.set_code(random_code(SPECS[0], 8, 16))
    x = torch.randn(2, 16)
    expected, program = layer(x), torch.export.export(layer, (x,)).module()
    del layer
    torch.testing.assert_close(program(x), expected)
    with FakeTensorMode():
        assert QuantizedLinear.like(nn.Linear(16, 8), SPECS[0])(torch.ones(2, 16)).shape == (2, 8)


def test_a_compiled_graph_passes_gradients_through_frozen_layers():
    layer = QuantizedLinear.like(nn.Linear(16, 8), SPECS[0])
    layer.set_code(random_code(SPECS[0], 8, 16))
    layer.requires_grad_(False)
    x = torch.randn(2, 16, requires_grad=True)
    found, expected = (
        torch.autograd.grad(call(x).square().sum(), x)
        for call in (torch.compile(layer, fullgraph=True, backend="aot_eager"), layer)
    )
    torch.testing.assert_close(found, expected)


def test_a_call_uses_the_codebooks_that_the_layer_is_given():
    class Borrowing(QuantizedLinear):
        def _codebooks(self):
            return self.books

    layer, code = Borrowing.like(nn.Linear(16, 8), SPECS[0]), random_code(SPECS[0], 8, 16)
    layer.set_code(code)
    layer.books = nn.Parameter(code.codebooks.float() * 2)
    x = torch.randn(3, 16)
    wanted = nn.functional.linear(x, 2 * code.dequantize(), layer.bias)
    torch.testing.assert_close(layer(x), wanted)
    torch.testing.assert_close(layer.weight.float(), 2 * code.dequantize(), rtol=1e-3, atol=1e-3)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), wanted)
    layer(x).sum().backward()
    assert layer.books.grad.abs().sum() > 0


def trellis_spec(rows, columns, **changes):
    """Two bits per weight, every column alike."""
    return CodeSpec(
        1,
        6,
        1,
        input_channel_scales=True,
        shared_codebooks="trellis",
        segment_rows=rows,
        segment_bits=2 * rows * columns,
    ).changed(**changes)


@pytest.mark.parametrize("exponent", [-9, 0, 5])
def test_scales_of_a_trellis_become_float16_of_the_same_values(exponent):
    rows, columns = 8, 16
    spec, generator = (
        trellis_spec(rows, columns, log_scales=True, scale_exponent=exponent),
        torch.Generator().manual_seed(0),
    )
    layer = QuantizedLinear.like(nn.Linear(columns, rows), spec)
    layer.shared = (SharedCodebookModule(),)
    layer.shared[0].reserve(spec, torch.device("cpu"))
    tensors = layer.stored_tensors()
    tensors["code_widths"].fill_(8)
    for name in ("codes", "scale_logarithms", "input_scale_logarithms"):
        low, high = (0, 256) if name == "codes" else (100, 150)
        tensors[name].copy_(torch.randint(low, high, tensors[name].shape, generator=generator))
    tensors["input_scale_logarithms"][3] = 0
    layer.shared[0].fill("trellis", trellis.table(6).view(1, -1, 1, 1))
    model, x = nn.Sequential(layer), torch.randn(3, columns)
    before, bits = layer.decoded_matrix(), layer.stored_bits
    assert float_scales(model) == {"0.scales": torch.float16, "0.input_scales": torch.float16}
    assert torch.equal(layer.decoded_matrix(), before) and before.any() and not before[:, 3].any()
    assert layer.spec == trellis_spec(rows, columns)
    layer.spec.check_tensors(rows, columns, layer.stored_tensors())
    assert layer.stored_bits == bits + 8 * (rows + columns)
    torch.testing.assert_close(layer(x), nn.functional.linear(x, before, layer.bias))
    assert float_scales(model) == {}


def test_autocast_decodes_into_its_own_type():
    layer, code = QuantizedLinear.like(nn.Linear(16, 8), SPECS[0]), random_code(SPECS[0], 8, 16)
    layer.set_code(code)
    x = torch.randn(3, 16)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        found = layer(x)
        wanted = nn.functional.linear(x, code.dequantize(), layer.bias)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found, wanted)


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
