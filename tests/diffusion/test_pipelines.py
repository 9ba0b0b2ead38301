"""Devices, and the files of a pipeline on the disk."""

from types import SimpleNamespace

import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler
from safetensors.torch import save_file

from vqdm.devices import check_float64, pick_dtype
from vqdm.diffusion.pipelines import load_pipeline, set_scheduler, stored_dtypes, weight_files
from vqdm.errors import UserError


def test_a_device_without_float64_is_refused_by_name(monkeypatch):
    check_float64(torch.device("cpu"))

    def unable(*_, **__):
        raise TypeError("Cannot convert a MPS Tensor to float64 dtype as the MPS framework doesn't support float64.")

    monkeypatch.setattr(torch, "empty", unable)
    with pytest.raises(UserError, match=r"--device mps has no float64, .*; use --device cpu"):
        check_float64(torch.device("mps"))


def test_half_precision_may_wait_on_the_cpu(pipelines, capfd):
    """As generate.py loads what it then moves to a GPU."""
    pipeline = load_pipeline(str(pipelines["sdxl"]), torch.device("cpu"), torch.float16)
    assert pipeline.unet.dtype == torch.float16
    assert "cannot run with" not in capfd.readouterr().err


def test_a_scheduler_of_flow_matching_is_kept():
    """Another one would take its noise for that of alphas_cumprod. Sana's is a `dpmsolver` of flow matching."""
    sana = DPMSolverMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=3.0)
    for own, name in ((FlowMatchEulerDiscreteScheduler(), "dpmsolver"), (sana, "ddim")):
        pipeline = SimpleNamespace(scheduler=own)
        with pytest.raises(UserError, match=rf"^--scheduler is {name}, but the model's .* allowed is default$"):
            set_scheduler(pipeline, name)
        set_scheduler(pipeline, "default")
        assert pipeline.scheduler is own
    set_scheduler(pipeline, "dpmsolver")
    assert pipeline.scheduler.config.use_flow_sigmas and pipeline.scheduler.config.flow_shift == 3.0
    pipeline = SimpleNamespace(scheduler=DPMSolverMultistepScheduler())
    set_scheduler(pipeline, "ddim")
    assert isinstance(pipeline.scheduler, DDIMScheduler)


def test_the_automatic_type_follows_the_device():
    """Of GPUs: tests/emulated/gpu_api.py."""
    assert pick_dtype("auto", torch.device("cpu")) == torch.float32
    assert pick_dtype("auto", torch.device("mps")) == torch.float16
    assert pick_dtype("auto", torch.device("xpu")) == torch.bfloat16
    assert pick_dtype("bfloat16", torch.device("cpu")) == torch.bfloat16


def test_files_of_a_variant(tmp_path):
    names = [
        "model.safetensors",
        "model.fp16.safetensors",
        "m-00001-of-00002.safetensors",
        "m.fp16-00001-of-00002.safetensors",
    ]
    (tmp_path / "unet").mkdir()
    for name in names:
        (tmp_path / "unet" / name).touch()
    found = {variant: [file.name for file in weight_files(str(tmp_path), variant)] for variant in (None, "fp16")}
    assert found == {None: sorted(names[::2]), "fp16": sorted(names[1::2])}


def test_types_are_those_of_weights_also_in_pickled_files(tmp_path):
    """The widest of weights and biases; what codes consist of, in float16, does not count."""
    for name in ("unet", "vae", "text_encoder"):
        (tmp_path / name).mkdir()
    wide, narrow = torch.zeros(2), torch.zeros(2, dtype=torch.float16)
    tensors = {
        "a.weight": narrow,
        "b.bias": wide,
        "c.codebooks": narrow.clone(),
        "d.codes": torch.zeros(2, dtype=torch.uint8),
    }
    save_file(tensors, tmp_path / "unet" / "m.safetensors")
    torch.save({"a.weight": narrow, "ids": torch.arange(3)}, tmp_path / "vae" / "diffusion_pytorch_model.bin")
    torch.save({"a.weight": wide}, tmp_path / "text_encoder" / "pytorch_model.bin")
    save_file({"a.weight": narrow}, tmp_path / "text_encoder" / "model.safetensors")
    found = stored_dtypes(str(tmp_path), None)
    assert found == {"unet": torch.float32, "vae": torch.float16, "text_encoder": torch.float16}


def test_files_of_a_hub_name_are_those_of_the_cache(tmp_path, monkeypatch):
    """A pipeline of the hub is saved in the types it was stored in there, like one of a folder."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    repository = tmp_path / "models--you--name"
    for branch, dtype in (("main", torch.float16), ("other", torch.bfloat16)):
        snapshot = repository / "snapshots" / f"commit-{branch}"
        (snapshot / "vae").mkdir(parents=True)
        (repository / "refs").mkdir(exist_ok=True)
        (repository / "refs" / branch).write_text(f"commit-{branch}")
        (snapshot / "model_index.json").write_text("{}")
        save_file({"weight": torch.zeros(2, dtype=dtype)}, snapshot / "vae" / "model.safetensors")
    assert stored_dtypes("you/name", None) == {"vae": torch.float16}
    assert stored_dtypes("you/name", None, "other") == {"vae": torch.bfloat16}
    assert stored_dtypes("you/unknown", None) == {}
