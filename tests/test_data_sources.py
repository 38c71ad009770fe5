"""Images in lists, Hugging Face data sets and tar shards: the same images, the same errors."""

import io
import json
import sys
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image

from mhla_gen.config import DataConfig
from mhla_gen.data import load_data, open_images
from mhla_gen.data.stores import number_classes

CLASSES = ("ant", "bee", "cat")


@pytest.fixture(scope="module")
def pictures():
    """Nine images of three classes as PNG files, in the order of a class folder."""
    generator = np.random.default_rng(0)
    found = []
    for _ in range(9):
        pixels = generator.integers(0, 256, (20, 28, 3), dtype=np.uint8)
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, "png")
        found.append(file.getvalue())
    return found


@pytest.fixture
def folder(tmp_path, pictures):
    for i, content in enumerate(pictures):
        path = tmp_path / "images" / CLASSES[i // 3] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return tmp_path / "images"


def listed(folder, name, **columns):
    """A list of the images of a folder, written beside it, with columns of nine values each."""
    rows = [
        {"path": f"images/{CLASSES[i // 3]}/{i}.png"} | {k: v[i] for k, v in columns.items()}
        for i in range(9)
    ]
    path = folder.parent / name
    if name.endswith(".csv"):
        lines = [",".join(rows[0]), *(",".join(map(str, row.values())) for row in rows)]
    else:
        lines = [json.dumps(row) for row in rows]
    path.write_text("\n".join(lines))
    return path


def shards(folder, pictures, **texts):
    """Two tar files with the pictures and text members such as cls=[…]."""
    for number, part in enumerate((range(5), range(5, 9))):
        with tarfile.open(folder.parent / f"train-{number}.tar", "w") as archive:
            for i in part:
                members = {"png": pictures[i]}
                members |= {suffix: str(values[i]).encode() for suffix, values in texts.items()}
                for suffix, content in members.items():
                    entry = tarfile.TarInfo(f"set/{i:04d}.{suffix}")
                    entry.size = len(content)
                    archive.addfile(entry, io.BytesIO(content))
    return folder.parent / "train-*.tar"


def config(source, path, **more):
    return DataConfig(source=source, path=str(path), image_size=12, **more)


def test_every_source_gives_the_same_images(folder, pictures):
    datasets = pytest.importorskip("datasets")
    names = [CLASSES[i // 3] for i in range(9)]
    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=list(CLASSES))}
    )
    rows = {"image": [{"bytes": p, "path": None} for p in pictures], "label": names}
    table = datasets.Dataset.from_dict(rows, features=features)
    datasets.DatasetDict(train=table).save_to_disk(folder.parent / "saved")
    sources = [
        config("folder", folder),
        config("list", listed(folder, "a.csv", label=names)),
        config("list", listed(folder, "a.jsonl", label=names)),
        config("webdataset", shards(folder, pictures, cls=names)),
        config("huggingface", folder.parent / "saved"),
    ]
    data = [load_data(source) for source in sources]
    chosen = [8, 0, 4]
    expected = data[0].read(chosen)
    assert expected["labels"].tolist() == [2, 0, 1]
    for one in data:
        assert one.class_names == CLASSES and len(one) == 9
        found = one.read(chosen)
        assert torch.equal(found["samples"], expected["samples"])
        assert torch.equal(found["labels"], expected["labels"])
        assert [one.digest(i) for i in range(9)] == [data[0].digest(i) for i in range(9)]
    with pytest.raises(ValueError, match="no split test; found train"):
        load_data(config("huggingface", folder.parent / "saved", split="test"))
    with pytest.raises(ValueError, match="no column picture of images; found image, label"):
        load_data(config("huggingface", folder.parent / "saved", image_column="picture"))


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ValueError, match=r'pip install "mhla_gen\[datasets\]"'):
        load_data(config("huggingface", "x"))


def test_captions_come_with_the_images(folder, pictures):
    captions = [f"a, {i}" for i in range(9)]
    path = listed(folder, "a.jsonl", caption=captions)
    assert open_images(config("list", path)).captions == tuple(captions)
    shards(folder, pictures, txt=captions, json=['{"label": 3}'] * 9)
    images = open_images(config("webdataset", folder.parent, num_classes=5))
    assert images.captions == tuple(captions) and len(images.class_names) == 5
    assert images.read([1, 7])["labels"].tolist() == [3, 3]
    assert "train-1.tar: set/0007" in images.describe(7)


def test_numbers_stay_and_names_are_sorted():
    labels, names = number_classes("x", ["2", 0, " 1"], None)
    assert labels.tolist() == [2, 0, 1] and names == ("0", "1", "2")
    labels, names = number_classes("x", [5], 1000)
    assert labels.tolist() == [5] and len(names) == 1000
    labels, names = number_classes("x", ["b", "a", "b"], None)
    assert labels.tolist() == [1, 0, 1] and names == ("a", "b")


@pytest.mark.parametrize(
    ("values", "num_classes", "message"),
    [
        ([0, -1], None, "row 2 has label -1"),
        ([0, 5], 5, r"row 2 has label 5, expected 0…4"),
        ([0, None], None, "row 2 has no label"),
        (["a", ""], None, "row 2 has no label"),
        (["a", "b"], 3, "2 different labels, data.num_classes is 3"),
    ],
)
def test_labels_that_do_not_fit_are_refused(values, num_classes, message):
    with pytest.raises(ValueError, match=message):
        number_classes("x", values, num_classes)


def test_lists_that_do_not_fit_are_refused(folder, tmp_path):
    with pytest.raises(FileNotFoundError, match="is not a file"):
        load_data(config("list", tmp_path / "none.csv"))
    path = listed(folder, "a.csv", label=range(9))
    with pytest.raises(ValueError, match="no column kind or caption"):
        load_data(config("list", path, label_column="kind"))
    path.write_text("file,label\nx.png,1")
    with pytest.raises(ValueError, match="no column path; found file, label"):
        load_data(config("list", path))
    path.write_text("path,label\nimages/none.png,1")
    with pytest.raises(FileNotFoundError, match=r"none\.png, which does not exist"):
        load_data(config("list", path))
    path.with_suffix(".txt").write_text("x")
    with pytest.raises(ValueError, match=r"must end in \.csv or \.jsonl"):
        load_data(config("list", path.with_suffix(".txt")))
    (tmp_path / "broken.jsonl").write_text('{"path": ')
    with pytest.raises(ValueError, match="cannot be read"):
        load_data(config("list", tmp_path / "broken.jsonl"))


def test_shards_that_cannot_be_read_at_random_are_refused(folder, tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w:gz") as archive:
        archive.add(folder)
    with pytest.raises(ValueError, match="not a plain tar file"):
        load_data(config("webdataset", tmp_path / "a.tar"))
    with pytest.raises(FileNotFoundError, match="names no tar files"):
        load_data(config("webdataset", tmp_path / "b-*.tar"))


def test_clips_are_not_trained_on_directly():
    with pytest.raises(ValueError, match="run `mhla-gen cache`"):
        load_data(DataConfig(source="clips", path="x"))


def test_transparent_pixels_are_refused(tmp_path):
    (tmp_path / "a").mkdir()
    Image.new("RGBA", (16, 16), (255, 0, 0, 40)).save(tmp_path / "a" / "0.png")
    with pytest.raises(ValueError, match=r"0\.png has transparent pixels"):
        load_data(config("folder", tmp_path)).read([0])
