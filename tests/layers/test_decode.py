import logging
import shutil

import pytest
import torch
from compilers import compiles
from stored_layers import FORMATS, SPECS, VARIABLE, stored_of

from vqdm import compiled
from vqdm.additive.code import CodeSpec
from vqdm.errors import UserError
from vqdm.layers import decode as decoding
from vqdm.layers import decode_cpu
from vqdm.layers.decode import decode, pointwise


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    monkeypatch.delenv(decoding.ENVIRONMENT, raising=False)
    monkeypatch.setattr(decoding, "_wanted", None)
    monkeypatch.setattr(decoding, "_chosen", {})
    monkeypatch.setattr(decoding, "_logged", set())
    monkeypatch.setitem(decoding.CANDIDATES, "cpu", ("native", "torch"))
    decoding._warn_once.cache_clear()
    decoding._environment.cache_clear()
    yield
    decoding._environment.cache_clear()


@pytest.fixture
def used(monkeypatch):
    """The backends that run, in order."""
    names = []
    if not compiles():  # the choice is the same whatever decodes
        monkeypatch.setitem(decoding.RUNS, "native", decoding.RUNS["torch"])
    for name, run in list(decoding.RUNS.items()):
        monkeypatch.setitem(decoding.RUNS, name, lambda *given, name=name, run=run: (names.append(name), run(*given)))
    return names


