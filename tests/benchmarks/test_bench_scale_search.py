import torch
from bench_scale_search import compared, overall
from test_encode import randn, second_moment

from vqdm.additive import encode
from vqdm.additive.code import CodeSpec, SharedCodebooks
from vqdm.additive.solve import SolverConfig, Task


def test_a_layer_with_large_weights_gains_and_the_number_of_trials_is_as_before():
    W, trials = randn(16, 32), encode.TRIALS
    W[::3, 4] *= 10
    codebooks = SharedCodebooks(torch.linspace(-3, 3, 256).view(1, -1, 1, 1), 1)
    config = SolverConfig(CodeSpec(1, 8, 1, shared_codebooks="shared"))
    row = compared(Task(W, second_moment(32), config, torch.Generator(), second_moment(32, seed=5), codebooks), trials)
    assert row["bits"] == 8 and row["gain_db"] > 3 and row["searched"] < row["first"]
    assert trials == encode.TRIALS
    told = overall([row, row | {"gain_db": 0.0}, row | {"gain_db": -1.0}])
    assert (told["layers"], told["least_db"], told["median_db"], told["most_db"]) == (3, -1.0, 0.0, row["gain_db"])
