"""A program on an emulated GPU, watched: where text encoders and VAE are while the UNet works."""

from __future__ import annotations

import importlib

import torch
from diffusers import AutoencoderKL, DiffusionPipeline, UNet2DConditionModel

from vqdm.diffusion import pipelines


def main(words: list[str]) -> None:
    """Run a program, its name first. Raises AssertionError where a part is on the wrong device."""
    held: list[DiffusionPipeline] = []
    resting, encoded, decoded = [], [], []
    before: dict[str, str] = {}  # where the parts were when they had been loaded
    load, forward, decode = pipelines.load_pipeline, UNet2DConditionModel.forward, AutoencoderKL._decode

    def loaded(*args, **kwargs) -> DiffusionPipeline:
        held.append(load(*args, **kwargs))
        for encoder in (held[0].text_encoder, held[0].text_encoder_2):
            encoder.register_forward_pre_hook(lambda module, _: encoded.append(module.device.type))
        before.update(places())
        return held[0]

    def places() -> dict[str, str]:
        return {name: part.device.type for name, part in pipelines.other_parts(held[0]).items()}

    def watched_forward(unet, *args, **kwargs):
        if unet.device.type == "meta":  # while the run is planned
            return forward(unet, *args, **kwargs)
        assert {held[0].text_encoder.device.type, held[0].text_encoder_2.device.type} == {"cpu"}
        resting.append(held[0].vae.device.type == "cpu")
        return forward(unet, *args, **kwargs)

    def watched_decode(vae, z, *args, **kwargs):
        decoded.extend([(vae.device.type, len(z))] if vae.device.type != "meta" else [])
        return decode(vae, z, *args, **kwargs)

    watched_forward.__wrapped__ = forward  # the recorder of calls reads its signature
    pipelines.load_pipeline = loaded
    UNet2DConditionModel.forward, AutoencoderKL._decode = watched_forward, watched_decode
    importlib.import_module(words[0]).main([str(word) for word in words[1:]])
    assert set(encoded) - {"meta"} == {"cuda"} and set(decoded) == {("cuda", 1)}
    assert set(resting) == {True, False}, "the VAE never rests, or always"
    assert places() == before
    torch.cuda.synchronize()
