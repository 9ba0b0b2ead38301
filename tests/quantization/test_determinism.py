"""Claims of docs/determinism.md that are cheap to check and that no other test checks."""

import hashlib
import random

import numpy as np
import pytest
import torch
from main_text2image import main
from test_encode import randn, second_moment
from tiny_runs import command

from vqdm.additive.code import CodeSpec
from vqdm.additive.solve import SolverConfig, solve_layer
from vqdm.cli import run_script
from vqdm.diffusion.pipelines import generators
from vqdm.storage.run_folder import layer_generator

CONFIG = SolverConfig(spec=CodeSpec(2, 4, 4), max_epochs=2, init_max_iter=3)


def solved(name: str) -> dict[str, torch.Tensor]:
    code, _ = solve_layer(randn(8, 16, seed=1), second_moment(16, seed=2), CONFIG, layer_generator(0, name))
    return code.pack()


@pytest.mark.parametrize("encoder", ["ldl", "beam"])
def test_a_layer_depends_on_nothing_solved_before(encoder, monkeypatch):
    monkeypatch.setitem(globals(), "CONFIG", SolverConfig(spec=CodeSpec(2, 4, 4), encoder=encoder, max_epochs=2))
    first = solved("a")
    solved("b")
    torch.manual_seed(99)
    assert all(torch.equal(tensor, first[name]) for name, tensor in solved("a").items())


def test_the_solver_leaves_the_global_generators_alone():
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    solved("a")
    after = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    assert torch.equal(before[0], after[0]) and before[1:] == after[1:]


def test_noise_does_not_depend_on_the_batch():
    def noise(indices) -> torch.Tensor:
        return torch.stack([torch.randn(4, 8, 8, generator=one) for one in generators(7, indices)])

    assert torch.equal(noise(range(6)), torch.cat([noise([k]) for k in range(6)]))


def test_a_repeated_run_gives_the_same_bytes(pipelines, prompt_file, tmp_path):
    """Also with other global seeds, another folder, a snapshot and a look in between."""

    def digest(out: str, *words: str) -> list[str]:
        line = command(pipelines["sd15"], prompt_file, tmp_path / out, "--layer_filter", "mid_block.*to_[qk]", *words)
        assert run_script(main, line) == 0
        files = sorted((tmp_path / out / "unet").iterdir())
        return [hashlib.sha256(file.read_bytes()).hexdigest() for file in files]

    first = digest("first")
    torch.manual_seed(5)
    random.seed(5)
    assert digest("second", "--snapshot_step", "1", "--eval_step", "1") == first
