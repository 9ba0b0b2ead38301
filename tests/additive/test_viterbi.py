"""The trellis search: equal states from C, the Triton kernel and plain torch, which are the best there are."""

import ctypes
import logging

import pytest
import torch

from vqdm import compiled
from vqdm.additive import scoring, trellis, viterbi
from vqdm.errors import UserError

needs_compiler = pytest.mark.skipif(compiled.compiler() is None, reason="no C compiler")


@pytest.fixture(autouse=True)
def no_wish(monkeypatch):
    monkeypatch.delenv(scoring.ENVIRONMENT, raising=False)
    monkeypatch.setattr(scoring, "_wanted", None)


@pytest.fixture
def kernel(monkeypatch):
    module = pytest.importorskip("vqdm.additive.viterbi_triton")
    monkeypatch.setattr(module, "_failures", {})
    module._warn.cache_clear()
    return module


def problem(N, T, L, seed=0):
    """Targets and weights [N, T], some weights zero, and the values of the states."""
    g = torch.Generator().manual_seed(seed)
    weights = torch.rand(N, T, generator=g) * (torch.rand(N, T, generator=g) > 0.2)
    return torch.randn(N, T, generator=g), weights, trellis.table(L)


def by(path, targets, weights, values, q):
    scoring.set_scoring(path)
    return viterbi.viterbi(targets, weights, values, torch.full((len(targets),), q))


