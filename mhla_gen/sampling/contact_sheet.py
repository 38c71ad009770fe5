"""One picture of many images: a row per class, columns in titled groups."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from mhla_gen.errors import one_line

_GAP = 2
# It comes with matplotlib and has the letters of most languages; Pillow's own lacks even ×.
_FONT = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"
_FONT_SIZE = 16


def contact_sheet(
    groups: Mapping[str, Sequence[np.ndarray]],
    row_names: Sequence[str],
    *,
    per_row: int = 10,
    tile_size: int = 48,
) -> Image.Image:
    """Lay images out in rows by class and in groups side by side.

    Small images are enlarged by a whole factor, smoothly: eyes read shapes, not squares. Those
    wider than twice `tile_size` are scaled down to it.

    Args:
        groups: Title → one array of images per row, uint8 `[images, height, width, channels]`.
        row_names: Label of each row; shown on one line, and long ones cut.
        per_row: Most images of a group in a row.
        tile_size: Least width of an image in the picture, in pixels.
    """
    font = ImageFont.truetype(_FONT, _FONT_SIZE)
    row_names = [one_line(name) for name in row_names]
    shapes = [rows.shape[1:3] for group in groups.values() for rows in group] or [(1, 1)]
    tall, widest = max(h for h, _ in shapes), max(w for _, w in shapes)
    scale = _scale(widest, tile_size)
    tile = round(widest * scale), round(tall * scale)
    columns = {
        title: min(per_row, max(map(len, group), default=0)) for title, group in groups.items()
    }
    margin = int(max(font.getlength(name) for name in row_names)) + 2 * _GAP
    header = _FONT_SIZE + 3 * _GAP
    width = margin + sum(n * (tile[0] + _GAP) + 4 * _GAP for n in columns.values())
    height = header + len(row_names) * (tile[1] + _GAP) + _GAP
    sheet = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(sheet)
    for row, name in enumerate(row_names):
        middle = header + row * (tile[1] + _GAP) + tile[1] // 2
        draw.text((_GAP, middle), name, fill="black", font=font, anchor="lm")
    left = margin
    for title, group in groups.items():
        draw.text((left, _GAP), title, fill="black", font=font)
        for row, images in enumerate(group):
            for column, image in enumerate(images[:per_row]):
                position = left + column * (tile[0] + _GAP), header + row * (tile[1] + _GAP)
                sheet.paste(_tile(image, tile), position)
        left += columns[title] * (tile[0] + _GAP) + 4 * _GAP
    return sheet


def rows_by_class(
    images: np.ndarray, labels: np.ndarray, classes: Sequence[int]
) -> list[np.ndarray]:
    """The images of each class, in the order of `classes`."""
    return [images[labels == c] for c in classes]


def _scale(width: int, tile_size: int) -> float:
    if width > 2 * tile_size:
        return tile_size / width
    return max(1, -(-tile_size // width))


def _tile(image: np.ndarray, size: tuple[int, int]) -> Image.Image:
    picture = Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image).convert("RGB")
    return picture.resize(size, Image.Resampling.BICUBIC)
