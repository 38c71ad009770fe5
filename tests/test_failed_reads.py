"""Files that cannot be read for a moment, or for good: retried, said, never taken for others."""

import threading
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from test_training import tiny_run
from tiny import tiny_video

from mhla_gen.config import DataConfig
from mhla_gen.data import load_data
from mhla_gen.errors import UserError
from mhla_gen.evaluation.sources import load_images
from mhla_gen.evaluation.video import ClipRule, read_clip
from mhla_gen.media import Decoder
from mhla_gen.media.frames import clip_facts
from mhla_gen.media.patience import ReadFailedError, decode_patiently
from mhla_gen.media.pictures import UnreadableImageError
from mhla_gen.training import train
from mhla_gen.training.run_folder import checkpoints


@pytest.fixture
def images(tmp_path):
    """Two classes of two images."""
    rng = np.random.default_rng(0)
    for label in "ab":
        (tmp_path / "images" / label).mkdir(parents=True)
        for number in range(2):
            pixels = rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "images" / label / f"{number}.png")
    return tmp_path / "images"


@pytest.fixture
def failing(monkeypatch):
    """How often reading each file fails from now on, by its name with the class; no waiting."""
    monkeypatch.setattr("mhla_gen.media.patience.WAITS", (0, 0, 0))
    left, lock, read = Counter(), threading.Lock(), Path.read_bytes

    def read_bytes(path):
        name = "/".join(path.parts[-2:])
        with lock:
            fails = left[name] > 0
            left[name] -= fails
        if fails:
            raise OSError(5, "Input/output error", str(path))
        return read(path)

    monkeypatch.setattr(Path, "read_bytes", read_bytes)
    return left


def data_of(images, **changes):
    return load_data(DataConfig(source="folder", path=str(images), image_size=8, **changes))


def test_a_read_that_fails_once_changes_nothing(images, failing):
    """Also where threads read a class of two, of which each fails in turn."""
    expected = data_of(images).read([0, 1, 2, 3])["samples"]
    data = data_of(images)
    for names in (["a/0.png"], ["a/0.png", "a/1.png"], ["a/1.png", "b/0.png", "b/1.png"]):
        failing.update(names)
        assert data.read([0, 1, 2, 3])["samples"].equal(expected)
        assert not any(index in data.broken for index in range(4))


def test_bytes_that_come_wrong_once_are_read_again(images, monkeypatch):
    expected = data_of(images).read([0])["samples"]
    data, read, wrong = data_of(images), Path.read_bytes, ["a/0.png"]

    def read_bytes(path):
        name = "/".join(path.parts[-2:])
        if name in wrong:
            wrong.remove(name)
            return read(path)[:-20]
        return read(path)

    monkeypatch.setattr(Path, "read_bytes", read_bytes)
    assert data.read([0])["samples"].equal(expected) and not wrong and 0 not in data.broken


def test_a_read_that_goes_on_failing_ends_the_work_or_is_listed(images, failing, tmp_path, capsys):
    failing["a/0.png"] = 1000
    with pytest.raises(ReadFailedError, match=r"a/0\.png cannot be read .* after 4 attempts"):
        data_of(images).read([0])
    data = data_of(images, failed_reads="quarantine")
    data.leave_out(tmp_path / "quarantine.jsonl")
    first, second = data.read([0, 1])["samples"]
    assert first.equal(second) and "a/0.png could not be read" in capsys.readouterr().err
    # It stays out in later starts, which would otherwise see other data.
    failing.clear()
    later = data_of(images, failed_reads="quarantine")
    later.leave_out(tmp_path / "quarantine.jsonl")
    assert later.read([0, 1])["samples"][0].equal(first)


def test_a_file_that_is_listed_twice_stays_out_twice(images, failing, tmp_path):
    names = ["a/0.png", "a/1.png", "a/0.png", "b/0.png"]
    rows = "".join(f"{name},{name[0]}\n" for name in names)
    (images / "list.csv").write_text(f"path,label\n{rows}")

    def opened():
        settings = {"image_size": 8, "failed_reads": "quarantine"}
        data = load_data(DataConfig(source="list", path=str(images / "list.csv"), **settings))
        data.leave_out(tmp_path / "quarantine.jsonl")
        return data

    failing["a/0.png"] = 1000
    expected = opened().read([0, 1, 2, 3])["samples"]
    assert expected[0].equal(expected[1]) and expected[2].equal(expected[1])
    failing.clear()
    assert opened().read([0, 1, 2, 3])["samples"].equal(expected)


