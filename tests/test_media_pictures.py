"""What an image file shows, by one rule for training, sampling and evaluation."""

import io
import subprocess

import imageio_ffmpeg
import numpy as np
import pytest
from diffusers.utils import load_image
from PIL import Image

from mhla_gen.media.pictures import (
    UnreadableImageError,
    frame_times,
    read_frames_rgb,
    read_rgb,
)


def noise(*shape):
    """The same bytes in any order of the tests."""
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


PIXELS = noise(12, 20, 3)


def encoded(array, kind, **options):
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, kind, **options)
    return buffer.getvalue()


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF", "AVIF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_pictures_are_turned_as_diffusers_turns_them(kind, orientation, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / "photo"
    path.write_bytes(encoded(PIXELS, kind, exif=exif))
    found = read_rgb(path)
    assert found.shape == ((12, 20, 3) if orientation <= 4 else (20, 12, 3))
    np.testing.assert_array_equal(found, np.asarray(load_image(str(path))))


def test_a_broken_orientation_tag_costs_no_picture():
    content = encoded(PIXELS, "PNG", exif=b"Exif\0\0junk that is no TIFF header")
    np.testing.assert_array_equal(read_rgb(io.BytesIO(content)), PIXELS)


def test_more_than_8_bits_are_refused_whatever_the_format(tmp_path):
    deep = {
        "a.avif": "-pix_fmt yuv420p10le -c:v libaom-av1 -still-picture 1",
        "b.avif": "-pix_fmt yuv444p12le -c:v libaom-av1 -still-picture 1",
        "a.ppm": "-pix_fmt rgb48be",
        "a.pgm": "-pix_fmt gray16be",
        "a.tif": "-pix_fmt rgb48le",
        "a.png": "-pix_fmt rgba64be",
    }
    plain = {"c.avif": "-pix_fmt yuv420p -c:v libaom-av1 -still-picture 1", "b.ppm": ""}
    for name, options in (deep | plain).items():
        source = ["-v", "error", "-f", "lavfi", "-i", "testsrc=s=64x48", "-frames:v", "1"]
        command = [imageio_ffmpeg.get_ffmpeg_exe(), *source, *options.split()]
        subprocess.run([*command, str(tmp_path / name)], check=True)
    for name in plain:
        assert read_rgb(tmp_path / name).shape == (48, 64, 3)
    for name in deep:
        with pytest.raises(UnreadableImageError, match="more than 8 bits a channel"):
            read_rgb(tmp_path / name)
        with pytest.raises(UnreadableImageError, match="more than 8 bits a channel"):
            read_rgb(io.BytesIO((tmp_path / name).read_bytes()))


def test_a_grey_level_of_fewer_bits_is_spread():
    content = b"P5 2 1 15\n" + bytes([0, 15])
    assert read_rgb(io.BytesIO(content))[0, :, 0].tolist() == [0, 255]


def test_an_avif_whose_end_is_missing_is_unreadable():
    content = encoded(noise(64, 64, 3), "AVIF")
    for end in range(200, len(content) - 8, len(content) // 12):
        with pytest.raises(UnreadableImageError, match="cannot be decoded"):
            read_rgb(io.BytesIO(content[:end]))
    # Pillow has an error of its own kind for a file whose container is whole, and nothing else.
    start = content.index(b"mdat") + 4
    with pytest.raises(UnreadableImageError, match="color planes"):
        read_rgb(io.BytesIO(content[:start] + bytes(len(content) - start)))


def test_what_is_too_large_says_what_to_do(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(UnreadableImageError, match="over 200 pixels: scale it down first"):
        read_rgb(io.BytesIO(encoded(PIXELS, "PNG")))


def test_only_formats_of_pictures_are_opened(tmp_path):
    path = tmp_path / "a.png"
    path.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n")
    with pytest.raises(UnreadableImageError, match="not PNG, JPEG"):
        read_rgb(path)


def test_a_file_that_is_not_there_is_unreadable(tmp_path):
    (tmp_path / "a.png").symlink_to(tmp_path / "nowhere.png")
    with pytest.raises(UnreadableImageError, match=r"cannot be read \(No such file"):
        read_rgb(tmp_path / "a.png")


def moving(clear):
    frames = [Image.new("RGBA", (16, 12), (0, 0, 0, 0 if clear else 255)) for _ in range(4)]
    for i, frame in enumerate(frames):
        frame.paste((255, 40 * i, 0, 255), (2 * i, 2, 2 * i + 6, 8))
    return frames


def animated(frames, kind, **options):
    buffer = io.BytesIO()
    frames[0].save(buffer, kind, save_all=True, append_images=frames[1:], **options)
    return io.BytesIO(buffer.getvalue())


@pytest.mark.parametrize(
    ("kind", "options"),
    [("GIF", {"disposal": 2}), ("WEBP", {"lossless": True}), ("PNG", {}), ("TIFF", {})],
)
def test_transparency_is_refused_by_one_rule(kind, options):
    options = options | ({} if kind == "TIFF" else {"duration": [100, 40, 5, 200]})
    clear = animated(moving(True), kind, **options)
    for read in (read_rgb, lambda file: list(read_frames_rgb(file, 3))):
        with pytest.raises(UnreadableImageError, match="transparent pixels"):
            read(clear)
    holed = moving(True)
    for i, frame in enumerate(holed):
        # Inside of what the frames of a WebP cover.
        frame.putpixel((2 * i + 3, 4), (0, 0, 0, 0))
    with pytest.raises(UnreadableImageError, match="transparent pixels"):
        read_rgb(animated(holed, kind, **options))
    solid = animated(moving(False), kind, **options)
    found, times = list(read_frames_rgb(solid, 99)), frame_times(solid)
    if kind == "TIFF":
        # Its further pictures are pages.
        assert len(found) == len(times) == 1
        return
    np.testing.assert_allclose(times, [0, 0.1, 0.14, 0.24], atol=1e-9)
    for frame, expected in zip(found, moving(False), strict=True):
        np.testing.assert_array_equal(frame, np.asarray(expected.convert("RGB")))
    np.testing.assert_array_equal(read_rgb(solid), found[0])
