"""Text to video, except Wan and LTX: how each transformer is called."""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from diffusers.configuration_utils import FrozenDict
from diffusers.models.transformers.cogvideox_transformer_3d import CogVideoXTransformer3DModel
from diffusers.models.transformers.transformer_cosmos import CosmosTransformer3DModel
from diffusers.models.transformers.transformer_hunyuan_video import HunyuanVideoTransformer3DModel
from diffusers.models.transformers.transformer_hunyuan_video15 import (
    HunyuanVideo15Transformer3DModel,
)
from diffusers.models.transformers.transformer_kandinsky import Kandinsky5Transformer3DModel
from diffusers.models.transformers.transformer_mochi import MochiTransformer3DModel
from diffusers.schedulers.scheduling_ddim_cogvideox import CogVideoXDDIMScheduler
from diffusers.schedulers.scheduling_flow_match_euler_discrete import (
    FlowMatchEulerDiscreteScheduler,
)
from torch import Tensor, nn

from mhla_gen.calls.call import Call, Embedded


class CosmosCall(Call):
    """Cosmos Predict 2; the first Cosmos has another noise process, which is not flow matching."""

    base_class = CosmosTransformer3DModel
    pipeline = "Cosmos2TextToImagePipeline"
    rank = 3
    text: ClassVar = {"encoder_hidden_states": Embedded("prompt_embeds", "text_embed_dim", 512)}
    returned = ("prompt_embeds",)
    # It refuses to without a package that looks at what it draws.
    draws = False

    @classmethod
    def assemble(cls, transformer: Any, **parts: Any) -> Any:
        """As `Call.assemble`; without a `safety_checker` the pipeline cannot sample."""
        # If given none, it creates one, from a package that may not be installed.
        nothing = nn.Identity()
        pipe = super().assemble(transformer, **{"safety_checker": nothing} | parts)
        if pipe.safety_checker is nothing:
            pipe.register_modules(safety_checker=None)
        return pipe

    def times(self, timesteps: Tensor) -> Tensor:
        """In [0, 1]."""
        return timesteps / 1000

    def further(self, latents: Tensor) -> dict[str, Any]:
        """A padding mask without padding, and the frame rate."""
        found: dict[str, Any] = {"padding_mask": latents.new_zeros(1, 1, *self.sizes(latents)[1:])}
        return found if latents.shape[2] == 1 else found | {"fps": self.fps(16)}


class CogVideoXCall(Call):
    """CogVideoX: v-prediction at 1000 noise levels, frames before channels."""

    base_class = CogVideoXTransformer3DModel
    pipeline = "CogVideoXPipeline"
    rank = 3
    text: ClassVar = {"encoder_hidden_states": Embedded("prompt_embeds", "text_embed_dim", 226)}
    returned = ("prompt_embeds",)
    scheduler = (
        CogVideoXDDIMScheduler,
        {
            "clip_sample": False,
            "prediction_type": "v_prediction",
            "rescale_betas_zero_snr": True,
            "timestep_spacing": "trailing",
        },
    )

    def pack(self, latents: Tensor) -> Tensor:
        """Frames before channels."""
        return latents.transpose(1, 2)

    def unpack(self, output: Any, latents: Tensor) -> Tensor:
        """Undo `pack`."""
        return output.transpose(1, 2)

    def further(self, latents: Tensor) -> dict[str, Any]:
        """Rotary tables, if the model has no learned positions."""
        if not self.config.use_rotary_positional_embeddings:
            return {}
        size = (*self.sizes(latents)[1:], latents.shape[2], latents.device)
        return {"image_rotary_emb": self.pipe._prepare_rotary_positional_embeddings(*size)}


class HunyuanVideoCall(Call):
    """HunyuanVideo."""

    base_class = HunyuanVideoTransformer3DModel
    pipeline = "HunyuanVideoPipeline"
    rank = 3
    text: ClassVar = {
        "encoder_hidden_states": Embedded("prompt_embeds", "text_embed_dim", 256),
        "encoder_attention_mask": Embedded("prompt_attention_mask", None, 256),
        "pooled_projections": Embedded("pooled_prompt_embeds", "pooled_projection_dim"),
    }
    returned = ("prompt_embeds", "pooled_prompt_embeds", "prompt_attention_mask")

    def further(self, latents: Tensor) -> dict[str, Any]:
        """Guidance, for guidance-distilled models."""
        if not self.config.guidance_embeds:
            return {}
        return {"guidance": latents.new_full((len(latents),), self.guidance * 1000)}


class _Sizes(nn.Module):
    """The attributes of an autoencoder that `HunyuanVideo15Pipeline` reads when it is built."""

    temporal_compression_ratio, spatial_compression_ratio = 4, 16
    config = FrozenDict(latent_channels=32)


