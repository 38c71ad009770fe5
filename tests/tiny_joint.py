"""Tiny real diffusers models whose attention joins text and image tokens."""

import torch
from diffusers import (
    CogVideoXTransformer3DModel,
    Flux2Transformer2DModel,
    FluxTransformer2DModel,
    HunyuanVideo15Transformer3DModel,
    HunyuanVideoTransformer3DModel,
    MochiTransformer3DModel,
    QwenImageTransformer2DModel,
    SD3Transformer2DModel,
    ZImageTransformer2DModel,
)
from diffusers.models.embeddings import get_3d_rotary_pos_embed
from tiny import maker

TEXT_MASK = [[1, 1, 1, 1, 1, 0, 0]]


tiny_sd3 = maker(
    SD3Transformer2DModel,
    sample_size=8,
    in_channels=4,
    out_channels=4,
    num_layers=3,
    attention_head_dim=8,
    num_attention_heads=2,
    joint_attention_dim=12,
    caption_projection_dim=16,
    pooled_projection_dim=8,
    pos_embed_max_size=16,
    dual_attention_layers=(1,),
    qk_norm="rms_norm",
)


def sd3_inputs(height=8, width=8, batch=2):
    return {
        "hidden_states": torch.randn(batch, 4, height, width),
        "encoder_hidden_states": torch.randn(batch, 7, 12),
        "pooled_projections": torch.randn(batch, 8),
        "timestep": torch.arange(3, 3 + batch),
    }


tiny_flux = maker(
    FluxTransformer2DModel,
    in_channels=4,
    num_layers=1,
    num_single_layers=2,
    attention_head_dim=12,
    num_attention_heads=2,
    joint_attention_dim=16,
    pooled_projection_dim=8,
    axes_dims_rope=(2, 4, 6),
)


def positions(height, width, axes=3):
    ids = torch.zeros(height, width, axes)
    ids[..., 1] += torch.arange(height)[:, None]
    ids[..., 2] += torch.arange(width)
    return ids.flatten(0, 1)


def flux_inputs(height=4, width=6, batch=2):
    return {
        "hidden_states": torch.randn(batch, height * width, 4),
        "encoder_hidden_states": torch.randn(batch, 7, 16),
        "pooled_projections": torch.randn(batch, 8),
        "timestep": torch.linspace(0.3, 0.6, batch),
        "img_ids": positions(height, width),
        "txt_ids": torch.zeros(7, 3),
    }


tiny_flux2 = maker(
    Flux2Transformer2DModel,
    in_channels=4,
    num_layers=1,
    num_single_layers=2,
    attention_head_dim=16,
    num_attention_heads=2,
    joint_attention_dim=16,
    timestep_guidance_channels=16,
    axes_dims_rope=(4, 4, 4, 4),
    guidance_embeds=False,
)


def flux2_inputs(height=4, width=6, batch=2):
    text_ids = torch.zeros(7, 4)
    text_ids[:, 3] = torch.arange(7)
    return {
        "hidden_states": torch.randn(batch, height * width, 4),
        "encoder_hidden_states": torch.randn(batch, 7, 16),
        "timestep": torch.linspace(0.3, 0.6, batch),
        "img_ids": positions(height, width, 4),
        "txt_ids": text_ids,
    }


tiny_qwen_image = maker(
    QwenImageTransformer2DModel,
    in_channels=4,
    out_channels=1,
    num_layers=3,
    attention_head_dim=12,
    num_attention_heads=2,
    joint_attention_dim=16,
    axes_dims_rope=(4, 4, 4),
)


def qwen_image_inputs(height=4, width=6, batch=2):
    return {
        "hidden_states": torch.randn(batch, height * width, 4),
        "encoder_hidden_states": torch.randn(batch, 7, 16),
        "encoder_hidden_states_mask": torch.tensor([*TEXT_MASK, [1] * 7])[:batch],
        "timestep": torch.linspace(0.3, 0.6, batch),
        "img_shapes": [[(1, height, width)]] * batch,
    }


