"""Settings of fine-tuning that would train nothing."""

import pytest

from vqdm.errors import UserError
from vqdm.finetuning.code_updates import CodeUpdateSettings
from vqdm.finetuning.config import FinetuneConfig, OptimizerConfig

FROZEN = OptimizerConfig(codebook_lr=0.0, scale_lr=0.0, weight_lr=0.0, bias_lr=0.0)
NAMES = ("model", "output_dir", "quantized", "calibration_prompts", "evaluation_prompts")


def test_codes_alone_may_be_trained_but_not_nothing():
    given = dict.fromkeys(NAMES, "x")
    assert FinetuneConfig(**given, optimizer=FROZEN, code_updates=CodeUpdateSettings()).code_updates
    with pytest.raises(UserError, match=r"nothing would be trained: --codebook_lr, .* or add --update_codes"):
        FinetuneConfig(**given, optimizer=FROZEN)
