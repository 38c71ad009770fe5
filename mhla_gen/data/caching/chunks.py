"""The files of a cache: some samples each, written whole or not at all."""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate import PartialState
from safetensors import SafetensorError, safe_open
from torch import Tensor
from tqdm import tqdm

from mhla_gen.files import write_tensors
from mhla_gen.files.digests import file_digest
from mhla_gen.runtime.processes import advance

T = TypeVar("T")
Computed = tuple[dict[str, Tensor], dict[str, Any]]
"""Tensors of a chunk, and its record."""

MISSING = "is missing"
"""The problem of a file that is not there."""


@dataclass(frozen=True)
class Chunk:
    """Samples of one shape that share a file."""

    name: str
    """Of the file."""
    items: tuple[int, ...]
    """Numbers of the examples, or captions, that it is to hold."""
    bucket: int = 0
    """Which shape they have."""


def chunks_of(kind: str, buckets: Sequence[Sequence[int]], size: int) -> list[Chunk]:
    """Cut the items of every bucket into chunks of `size`; each bucket's last may be smaller."""
    parts = [
        (number, tuple(items[start : start + size]))
        for number, items in enumerate(buckets)
        for start in range(0, len(items), size)
    ]
    return [
        Chunk(f"{kind}-{n:06d}.safetensors", items, bucket)
        for n, (bucket, items) in enumerate(parts)
    ]


def write_missing(
    folder: Path,
    chunks: Sequence[Chunk],
    compute: Callable[[Sequence[Chunk], Callable[[int], Any]], Iterator[Computed]],
    title: str,
    unit: str,
    again: bool = False,
) -> None:
    """Compute the missing chunks, each process every n-th one.

    A chunk does not depend on how many processes there are, nor on which others exist.

    Args:
        folder: Of the cache.
        chunks: All chunks, the same in every process.
        compute: From chunks, and what it calls with the number of items done, to the tensors and
            the record of one after the other.
        title: What the progress bar says.
        unit: What an item is called.
        again: Recompute chunks from which something was left out.

    Raises:
        OSError: If a file cannot be written; the others stay.
    """
    state = PartialState()
    mine = chunks[state.process_index :: state.num_processes]
    missing = [c for c in mine if not is_complete(folder / c.name, again)]
    total = sum(len(chunk.items) for chunk in chunks)
    done = sum(len(c.items) for c in mine) - sum(len(c.items) for c in missing)
    # The main process shows it, and takes the others to be as far as itself.
    with tqdm(
        desc=title,
        total=total,
        initial=min(done * state.num_processes, total),
        unit=unit,
        disable=not state.is_main_process,
    ) as bar:
        computed = compute(missing, lambda n: advance(bar, n))
        for chunk, (tensors, record) in zip(missing, computed, strict=True):
            _write(folder / chunk.name, tensors, record)
    state.wait_for_everyone()


def read_record(path: Path) -> dict[str, Any]:
    """The record of a chunk's items, without reading its tensors."""
    with safe_open(path, "pt") as file:
        return json.loads(file.metadata()["record"])


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a chunk, memory-mapped: only rows that are used are read."""
    with safe_open(path, "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def examine(path: Path) -> dict[str, Any]:
    """Size, digest and shapes of a chunk, as they are on disk.

    Returns:
        `file`, `bytes`, `sha256`, `shapes` and `dtypes` by tensor, `record`; or `file` and
        `problem`.
    """
    if not path.is_file():
        return {"file": path.name, "path": str(path), "problem": MISSING}
    try:
        tensors, record = read_tensors(path), read_record(path)
    except (SafetensorError, OSError) as error:
        return {"file": path.name, "path": str(path), "problem": f"cannot be read ({error})"}
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            return {
                "file": path.name,
                "path": str(path),
                "problem": f"has values in {name} that are not finite",
            }
    return {
        "file": path.name,
        "path": str(path),
        "bytes": path.stat().st_size,
        "sha256": file_digest(path),
        "shapes": {name: list(tensor.shape) for name, tensor in tensors.items()},
        "dtypes": {name: str(tensor.dtype).split(".")[-1] for name, tensor in tensors.items()},
        "record": record,
    }


def batched(items: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    """Consecutive parts of a sequence."""
    for start in range(0, len(items), size):
        yield items[start : start + size]


def is_complete(path: Path, again: bool) -> bool:
    """Whether a chunk exists and need not be computed again; see `write_missing`."""
    return path.is_file() and not (again and read_record(path).get("quarantined"))


def _write(path: Path, tensors: dict[str, Tensor], record: dict[str, Any]) -> None:
    # Metadata are an unordered map of strings: one entry keeps files reproducible.
    write_tensors(path, tensors, {"record": json.dumps(record)})
