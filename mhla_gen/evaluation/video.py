"""Clips from video files, by a stated frame rule."""

import os
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np

from mhla_gen.media import Decoder
from mhla_gen.media.pictures import UnreadableImageError


@dataclass(frozen=True)
class ClipRule:
    """The frames of a video to measure: `frames` of them, from the first on, every `stride`th.

    Frames count as they are stored: no resampling in time, whatever the frame rate.
    """

    frames: int = 16
    stride: int = 1
    timeout: float = 60.0
    """Seconds that decoding one video may take."""

    def __str__(self) -> str:
        return f"frames-0:{self.needed}:{self.stride}"

    @property
    def needed(self) -> int:
        """Frames that a video must have."""
        return (self.frames - 1) * self.stride + 1

    def indices(self, available: int) -> list[int]:
        """Frame numbers to read.

        Raises:
            UnreadableImageError: If the video is too short.
        """
        if available < self.needed:
            raise UnreadableImageError(
                f"has {available} frames, the rule {self} needs {self.needed}: "
                "use longer videos or fewer frames"
            )
        return list(range(0, self.needed, self.stride))

    def choose(self, video: np.ndarray) -> np.ndarray:
        """The chosen frames of [frames, height, width, 3]."""
        return video[self.indices(len(video))]


def read_clip(path: Path, rule: ClipRule) -> np.ndarray:
    """Decode the chosen frames of a video file.

    Returns:
        uint8 [frames, height, width, 3].

    Raises:
        UnreadableImageError: If it cannot be decoded in time, or is too short.
        ReadFailedError: If its file cannot be read.
    """
    decoder = _decoder(rule.timeout, os.getpid())
    indices = rule.indices(len(decoder.facts(path).times))
    return decoder.frames(path, indices, crop=None)


@cache
def _decoder(timeout: float, _process: int) -> Decoder:
    # A forked process must not share the decoder of its parent.
    return Decoder(timeout, setting="features.video_timeout")
