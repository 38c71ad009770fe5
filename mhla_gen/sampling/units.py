"""Units: the groups of samples that are called, written and resumed together."""

import hashlib
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mhla_gen.errors import UserError
from mhla_gen.files import write_json, written_whole
from mhla_gen.files.saved import DamagedFileError, read_array, read_json
from mhla_gen.outputs.folders import WORK_NAME


@dataclass(frozen=True)
class Units:
    """Samples 0…count - 1 in groups of `rows`; the last group may be smaller."""

    count: int
    rows: int

    @classmethod
    def split(cls, count: int, most: int) -> "Units":
        """As few units of at most `most` samples as possible, of equal size."""
        number = -(-count // most)
        return cls(count, -(-count // number))

    def __len__(self) -> int:
        return -(-self.count // self.rows)

    def numbers(self, unit: int) -> list[int]:
        """The samples of a unit."""
        return list(range(unit * self.rows, min((unit + 1) * self.rows, self.count)))

    def filled(self, unit: int) -> list[int]:
        """The samples of a unit; the last one again where they are fewer than `rows`."""
        numbers = self.numbers(unit)
        return numbers + numbers[-1:] * (self.rows - len(numbers))


class Work:
    """The working folder of an unfinished sample set.

    A unit is done when its mark is there, which is written last. Any number of processes work in
    the folder at a time, each on units of its own.
    """

    def __init__(self, folder: Path, units: Units):
        self.folder, self.units = folder / WORK_NAME, units

    def done(self) -> set[int]:
        """Units that are done."""
        marks = self.folder / "done"
        return {int(p.stem) for p in marks.glob("*.json")} if marks.is_dir() else set()

    def count_done(self) -> int:
        """Samples done by all processes."""
        return sum(len(self.units.numbers(unit)) for unit in self.done())

    def mark(self, unit: int, values: dict[str, Any], files: Iterable[Path]) -> None:
        """Record that a unit is done, with the sizes of its files."""
        root = self.folder.parent
        sizes = {str(path.relative_to(root)): path.stat().st_size for path in sorted(files)}
        write_json(self._mark_file(unit), {**values, "files": sizes})

    def marks(self) -> list[dict[str, Any]]:
        """The content of the marks, unit by unit."""
        remedy = "remove it and give the same command again"
        return [read_json(self._mark_file(unit), remedy) for unit in sorted(self.done())]

    def forget_damaged(self) -> None:
        """Forget units whose mark or files have changed since they were written."""
        for unit in sorted(self.done()):
            try:
                sizes = read_json(self._mark_file(unit), "").get("files", {})
                wrong = [name for name, size in sizes.items() if self._size(name) != size]
            except (UserError, AttributeError):
                wrong = [self._mark_file(unit).name]
            if wrong:
                print(f"{wrong[0]} is damaged or missing: its samples are made again")
                self._mark_file(unit).unlink()

    def _mark_file(self, unit: int) -> Path:
        return self.folder / "done" / f"{unit:06d}.json"

    def _size(self, name: str) -> int | None:
        path = self.folder.parent / name
        return path.stat().st_size if path.is_file() else None

    def samples(self, unit: int) -> np.ndarray:
        """The samples of a unit that is done, `[samples, …]`.

        Raises:
            DamagedFileError: If they are not those that were drawn.
        """
        path, remedy = self.samples_file(unit), "remove it and give the same command again"
        samples = read_array(path, remedy, mapped=True)
        if samples_digest(samples) != read_json(self._mark_file(unit), remedy)["sha256"]:
            raise DamagedFileError(path, "its samples have changed", remedy)
        return samples

    def samples_file(self, unit: int) -> Path:
        """The file with the samples of a unit, `[samples, …]`."""
        return self.folder / "samples" / f"{unit:06d}.npy"

    def sheet_file(self, number: int) -> Path:
        """The file with the part of a sample that the contact sheet shows."""
        return self.folder / "sheet" / f"{number:06d}.npy"

    def sheet_part(self, number: int) -> np.ndarray:
        """What the contact sheet shows of a sample, `[images, …]`."""
        return read_array(self.sheet_file(number), "give the same command again")

    @property
    def features_folder(self) -> Path:
        """The folder for features, with a file for each name and unit."""
        return self.folder / "features"

    def identity(self) -> dict[str, Any] | None:
        """What determines the samples, as the first run wrote it; None before that.

        Raises:
            DamagedFileError: If units are done, but what they are of is not known any more.
        """
        path = self.folder / "identity.json"
        remedy = f"remove {self.folder} to sample the set from the start"
        if path.is_file():
            return read_json(path, remedy)
        if self.done():
            raise DamagedFileError(path, "it is missing", remedy)
        return None

    def write_identity(self, values: dict[str, Any]) -> None:
        """Write what determines the samples."""
        write_json(self.folder / "identity.json", values)

    def remove(self) -> None:
        """Delete the folder, when the set is complete."""
        shutil.rmtree(self.folder, ignore_errors=True)


def write_array(path: Path, array: np.ndarray) -> None:
    """Write an .npy file, whole or not at all."""
    with written_whole(path) as partial, partial.open("wb") as file:
        np.save(file, array)


def samples_digest(samples: np.ndarray) -> str:
    """SHA-256 of samples, uint8 `[samples, …]`."""
    return hashlib.sha256(np.ascontiguousarray(samples).data).hexdigest()
