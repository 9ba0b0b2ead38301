"""Tiny random pipelines with diffusion transformers, one of each family, made from configurations alone."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from diffusers import (
    AutoencoderDC,
    AutoencoderKL,
    AutoencoderKLFlux2,
    AutoencoderKLQwenImage,
    AutoencoderKLWan,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Pipeline,
    Flux2Transformer2DModel,
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
    UniPCMultistepScheduler,
    WanPipeline,
    WanTransformer3DModel,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    Gemma2Config,
    Gemma2Model,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    PreTrainedTokenizerBase,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen3Config,
    Qwen3ForCausalLM,
    T5Config,
    T5EncoderModel,
    UMT5Config,
    UMT5EncoderModel,
)

from train_text import known_words, make_tokenizer
from vqdm.additive.code import CodeSpec
from vqdm.additive.solve import SolverConfig, solve_layer
from vqdm.layers.quantized import swap
from vqdm.storage.hf import mark_quantized

WIDTH = 32  # of every text encoder
FRAMES_VAE = dict(  # autoencoders that also take videos
    base_dim=8,
    z_dim=4,
    dim_mult=[1, 1],
    num_res_blocks=1,
    temperal_downsample=[False],
    latents_mean=[0.0] * 4,
    latents_std=[1.0] * 4,
)
SIZE = ("--height", "32", "--width", "32")


def vae(latent_channels: int = 4) -> AutoencoderKL:
    """A VAE with latents of half the size."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8),
        norm_num_groups=4,
        sample_size=16,
        latent_channels=latent_channels,
        shift_factor=0.1,
    )


def clip(tokenizer: PreTrainedTokenizerBase, kind: type = CLIPTextModel):
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        max_position_embeddings=24,
        hidden_size=WIDTH,
        intermediate_size=WIDTH,
        num_hidden_layers=1,
        num_attention_heads=2,
        projection_dim=WIDTH,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return kind(config)


def t5(tokenizer: PreTrainedTokenizerBase, width: int = WIDTH) -> T5EncoderModel:
    config = T5Config(vocab_size=len(tokenizer), d_model=width, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
    return T5EncoderModel(config)


def language_sizes(tokenizer: PreTrainedTokenizerBase, layers: int) -> dict:
    """Sizes of a language model, as Gemma's and Qwen's configurations name them."""
    return dict(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=32,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=1,
    )


def flux(guidance: bool = True) -> FluxPipeline:
    """FLUX.1: two streams and one, with guidance embedded as in dev, or without as in schnell."""
    tokenizer = make_tokenizer(known_words())
    transformer = FluxTransformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=WIDTH,
        pooled_projection_dim=WIDTH,
        guidance_embeds=guidance,
        axes_dims_rope=(4, 6, 6),
    )
    return FluxPipeline(
        FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae(),
        clip(tokenizer),
        tokenizer,
        t5(tokenizer),
        tokenizer,
        transformer,
    )


def sd3(third: bool = True) -> StableDiffusion3Pipeline:
    """SD3.5-medium: joint blocks, the first with a second attention; with the T5 or without it."""
    tokenizer = make_tokenizer(known_words())
    transformer = SD3Transformer2DModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=4,
        joint_attention_dim=4 * WIDTH,
        caption_projection_dim=32,
        pooled_projection_dim=2 * WIDTH,
        pos_embed_max_size=8,
        dual_attention_layers=(0,),
        qk_norm="rms_norm",
    )
    return StableDiffusion3Pipeline(
        transformer,
        FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae(),
        clip(tokenizer, CLIPTextModelWithProjection),
        tokenizer,
        clip(tokenizer, CLIPTextModelWithProjection),
        tokenizer,
        t5(tokenizer, 4 * WIDTH) if third else None,
        tokenizer if third else None,
    )


def pixart() -> PixArtSigmaPipeline:
    """PixArt-Σ: cross-attention to a T5, one modulation outside the blocks."""
    tokenizer = make_tokenizer(known_words())
    transformer = PixArtTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        cross_attention_dim=32,
        sample_size=8,
        caption_channels=WIDTH,
        use_additional_conditions=False,
    )
    return PixArtSigmaPipeline(tokenizer, t5(tokenizer), vae(), transformer, DPMSolverMultistepScheduler())


