"""Reading images: every format that is usable, and one clear sentence for each that is not."""

import io
import struct
import zlib

import imageio.v3 as imageio
import numpy as np
import pytest
from PIL import Image

from mhla_gen.evaluation import load_images, sources
from mhla_gen.evaluation.errors import EvaluationError
from mhla_gen.evaluation.video import ClipRule, read_clip
from mhla_gen.media.pictures import UnreadableImageError, centre_crop, read_rgb


def noise(*shape):
    """The same bytes in any order of the tests."""
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


PIXELS = noise(6, 8, 8, 3)


def save(path, array, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path, **options)
    return path


def png16_colour(path):
    """A 16-bit RGB PNG, which Pillow reads but cannot write."""

    def chunk(kind, data):
        body = kind + data
        return struct.pack(">I", len(data)) + body + struct.pack(">I", zlib.crc32(body))

    rows = b"".join(b"\0" + row.tobytes() for row in noise(8, 8 * 6))
    header = struct.pack(">IIBBBBB", 8, 8, 16, 2, 0, 0, 0)
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(rows))
        + chunk(b"IEND", b"")
    )
    return path


def test_folders_are_read_recursively_and_sorted(tmp_path):
    for name, array in zip(("b/1.png", "a.png", "b/0.webp", "c.PNG"), PIXELS, strict=False):
        save(tmp_path / name, array, lossless=True)
    (tmp_path / "notes.txt").write_text("not an image")
    source = load_images(tmp_path)
    assert [source.label(i) for i in range(len(source))] == [
        "a.png",
        "b/0.webp",
        "b/1.png",
        "c.PNG",
    ]
    for index, expected in zip(range(4), PIXELS[[1, 2, 0, 3]], strict=True):
        np.testing.assert_array_equal(source.read(index), expected)


@pytest.mark.parametrize("writer", [np.savez, np.savez_compressed])
def test_npz_sample_sets_and_lists_hold_the_same_images(tmp_path, writer):
    writer(tmp_path / "all.npz", arr_0=PIXELS, labels=np.arange(6))
    (tmp_path / "set").mkdir()
    writer(tmp_path / "set" / "samples.npz", arr_0=PIXELS[:4])
    for index, array in enumerate(PIXELS[4:]):
        save(tmp_path / "rest" / f"{index}.png", array)
    joined = load_images([tmp_path / "set", tmp_path / "rest"])
    whole = load_images(str(tmp_path / "all.npz"))
    assert len(whole) == len(joined) == 6
    for index in range(6):
        np.testing.assert_array_equal(whole.read(index), PIXELS[index])
        np.testing.assert_array_equal(joined.read(index), PIXELS[index])


def test_uncompressed_npz_is_mapped_not_loaded(tmp_path):
    np.savez(tmp_path / "a.npz", labels=np.arange(3), arr_0=PIXELS)
    assert isinstance(load_images(tmp_path / "a.npz").read(0), np.memmap)


def test_digest_follows_content_and_order_not_names(tmp_path):
    for folder, names in (("x", "ab"), ("y", "cd"), ("z", "ba")):
        for name, array in zip(names, PIXELS, strict=False):
            save(tmp_path / folder / f"{name}.png", array)
    x, y, z = (load_images(tmp_path / folder).digest() for folder in "xyz")
    assert x == y != z
    changed = PIXELS.copy()
    changed[5, 0, 0, 0] ^= 1
    np.savez(tmp_path / "a.npz", arr_0=PIXELS)
    np.savez(tmp_path / "b.npz", arr_0=changed)
    assert load_images(tmp_path / "a.npz").digest() != load_images(tmp_path / "b.npz").digest()