def closed_paths(T, L, q):
    """States [2^(T·q/4), T] of every ring of bits."""
    count = T * q // 4
    bits = torch.arange(2**count)[:, None] >> torch.arange(count) & 1
    stops = [(row + 1) * q // 4 for row in range(T)]
    return torch.stack([sum(bits[:, (stop - L + b) % count] << b for b in range(L)) for stop in stops], 1)


# ------------------------------------------------------------------------------------------------ the best path


@pytest.mark.parametrize(
    ("T", "L", "q"), [(8, 4, 4), (12, 5, 4), (12, 4, 5), (8, 4, 6), (4, 4, 10), (4, 4, 13), (3, 4, 16)]
)
def test_of_all_closed_paths_the_best_through_its_seam_is_found(T, L, q):
    paths, (targets, weights, values) = closed_paths(T, L, q), problem(40, T, L)
    weights += 0.01
    costs = ((targets[:, None] - values[paths]).square() * weights[:, None]).sum(2)  # [N, paths]
    states = by("torch", targets, weights, values, q).long()
    found = ((targets - values[states]).square() * weights).sum(1)
    through = torch.where(paths[:, -1] == states[:, -1:], costs, torch.inf).amin(1)
    torch.testing.assert_close(found, through)
    assert found.sum() < 1.4 * costs.amin(1).sum()
    assert q < 16 or torch.equal(found, costs.amin(1))  # rows do not depend on each other


@pytest.mark.parametrize("q", [4, 6, 11, 16])
def test_states_are_a_path_that_can_be_stored(q):
    targets, weights, values = problem(3, 16, 6)
    states = by("torch", targets, weights, values, q)
    widths = torch.full((3,), q)
    packed = trellis.pack(states.T, widths, 16, 6)
    assert torch.equal(trellis.unpack(packed, widths, 16, 16, 6), states.T.long())


@pytest.mark.parametrize(
    ("bits", "gain", "most"), [(1, 0.9, -5.5), (2, 1.0, -11.45), (3, 1.05, -17.35), (4, 1.1, -23.3)]
)
def test_the_error_on_a_unit_gaussian(bits, gain, most):
    x, values = torch.randn(64, 512, generator=torch.Generator().manual_seed(0)), trellis.table(12)
    states = viterbi.viterbi(x / gain, torch.ones_like(x), values, torch.full((64,), 4 * bits))
    error = (x - gain * values[states.long()]).square().mean()
    assert 10 * error.log10() < most


def test_rows_of_weight_zero_do_not_matter():
    targets, weights, values = problem(4, 32, 6)
    changed = torch.where(weights == 0, 100.0, targets)
    assert (weights == 0).any()
    assert torch.equal(by("torch", changed, weights, values, 8), by("torch", targets, weights, values, 8))
    assert not by("torch", targets, torch.zeros_like(weights), values, 8).any()  # the first of equal ones


@pytest.mark.parametrize(("T", "q"), [(32, 0), (32, 3), (32, 25), (30, 5), (5, 4)])
def test_widths_that_are_not_allowed_are_refused(T, q):
    targets, weights, values = problem(2, T, 6)
    with pytest.raises(ValueError, match=rf"widths \[{q}\] are not allowed for rings of {T} rows"):
        viterbi.viterbi(targets, weights, values, torch.tensor([24, q]))


# ------------------------------------------------------------------------------------------------ C


@needs_compiler
@pytest.mark.parametrize(("T", "L"), [(4, 4), (8, 6), (20, 8), (16, 9), (1, 5)])
def test_c_finds_the_states_of_torch_at_all_widths(T, L):
    targets, weights, values = problem(2, T, L)
    for q in trellis.allowed_widths(T, L)[1:]:
        assert torch.equal(by("native", targets, weights, values, q), by("torch", targets, weights, values, q)), q


@needs_compiler
@pytest.mark.parametrize(("L", "q"), [(12, q) for q in (4, 5, 8, 10, 12, 16, 18, 24, 33, 38, 48)] + [(14, 8), (16, 14)])
def test_c_finds_the_states_of_torch_in_large_trellises(L, q):
    targets, weights, values = problem(1, 32, L, seed=q)
    assert torch.equal(by("native", targets, weights, values, q), by("torch", targets, weights, values, q))


@needs_compiler
@pytest.mark.parametrize("flags", [("-march=x86-64",), ("-march=x86-64-v3",), ("-O0",)])
def test_c_for_other_processors_finds_the_same_states(flags, tmp_path, monkeypatch):
    """Vectors of four and eight lanes, each with its own code for one to three new bits."""
    try:
        compiled.compile_beside(
            compiled.compiler(), ("-O1", "-ffp-contract=off", *flags), viterbi.SOURCE, tmp_path / "c.so"
        )
    except compiled.subprocess.CalledProcessError:
        pytest.skip(f"{compiled.compiler()} has no {flags[0]}")
    if "v3" in flags[0] and "avx2" not in compiled.PROCESSOR.read_text():
        pytest.skip("no AVX2")
    library = ctypes.CDLL(str(tmp_path / "c.so"))
    monkeypatch.setattr(viterbi, "library", lambda: library)
    targets, weights, values = problem(1, 16, 8)
    for q in (4, 6, 8, 10, 12, 14, 16, 20, 32):
        assert torch.equal(by("native", targets, weights, values, q), by("torch", targets, weights, values, q)), q


@needs_compiler
def test_rings_of_many_widths_and_threads_are_searched_as_alone(monkeypatch):
    T, L, widths = 16, 6, torch.tensor([4, 9, 4, 24, 12, 7, 9])
    targets, weights, values = problem(7, T, L)
    alone = torch.cat(
        [by("torch", targets[n : n + 1], weights[n : n + 1], values, int(q)) for n, q in enumerate(widths)]
    )
    for path, threads in (("torch", 1), ("native", 1), ("native", 3)):
        scoring.set_scoring(path)
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        monkeypatch.setattr(viterbi, "STATES_PER_THREAD", 1)
        assert torch.equal(viterbi.viterbi(targets, weights, values, widths), alone)


@needs_compiler
def test_c_takes_strided_and_empty_input_and_rings_longer_than_before():
    targets, weights, values = problem(3, 40, 6)
    for T in (8, 40):
        some = targets[:, :T].T.contiguous().T, weights[:, :T].T.contiguous().T, values.repeat_interleave(2)[::2]
        assert torch.equal(by("native", *some, 8), by("torch", *some, 8))
    assert by("native", targets[:0], weights[:0], values, 8).shape == (0, 40)


# ------------------------------------------------------------------------------------------------ Triton


def by_kernel(kernel, targets, weights, values, q, device):
    around = viterbi.overlap(q, targets.shape[1], values)
    return kernel.launch(targets.to(device), weights.to(device), values.to(device), q, around).cpu()


def test_the_kernel_finds_the_states_of_torch_at_all_widths(kernel, triton_device):
    targets, weights, values = problem(1, 4, 4)
    for q in trellis.allowed_widths(4, 4)[1:]:
        found = by_kernel(kernel, targets, weights, values, q, triton_device)
        assert torch.equal(found, by("torch", targets, weights, values, q)), q


@pytest.mark.parametrize(("T", "L", "q"), [(16, 6, 5), (9, 8, 8), (4, 12, 34), (2, 12, 48), (1, 5, 20)])
def test_the_kernel_finds_the_states_of_torch(T, L, q, kernel, triton_device):
    targets, weights, values = problem(2, T, L, seed=q)
    found = by_kernel(kernel, targets, weights, values, q, triton_device)
    assert torch.equal(found, by("torch", targets, weights, values, q))


def test_of_equal_costs_the_kernel_takes_the_first(kernel, triton_device):
    g = torch.Generator().manual_seed(0)
    targets, values = (
        torch.randint(-1, 2, (2, 8), generator=g).float(),
        torch.randint(-1, 2, (32,), generator=g).float(),
    )
    found = by_kernel(kernel, targets, torch.ones(2, 8), values, 6, triton_device)
    assert torch.equal(found, by("torch", targets, torch.ones(2, 8), values, 6))


def test_rings_in_parts_are_rings_at_once(kernel, triton_device, monkeypatch):
    targets, weights, values = problem(5, 4, 4)
    whole = by("torch", targets, weights, values, 8)
    monkeypatch.setattr(kernel, "WORKSPACE", 2 * 8 * 4)  # bytes of two rings: rows times choices
    sizes, empty = [], torch.empty
    monkeypatch.setattr(torch, "empty", lambda *shape, **options: sizes.append(shape) or empty(*shape, **options))
    assert torch.equal(by_kernel(kernel, targets, weights, values, 8, triton_device), whole)
    assert sizes[0] == (2, 8, 4)


def test_the_kernel_is_taken_when_asked_for(kernel, triton_device):
    targets, weights, values = problem(3, 4, 4)
    scoring.set_scoring("triton")
    widths = torch.tensor([8, 4, 8])
    found = viterbi.viterbi(
        targets.to(triton_device), weights.to(triton_device), values.to(triton_device), widths
    ).cpu()
    assert list(kernel._failures.values()) == [None, None]
    scoring.set_scoring("torch")
    assert torch.equal(found, viterbi.viterbi(targets, weights, values, widths))


def test_where_the_kernel_fails_torch_takes_over_with_one_warning(kernel, monkeypatch, caplog):
    def fail(*_):
        raise RuntimeError("out of resource: shared memory\nat line 3")

    monkeypatch.setattr(kernel, "launch", fail)
    targets, weights, values = problem(2, 8, 6)
    for q in (8, 9, 8):
        found = kernel.search(targets, weights, values, q, viterbi.overlap(q, 8, values))
        assert torch.equal(found, by("torch", targets, weights, values, q))
        scoring.set_scoring(None)
    assert [record.levelname for record in caplog.records if record.levelno >= logging.WARNING] == ["WARNING"]
    assert "RuntimeError: out of resource: shared memory" in caplog.text and "line 3" not in caplog.text
    scoring.set_scoring("triton")
    with pytest.raises(
        UserError, match="VQDM_SCORING is triton, whose Viterbi search does not work on cpu: RuntimeErr"
    ):
        kernel.search(targets, weights, values, 8, 8)


def test_wrong_states_of_a_kernel_are_not_used(kernel, monkeypatch, caplog):
    monkeypatch.setattr(kernel, "launch", lambda targets, *_: torch.zeros(targets.shape, dtype=torch.int32))
    targets, weights, values = problem(2, 8, 6)
    found = kernel.search(targets, weights, values, 8, 8)
    assert torch.equal(found, by("torch", targets, weights, values, 8))
    assert "its states are not those of torch" in caplog.text


def test_more_states_than_the_kernel_has_room_for_are_left_to_torch(kernel, monkeypatch, caplog):
    monkeypatch.setattr(kernel, "MOST_STATE_BITS", 5)
    targets, weights, values = problem(2, 8, 6)
    assert torch.equal(kernel.search(targets, weights, values, 8, 8), by("torch", targets, weights, values, 8))
    assert "it has room for states of 5 bits, not 6" in caplog.text


def test_memory_that_ends_is_not_taken_for_a_broken_kernel(kernel, monkeypatch):
    def fail(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(kernel, "launch", fail)
    targets, weights, values = problem(1, 8, 6)
    with pytest.raises(torch.OutOfMemoryError):
        kernel.search(targets, weights, values, 8, 8)
    assert not kernel._failures
