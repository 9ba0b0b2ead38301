"""The configurations of the small pipeline and of the small CLIP model, in one place."""

from __future__ import annotations

from diffusers import AutoencoderKL, EulerDiscreteScheduler, SD3Transformer2DModel, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

MAX_TOKENS = 24
TEXT_WIDTHS = (64, 128)


def make_vae() -> AutoencoderKL:
    """64×64 RGB to 16×16×4 latents."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(24, 48, 96),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=64,
        mid_block_add_attention=False,
        force_upcast=False,
    )


def make_unet() -> UNet2DConditionModel:
    """SDXL's layout (no attention at the first level, `text_time` conditioning) at about 14 M parameters."""
    return UNet2DConditionModel(
        sample_size=16,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(64, 128, 224),
        layers_per_block=1,
        transformer_layers_per_block=1,
        attention_head_dim=(2, 4, 7),
        norm_num_groups=16,
        cross_attention_dim=sum(TEXT_WIDTHS),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=16,
        projection_class_embeddings_input_dim=6 * 16 + TEXT_WIDTHS[1],
    )


def make_mmdit() -> SD3Transformer2DModel:
    """SD3.5-large's layout (two token streams, joint attention, AdaLN, normed queries and keys) at 11 M parameters."""
    return SD3Transformer2DModel(
        sample_size=16,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=8,
        attention_head_dim=32,
        num_attention_heads=6,
        joint_attention_dim=sum(TEXT_WIDTHS),
        caption_projection_dim=6 * 32,
        pooled_projection_dim=sum(TEXT_WIDTHS),
        pos_embed_max_size=16,
        qk_norm="rms_norm",
    )


def make_text_encoders(vocab_size: int, bos: int, eos: int) -> tuple[CLIPTextModel, CLIPTextModelWithProjection]:
    """SDXL's pair: one CLIP text model, and a wider one with a projection of its last hidden state."""
    shared = dict(
        vocab_size=vocab_size,
        max_position_embeddings=MAX_TOKENS,
        num_hidden_layers=3,
        num_attention_heads=4,
        bos_token_id=bos,
        eos_token_id=eos,
        pad_token_id=eos,
    )
    first, second = TEXT_WIDTHS
    small = CLIPTextConfig(hidden_size=first, intermediate_size=4 * first, projection_dim=first, **shared)
    large = CLIPTextConfig(hidden_size=second, intermediate_size=4 * second, projection_dim=second, **shared)
    return CLIPTextModel(small), CLIPTextModelWithProjection(large)


def make_scheduler() -> EulerDiscreteScheduler:
    """SDXL's noise schedule, with the velocity as the UNet's target."""
    return EulerDiscreteScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        timestep_spacing="trailing",
        steps_offset=1,
    )
