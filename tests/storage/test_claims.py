"""Resuming a run asks for equal settings, of those that its result depends on."""

from dataclasses import replace

import pytest

from vqdm.errors import UserError
from vqdm.quantization.config import IntermediateConfig, QuantizeConfig
from vqdm.storage.atomic import save_json
from vqdm.storage.claims import check_claim


def test_a_run_goes_on_without_the_hub_but_not_with_another_seed(tmp_path):
    config = QuantizeConfig(
        model="owner/model", calibration_prompts="c.txt", evaluation_prompts="e.txt", output_dir=str(tmp_path)
    )
    save_json({"settings": config.to_dict()}, tmp_path / "run.json")
    check_claim(tmp_path, replace(config, local_files_only=True, device="cpu").to_dict(), resume=True)
    smaller = {"xtx_batch_size": 1, "hessian_memory_gb": 0.5, "visualize_nsamples": 0, "hessian_cache": "elsewhere"}
    smaller["intermediate"] = IntermediateConfig(local_batch_size=1)
    check_claim(tmp_path, replace(config, **smaller).to_dict(), resume=True)
    larger = replace(config, intermediate=IntermediateConfig(finetune_batch_size=1)).to_dict()
    with pytest.raises(UserError, match=r"other settings: finetune_batch_size was 32, now 1$"):
        check_claim(tmp_path, larger, resume=True)
    with pytest.raises(UserError, match=r"was started with other settings: seed was 0, now 1$"):
        check_claim(tmp_path, replace(config, local_files_only=True, seed=1).to_dict(), resume=True)
