import json
from dataclasses import replace

import pytest
import torch
from conftest import tiny_unet
from safetensors.torch import load_file
from torch import nn

from vqdm.additive.code import CodeSpec
from vqdm.devices import BatchSize
from vqdm.diffusion import hessians
from vqdm.diffusion.blocks import Layer, matrix_of, select_layers
from vqdm.diffusion.hessians import (
    DenoiserCall,
    HessianAccumulator,
    HessianStore,
    InputRows,
    passes,
    record_hessians,
    shared_inputs,
)
from vqdm.errors import RunError, UserError
from vqdm.storage.files import save_checked

SPEC = CodeSpec(num_codebooks=2, nbits_per_codebook=4, in_group_size=4)


def call(seed: int, size: int = 2) -> dict:
    """Keyword arguments of a tiny SDXL UNet's call."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    added = {"text_embeds": draw(size, 32), "time_ids": torch.ones(size, 6)}
    return {
        "sample": draw(size, 4, 8, 8),
        "timestep": torch.tensor([500.0] * size),
        "encoder_hidden_states": draw(size, 5, 64),
        "added_cond_kwargs": added,
    }


def plain_rows(conv: nn.Conv2d, x: torch.Tensor) -> torch.Tensor:
    """im2col by loops over output positions: [N, kh·kw·C]."""
    (ph, pw), (sh, sw), (dh, dw) = conv.padding, conv.stride, conv.dilation
    x = torch.nn.functional.pad(x, (pw, pw, ph, ph))
    height, width = conv(torch.zeros(1, conv.in_channels, x.shape[2] - 2 * ph, x.shape[3] - 2 * pw)).shape[-2:]
    rows = []
    for image in x:
        for i in range(height):
            for j in range(width):
                taps = [
                    image[:, i * sh + a * dh, j * sw + b * dw]
                    for a in range(conv.kernel_size[0])
                    for b in range(conv.kernel_size[1])
                ]
                rows.append(torch.cat(taps))
    return torch.stack(rows)


@pytest.mark.parametrize(
    "options",
    [
        dict(kernel_size=3, padding=1),
        dict(kernel_size=3, stride=2, padding=1),
        dict(kernel_size=3, padding=2, dilation=2),
        dict(kernel_size=(1, 3), padding=(0, 1), stride=(2, 1)),
        dict(kernel_size=1),
    ],
)
def test_conv_hessian_equals_im2col(options, monkeypatch):
    """Also where it is computed in strips that do not divide it, from parts of the samples."""
    conv, x = nn.Conv2d(3, 4, **options), torch.randn(2, 3, 6, 7)
    rows = plain_rows(conv, x).double()
    inputs = InputRows(conv, x, group_channels=True)
    assert inputs.count == len(rows)
    assert inputs.mean_square() == pytest.approx(rows.square().mean(0).max().item())
    for values, strip in ((2**25, 1024), (100, 4)):
        monkeypatch.setattr(hessians, "VALUES_PER_PRODUCT", values)
        monkeypatch.setattr(hessians, "ROWS_PER_PRODUCT", strip)
        hessian = HessianAccumulator(rows.shape[1], x.device)
        hessian.add(inputs)
        torch.testing.assert_close(hessian.mean().double(), rows.T @ rows / len(rows), rtol=1e-5, atol=1e-6)
        assert torch.equal(hessian.mean(), hessian.mean().T)


def test_only_the_samples_that_count_are_made():
    """Those of a large input are gathered one by one: no unfolded copy of it is needed."""
    conv, x = nn.Conv2d(3, 4, 3, padding=1), torch.randn(2, 3, 6, 7)
    chosen = torch.tensor([0, 5, 41, 42, 83])
    torch.testing.assert_close(InputRows(conv, x, True).rows(chosen), plain_rows(conv, x)[chosen])


@pytest.mark.parametrize("group_channels", [True, False])
def test_rows_times_matrix_is_the_convolution(group_channels):
    conv, x = nn.Conv2d(3, 4, 3, padding=1, bias=False), torch.randn(2, 3, 5, 5)
    product = InputRows(conv, x, group_channels).rows(slice(0, 50)) @ matrix_of(conv, group_channels).T  # [B·L, O]
    torch.testing.assert_close(product.view(2, 25, 4).transpose(1, 2).reshape(2, 4, 5, 5), conv(x))


def test_batches_count_by_their_samples():
    linear, x = nn.Linear(6, 2), torch.randn(7, 3, 6)
    hessian = HessianAccumulator(6, x.device)
    for part in (x[:1], x[1:]):
        hessian.add(InputRows(linear, part, True))
    rows = x.reshape(-1, 6)
    torch.testing.assert_close(hessian.mean(), rows.T @ rows / 21)


def test_recorded_hessians_equal_plain_ones_for_every_layer_and_memory_budget():
    unet = tiny_unet("sdxl")
    layers = [one for one in select_layers(unet, "default", 0, SPEC, {}) if one.block == "up_blocks.0"]
    groups = shared_inputs(unet, layers, call(0))
    seen = {one.name: [] for one in layers}
    hooks = [
        unet.get_submodule(name).register_forward_pre_hook(lambda m, args, name=name: seen[name].append((m, args[0])))
        for name in seen
    ]
    with torch.no_grad():
        for seed in (1, 2):
            unet(**call(seed))
    for hook in hooks:
        hook.remove()
    found = {}
    runs = passes(groups, 1e-9)
    assert len(runs) == len(groups) > len(passes(groups, 1.0)) == 1
    for run in runs:
        found |= record_hessians(unet, run, call(0), [lambda s=s: call(s) for s in (1, 2)], [lambda: call(3)])
    for group in groups:
        for layer in group:
            module = seen[layer.name][0][0]
            inputs = [InputRows(module, x, True) for _, x in seen[layer.name]]
            rows = torch.cat([one.rows(slice(0, one.count)) for one in inputs]).double()
            hessian, held_out = found[group[0].name]
            torch.testing.assert_close(hessian.double(), rows.T @ rows / len(rows), rtol=2e-4, atol=1e-5)
            assert held_out.shape == hessian.shape and not torch.equal(held_out, hessian)


def test_counted_samples_are_a_fair_share():
    """The Hessian of a share is that of a subset of the same rows, near the whole, and the same every time."""
    linear, x = nn.Linear(4, 2), torch.randn(500, 4, 4) @ torch.randn(4, 4)
    whole, part, again = (HessianAccumulator(4, x.device) for _ in range(3))
    for hessian, share in ((whole, 1.0), (part, 0.5), (again, 0.5)):
        for index, batch in enumerate(x.split(100)):
            hessian.add(InputRows(linear, batch, True), (index,), share)
    assert (whole.count, part.count) == (2000, 1000)
    assert torch.equal(part.mean(), again.mean())
    assert (part.mean() - whole.mean()).norm() < 0.15 * whole.mean().norm()


def points_call(points: list[int], branches: int = 2) -> DenoiserCall:
    """A UNet call on points of their own inputs, branches outermost."""

    def make(some: list[int]) -> dict:
        every = [call(100 * branch + point, 1) for branch in range(branches) for point in some]
        added = [one.pop("added_cond_kwargs") for one in every]
        names = ("sample", "timestep", "encoder_hidden_states")
        joined = {name: torch.cat([one[name] for one in every]) for name in names}
        return joined | {"added_cond_kwargs": {name: torch.cat([one[name] for one in added]) for name in added[0]}}

    return DenoiserCall(make, points, points)


@pytest.mark.parametrize("samples_per_input", [0, 1])
def test_hessians_do_not_depend_on_the_batch_size(monkeypatch, samples_per_input):
    """Nor do the samples that count, also where they are multiplied in parts."""
    unet = tiny_unet("sdxl")
    layers = [one for one in select_layers(unet, "default", 0, SPEC, {}) if one.block == "mid_block"]
    groups, first = shared_inputs(unet, layers, call(0)), call(0)
    found = []
    for size, at_once in ((6, 2**25), (1, 2**25), (4, 2**14)):
        monkeypatch.setattr(hessians, "VALUES_PER_PRODUCT", at_once)
        calls = [points_call(list(range(6))[k : k + size]) for k in range(0, 6, size)]
        found.append(record_hessians(unet, groups, first, calls, [], samples_per_input))
    for name, (hessian, _) in found[0].items():
        for other in found[1:]:
            torch.testing.assert_close(other[name][0], hessian, rtol=1e-3, atol=1e-4 * hessian.max().item())


@pytest.mark.parametrize("layer", ["first", "last"])
def test_hessians_are_the_same_where_batches_are_halved(layer, caplog):
    """Wherever in a call the memory ends, nothing is counted twice, nor left out, nor ticked twice."""
    unet = tiny_unet("sdxl")
    layers = [one for one in select_layers(unet, "default", 0, SPEC, {}) if one.block == "mid_block"]
    groups, first, ticks = shared_inputs(unet, layers, call(0)), call(0), []
    module = unet.get_submodule(groups[0 if layer == "first" else -1][0].name)

    def limit(_, inputs):
        if len(inputs[0]) > 4:
            raise torch.OutOfMemoryError("CUDA out of memory")

    calls = [points_call(list(range(7))[k : k + 5]) for k in (0, 5)]
    wanted = record_hessians(unet, groups, first, calls[:1], calls[1:], 1)
    module.register_forward_hook(lambda module, inputs, output: limit(module, inputs))
    size = BatchSize(5)
    with caplog.at_level("INFO", "vqdm"):
        found = record_hessians(unet, groups, first, calls[:1], calls[1:], 1, lambda: ticks.append(1), size=size)
    assert size.value == 2 and len(ticks) == 2 and caplog.text.count("out of memory at batch size 5") == 1
    for name, pair in wanted.items():
        for one, other in zip(pair, found[name], strict=True):
            torch.testing.assert_close(other, one, rtol=1e-3, atol=1e-4 * one.max().item())


def test_samples_per_input_bounds_every_layers_count(monkeypatch):
    unet, counts = tiny_unet("sdxl"), []
    block = [one for one in select_layers(unet, "default", 0, SPEC, {}) if one.block == "mid_block"]
    groups = shared_inputs(unet, block, call(0))
    mean = HessianAccumulator.mean
    monkeypatch.setattr(
        HessianAccumulator, "mean", lambda self: counts.append((self.count, len(self.total))) or mean(self)
    )
    record_hessians(unet, groups, call(0), [lambda s=s: call(s, 16) for s in range(4)], [], samples_per_input=2)
    assert all(count <= 2 * size + 4 for count, size in counts if count) and any(count for count, _ in counts)


def test_layers_that_share_an_input_are_found():
    unet = tiny_unet("sdxl")
    layers = [one for one in select_layers(unet, "default", 0, SPEC, {}) if one.block == "mid_block"]
    groups = [
        [one.name.split("transformer_blocks.")[-1] for one in group] for group in shared_inputs(unet, layers, call(0))
    ]
    assert ["0.attn1.to_q", "0.attn1.to_k", "0.attn1.to_v"] in groups
    assert ["0.attn2.to_k", "0.attn2.to_v"] in groups
    assert sum(len(group) for group in groups) == len(layers)


def hook_count(unet) -> int:
    return sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in unet.modules())


def test_hooks_are_gone_after_an_exception():
    unet = tiny_unet("sdxl")
    layers = [one for one in select_layers(unet, "default", 0, SPEC, {}) if one.block == "mid_block"]
    groups, before = shared_inputs(unet, layers, call(0)), hook_count(unet)

    def explode():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        record_hessians(unet, groups, call(0), [explode], [])
    assert hook_count(unet) == before


def test_nan_names_the_layer():
    unet = tiny_unet("sdxl")
    layers = select_layers(unet, "default", 0, SPEC, {})
    block = [one for one in layers if one.block == "down_blocks.1"]
    groups = shared_inputs(unet, block, call(0))
    bad = call(1)
    bad["sample"][0, 0, 0, 0] = float("nan")
    with pytest.raises(RunError, match=r"layer down_blocks\.1\..* its inputs hold NaN"):
        record_hessians(unet, groups, call(0), [lambda: bad], [])


@pytest.mark.parametrize("bad", ["first", "training"])
def test_inputs_that_are_not_finite_stop_at_once(bad):
    """At the first batch, not after a pass over all of them."""
    unet, made = tiny_unet("sdxl"), []
    block = [one for one in select_layers(unet, "default", 0, SPEC, {}) if one.block == "down_blocks.1"]
    groups, broken = shared_inputs(unet, block, call(0)), call(1)
    broken["sample"][0, 0, 0, 0] = float("inf")

    def batch() -> dict:
        made.append(1)
        return broken if bad == "training" else call(1)

    with pytest.raises(RunError, match=r"layer down_blocks\.1\.\S+: its inputs hold NaN.*--dtype bfloat16 or float32"):
        record_hessians(unet, groups, broken if bad == "first" else call(0), [batch] * 5, [])
    assert len(made) == (1 if bad == "training" else 0)


def test_a_layer_that_never_runs_is_named():
    unet = tiny_unet("sdxl")
    unet.mid_block.idle = nn.Linear(8, 8)
    idle = Layer("mid_block.idle", "mid_block", "linear", 8, 8, SPEC)
    with pytest.raises(RunError, match=r"mid_block\.idle does not run"):
        shared_inputs(unet, [idle], call(0))


def test_only_the_blocks_up_to_the_wanted_one_run():
    unet, ran = tiny_unet("sdxl"), []
    unet.up_blocks[1].register_forward_pre_hook(lambda *_: ran.append(1))
    block = [one for one in select_layers(unet, "default", 0, SPEC, {}) if one.block == "down_blocks.0"]
    record_hessians(unet, shared_inputs(unet, block, call(0)), call(0), [lambda: call(1)], [])
    assert not ran


def test_sums_do_not_depend_on_their_order():
    """Nor on how they are divided, where plain sums in float32 do."""
    torch.manual_seed(0)
    batches = [torch.randn(50, 6) * 10.0 ** torch.randint(-3, 3, (6,)) for _ in range(40)]
    orders = [range(40), reversed(range(40)), torch.randperm(40).tolist()]
    grid = hessians.FINENESS * 2.0**18
    found, plain = [], []
    for order in orders:
        parts = [HessianAccumulator(6, torch.device("cpu"), grid) for _ in range(3)]
        for place, index in enumerate(order):
            parts[place % 3].add(InputRows(nn.Linear(6, 1), batches[index], True))
        parts[0].total += parts[1].total + parts[2].total
        parts[0].count = sum(part.count for part in parts)
        assert parts[0].exact
        found.append(parts[0].mean())
    for order in (range(40), reversed(range(40))):
        plain.append(sum(batches[index].T @ batches[index] for index in order) / 2000)
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])
    assert not torch.equal(*plain)
    torch.testing.assert_close(found[0], plain[0], rtol=1e-5, atol=1e-7 * plain[0].max().item())


def test_inputs_that_grow_are_recorded_on_a_coarser_grid(monkeypatch):
    """Their sums outgrow the grid of the first call; the result is that of a grid that suits from the start."""
    unet = tiny_unet("sdxl")
    block = [one for one in select_layers(unet, "default", 0, SPEC, {}) if one.block == "mid_block"]
    groups = shared_inputs(unet, block, call(0))
    plain = record_hessians(unet, groups, call(0), [lambda: call(1)], [lambda: call(2)])
    grids, first_grids = [], hessians.first_grids

    def finer(*args) -> tuple:
        found, single = first_grids(*args)
        return {name: grid * 2.0**-40 for name, grid in found.items()}, single

    monkeypatch.setattr(hessians, "first_grids", finer)
    init = HessianAccumulator.__init__
    monkeypatch.setattr(
        HessianAccumulator, "__init__", lambda self, n, d, grid: grids.append(grid) or init(self, n, d, grid)
    )
    again = record_hessians(unet, groups, call(0), [lambda: call(1)], [lambda: call(2)])
    assert len(grids) > 2 * len(groups)
    for name, (hessian, held_out) in again.items():
        torch.testing.assert_close(hessian, plain[name][0], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(held_out, plain[name][1], rtol=1e-4, atol=1e-5)


def test_no_held_out_calls_give_no_held_out_hessian():
    unet = tiny_unet("sdxl")
    block = [one for one in select_layers(unet, "default", 0, SPEC, {}) if one.block == "mid_block"]
    found = record_hessians(unet, shared_inputs(unet, block, call(0)), call(0), [lambda: call(1)], [])
    assert all(held_out is None for _, held_out in found.values())


SETTINGS = {"model": "abc", "sampling": {"num_inference_steps": 2}}


def layer(name, kind="linear", **changes):
    return Layer(name, "mid_block", kind, 4, 4, CodeSpec(**changes))


def test_layers_that_share_an_input_share_a_file(tmp_path):
    store = HessianStore(tmp_path / "new", SETTINGS)
    hessian, other = (one + one.T for one in torch.rand(2, 4, 4))
    store.save([layer("a"), layer("b")], hessian, other)
    store.save([layer("c")], other, None)
    again = HessianStore(tmp_path / "new", SETTINGS)
    assert layer("b") in again and layer("d") not in again
    found = again.load(layer("b"))
    assert torch.equal(found[0], hessian) and torch.equal(found[1], other)
    assert again.load(layer("c"))[1] is None
    assert again.groups([layer("a"), layer("c"), layer("b")]) == [[layer("a"), layer("b")], [layer("c")]]
    assert len(list((tmp_path / "new").glob("*.safetensors"))) == 2


def test_the_order_of_a_convolutions_columns_counts(tmp_path):
    store = HessianStore(tmp_path, SETTINGS)
    store.save([layer("a", "conv")], torch.eye(4), None)
    assert layer("a", "conv", group_channels=False) not in store
    assert layer("a", "conv") in store


def test_other_settings_are_named(tmp_path):
    HessianStore(tmp_path, SETTINGS).save([layer("a")], torch.eye(4), None)
    with pytest.raises(UserError, match=r"of another run: num_inference_steps was 2, now 3; choose"):
        HessianStore(tmp_path, {"model": "abc", "sampling": {"num_inference_steps": 3}})


@pytest.mark.parametrize("content", ["{", "[]", json.dumps({"settings": SETTINGS})])
def test_a_damaged_index_is_named(tmp_path, content):
    (tmp_path / "hessians.json").write_text(content)
    with pytest.raises(UserError, match=r"hessians\.json is damaged"):
        HessianStore(tmp_path, SETTINGS)


def test_a_missing_or_cut_file_is_named(tmp_path):
    store = HessianStore(tmp_path, SETTINGS)
    store.save([layer("a")], torch.eye(4), None)
    path = tmp_path / "a.safetensors"
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(RunError, match=r"a\.safetensors is missing or damaged"):
        store.load(layer("a"))
    path.unlink()
    with pytest.raises(RunError, match=r"a\.safetensors is missing or damaged"):
        store.load(layer("a"))


@pytest.mark.parametrize("columns", [1, 2, 37])
def test_half_of_a_symmetric_matrix_is_stored_and_comes_back_exactly(tmp_path, columns):
    one, store = replace(layer("a"), columns=columns), HessianStore(tmp_path, SETTINGS)
    hessian = torch.randn(columns, columns)
    hessian += hessian.T.clone()
    store.save([one], hessian, 2 * hessian)
    held = load_file(tmp_path / "a.safetensors")
    assert {tensor.numel() for tensor in held.values()} == {columns * (columns + 1) // 2}
    for found, wanted in zip(store.load(one), (hessian, 2 * hessian), strict=True):
        assert torch.equal(found, wanted)


def test_whole_matrices_of_an_earlier_cache_are_read(tmp_path):
    store = HessianStore(tmp_path, SETTINGS)
    store.save([layer("a")], torch.eye(4), None)
    save_checked({"hessian": 3 * torch.eye(4)}, tmp_path / "a.safetensors")
    assert torch.equal(store.load(layer("a"))[0], 3 * torch.eye(4))
    save_checked({"hessian": torch.zeros(9)}, tmp_path / "a.safetensors")
    with pytest.raises(RunError, match=r"a\.safetensors is missing or damaged"):
        store.load(layer("a"))
