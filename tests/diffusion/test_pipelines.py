"""Devices, and the files of a pipeline on the disk."""

import shutil
import sys
from types import SimpleNamespace

import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler
from gpu_ram import mapped_files
from safetensors.torch import load_file, save_file
from tiny_transformers import tiny_transformer_pipeline

from vqdm.config import RunConfig
from vqdm.devices import check_float64, pick_dtype
from vqdm.diffusion.pipelines import (
    bytes_in_ram,
    load_pipeline,
    networks,
    other_parts,
    parameter_bytes,
    returning,
    set_scheduler,
    stored_dtypes,
    weight_files,
)
from vqdm.diffusion.shapes import skeleton_pipeline
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


@pytest.fixture(scope="module")
def flux_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("flux")
    tiny_transformer_pipeline("flux").to(torch.bfloat16).save_pretrained(folder)
    return folder


def in_ram(folder, dtype: torch.dtype) -> tuple[dict[str, int], dict[str, int]]:
    """What the weights of each network are counted to take of RAM, and all of their bytes."""
    pipeline, config = load_pipeline(str(folder), torch.device("cpu"), dtype), RunConfig(model=str(folder))
    given = bytes_in_ram(config, pipeline, given=True)
    assert given == {name: parameter_bytes(part) for name, part in networks(pipeline).items()}
    return bytes_in_ram(config, pipeline, given=False), given


def test_weights_in_the_type_of_their_files_take_no_ram(flux_folder, tmp_path):
    """Nor do those of configurations alone; those that are read into another type, or out of .bin files, do."""
    mapped, _ = in_ram(flux_folder, torch.bfloat16)
    assert set(mapped.values()) == {0} and len(mapped) == 4
    converted, whole = in_ram(flux_folder, torch.float32)
    assert converted == whole
    other = shutil.copytree(flux_folder, tmp_path / "other") / "text_encoder_2"
    torch.save(load_file(other / "model.safetensors"), other / "pytorch_model.bin")
    (other / "model.safetensors").unlink()
    mixed, whole = in_ram(tmp_path / "other", torch.bfloat16)
    assert mixed == mapped | {"text_encoder_2": whole["text_encoder_2"]}


def test_a_part_gets_its_mapped_weights_back(flux_folder):
    """And not copies in RAM of what was on the device, in whatever type and place it was."""
    pipeline = load_pipeline(str(flux_folder), torch.device("cpu"), torch.bfloat16)
    for part in other_parts(pipeline).values():
        before = [(id(one), one.data_ptr(), one.dtype, one.clone()) for one in [*part.parameters(), *part.buffers()]]
        take_back = returning(part)
        part.to("meta", torch.float32)
        for _ in range(2):
            take_back()
            after = [*part.parameters(), *part.buffers()]
            assert [(id(one), one.data_ptr(), one.dtype) for one in after] == [one[:3] for one in before]
            assert all(torch.equal(one, other[3]) for one, other in zip(after, before, strict=True))


@pytest.mark.skipif(sys.platform != "linux", reason="where files are mapped is read from /proc")
def test_what_counts_as_mapped_is_mapped(flux_folder):
    """By both libraries: all weights, but no buffers that are made anew."""
    pipeline = load_pipeline(str(flux_folder), torch.device("cpu"), torch.bfloat16)
    files = mapped_files()
    for part in networks(pipeline).values():
        assert all(any(one.data_ptr() in file for file in files) for one in part.parameters())


def test_a_damaged_file_is_named_where_headers_alone_are_read(flux_folder, tmp_path):
    """As a dry run does."""
    other = shutil.copytree(flux_folder, tmp_path / "other")
    file = other / "text_encoder_2" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(UserError, match=rf"^MODEL {other} cannot be loaded: {file}: Error while deserializing header"):
        skeleton_pipeline(RunConfig(model=str(other)), torch.bfloat16)
    assert skeleton_pipeline(RunConfig(model=str(flux_folder)), torch.bfloat16) is not None
