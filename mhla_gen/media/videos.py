"""Writing frames to an mp4 file, and choosing those that represent it in a picture."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from mhla_gen.errors import UserError
from mhla_gen.files import written_whole

# Frames of a video that a picture shows.
_SHOWN_FRAMES = 8


def write_video(path: Path, frames: np.ndarray, fps: float) -> None:
    """Write an mp4 file (H.264) of uint8 `[frames, height, width, 3]`, whole or not at all.

    Raises:
        ValueError: If a side is odd, which H.264's 4:2:0 colour cannot hold.
    """
    with video_writer(path, frames.shape[1], frames.shape[2], fps) as write:
        for frame in frames:
            write(frame)


@contextmanager
def video_writer(
    path: Path, height: int, width: int, fps: float
) -> Iterator[Callable[[np.ndarray], None]]:
    """Write an mp4 file (H.264) frame by frame, whole or not at all.

    Yields:
        Takes the next frame, uint8 `[height, width, 3]`.

    Raises:
        ValueError: If a side is odd, which H.264's 4:2:0 colour cannot hold.
    """
    import imageio

    if height % 2 or width % 2:
        raise UserError(
            f"mp4 needs an even height and width, found {height} × {width}; write png or npz"
        )
    options: dict[str, Any] = {
        "fps": fps,
        "quality": 8,
        # By default imageio scales sides up to multiples of 16.
        "macro_block_size": 2,
        # The temporary name does not tell the format.
        "output_params": ["-f", "mp4"],
    }
    with written_whole(path) as partial:
        writer: Any
        with imageio.get_writer(partial, format="mp4", mode="I", **options) as writer:  # pyright: ignore
            yield writer.append_data


def shown_frames(frames: np.ndarray) -> np.ndarray:
    """Some frames of a video `[frames, …]`, evenly spaced, including the first and the last."""
    return frames[shown_numbers(len(frames))]


def shown_numbers(num_frames: int) -> np.ndarray:
    """Numbers of the frames that stand for a video of so many."""
    count = min(num_frames, _SHOWN_FRAMES)
    return np.linspace(0, num_frames - 1, count).round().astype(int)
