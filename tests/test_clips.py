"""Videos to clips: exact frames, buckets, time limits."""

import contextlib
import itertools
import os
import signal
import subprocess
import threading
import time
from pathlib import Path

import imageio.v3 as iio
import imageio_ffmpeg
import numpy as np
import pytest
from tiny import tiny_video

from mhla_gen.config import CacheConfig, ClipsConfig, DataConfig
from mhla_gen.data.buckets import (
    Bucket,
    choose_bucket,
    crop_for,
    resampled_frames,
    window_starts,
)
from mhla_gen.data.clip_files import find_clips
from mhla_gen.data.clips import Clips, place, read_placements, report, write_placements
from mhla_gen.media import Crop, Decoder
from mhla_gen.media.frames import read_frames
from mhla_gen.media.pictures import UnreadableImageError

WIDE, TALL = Bucket(9, 32, 48), Bucket(9, 48, 32)


@pytest.fixture(scope="module")
def decoder():
    with Decoder(timeout=60, workers=2) as decoder:
        yield decoder


@pytest.fixture(scope="module")
def video(tmp_path_factory):
    path = tmp_path_factory.mktemp("video") / "a.mp4"
    tiny_video(path, frames=30, height=34, width=52)
    return path


def ffmpeg(*arguments):
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-y", "-loglevel", "error", *map(str, arguments)]
    subprocess.run(command, check=True)


def wait_until_no_program_reads(video):
    """A killed one is there until the system has time to end it; others would go on for ever."""

    def commands():
        for path in Path("/proc").glob("[0-9]*/cmdline"):
            # It may have ended meanwhile.
            with contextlib.suppress(OSError):
                yield path.read_bytes()

    deadline = time.monotonic() + 60
    while any(os.fsencode(video) in command for command in commands()):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_frames_are_those_of_the_file_in_any_order(video, decoder):
    expected = iio.imread(video, plugin="FFMPEG")
    chosen = [20, 3, 3, 29, 0]
    found = decoder.frames(video, chosen, None)
    assert (found == expected[chosen]).all() and not (found[0] == found[1]).all()
    facts = decoder.facts(video)
    assert (len(facts.times), facts.height, facts.width) == (30, 34, 52)
    np.testing.assert_allclose(facts.times, np.arange(30) / 16, atol=1e-4)
    assert facts.fps == pytest.approx(16, abs=1e-3)


def test_rotation_metadata_is_applied(video, decoder, tmp_path):
    turned = tmp_path / "turned.mp4"
    ffmpeg("-display_rotation", 90, "-i", video, "-c", "copy", turned)
    facts = decoder.facts(turned)
    assert (facts.height, facts.width) == (52, 34)
    upright = decoder.frames(video, [5], None)[0]
    assert (decoder.frames(turned, [5], None)[0] == np.rot90(upright)).all()


@pytest.mark.parametrize("suffix", ["gif", "webm", "mkv", "mov", "avi", "m4v"])
def test_other_containers_give_the_frames_of_ffmpeg(suffix, video, decoder, tmp_path):
    path, raw = tmp_path / f"a.{suffix}", tmp_path / "a.rgb"
    ffmpeg("-i", video, *(() if suffix in ("gif", "webm", "avi") else ("-c", "copy")), path)
    ffmpeg("-i", path, "-f", "rawvideo", "-pix_fmt", "rgb24", raw)
    expected = np.frombuffer(raw.read_bytes(), np.uint8).reshape(-1, 34, 52, 3)
    assert len(decoder.facts(path).times) == len(expected) == 30
    chosen = [29, 2, 17, 0]
    found = decoder.frames(path, chosen, None)
    assert (found == expected[chosen]).all() and not (found[0] == found[3]).all()


def test_a_crop_scales_and_cuts_the_middle(video):
    crop = crop_for(Bucket(1, 32, 32), 34, 52)
    assert crop == Crop(32, 49, 32, 32)
    assert read_frames(video, [0, 1], crop).shape == (2, 32, 32, 3)
    for height, width in ((7, 90), (90, 7), (33, 33), (480, 853)):
        for bucket in (Bucket(1, 16, 24), Bucket(1, 480, 832), Bucket(1, 832, 480)):
            crop = crop_for(bucket, height, width)
            assert crop.scaled_height >= bucket.height and crop.scaled_width >= bucket.width
            assert crop.scaled_height == bucket.height or crop.scaled_width == bucket.width


def test_broken_files_are_named_with_a_reason(video, decoder, tmp_path):
    content = bytearray(video.read_bytes())
    middle = len(content) // 3
    content[middle : middle + 200] = bytes(200)
    (tmp_path / "holed.mp4").write_bytes(content)
    (tmp_path / "junk.mp4").write_bytes(b"junk" * 100)
    for name in ("holed.mp4", "junk.mp4", "none.mp4"):
        with pytest.raises(UnreadableImageError, match=r"cannot be (decoded|read)"):
            decoder.frames(tmp_path / name, range(30), None)
    assert len(decoder.facts(video).times) == 30


