"""What is kept of samples: files, parts of the contact sheet, features, and a mark."""

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mhla_gen.media.videos import write_video
from mhla_gen.sampling.sample_files import file_of, sheet_part, write_image
from mhla_gen.sampling.units import Work, samples_digest, write_array

# Units whose files are being written while the next ones are drawn.
_WAITING = 4
_THREADS = 4


class Keeper:
    """Writes units in the background; a context manager.

    Args:
        folder: Of the sample set.
        work: Of the sample set, while it is unfinished.
        formats: Of npz, png and mp4; none of them keeps nothing.
        on_sheet: Samples that the contact sheet shows.
        fps: Frames per second of videos.
        measure: Takes a unit and its samples on their device, and writes their features.
    """

    def __init__(
        self,
        folder: Path,
        work: Work,
        formats: tuple[str, ...],
        on_sheet: set[int],
        fps: float,
        measure: Callable[[int, Tensor], None] | None,
    ):
        self.folder, self.work, self.formats, self.fps = folder, work, formats, fps
        self.on_sheet, self.measure = on_sheet, measure
        self._pool = ThreadPoolExecutor(_THREADS)
        self._waiting: deque[Future[None]] = deque()

    def __enter__(self) -> "Keeper":
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        # What is drawn is written even when the drawing was stopped.
        self._pool.shutdown()
        if kind is None:
            self._wait(0)

    def keep(self, unit: int, samples: Tensor, values: dict[str, Any]) -> None:
        """Keep the samples of a unit.

        Args:
            unit: Its number.
            samples: uint8 `[samples, …]`, on any device.
            values: What its mark says.

        Raises:
            OSError: If an earlier unit could not be written.
        """
        if self.measure is not None:
            self.measure(unit, samples)
        host, arrived = _to_host(samples)
        self._waiting.append(self._pool.submit(self._write, unit, host, arrived, values))
        self._wait(_WAITING)

    def _wait(self, most: int) -> None:
        while len(self._waiting) > most:
            self._waiting.popleft().result()

    def _write(self, unit: int, host: Tensor, arrived: Any, values: dict[str, Any]) -> None:
        if arrived is not None:
            arrived.synchronize()
        samples = host.numpy()
        files = list(self.work.features_folder.glob(f"*-{unit:06d}.npz"))
        if "npz" in self.formats:
            files.append(self.work.samples_file(unit))
            write_array(files[-1], samples)
        for number, pixels in zip(self.work.units.numbers(unit), samples, strict=True):
            if number in self.on_sheet:
                files.append(self.work.sheet_file(number))
                write_array(files[-1], sheet_part(pixels))
            if "png" in self.formats:
                files.append(file_of(self.folder, number, "png"))
                write_image(files[-1], pixels)
            if "mp4" in self.formats:
                files.append(file_of(self.folder, number, "mp4"))
                write_video(files[-1], pixels, self.fps)
        self.work.mark(unit, {**values, "sha256": samples_digest(samples)}, files)


def _to_host(samples: Tensor) -> tuple[Tensor, Any]:
    """A copy in main memory, and the event that says when it is there."""
    if samples.device.type != "cuda":
        return samples.contiguous(), None
    host = torch.empty(samples.shape, dtype=samples.dtype, pin_memory=True)
    host.copy_(samples, non_blocking=True)
    arrived = torch.cuda.Event()
    arrived.record()
    return host, arrived
