"""Plans of models at their true sizes, from their configurations alone: one JSON line per model.

    python benchmarks/bench_plans.py --gpu 24 --ram 64 --target_bits 3 --calibration_nsteps 1

Each line has, in GB, the most that a phase of a quantization needs of GPU memory, RAM and disk, how the denoiser is
held (`--offload auto`), and hours at assumed rates of matrix products. No weight is made; those of bfloat16 files count
as mapped from them. With `--finetune_scope` it is the plan of a fine-tuning of the model at two bits, with the defaults
of finetune.py besides `--xtx_batch_size`.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import replace

import torch
from diffusers import (
    AutoencoderDC,
    AutoencoderKL,
    AutoencoderKLQwenImage,
    AutoencoderKLWan,
    DiffusionPipeline,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
    SanaPipeline,
    SanaTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
    UniPCMultistepScheduler,
    WanPipeline,
    WanTransformer3DModel,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from sdxl import CONFIG as SDXL
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    Gemma2Config,
    Gemma2Model,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen3Config,
    Qwen3Model,
    T5Config,
    T5EncoderModel,
    UMT5Config,
    UMT5EncoderModel,
)

from vqdm.additive.code import CodeSpec
from vqdm.devices import MatmulRates, Need, lacking, on
from vqdm.diffusion.blocks import select_layers
from vqdm.diffusion.denoisers import denoiser_of, denoisers_of
from vqdm.diffusion.shapes import meta_encoder, shapes_of
from vqdm.finetuning.config import FinetuneConfig
from vqdm.finetuning.plan import Student, choices
from vqdm.finetuning.plan import plan as finetuning_plan
from vqdm.finetuning.trainer import TrainedParameters
from vqdm.layers.quantized import swap
from vqdm.quantization.config import QuantizeConfig
from vqdm.quantization.job import needs_in_turn, planned_denoiser, planned_shapes
from vqdm.quantization.plan import offloads

DTYPE = torch.bfloat16
IN_OTHER_TYPES = ("SDXL", "PixArt-Sigma", "SD3.5-large", "Wan2.2-T2V-A14B")  # whose files may be in another: in RAM
RATES = MatmulRates(1e14, 4e13)  # of products in 16 bit and in float32, as of one large GPU


def meta(kind: type, **config):
    """A network of diffusers on the meta device."""
    with torch.device("meta"):
        network = kind(**config)
    return torch.nn.Module.to(network, DTYPE).eval().requires_grad_(False)


def vae(channels: int) -> AutoencoderKL:
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
    return meta(
        AutoencoderKL, **blocks, block_out_channels=(128, 256, 512, 512), layers_per_block=2, latent_channels=channels
    )


def t5():
    sizes = dict(vocab_size=32128, d_model=4096, d_kv=64, d_ff=10240, num_layers=24, num_heads=64)
    return meta_encoder(T5EncoderModel, T5Config(**sizes, feed_forward_proj="gated-gelu"), DTYPE)


def clip(kind: type, width: int, layers: int):
    heads = dict(num_hidden_layers=layers, num_attention_heads=width // 64, projection_dim=width)
    return meta_encoder(kind, CLIPTextConfig(hidden_size=width, intermediate_size=4 * width, **heads), DTYPE)


def language(vocabulary: int, width: int, inner: int, layers: int, heads: int, kv_heads: int) -> dict:
    return dict(
        vocab_size=vocabulary, hidden_size=width, intermediate_size=inner, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=kv_heads,
    )  # fmt: skip


def sdxl() -> DiffusionPipeline:
    texts = clip(CLIPTextModel, 768, 12), clip(CLIPTextModelWithProjection, 1280, 32)
    return StableDiffusionXLPipeline(
        vae(4), *texts, None, None, meta(UNet2DConditionModel, **SDXL), EulerDiscreteScheduler()
    )


def flux() -> DiffusionPipeline:
    transformer = meta(FluxTransformer2DModel, guidance_embeds=True)
    text = clip(CLIPTextModel, 768, 12)
    return FluxPipeline(FlowMatchEulerDiscreteScheduler(), vae(16), text, None, t5(), None, transformer)


def sd35() -> DiffusionPipeline:
    transformer = meta(
        SD3Transformer2DModel, sample_size=128, num_layers=38, num_attention_heads=38, attention_head_dim=64,
        caption_projection_dim=2432, pos_embed_max_size=192, qk_norm="rms_norm",
    )  # fmt: skip
    texts = clip(CLIPTextModelWithProjection, 768, 12), clip(CLIPTextModelWithProjection, 1280, 32)
    scheduler = FlowMatchEulerDiscreteScheduler()
    return StableDiffusion3Pipeline(transformer, scheduler, vae(16), texts[0], None, texts[1], None, t5(), None)


def pixart() -> DiffusionPipeline:
    transformer = meta(
        PixArtTransformer2DModel, sample_size=128, cross_attention_dim=1152, caption_channels=4096,
        use_additional_conditions=False,
    )  # fmt: skip
    return PixArtSigmaPipeline(None, t5(), vae(4), transformer, EulerDiscreteScheduler())


def sana() -> DiffusionPipeline:
    text = Gemma2Config(**language(256000, 2304, 9216, 26, 8, 4), head_dim=256)
    transformer, decoder = meta(SanaTransformer2DModel), meta(AutoencoderDC)
    text = meta_encoder(Gemma2Model, text, DTYPE)
    return SanaPipeline(None, text, decoder, transformer, FlowMatchEulerDiscreteScheduler())


def qwen_image() -> DiffusionPipeline:
    rope = {"type": "default", "mrope_section": [16, 24, 24], "rope_type": "default", "rope_theta": 1e6}
    vision = dict(depth=32, hidden_size=1280, intermediate_size=3420, num_heads=16, out_hidden_size=3584)
    text = language(152064, 3584, 18944, 28, 28, 4) | {"rope_parameters": rope}
    encoder = Qwen2_5_VLConfig(text_config=text, vision_config=vision)
    encoder = meta_encoder(Qwen2_5_VLForConditionalGeneration, encoder, DTYPE)
    scheduler, decoder = FlowMatchEulerDiscreteScheduler(), meta(AutoencoderKLQwenImage)
    return QwenImagePipeline(scheduler, decoder, encoder, None, meta(QwenImageTransformer2DModel))


def z_image() -> DiffusionPipeline:
    text = meta_encoder(Qwen3Model, Qwen3Config(**language(151936, 2560, 9728, 36, 32, 8), head_dim=128), DTYPE)
    scheduler, transformer = FlowMatchEulerDiscreteScheduler(), meta(ZImageTransformer2DModel)
    return ZImagePipeline(scheduler, vae(16), text, None, transformer)


def wan() -> DiffusionPipeline:
    sizes = dict(vocab_size=256384, d_model=4096, d_kv=64, d_ff=10240, num_layers=24, num_heads=64)
    text = meta_encoder(UMT5EncoderModel, UMT5Config(**sizes, feed_forward_proj="gated-gelu"), DTYPE)
    experts = [
        meta(
            WanTransformer3DModel, in_channels=16, out_channels=16, num_layers=40, num_attention_heads=40,
            attention_head_dim=128, ffn_dim=13824, text_dim=4096,
        )
        for _ in range(2)
    ]  # fmt: skip
    scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    return WanPipeline(None, text, meta(AutoencoderKLWan), scheduler, *experts, boundary_ratio=0.875)


MODELS: dict[str, Callable[[], DiffusionPipeline]] = {
    "SDXL": sdxl,
    "PixArt-Sigma": pixart,
    "Sana-1.6B": sana,
    "Z-Image": z_image,
    "SD3.5-large": sd35,
    "FLUX.1-dev": flux,
    "Qwen-Image": qwen_image,
    "Wan2.2-T2V-A14B": wan,
}


def planned(name: str, config: QuantizeConfig, gpu: float, ram: float) -> dict:
    """The plan of a model on a GPU and in RAM of so many GB."""
    pipeline = MODELS[name]()
    denoisers, prompts = denoisers_of(pipeline), (config.calibration_nsamples, config.evaluation_nsamples)
    parts = [planned_denoiser(config, pipeline, part, given=True) for part in denoisers]
    given = name in IN_OTHER_TYPES
    shapes = [planned_shapes(config, pipeline, part, prompts, on_gpu=True, given=given) for part in parts]
    for offload in offloads(config, name != "SDXL"):
        one = replace(config, offload=offload)
        needs = on(needs_in_turn(one, parts, shapes, prompts, RATES), "cuda")
        if not lacking(needs, int(gpu * 1e9), int(ram * 1e9)):
            break
    billion = round(sum(map(billions, denoisers.values())), 2)
    about = {"model": name, "parameters_billion": billion, "offload": offload}
    return about | figures(needs, gpu, ram)


def planned_finetuning(name: str, config: FinetuneConfig, gpu: float, ram: float) -> dict:
    """The plan of fine-tuning a model whose layers have two bits, with the flags of memory that fit."""
    pipeline = MODELS[name]()
    shapes, denoiser = shapes_of(pipeline, config, given=name in IN_OTHER_TYPES), denoiser_of(pipeline)
    billion, spec = billions(denoiser), CodeSpec(2, 8, 8)
    for layer in select_layers(denoiser, "default", 0, spec, {}):
        swap(denoiser, layer.name, spec)
    for one in denoiser.parameters():
        if one.is_floating_point():
            one.data = one.data.float()
            one.requires_grad_(True)
    trained = {key: one for key, one in denoiser.named_parameters() if one.is_floating_point()}
    student = Student.of(denoiser, TrainedParameters(trained, {}, {}), DTYPE, shapes.call)
    for one in choices(config):
        needs = on(finetuning_plan(one, shapes, student, shapes.steps * shapes.calls, RATES), "cuda")
        if not lacking(needs, int(gpu * 1e9), int(ram * 1e9)):
            break
    about = {"model": name, "parameters_billion": billion, "finetune_scope": one.finetune_scope}
    about |= {key: getattr(one, key) for key in ("block_cache", "local_batch_size", "decode")}
    return about | figures(needs, gpu, ram)


def billions(denoiser: torch.nn.Module) -> float:
    return round(sum(one.numel() for one in denoiser.parameters()) / 1e9, 2)


def figures(needs: list[Need], gpu: float, ram: float) -> dict:
    """The most that a phase needs, in GB, hours, and what each phase needs."""
    most = {
        kind: round(max(getattr(need, field) for need in needs) / 1e9, 1)
        for kind, field in {"gpu_gb": "device", "ram_gb": "ram", "disk_gb": "disk"}.items()
    }
    phases = {need.phase: [round(one / 1e9, 1) for one in (need.device, need.ram, need.disk)] for need in needs}
    hours = round(sum(need.seconds for need in needs) / 3600, 1)
    return most | {"hours": hours, "fits": not lacking(needs, int(gpu * 1e9), int(ram * 1e9)), "phases": phases}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--gpu", type=float, default=24, help="GB of GPU memory")
    parser.add_argument("--ram", type=float, default=64, help="GB of RAM")
    parser.add_argument("--target_bits", type=float, default=3.0)
    parser.add_argument("--calibration_nsamples", type=int, default=256)
    parser.add_argument("--calibration_nsteps", type=int, default=1)
    parser.add_argument("--xtx_batch_size", type=int, default=4)
    parser.add_argument("--finetune_scope", choices=("auto", "denoiser", "blocks"), help="of a fine-tuning")
    given = vars(parser.parse_args())
    models, gpu, ram, scope = (given.pop(name) for name in ("models", "gpu", "ram", "finetune_scope"))
    for name in models if scope else ():
        files = dict.fromkeys(("quantized", "calibration_prompts", "evaluation_prompts"), "")
        batch = given["xtx_batch_size"]
        config = FinetuneConfig(model=name, **files, finetune_scope=scope, xtx_batch_size=batch)
        print(json.dumps(planned_finetuning(name, config, gpu, ram)), flush=True)
    for name in models if not scope else ():
        print(json.dumps(planned(name, QuantizeConfig(model=name, **given), gpu, ram)), flush=True)


if __name__ == "__main__":
    main()
