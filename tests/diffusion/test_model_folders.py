"""Paths that are no pipeline folder, folders of one file variant, and models that cannot be calibrated."""

import json
import shutil

import pytest
import torch
from conftest import tiny_pipeline, tiny_unet
from diffusers import DiffusionPipeline
from safetensors.torch import load_file
from single_file import write_single_file
from tiny_transformers import wan
from torch import nn

from vqdm.conversion import load_source
from vqdm.diffusion.model_folders import (
    check_loaded,
    check_supported,
    check_supported_pipeline,
    check_variant,
    find_denoiser,
    found_variant,
    only_variant,
    quantized_by,
)
from vqdm.diffusion.pipelines import check_model, load_pipeline, stored_bytes, stored_dtypes
from vqdm.errors import UserError


def refusal(model, variant=None, check=check_model) -> str:
    with pytest.raises(UserError) as caught:
        check(str(model), variant)
    assert str(model) in str(caught.value) and "\n" not in str(caught.value)
    return str(caught.value)


def test_other_folders(pipelines, tmp_path):
    assert "is an empty folder" in refusal(tmp_path)
    for part in ("unet", "scheduler", "text_encoder"):
        line = refusal(pipelines["sdxl"] / part)
        assert line.endswith(f"is a part of the pipeline {pipelines['sdxl']}; give that folder")
    shutil.copytree(pipelines["sdxl"] / "unet", tmp_path / "alone")
    assert "is a single UNet2DConditionModel without model_index.json" in refusal(tmp_path / "alone")
    (tmp_path / "above" / "snapshots" / "1").mkdir(parents=True)
    (tmp_path / "above" / "snapshots" / "1" / "model_index.json").write_text("{}")
    assert refusal(tmp_path / "above").endswith(f"; give {tmp_path / 'above' / 'snapshots' / '1'}")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "a.txt").touch()
    assert refusal(tmp_path / "other").endswith("is a folder without model_index.json, so not a diffusers pipeline")
    file = tmp_path / "other" / "m.safetensors"
    file.touch()
    assert refusal(tmp_path / "other").endswith(f"pipeline; for a model in one file give that, {file}")


def test_misspelt_names(pipelines, monkeypatch):
    monkeypatch.chdir(pipelines["sdxl"].parent.parent)
    folder = pipelines["sdxl"].parent.name
    for model in (f"./{folder}/sdxI", str(pipelines["sdxl"].parent / "sdxI")):
        assert f"is not found (did you mean {model.removeprefix('./')[:-1]}l?)" in refusal(model)
    assert "did you mean" not in refusal("/dev/null")
    with pytest.raises(UserError, match=r"is not a folder here \(did you mean .*/sdxl\?\), and cannot be loaded from"):
        load_pipeline(f"{folder}/sdxI", torch.device("cpu"), torch.float32, local_files_only=True)
    with pytest.raises(
        UserError, match=r"not a folder \(did you mean .*sdxl\?\); give the folder that quantizing wrote"
    ):
        find_denoiser(f"{folder}/sdxI")


# ------------------------------------------------------------------------------------------- variants


def pipeline_of(folder, *files: str):
    """A pipeline folder with empty weight files."""
    folder.mkdir()
    (folder / "model_index.json").write_text("{}")
    for name in files:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).touch()
    return folder


PLAIN, HALF, BRAIN = (
    "diffusion_pytorch_model.safetensors",
    "diffusion_pytorch_model.fp16.safetensors",
    "diffusion_pytorch_model.bf16.safetensors",
)
FOLDERS = [
    (
        [f"unet/{HALF}", f"unet/{BRAIN}", "vae/model.fp16.bin", "vae/model.bf16.bin"],
        None,
        f"unet, vae: no files without a variant, only unet/{BRAIN}, unet/{HALF}, vae/model.bf16.bin, vae/model.fp16.bin"
        "; add --variant bf16 or fp16",
    ),
    ([f"unet/{HALF}", f"vae/{BRAIN}"], None, "save it again with one variant"),
    (
        [f"unet/{HALF}"],
        "bf16",
        "unet: no bf16 files, only unet/diffusion_pytorch_model.fp16.safetensors; add --variant fp16",
    ),
    ([f"unet/{PLAIN}"], "fp16", "--variant fp16: MODEL"),
]