class HunyuanVideo15Call(Call):
    """HunyuanVideo 1.5 for text to video: no image is given."""

    base_class = HunyuanVideo15Transformer3DModel
    pipeline = "HunyuanVideo15Pipeline"
    rank = 3
    text: ClassVar = {
        "encoder_hidden_states": Embedded("prompt_embeds", "text_embed_dim", 1000),
        "encoder_attention_mask": Embedded("prompt_embeds_mask", None, 1000),
        "encoder_hidden_states_2": Embedded("prompt_embeds_2", "text_embed_2_dim", 256),
        "encoder_attention_mask_2": Embedded("prompt_embeds_mask_2", None, 256),
    }
    returned = ("prompt_embeds", "prompt_embeds_mask", "prompt_embeds_2", "prompt_embeds_mask_2")

    @classmethod
    def assemble(cls, transformer: Any, **parts: Any) -> Any:
        """As `Call.assemble`, with classifier-free guidance."""
        from diffusers.guiders import ClassifierFreeGuidance

        parts = {"guider": ClassifierFreeGuidance()} | parts
        if parts.get("vae") is not None:
            return super().assemble(transformer, **parts)
        # The pipeline reads sizes from its autoencoder; these are those of all released models.
        pipe = super().assemble(transformer, **parts | {"vae": _Sizes()})
        pipe.register_modules(vae=None)
        return pipe

    @classmethod
    def channels(cls, config: Any) -> int:
        """Those of the clip, without the picture's and the mask's."""
        return config.out_channels

    def times(self, timesteps: Tensor) -> Tensor:
        """Floating-point timesteps."""
        return timesteps.float()

    def pack(self, latents: Tensor) -> Tensor:
        """Noise, an empty image, and a mask that marks it as missing, in channels."""
        given = self.pipe.prepare_cond_latents_and_mask(latents, latents.dtype, latents.device)
        return torch.cat((latents, *given), dim=1)

    def further(self, latents: Tensor) -> dict[str, Any]:
        """An empty image embedding."""
        size = (self.pipe.vision_num_semantic_tokens, self.pipe.vision_states_dim)
        return {"image_embeds": latents.new_zeros(len(latents), *size)}


class MochiCall(Call):
    """Mochi, whose timesteps increase from noise to clip."""

    base_class = MochiTransformer3DModel
    pipeline = "MochiPipeline"
    rank = 3
    text: ClassVar = {
        "encoder_hidden_states": Embedded("prompt_embeds", "text_embed_dim", 256),
        "encoder_attention_mask": Embedded("prompt_attention_mask", None, 256),
    }
    returned = ("prompt_embeds", "prompt_attention_mask")
    scheduler = (FlowMatchEulerDiscreteScheduler, {"invert_sigmas": True})
    sign = -1

    def times(self, timesteps: Tensor) -> Tensor:
        """1000 for a clip without noise."""
        return 1000 - timesteps


class Kandinsky5Call(Call):
    """Kandinsky 5, channels last."""

    base_class = Kandinsky5Transformer3DModel
    pipeline = "Kandinsky5T2VPipeline"
    rank = 3
    text: ClassVar = {
        "encoder_hidden_states": Embedded("prompt_embeds_qwen", "in_text_dim", 512),
        "pooled_projections": Embedded("prompt_embeds_clip", "in_text_dim2"),
    }
    returned = ("prompt_embeds_qwen", "prompt_embeds_clip")
    # It pads to the longest caption of a batch, without a mask.
    batches = False

    @classmethod
    def channels(cls, config: Any) -> int:
        """Those of the clip, without the picture's and the mask's."""
        return config.in_visual_dim

    def pack(self, latents: Tensor) -> Tensor:
        """Channels last, with an empty image for models that expect one."""
        latents = latents.movedim(1, -1)
        if not self.pipe.transformer.visual_cond:
            return latents
        nothing = torch.zeros_like(latents)
        return torch.cat((latents, nothing, nothing[..., :1]), dim=-1)

    def unpack(self, output: Any, latents: Tensor) -> Tensor:
        """Undo `pack`."""
        return output.movedim(-1, 1)

    def texts(
        self, captions: Mapping[str, Tensor], negative: Mapping[str, Tensor] | None = None
    ) -> dict[str, Any]:
        """With the end positions of the captions, which all have the same length."""
        found = super().texts(captions, negative)
        for kind in ("", "negative_"):
            embeds = found.get(f"{kind}prompt_embeds_qwen")
            if embeds is not None:
                ends = torch.arange(len(embeds) + 1, dtype=torch.int32) * embeds.shape[1]
                found[f"{kind}prompt_cu_seqlens"] = ends.to(embeds.device)
        return found

    def arguments(
        self, latents: Tensor, timesteps: Tensor, text: Mapping[str, Tensor]
    ) -> dict[str, Any]:
        """As `Call.arguments`, with the positions of text tokens."""
        tokens = text["prompt_embeds_qwen"].shape[1]
        places = {"text_rope_pos": torch.arange(tokens, device=latents.device)}
        return super().arguments(latents, timesteps, text) | places

    def further(self, latents: Tensor) -> dict[str, Any]:
        """Positions of tokens and the scale of their distances."""
        patches = zip(latents.shape[2:], self.config.patch_size, strict=True)
        places = [torch.arange(n // patch, device=latents.device) for n, patch in patches]
        # Only layers that stay softmax read a pattern of tiles.
        sparse = self.pipe.get_sparse_params(self.pack(latents), latents.device)
        return {
            "visual_rope_pos": places,
            "scale_factor": self.pipe._get_scale_factor(*self.sizes(latents)[1:]),
            "sparse_params": sparse,
        }


CALLS: tuple[type[Call], ...] = (
    CogVideoXCall,
    CosmosCall,
    HunyuanVideo15Call,
    HunyuanVideoCall,
    Kandinsky5Call,
    MochiCall,
)
