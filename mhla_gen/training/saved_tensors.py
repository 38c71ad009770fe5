"""Tensors on disk, also in parts: each process writes its rows, and any number of them read.

They are safetensors files; those of parts say which rows of which shape they hold.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.tensor import DTensor

from mhla_gen.errors import UserError
from mhla_gen.files.saved import DamagedFileError


class Rows(NamedTuple):
    """This process's part of a tensor: some rows of its first axis, or all of it."""

    local: Tensor
    start: int
    shape: tuple[int, ...]
    """Of the whole tensor."""
    mine: bool
    """Whether this process is the one that writes them."""

    @classmethod
    def of(cls, tensor: Tensor, like: Tensor | None = None, main: bool = True) -> "Rows":
        """The rows of a tensor.

        Args:
            tensor: Shared or not.
            like: Shared as it is, where `tensor` is what this process holds of it.
            main: Whether this process writes what every process has.

        Raises:
            ValueError: If it is shared along another axis.
        """
        shared = tensor if like is None else like
        if not isinstance(shared, DTensor):
            return cls(tensor, 0, tuple(tensor.shape), main)
        start, length, mine = 0, shared.shape[0], True
        position: Any = shared.device_mesh.get_coordinate()
        for axis, placement in enumerate(shared.placements):
            if placement.is_shard(0):
                # As torch.chunk cuts: the last parts may be smaller, or have nothing.
                size = -(-length // shared.device_mesh.size(axis))
                first = min(position[axis] * size, length)
                start, length = start + first, min(size, length - first)
            elif placement.is_replicate():
                mine = mine and position[axis] == 0
            else:
                raise UserError(f"a checkpoint cannot hold tensors that are placed as {placement}")
        local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
        return cls(local, start, tuple(shared.shape), mine and length > 0)


class SavedTensors:
    """Tensors of a checkpoint, read row by row, whoever wrote which.

    Args:
        folder: Of the checkpoint.
        kind: Of the files.

    Raises:
        DamagedFileError: If one is no safetensors file.
    """

    def __init__(self, folder: Path, kind: str):
        self.shapes: dict[str, list[int]] = {}
        self._places: dict[str, list[tuple[int, Any]]] = {}
        for path in sorted(folder.glob(f"{kind}*.safetensors")):
            try:
                file = safe_open(path, framework="pt")
            except (SafetensorError, OSError) as error:
                raise DamagedFileError(path, str(error), "use another checkpoint") from error
            about = file.metadata() or {}
            starts, shapes = (json.loads(about.get(key, "{}")) for key in ("starts", "shapes"))
            for name in file.keys():  # noqa: SIM118
                self.shapes[name] = shapes.get(name, file.get_slice(name).get_shape())
                self._places.setdefault(name, []).append((starts.get(name, 0), file))
        for places in self._places.values():
            places.sort(key=lambda place: place[0])

    def all(self) -> dict[str, Tensor]:
        """All tensors, whole, on the CPU."""
        return {name: self.rows(name) for name in self.shapes}

    def rows(self, name: str, start: int = 0, length: int | None = None) -> Tensor:
        """Some rows of a tensor, or all of it, on the CPU."""
        places = self._places[name]
        if not self.shapes[name] or (len(places) == 1 and start == 0 and length is None):
            return places[0][1].get_tensor(name)
        stop = self.shapes[name][0] if length is None else start + length
        ends = [first for first, _ in places[1:]] + [self.shapes[name][0]]
        parts = [
            file.get_slice(name)[max(start, first) - first : min(stop, end) - first]
            for (first, file), end in zip(places, ends, strict=True)
            if max(start, first) < min(stop, end) or start == stop
        ]
        return parts[0] if len(parts) == 1 else torch.cat(parts)


def len_of(tensor: Tensor) -> int | None:
    """Rows of a tensor; None for a number."""
    return len(tensor) if tensor.ndim else None


def write_rows(path: Path, rows: Mapping[str, Rows]) -> None:
    """Write this process's rows of tensors, by name."""
    tensors: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, entry in rows.items():
        tensor = entry.local.detach().to("cpu").contiguous()
        # safetensors takes no two tensors of one memory.
        tensors[name] = tensor.clone() if tensor.untyped_storage().data_ptr() in seen else tensor
        seen.add(tensor.untyped_storage().data_ptr())
    about = {"format": "pt"}
    if any(tuple(entry.local.shape) != entry.shape for entry in rows.values()):
        about["starts"] = json.dumps({name: entry.start for name, entry in rows.items()})
        about["shapes"] = json.dumps({name: entry.shape for name, entry in rows.items()})
    save_file(tensors, path, about)