def test_a_time_limit_that_ends_with_the_answer_does_not_cost_the_next_video(video, monkeypatch):
    class Late(threading.Timer):
        """Fires when the answer is there."""

        def cancel(self):
            super().cancel()
            self.function()

    monkeypatch.setattr(threading, "Timer", Late)
    with Decoder(timeout=60) as decoder:
        assert [len(decoder.facts(video).times) for _ in range(3)] == [30, 30, 30]


def test_a_decoder_that_hangs_is_ended_and_replaced(video, tmp_path):
    # Reading a pipe that nobody writes to never returns.
    os.mkfifo(tmp_path / "hangs.mp4")
    with Decoder(timeout=60) as decoder:
        decoder.facts(video)
        decoder.timeout = 0.3
        # Otherwise this would never end.
        with pytest.raises(UnreadableImageError, match=r"takes longer than 0\.3 s"):
            decoder.facts(tmp_path / "hangs.mp4")
        # Nor does the program that it ran go on.
        wait_until_no_program_reads(tmp_path / "hangs.mp4")
        decoder.timeout = 60
        assert len(decoder.facts(video).times) == 30


def test_an_interrupted_call_does_not_answer_the_next_one(video, tmp_path):
    os.mkfifo(tmp_path / "hangs.mp4")

    def interrupt(*_):
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        with Decoder(timeout=60) as decoder:
            decoder.facts(video)
            with pytest.raises(KeyboardInterrupt):
                signal.setitimer(signal.ITIMER_REAL, 0.3)
                decoder.facts(tmp_path / "hangs.mp4")
            wait_until_no_program_reads(tmp_path / "hangs.mp4")
            assert len(decoder.facts(video).times) == 30
    finally:
        signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize("fps", [7.0, 16.0, 24.0, 29.97, 60.0])
@pytest.mark.parametrize("source", [1, 2, 15, 40])
def test_resampled_frames_are_the_nearest_in_time(fps, source):
    gaps = np.random.default_rng(source).uniform(0.01, 0.1, source - 1)
    times = np.concatenate([[0.0], np.cumsum(gaps)])
    found = resampled_frames(times, fps)
    assert abs(len(found) - 1 - np.floor(times[-1] * fps)) <= 1
    for k, frame in enumerate(found):
        assert abs(times[frame] - k / fps) <= np.abs(times - k / fps).min() + 1e-3


def test_known_frame_rates():
    steady = np.arange(50) / 25
    assert resampled_frames(steady, 25).tolist() == list(range(50))
    assert resampled_frames(steady, None).tolist() == list(range(50))
    assert resampled_frames(np.arange(8) / 32, 16).tolist() == [0, 2, 4, 6]
    # 24 to 16: every second frame is a tie, which the earlier one wins.
    assert resampled_frames(np.arange(9) / 24, 16).tolist() == [0, 1, 3, 4, 6, 7]
    assert resampled_frames(np.arange(3) / 8, 16).tolist() == [0, 0, 1, 1, 2]
    assert resampled_frames(np.zeros(1), 16).tolist() == [0]


