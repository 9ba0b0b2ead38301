"""Layers solved at once against the same layers solved one by one."""

from dataclasses import replace

import pytest
import torch
from test_code import SPECS, random_code
from test_encode import randn, second_moment

from vqdm.additive import scoring
from vqdm.additive.code import CodeSpec, SharedCodebooks
from vqdm.additive.encode import (
    coordinate_descent,
    encode_vectors,
    feedback_encode,
    feedback_factors,
    stacked,
    together,
    unstacked,
)
from vqdm.additive.solve import SolverConfig, Task, solve_layer, solve_layers
from vqdm.quantization.shared_codebooks import sample_layer, train_shared_codebooks


@pytest.fixture
def scored_by():
    yield scoring.set_scoring
    scoring.set_scoring(None)


@pytest.mark.parametrize("path", ["torch", "auto", "triton"])
def test_vectors_of_every_layer_are_coded_with_its_codebooks(path, scored_by, triton_device):
    device = triton_device if path == "triton" else "cpu"
    targets, codebooks = randn(3, 13, 4).to(device), randn(3, 2, 16, 4, seed=1).to(device)
    scored_by(path)
    alone = [encode_vectors(*layer, 5) for layer in zip(targets, codebooks, strict=True)]
    assert torch.equal(encode_vectors(targets, codebooks, 5), torch.stack(alone))


def test_scores_of_all_layers_count_for_the_rows_at_once(monkeypatch, scored_by):
    targets, codebooks = randn(3, 50, 4), randn(3, 2, 16, 4, seed=1)
    scored_by("torch")
    whole, sizes = encode_vectors(targets, codebooks, 4), []
    inside = encode_vectors.__globals__["smallest"]
    monkeypatch.setitem(
        encode_vectors.__globals__, "smallest", lambda scores, n: sizes.append(scores.numel()) or inside(scores, n)
    )
    monkeypatch.setitem(encode_vectors.__globals__["rows_at_once"].__globals__["SCORES_AT_ONCE"], "cpu", 700)
    assert torch.equal(encode_vectors(targets, codebooks, 4), whole)
    assert max(sizes) <= 700


def coded_layers(spec):
    """W [12, 16], H and a code of three layers in float64, the second with dead inputs."""
    W, H = list(randn(3, 12, 16).double()), [second_moment(16, seed=10 * index).double() for index in range(3)]
    H[1][4:8], H[1][:, 4:8] = 0, 0
    codes = [random_code(spec, 12, 16, seed) for seed in range(3)]
    codes = [replace(code, codebooks=code.codebooks.double(), scales=code.scales.double()) for code in codes]
    return W, H, [replace(code, input_scales=None) for code in codes]


@pytest.mark.parametrize("spec", SPECS[:5], ids=str)
@pytest.mark.parametrize("block", [4, 128])
def test_codes_found_together_are_those_found_alone(spec, block, monkeypatch):
    monkeypatch.setitem(feedback_encode.__globals__, "COLUMNS_AT_ONCE", block)
    W, H, codes = coded_layers(spec)
    factors, feedback = zip(*(feedback_factors(h, spec.in_group_size, 0.01) for h in H), strict=True)
    alone = list(map(feedback_encode, W, codes, factors, feedback, [4] * 3))
    found = together(feedback_encode, W, codes, factors, feedback, beam_size=4)
    assert all(torch.equal(one.codes, other.codes) for one, other in zip(found, alone, strict=True))
    alone = list(map(coordinate_descent, W, H, codes, [4] * 3))
    found = together(coordinate_descent, W, H, codes, beam_size=4)
    assert all(torch.equal(one.codes, other.codes) for one, other in zip(found, alone, strict=True))
    assert not torch.equal(found[0].codes, codes[0].codes)


@pytest.mark.parametrize("spec", SPECS[:5], ids=str)
def test_a_stack_decodes_to_all_matrices_and_comes_apart(spec):
    _, _, codes = coded_layers(spec)
    whole = stacked(codes)
    assert torch.equal(whole.dequantize(), torch.stack([code.dequantize() for code in codes]))
    for code, part in zip(codes, unstacked(whole), strict=True):
        for name in ("codes", "codebooks", "scales"):
            assert torch.equal(getattr(code, name), getattr(part, name))


