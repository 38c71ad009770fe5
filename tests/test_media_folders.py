"""Walking folders: each real file once, the same files everywhere, nothing left out in silence."""

import tarfile

import numpy as np
import pytest
from PIL import Image

from mhla_gen.config import DataConfig
from mhla_gen.data import open_images
from mhla_gen.data.clip_files import find_clips
from mhla_gen.evaluation import load_images
from mhla_gen.media.folders import by_number, files_below

PNG = frozenset((".png",))


def fill(folder, *names, colour=0):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (colour, 0, 0)).save(folder / name)


def names(root):
    return [path.relative_to(root).as_posix() for path in files_below(root, PNG).paths]


def test_links_add_no_file_twice(tmp_path):
    root = tmp_path / "root"
    fill(root, "a/1.png", "b/c/2.png")
    fill(tmp_path / "elsewhere", "3.png", "deep/4.png")
    plain = names(root)
    assert plain == ["a/1.png", "b/c/2.png"]
    (root / "a" / "up").symlink_to("..")
    (root / "a" / "across").symlink_to("../b")
    (root / "a" / "0.png").symlink_to("1.png")
    assert names(root) == plain
    (root / "x").symlink_to(tmp_path / "elsewhere")
    (root / "y").symlink_to(tmp_path / "elsewhere")
    (root / "z.png").symlink_to(tmp_path / "elsewhere" / "3.png")
    assert names(root) == [*plain, "x/3.png", "x/deep/4.png"]
    (root / "lost.png").symlink_to("/nowhere/x.png")
    assert names(root) == ["a/1.png", "b/c/2.png", "lost.png", "x/3.png", "x/deep/4.png"]


def test_hidden_and_foreign_files_are_passed_over(tmp_path):
    fill(tmp_path, "a.PNG", "b:c\n.png")
    for name in ("._a.png", ".trash/b.png", "__MACOSX/c.png", "@eaDir/a.png/thumb.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"\0\5\x16\7")
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "notes").write_text("")
    (tmp_path / "photo.HEIC").write_text("")
    assert names(tmp_path) == ["a.PNG", "b:c\n.png"]
    assert files_below(tmp_path, PNG).others == {"": 1, ".heic": 1}


def test_a_folder_that_cannot_be_read_is_named(tmp_path, monkeypatch):
    # Permissions do not stop the superuser, so the system's answer is made up.
    def refuse(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("os.scandir", refuse)
    with pytest.raises(PermissionError, match="Permission denied"):
        files_below(tmp_path, PNG)


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        (["10", "9", "0", "1"], ["0", "1", "9", "10"]),
        (["010", "9"], ["9", "010"]),
        (["10", "9", "x"], ["10", "9", "x"]),
        (["²", "10", "9"], ["10", "9", "²"]),
        ([], []),
    ],
)
def test_whole_numbers_are_in_the_order_of_numbers(found, expected):
    assert by_number(found) == expected


def classes(root, **settings):
    return open_images(DataConfig(source="folder", path=str(root), image_size=8, **settings))


def test_class_folders_of_numbers(tmp_path):
    for number in range(12):
        fill(tmp_path, f"{number}/a.png", colour=number)
    images = classes(tmp_path)
    assert images.class_names == tuple(map(str, range(12)))
    assert [images.pixels(i)[0, 0, 0] for i in range(12)] == images.labels.tolist() == [*range(12)]
    # Some of a pretrained model's classes keep their numbers.
    some = classes(tmp_path, num_classes=1000)
    assert len(some.class_names) == 1000 and some.labels.tolist() == [*range(12)]
    with pytest.raises(ValueError, match=r"label 10, expected 0…9"):
        classes(tmp_path, num_classes=10)


def test_what_a_class_folder_leaves_out_is_counted(tmp_path, capsys):
    fill(tmp_path, "a/1.png", "a/sub/2.png", "b/1.png", "3.png")
    (tmp_path / "a" / "x.heic").write_bytes(b"x")
    (tmp_path / "list.xml").write_bytes(b"x")
    assert len(classes(tmp_path)) == 2
    said = capsys.readouterr().err
    assert "ignored" in said and "1 × .heic" in said and "1 × .xml" in said
    assert "2 images that are not directly in a class folder" in said
    fill(tmp_path, "train/a/1.png", "train/b/1.png")
    with pytest.raises(FileNotFoundError, match=r"train has no images itself, but 2 in sub-fold"):
        classes(tmp_path)


def test_training_and_evaluation_walk_alike(tmp_path, capsys):
    fill(tmp_path, "a/1.png", "b/2.png")
    (tmp_path / "a" / "._1.png").write_bytes(b"\0\5\x16\7")
    (tmp_path / "a" / "up").symlink_to("..")
    (tmp_path / "a" / "lost.png").symlink_to("/nowhere/x.png")
    (tmp_path / "b" / "x.heic").write_bytes(b"x")
    source, images = load_images(tmp_path), classes(tmp_path)
    clips = find_clips(DataConfig(source="clips", path=str(tmp_path)), "empty")
    found = [source.label(i) for i in range(len(source))]
    assert found == ["a/1.png", "a/lost.png", "b/2.png"]
    assert [str(tmp_path / name) for name in found] == [*map(images.describe, range(3))]
    assert [str(tmp_path / name) for name in found] == [*map(clips.describe, range(3))]
    assert "ignored 1 × .heic" in capsys.readouterr().err
    assert source.digest() and images.digest(1) == clips.digest(1) == "unreadable"
    # A link that leads nowhere is a broken image like any other.
    assert np.array_equal(images.read([1])["samples"], images.read([0])["samples"])


def test_shards_and_their_members_are_walked_alike(tmp_path):
    fill(tmp_path, "1.png", "._2.png", "__MACOSX/3.png")
    (tmp_path / "1.cls").write_text("0")
    with tarfile.open(tmp_path / "a.tar", "w") as shard:
        for name in ("1.png", "1.cls", "._2.png", "__MACOSX/3.png"):
            shard.add(tmp_path / name, name)
    (tmp_path / "._a.tar").write_bytes(b"\0\5\x16\7")
    for path in (tmp_path, f"{tmp_path}/*.tar"):
        config = DataConfig(source="webdataset", path=str(path), image_size=8)
        assert len(open_images(config)) == 1
