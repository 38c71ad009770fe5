"""Damaged images and videos: pixels come out, or one of our own errors, and nothing else.

`python tests/test_fuzz_media.py 100000 [seed]` tries so many inputs; it keeps what breaks the rule.
"""

import io
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import imageio_ffmpeg
import numpy as np
import pytest
from PIL import Image

from mhla_gen.media import Decoder
from mhla_gen.media.pictures import (
    UnreadableImageError,
    frame_times,
    read_frames_rgb,
    read_rgb,
)

SIDE = 24

# What Pillow says of damaged tags, and of sizes that are wrong.
pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
]


def pictures():
    """Small images of every format, by name."""
    rng = np.random.default_rng(0)
    smooth = np.add.outer(np.arange(SIDE) * 7, np.arange(SIDE) * 3).astype(np.uint8)
    colours = np.stack([smooth, smooth.T, rng.integers(0, 256, smooth.shape, np.uint8)], -1)
    first = Image.fromarray(colours)
    more = [Image.fromarray(np.roll(colours, 5 * i, 1)) for i in range(1, 4)]
    exif = Image.Exif()
    exif[0x0112], exif[0x010F] = 6, "maker"
    moving = {"save_all": True, "append_images": more, "duration": 60}
    kinds = [
        ("PNG", first, {"exif": exif}),
        ("PNG", first.quantize(16), {"transparency": 3}),
        ("PNG", first, moving),
        ("JPEG", first, {"exif": exif, "quality": 80}),
        ("JPEG", first.convert("CMYK"), {"progressive": True}),
        ("WEBP", first, {"exif": exif}),
        ("WEBP", first, {"lossless": True} | moving),
        ("AVIF", first, {"exif": exif, "speed": 10}),
        ("AVIF", first, {"speed": 10} | moving),
        ("BMP", first, {}),
        ("BMP", first.quantize(16), {}),
        ("GIF", first, moving),
        ("TIFF", first, {"compression": "tiff_lzw"}),
        ("TIFF", first, {"compression": "tiff_jpeg"}),
        ("TIFF", first, {"tiffinfo": {0x0112: 5}}),
        ("PPM", first, {}),
        ("PPM", first.convert("L"), {}),
        ("PPM", first.convert("1"), {}),
    ]
    found = []
    for kind, image, options in kinds:
        buffer = io.BytesIO()
        image.save(buffer, kind, **options)
        found.append((kind.lower(), buffer.getvalue()))
    return found


def videos():
    """Short videos in several containers, by suffix."""
    found = []
    with tempfile.TemporaryDirectory() as folder:
        for suffix, options in {
            "mp4": "-c:v libx264 -g 4 -pix_fmt yuv420p",
            "mov": "-c:v mjpeg",
            "mkv": "-c:v libx265 -x265-params log-level=none",
            "webm": "-c:v libvpx -g 4",
            "ts": "-c:v libx264 -g 4 -pix_fmt yuv420p",
            "avi": "-c:v mpeg4 -bf 2",
            "mpg": "-c:v mpeg2video",
            "flv": "-c:v flv",
        }.items():
            source = f"-v error -f lavfi -i testsrc2=s={SIDE * 2}x{SIDE * 2}:r=24:d=0.5".split()
            path = Path(folder, f"a.{suffix}")
            # The same bytes each time and everywhere: no random marks, and one thread.
            options = [*options.split(), "-fflags", "+bitexact", "-threads", "1", str(path)]
            command = [imageio_ffmpeg.get_ffmpeg_exe(), *source, *options]
            subprocess.run(command, check=True)
            found.append((suffix, path.read_bytes()))
    return found


def damaged(content, rng):
    """A file with one to eight things wrong with it."""
    content = bytearray(content)
    for _ in range(1 + rng.integers(8) * rng.integers(2)):
        start = int(rng.integers(len(content))) if content else 0
        # Headers are short, and most is decided in them.
        start = start % 64 if rng.random() < 0.4 else start
        stop = start + int(rng.integers(1, 65))
        match rng.integers(8):
            case 0:
                del content[start:]
            case 1:
                del content[start:stop]
            case 2:
                content[start:stop] = bytes(stop - start)
            case 3:
                content[start:stop] = rng.bytes(stop - start)
            case 4:
                content[start:start] = rng.bytes(stop - start)
            case 5:
                content[start:start] = content[start:stop]
            case 6:
                content[start : start + 1] = bytes([int(rng.integers(256))])
            case _ if start < len(content):
                content[start] ^= 1 << int(rng.integers(8))
    if rng.random() < 0.02:
        return bytes(content[:8]) + rng.bytes(int(rng.integers(300)))
    return bytes(content)


