"""One image file or array → RGB uint8, with every lossy conversion refused or named."""

import struct
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image, UnidentifiedImageError

IMAGE_SUFFIXES = frozenset(
    (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".avif")
)

_DECODE_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    struct.error,
    Image.DecompressionBombError,
)


class UnreadableImageError(ValueError):
    """One image or clip that cannot be used; the message says why."""


def read_rgb(file: Path | BinaryIO, size: int | None = None) -> np.ndarray:
    """Decode an image file.

    Greyscale and palette images become RGB; an alpha channel is dropped if it is opaque.
    Orientation tags are ignored, as in ADM.

    Args:
        file: Of a format that Pillow reads; the first frame of an animation counts.
        size: Side of ADM's centre crop, in pixels; None keeps the image as it is.

    Returns:
        uint8 [height, width, 3].

    Raises:
        UnreadableImageError: If it is corrupt, transparent, or deeper than 8 bits.
    """
    try:
        with Image.open(file) as image:
            # Pillow cuts 16-bit colour to 8 bits in silence; only the raw mode tells.
            deep = ";16" in str([tile[-1] for tile in getattr(image, "tile", ())])
            image.load()
            rgb = _to_rgb(image, deep)
    except UnreadableImageError:
        raise
    except UnidentifiedImageError as error:
        # Pillow's message has the address of what was read from.
        raise UnreadableImageError("cannot be decoded (not an image that Pillow knows)") from error
    except _DECODE_ERRORS as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UnreadableImageError(f"cannot be decoded ({reason})") from error
    return np.asarray(rgb if size is None else centre_crop(rgb, size))


def _to_rgb(image: Image.Image, deep: bool) -> Image.Image:
    if deep or image.mode in ("I", "F") or image.mode.startswith("I;16"):
        raise UnreadableImageError("has more than 8 bits a channel: convert it to 8 bits first")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        if image.getchannel("A").getextrema() != (255, 255):
            raise UnreadableImageError("has transparent pixels: compose it on a background first")
    if image.mode not in ("1", "L", "P", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr"):
        raise UnreadableImageError(f"has colour mode {image.mode}: convert it to RGB first")
    return image.convert("RGB")


def centre_crop(image: Image.Image, size: int) -> Image.Image:
    """Scale the shorter side to `size` pixels and cut the middle square, as ADM does.

    Halved by averaging while both sides stay at least twice `size`, then bicubic.

    Source:
        Dhariwal and Nichol 2021, arXiv:2105.05233, `center_crop_arr` of their released code.
    """
    width, height = image.size
    while min(width, height) >= 2 * size:
        width, height = width // 2, height // 2
        image = image.resize((width, height), Image.Resampling.BOX)
    scale = size / min(width, height)
    width, height = round(width * scale), round(height * scale)
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = (width - size) // 2, (height - size) // 2
    return image.crop((left, top, left + size, top + size))


def crop_array(pixels: np.ndarray, size: int | None) -> np.ndarray:
    """`centre_crop` of uint8 [height, width, 3]; None, or that size already, changes nothing."""
    if size is None or pixels.shape[:2] == (size, size):
        return pixels
    return np.asarray(centre_crop(Image.fromarray(pixels), size))
