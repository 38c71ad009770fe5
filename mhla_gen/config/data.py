"""Settings of data sets."""

from dataclasses import dataclass
from typing import Literal

from mhla_gen.config.checks import check_choice


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """The images to learn from, with one class label each.

    Raises:
        ValueError: If the source needs a path or a size that is not given.
    """

    source: Literal["digits", "npz", "folder"] = "digits"
    """digits: scikit-learn's 1,797 handwritten digits, 8 × 8, grey. npz: a file with `arr_0` (uint8
    `[images, height, width, channels]`) and `labels`. folder: one sub-folder of images a class."""
    path: str | None = None
    """The npz file or the folder of class folders."""
    image_size: int | None = None
    """Side of the square images in pixels. A folder's images are cropped and resized to it; the
    other sources have a size, and a number given here must equal it."""
    horizontal_flip: bool = False
    """Mirror every image with probability one half."""

    def __post_init__(self):
        check_choice("data.source", self.source, ("digits", "npz", "folder"))
        if self.source != "digits" and self.path is None:
            raise ValueError(f"data.source={self.source} needs data.path")
        if self.source == "folder" and self.image_size is None:
            raise ValueError("data.source=folder needs data.image_size, in pixels")
