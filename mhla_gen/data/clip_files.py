"""Source files of clips: videos and still images in a folder or a list."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mhla_gen.config import DataConfig
from mhla_gen.data.lists import listed_paths, read_list
from mhla_gen.errors import MissingError, UserError
from mhla_gen.files.text import read_text
from mhla_gen.media import ClipFacts, Crop, Decoder
from mhla_gen.media.folders import files_below, passed_over
from mhla_gen.media.frames import CLIP_SUFFIXES
from mhla_gen.media.pictures import UnreadableImageError

# What stands beside clips on purpose: captions, and lists.
_BESIDE = frozenset((".txt", ".csv", ".json", ".jsonl", ".ndjson"))


@dataclass(frozen=True, eq=False)
class ClipFiles:
    """Videos and still images, with a caption each."""

    paths: tuple[Path, ...]
    captions: tuple[str, ...]
    tone_map: bool = False
    """Bring HDR video to SDR."""

    def __len__(self) -> int:
        return len(self.paths)

    def describe(self, index: int) -> str:
        """What messages call a file."""
        return str(self.paths[index])

    def digest(self, index: int) -> str:
        """See `Examples`."""
        # Here, so that captions are checked without torch; as below.
        from mhla_gen.files.digests import file_digest

        try:
            return file_digest(self.paths[index])
        except OSError:
            return "unreadable"

    def facts(self, index: int, decoder: Decoder) -> ClipFacts:
        """Frame times and size; a still image has one frame.

        Raises:
            UnreadableImageError: If the file cannot be decoded.
        """
        path = self.paths[index]
        if not path.is_file():
            raise UnreadableImageError("does not exist")
        return decoder.facts(path, self.tone_map)

    def pixels(self, index: int, frames: Sequence[int], crop: Crop, decoder: Decoder) -> np.ndarray:
        """uint8 `[frames, height, width, 3]`, cropped.

        Raises:
            UnreadableImageError: If the file cannot be decoded.
        """
        return decoder.frames(self.paths[index], frames, crop, self.tone_map)


def find_clips(config: DataConfig, missing_caption: str, tone_map: bool = False) -> ClipFiles:
    """The files of a folder and its sub-folders, or those that a CSV or JSONL file lists.

    The caption of `dog.mp4` is the text of `dog.txt` beside it, or what its column in the list
    says.

    Args:
        config: Its `path` and `caption_column`.
        missing_caption: error, or empty.
        tone_map: Bring HDR video to SDR.

    Raises:
        MissingError: If there are no files.
        UserError: If the list or a caption cannot be read, or captions are missing.
    """
    paths, captions, others = with_captions(config, missing_caption)
    if others:
        from mhla_gen.runtime.processes import tell

        tell(f"data.path {config.path}: ignored {passed_over(others)}")
    return ClipFiles(tuple(paths), tuple(captions), tone_map)


def with_captions(
    config: DataConfig, missing_caption: str
) -> tuple[list[Path], list[str], Counter[str]]:
    """Files, their captions, and the number of other files by suffix.

    Arguments and errors as those of `find_clips`.
    """
    root, others = Path(str(config.path)), Counter[str]()
    if root.is_dir():
        found = files_below(root, CLIP_SUFFIXES)
        paths, others = list(found.paths), Counter(found.others)
        if not paths:
            suffixes = " ".join(sorted(CLIP_SUFFIXES))
            beside = passed_over(others)
            raise MissingError(
                f"data.path {root} has no clips ({suffixes}){beside and f'; found {beside}'}"
            )
        others = Counter({s: count for s, count in others.items() if s not in _BESIDE})
        captions = [_text_beside(path) for path in paths]
        remedy = "write captions to text files of the same names, dog.txt for dog.mp4"
    elif root.exists():
        rows = read_list(root)
        paths = list(listed_paths(root, rows))
        captions = [_text(row.values.get(config.caption_column)) for row in rows]
        remedy = f"fill its column {config.caption_column}"
    else:
        raise MissingError(f"data.path {root} does not exist")
    missing = [path for path, caption in zip(paths, captions, strict=True) if not caption]
    if missing and missing_caption == "error":
        raise UserError(
            f"{len(missing)} of {len(paths)} clips have no caption, {missing[0]} first; {remedy}, "
            "or use empty ones with clips.missing_caption=empty"
        )
    return paths, captions, others


def _text_beside(path: Path) -> str:
    text = path.with_suffix(".txt")
    return read_text(text, "caption").strip() if text.is_file() else ""


def _text(value: Any) -> str:
    return value.strip() if isinstance(value, str) else ""
