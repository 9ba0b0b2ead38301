"""Layers of a pipeline with the Hessians that a run would record."""

import shutil

import torch
from layer_problems import model_layers

from vqdm.diffusion.blocks import matrix_of
from vqdm.diffusion.pipelines import load_pipeline


def test_layers_come_with_their_hessians(pipelines, tmp_path):
    few = {"calibration_nsamples": 12, "calibration_nsteps": 2, "xtx_batch_size": 8}
    found = {name: rest for name, *rest in model_layers(str(pipelines["sdxl"]), str(tmp_path / "a"), "cpu", **few)}
    unet = load_pipeline(str(pipelines["sdxl"]), torch.device("cpu"), torch.float32).unet
    name = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    W, H, held_out = found[name]
    assert torch.equal(W, matrix_of(unet.get_submodule(name), False).float())
    assert H.shape == held_out.shape == (W.shape[1], W.shape[1])
    assert torch.equal(H, H.T) and torch.linalg.eigvalsh(H.double())[0] > -1e-6 * H.trace()
    shutil.rmtree(tmp_path / "a" / "work")  # Hessians of the cache need no trajectories
    again = {name: rest for name, *rest in model_layers(str(pipelines["sdxl"]), str(tmp_path / "a"), "cpu", **few)}
    assert torch.equal(again[name][1], H)
