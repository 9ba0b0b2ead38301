"""Networks that are not found, or are not those that were named."""

import pytest

from vqdm.metrics.networks import Unavailable, find_encoder, find_open_clip


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nowhere", "nowhere is not found"),
        ("/no/such/folder", "is not found"),
        ("owner/name", "owner/name is not on this machine"),
        ("assets", "allowed are open_clip, CLIP and DINOv2"),
    ],
)
def test_encoders_that_cannot_be_had(name, message):
    with pytest.raises(Unavailable, match=message):
        find_encoder(name, True)


def test_open_clip_tags_that_cannot_be_had():
    with pytest.raises(Unavailable, match="neither a folder nor an architecture"):
        find_open_clip("ViT-Z", "openai", True)
    with pytest.raises(
        Unavailable, match=r"nothing is neither a file nor a tag of ViT-H-14; allowed are .*laion2b_s32b_b79k"
    ):
        find_open_clip("ViT-H-14", "nothing", True)
