"""Clips cut out of videos: which bucket each goes to, what is left out, and why."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from mhla_gen.config import ClipsConfig
from mhla_gen.data.buckets import (
    Bucket,
    choose_bucket,
    consecutive,
    crop_for,
    resampled_frames,
    window_starts,
)
from mhla_gen.data.clip_files import ClipFiles
from mhla_gen.files import write_json
from mhla_gen.files.saved import read_json
from mhla_gen.media import Decoder
from mhla_gen.media.pictures import UnreadableImageError

_LISTED = 10


@dataclass(frozen=True)
class Placement:
    """Where a file went, or why it was left out."""

    name: str
    bucket: int | None = None
    """Number of its bucket in the config."""
    windows: tuple[tuple[int, ...], ...] = ()
    """Frame numbers of each clip that is cut out of it."""
    frames: int = 0
    """Of the file."""
    fps: float = 0.0
    """Of the file, on average."""
    height: int = 0
    width: int = 0
    repeated: int = 0
    """Frames of its clips that show the one before again, where the file has fewer a second."""
    left_out: str = ""
    """Why no clip is cut out of it."""
    unreadable: bool = False
    """Whether it is left out because it cannot be decoded."""


@dataclass(frozen=True, eq=False)
class Clips:
    """Clips ready to be encoded; see `Examples`."""

    files: ClipFiles
    config: ClipsConfig
    placements: tuple[Placement, ...]
    decoder: Decoder
    class_names: None = None
    labels: None = None

    @cached_property
    def _clips(self) -> list[tuple[int, int, int]]:
        """Bucket, file and window of each clip, grouped by bucket."""
        return sorted(
            (placement.bucket, file, window)
            for file, placement in enumerate(self.placements)
            if placement.bucket is not None
            for window in range(len(placement.windows))
        )

    @property
    def buckets(self) -> tuple[range, ...]:
        """See `TrainingData`; buckets without clips are not among them."""
        counts = Counter(bucket for bucket, _, _ in self._clips)
        return consecutive([counts[bucket] for bucket in sorted(counts)])

    @property
    def sample_shapes(self) -> tuple[tuple[int, ...], ...]:
        """See `TrainingData`."""
        used = sorted({bucket for bucket, _, _ in self._clips})
        return tuple((3, *self.config.buckets[bucket]) for bucket in used)

    @property
    def captions(self) -> tuple[str, ...]:
        """One per clip."""
        return tuple(self.files.captions[file] for _, file, _ in self._clips)

    def __len__(self) -> int:
        return len(self._clips)

    def describe(self, index: int) -> str:
        """See `TrainingData`."""
        _, file, window = self._clips[index]
        frames = self.placements[file].windows[window]
        name = self.files.describe(file)
        return f"{name} frames {frames[0]}…{frames[-1]}" if len(frames) > 1 else name

    def digest(self, index: int) -> str:
        """See `Examples`."""
        return self.files.digest(self._clips[index][1])

    def pixels(self, index: int) -> np.ndarray:
        """See `Examples`."""
        bucket, file, window = self._clips[index]
        placement = self.placements[file]
        crop = crop_for(Bucket(*self.config.buckets[bucket]), placement.height, placement.width)
        return self.files.pixels(file, placement.windows[window], crop, self.decoder)


def place(files: ClipFiles, index: int, config: ClipsConfig, decoder: Decoder) -> Placement:
    """Choose bucket and frames for the clips of a file."""
    name = files.describe(index)
    try:
        facts = files.facts(index, decoder)
    except UnreadableImageError as error:
        return Placement(name, left_out=str(error), unreadable=True)
    height, width = facts.height, facts.width
    shown = resampled_frames(facts.times, config.fps)
    buckets = [Bucket(*bucket) for bucket in config.buckets]
    bucket, reason = choose_bucket(buckets, len(shown), height, width, config.upscale)
    about = {"frames": len(facts.times), "fps": facts.fps, "height": height, "width": width}
    if bucket is None:
        return Placement(name, left_out=reason, **about)
    needed = buckets[bucket].frames
    starts = window_starts(len(shown), needed, config.max_windows)
    windows = tuple(tuple(map(int, shown[start : start + needed])) for start in starts)
    repeated = sum(int((np.diff(window) == 0).sum()) for window in windows)
    return Placement(name, bucket, windows, repeated=repeated, **about)


def write_placements(path: Path, placements: Sequence[Placement]) -> None:
    """Write where every file went, as JSON."""
    write_json(path, [asdict(p) for p in placements], indent=1)


def read_placements(path: Path) -> tuple[Placement, ...]:
    """Read what `write_placements` wrote."""
    rows = read_json(path, "build the cache again in another output_dir", list)
    return tuple(Placement(**row | {"windows": tuple(map(tuple, row["windows"]))}) for row in rows)


def report(config: ClipsConfig, placements: Sequence[Placement]) -> str:
    """A table of buckets, and what was left out, for the user."""
    lines = [f"{'frames × height × width':<26}{'clips':>8}{'files':>8}"]
    for number, bucket in enumerate(config.buckets):
        placed = [p for p in placements if p.bucket == number]
        clips = sum(len(p.windows) for p in placed)
        lines.append(f"{Bucket(*bucket)!s:<26}{clips:>8}{len(placed):>8}")
    outside = [p for p in placements if p.bucket is None]
    lines.append(f"{'left out':<26}{'':>8}{len(outside):>8}")
    lines += [f"  {p.name} {p.left_out}" for p in outside[:_LISTED]]
    if len(outside) > _LISTED:
        lines.append(f"  and {len(outside) - _LISTED} more: clips.json lists all")
    repeated = [p for p in placements if p.repeated]
    if repeated:
        lines.append(
            f"{len(repeated)} files have fewer than {config.fps:g} frames a second: "
            f"{sum(p.repeated for p in repeated)} frames of their clips are shown twice"
        )
    return "\n".join(lines)
