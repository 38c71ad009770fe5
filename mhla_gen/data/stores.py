"""Encoded images with what is known of them: files in class folders, or files that a list names."""

import csv
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from mhla_gen.media.pictures import IMAGE_SUFFIXES


class ImageStore(Protocol):
    """Images as they are stored, in a fixed order, each to be had by its number."""

    @property
    def labels(self) -> np.ndarray | None:
        """Class numbers, int64 `[images]`, if there are any."""
        ...

    @property
    def class_names(self) -> tuple[str, ...] | None:
        """One name per class number; None without labels."""
        ...

    @property
    def captions(self) -> tuple[str, ...] | None:
        """One per image, if there are any."""
        ...

    def __len__(self) -> int: ...

    def describe(self, index: int) -> str:
        """What messages call an image."""
        ...

    def content(self, index: int) -> bytes:
        """The bytes of an image file.

        Raises:
            OSError: If they cannot be read.
        """
        ...


@dataclass(frozen=True, eq=False)
class FileStore:
    """Image files."""

    paths: tuple[Path, ...]
    labels: np.ndarray | None
    class_names: tuple[str, ...] | None
    captions: tuple[str, ...] | None = None

    def __len__(self) -> int:
        return len(self.paths)

    def describe(self, index: int) -> str:
        """See `ImageStore`."""
        return str(self.paths[index])

    def content(self, index: int) -> bytes:
        """See `ImageStore`."""
        return self.paths[index].read_bytes()


class Known(NamedTuple):
    """Labels and captions of all images, as `ImageStore` has them."""

    labels: np.ndarray | None
    class_names: tuple[str, ...] | None
    captions: tuple[str, ...] | None


def class_folders(root: Path) -> FileStore:
    """Image files in one sub-folder a class; classes are numbered in the order of their names.

    Raises:
        FileNotFoundError: If there is no folder, no class folder, or a class without images.
    """
    if not root.is_dir():
        known = ", an npz file is data.source=npz" if root.suffix == ".npz" else ""
        raise FileNotFoundError(f"data.path {root} is not a folder{known}")
    folders = sorted(d for d in root.iterdir() if d.is_dir() and not d.name.startswith("."))
    if not folders:
        raise FileNotFoundError(
            f"data.path {root} has no sub-folders; images go into one sub-folder a class"
        )
    paths: list[Path] = []
    labels: list[int] = []
    for label, folder in enumerate(folders):
        found = sorted(p for p in folder.iterdir() if p.suffix.lower() in IMAGE_SUFFIXES)
        if not found:
            raise FileNotFoundError(f"no images ({', '.join(sorted(IMAGE_SUFFIXES))}) in {folder}")
        paths += found
        labels += [label] * len(found)
    return FileStore(tuple(paths), np.array(labels), tuple(folder.name for folder in folders))


def listed_images(
    path: Path, label_column: str, caption_column: str, num_classes: int | None
) -> FileStore:
    """Image files that a CSV or JSONL file names in its column `path`.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If a column or a value is missing, or a label is out of range.
    """
    rows = read_list(path)
    paths = listed_paths(path, rows)
    known = known_of(str(path), rows, label_column, caption_column, num_classes)
    return FileStore(paths, *known)


def read_list(path: Path) -> list[dict[str, Any]]:
    """The rows of a CSV file with a header, or of a JSONL file.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is neither, or has no rows.
    """
    if not path.is_file():
        raise FileNotFoundError(f"data.path {path} is not a file")
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            if path.suffix.lower() == ".csv":
                rows: list[Any] = list(csv.DictReader(file))
            elif path.suffix.lower() in (".jsonl", ".ndjson"):
                rows = [json.loads(line) for line in file if line.strip()]
            else:
                raise ValueError(f"data.path {path} must end in .csv or .jsonl")
    except (UnicodeDecodeError, csv.Error, json.JSONDecodeError) as error:
        raise ValueError(f"data.path {path} cannot be read: {error}") from error
    if not rows or not all(isinstance(row, dict) for row in rows):
        raise ValueError(f"data.path {path} must hold rows with named columns, at least one")
    return rows


def listed_paths(path: Path, rows: Sequence[dict[str, Any]]) -> tuple[Path, ...]:
    """The column `path` of a list; relative paths start at the folder of the list.

    Raises:
        ValueError: If it is missing.
    """
    require_column(str(path), rows, "path")
    for number, row in enumerate(rows, 1):
        if not row.get("path"):
            raise ValueError(f"{path}: row {number} has no path")
    return tuple(path.parent / row["path"] for row in rows)


def known_of(
    where: str,
    rows: Sequence[dict[str, Any]],
    label_column: str,
    caption_column: str,
    num_classes: int | None,
) -> Known:
    """Labels and captions of rows.

    Args:
        where: What messages call the rows.
        rows: One per image.
        label_column: Where labels are, if there are any.
        caption_column: Where captions are, if there are any.
        num_classes: See `number_classes`.

    Raises:
        ValueError: If there are neither, if some rows lack theirs, or a label is out of range.
    """
    columns = {name for row in rows for name in row}
    labels = class_names = captions = None
    if label_column in columns:
        labels, class_names = number_classes(
            where, [row.get(label_column) for row in rows], num_classes
        )
    if caption_column in columns:
        missing = [
            n for n, row in enumerate(rows, 1) if not isinstance(row.get(caption_column), str)
        ]
        if missing:
            raise ValueError(f"{where}: row {missing[0]} has no {caption_column}")
        captions = tuple(row[caption_column] for row in rows)
    if labels is None and captions is None:
        raise ValueError(
            f"{where} has no column {label_column} or {caption_column}, one of which images need; "
            f"found {', '.join(sorted(columns))}"
        )
    return Known(labels, class_names, captions)


def number_classes(
    where: str, values: Sequence[Any], num_classes: int | None
) -> tuple[np.ndarray, tuple[str, ...]]:
    """Class numbers and names of labels: whole numbers stay, names are numbered in their order.

    Args:
        where: What messages call the labels.
        values: Numbers, also as text, or names.
        num_classes: How many classes there are; None takes it from the labels.

    Raises:
        ValueError: If a label is missing or out of range.
    """
    texts = ["" if value is None else str(value).strip() for value in values]
    if "" in texts:
        raise ValueError(f"{where}: row {texts.index('') + 1} has no label")
    if not all(text.lstrip("-").isdigit() for text in texts):
        names = tuple(sorted(set(texts)))
        if num_classes not in (None, len(names)):
            raise ValueError(
                f"{where} has {len(names)} different labels, data.num_classes is {num_classes}"
            )
        numbers = {name: number for number, name in enumerate(names)}
        return np.array([numbers[text] for text in texts]), names
    labels = np.array([int(text) for text in texts])
    top = num_classes or int(labels.max()) + 1
    wrong = np.flatnonzero((labels < 0) | (labels >= top))
    if len(wrong):
        raise ValueError(
            f"{where}: row {wrong[0] + 1} has label {labels[wrong[0]]}, expected 0…{top - 1}"
        )
    return labels, tuple(map(str, range(top)))


def require_column(where: str, rows: Iterable[dict[str, Any]], name: str) -> None:
    """Raise unless a column exists."""
    columns = {column for row in rows for column in row}
    if name not in columns:
        raise ValueError(f"{where} has no column {name}; found {', '.join(sorted(columns))}")
