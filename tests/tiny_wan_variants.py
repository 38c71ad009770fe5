"""Tiny real diffusers models that are built as Wan is, Cosmos, SANA and LTX-2."""

import torch
from diffusers import (
    CosmosTransformer3DModel,
    LTX2VideoTransformer3DModel,
    SanaTransformer2DModel,
    SkyReelsV2Transformer3DModel,
    WanAnimateTransformer3DModel,
    WanVACETransformer3DModel,
)
from tiny import WAN, maker, wan_inputs

tiny_wan_vace = maker(
    WanVACETransformer3DModel, **WAN | {"num_layers": 2}, vace_layers=[0], vace_in_channels=8
)


def wan_vace_inputs(frames=3, height=10, width=12, batch=1):
    control = {"control_hidden_states": torch.randn(batch, 8, frames, height, width)}
    return wan_inputs(frames, height, width, batch) | control


tiny_skyreels_v2 = maker(SkyReelsV2Transformer3DModel, **WAN)
skyreels_v2_inputs = wan_inputs

tiny_wan_animate = maker(
    WanAnimateTransformer3DModel,
    **WAN | {"num_layers": 4},
    in_channels=12,
    latent_channels=4,
    out_channels=4,
    image_dim=20,
    motion_encoder_channel_sizes={"4": 8, "8": 8, "16": 8},
    motion_encoder_size=16,
    motion_style_dim=8,
    motion_dim=4,
    motion_encoder_dim=8,
    face_encoder_hidden_dim=8,
    face_encoder_num_heads=2,
    inject_face_latents_blocks=2,
)


def wan_animate_inputs(frames=3, height=10, width=12, batch=1):
    inputs = wan_inputs(frames, height, width, batch, channels=12)
    return inputs | {
        "encoder_hidden_states_image": torch.randn(batch, 5, 20),
        "pose_hidden_states": torch.randn(batch, 4, frames - 1, height, width),
        "face_pixel_values": torch.rand(batch, 3, 4 * (frames - 2) + 1, 16, 16),
    }


tiny_cosmos = maker(
    CosmosTransformer3DModel,
    in_channels=4,
    out_channels=4,
    num_attention_heads=2,
    attention_head_dim=18,
    num_layers=3,
    text_embed_dim=16,
    adaln_lora_dim=4,
    max_size=(8, 32, 32),
    concat_padding_mask=False,
)


def cosmos_inputs(frames=3, height=10, width=12, batch=1):
    return {
        "hidden_states": torch.randn(batch, 4, frames, height, width),
        "timestep": torch.linspace(0.3, 0.6, batch),
        "encoder_hidden_states": torch.randn(batch, 7, 16),
        "fps": 16,
    }


tiny_sana = maker(
    SanaTransformer2DModel,
    in_channels=4,
    out_channels=4,
    num_attention_heads=2,
    attention_head_dim=16,
    num_layers=3,
    num_cross_attention_heads=2,
    cross_attention_head_dim=16,
    cross_attention_dim=32,
    caption_channels=12,
    sample_size=8,
    qk_norm="rms_norm_across_heads",
)


def sana_inputs(height=4, width=6, batch=2):
    return {
        "hidden_states": torch.randn(batch, 4, height, width),
        "timestep": torch.arange(3, 3 + batch),
        "encoder_hidden_states": torch.randn(batch, 7, 12),
        "encoder_attention_mask": torch.tensor([[1, 1, 1, 1, 1, 0, 0]]).repeat(batch, 1),
    }


tiny_ltx2 = maker(
    LTX2VideoTransformer3DModel,
    in_channels=4,
    out_channels=4,
    num_attention_heads=2,
    attention_head_dim=12,
    cross_attention_dim=24,
    audio_in_channels=4,
    audio_out_channels=4,
    audio_num_attention_heads=2,
    audio_attention_head_dim=6,
    audio_cross_attention_dim=12,
    num_layers=3,
    caption_channels=16,
)


def ltx2_inputs(frames=3, height=5, width=6, batch=1):
    return {
        "hidden_states": torch.randn(batch, frames * height * width, 4),
        "audio_hidden_states": torch.randn(batch, 8, 4),
        "encoder_hidden_states": torch.randn(batch, 7, 16),
        "audio_encoder_hidden_states": torch.randn(batch, 7, 16),
        "timestep": torch.arange(3.0, 3 + batch),
        "num_frames": frames,
        "height": height,
        "width": width,
        "audio_num_frames": 8,
    }
