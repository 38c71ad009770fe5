"""Text to image: how each transformer is called."""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from diffusers.models.embeddings import get_2d_rotary_pos_embed
from diffusers.models.transformers.hunyuan_transformer_2d import HunyuanDiT2DModel
from diffusers.models.transformers.pixart_transformer_2d import PixArtTransformer2DModel
from diffusers.models.transformers.sana_transformer import SanaTransformer2DModel
from diffusers.models.transformers.transformer_flux import FluxTransformer2DModel
from diffusers.models.transformers.transformer_flux2 import Flux2Transformer2DModel
from diffusers.models.transformers.transformer_qwenimage import QwenImageTransformer2DModel
from diffusers.models.transformers.transformer_sd3 import SD3Transformer2DModel
from diffusers.models.transformers.transformer_z_image import ZImageTransformer2DModel
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from diffusers.schedulers.scheduling_dpmsolver_multistep import DPMSolverMultistepScheduler
from torch import Tensor

from mhla_gen.calls.call import Call, Embedded


class SD3Call(Call):
    """Stable Diffusion 3 and 3.5."""

    base_class = SD3Transformer2DModel
    pipeline = "StableDiffusion3Pipeline"
    text: ClassVar = {
        "encoder_hidden_states": Embedded("prompt_embeds", "joint_attention_dim", 333),
        "pooled_projections": Embedded("pooled_prompt_embeds", "pooled_projection_dim"),
    }
    returned = ("prompt_embeds", None, "pooled_prompt_embeds")


