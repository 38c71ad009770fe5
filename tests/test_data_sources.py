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
from mhla_gen.data.lists import number_classes
from mhla_gen.data.stores import listed_images
from mhla_gen.data.webdataset import tar_shards
from mhla_gen.errors import UserError

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


def numbered(values, num_classes):
    return number_classes("x", [f"row {n}" for n in range(1, len(values) + 1)], values, num_classes)


def test_numbers_stay_and_names_are_sorted():
    labels, names = numbered(["2", 0, " 1"], None)
    assert labels.tolist() == [2, 0, 1] and names == ("0", "1", "2")
    labels, names = numbered([5], 1000)
    assert labels.tolist() == [5] and len(names) == 1000
    labels, names = numbered(["b", "a", "b"], None)
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
        numbered(values, num_classes)


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
    with pytest.raises(ValueError, match=r"broken\.jsonl, line 1 is not JSON"):
        load_data(config("list", tmp_path / "broken.jsonl"))


def test_shards_that_cannot_be_read_at_random_are_refused(folder, tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w:gz") as archive:
        archive.add(folder)
    with pytest.raises(ValueError, match="not a plain tar file"):
        load_data(config("webdataset", tmp_path / "a.tar"))
    with pytest.raises(FileNotFoundError, match="matches no tar files"):
        load_data(config("webdataset", tmp_path / "b-*.tar"))


def test_clips_are_not_trained_on_directly():
    with pytest.raises(ValueError, match="run `mhla-gen cache`"):
        load_data(DataConfig(source="clips", path="x"))


def test_transparent_pixels_are_refused(tmp_path):
    (tmp_path / "a").mkdir()
    Image.new("RGBA", (16, 16), (255, 0, 0, 40)).save(tmp_path / "a" / "0.png")
    with pytest.raises(ValueError, match=r"0\.png has transparent pixels"):
        load_data(config("folder", tmp_path)).read([0])


def list_of(tmp_path, content, name="list.csv"):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return listed_images(path, "label", "caption", None)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("path,caption\n0.png,a cat, a dog\n", "line 2 has 3 values for 2 columns; .* in quotes"),
        ("path,caption\n0.png\n", "line 2 has 1 values for 2 columns"),
        (
            'path,caption\n1.png,x\n0.png,"abc\n2.png,y\n',
            "line 3 is not CSV: a quote that opens here",
        ),
        ('path,caption\n0.png,"abc\n2.png,"y"\n', "line 2 is not CSV: a closing quote needs"),
        ("path,label\n0.png,\n", "line 2 has no label"),
        ("path,label\n0.png,1\n\n1.png,nan\n", "line 4 has no label, found 'nan'"),
        ("path,label\n0.png,1.5\n", "line 2 has label 1.5; class numbers must be whole"),
        ("path,label\n0.png,1e20\n", "line 2 has label 1000.*, expected 0…999999"),
        ("path,label\n0.png,1e400\n", "line 2 has label 1e400; class numbers must be whole"),
        ("path,label\n0.png,15301000\n", "line 2 has label 15301000, expected 0…999999"),
        ("path,label\n0.png,-1\n1.png,0\n", "line 2 has label -1, expected 0…0"),
        ("path;label\n0.png;1\n", "line 1 must separate columns by commas"),
        ("path,label,label\n0.png,1,2\n", "line 1 has two columns called label"),
        ("path,,label\n0.png,1,2\n", "line 1 has no name for column 2"),
        ("path,label\nhttps://x.org/a.png,1\n", "line 2 has the address https"),
        ("path,label\n,1\n", "line 2 has no path"),
        ("path,label\n0.png,1\n".encode("utf-16"), "is not UTF-8"),
        ("path,label\n0.png,1\n".encode("utf-16-le"), "NUL characters"),
        (b"path,label\n0.png,caf\xe9\n", "is not UTF-8"),
        ("path,caption\n0.png," + "x" * 140_000, "line 2 is not CSV: field larger"),
        ("", "at least one"),
        ("path,label\n", "at least one"),
    ],
)
def test_csv_is_read_strictly(tmp_path, content, message):
    with pytest.raises(UserError, match=message) as error:
        list_of(tmp_path, content)
    assert "list.csv" in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"path": 5, "label": 1}', "line 2 must have a file in path, found 5"),
        ('{"path": ["a"], "label": 1}', "line 2 must have a file in path"),
        ('{"path": "a\\u0000", "label": 1}', "line 2 must have a file in path"),
        ('{"path": "a", "label": {"a": 1}}', "line 2 must have a class number or name as label"),
        ('{"path": "a", "label": [1]}', "line 2 must have a class number or name as label"),
        ('{"path": "a", "label": true}', "line 2 must have a class number or name as label"),
        ('{"path": "a", "label": null}', "line 2 has no label"),
        ('{"path": "a", "label": NaN}', "line 2 is not JSON: NaN is not a number"),
        ('{"path": "a", "label": 1, "caption": null}', "has no caption"),
        ('{"path": "a", "path": "b", "label": 1}', "line 2 is not JSON: the key 'path' is given"),
        ('{"path": "a", "label": %s}' % ("9" * 5000), "line 2 is not JSON"),
        ('{{"path": "a", "label": {}1{}}}'.format("[" * 9000, "]" * 9000), "nested too deeply"),
        ('[{"path": "a", "label": 1}]', "line 2 must be an object in braces, found"),
        ('{"path": "a"', "line 2 is not JSON"),
        ('{"path": "a", "label": 1} {}', "line 2 is not JSON: Extra data"),
    ],
)
def test_jsonl_is_read_strictly(tmp_path, line, message):
    with pytest.raises(UserError, match=message) as error:
        list_of(tmp_path, '{"path": "0.png", "label": 0}\n' + line, "list.jsonl")
    assert len(str(error.value)) < 400 and "\n" not in str(error.value)


