"""Lists of images or clips: files, labels, captions."""

import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mhla_gen.config.fields import expand_home
from mhla_gen.errors import MissingError, UserError
from mhla_gen.files.text import Row, read_csv, read_jsonl

MOST_CLASSES = 1_000_000
"""More are identifiers, and no classes that a model can have an embedding for."""
_NUMBER = re.compile(r"[-+]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][-+]?[0-9]+)?")


class Known(NamedTuple):
    """Labels and captions of all images, as `ImageStore` has them."""

    labels: np.ndarray | None
    class_names: tuple[str, ...] | None
    captions: tuple[str, ...] | None


def read_list(path: Path) -> list[Row]:
    """The rows of a CSV file with a header, or of a JSONL file.

    Raises:
        MissingError: If there is no such file.
        UserError: If it is neither, or has no rows.
    """
    if not path.is_file():
        raise MissingError(f"data.path {path} is not a file")
    readers = {".csv": read_csv, ".jsonl": read_jsonl, ".ndjson": read_jsonl}
    if path.suffix.lower() not in readers:
        raise UserError(f"data.path {path} must end in .csv or .jsonl")
    rows = readers[path.suffix.lower()](path, "data.path")
    if not rows:
        raise UserError(f"data.path {path} must have at least one row, and named columns")
    return rows


def listed_paths(path: Path, rows: Sequence[Row]) -> tuple[Path, ...]:
    """The column `path` of a list; relative paths start at the folder of the list.

    Raises:
        UserError: If it is missing, or holds something else.
    """
    if not any("path" in row.values for row in rows):
        raise UserError(f"{path} has no column path; found {', '.join(_columns(rows))}")
    return tuple(_listed_path(path.parent, row) for row in rows)


def _listed_path(folder: Path, row: Row) -> Path:
    name = row.values.get("path")
    if name is None or name == "":
        raise UserError(f"{row.place} has no path")
    if not isinstance(name, str) or "\0" in name:
        raise UserError(f"{row.place} must have a file in path, found {name!r}")
    if "://" in name:
        raise UserError(f"{row.place} has the address {name}; download the files and list those")
    return folder / expand_home(row.place, name)


def known_of(
    where: str,
    rows: Sequence[Row],
    label_column: str,
    caption_column: str,
    num_classes: int | None,
) -> Known:
    """Labels and captions of rows.

    Args:
        where: What messages call all of them.
        rows: One per image.
        label_column: Where labels are, if there are any.
        caption_column: Where captions are, if there are any.
        num_classes: See `number_classes`.

    Raises:
        UserError: If there are neither, if some rows lack theirs, or a label is out of range.
    """
    columns = _columns(rows)
    labels = class_names = captions = None
    if label_column in columns:
        places = [row.place for row in rows]
        values = [row.values.get(label_column) for row in rows]
        labels, class_names = number_classes(where, places, values, num_classes)
    if caption_column in columns:
        for row in rows:
            if not isinstance(row.values.get(caption_column), str):
                raise UserError(f"{row.place} has no {caption_column}")
        captions = tuple(row.values[caption_column] for row in rows)
    if labels is None and captions is None:
        raise UserError(
            f"{where} has no column {label_column} or {caption_column}, one of which is required; "
            f"found {', '.join(columns)}"
        )
    return Known(labels, class_names, captions)


def number_classes(
    where: str, places: Sequence[str], values: Sequence[Any], num_classes: int | None
) -> tuple[np.ndarray, tuple[str, ...]]:
    """Class numbers and names of labels: whole numbers stay, names are numbered alphabetically.

    Args:
        where: What messages call all labels.
        places: What messages call each of them.
        values: Numbers, also as text and as 3.0, or names.
        num_classes: How many classes there are; None takes it from the labels.

    Raises:
        UserError: If a label is missing, is neither, or is out of range.
    """
    texts = [_label(place, value) for place, value in zip(places, values, strict=True)]
    if not all(_NUMBER.fullmatch(text) for text in texts):
        names = tuple(sorted(set(texts)))
        if num_classes not in (None, len(names)):
            raise UserError(
                f"{where} has {len(names)} different labels, data.num_classes is {num_classes}"
            )
        numbers = {name: number for number, name in enumerate(names)}
        return np.array([numbers[text] for text in texts]), names
    labels = [_class_number(place, text) for place, text in zip(places, texts, strict=True)]
    top = min(max(labels) + 1, MOST_CLASSES) if num_classes is None else num_classes
    for place, label in zip(places, labels, strict=True):
        if not 0 <= label < top:
            raise UserError(f"{place} has label {label}, expected 0…{max(top, 1) - 1}")
    return np.array(labels), tuple(map(str, range(top)))


def _label(place: str, value: Any) -> str:
    missing = value is None or (isinstance(value, float) and math.isnan(value))
    text = "" if missing else str(value).strip()
    if text.lower() in ("", "nan"):
        raise UserError(f"{place} has no label" + (f", found {value!r}" if text else ""))
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise UserError(f"{place} must have a class number or name as label, found {value!r}")
    return text


def _class_number(place: str, text: str) -> int:
    number = float(text)
    if not number.is_integer():
        raise UserError(f"{place} has label {text}; class numbers must be whole")
    # Digits beyond those of a float are no class number either.
    return int(number)


def _columns(rows: Sequence[Row]) -> list[str]:
    return sorted({name for row in rows for name in row.values})
