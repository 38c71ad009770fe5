"""Which bucket a video goes to, which of its frames are taken, and how they are cropped."""

import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from mhla_gen.media.frames import Crop

# Seconds by which two frame times may differ and still count as equally near: containers store
# times in ticks, and decord hands them on as float32.
_TIE = 1e-3


class Bucket(NamedTuple):
    """Size of a clip: frames, and pixels along each side."""

    frames: int
    height: int
    width: int

    def __str__(self) -> str:
        return f"{self.frames} × {self.height} × {self.width}"


def consecutive(counts: Sequence[int]) -> tuple[range, ...]:
    """Sample numbers of buckets of these sizes, one bucket after the other."""
    ends = list(itertools.accumulate(counts))
    return tuple(range(*pair) for pair in zip([0, *ends[:-1]], ends, strict=True))


def resampled_frames(times: np.ndarray, fps: float | None) -> np.ndarray:
    """Numbers of the frames that sample a video at another frame rate.

    Args:
        times: When each frame is shown first, in seconds, ascending from 0 `[frames]`.
        fps: Frames per second wanted; None takes every frame once.

    Returns:
        For each time k / fps up to the last frame's, the frame whose time is nearest; the earlier
        one of two that are equally near. int64.
    """
    if fps is None:
        return np.arange(len(times))
    wanted = np.arange(math.floor((times[-1] + _TIE) * fps) + 1) / fps
    after = np.clip(np.searchsorted(times, wanted), 1, max(len(times) - 1, 1))
    if len(times) == 1:
        return np.zeros(len(wanted), np.int64)
    later = times[after] - wanted < wanted - times[after - 1] - _TIE
    return after - 1 + later


def window_starts(available: int, needed: int, max_windows: int) -> list[int]:
    """Where clips of `needed` frames start in a video of `available`: spaced evenly, no overlap."""
    number = min(max_windows, available // needed)
    spare = available - number * needed
    return [round(spare * (k + 1) / (number + 1)) + k * needed for k in range(number)]


def choose_bucket(
    buckets: Sequence[Bucket], frames: int, height: int, width: int, upscale: bool
) -> tuple[int | None, str]:
    """The bucket with the closest aspect ratio for which a video is long and large enough.

    Args:
        buckets: What there is to choose from.
        frames: Frames of the video at the clips' frame rate.
        height: Of a frame, in pixels.
        width: Of a frame, in pixels.
        upscale: Whether a video may be enlarged.

    Returns:
        The bucket's number, and "". Of equally near ones the longest, then the largest is taken. Or
        None, and why no bucket fits.
    """
    long_enough = [i for i, bucket in enumerate(buckets) if bucket.frames <= frames]
    if not long_enough:
        shortest = min(bucket.frames for bucket in buckets)
        return None, f"has {frames} frames at the clips' rate, the shortest bucket {shortest}"
    fitting = [
        i
        for i in long_enough
        if upscale or (buckets[i].height <= height and buckets[i].width <= width)
    ]
    if not fitting:
        return None, (
            f"is {height} × {width} pixels, smaller than every bucket that it is long enough for; "
            "clips.upscale=true enlarges"
        )

    def rank(i: int) -> tuple[float, int, int]:
        bucket = buckets[i]
        distance = abs(math.log(bucket.width * height / (bucket.height * width)))
        return round(distance, 9), -bucket.frames, -bucket.height * bucket.width

    return min(fitting, key=rank), ""


def crop_for(bucket: Bucket, height: int, width: int) -> Crop:
    """Scale a frame to cover a bucket, then center-crop it."""
    scale = max(bucket.height / height, bucket.width / width)
    scaled = max(bucket.height, round(height * scale)), max(bucket.width, round(width * scale))
    return Crop(*scaled, bucket.height, bucket.width)
