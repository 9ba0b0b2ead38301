import logging
from functools import cache

import pytest
import torch

from vqdm.additive import scoring
from vqdm.additive.codebooks import kmeans, nearest
from vqdm.additive.encode import encode_vectors
from vqdm.errors import UserError


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    monkeypatch.delenv(scoring.ENVIRONMENT, raising=False)
    monkeypatch.setattr(scoring, "_wanted", None)
    monkeypatch.setattr(scoring, "_failed_shapes", {})
    yield
    scoring._failure.cache_clear()
    scoring._log_choice.cache_clear()


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_the_cpu_takes_torch_unless_told_otherwise(monkeypatch, triton_device):
    vectors = torch.zeros(1, 4, device=triton_device)
    assert scoring.fused_scoring(torch.zeros(1, 4)) is None
    monkeypatch.setenv(scoring.ENVIRONMENT, "triton_tf32")
    assert scoring.fused_scoring(vectors).args == ("triton_tf32",)
    assert scoring._kernel("triton_tf32").keywords == {"precision": "tf32"}
    assert scoring.fused_scoring(vectors.double()) is None
    scoring.set_scoring("torch")
    assert scoring.fused_scoring(vectors) is None


@pytest.mark.parametrize("beam_size", [1, 5])
def test_both_paths_find_the_same_codes(beam_size, triton_device):
    targets, codebooks = randn(13, 4).to(triton_device), randn(3, 16, 4, seed=1).to(triton_device)
    scoring.set_scoring("torch")
    codes = encode_vectors(targets, codebooks, beam_size)
    scoring.set_scoring("triton")
    assert torch.equal(encode_vectors(targets, codebooks, beam_size), codes)


def test_both_paths_find_the_same_clusters(triton_device):
    points = randn(70, 4).to(triton_device)
    found = {}
    for path in ("torch", "triton"):
        scoring.set_scoring(path)
        centroids = kmeans(points, 8, 2, torch.Generator().manual_seed(0))
        found[path] = centroids, *nearest(points, centroids)
    for one, other in zip(found["torch"], found["triton"], strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("broken", [ModuleNotFoundError("No module named 'triton'"), RuntimeError("no\ncompiler")])
def test_where_triton_fails_torch_takes_over_with_one_warning(broken, monkeypatch, caplog):
    def fail(path):
        raise broken

    class Cuda:
        is_cuda, dtype, device = True, torch.float32, torch.device("cuda")

    monkeypatch.setattr(scoring, "_kernel", fail)
    with caplog.at_level(logging.INFO, "vqdm"):
        assert scoring.fused_scoring(Cuda) is None and scoring.fused_scoring(Cuda) is None
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert str(broken).partition("\n")[0] in caplog.text
    scoring.set_scoring("triton")
    with pytest.raises(UserError, match="VQDM_SCORING is triton, which does not work on cuda"):
        scoring.fused_scoring(Cuda)


@pytest.mark.parametrize("beam_size", [1, 5])
@pytest.mark.parametrize("layers", [(), (2,)])
def test_shapes_at_which_the_kernel_fails_go_to_torch(layers, beam_size, monkeypatch, caplog):
    """Although it passes the small trial; the codes are those of the path "torch"."""
    targets, codebooks = randn(*layers, 13, 4), randn(*layers, 3, 16, 4, seed=1)
    scoring.set_scoring("torch")
    wanted = encode_vectors(targets, codebooks, beam_size)

    def fail(*_, **__):
        raise RuntimeError("out of resource: shared memory\nmore")

    monkeypatch.setattr(scoring, "_wanted", None)
    monkeypatch.setattr(scoring, "_path", lambda vectors: "triton")
    monkeypatch.setattr(scoring, "_failure", cache(lambda device, path: None))
    monkeypatch.setattr(scoring, "_kernel", lambda path: fail)
    with caplog.at_level(logging.WARNING, "vqdm"):
        assert torch.equal(encode_vectors(targets, codebooks, beam_size), wanted)
        assert torch.equal(encode_vectors(targets, codebooks, beam_size), wanted)
    assert len(caplog.records) == 1 and "16 entries on cpu: out of resource: shared memory" in caplog.text
    monkeypatch.setenv(scoring.ENVIRONMENT, "triton")
    monkeypatch.setattr(scoring, "_failed_shapes", {})
    with pytest.raises(UserError, match="VQDM_SCORING is triton, which does not work for 1 hypotheses, 4 val"):
        encode_vectors(targets, codebooks, beam_size)


def test_running_out_of_memory_is_not_a_failure_of_the_kernel(monkeypatch):
    def fail(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(scoring, "_kernel", lambda path: fail)
    with pytest.raises(torch.OutOfMemoryError):
        scoring._kernel_or_torch("triton", randn(5, 2, 4), randn(8, 4), 2)


def test_torch_scores_a_few_vectors_at_a_time(monkeypatch):
    residuals, codebook = randn(7, 2, 4), randn(8, 4, seed=1)
    found = scoring.torch_best_entries(residuals, codebook, 3)
    monkeypatch.setattr(scoring, "SCORES_AT_ONCE", 40)
    again = scoring.torch_best_entries(residuals, codebook, 3)
    distances, parents, entries = found
    torch.testing.assert_close(again[0], distances)
    assert torch.equal(again[1], parents) and torch.equal(again[2], entries)
    wanted = (residuals[torch.arange(7)[:, None], parents] - codebook[entries]).square().sum(-1)
    torch.testing.assert_close(distances, wanted, rtol=1e-4, atol=1e-5)
    least = torch.cdist(residuals, codebook).square().flatten(1).sort(1).values[:, :3]
    torch.testing.assert_close(distances.sort(1).values, least, rtol=1e-4, atol=1e-5)


def test_wrong_results_of_a_kernel_are_not_used(monkeypatch):
    monkeypatch.setattr(scoring, "_kernel", lambda path: lambda r, c, count: (torch.zeros(len(r), count), None, None))
    assert scoring._failure(torch.device("cpu"), "triton") == "its results are wrong"


def test_an_unknown_path_is_refused(monkeypatch):
    with pytest.raises(UserError, match="set_scoring is 'fast'; allowed are auto, torch, native, triton"):
        scoring.set_scoring("fast")
    monkeypatch.setenv(scoring.ENVIRONMENT, "cuda")
    with pytest.raises(UserError, match="VQDM_SCORING is 'cuda'"):
        scoring.fused_scoring(torch.zeros(1, 4))
