"""Calibration block by block, against whole calls of the denoiser."""

from collections import Counter
from dataclasses import replace
from functools import partial
from itertools import groupby

import pytest
import torch
from bench_plans import planned
from tiny_transformers import FAMILIES, tiny_transformer_pipeline

from vqdm.additive.code import CodeSpec
from vqdm.diffusion.blocks import select_layers
from vqdm.diffusion.hessians import DenoiserCall, record_hessians, shared_inputs
from vqdm.diffusion.sampling import record_evaluation
from vqdm.diffusion.streams import FIRST, BlockSwapper, BlockWalk
from vqdm.quantization.config import QuantizeConfig

PROMPTS = ["a circle", "a big red circle", "a star and a big green heart"]


def calls_of(recorded, points) -> list[DenoiserCall]:
    make = partial(recorded.inputs, device="cpu", dtype=torch.float32)
    calls = recorded.shape[1]
    return [DenoiserCall(make, [(n, j)], [n * calls + j]) for n, j in points]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kept", ["ram", "disk"])
def test_hessians_are_those_of_whole_calls(family, kept, tmp_path):
    """One pass per point through every block; beside it, what shows how large inputs are, and that a walk is right."""
    if kept == "disk" and family not in ("flux", "z-image"):
        pytest.skip("files are the same for all")
    pipeline = tiny_transformer_pipeline(family)
    model = pipeline.transformer
    settings = {"num_inference_steps": 2, "height": 32, "width": 32}
    recorded, _ = record_evaluation(pipeline, PROMPTS, 0, settings, 3)
    layers = select_layers(model, "default", 0, CodeSpec(1, 4, 4), {})
    training, held_out = (calls_of(recorded, some) for some in ([(0, 0), (1, 1), (2, 0)], [(2, 1)]))
    first = training[0]
    other = [
        DenoiserCall(lambda _, k=k: recorded.inputs([(k, 0)], "cpu", torch.float32, [0.3 + k]), [k], [90 + k], base=[b])
        for k, b in ((0, training[0].points[0]), (1, training[1].points[0]))
    ]
    groups = shared_inputs(model, layers, first())
    whole = record_hessians(model, groups, first(), training, held_out, other_timesteps=other)

    swapper = BlockSwapper(model, torch.device("cpu"))
    calls = {FIRST: first, **{call.points[0]: call for call in (*training, *held_out)}}
    walk = BlockWalk(swapper, calls, tmp_path if kept == "disk" else None)
    assert all(len(sources) <= 3 for sources in walk.sources)  # one of each list
    runs = Counter()
    for name in swapper.names:
        model.get_submodule(name).register_forward_pre_hook(
            lambda *_, name=name: runs.update([name] if name not in swapper.replaced else [])
        )
    found = {}
    for _, some in groupby(groups, key=lambda group: group[0].block):
        walk.keep = True
        found |= record_hessians(model, list(some), first(), training, held_out, other_timesteps=other, walk=walk)
    for name, pair in whole.items():
        for one, another in zip(found[name], pair, strict=True):
            torch.testing.assert_close(one, another, rtol=1e-4, atol=1e-4 * another.abs().max().item())
    # Each of four points, and the first call; a block with modulations also runs at the other timesteps.
    assert set(runs) == set(swapper.names) and all(count in (5, 7) for count in runs.values())
    assert len({place for _, place in walk.outputs.held}) <= 1
    files = list(tmp_path.glob("*.safetensors"))
    assert len(files) == (len(walk.outputs.held) if kept == "disk" else 0)
    walk.restart()
    assert not walk.outputs.held and not list(tmp_path.glob("*.safetensors"))
    swapper.close()


@pytest.mark.long
@pytest.mark.parametrize("model", ["FLUX.1-dev", "Qwen-Image"])
def test_models_too_large_for_a_gpu_fit_block_by_block(model):
    """24 GB of GPU memory, 64 of RAM and 60 of disk, from the true configuration."""
    config = QuantizeConfig(
        model=model, target_bits=3.0, calibration_nsamples=64, calibration_nsteps=1, xtx_batch_size=4
    )
    found = planned(model, config, gpu=24, ram=64)
    assert found["fits"] and found["offload"] in ("ram", "disk") and found["disk_gb"] < 60
    assert not planned(model, replace(config, offload="none"), gpu=24, ram=64)["fits"]