@pytest.mark.parametrize("available", [9, 10, 40, 100])
@pytest.mark.parametrize("max_windows", [1, 3, 50])
def test_windows_lie_apart_and_inside(available, max_windows):
    starts = window_starts(available, 9, max_windows)
    assert len(starts) == min(max_windows, available // 9)
    assert starts[0] >= 0 and starts[-1] + 9 <= available
    assert all(b - a >= 9 for a, b in itertools.pairwise(starts))
    assert window_starts(11, 9, 1) == [1]


@pytest.mark.parametrize(
    ("frames", "height", "width", "expected"),
    [
        (20, 320, 480, 0),
        (20, 480, 320, 1),
        (20, 400, 400, 2),
        (5, 320, 480, 3),
        (9, 32, 48, 0),
        (9, 31, 48, 3),
    ],
)
def test_a_clip_goes_to_the_nearest_aspect_ratio_that_fits(frames, height, width, expected):
    buckets = [WIDE, TALL, Bucket(9, 40, 40), Bucket(1, 16, 24)]
    assert choose_bucket(buckets, frames, height, width, False) == (expected, "")


def test_what_fits_nowhere_says_why():
    found, reason = choose_bucket([WIDE, TALL], 8, 320, 480, False)
    assert found is None and "8 frames" in reason and "9" in reason
    found, reason = choose_bucket([WIDE, TALL], 20, 20, 30, False)
    assert found is None and "upscale=true" in reason
    assert choose_bucket([WIDE, TALL], 20, 20, 30, True) == (0, "")
    # Of the same shape the longest wins.
    assert choose_bucket([Bucket(1, 32, 48), WIDE], 20, 64, 96, False) == (1, "")
    # Of the same shape and length the largest wins.
    assert choose_bucket([Bucket(9, 32, 48), Bucket(9, 64, 96)], 20, 64, 96, False) == (1, "")


@pytest.fixture
def videos(tmp_path):
    folder = tmp_path / "videos"
    (folder / "more").mkdir(parents=True)
    tiny_video(folder / "long.mp4", frames=40)
    tiny_video(folder / "more" / "tall.mp4", 12, 48, 32)
    tiny_video(folder / "slow.mp4", frames=8, fps=8)
    tiny_video(folder / "short.mp4", frames=4)
    (folder / "junk.mp4").write_bytes(b"junk")
    iio.imwrite(folder / "still.png", np.full((70, 100, 3), 90, np.uint8))
    return folder


def test_everything_is_placed_or_left_out_with_a_reason(videos, decoder, tmp_path):
    files = find_clips(DataConfig(source="clips", path=str(videos)), "empty")
    config = ClipsConfig(buckets=[WIDE, TALL, [1, 64, 96]], max_windows=3)
    placements = [place(files, i, config, decoder) for i in range(len(files))]
    found = {os.path.basename(p.name): p for p in placements}
    assert {name: p.bucket for name, p in found.items()} == {
        "junk.mp4": None,
        "long.mp4": 0,
        "short.mp4": None,
        "slow.mp4": 0,
        "still.png": 2,
        "tall.mp4": 1,
    }
    assert len(found["long.mp4"].windows) == 3 and found["slow.mp4"].repeated == 4
    assert found["junk.mp4"].unreadable and not found["short.mp4"].unreadable
    table = report(config, placements)
    assert "short.mp4 has 4 frames" in table or "short.mp4 is 32 × 48 pixels" in table
    assert "junk.mp4 cannot be decoded" in table and "shown twice" in table

    write_placements(tmp_path / "clips.json", placements)
    clips = Clips(files, config, read_placements(tmp_path / "clips.json"), decoder)
    assert clips.placements == tuple(placements)
    assert clips.buckets == (range(4), range(4, 5), range(5, 6))
    assert clips.sample_shapes == ((3, 9, 32, 48), (3, 9, 48, 32), (3, 1, 64, 96))
    for bucket, shape in zip(clips.buckets, clips.sample_shapes, strict=True):
        for index in bucket:
            assert clips.pixels(index).shape == (*shape[1:], 3)
    start = found["long.mp4"].windows[1][0]
    whole = iio.imread(videos / "long.mp4", plugin="FFMPEG")
    assert (clips.pixels(1) == whole[start : start + 9]).all()


def test_captions_are_beside_the_clips_or_in_a_list(videos, tmp_path):
    config = DataConfig(source="clips", path=str(videos))
    with pytest.raises(ValueError, match=r"6 of 6 clips have no caption, .*junk\.mp4 first.*empty"):
        find_clips(config, "error")
    assert set(find_clips(config, "empty").captions) == {""}
    (videos / "more" / "tall.txt").write_text("a tall clip\n")
    assert find_clips(config, "empty").captions[2] == "a tall clip"
    (videos / "more" / "tall.txt").write_bytes("\ufeffa tall clip\r\n".encode())
    assert find_clips(config, "empty").captions[2] == "a tall clip"
    (videos / "more" / "tall.txt").write_bytes(b"caf\xe9")
    with pytest.raises(ValueError, match=r"tall\.txt is not UTF-8"):
        find_clips(config, "empty")
    (videos / "more" / "tall.txt").unlink()
    (tmp_path / "a.csv").write_text("path,text\nvideos/long.mp4,one\nvideos/short.mp4,two")
    listed = DataConfig(source="clips", path=str(tmp_path / "a.csv"), caption_column="text")
    files = find_clips(listed, "error")
    assert files.captions == ("one", "two") and files.paths[0] == videos / "long.mp4"
    with pytest.raises(FileNotFoundError, match="does not exist"):
        find_clips(DataConfig(source="clips", path=str(tmp_path / "none")), "empty")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="has no clips"):
        find_clips(DataConfig(source="clips", path=str(tmp_path / "empty")), "empty")


def test_mirrored_clips_have_no_condition():
    with pytest.raises(ValueError, match=r"leave data\.horizontal_flip out"):
        CacheConfig(
            data=DataConfig(source="clips", path="x", horizontal_flip=True),
            clips=ClipsConfig(condition=True),
        )


@pytest.mark.parametrize("buckets", [[], [[81, 480]], [[0, 8, 8]], "81", [[1, 8, 8], [1, 8, 8]]])
def test_buckets_that_are_none_are_refused(buckets):
    with pytest.raises(ValueError, match=r"clips\.buckets"):
        ClipsConfig(buckets=buckets)