def test_greyscale_palette_and_opaque_alpha_become_rgb(tmp_path):
    grey = PIXELS[0, :, :, 0]
    np.testing.assert_array_equal(
        read_rgb(save(tmp_path / "grey.png", grey)), np.stack([grey] * 3, axis=-1)
    )
    palette = Image.fromarray(PIXELS[0]).quantize(64)
    palette.save(tmp_path / "palette.png")
    np.testing.assert_array_equal(
        read_rgb(tmp_path / "palette.png"), np.asarray(palette.convert("RGB"))
    )
    opaque = np.dstack([PIXELS[0], np.full((8, 8), 255, np.uint8)])
    np.testing.assert_array_equal(read_rgb(save(tmp_path / "rgba.png", opaque)), PIXELS[0])


def test_transparent_and_deep_images_are_refused(tmp_path):
    clear = np.dstack([PIXELS[0], np.full((8, 8), 128, np.uint8)])
    with pytest.raises(UnreadableImageError, match="transparent pixels: compose it"):
        read_rgb(save(tmp_path / "clear.png", clear))
    for path in (
        save(tmp_path / "deep.png", PIXELS[0, :, :, 0].astype(np.uint16) * 256),
        png16_colour(tmp_path / "deep_colour.png"),
        save(tmp_path / "float.tiff", PIXELS[0, :, :, 0].astype(np.float32)),
    ):
        with pytest.raises(UnreadableImageError, match="more than 8 bits"):
            read_rgb(path)


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "bmp", "gif", "tiff"])
def test_truncated_files_are_unreadable(tmp_path, suffix):
    buffer = io.BytesIO()
    picture = Image.fromarray(noise(64, 64, 3))
    picture.save(buffer, {"jpg": "jpeg"}.get(suffix, suffix))
    path = tmp_path / f"cut.{suffix}"
    path.write_bytes(buffer.getvalue()[: len(buffer.getvalue()) // 3])
    with pytest.raises(UnreadableImageError, match="cannot be decoded"):
        read_rgb(path)


@pytest.mark.parametrize("size", [(100, 60), (61, 257), (33, 32), (32, 32), (20, 30)])
def test_centre_crop_is_adms(size):
    picture = Image.fromarray(noise(size[1], size[0], 3))
    found = centre_crop(picture, 32)
    assert found.size == (32, 32)
    # ADM's definition: halve with BOX while twice too large, scale by the shorter side, cut.
    expected = picture
    while min(expected.size) >= 64:
        expected = expected.resize(
            (expected.width // 2, expected.height // 2), Image.Resampling.BOX
        )
    scale = 32 / min(expected.size)
    expected = expected.resize(
        (round(expected.width * scale), round(expected.height * scale)), Image.Resampling.BICUBIC
    )
    array = np.asarray(expected)
    top, left = (array.shape[0] - 32) // 2, (array.shape[1] - 32) // 2
    np.testing.assert_array_equal(np.asarray(found), array[top : top + 32, left : left + 32])


def npz(path, **arrays):
    np.savez(path, **arrays)
    return path


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda d: d, "has no images"),
        (lambda d: d / "nowhere", "does not exist"),
        (lambda d: [], "at least one path"),
        (lambda d: npz(d / "a.npz", images=PIXELS), "no array 'arr_0'; it has images"),
        (lambda d: npz(d / "a.npz", arr_0=PIXELS / 255), "must be uint8 .* found float64"),
        (lambda d: npz(d / "a.npz", arr_0=PIXELS[..., 0]), r"found uint8 \[6, 8, 8\]"),
        (lambda d: npz(d / "a.npz", arr_0=PIXELS[:0]), "arr_0 is empty"),
        (lambda d: npz(d / "a.npz", arr_0=np.array([{}, {}])), "cannot be read"),
    ],
)
def test_sets_that_cannot_be_used_say_why(tmp_path, make, message):
    with pytest.raises(EvaluationError, match=message):
        load_images(make(tmp_path))


