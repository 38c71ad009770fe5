"""Wan's conditions: embedded captions, and the first frame for image to video."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mhla_gen.data import Batch
from mhla_gen.training.clip_objectives import frame_times


@dataclass(frozen=True, eq=False)
class WanConditions:
    """Embedded captions, and first frames, as diffusers' Wan takes them.

    Source:
        diffusers 0.42, `WanPipeline` and `WanImageToVideoPipeline`: how they call the transformer.
    """

    empty: Tensor
    """The embedded empty caption, `[text_len, text_dim]`, for those that are dropped."""
    patch_size: tuple[int, int, int]
    """Frames, height and width of a token."""
    times_of_tokens: bool = False
    """Tell the model a time for each token."""
    first_frame: bool = False
    """Give the model the first latent frame: in its place, with a time of 0, if tokens have times;
    else in further channels, with a mask in front."""
    chunk_frames: int | None = None
    """Latent frames of chunks that have times of their own: `timesteps` are then `[batch, chunks]`,
    and tokens have times."""
    image_embeds: bool = False
    """Give the model the first frame as CLIP sees it, too. It stays where the caption is dropped:
    the pipeline has it in both branches of guidance."""

    def predict(
        self,
        model: Callable[..., Any],
        noisy: Tensor,
        timesteps: Tensor,
        batch: Batch,
        dropped: Tensor,
    ) -> Tensor:
        """See `mhla_gen.training.conditioning.Conditioning`.

        A first frame that is given in its place is predicted as zero: nobody asks for it.
        """
        embeds = batch["prompt_embeds"].float()
        embeds = torch.where(dropped[:, None, None], self.empty.to(embeds), embeds)
        inserted = self.first_frame and self.times_of_tokens and noisy.shape[2] > 1
        if inserted:
            noisy = torch.cat((batch["mean"][:, :, :1].to(noisy), noisy[:, :, 1:]), dim=2)
        elif self.first_frame and not self.times_of_tokens:
            noisy = torch.cat((noisy, first_frame_mask(noisy), batch["condition"]), dim=1)
        if self.chunk_frames is not None:
            tokens = noisy.shape[3] // self.patch_size[1] * (noisy.shape[4] // self.patch_size[2])
            timesteps = frame_times(timesteps, noisy.shape[2], self.chunk_frames)
            timesteps = timesteps[:, :: self.patch_size[0]].repeat_interleave(tokens, dim=1)
        elif self.times_of_tokens:
            timesteps = token_times(timesteps, noisy.shape[2:], self.patch_size, inserted)
        # Only tuples can be joined where processes share a sequence.
        given = {"encoder_hidden_states": embeds}
        if self.image_embeds:
            given["encoder_hidden_states_image"] = batch["image_embeds"]
        found = model(noisy, timestep=timesteps, **given, return_dict=False)[0]
        if inserted:
            found = torch.cat((torch.zeros_like(found[:, :, :1]), found[:, :, 1:]), dim=2)
        return found


def token_times(
    timesteps: Tensor,
    sizes: tuple[int, ...],
    patch_size: tuple[int, int, int],
    first_is_known: bool,
) -> Tensor:
    """The time of every token, `[batch, tokens]`; 0 in a first latent frame that is known.

    Args:
        timesteps: `[batch]`.
        sizes: Frames, height and width of the latents.
        patch_size: Those of a token.
        first_is_known: Whether the first frame is given.
    """
    frames, height, width = (n // patch for n, patch in zip(sizes, patch_size, strict=True))
    noisy = timesteps.new_ones(frames, height * width)
    if first_is_known:
        noisy[0] = 0
    return timesteps[:, None] * noisy.flatten()


def first_frame_mask(latents: Tensor) -> Tensor:
    """Which frames are given, as I2V-A14B is told: 1 for the first latent frame, else 0.

    Returns:
        `[batch, 4, frames, height, width]` for latents of these sizes: one channel for each of the
        four frames that a latent frame stands for.
    """
    mask = latents.new_zeros(latents.shape[0], 4, *latents.shape[2:])
    mask[:, :, 0] = 1
    return mask