def sana() -> SanaPipeline:
    """Sana: linear attention, 1×1 and depthwise convolutions in place of the feed-forward layers."""
    tokenizer = make_tokenizer(known_words())
    config = Gemma2Config(**language_sizes(tokenizer, 1), head_dim=16)
    transformer = SanaTransformer2DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=2,
        num_cross_attention_heads=2,
        cross_attention_head_dim=16,
        cross_attention_dim=32,
        caption_channels=WIDTH,
        sample_size=8,
    )
    blocks = dict.fromkeys(("encoder_block_types", "decoder_block_types"), ("ResBlock", "ResBlock"))
    sizes = dict.fromkeys(("encoder_block_out_channels", "decoder_block_out_channels"), (8, 8))
    layers = dict.fromkeys(("encoder_layers_per_block", "decoder_layers_per_block"), (1, 1))
    scales = dict.fromkeys(("encoder_qkv_multiscales", "decoder_qkv_multiscales"), ((), ()))
    decoder = AutoencoderDC(latent_channels=4, **blocks, **sizes, **layers, **scales, scaling_factor=0.5)
    scheduler = DPMSolverMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=3.0)
    return SanaPipeline(tokenizer, Gemma2Model(config), decoder, transformer, scheduler)


def qwen_image() -> QwenImagePipeline:
    """Qwen-Image: prompts padded to the longest of a batch, and guidance as a second call."""
    tokenizer = make_tokenizer(known_words())
    text = dict(
        **language_sizes(tokenizer, 1),
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        rope_parameters={"type": "default", "mrope_section": [2, 3, 3], "rope_type": "default", "rope_theta": 1e4},
    )
    vision = dict(depth=1, hidden_size=32, intermediate_size=32, num_heads=2, out_hidden_size=WIDTH)
    transformer = QwenImageTransformer2DModel(
        in_channels=16,
        out_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=WIDTH,
        axes_dims_rope=(4, 6, 6),
    )
    decoder = AutoencoderKLQwenImage(**FRAMES_VAE)
    encoder = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(text_config=text, vision_config=vision))
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    return QwenImagePipeline(scheduler, decoder, encoder, tokenizer, transformer)


def qwen3(tokenizer: PreTrainedTokenizerBase, layers: int) -> Qwen3ForCausalLM:
    return Qwen3ForCausalLM(Qwen3Config(**language_sizes(tokenizer, layers), head_dim=16))


def with_template(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """A tokenizer for conversations, which are their messages alone."""
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    return tokenizer


def z_image() -> ZImagePipeline:
    """Z-Image: latents and texts in lists, timesteps from 0 (noise) to 1."""
    tokenizer = with_template(make_tokenizer(known_words()))
    transformer = ZImageTransformer2DModel(
        in_channels=4,
        dim=48,
        n_layers=2,
        n_refiner_layers=1,
        n_heads=3,
        n_kv_heads=3,
        cap_feat_dim=WIDTH,
        axes_dims=[4, 6, 6],
        axes_lens=[600, 32, 32],
    )
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    return ZImagePipeline(scheduler, vae(), qwen3(tokenizer, 2).model, tokenizer, transformer)


def mistral(tokenizer: PreTrainedTokenizerBase, layers: int) -> Mistral3ForConditionalGeneration:
    text = dict(model_type="mistral", **language_sizes(tokenizer, layers), head_dim=16)
    sizes = dict(hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, head_dim=16)
    vision = dict(model_type="pixtral", **sizes, image_size=32, patch_size=16)
    return Mistral3ForConditionalGeneration(Mistral3Config(text_config=text, vision_config=vision))


def gemma3(tokenizer: PreTrainedTokenizerBase, layers: int) -> Gemma3ForConditionalGeneration:
    text = dict(model_type="gemma3_text", **language_sizes(tokenizer, layers), head_dim=16)
    sizes = dict(hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    vision = dict(model_type="siglip_vision_model", **sizes, image_size=32, patch_size=16)
    config = Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4)
    return Gemma3ForConditionalGeneration(config)


def flux2_dev() -> Flux2Pipeline:
    """FLUX.2 dev: that of klein with a Mistral, of which layers 10, 20 and 30 are read."""
    klein = flux2()
    klein.tokenizer.chat_template = (
        "{% for message in messages %}{% for part in message['content'] %}{{ part['text'] }}{% endfor %}{% endfor %}"
    )
    parts = klein.scheduler, klein.vae, mistral(klein.tokenizer, 31), klein.tokenizer, klein.transformer
    return Flux2Pipeline(*parts)


def flux2() -> Flux2KleinPipeline:
    """FLUX.2 klein: attention and MLP inputs in one matrix, modulations that all blocks share, guidance by calls."""
    tokenizer = with_template(make_tokenizer(known_words()))
    transformer = Flux2Transformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=3 * WIDTH,
        timestep_guidance_channels=32,
        axes_dims_rope=(4, 4, 4, 4),
        guidance_embeds=False,
    )
    decoder = AutoencoderKLFlux2(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8),
        norm_num_groups=4,
        sample_size=16,
        latent_channels=4,
    )
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    return Flux2KleinPipeline(scheduler, decoder, qwen3(tokenizer, 28), tokenizer, transformer)


