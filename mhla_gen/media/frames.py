"""Exact frames of a video file, by decord. Nothing heavier is imported: workers start quickly."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image


class ClipFacts(NamedTuple):
    """What a video file holds, as it is shown: rotation metadata is applied."""

    times: np.ndarray
    """When each frame is shown first, in seconds from the first frame on, float64 `[frames]`."""
    height: int
    width: int

    @property
    def seconds(self) -> float:
        """Time between the first and the last frame."""
        return float(self.times[-1])

    @property
    def fps(self) -> float:
        """Frames per second, on average; 0 for a single frame."""
        return (len(self.times) - 1) / self.seconds if self.seconds else 0.0


class Crop(NamedTuple):
    """Scale a frame, then cut a window of `height` × `width` out of its middle."""

    scaled_height: int
    scaled_width: int
    height: int
    width: int


def clip_facts(path: str | Path) -> ClipFacts:
    """Count the frames of a file and decode the first.

    Raises:
        RuntimeError: If decord cannot read it, or there are no frames.
    """
    reader = _open(path)
    if not len(reader):
        raise RuntimeError("has no frames")
    times = reader.get_frame_timestamp(list(range(len(reader))))[:, 0].astype(np.float64)
    height, width, _ = visible_pixels(reader[0].asnumpy()).shape
    return ClipFacts(times - times[0], height, width)


def read_frames(path: str | Path, indices: Sequence[int], crop: Crop | None = None) -> np.ndarray:
    """Decode frames.

    Args:
        path: Video file.
        indices: Frame numbers in any order; a number may repeat.
        crop: Bicubic scaling and centre crop, or None for frames as they are.

    Returns:
        uint8 `[len(indices), height, width, 3]`.

    Raises:
        RuntimeError: If decord cannot decode one of them.
    """
    reader = _open(path)
    frames = {i: cropped(visible_pixels(reader[i].asnumpy()), crop) for i in sorted({*indices})}
    return np.stack([frames[i] for i in indices])


def visible_pixels(frame: np.ndarray) -> np.ndarray:
    """uint8 [height, width, 3] of a decoded frame.

    Rows of narrow frames are padded in memory, and decord2 3.4 takes the padding of a row for more
    than three channels; its `get_batch` refuses such frames altogether.
    """
    height, width, _ = frame.shape
    return frame.reshape(height, -1)[:, : 3 * width].reshape(height, width, 3)


def cropped(frame: np.ndarray, crop: Crop | None) -> np.ndarray:
    """A frame, scaled by Pillow's bicubic filter and cropped."""
    if crop is None:
        return frame.copy()
    image = Image.fromarray(frame)
    image = image.resize((crop.scaled_width, crop.scaled_height), Image.Resampling.BICUBIC)
    left, top = (image.width - crop.width) // 2, (image.height - crop.height) // 2
    return np.asarray(image.crop((left, top, left + crop.width, top + crop.height)))


def _open(path: str | Path) -> Any:
    # decord loads its own FFmpeg, so only those who read videos import it.
    import decord

    open_video: Any = decord.VideoReader
    # Without a tolerance, decord shows a neighbour in the place of a frame it cannot decode.
    return open_video(str(path), num_threads=1, fault_tol=1e-9)