class FluxCall(Call):
    """FLUX.1."""

    base_class = FluxTransformer2DModel
    pipeline = "FluxPipeline"
    text: ClassVar = {
        "encoder_hidden_states": Embedded("prompt_embeds", "joint_attention_dim", 512),
        "pooled_projections": Embedded("pooled_prompt_embeds", "pooled_projection_dim"),
    }
    returned = ("prompt_embeds", "pooled_prompt_embeds")
    packing = 2

    def arguments(
        self, latents: Tensor, timesteps: Tensor, text: Mapping[str, Tensor]
    ) -> dict[str, Any]:
        """As `Call.arguments`, with places of tokens."""
        embeds, (height, width) = text["prompt_embeds"], latents.shape[-2:]
        places = self.pipe._prepare_latent_image_ids(
            len(latents), height // 2, width // 2, latents.device, latents.dtype
        )
        grid = (height // 2, width // 2)
        return super().arguments(latents, timesteps, text) | {
            "img_ids": places,
            "txt_ids": embeds.new_zeros(embeds.shape[1], 3),
            **_converted(self, {"joint_attention_kwargs": {"grid": grid}}),
        }

    def pack(self, latents: Tensor) -> Tensor:
        """A sequence of tokens, each a square of four latents."""
        return self.pipe._pack_latents(latents, *latents.shape)

    def unpack(self, output: Any, latents: Tensor) -> Tensor:
        """Undo `pack`."""
        scale = self.pipe.vae_scale_factor
        sides = (n * scale for n in latents.shape[-2:])
        return self.pipe._unpack_latents(output, *sides, scale).view_as(latents)

    def times(self, timesteps: Tensor) -> Tensor:
        """In [0, 1]."""
        return timesteps / 1000

    def further(self, latents: Tensor) -> dict[str, Any]:
        """Guidance, for guidance-distilled models."""
        if not self.config.guidance_embeds:
            return {}
        return {"guidance": latents.new_full((len(latents),), self.guidance)}


class Flux2Call(FluxCall):
    """FLUX.2, whose latents are already packed in squares of four."""

    base_class = Flux2Transformer2DModel
    pipeline = "Flux2Pipeline"
    text: ClassVar = {
        "encoder_hidden_states": Embedded("prompt_embeds", "joint_attention_dim", 512)
    }
    returned = ("prompt_embeds",)
    packing = 1

    def arguments(
        self, latents: Tensor, timesteps: Tensor, text: Mapping[str, Tensor]
    ) -> dict[str, Any]:
        """As `Call.arguments`, with places of tokens."""
        device = latents.device
        return Call.arguments(self, latents, timesteps, text) | {
            "img_ids": self.pipe._prepare_latent_ids(latents).to(device),
            "txt_ids": self.pipe._prepare_text_ids(text["prompt_embeds"]).to(device),
            **_converted(self, {"joint_attention_kwargs": {"grid": tuple(latents.shape[-2:])}}),
        }

    def pack(self, latents: Tensor) -> Tensor:
        """One token after the other."""
        return self.pipe._pack_latents(latents)

    def sizes(self, latents: Tensor) -> tuple[int, ...]:
        """Size in pixels of latents that are squares of four."""
        return tuple(2 * n for n in super().sizes(latents))

    def unpack(self, output: Any, latents: Tensor) -> Tensor:
        """Undo `pack`."""
        return output.transpose(1, 2).unflatten(2, latents.shape[-2:])


class QwenImageCall(FluxCall):
    """Qwen-Image."""

    base_class = QwenImageTransformer2DModel
    pipeline = "QwenImagePipeline"
    text: ClassVar = {
        "encoder_hidden_states": Embedded("prompt_embeds", "joint_attention_dim", 512),
        "encoder_hidden_states_mask": Embedded("prompt_embeds_mask", None, 512),
    }
    returned = ("prompt_embeds", "prompt_embeds_mask")
    pads = False

    def arguments(
        self, latents: Tensor, timesteps: Tensor, text: Mapping[str, Tensor]
    ) -> dict[str, Any]:
        """As `Call.arguments`, with the sizes of images."""
        height, width = (n // 2 for n in latents.shape[-2:])
        shapes = {"img_shapes": [[(1, height, width)]] * len(latents)}
        return Call.arguments(self, latents, timesteps, text) | shapes


class ZImageCall(Call):
    """Z-Image: one list of images, one of captions."""

    base_class = ZImageTransformer2DModel
    pipeline = "ZImagePipeline"
    text: ClassVar = {
        "cap_feats": Embedded("prompt_embeds", "cap_feat_dim", 512),
        "cap_mask": Embedded("prompt_embeds_mask", None, 512),
    }
    returned = ("prompt_embeds",)
    pads = False
    sign = -1

    @classmethod
    def patch(cls, config: Any) -> tuple[int, ...]:
        """Latents along each side of a token."""
        return (config.all_patch_size[0],) * 2

    def arguments(
        self, latents: Tensor, timesteps: Tensor, text: Mapping[str, Tensor]
    ) -> dict[str, Any]:
        """Images of one frame, and captions without padding."""
        return {
            "x": list(latents.unsqueeze(2).unbind()),
            "t": (1000 - timesteps) / 1000,
            "cap_feats": _valid(text),
        }

    def texts(
        self, captions: Mapping[str, Tensor], negative: Mapping[str, Tensor] | None = None
    ) -> dict[str, Any]:
        """Lists of captions without padding."""
        given = {"prompt_embeds": captions, "negative_prompt_embeds": negative}
        return {name: _valid(texts) for name, texts in given.items() if texts is not None}

    def unpack(self, output: Any, latents: Tensor) -> Tensor:
        """From a list of images of one frame."""
        return torch.stack(output).squeeze(2)


class SanaCall(Call):
    """SANA."""

    base_class = SanaTransformer2DModel
    pipeline = "SanaPipeline"
    text: ClassVar = {
        "encoder_hidden_states": Embedded("prompt_embeds", "caption_channels", 300),
        "encoder_attention_mask": Embedded("prompt_attention_mask", None, 300),
    }
    returned = ("prompt_embeds", "prompt_attention_mask")

    def times(self, timesteps: Tensor) -> Tensor:
        """Scaled as the model's config says."""
        return timesteps * self.config.timestep_scale


class PixArtCall(Call):
    """PixArt-α and -Σ: noise at 1000 levels."""

    base_class = PixArtTransformer2DModel
    pipeline = "PixArtAlphaPipeline"
    text: ClassVar = {
        "encoder_hidden_states": Embedded("prompt_embeds", "caption_channels", 120),
        "encoder_attention_mask": Embedded("prompt_attention_mask", None, 120),
    }
    returned = ("prompt_embeds", "prompt_attention_mask")
    scheduler = (DPMSolverMultistepScheduler, {"beta_start": 1e-4, "beta_end": 0.02})

    def further(self, latents: Tensor) -> dict[str, Any]:
        """The size of the image, for models of 1024 pixels."""
        found: dict[str, Any] = {"resolution": None, "aspect_ratio": None}
        if self.config.sample_size == 128:
            size, batch = self.sizes(latents), len(latents)
            found["resolution"] = latents.new_tensor(size).repeat(batch, 1)
            found["aspect_ratio"] = latents.new_tensor([size[0] / size[1]]).repeat(batch, 1)
        return {"added_cond_kwargs": found}


class HunyuanDiTCall(Call):
    """HunyuanDiT: v-prediction at 1000 noise levels, two text encoders."""

    base_class = HunyuanDiT2DModel
    pipeline = "HunyuanDiTPipeline"
    text: ClassVar = {
        "encoder_hidden_states": Embedded("prompt_embeds", "cross_attention_dim", 77),
        "text_embedding_mask": Embedded("prompt_attention_mask", None, 77),
        "encoder_hidden_states_t5": Embedded("prompt_embeds_2", "cross_attention_dim_t5", 256),
        "text_embedding_mask_t5": Embedded("prompt_attention_mask_2", None, 256),
    }
    returned = ("prompt_embeds", None, "prompt_attention_mask")
    scheduler = (
        DDPMScheduler,
        {
            "beta_start": 0.00085,
            "beta_end": 0.03,
            "beta_schedule": "scaled_linear",
            "prediction_type": "v_prediction",
            "steps_offset": 1,
        },
    )

    def embed(self, captions: Any, max_length: int | None) -> dict[str, Tensor]:
        """Embed captions with both encoders; the first takes up to 77 tokens."""
        first = self.named(self.encode(captions, 77, text_encoder_index=0))
        second = self.named(self.encode(captions, max_length or 256, text_encoder_index=1))
        return first | {f"{name}_2": value for name, value in second.items()}

    def times(self, timesteps: Tensor) -> Tensor:
        """Floating-point timesteps."""
        return timesteps.float()

    def further(self, latents: Tensor) -> dict[str, Any]:
        """Sizes and style of the image, and positions of tokens."""
        from diffusers.pipelines.hunyuandit.pipeline_hunyuandit import (
            get_resize_crop_region_for_grid,
        )

        patch, transformer = self.config.patch_size, self.pipe.transformer
        grid = tuple(n // patch for n in latents.shape[-2:])
        crops = get_resize_crop_region_for_grid(grid, 64 // patch)
        head_dim = transformer.inner_dim // transformer.num_heads
        rotary: Any = get_2d_rotary_pos_embed(
            head_dim, crops, grid, device=latents.device, output_type="pt"
        )
        sizes = latents.new_tensor((1024, 1024, *self.sizes(latents), 0, 0))
        return {
            "image_meta_size": sizes.repeat(len(latents), 1),
            "style": torch.zeros(len(latents), dtype=torch.int64, device=latents.device),
            "image_rotary_emb": rotary,
        }


def _valid(text: Mapping[str, Tensor]) -> list[Tensor]:
    rows = zip(text["prompt_embeds"], text["prompt_embeds_mask"].bool(), strict=True)
    return [row[valid] for row, valid in rows]


def _converted(call: Call, arguments: dict[str, Any]) -> dict[str, Any]:
    """Arguments for converted models only: the grid, which saves reading it from the device."""
    return arguments if hasattr(call.pipe.transformer, "mhla_config") else {}


CALLS: tuple[type[Call], ...] = (
    Flux2Call,
    FluxCall,
    HunyuanDiTCall,
    PixArtCall,
    QwenImageCall,
    SanaCall,
    SD3Call,
    ZImageCall,
)