def tasks(spec, shared=None, rows=24, device="cpu", **settings):
    """Layers to solve: one has dead inputs, one no weights."""
    W, H = list(randn(3, rows, 32).to(device)), [second_moment(32, seed=10 * index).to(device) for index in range(3)]
    H[1][4:17], H[1][:, 4:17] = 0, 0
    W[2] = torch.zeros_like(W[2])
    config = SolverConfig(spec, **{"max_epochs": 4, "relative_mse_tolerance": 0.0, **settings})
    generators = [torch.Generator().manual_seed(index) for index in range(3)]
    return [Task(w, h, config, own, H[0], shared) for w, h, own in zip(W, H, generators, strict=True)]


def alone(task):
    generator = task.generator.clone_state()
    return solve_layer(task.W, task.H, task.config, generator, task.held_out, task.shared)


def check_same(given):
    wanted, found = [alone(task) for task in given], solve_layers(given)
    for (one, its), (other, report) in zip(wanted, found, strict=True):
        assert (one.codes == other.codes).float().mean() > 0.9  # near ties may fall either way
        for value in ("error", "held_out_error", "bits_per_weight", "gap_db"):
            expected = getattr(its, value)
            assert getattr(report, value) == (expected if expected is None else pytest.approx(expected, rel=0.05))
    return [report.epochs for _, report in found]


@pytest.mark.parametrize("path", ["torch", "auto"])
@pytest.mark.parametrize("spec", [CodeSpec(2, 4, 4), CodeSpec(2, 3, 4, 2, 2, input_channel_scales=True)], ids=str)
def test_layers_solved_together_are_those_solved_alone(spec, path, scored_by):
    scored_by(path)
    check_same(tasks(spec))


def test_also_where_codebooks_are_fitted_to_some_rows(monkeypatch):
    monkeypatch.setitem(solve_layers.__globals__, "SAMPLED_USES", 4)
    check_same(tasks(CodeSpec(2, 4, 4), rows=64))


def test_also_with_the_search_over_rows():
    check_same(tasks(CodeSpec(2, 3, 4), encoder="beam", max_epochs=3, steps_per_epoch=5, lr=1e-3))


@pytest.mark.parametrize("sharing", [False, True])
def test_also_by_the_kernel(sharing, triton_device, scored_by):
    scored_by("triton")
    small = dict(rows=6, device=triton_device, max_epochs=2, init_max_iter=1, beam_size=2)
    own, shared = CodeSpec(2, 2, 8), CodeSpec(1, 3, 8, shared_codebooks="shared")
    codebooks = SharedCodebooks(randn(*shared.codebooks_shape).half().float().to(triton_device), 10_000)
    check_same(tasks(shared, codebooks, **small) if sharing else tasks(own, **small))


def test_also_with_shared_codebooks_and_different_numbers_of_searches():
    spec = CodeSpec(1, 6, 4, shared_codebooks="shared")
    config, first = SolverConfig(spec, init_max_iter=5), tasks(CodeSpec(1, 2, 4))[0]
    codebooks = train_shared_codebooks(
        [sample_layer(first.W, first.H, 24, config, first.generator)], config, first.generator
    )
    epochs = check_same(tasks(spec, shared=SharedCodebooks(codebooks, 10_000), max_epochs=12))
    assert epochs[2] == 2 < epochs[0]


def test_their_time_is_divided_among_them():
    given = tasks(CodeSpec(1, 2, 4), max_epochs=1)
    assert len({report.seconds for _, report in solve_layers(given)}) == 1


def test_layers_that_differ_are_not_solved_together():
    with pytest.raises(ValueError, match="must have one shape, config and set of shared codebooks"):
        solve_layers([*tasks(CodeSpec(1, 2, 4)), *tasks(CodeSpec(1, 2, 4), rows=16)])