@pytest.mark.parametrize("spec", [CodeSpec(2, 6, 4, scale_nbits=4), VARIABLE[0]], ids=str)
@pytest.mark.parametrize("backend", ["torch", "native", "triton"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_all_backends_agree(spec, backend, dtype, triton_device):
    if backend == "native" and not compiles():
        pytest.skip("no C compiler that works")
    if backend == "triton" and triton_device != "cpu":
        pytest.skip("the tensors of this test are on the CPU")
    stored, code = stored_of(spec, 16, 32)
    assert torch.equal(decode(stored, dtype, backend=backend), code.dequantize().to(dtype))


def test_a_backend_is_named_by_argument_function_or_environment_in_this_order(used, monkeypatch):
    stored, _ = stored_of(SPECS[0], 8, 16)
    monkeypatch.setenv(decoding.ENVIRONMENT, "torch")
    decode(stored, torch.float32)
    decoding.set_decode_backend("native")
    decode(stored, torch.float32)
    decode(stored, torch.float32, backend="torch")
    decoding.set_decode_backend(None)
    decode(stored, torch.float32)
    assert used == ["torch", "native", "torch", "torch"]


def test_the_fastest_is_measured_once_a_class_and_logged_once(used, monkeypatch, caplog):
    seconds = {"torch": 1, "native": 2}
    monkeypatch.setattr(decoding, "_seconds", lambda name, *given: (decoding.RUNS[name](*given), seconds[name])[1])
    layers = [stored_of(spec, 8, 16)[0] for spec in (SPECS[0], SPECS[0], SPECS[1])]
    with caplog.at_level(logging.INFO, "vqdm"):
        for stored in layers:
            decode(stored, torch.float32)
    assert used.count("native") == 2 * (1 + 3) and used[-1] == "torch"
    assert [record.getMessage() for record in caplog.records] == [
        "decoding on cpu: torch (native 2000.00 ms, torch 1000.00 ms)"
    ]


@pytest.mark.parametrize("failure", ["raises", "wrong"])
def test_a_backend_that_fails_is_left_with_a_warning(failure, monkeypatch, caplog):
    def broken(stored, out):
        if failure == "raises":
            raise RuntimeError("no compiler\nhere")
        out.zero_()

    monkeypatch.setitem(decoding.RUNS, "native", broken)
    stored, code = stored_of(SPECS[0], 8, 16)
    assert torch.equal(decode(stored, torch.float32), code.dequantize())
    warnings = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    reason = {"raises": "no compiler", "wrong": "its results are wrong"}[failure]
    assert warnings == [f"decoding on cpu: not by native, which fails: {reason}"]


def test_a_machine_without_a_compiler_decodes_by_torch_and_logs_it_once(monkeypatch, caplog):
    monkeypatch.setitem(decoding.CANDIDATES, "cpu", ("native", "torch"))
    monkeypatch.setattr(decode_cpu, "library", decode_cpu.library.__wrapped__)
    monkeypatch.setattr(compiled, "compiler", lambda: None)
    for spec in SPECS[:2]:
        stored, code = stored_of(spec, 8, 16)
        assert torch.equal(decode(stored, torch.float32), code.dequantize())
    warnings = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert warnings == ["decoding on cpu: not by native, which fails: no C compiler: neither $CC nor cc, gcc, clang"]


def test_a_device_that_has_only_torch_logs_it_once(monkeypatch, caplog):
    monkeypatch.delitem(decoding.CANDIDATES, "cpu")
    for spec in SPECS[:2]:
        decode(stored_of(spec, 8, 16)[0], torch.float32)
    assert [record.getMessage() for record in caplog.records] == [
        "decoding on cpu: by torch, since no faster backend supports this device"
    ]


@pytest.mark.parametrize("spec", [*SPECS, *VARIABLE[:2]], ids=str)
def test_what_is_measured_is_the_layers_first_rows(spec, monkeypatch):
    monkeypatch.setattr(decoding, "MEASURED_WEIGHTS", 16 * 6)
    stored, code = stored_of(spec, 24, 16)
    part = decoding._first_rows(stored)
    assert part.shape == (6, 16)
    assert torch.equal(part.working().dequantize(), code.dequantize()[:6])


def test_an_unknown_backend_and_one_for_another_device_are_refused():
    stored, _ = stored_of(SPECS[0], 8, 16)
    with pytest.raises(
        UserError, match="set_decode_backend is 'fast'; allowed are auto, torch, native, triton, compile"
    ):
        decoding.set_decode_backend("fast")
    with pytest.raises(UserError, match="native, which is for the CPU; meta takes"):
        decode(stored._replace(codes=stored.codes.to("meta")), torch.float32, backend="native")


def test_tracing_leaves_one_graph():
    stored, code = stored_of(CodeSpec(2, 3, 4, scale_nbits=2), 8, 16)
    stored = stored._replace(codebooks=stored.codebooks.float().requires_grad_())
    out = torch.compile(lambda: decode(stored, torch.float32), fullgraph=True, backend="aot_eager")()
    torch.testing.assert_close(out, code.dequantize())
    assert out.requires_grad


WIDTHS = [CodeSpec(2, b, 4) for b in range(1, 17)]


@pytest.mark.parametrize("spec", [*WIDTHS, *FORMATS], ids=str)
def test_every_format_decodes_to_the_last_bit(spec):
    stored, code = stored_of(spec, 18, 24)
    assert torch.equal(pointwise(stored), code.dequantize())


def test_it_is_differentiable_as_the_definition_is():
    stored, _ = stored_of(CodeSpec(2, 3, 4, scale_nbits=3, input_channel_scales=True), 8, 16)
    names = "codebooks", "scale_values", "input_scales"
    learned = {name: getattr(stored, name).float().requires_grad_() for name in names}
    weights, stored = torch.randn(8, 16), stored._replace(**learned)
    found = torch.autograd.grad((pointwise(stored) * weights).sum(), learned.values())
    wanted = torch.autograd.grad((stored.working().dequantize() * weights).sum(), learned.values())
    torch.testing.assert_close(found, wanted)


@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler on the CPU")
def test_the_compiler_makes_one_kernel_of_it():
    from torch._inductor.utils import run_and_get_code

    stored, code = stored_of(CodeSpec(3, 5, 4, scale_nbits=4, input_channel_scales=True), 16, 16)
    out, sources = run_and_get_code(torch.compile(pointwise, fullgraph=True), stored)
    torch.testing.assert_close(out, code.dequantize())
    assert len(sources) == 1 and sources[0].count("async_compile.cpp") == 1