def wan(experts: int = 1, per_token: bool = False) -> WanPipeline:
    """Wan 2.1, of which an image is a video of one frame; the two experts, or a timestep per token, of Wan 2.2."""
    tokenizer = make_tokenizer(known_words())
    sizes = dict(d_model=WIDTH, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
    transformers = [
        WanTransformer3DModel(
            num_attention_heads=2,
            attention_head_dim=16,
            in_channels=4,
            out_channels=4,
            text_dim=WIDTH,
            freq_dim=16,
            ffn_dim=64,
            num_layers=2,
            rope_max_seq_len=32,
        )
        for _ in range(experts)
    ]
    decoder = AutoencoderKLWan(**FRAMES_VAE, scale_factor_spatial=2)
    scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    encoder = UMT5EncoderModel(UMT5Config(vocab_size=len(tokenizer), **sizes))
    boundary = 0.875 if experts > 1 else None
    return WanPipeline(
        tokenizer,
        encoder,
        decoder,
        scheduler,
        *transformers,
        boundary_ratio=boundary,
        expand_timesteps=per_token,
    )


FAMILIES: dict[str, Callable[[], DiffusionPipeline]] = {
    "flux": flux,
    "sd3": sd3,
    "pixart": pixart,
    "sana": sana,
    "qwen-image": qwen_image,
    "z-image": z_image,
    "flux2": flux2,
    "wan": wan,
}
OTHERS = {"flux2-dev": flux2_dev, "wan-5b": partial(wan, per_token=True)}  # of these families, run in part


def tiny_transformer_pipeline(family: str) -> DiffusionPipeline:
    """A whole pipeline of a family, with seeded random weights, for images of `SIZE`."""
    torch.manual_seed(0)
    pipeline = (FAMILIES | OTHERS)[family]()
    for parameter in pipeline.transformer.parameters():
        if parameter.dim() > 1 and not parameter.any():  # some start as zeros, with which nothing depends on the rest
            torch.nn.init.normal_(parameter, std=0.1)
    for part in pipeline.components.values():
        if isinstance(part, torch.nn.Module):
            part.eval().requires_grad_(False)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def quantized_flux() -> DiffusionPipeline:
    """A FLUX.1 with two quantized layers, one of each kind of block."""
    pipeline, generator = tiny_transformer_pipeline("flux"), torch.Generator().manual_seed(0)
    config = SolverConfig(spec=CodeSpec(1, 4, 4), max_epochs=1, beam_size=1, init_max_iter=1)
    for name in ("transformer_blocks.0.attn.to_q", "single_transformer_blocks.0.proj_mlp"):
        weight = pipeline.transformer.get_submodule(name).weight.data
        code, _ = solve_layer(weight, torch.eye(weight.shape[1]), config, generator)
        swap(pipeline.transformer, name, config.spec).set_code(code)
    mark_quantized(pipeline.transformer)
    return pipeline


def flux_image(pipeline: DiffusionPipeline, **given) -> torch.Tensor:
    settings = {"num_inference_steps": 1, "height": 32, "width": 32, "max_sequence_length": 16, "output_type": "pt"}
    return pipeline("a circle", generator=torch.Generator().manual_seed(0), **settings | given).images
