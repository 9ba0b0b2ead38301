import torch

from vqdm.finetuning.step import _cast


def test_labels_masks_and_timesteps_stay_as_they_are():
    floats, kept = (
        torch.ones(2),
        {"class_labels": torch.arange(2), "mask": torch.ones(2) > 0, "timestep": torch.ones(2)},
    )
    cast = _cast({"sample": floats, "added": {"text_embeds": floats}, **kept}, torch.float16)
    assert cast["sample"].dtype == cast["added"]["text_embeds"].dtype == torch.float16
    assert all(cast[name] is value for name, value in kept.items())