def test_labels_mean_what_they_say_in_every_spelling(tmp_path):
    numbers = range(12)
    for spelled in (str, lambda n: f"{n}.0", lambda n: f" {n} ", lambda n: f"{n:02d}"):
        rows = "".join(f"{n}.png,{spelled(n)}\n" for n in numbers)
        assert list_of(tmp_path, "path,label\n" + rows).labels.tolist() == list(numbers)
    for kind in (int, float, str):
        rows = [json.dumps({"path": f"{n}.png", "label": kind(n)}) for n in numbers]
        found = list_of(tmp_path, "\n".join(rows), "list.jsonl")
        assert found.labels.tolist() == list(numbers) and found.class_names[-1] == "11"
    # Not digits to int(), or no number at all: names.
    for odd in ("²", "-", "--5", "٣", "0x1", "1_0"):
        assert list_of(tmp_path, f"path,label\n0.png,{odd}\n1.png,3\n").class_names == tuple(
            sorted((odd, "3"))
        )


def test_separators_and_marks_stay_in_captions(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    caption = 'a\u2028b\x85c, "d"\ne'
    row = json.dumps({"path": "~/0.png", "caption": caption}, ensure_ascii=False)
    assert list_of(tmp_path, "\ufeff" + row + "\r\n\r\n", "l.jsonl").captions == (caption,)
    quoted = caption.replace('"', '""')
    found = list_of(tmp_path, f'\ufeffpath , caption\r\n\r\n~/0.png,"{quoted}"\r\n')
    assert found.captions == (caption,) and found.paths == (tmp_path / "home" / "0.png",)


def shard_of(path, *members, **options):
    with tarfile.open(path, "w", **options) as archive:
        for name, content in members:
            entry = tarfile.TarInfo(name)
            if isinstance(content, bytes):
                entry.size = len(content)
                archive.addfile(entry, io.BytesIO(content))
            else:
                entry.type, entry.linkname = content
                archive.addfile(entry)
    return path


def read_shard(path):
    return tar_shards(str(path), "label", "caption", None)


def test_a_shard_that_is_cut_or_damaged_is_named(tmp_path, pictures):
    members = [
        (f"{i}.{kind}", c)
        for i, p in enumerate(pictures)
        for kind, c in (("cls", b"1"), ("png", p))
    ]
    path = shard_of(tmp_path / "a.tar", *members)
    whole = path.read_bytes()
    with tarfile.open(path) as archive:
        ends = [e.offset_data + -(-e.size // 512) * 512 for e in archive]
    cuts = {*ends, *(end + 300 for end in ends), *(end - 700 for end in ends)} - {0}
    for cut in sorted(c for c in cuts if 0 < c < ends[-1] + 512):
        path.write_bytes(whole[:cut])
        with pytest.raises(UserError, match=r"is truncated|is not a plain tar file"):
            read_shard(path)
    damaged = bytearray(whole)
    damaged[ends[2] + 10] ^= 255
    path.write_bytes(damaged)
    with pytest.raises(UserError, match="is damaged after its first 3 members"):
        read_shard(path)
    path.write_bytes(whole[: ends[-1] + 1024])
    assert len(read_shard(path)) == 9


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ([("0.png", b"a"), ("0.png", b"b")], "two images for the key 0, 0.png and 0.png"),
        ([("x/0.jpg", b"a"), ("x/0.png", b"b")], "two images for the key x/0, x/0.jpg and x/0.png"),
        ([("0.png", b"a"), ("0.cls", b"1"), ("0.cls", b"2")], "two members 0.cls"),
        ([("0.png", b"a"), ("0.json", b"[1]")], "0.json must be an object in braces"),
        ([("0.png", b"a"), ("0.json", b"null")], "0.json must be an object in braces"),
        ([("0.png", b"a"), ("0.json", b'{"label": 1')], "0.json is not JSON"),
        ([("0.png", b"a"), ("0.txt", b"caf\xe9")], "0.txt is not UTF-8"),
        ([("0.png", b"a"), ("0.cls", b"1"), ("1.png", b"a")], "a.tar: 1 has no label"),
        ([("0.png", (tarfile.LNKTYPE, "9.png"))], "0.png is a link to 9.png, which is not in it"),
        ([("0.png", (tarfile.SYMTYPE, "../9.png"))], "which is not in it"),
        ([("0.png", (tarfile.FIFOTYPE, ""))], "0.png is not a plain file"),
        ([("v1.0.png", b"a")], "the key of a sample ends at the first dot"),
    ],
)
def test_shards_with_odd_members_are_refused(tmp_path, members, message):
    with pytest.raises(UserError, match=message):
        read_shard(shard_of(tmp_path / "a.tar", *members))


def test_links_and_marks_in_shards_are_read(tmp_path, pictures):
    members = [
        ("x/0.PNG", pictures[0]),
        ("x/0.json", b'\xef\xbb\xbf{"label": 2.0}'),
        ("x/0.txt", b"\xef\xbb\xbfa cat\r\n"),
        ("1.png", (tarfile.LNKTYPE, "x/0.PNG")),
        ("1.json", (tarfile.SYMTYPE, "./x/0.json")),
        ("1.txt", b"a dog"),
        ("x/._0.png", b"junk"),
        ("x/0.mask.png", b"junk"),
    ]
    store = read_shard(shard_of(tmp_path / "a.tar", *members))
    assert store.labels.tolist() == [2, 2] and store.captions == ("a cat", "a dog")
    assert store.content(0) == store.content(1) == pictures[0]
    (tmp_path / "a.tar").write_bytes((tmp_path / "a.tar").read_bytes()[:600])
    with pytest.raises(OSError, match="has become shorter"):
        store.content(0)