def test_sets_of_another_kind_are_refused_with_the_way_to_measure_them(tmp_path):
    # As `sample` writes a set of videos: with a picture of all beside them.
    made = tmp_path / "made"
    (made / "videos").mkdir(parents=True)
    (made / "manifest.json").write_text("{}")
    (made / "videos" / "000000.mp4").write_bytes(b"")
    Image.new("RGB", (8, 8)).save(made / "sheet.png")
    with pytest.raises(
        EvaluationError, match=r"a set of videos, .*extractor=i3d .* metrics=\[fvd\]"
    ):
        load_images(made)
    assert len(load_images(made, clip=ClipRule())) == 1
    with pytest.raises(EvaluationError, match=r"has no images .*1 × \.mp4; videos are measured by"):
        load_images(made / "videos")
    (made / "videos").rename(made / "images")
    with pytest.raises(EvaluationError, match="a set of images, not of videos; metrics of images"):
        load_images(made, clip=ClipRule())


def test_truncated_npz_says_so(tmp_path):
    whole = npz(tmp_path / "whole.npz", arr_0=PIXELS).read_bytes()
    (tmp_path / "cut.npz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(EvaluationError, match="truncated or not an npz file"):
        load_images(tmp_path / "cut.npz")


def test_clips_follow_the_frame_rule(tmp_path):
    # Grey levels tell frames apart after lossy coding.
    frames = np.stack([np.full((64, 64, 3), 10 * i, np.uint8) for i in range(20)])
    path = tmp_path / "ramp.mp4"
    imageio.imwrite(path, frames, fps=10, macro_block_size=1)
    clip = read_clip(path, ClipRule(frames=4, stride=5))
    assert clip.shape == (4, 64, 64, 3)
    np.testing.assert_allclose(clip.mean(axis=(1, 2, 3)), [0, 50, 100, 150], atol=6)
    with pytest.raises(UnreadableImageError, match=r"has 20 frames, .* needs 21"):
        read_clip(path, ClipRule(frames=21))
    (tmp_path / "cut.mp4").write_bytes(path.read_bytes()[:300])
    with pytest.raises(UnreadableImageError, match="cannot be decoded"):
        read_clip(tmp_path / "cut.mp4", ClipRule())


def test_clips_from_npz_follow_the_same_rule(tmp_path):
    videos = noise(2, 9, 8, 8, 3)
    source = load_images(npz(tmp_path / "v.npz", arr_0=videos), clip=ClipRule(3, 4))
    np.testing.assert_array_equal(source.read(1), videos[1, [0, 4, 8]])


@pytest.mark.parametrize("width", [32, 48, 64, 96, 100, 144, 176])
def test_clips_of_any_width_decode_to_what_was_encoded(tmp_path, width):
    ramp = np.linspace(0, 255, width).astype(np.uint8)
    picture = np.tile(ramp[None, :, None], (64, 1, 3))
    frames = np.stack([picture // (i + 1) for i in range(4)])
    options = {"fps": 8, "macro_block_size": 1, "quality": 9, "plugin": "FFMPEG"}
    imageio.imwrite(tmp_path / "clip.mp4", frames, **options)
    clip = read_clip(tmp_path / "clip.mp4", ClipRule(frames=2, stride=3))
    assert clip.shape == (2, 64, width, 3) and clip.dtype == np.uint8
    # Only compression is left.
    assert np.abs(clip.astype(int) - frames[[0, 3]]).mean() < 6


def test_grey_arrays_become_three_equal_channels(tmp_path):
    grey = noise(4, 8, 8, 1)
    source = load_images(npz(tmp_path / "grey.npz", arr_0=grey))
    assert (source.read(2) == np.repeat(grey[2], 3, axis=-1)).all()


def test_reading_for_a_digest_shows_how_far_it_is_once_it_takes_long(tmp_path, capsys, monkeypatch):
    for index, image in enumerate(PIXELS):
        Image.fromarray(image).save(tmp_path / f"{index}.png")
    for source in (load_images(tmp_path), load_images(npz(tmp_path / "all.npz", arr_0=PIXELS))):
        with monkeypatch.context() as patch:
            patch.setitem(sources._IF_LONG, "delay", 1000)
            expected = source.digest()
        assert "reading:" not in capsys.readouterr().err
        with monkeypatch.context() as patch:
            patch.setitem(sources._IF_LONG, "delay", 0)
            assert source.digest() == expected
        assert "reading:" in capsys.readouterr().err
