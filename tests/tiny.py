"""Tiny real diffusers models that the tests share."""

import imageio.v2 as imageio
import numpy as np
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
    WanImageToVideoPipeline,
    WanPipeline,
    WanTransformer3DModel,
)
from diffusers.models.embeddings import get_2d_rotary_pos_embed
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from torch._dynamo.testing import CompileCounterWithBackend
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    CLIPVisionModel,
    PreTrainedTokenizerFast,
    UMT5Config,
    UMT5EncoderModel,
)

from mhla_gen.config import CacheConfig, load_config
from mhla_gen.data.caching.build import build_cache


def maker(model_class, **sizes):
    """A function that makes a tiny model, with changes to its sizes."""
    return lambda **changes: model_class(**sizes | changes).eval()


tiny_dit = maker(
    DiTTransformer2DModel,
    num_attention_heads=2,
    attention_head_dim=8,
    num_layers=3,
    sample_size=8,
    num_embeds_ada_norm=10,
    norm_num_groups=4,
)

WAN = {
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "text_dim": 16,
    "freq_dim": 16,
    "ffn_dim": 32,
    "num_layers": 3,
    "rope_max_seq_len": 64,
}
tiny_wan = maker(WanTransformer3DModel, **WAN)

tiny_pixart = maker(
    PixArtTransformer2DModel,
    num_attention_heads=2,
    attention_head_dim=8,
    num_layers=3,
    sample_size=8,
    cross_attention_dim=16,
    caption_channels=12,
)

tiny_sana_video = maker(
    SanaVideoTransformer3DModel,
    num_attention_heads=2,
    attention_head_dim=12,
    num_layers=3,
    num_cross_attention_heads=2,
    cross_attention_head_dim=12,
    cross_attention_dim=24,
    caption_channels=16,
    rope_max_seq_len=64,
)

tiny_hunyuan_dit = maker(
    HunyuanDiT2DModel,
    num_attention_heads=2,
    attention_head_dim=8,
    in_channels=4,
    patch_size=2,
    sample_size=8,
    hidden_size=16,
    num_layers=4,
    cross_attention_dim=12,
    cross_attention_dim_t5=16,
    pooled_projection_dim=8,
    text_len=3,
    text_len_t5=4,
    use_style_cond_and_image_meta_size=False,
)

tiny_ltx = maker(
    LTXVideoTransformer3DModel,
    in_channels=8,
    out_channels=8,
    num_attention_heads=2,
    attention_head_dim=10,
    cross_attention_dim=20,
    num_layers=3,
    caption_channels=16,
)


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


sana_video_inputs = wan_inputs


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
    transformer = tiny_dit(num_embeds_ada_norm=1000, out_channels=8)
    return DiTPipeline(transformer=transformer, vae=tiny_autoencoder(), scheduler=DDIMScheduler())


def tiny_autoencoder():
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(8, 8, 8, 8),
        layers_per_block=1,
        norm_num_groups=4,
    )


def tiny_wan_autoencoder():
    return AutoencoderKLWan(
        base_dim=8,
        z_dim=16,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[False, True, True],
    )


def tiny_wan22_autoencoder():
    """As Wan 2.2's for TI2V-5B: 16 pixels a latent along each side."""
    return AutoencoderKLWan(
        base_dim=8,
        decoder_base_dim=8,
        z_dim=8,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[False, True, True],
        is_residual=True,
        in_channels=12,
        out_channels=12,
        patch_size=2,
        scale_factor_spatial=16,
        latents_mean=[0.1] * 8,
        latents_std=[0.9] * 8,
    )


