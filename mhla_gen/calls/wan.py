"""Text to video with Wan, its relatives, and SANA-Video: how each transformer is called."""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from diffusers.models.transformers.transformer_sana_video import SanaVideoTransformer3DModel
from diffusers.models.transformers.transformer_skyreels_v2 import SkyReelsV2Transformer3DModel
from diffusers.models.transformers.transformer_wan import WanTransformer3DModel
from diffusers.models.transformers.transformer_wan_animate import WanAnimateTransformer3DModel
from diffusers.models.transformers.transformer_wan_vace import WanVACETransformer3DModel
from diffusers.schedulers.scheduling_unipc_multistep import UniPCMultistepScheduler
from torch import Tensor

from mhla_gen.calls.call import Call, Embedded
from mhla_gen.errors import UserError

_WAN_SCHEDULER = (
    UniPCMultistepScheduler,
    {"prediction_type": "flow_prediction", "use_flow_sigmas": True},
)


class WanCall(Call):
    """Wan for text to video."""

    base_class = WanTransformer3DModel
    pipeline = "WanPipeline"
    rank = 3
    text: ClassVar = {
        "encoder_hidden_states": Embedded("prompt_embeds", "text_dim", 512),
        "encoder_hidden_states_image": Embedded("image_embeds", "image_dim", 257),
    }
    returned = ("prompt_embeds",)
    scheduler = _WAN_SCHEDULER


class SkyReelsV2Call(WanCall):
    """SkyReels V2 for text to video."""

    base_class = SkyReelsV2Transformer3DModel
    pipeline = "SkyReelsV2Pipeline"


class WanVACECall(WanCall):
    """Wan VACE without a control video or image: everything is generated."""

    base_class = WanVACETransformer3DModel
    pipeline = "WanVACEPipeline"

    def __init__(self, pipe: Any, guidance: float | None = None, fps: float | None = None):
        super().__init__(pipe, guidance, fps)
        self._control: dict[tuple[int, ...], Tensor] = {}

    def further(self, latents: Tensor) -> dict[str, Any]:
        """Latents of a grey clip, and a mask that marks all of it for generation.

        Raises:
            ValueError: If the pipeline has no autoencoder.
        """
        size = tuple(latents.shape[2:])
        if size not in self._control:
            self._control[size] = self._nothing_given(latents)
        control = self._control[size].to(latents.device)
        return {"control_hidden_states": control.expand(len(latents), *control.shape[1:])}

    @torch.no_grad()
    def _nothing_given(self, latents: Tensor) -> Tensor:
        if self.pipe.vae is None:
            raise UserError(
                "Wan VACE is told what a clip must follow as latents, so that it needs its "
                "autoencoder: data.source=cache"
            )
        frames, height, width = self.sizes(latents)
        device = self.pipe.vae.device
        prepared = self.pipe.preprocess_conditions(
            None, None, None, 1, height, width, frames, torch.float32, device
        )
        video, mask, images = prepared
        known = self.pipe.prepare_video_latents(video, mask, images, None, device)
        asked = self.pipe.prepare_masks(mask, images, None)
        return torch.cat((known, asked), dim=1).float()


class WanAnimateCall(WanCall):
    """Wan Animate: an image of a person, animated by poses and a face from the data."""

    base_class = WanAnimateTransformer3DModel
    pipeline = "WanAnimatePipeline"
    draws = False
    beside = ("reference_latents", "pose_latents", "face_pixels")

    @classmethod
    def channels(cls, config: Any) -> int:
        """Channels of the clip, without the image and its mask."""
        return config.latent_channels

    def arguments(
        self, latents: Tensor, timesteps: Tensor, text: Mapping[str, Tensor]
    ) -> dict[str, Any]:
        """As `Call.arguments`, with the image in further channels."""
        return super().arguments(latents, timesteps, text) | {
            "hidden_states": torch.cat((latents, text["reference_latents"]), dim=1),
            "pose_hidden_states": text["pose_latents"],
            "face_pixel_values": text["face_pixels"],
        }


class SanaVideoCall(Call):
    """SANA-Video."""

    base_class = SanaVideoTransformer3DModel
    pipeline = "SanaVideoPipeline"
    rank = 3
    text: ClassVar = {
        "encoder_hidden_states": Embedded("prompt_embeds", "caption_channels", 300),
        "encoder_attention_mask": Embedded("prompt_attention_mask", None, 300),
    }
    returned = ("prompt_embeds", "prompt_attention_mask")
    scheduler = _WAN_SCHEDULER


CALLS: tuple[type[Call], ...] = (
    SanaVideoCall,
    SkyReelsV2Call,
    WanAnimateCall,
    WanVACECall,
    WanCall,
)