def read_picture(content):
    """One reason or "read"; anything else than our error leaves as it came."""
    try:
        pixels = read_rgb(io.BytesIO(content))
        assert pixels.dtype == np.uint8 and pixels.ndim == 3 and pixels.shape[2] == 3
        times = frame_times(io.BytesIO(content))
        assert times[0] == 0 and (np.diff(times) > 0).all()
        frames = list(read_frames_rgb(io.BytesIO(content), 2))
        assert all(frame.dtype == np.uint8 and frame.ndim == 3 for frame in frames)
    except UnreadableImageError as error:
        return checked_reason(error)
    return "read"


def read_video(path, decoder):
    """As `read_picture`, of a video."""
    try:
        facts = decoder.facts(path)
        count = len(facts.times)
        assert facts.times[0] == 0 and (np.diff(facts.times) >= 0).all()
        frames = decoder.frames(path, [0, count // 2, count - 1], None)
        assert frames.shape == (3, facts.height, facts.width, 3) and frames.dtype == np.uint8
    except UnreadableImageError as error:
        return checked_reason(error)
    return "read"


def checked_reason(error):
    reason = str(error)
    assert reason and "\n" not in reason and "object at 0x" not in reason, reason
    return reason.split("(")[0].strip()


@pytest.mark.parametrize("number", range(len(pictures())))
def test_damaged_pictures_are_read_or_refused(number):
    kind, content = pictures()[number]
    assert read_picture(content) == ("read" if number != 1 else read_picture(content)), kind
    rng = np.random.default_rng(number)
    outcomes = Counter(read_picture(damaged(content, rng)) for _ in range(110))
    assert len(outcomes) > 1, outcomes


def test_noise_is_refused():
    rng = np.random.default_rng(0)
    for size in (0, 1, 7, 100, 5000):
        with pytest.raises(UnreadableImageError):
            read_rgb(io.BytesIO(rng.bytes(size)))


def test_damaged_videos_are_read_or_refused(tmp_path):
    rng, outcomes = np.random.default_rng(0), Counter()
    with Decoder(timeout=30) as decoder:
        for number, (suffix, content) in enumerate(videos()):
            path = tmp_path / f"whole-{number}.{suffix}"
            path.write_bytes(content)
            assert read_video(path, decoder) == "read", suffix
            for trial in range(4):
                path = tmp_path / f"{number}-{trial}.{suffix}"
                path.write_bytes(damaged(content, rng))
                outcomes[read_video(path, decoder)] += 1
    assert outcomes["read"] and len(outcomes) > 1, outcomes


def main(count, seed):
    """Try `count` inputs, one in fifty of them a video; what breaks the rule is kept."""
    rng = np.random.default_rng(seed)
    images, clips = pictures(), videos()
    outcomes, slowest, broken = Counter(), 0.0, 0
    with tempfile.TemporaryDirectory() as folder, Decoder(timeout=60) as decoder:
        for number in range(count):
            is_video = number % 50 == 0
            kind, content = (clips if is_video else images)[
                rng.integers(len(clips if is_video else images))
            ]
            content = damaged(content, rng)
            path = Path(folder, f"{number}.{kind}")
            began = time.perf_counter()
            try:
                if is_video:
                    path.write_bytes(content)
                    outcome = f"video {read_video(path, decoder)}"
                else:
                    outcome = f"picture {read_picture(content)}"
            except Exception as error:
                kept = Path(tempfile.gettempdir(), f"broken-{seed}-{number}.{kind}")
                kept.write_bytes(content)
                outcome, broken = f"BROKEN {type(error).__name__}", broken + 1
                print(f"{kept}: {type(error).__name__}: {error}", flush=True)
            slowest = max(slowest, time.perf_counter() - began)
            path.unlink(missing_ok=True)
            outcomes[outcome] += 1
    print(f"{count} inputs, seed {seed}, slowest {slowest:.2f} s, {broken} broke the rule")
    for outcome, times in outcomes.most_common():
        print(f"{times:8} {outcome}")


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 0)
