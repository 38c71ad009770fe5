"""Image files and arrays to RGB uint8; every lossy conversion is refused or documented."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import ExifTags, Image, ImageOps

from mhla_gen.errors import UserError

_NETPBM = frozenset((".ppm", ".pgm", ".pbm", ".pnm"))
IMAGE_SUFFIXES = _NETPBM | frozenset(
    (".png", ".apng", ".jpg", ".jpeg", ".jfif", ".webp", ".avif", ".bmp", ".gif", ".tif", ".tiff")
)

READING = 2
"""Number of the rules by which files become pixels: what is kept of pixels is named by it, too."""

# Pillow goes by content, and would hand what is called .png but is PostScript to Ghostscript.
_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM", "AVIF")
# Of these, further frames follow in time; in others they are thumbnails, depth maps, pages.
_ANIMATED = ("PNG", "WEBP", "GIF", "AVIF")
_PLAIN_MODES = ("1", "L", "P", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr")

# Browsers and FFmpeg show a frame this long if its file says less than the shortest delay.
_SHORTEST_DELAY, _USUAL_DELAY = 0.02, 0.1

# What Pillow does not say stands in front of the pixels.
_BEGINNING = 1 << 16

_TRANSPARENT = "has transparent pixels: compose it on a background first"


class UnreadableImageError(UserError):
    """One image or clip that cannot be used; the message says why."""


class LastingError(UnreadableImageError):
    """One that cannot be used however often it is read."""


def read_rgb(file: Path | BinaryIO, size: int | None = None) -> np.ndarray:
    """Decode an image file as a viewer shows it.

    Orientation tags are applied. Greyscale and palette images become RGB; an alpha channel is
    dropped if it is opaque. Colour profiles are not applied.

    Args:
        file: PNG, JPEG, WebP, BMP, GIF, TIFF, PNM or AVIF, whatever its name; the first frame of an
            animation counts.
        size: Side of ADM's centre crop, in pixels; None keeps the image as it is.

    Returns:
        uint8 [height, width, 3].

    Raises:
        UnreadableImageError: If it is corrupt, transparent, or deeper than 8 bits.
    """
    with _opened(file) as image:
        rgb = _upright_rgb(image)
    return np.asarray(rgb if size is None else centre_crop(rgb, size))


def frame_times(file: Path | BinaryIO) -> np.ndarray:
    """When each frame of an image file is shown, in seconds from 0 on, float64 `[frames]`.

    A delay of less than 20 ms is shown as 100 ms, as browsers do. A still image has one frame.

    Raises:
        UnreadableImageError: If it cannot be decoded.
    """
    delays = []
    with _opened(file) as image:
        for number in _frame_numbers(image):
            image.seek(number)
            image.load()
            delay = float(image.info.get("duration") or 0) / 1000
            delays.append(delay if delay >= _SHORTEST_DELAY else _USUAL_DELAY)
    return np.concatenate([[0.0], np.cumsum(delays[:-1])])


def read_frames_rgb(file: Path | BinaryIO, last: int) -> Iterator[np.ndarray]:
    """Frames of an image file up to number `last`, one after the other, as `read_rgb` has them.

    Raises:
        UnreadableImageError: If one of them cannot be decoded, or is transparent.
    """
    with _opened(file) as image:
        for number in _frame_numbers(image)[: last + 1]:
            image.seek(number)
            yield np.asarray(_upright_rgb(image))


@contextmanager
def _opened(file: Path | BinaryIO) -> Iterator[Image.Image]:
    """An image file, opened; whatever Pillow says of it becomes one reason."""
    Image.init()
    formats = [name for name in _FORMATS if name in Image.OPEN]
    try:
        with Image.open(file, formats=formats) as image:
            if _is_deep(image, file):
                raise UnreadableImageError(
                    "has more than 8 bits a channel: convert it to 8 bits first"
                )
            if _has_bare_canvas(image, file):
                raise UnreadableImageError(_TRANSPARENT)
            yield image
    except (UnreadableImageError, MemoryError):
        raise
    except Image.UnidentifiedImageError as error:
        # Pillow's message has the address of what was read from.
        known = ", ".join(formats)
        raise UnreadableImageError(f"cannot be decoded (damaged, or not {known})") from error
    except Image.DecompressionBombError as error:
        limit = 2 * (Image.MAX_IMAGE_PIXELS or 0)
        raise UnreadableImageError(f"has over {limit:,} pixels: scale it down first") from error
    except OSError as error:
        # Only what the system says has a number: the file, not its content, is to blame.
        doing = "decoded" if error.errno is None else "read"
        raise UnreadableImageError(f"cannot be {doing} ({_reason(error)})") from error
    except Exception as error:  # decoders raise whatever they like about a broken file
        raise UnreadableImageError(f"cannot be decoded ({_reason(error)})") from error


def _reason(error: Exception) -> str:
    said = getattr(error, "strerror", None) or str(error)
    return said.strip().splitlines()[0] if said.strip() else type(error).__name__


def _is_deep(image: Image.Image, file: Path | BinaryIO) -> bool:
    """Whether it has more than 8 bits a channel, which Pillow silently cuts for some formats."""
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        return True
    arguments = [tile[-1] for tile in getattr(image, "tile", ())]
    if image.format == "PPM":
        # The second argument of its decoders is the largest value.
        levels = [a[1] for a in arguments if isinstance(a, tuple) and len(a) > 1]
        return any(isinstance(level, int) and level > 255 for level in levels)
    if image.format == "AVIF":
        return _is_deep_avif(file)
    # Only the raw mode tells.
    return ";16" in str(arguments)


def _is_deep_avif(file: Path | BinaryIO) -> bool:
    # AV1 in ISOBMFF, 2.3.3: two bytes on, a bit says that there are more than 8 bits.
    starts = [part[2:3] for part in _beginning(file).split(b"av1C")[1:]]
    return any(start and start[0] & 0x40 for start in starts)


def _has_bare_canvas(image: Image.Image, file: Path | BinaryIO) -> bool:
    """Whether the first frame of a WebP leaves some of it open, which Pillow shows as black."""
    if image.format != "WEBP" or image.mode != "RGB" or getattr(image, "n_frames", 1) == 1:
        return False
    # A frame begins with its place in units of two pixels, then its size less one, 24 bits each.
    frame = _beginning(file).partition(b"ANMF")[2][4:16]
    left, top, width, height = (int.from_bytes(frame[i : i + 3], "little") for i in (0, 3, 6, 9))
    return bool(left or top) or (width + 1, height + 1) != image.size


def _beginning(file: Path | BinaryIO) -> bytes:
    if isinstance(file, Path):
        with file.open("rb") as opened:
            return opened.read(_BEGINNING)
    place = file.tell()
    file.seek(0)
    content = file.read(_BEGINNING)
    file.seek(place)
    return content


def _frame_numbers(image: Image.Image) -> range:
    if image.format not in _ANIMATED:
        return range(1)
    # An animated PNG may begin with a picture for those who cannot show it move.
    return range(1 if image.info.get("default_image") else 0, getattr(image, "n_frames", 1))


def _upright_rgb(image: Image.Image) -> Image.Image:
    image.load()
    if _orientation(image) != 1:
        image = ImageOps.exif_transpose(image)
    if image.has_transparency_data:
        image = opaque(image.convert("RGBA"))
    if image.mode not in _PLAIN_MODES:
        raise UnreadableImageError(f"has colour mode {image.mode}: convert it to RGB first")
    return image.convert("RGB")


def opaque(image: Image.Image) -> Image.Image:
    """The colours of an RGBA image.

    Raises:
        UnreadableImageError: If some of it is transparent.
    """
    if image.getchannel("A").getextrema() != (255, 255):
        raise UnreadableImageError(_TRANSPARENT)
    return image.convert("RGB")


def _orientation(image: Image.Image) -> int:
    try:
        return image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # notes about a picture that are broken say nothing, and the picture is good
        return 1


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