@pytest.mark.parametrize(("files", "variant", "words"), FOLDERS)
def test_a_variant_that_is_not_there_is_named_with_the_flag(tmp_path, files, variant, words):
    assert words in refusal(pipeline_of(tmp_path / "m", *files), variant)


@pytest.mark.parametrize(
    ("files", "variant"),
    [
        ([f"unet/{PLAIN}", f"unet/{HALF}"], None),
        ([f"unet/{PLAIN}", f"unet/{HALF}"], "fp16"),
        ([f"unet/{HALF}", f"vae/{PLAIN}"], "fp16"),
        (["unet/diffusion_pytorch_model-00001-of-00002.safetensors", "vae/diffusion_pytorch_model.bin"], None),
        (["unet/diffusion_pytorch_model.fp16-00001-of-00002.safetensors", "scheduler/x.json"], "fp16"),
    ],
)
def test_variants_that_are_there(tmp_path, files, variant):
    check_variant(pipeline_of(tmp_path / "m", *files), variant, "MODEL m")


@pytest.mark.parametrize(
    ("files", "variant"),
    [
        ([f"unet/{HALF}", "vae/model.fp16.bin"], "fp16"),
        ([f"unet/{HALF}", f"vae/{PLAIN}"], "fp16"),
        (["unet/diffusion_pytorch_model.bf16-00001-of-00002.safetensors"], "bf16"),
        (["unet/diffusion_pytorch_model-00001-of-00002.fp16.bin"], "fp16"),
        (["text_encoder/pytorch_model.fp16.bin"], "fp16"),
        ([f"unet/{HALF}", f"unet/{BRAIN}", f"vae/{HALF}"], "fp16"),
        ([f"unet/{HALF}", f"unet/{PLAIN}"], None),
        ([], None),
    ],
)
def test_the_only_variant_is_found(tmp_path, files, variant):
    folder = pipeline_of(tmp_path / "m", *files)
    check_model(str(folder))
    assert found_variant(folder, None) == variant


@pytest.mark.parametrize("halves", [("unet", "vae", "text_encoder"), ("unet",), ("text_encoder",)])
def test_a_folder_of_one_variant_needs_no_flag(pipelines, tmp_path, caplog, halves):
    """Also where some components are plain. What is saved is of the type of the files."""
    model = tmp_path / "m"
    DiffusionPipeline.from_pretrained(pipelines["sd15"]).save_pretrained(model)
    half = tiny_pipeline("sd15").to(torch.float16, silence_dtype_warnings=True)
    half.save_pretrained(tmp_path / "half", variant="fp16")
    for part in halves:
        shutil.rmtree(model / part)
        shutil.copytree(tmp_path / "half" / part, model / part)
    with caplog.at_level("INFO", logger="vqdm"):
        loaded = load_pipeline(str(model), torch.device("cpu"), torch.float32)
    assert caplog.text.count(f"MODEL {model} has fp16 files only; they are read, as with --variant fp16") == 1
    expected = tiny_pipeline("sd15").unet.state_dict()["conv_in.weight"]
    assert torch.equal(loaded.unet.conv_in.weight, expected.half().float() if "unet" in halves else expected)
    types = {part: torch.float16 if part in halves else torch.float32 for part in ("unet", "vae", "text_encoder")}
    assert stored_dtypes(str(model), None) == stored_dtypes(str(model), "fp16") == types
    assert stored_bytes(str(model), None, "unet") == next(model.glob("unet/*.safetensors")).stat().st_size


