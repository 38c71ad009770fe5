"""A finished sample set: its files, joined from those of the units, and its manifest."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mhla_gen.config import SampleConfig
from mhla_gen.errors import not_worth_failing
from mhla_gen.files import write_json, write_lines
from mhla_gen.files.saved import DamagedFileError
from mhla_gen.sampling.manifest import MANIFEST_NAME, manifest, read_manifest
from mhla_gen.sampling.sample_files import (
    IMAGES_NAME,
    SAMPLES_NAME,
    SHEET_NAME,
    VIDEOS_NAME,
    write_samples,
    write_sheet,
)
from mhla_gen.sampling.samplers import ClassSampler, Sampler
from mhla_gen.sampling.units import Work

RECORDS_NAME = "samples.jsonl"


def finish(
    folder: Path,
    sampler: Sampler,
    config: SampleConfig,
    formats: Sequence[str],
    work: Work,
    identity: dict[str, Any],
) -> None:
    """Join the units, and write the manifest, which marks the set as complete.

    Args:
        folder: Of the sample set.
        sampler: Of the set.
        config: Its settings.
        formats: Of npz, png and mp4, those that are kept.
        work: Of the set, with all units done; it is removed.
        identity: What determines the samples; see `manifest`.
    """
    files = _join(folder, sampler, formats, work)
    sizes = {name: _size_of(folder / name) for name in files}
    with not_worth_failing("the contact sheet", "the samples are complete"):
        rows = [
            (title, np.concatenate([work.sheet_part(n) for n in numbers]))
            for title, numbers in sampler.rows()
        ]
        write_sheet(folder / SHEET_NAME, rows, sampler.is_video)
        files.append(SHEET_NAME)
    if config.evaluate is not None:
        files.append(config.evaluate.out)
    made = manifest(sampler, config, identity, files, work.marks())
    write_json(folder / MANIFEST_NAME, {**made, "bytes": sizes})
    work.remove()


def _join(folder: Path, sampler: Sampler, formats: Sequence[str], work: Work) -> list[str]:
    """Write what holds all samples together; the names of all files of samples."""
    files, count = [], len(sampler)
    if "npz" in formats:
        parts = map(work.samples, range(len(work.units)))
        labels = sampler.labels if isinstance(sampler, ClassSampler) else None
        write_samples(folder / SAMPLES_NAME, parts, (count, *sampler.shape), labels)
        files.append(SAMPLES_NAME)
    folders = {"png": IMAGES_NAME, "mp4": VIDEOS_NAME}
    in_files = [folders[name] for name in formats if name in folders]
    if in_files:
        # Files of their own do not say what they show.
        write_lines(folder / RECORDS_NAME, map(sampler.record, range(count)))
        files += [*in_files, RECORDS_NAME]
    return files


def require_whole_set(folder: Path) -> None:
    """Raise unless a finished set still has its samples.

    Raises:
        DamagedFileError: Naming what is missing or has another size.
    """
    for name, size in read_manifest(folder).get("bytes", {}).items():
        found = _size_of(folder / name)
        if found != size:
            remedy = f"remove {folder / MANIFEST_NAME} to sample the set again"
            raise DamagedFileError(folder / name, f"{found} bytes of {size}", remedy)


def _size_of(path: Path) -> int:
    """Bytes of a file, or of all files of a folder; 0 where there is nothing."""
    if path.is_dir():
        return sum(entry.stat().st_size for entry in os.scandir(path) if entry.is_file())
    return path.stat().st_size if path.is_file() else 0
