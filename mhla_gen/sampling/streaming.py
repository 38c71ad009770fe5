"""Clips that are written while they are made, chunk by chunk: any length takes the same memory."""

import hashlib
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from mhla_gen.files.saved import read_array
from mhla_gen.media.videos import shown_numbers, video_writer
from mhla_gen.runtime.devices import device_name
from mhla_gen.sampling.prompt_sampler import PromptSampler
from mhla_gen.sampling.sample_files import file_of
from mhla_gen.sampling.samplers import OnStep
from mhla_gen.sampling.units import Work, write_array


def keep_clips(
    folder: Path,
    work: Work,
    unit: int,
    sampler: PromptSampler,
    *,
    steps: int,
    fps: float,
    on_sheet: set[int],
    on_step: OnStep,
) -> None:
    """Make the clips of a unit and write each to its mp4 file as chunks are finished.

    Latents of finished chunks are kept until the unit is done: a run that was interrupted in a
    clip reads and decodes them, and denoises only what is missing.

    Args:
        folder: Of the sample set.
        work: Of the sample set, while it is unfinished.
        unit: Its number.
        sampler: Makes clips chunk by chunk.
        steps: Denoising steps.
        fps: Frames per second.
        on_sheet: Samples that the contact sheet shows.
        on_step: Called with the samples in work, counted by the steps done.
    """
    digest, files, numbers = hashlib.sha256(), [], work.units.numbers(unit)
    num_frames, height, width, _ = sampler.shape
    shown = set(shown_numbers(num_frames).tolist())
    for done, number in enumerate(numbers):
        frames = _frames(
            sampler,
            number,
            steps,
            _Latents(work, number),
            lambda step, done=done: on_step(done + step / steps),
        )
        files.append(file_of(folder, number, "mp4"))
        pictures = []
        with video_writer(files[-1], height, width, fps) as write:
            for place, frame in enumerate(frames):
                write(frame)
                digest.update(frame.data)
                if place in shown and number in on_sheet:
                    pictures.append(frame)
        if pictures:
            files.append(work.sheet_file(number))
            write_array(files[-1], np.stack(pictures))
    values = {"device": device_name(), "notes": [], "sha256": digest.hexdigest()}
    work.mark(unit, values, files)
    for number in numbers:
        _Latents(work, number).remove()


def _frames(
    sampler: PromptSampler, number: int, steps: int, latents: "_Latents", on_step: OnStep
) -> Iterator[np.ndarray]:
    """Frames of a clip, uint8 `[height, width, 3]`, as its chunks are finished and kept."""
    stream = sampler.stream(number, steps, latents.read(), on_step)
    for chunk, (clean, frames) in enumerate(stream):
        latents.keep(chunk, clean)
        yield from frames.cpu().numpy()


class _Latents:
    """Latents of the finished chunks of a clip, in files."""

    def __init__(self, work: Work, number: int):
        self.folder = work.folder / "latents" / f"{number:06d}"

    def read(self) -> list[Tensor]:
        """Those that an earlier start left."""
        found: list[Tensor] = []
        while (path := self._file(len(found))).is_file():
            array = read_array(path, "remove it and give the same command again")
            found.append(torch.from_numpy(array))
        return found

    def keep(self, chunk: int, latents: Tensor) -> None:
        """Write those of a chunk, unless they are there."""
        if not self._file(chunk).is_file():
            write_array(self._file(chunk), latents.cpu().numpy())

    def remove(self) -> None:
        """Delete all."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _file(self, chunk: int) -> Path:
        return self.folder / f"{chunk:06d}.npy"