def test_a_class_that_threads_found_broken_is_named(images):
    data = data_of(images)
    data.read([0])
    for index in (0, 1):
        data.broken.add(index, data.describe(index), "cannot be decoded (junk)")
    with pytest.raises(UserError, match=r"no image of class a can be read .*a/0\.png cannot be de"):
        data.read([0, 1])


def test_a_run_that_could_not_read_goes_on_exactly(images, failing, tmp_path):
    def config(name, **changes):
        data = DataConfig(source="folder", path=str(images), image_size=8)
        settings = {"batch_size": 4, "max_steps": 6, "checkpoint_every": 1} | changes
        return tiny_run(tmp_path / name, data=data, **settings)

    train(config("straight"))
    failing["b/1.png"] = 2
    steps = []

    from mhla_gen.training.training_run import Run

    whole = Run.step

    def step(self, number, parts):
        steps.append(number)
        failing["a/1.png"] = 4 if len(steps) == 3 else failing["a/1.png"]
        return whole(self, number, parts)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(ReadFailedError):
        patch.setattr(Run, "step", step)
        train(config("stopped"))
    assert max(checkpoints(tmp_path / "stopped")) < 6
    train(config("stopped", resume="latest"))
    saved = "pipeline/transformer/diffusion_pytorch_model.safetensors"
    one, two = (tmp_path / name / saved for name in ("straight", "stopped"))
    assert one.read_bytes() == two.read_bytes()


def test_an_evaluation_does_not_count_a_failed_read_as_a_corrupt_image(images, failing):
    source = load_images(images)
    failing["a/0.png"] = 3
    assert source.read(0).shape == (8, 8, 3)
    failing["a/0.png"] = 1000
    with pytest.raises(ReadFailedError):
        source.read(0)


@pytest.fixture
def video(tmp_path):
    tiny_video(tmp_path / "a.mp4")
    return tmp_path / "a.mp4"


def decoding(path, before_each):
    """The facts of a video; each attempt first does one of these."""
    before_each = iter(before_each)

    def decode():
        next(before_each)()
        return clip_facts(path)

    return decode


def test_a_video_that_comes_wrong_once_is_read_again(video, monkeypatch):
    monkeypatch.setattr("mhla_gen.media.patience.WAITS", (0, 0, 0))
    content, expected = video.read_bytes(), clip_facts(video)

    def damage():
        video.write_bytes(content[: len(content) // 2])

    def mend():
        video.write_bytes(content)

    for attempts in ([mend], [damage, mend]):
        found = decode_patiently(decoding(video, attempts), video)
        assert np.array_equal(found.times, expected.times) and found[1:] == expected[1:]
    # Twice the same bytes: it is damaged, and there is no third attempt.
    damage()
    with pytest.raises(UnreadableImageError, match="cannot be decoded"):
        decode_patiently(decoding(video, [damage, damage]), video)
    # A rule refuses it, whatever the bytes: there is no second attempt.
    text = video.with_suffix(".txt")
    with pytest.raises(UnreadableImageError, match="is of an unsupported kind"):
        decode_patiently(decoding(text, [mend]), text)


def test_a_video_that_cannot_be_read_is_not_taken_for_damaged(video, monkeypatch):
    monkeypatch.setattr("mhla_gen.media.patience.WAITS", (0, 0, 0))
    with Decoder() as decoder:
        expected = decoder.frames(video, [0, 3], None)
        hidden = video.rename(video.with_name("hidden"))
        video.mkdir()
        with pytest.raises(ReadFailedError, match=r"a\.mp4 cannot be read .* after 4 attempts"):
            decoder.frames(video, [0, 3], None)
        with pytest.raises(ReadFailedError, match="after 4 attempts"):
            read_clip(video, ClipRule(2))
        video.rmdir()
        hidden.rename(video)
        assert np.array_equal(decoder.frames(video, [0, 3], None), expected)