def test_a_cached_snapshot_of_one_variant_needs_no_flag(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    snapshot = tmp_path / "models--you--name" / "snapshots" / "commit"
    tiny_pipeline("sd15").save_pretrained(snapshot, variant="fp16")
    (tmp_path / "models--you--name" / "refs").mkdir()
    (tmp_path / "models--you--name" / "refs" / "main").write_text("commit")
    load_pipeline("you/name", torch.device("cpu"), torch.float32, local_files_only=True)
    assert stored_bytes("you/name", None, "unet") == (snapshot / "unet" / HALF).stat().st_size
    shutil.copy(snapshot / "unet" / HALF, snapshot / "unet" / BRAIN)
    check_model("you/name", local_files_only=True)  # fp16 is the only one of all components
    for part in ("vae", "text_encoder"):
        file = next((snapshot / part).glob("*.fp16.safetensors"))
        shutil.copy(file, file.with_name(file.name.replace("fp16", "bf16")))
    with pytest.raises(UserError, match=r"MODEL you/name: .*; add --variant bf16 or fp16"):
        check_model("you/name", local_files_only=True)


def test_a_folder_of_bin_files_is_read_with_a_line(pipelines, tmp_path, caplog):
    shutil.copytree(pipelines["sd15"], tmp_path / "m")
    file = tmp_path / "m" / "unet" / PLAIN
    torch.save(load_file(file), file.with_suffix(".bin"))
    file.unlink()
    with caplog.at_level("INFO", logger="vqdm"):
        load_pipeline(str(tmp_path / "m"), torch.device("cpu"), torch.float32)
    (line,) = [record.getMessage() for record in caplog.records if record.name == "vqdm"]
    assert line.endswith("/m: unet: .bin files are read, as tensors only; there is no .safetensors")


def test_a_component_of_one_variant_needs_no_flag(tmp_path):
    """QUANTIZED, and a component that is converted."""
    tiny_unet("sd15").save_pretrained(tmp_path, variant="fp16")
    assert only_variant(tmp_path) == "fp16"
    assert load_source(str(tmp_path)).config.in_channels == 4


def test_sources_that_cannot_be_converted(pipelines, tmp_path):
    path = write_single_file(pipelines["sd15"], tmp_path / "m.safetensors")
    assert "is a model in one file, which is not quantized" in refusal(path, check=load_source)
    assert "did you mean" in refusal(pipelines["sdxl"].parent / "sdx", check=load_source)
    folder = pipeline_of(tmp_path / "m", f"unet/{HALF}", f"unet/{BRAIN}")
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "X"}))
    assert "add --variant bf16 or fp16" in refusal(folder, check=load_source)


# ------------------------------------------------------------------------------------------- full-precision models


@pytest.fixture
def changed(pipelines, tmp_path):
    """A copy of a pipeline's configuration files, without a weight, one of which is changed."""

    def of(file: str, change: dict) -> str:
        shutil.copytree(pipelines["sdxl"], tmp_path, ignore=shutil.ignore_patterns("*.safetensors"), dirs_exist_ok=True)
        config = json.loads((tmp_path / file).read_text())
        (tmp_path / file).write_text(json.dumps(config | change))
        return str(tmp_path)

    return of


@pytest.mark.parametrize("family", ["sdxl", "turbo", "sd15", "sd21"])
def test_text_to_image_pipelines_pass(pipelines, family):
    check_supported(str(pipelines[family]), None, False)


@pytest.mark.parametrize("method", ["vqdm", "bitsandbytes", "torchao", "gguf", "quanto", "sdnq", "anything"])
def test_a_quantized_unet_is_refused(changed, method):
    model = changed("unet/config.json", {"quantization_config": {"quant_method": method}})
    with pytest.raises(UserError) as refused:
        check_supported(model, None, False, role=", which is the teacher")
    line = f"MODEL {model} is quantized itself ({method}); give the full-precision model, which is the teacher"
    assert str(refused.value) == line


@pytest.mark.parametrize("file", ["quantization_config.json", "quanto_qmap.json"])
def test_files_beside_the_weights_count_too(changed, file):
    model = changed("unet/config.json", {"quantization_config": None})
    check_supported(model, None, False)
    with open(f"{model}/unet/{file}", "w") as beside:
        beside.write("{}")
    with pytest.raises(UserError, match=f"is quantized itself .{file}."):
        check_supported(model, None, False)


def test_a_quantized_text_encoder_stays_and_is_logged(changed, caplog):
    caplog.set_level("INFO", "vqdm")
    check_supported(changed("text_encoder/config.json", {"quantization_config": {"quant_method": "bnb"}}), None, False)
    assert "text_encoder of MODEL" in caplog.text and "is quantized (bnb) and stays as it is" in caplog.text


