"""Images of a data set that Hugging Face's `datasets` saved to a folder."""

import importlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mhla_gen.config import DataConfig
from mhla_gen.data.lists import Known, known_of
from mhla_gen.errors import MissingError, UserError
from mhla_gen.files.text import Row


@dataclass(frozen=True, eq=False)
class HuggingFaceStore:
    """Images of a table; see `ImageStore`."""

    images: Any
    """Its image column, not decoded: rows of `bytes` and `path`."""
    name: str
    labels: np.ndarray | None
    class_names: tuple[str, ...] | None
    captions: tuple[str, ...] | None

    def __len__(self) -> int:
        return len(self.images)

    def describe(self, index: int) -> str:
        """See `ImageStore`."""
        return f"{self.name}: row {index}"

    def content(self, index: int) -> bytes:
        """See `ImageStore`."""
        image = next(iter(self.images[index].values()))
        if image is None:
            raise OSError("is missing")
        return image["bytes"] or Path(image["path"]).read_bytes()


def saved_dataset(config: DataConfig) -> HuggingFaceStore:
    """Open a folder that `Dataset.save_to_disk` or `DatasetDict.save_to_disk` wrote.

    Raises:
        FileNotFoundError: If there is none.
        ValueError: If `datasets` is not installed, or a split or a column is missing.
    """
    try:
        datasets = importlib.import_module("datasets")
    except ModuleNotFoundError as error:
        raise UserError(
            'data.source=huggingface needs the package datasets: pip install "mhla_gen[datasets]"'
        ) from error
    try:
        table = datasets.load_from_disk(str(config.path))
    except FileNotFoundError as error:
        raise MissingError(
            f"data.path {config.path} is not a folder that datasets saved to disk"
        ) from error
    if isinstance(table, datasets.DatasetDict):
        if config.split not in table:
            splits = ", ".join(map(str, table))
            raise UserError(f"{config.path} has no split {config.split}; found {splits}")
        table = table[config.split]
    name = str(config.path)
    feature = table.features.get(config.image_column)
    if not isinstance(feature, datasets.Image):
        found = ", ".join(table.column_names)
        raise UserError(f"{name} has no column {config.image_column} of images; found {found}")
    images = table.select_columns(config.image_column)
    images = images.cast_column(config.image_column, datasets.Image(decode=False))
    return HuggingFaceStore(images, name, *_known(table, config, datasets.ClassLabel))


def _known(table: Any, config: DataConfig, class_label: type) -> Known:
    wanted = (config.label_column, config.caption_column)
    columns = [c for c in wanted if c in table.column_names]
    if not columns:
        found = ", ".join(table.column_names)
        raise UserError(f"{config.path} has no column {' or '.join(wanted)}; found {found}")
    values = table.select_columns(columns).to_list()
    rows = [Row(f"{config.path}, row {number}", row) for number, row in enumerate(values, 1)]
    feature = table.features.get(config.label_column)
    names = tuple(feature.names) if isinstance(feature, class_label) else None
    count = len(names) if names else config.num_classes
    known = known_of(str(config.path), rows, *wanted, count)
    return known._replace(class_names=names) if names else known
