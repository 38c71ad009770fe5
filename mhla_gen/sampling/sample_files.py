"""Files of a sample set: one npz, or an image or video each; and the contact sheet."""

import zipfile
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from numpy.lib import format as npy
from PIL import Image

from mhla_gen.files import write_picture, written_whole
from mhla_gen.media.videos import shown_frames
from mhla_gen.sampling.contact_sheet import contact_sheet

SAMPLES_NAME = "samples.npz"
SHEET_NAME = "samples.png"
IMAGES_NAME, VIDEOS_NAME = "images", "videos"
# All zip files of the same samples are the same bytes.
_EPOCH = (1980, 1, 1, 0, 0, 0)


def write_samples(
    path: Path, parts: Iterable[np.ndarray], shape: tuple[int, ...], labels: np.ndarray | None
) -> None:
    """Write `arr_0`, and `labels` if there are any, in the layout that evaluation tools read.

    Args:
        path: npz file; it is there whole or not at all.
        parts: uint8 `[samples, …]`, one after the other; only one is in memory at a time.
        shape: Of all samples together.
        labels: Class numbers `[samples]`.
    """
    with written_whole(path) as partial, zipfile.ZipFile(partial, "w") as archive:
        header = {"descr": "|u1", "fortran_order": False, "shape": shape}
        entry = zipfile.ZipInfo("arr_0.npy", _EPOCH)
        with archive.open(entry, "w", force_zip64=True) as file:
            npy.write_array_header_1_0(file, header)
            for part in parts:
                file.write(np.ascontiguousarray(part).data)
        if labels is not None:
            with archive.open(zipfile.ZipInfo("labels.npy", _EPOCH), "w") as file:
                npy.write_array(file, labels)


def file_of(folder: Path, number: int, kind: str) -> Path:
    """The path of a sample with a file of its own."""
    return folder / (VIDEOS_NAME if kind == "mp4" else IMAGES_NAME) / f"{number:06d}.{kind}"


def write_image(path: Path, pixels: np.ndarray) -> None:
    """Write a PNG file of uint8 `[height, width, 3 or 1]`, whole or not at all."""
    write_picture(path, Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels))


def sheet_part(pixels: np.ndarray) -> np.ndarray:
    """What the contact sheet shows of a sample: the image or a few frames, `[images, …]`."""
    return pixels[None] if pixels.ndim == 3 else shown_frames(pixels)


def write_sheet(path: Path, rows: Sequence[tuple[str, np.ndarray]], is_video: bool) -> None:
    """Draw the contact sheet, one titled row of images after the other."""
    names, images = [name for name, _ in rows], [part for _, part in rows]
    width = images[0].shape[2]
    title = "frames from first to last" if is_video else "samples"
    sheet = contact_sheet(
        {title: images}, names, per_row=max(map(len, images)), tile_size=min(max(48, width), 192)
    )
    write_picture(path, sheet)