def tiny_z_image(**changes):
    arguments = {
        "in_channels": 4,
        "dim": 24,
        "n_layers": 3,
        "n_refiner_layers": 1,
        "n_heads": 2,
        "n_kv_heads": 2,
        "cap_feat_dim": 16,
        "axes_dims": [4, 4, 4],
        "axes_lens": [128, 32, 32],
    } | changes
    model = ZImageTransformer2DModel(**arguments).eval()
    for name in ("x_pad_token", "cap_pad_token"):
        torch.nn.init.normal_(getattr(model, name))
    return model


def z_image_inputs(height=8, width=12, batch=2):
    return {
        "x": [torch.randn(4, 1, height, width) for _ in range(batch)],
        "t": torch.linspace(0.3, 0.6, batch),
        "cap_feats": [torch.randn(n, 16) for n in (35, 7)[:batch]],
    }


tiny_cogvideox = maker(
    CogVideoXTransformer3DModel,
    num_attention_heads=2,
    attention_head_dim=16,
    in_channels=4,
    out_channels=4,
    time_embed_dim=16,
    text_embed_dim=16,
    num_layers=3,
    sample_width=12,
    sample_height=10,
    sample_frames=9,
    max_text_seq_length=7,
    use_rotary_positional_embeddings=True,
)


def cogvideox_inputs(frames=3, height=10, width=12, batch=1):
    grid = (height // 2, width // 2)
    rotary = get_3d_rotary_pos_embed(16, ((0, 0), grid), grid, frames)
    return {
        "hidden_states": torch.randn(batch, frames, 4, height, width),
        "encoder_hidden_states": torch.randn(batch, 7, 16),
        "timestep": torch.arange(3, 3 + batch),
        "image_rotary_emb": rotary,
    }


tiny_hunyuan_video = maker(
    HunyuanVideoTransformer3DModel,
    in_channels=4,
    out_channels=4,
    num_attention_heads=2,
    attention_head_dim=12,
    num_layers=1,
    num_single_layers=2,
    num_refiner_layers=1,
    guidance_embeds=False,
    text_embed_dim=16,
    pooled_projection_dim=8,
    rope_axes_dim=(4, 4, 4),
)


def hunyuan_video_inputs(frames=3, height=10, width=12, batch=1):
    return {
        "hidden_states": torch.randn(batch, 4, frames, height, width),
        "timestep": torch.arange(3, 3 + batch),
        "encoder_hidden_states": torch.randn(batch, 7, 16),
        "encoder_attention_mask": torch.tensor(TEXT_MASK * batch),
        "pooled_projections": torch.randn(batch, 8),
    }


tiny_hunyuan_video15 = maker(
    HunyuanVideo15Transformer3DModel,
    in_channels=4,
    out_channels=4,
    num_attention_heads=2,
    attention_head_dim=12,
    num_layers=3,
    num_refiner_layers=1,
    text_embed_dim=16,
    text_embed_2_dim=10,
    image_embed_dim=8,
    rope_axes_dim=(4, 4, 4),
)


def hunyuan_video15_inputs(frames=3, height=5, width=6, batch=1):
    return {
        "hidden_states": torch.randn(batch, 4, frames, height, width),
        "timestep": torch.arange(3.0, 3 + batch),
        "encoder_hidden_states": torch.randn(batch, 7, 16),
        "encoder_attention_mask": torch.tensor(TEXT_MASK * batch),
        "encoder_hidden_states_2": torch.randn(batch, 4, 10),
        "encoder_attention_mask_2": torch.tensor([[1, 1, 1, 0]] * batch),
        "image_embeds": torch.randn(batch, 3, 8),
    }


def tiny_mochi(**changes):
    arguments = {
        "num_attention_heads": 2,
        "attention_head_dim": 12,
        "num_layers": 3,
        "pooled_projection_dim": 16,
        "in_channels": 4,
        "text_embed_dim": 16,
        "time_embed_dim": 16,
        "max_sequence_length": 7,
    } | changes
    model = MochiTransformer3DModel(**arguments).eval()
    torch.nn.init.normal_(model.pos_frequencies, std=0.1)
    return model


def mochi_inputs(frames=3, height=10, width=12, batch=1):
    return {
        "hidden_states": torch.randn(batch, 4, frames, height, width),
        "encoder_hidden_states": torch.randn(batch, 7, 16),
        "timestep": torch.arange(3, 3 + batch),
        "encoder_attention_mask": torch.tensor(TEXT_MASK * batch),
    }