REFUSED = {
    "no UNet": ("model_index.json", {"unet": [None, None]}, "has neither unet nor transformer"),
    "another UNet": (
        "model_index.json",
        {"unet": ["diffusers", "UNetMotionModel"]},
        "has a UNetMotionModel as its",
    ),
    "inpainting": ("unet/config.json", {"in_channels": 9}, "its UNet takes 9 channels and the VAE gives 4"),
    "pix2pix": ("unet/config.json", {"in_channels": 8}, "its UNet takes 8 channels and the VAE gives 4"),
    "classes": ("unet/config.json", {"num_class_embeds": 10}, "its UNet has num_class_embeds 10"),
    "class type": ("unet/config.json", {"class_embed_type": "timestep"}, "its UNet has class_embed_type 'timestep'"),
    "images": ("unet/config.json", {"encoder_hid_dim_type": "image_proj"}, "has encoder_hid_dim_type 'image_proj'"),
    "Kandinsky": ("unet/config.json", {"addition_embed_type": "image"}, "its UNet has addition_embed_type 'image'"),
}
for name in (
    "StableDiffusionXLInpaintPipeline",
    "StableDiffusionXLImg2ImgPipeline",
    "StableDiffusionInstructPix2PixPipeline",
    "StableDiffusionXLControlNetPipeline",
    "StableDiffusionXLPAGPipeline",
    "KandinskyV22Pipeline",
    "StableUnCLIPPipeline",
):
    REFUSED[name] = ("model_index.json", {"_class_name": name}, f"is a {name}, which is unsupported")


@pytest.mark.parametrize(("file", "change", "words"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_calibrated_is_refused(changed, file, change, words):
    with pytest.raises(UserError, match=words):
        check_supported(changed(file, change), None, False)


def test_a_second_expert_needs_a_boundary(tmp_path):
    pipeline, words = wan(experts=2), "is a FluxPipeline with a transformer_2 but no boundary_ratio that says when"
    check_supported_pipeline(pipeline, "pipeline")
    pipeline.save_config(tmp_path)
    check_supported(str(tmp_path), None, False)
    index = json.loads((tmp_path / "model_index.json").read_text())
    (tmp_path / "model_index.json").write_text(json.dumps(index | {"_class_name": "FluxPipeline"}))
    with pytest.raises(UserError, match=words):
        check_supported(str(tmp_path), None, False)


class Subclass(nn.Parameter):
    """As other libraries hold their weights in."""


INTEGERS = nn.Parameter(torch.zeros(16, 4, 3, 3, dtype=torch.int8), requires_grad=False)


@pytest.mark.parametrize("weight", [Subclass(torch.zeros(16, 4, 3, 3)), INTEGERS], ids=["class", "int8"])
def test_a_loaded_unet_is_looked_at_too(weight):
    unet = tiny_unet("sdxl")
    check_loaded(unet.half(), "m")
    unet.conv_in.weight = weight
    with pytest.raises(UserError, match=r"MODEL m is quantized itself \((Subclass|int8)\)"):
        check_loaded(unet, "m")
    assert quantized_by(tiny_unet("sdxl").to(torch.float8_e4m3fn)) == "float8_e4m3fn"


def test_a_loaded_pipeline_is_checked_as_its_files_are():
    pipeline = tiny_pipeline("sdxl")
    check_supported_pipeline(pipeline, "pipeline")
    pipeline.unet.register_to_config(in_channels=9)
    with pytest.raises(UserError, match="pipeline: its UNet takes 9 channels and the VAE gives 4"):
        check_supported_pipeline(pipeline, "pipeline")
    pipeline.unet.peft_config = {"default": None}
    with pytest.raises(UserError, match="pipeline has LoRA weights beside its UNet; call fuse_lora"):
        check_supported_pipeline(pipeline, "pipeline")
    pipeline.unet.conv_in.weight = nn.Parameter(torch.zeros(2, 2, dtype=torch.int8), requires_grad=False)
    with pytest.raises(UserError, match=r"is quantized itself \(int8\)"):
        check_supported_pipeline(pipeline, "pipeline")