def tiny_tokenizer():
    """A tokenizer of words."""
    words = ["<pad>", "</s>", "<unk>", "a", "red", "square", "moves"]
    words += ["left", "right", "up", "down"]
    words = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    words.pre_tokenizer = Whitespace()
    words.post_processor = TemplateProcessing("$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )


def tiny_umt5():
    """A tokenizer of words and a text encoder that fits `tiny_wan`."""
    tokenizer = tiny_tokenizer()
    sizes = {"vocab_size": 11, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1}
    return tokenizer, UMT5EncoderModel(UMT5Config(**sizes, num_heads=2)).eval()


def tiny_wan_pipeline(two_experts=False, text=False):
    tokenizer, text_encoder = tiny_umt5() if text else (None, None)
    return WanPipeline(
        tokenizer=tokenizer,
        text_encoder=text_encoder,
        vae=tiny_wan_autoencoder(),
        scheduler=UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
        ),
        transformer=tiny_wan(),
        transformer_2=tiny_wan() if two_experts else None,
        boundary_ratio=0.5 if two_experts else None,
    )


def tiny_image_encoder():
    """An image processor and an encoder with 5 tokens of 20 channels."""
    sizes = {"hidden_size": 20, "intermediate_size": 40, "num_hidden_layers": 3}
    sizes |= {"num_attention_heads": 2, "image_size": 16, "patch_size": 8}
    processor = CLIPImageProcessor(
        size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}
    )
    return processor, CLIPVisionModel(CLIPVisionConfig(**sizes)).eval()


def tiny_wan_image_pipeline(transformer=None):
    """As Wan 2.1's for image to video: it reads noise, a mask, latents and a CLIP embedding."""
    tokenizer, text_encoder = tiny_umt5()
    image_processor, image_encoder = tiny_image_encoder()
    if transformer is None:
        transformer = tiny_wan(in_channels=36, image_dim=20, added_kv_proj_dim=24)
    return WanImageToVideoPipeline(
        tokenizer=tokenizer,
        text_encoder=text_encoder,
        vae=tiny_wan_autoencoder(),
        scheduler=UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
        ),
        image_processor=image_processor,
        image_encoder=image_encoder,
        transformer=transformer,
    )


def tiny_video(path, frames=12, height=32, width=48, fps=16, moves="right"):
    """A real mp4 of a red square that moves over a green ground."""
    pictures = np.zeros((frames, height, width, 3), np.uint8)
    pictures[..., 1] = 120
    for k, picture in enumerate(pictures):
        step = 2 * k if moves == "right" else width - 12 - 2 * k
        picture[8:20, step : step + 12] = (220, 30, 30)
    imageio.mimwrite(path, pictures, fps=fps, macro_block_size=1, quality=9)
    return pictures


def tiny_clip_cache(folder, *overrides, clips=3, pipeline=None):
    """A cache of real, tiny clips of two shapes and of still images, as `mhla-gen cache` writes it.

    Returns the folder of the cache; `folder / "pipeline"` has the Wan pipeline that made it.
    """
    pipeline = pipeline or tiny_wan_pipeline(text=True)
    videos = folder / "videos"
    videos.mkdir(parents=True)
    for k in range(clips):
        for name, size in (("wide", (32, 48)), ("tall", (48, 32))):
            moves = "right" if k % 2 else "left"
            tiny_video(videos / f"{name}{k}.mp4", 12, *size, moves=moves)
            (videos / f"{name}{k}.txt").write_text(f"a red square moves {moves}")
    tiny_video(videos / "short.mp4", frames=3)
    (videos / "short.txt").write_text("a square")
    pipeline.save_pretrained(folder / "pipeline")
    config = load_config(
        None,
        [
            f"output_dir={folder / 'cache'}",
            "data.source=clips",
            f"data.path={videos}",
            f"vae.path={folder / 'pipeline'}",
            f"text.path={folder / 'pipeline'}",
            "text.max_sequence_length=9",
            "clips.buckets=[[9, 32, 48], [9, 48, 32], [1, 32, 48]]",
            "num_workers=2",
            "device=cpu",
            *overrides,
        ],
        CacheConfig,
    )
    build_cache(config)
    return folder / "cache"


def disturb(model):
    """Move MHLA's parameters off their initial values, as training would."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".mhla." in name:
                parameter.add_(0.1 * torch.rand_like(parameter))
    return model


class CountsForms(CompileCounterWithBackend):
    """In place of what generates code, whose options it leaves alone: counts what is compiled."""

    def __init__(self):
        super().__init__("eager")

    def __call__(self, graph, inputs, options=None):
        return super().__call__(graph, inputs)
