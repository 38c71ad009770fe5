"""LTX-Video and LTX-2: how each transformer is called."""

from collections.abc import Mapping
from typing import Any, ClassVar

from diffusers.models.transformers.transformer_ltx import LTXVideoTransformer3DModel
from diffusers.models.transformers.transformer_ltx2 import LTX2VideoTransformer3DModel
from torch import Tensor

from mhla_gen.calls.call import Call, Embedded


class LTXCall(Call):
    """LTX-Video."""

    base_class = LTXVideoTransformer3DModel
    pipeline = "LTXPipeline"
    rank = 3
    text: ClassVar = {
        "encoder_hidden_states": Embedded("prompt_embeds", "caption_channels", 128),
        "encoder_attention_mask": Embedded("prompt_attention_mask", None, 128),
    }
    returned = ("prompt_embeds", "prompt_attention_mask")

    def pack(self, latents: Tensor) -> Tensor:
        """A sequence of tokens."""
        return self.pipe._pack_latents(latents, self.config.patch_size, self.config.patch_size_t)

    def unpack(self, output: Any, latents: Tensor) -> Tensor:
        """Undo `pack`."""
        patches = (self.config.patch_size, self.config.patch_size_t)
        return self.pipe._unpack_latents(output, *latents.shape[2:], *patches)

    def further(self, latents: Tensor) -> dict[str, Any]:
        """Sizes of the latents, and the size of a latent in seconds and pixels."""
        spatial = self.pipe.vae_spatial_compression_ratio
        seconds = self.pipe.vae_temporal_compression_ratio / self.fps(25)
        frames, height, width = latents.shape[2:]
        return {
            "num_frames": frames,
            "height": height,
            "width": width,
            "rope_interpolation_scale": (seconds, spatial, spatial),
        }


class LTX2Call(LTXCall):
    """LTX-2 without sound: the audio is silence, and the video does not attend to it."""

    base_class = LTX2VideoTransformer3DModel
    pipeline = "LTX2Pipeline"
    # The pipeline accepts embedded captions only through its own connectors.
    draws = False
    text: ClassVar = {
        "encoder_hidden_states": Embedded("prompt_embeds", "caption_channels", 1024),
        "audio_encoder_hidden_states": Embedded("audio_prompt_embeds", "caption_channels", 1024),
        "encoder_attention_mask": Embedded("prompt_attention_mask", None, 1024),
    }
    returned = ("prompt_embeds", "audio_prompt_embeds", "prompt_attention_mask")

    def embed(self, captions: Any, max_length: int | None) -> dict[str, Tensor]:
        """Embed captions with the text encoder and its connectors, as the pipeline does."""
        embeds, mask, *_ = self.encode(captions, max_length)
        side = getattr(self.pipe.tokenizer, "padding_side", "left")
        return self.named(self.pipe.connectors(embeds, mask, padding_side=side))

    def arguments(
        self, latents: Tensor, timesteps: Tensor, text: Mapping[str, Tensor]
    ) -> dict[str, Any]:
        """As `Call.arguments`, with the mask for audio."""
        given = super().arguments(latents, timesteps, text)
        mask = given["encoder_attention_mask"]
        return given | {"sigma": given["timestep"], "audio_encoder_attention_mask": mask}

    def further(self, latents: Tensor) -> dict[str, Any]:
        """Sizes, frame rate, and one frame of silence."""
        found = super().further(latents)
        del found["rope_interpolation_scale"]
        silence = latents.new_zeros(len(latents), 1, self.config.audio_in_channels)
        return found | {
            "fps": self.fps(24),
            "audio_hidden_states": silence,
            "audio_num_frames": 1,
            "isolate_modalities": True,
        }


CALLS: tuple[type[Call], ...] = (LTX2Call, LTXCall)
