"""What a video or image file shows: the only definition of what a frame is.

Training, caching, first frames for sampling and FVD all come here. Nothing heavy is imported:
workers start quickly.
"""

import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from mhla_gen.media import ffmpeg
from mhla_gen.media.hdr import to_sdr
from mhla_gen.media.pictures import (
    IMAGE_SUFFIXES,
    LastingError,
    UnreadableImageError,
    frame_times,
    opaque,
    read_frames_rgb,
)

_STREAMS = frozenset((".ts", ".mts", ".m2ts", ".mpg", ".mpeg"))
VIDEO_SUFFIXES = _STREAMS | frozenset(
    (".mp4", ".m4v", ".mov", ".3gp", ".webm", ".mkv", ".avi", ".wmv", ".flv", ".ogv")
)
MOVING_SUFFIXES = VIDEO_SUFFIXES | {".gif", ".apng"}
CLIP_SUFFIXES = VIDEO_SUFFIXES | IMAGE_SUFFIXES


class ClipFacts(NamedTuple):
    """The content of a video or image file, as it is shown."""

    times: np.ndarray
    """When each frame is shown first, in seconds from the first frame on, float64 `[frames]`."""
    height: int
    """In square pixels, after rotations and flips."""
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


def clip_facts(path: str | Path, tone_map: bool = False) -> ClipFacts:
    """Count the frames of a file and decode the first.

    Args:
        path: Video file, or picture, which may be animated.
        tone_map: As in `read_frames`.

    Raises:
        UnreadableImageError: If it cannot be decoded or used; the message says why.
    """
    times = frame_times(Path(path)) if _is_picture(path) else _video(path).times
    height, width, _ = read_frames(path, [0], tone_map=tone_map)[0].shape
    return ClipFacts(times - times[0], height, width)


def read_frames(
    path: str | Path, indices: Sequence[int], crop: Crop | None = None, tone_map: bool = False
) -> np.ndarray:
    """Decode frames.

    Args:
        path: Video file, or picture, which may be animated.
        indices: Frame numbers in any order; a number may repeat.
        crop: Bicubic scaling and centre crop, or None for frames as they are shown.
        tone_map: Bring HDR video to SDR; without it, it is not to be used.

    Returns:
        uint8 `[len(indices), height, width, 3]`.

    Raises:
        UnreadableImageError: If one of them cannot be decoded or used; the message says why.
    """
    wanted = sorted({*indices})
    frames: dict[int, np.ndarray] = {}
    if _is_picture(path):
        for number, frame in enumerate(read_frames_rgb(Path(path), wanted[-1])):
            if number in wanted:
                frames[number] = frame if crop is None else cropped(frame, crop)
    else:
        video = _video(path)
        square = Crop(*(video.square_height, video.square_width) * 2)
        for number, frame in _stored(path, video, wanted, tone_map):
            # Scaled once: a crop says the size in square pixels.
            frames[number] = cropped(frame, crop or square)
    missing = [number for number in wanted if number not in frames]
    if missing:
        raise UnreadableImageError(f"cannot be decoded (frame {missing[0]} is missing)")
    return np.stack([frames[i] for i in indices])


def _is_picture(path: str | Path) -> bool:
    suffix = Path(path).suffix.lower()
    if suffix not in CLIP_SUFFIXES:
        raise LastingError(f"is of an unsupported kind ({suffix or 'no suffix'})")
    return suffix in IMAGE_SUFFIXES


def _video(path: str | Path) -> ffmpeg.Probe:
    """What FFmpeg says of a file, with the times of its frames."""
    try:
        state = os.stat(path)
    except FileNotFoundError as error:
        raise LastingError(f"cannot be read ({error.strerror})") from error
    except OSError as error:
        raise UnreadableImageError(f"cannot be read ({error.strerror})") from error
    return _examined(str(path), state.st_mtime_ns, state.st_size)


# Who asks for frames has usually asked for facts just before.
@lru_cache(maxsize=16)
def _examined(path: str, _changed: int, _size: int) -> ffmpeg.Probe:
    found = ffmpeg.probe(path)
    return found if found.exact else found._replace(times=ffmpeg.decoded_times(path))


def _stored(
    path: str | Path, video: ffmpeg.Probe, wanted: Sequence[int], tone_map: bool
) -> Iterator[tuple[int, np.ndarray]]:
    """Frames with their numbers, in the stored pixels."""
    if video.hdr == "BT.2020":
        raise LastingError("has the colours of BT.2020 (HDR?): convert it to BT.709 first")
    if video.hdr and not tone_map:
        raise LastingError(
            f"is HDR ({video.hdr}): convert it to SDR, or cache it with clips.hdr=tone_map"
        )
    if video.hdr:
        for number, frame in ffmpeg.shown_frames(path, video, wanted, "rgb48le"):
            yield number, to_sdr(frame, video.hdr)
    elif video.alpha:
        for number, frame in ffmpeg.shown_frames(path, video, wanted, "rgba"):
            yield number, np.asarray(opaque(Image.fromarray(frame)))
    else:
        plain = video.exact and video.closed and not video.turned
        frames = _by_decord(path, wanted, len(video.times)) if plain else None
        yield from frames or ffmpeg.shown_frames(path, video, wanted)


def _by_decord(
    path: str | Path, wanted: Sequence[int], count: int
) -> Iterator[tuple[int, np.ndarray]] | None:
    """Frames by decord; None if it counts other ones."""
    # decord loads its own FFmpeg, so only those who read videos import it.
    import decord

    open_video: Any = decord.VideoReader
    with _reason_of_decord():
        # Without a tolerance, decord shows a neighbour in the place of a frame it cannot decode.
        reader = open_video(os.path.abspath(path), num_threads=1, fault_tol=1e-9)
    return _each(reader, wanted) if len(reader) == count else None


def _each(reader: Any, wanted: Sequence[int]) -> Iterator[tuple[int, np.ndarray]]:
    for number in wanted:
        with _reason_of_decord():
            frame = visible_pixels(reader[number].asnumpy())
        yield number, frame


@contextmanager
def _reason_of_decord() -> Iterator[None]:
    try:
        yield
    except Exception as error:  # decord raises whatever it likes about a broken file
        lines = str(error).strip().splitlines() or [type(error).__name__]
        # Without its places in its source.
        reason = re.sub(r"^(\[\S+\] \S+: )+", "", lines[-1])
        raise UnreadableImageError(f"cannot be decoded ({reason})") from error


def visible_pixels(frame: np.ndarray) -> np.ndarray:
    """uint8 [height, width, 3] of a frame of decord's.

    Rows of narrow frames are padded in memory, and decord2 3.4 takes the padding of a row for more
    than three channels; its `get_batch` refuses such frames altogether.
    """
    height, width, _ = frame.shape
    return frame.reshape(height, -1)[:, : 3 * width].reshape(height, width, 3).copy()


def cropped(frame: np.ndarray, crop: Crop) -> np.ndarray:
    """A frame, scaled by Pillow's bicubic filter and cropped."""
    image = Image.fromarray(frame)
    image = image.resize((crop.scaled_width, crop.scaled_height), Image.Resampling.BICUBIC)
    left, top = (image.width - crop.width) // 2, (image.height - crop.height) // 2
    return np.asarray(image.crop((left, top, left + crop.width, top + crop.height)))
