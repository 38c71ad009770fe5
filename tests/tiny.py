"""Tiny real diffusers models that the tests share."""

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLWan,
    DDIMScheduler,
    DiTPipeline,
    DiTTransformer2DModel,
    HunyuanDiT2DModel,
    Kandinsky5Transformer3DModel,
    LTXVideoTransformer3DModel,
    PixArtTransformer2DModel,
    SanaVideoTransformer3DModel,
    UniPCMultistepScheduler,
    WanPipeline,
    WanTransformer3DModel,
)
from diffusers.models.embeddings import get_2d_rotary_pos_embed


def tiny_dit(**changes):
    arguments = {
        "num_attention_heads": 2,
        "attention_head_dim": 8,
        "num_layers": 3,
        "sample_size": 8,
        "num_embeds_ada_norm": 10,
        "norm_num_groups": 4,
    } | changes
    return DiTTransformer2DModel(**arguments).eval()


def tiny_wan(**changes):
    arguments = {
        "num_attention_heads": 2,
        "attention_head_dim": 12,
        "text_dim": 16,
        "freq_dim": 16,
        "ffn_dim": 32,
        "num_layers": 3,
        "rope_max_seq_len": 64,
    } | changes
    return WanTransformer3DModel(**arguments).eval()


def tiny_pixart(**changes):
    arguments = {
        "num_attention_heads": 2,
        "attention_head_dim": 8,
        "num_layers": 3,
        "sample_size": 8,
        "cross_attention_dim": 16,
        "caption_channels": 12,
    } | changes
    return PixArtTransformer2DModel(**arguments).eval()


def tiny_sana_video(**changes):
    arguments = {
        "num_attention_heads": 2,
        "attention_head_dim": 12,
        "num_layers": 3,
        "num_cross_attention_heads": 2,
        "cross_attention_head_dim": 12,
        "cross_attention_dim": 24,
        "caption_channels": 16,
        "rope_max_seq_len": 64,
    } | changes
    return SanaVideoTransformer3DModel(**arguments).eval()


def tiny_hunyuan_dit(**changes):
    arguments = {
        "num_attention_heads": 2,
        "attention_head_dim": 8,
        "in_channels": 4,
        "patch_size": 2,
        "sample_size": 8,
        "hidden_size": 16,
        "num_layers": 4,
        "cross_attention_dim": 12,
        "cross_attention_dim_t5": 16,
        "pooled_projection_dim": 8,
        "text_len": 3,
        "text_len_t5": 4,
        "use_style_cond_and_image_meta_size": False,
    } | changes
    return HunyuanDiT2DModel(**arguments).eval()


def tiny_ltx(**changes):
    arguments = {
        "in_channels": 8,
        "out_channels": 8,
        "num_attention_heads": 2,
        "attention_head_dim": 10,
        "cross_attention_dim": 20,
        "num_layers": 3,
        "caption_channels": 16,
    } | changes
    return LTXVideoTransformer3DModel(**arguments).eval()


def tiny_kandinsky5(**changes):
    arguments = {
        "in_text_dim": 16,
        "in_text_dim2": 10,
        "time_dim": 16,
        "model_dim": 24,
        "ff_dim": 32,
        "num_text_blocks": 1,
        "num_visual_blocks": 3,
        "axes_dims": (4, 4, 4),
    } | changes
    model = Kandinsky5Transformer3DModel(**arguments).eval()
    # They start at zero, so that an untrained model ignores its attention.
    for name, parameter in model.named_parameters():
        if "modulation" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    return model


def dit_inputs(side=8, batch=2):
    return {
        "hidden_states": torch.randn(batch, 4, side, side),
        "timestep": torch.arange(3, 3 + batch),
        "class_labels": torch.arange(1, 1 + batch),
    }


def wan_inputs(frames=3, height=10, width=12, batch=1, channels=16):
    return {
        "hidden_states": torch.randn(batch, channels, frames, height, width),
        "timestep": torch.arange(3, 3 + batch),
        "encoder_hidden_states": torch.randn(batch, 7, 16),
    }


def pixart_inputs(height=8, width=8, batch=2):
    return {
        "hidden_states": torch.randn(batch, 4, height, width),
        "timestep": torch.arange(3, 3 + batch),
        "encoder_hidden_states": torch.randn(batch, 7, 12),
        "encoder_attention_mask": torch.tensor([[1, 1, 1, 1, 1, 0, 0]]).repeat(batch, 1),
        "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
    }


def sana_video_inputs(frames=3, height=10, width=12, batch=1):
    return wan_inputs(frames, height, width, batch)


def hunyuan_dit_inputs(height=8, width=8, batch=2):
    grid = (height // 2, width // 2)
    rotary = get_2d_rotary_pos_embed(8, ((0, 0), grid), grid, output_type="pt")
    return {
        "hidden_states": torch.randn(batch, 4, height, width),
        "timestep": torch.arange(3.0, 3 + batch),
        "encoder_hidden_states": torch.randn(batch, 3, 12),
        "text_embedding_mask": torch.tensor([[1, 1, 0]]).repeat(batch, 1),
        "encoder_hidden_states_t5": torch.randn(batch, 4, 16),
        "text_embedding_mask_t5": torch.tensor([[1, 1, 1, 0]]).repeat(batch, 1),
        "image_rotary_emb": rotary,
    }


def ltx_inputs(frames=3, height=5, width=6, batch=1):
    return {
        "hidden_states": torch.randn(batch, frames * height * width, 8),
        "timestep": torch.arange(3, 3 + batch),
        "encoder_hidden_states": torch.randn(batch, 7, 16),
        "encoder_attention_mask": torch.tensor([[1, 1, 1, 1, 1, 0, 0]]).repeat(batch, 1),
        "num_frames": frames,
        "height": height,
        "width": width,
        "rope_interpolation_scale": (0.3, 32, 32),
    }


def kandinsky5_inputs(frames=3, height=10, width=12, batch=1):
    return {
        "hidden_states": torch.randn(batch, frames, height, width, 4),
        "timestep": torch.arange(3, 3 + batch),
        "encoder_hidden_states": torch.randn(batch, 7, 16),
        "pooled_projections": torch.randn(batch, 10),
        "visual_rope_pos": [torch.arange(n) for n in (frames, height // 2, width // 2)],
        "text_rope_pos": torch.arange(7),
    }


def tiny_dit_pipeline():
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(8, 8, 8, 8),
        layers_per_block=1,
        norm_num_groups=4,
    )
    transformer = tiny_dit(num_embeds_ada_norm=1000, out_channels=8)
    return DiTPipeline(transformer=transformer, vae=vae, scheduler=DDIMScheduler())


def tiny_wan_pipeline(two_experts=False):
    vae = AutoencoderKLWan(
        base_dim=8,
        z_dim=16,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[False, True, True],
    )
    return WanPipeline(
        tokenizer=None,
        text_encoder=None,
        vae=vae,
        scheduler=UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
        ),
        transformer=tiny_wan(),
        transformer_2=tiny_wan() if two_experts else None,
        boundary_ratio=0.5 if two_experts else None,
    )


def disturb(model):
    """Move MHLA's parameters off their initial values, as training would."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".mhla." in name:
                parameter.add_(0.1 * torch.rand_like(parameter))
    return model
