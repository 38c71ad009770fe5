"""Data sets, and the order in which training reads them."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from mhla_gen.cli import main
from mhla_gen.config import DataConfig
from mhla_gen.data import (
    ArrayImages,
    BatchOrder,
    EncodedImages,
    batches,
    derived_seed,
    load_data,
    open_images,
)
from mhla_gen.data.arrays import digits
from mhla_gen.media.pictures import centre_crop


@pytest.fixture
def image_folder(tmp_path):
    for name, colour in (("cat", (255, 0, 0)), ("ant", (0, 0, 255))):
        (tmp_path / name).mkdir()
        for i in range(3):
            Image.new("RGB", (20 + i, 12), colour).save(tmp_path / name / f"{i}.png")
    (tmp_path / "cat" / "notes.txt").write_text("no image")
    return tmp_path


def npz(path, images, labels):
    np.savez(path, arr_0=images, labels=labels)
    return DataConfig(source="npz", path=str(path))


@pytest.mark.parametrize(("num_images", "batch_size"), [(10, 4), (7, 7), (3, 8), (100, 1)])
def test_every_epoch_reads_every_image_once(num_images, batch_size):
    order = BatchOrder([range(num_images)], batch_size, seed=0)
    stream = [i for k in range(3 * num_images) for i in order.micro_batch(k)]
    epochs = [stream[e * num_images : (e + 1) * num_images] for e in range(3)]
    assert all(sorted(epoch) == list(range(num_images)) for epoch in epochs)
    assert num_images < 5 or epochs[0] != epochs[1]


def test_a_batch_does_not_depend_on_the_batches_before_it():
    for buckets in ([range(10)], [range(3), range(3, 20)]):
        straight = BatchOrder(buckets, 4, seed=3)
        expected = [straight.micro_batch(k) for k in range(12)]
        alone = [BatchOrder(buckets, 4, seed=3).micro_batch(k) for k in (11, 5, 0)]
        assert alone == [expected[11], expected[5], expected[0]]
        assert BatchOrder(buckets, 4, seed=4).micro_batch(5) != expected[5]


def test_buckets_are_not_mixed_and_take_turns_by_size():
    buckets = [range(0, 50), range(50, 53), range(53, 64)]
    order = BatchOrder(buckets, 4, seed=0)
    read = [order.micro_batch(k) for k in range(16 * 8)]
    assert all(sum(set(batch) <= set(bucket) for bucket in buckets) == 1 for batch in read)
    counts = np.bincount(np.concatenate(read), minlength=64)
    # Eight times 64 samples: eight epochs, of which a bucket may lack the last, unfinished part.
    assert counts.min() >= 7 and counts.max() <= 8
    turns = ["abc"[next(i for i, b in enumerate(buckets) if batch[0] in b)] for batch in read]
    assert turns[:16] != turns[16:32] and "b" in turns


def test_micro_batches_of_one_bucket_make_up_a_larger_batch():
    whole, parts = (BatchOrder([range(11)], size, seed=0) for size in (6, 3))
    for k in range(9):
        assert whole.micro_batch(k) == parts.micro_batch(2 * k) + parts.micro_batch(2 * k + 1)


def test_shares_of_processes_make_up_the_batch():
    images, order = digits(), BatchOrder([range(1797)], 8, seed=0)
    [whole] = next(batches(images, order, 2, 3))
    rows = slice(0, 4), slice(4, 8)
    shares = [next(batches(images, order, 2, 3, rows=share))[0]["samples"] for share in rows]
    assert torch.equal(torch.cat(shares), whole["samples"])
    assert list(batches(images, order, 3, 3)) == []
    small = BatchOrder([range(1797)], 4, seed=0)
    parts = next(batches(images, small, 2, 3, parts=2))
    assert torch.equal(torch.cat([part["samples"] for part in parts]), whole["samples"])


def test_derived_seeds_differ_and_stay():
    seeds = {derived_seed(seed, use, k) for seed in range(5) for use in (0, 1) for k in range(50)}
    assert len(seeds) == 500 and derived_seed(1, 2, 3) == derived_seed(1, 2, 3)


def test_digits_are_the_real_ones():
    images = open_images(DataConfig())
    batch = images.read(range(len(images)))
    pixels, labels = batch["samples"], batch["labels"]
    assert pixels.shape == (1797, 1, 8, 8) and images.image_shape == (1, 8, 8)
    assert pixels.min() == -1 and pixels.max() == 1 and pixels.dtype == torch.float32
    assert labels.bincount().tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]


def test_an_npz_file_is_read_as_it_was_written(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (5, 4, 4, 3), dtype=np.uint8)
    config = npz(tmp_path / "a.npz", pixels, np.array([0, 2, 1, 0, 2], dtype=np.int32))
    images = open_images(config)
    batch = images.read([3, 1])
    found, labels = batch["samples"], batch["labels"]
    assert labels.tolist() == [0, 2] and images.class_names == ("0", "1", "2")
    back = ((found + 1) * 127.5).round().permute(0, 2, 3, 1).numpy().astype(np.uint8)
    assert (back == pixels[[3, 1]]).all()


def test_a_folder_gives_sorted_classes_and_cropped_images(image_folder):
    images = open_images(DataConfig(source="folder", path=str(image_folder), image_size=6))
    assert images.class_names == ("ant", "cat") and len(images) == 6
    batch = images.read([0, 5])
    pixels, labels = batch["samples"], batch["labels"]
    assert pixels.shape == (2, 3, 6, 6) and labels.tolist() == [0, 1]
    assert pixels[0, :, 3, 3].tolist() == [-1, -1, 1] and pixels[1, :, 3, 3].tolist() == [1, -1, -1]


@pytest.mark.parametrize("size", [(8, 8), (33, 70), (9, 8), (640, 480)])
def test_the_centre_crop_has_the_size_asked_for(size):
    assert centre_crop(Image.new("RGB", size), 8).size == (8, 8)


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        (np.zeros((2, 4, 4, 1), np.float32), np.zeros(2, int), "uint8"),
        (np.zeros((2, 4, 5, 1), np.uint8), np.zeros(2, int), "square"),
        (np.zeros((0, 4, 4, 1), np.uint8), np.zeros(0, int), "square"),
        (np.zeros((2, 4, 4, 1), np.uint8), np.zeros(3, int), "one integer per image"),
        (np.zeros((2, 4, 4, 1), np.uint8), np.zeros(2), "one integer per image"),
        (np.zeros((2, 4, 4, 1), np.uint8), np.array([0, -1]), "must be in"),
    ],
)
def test_arrays_that_do_not_fit_are_refused(tmp_path, images, labels, message):
    with pytest.raises(ValueError, match=message):
        open_images(npz(tmp_path / "a.npz", images, labels))


def test_bad_files_are_named(tmp_path, image_folder):
    (tmp_path / "junk.npz").write_text("junk")
    with pytest.raises(ValueError, match=r"junk\.npz is not an npz file"):
        open_images(DataConfig(source="npz", path=str(tmp_path / "junk.npz")))
    np.savez(tmp_path / "b.npz", images=np.zeros(3))
    with pytest.raises(ValueError, match="must contain arr_0 and labels"):
        open_images(DataConfig(source="npz", path=str(tmp_path / "b.npz")))
    with pytest.raises(FileNotFoundError, match="is not a file"):
        open_images(DataConfig(source="npz", path=str(tmp_path / "none.npz")))


def test_the_next_of_its_class_takes_the_place_of_a_broken_image(image_folder, capsys):
    (image_folder / "cat" / "9.png").write_text("junk")
    images = open_images(DataConfig(source="folder", path=str(image_folder), image_size=6))
    labels = np.asarray(images.labels)
    assert images.describe(6).endswith("cat/9.png") and labels[6] not in labels[7:]
    first = int(np.flatnonzero(labels == labels[6])[0])
    for _ in range(2):
        found = images.read([6, first])
        assert torch.equal(found["samples"][0], found["samples"][1])
        assert torch.equal(found["labels"], torch.from_numpy(labels[[6, first]]))
    assert capsys.readouterr().err.count("9.png cannot be decoded") == 1


def test_any_number_of_broken_images_is_gone_past_and_listed(tmp_path, capsys):
    for name in ("ant", "bee", "cat"):
        (tmp_path / "images" / name).mkdir(parents=True)
        for i in range(30):
            Image.new("RGB", (8, 8), (i, 0, 0)).save(tmp_path / "images" / name / f"{i:02d}.png")
    broken = [tmp_path / "images" / "bee" / f"{i:02d}.png" for i in range(30) if i != 17]
    for path in broken:
        path.write_text("junk")
    config = DataConfig(source="folder", path=str(tmp_path / "images"), image_size=8)
    listing = tmp_path / "broken.jsonl"
    read = []
    # As two starts of a run, which read in other orders.
    for first, others in (([0], [40, 45]), ([45, 1], [40, 0])):
        images = load_data(config)
        assert isinstance(images, EncodedImages)
        images.read(first)
        images.broken.list_in(listing)
        images.read(others)
        read.append(images.read(range(90)))
        said = capsys.readouterr().err
        assert all(said.count(f"bee/{path.name} cannot be decoded") == 1 for path in broken)
    assert torch.equal(read[0]["samples"], read[1]["samples"])
    labels = read[0]["labels"]
    assert labels.bincount().tolist() == [30, 30, 30]
    bees = read[0]["samples"][labels == 1]
    assert (bees == bees[0]).all() and bees[0, 0, 0, 0] == 17 / 127.5 - 1
    lines = [json.loads(line) for line in listing.read_text().splitlines()]
    assert sorted(line["name"] for line in lines) == sorted(map(str, broken))
    assert all("cannot be decoded" in line["reason"] for line in lines)


def test_a_class_of_broken_images_is_an_error_before_the_first_step(
    image_folder, tmp_path_factory, capsys
):
    for path in (image_folder / "cat").glob("*.png"):
        path.write_text("junk")
    settings = {"source": "folder", "path": str(image_folder), "image_size": 8}
    with pytest.raises(ValueError, match=r"no image of class cat .*3 in all.*0\.png cannot be dec"):
        # An ant, which could be read.
        load_data(DataConfig(**settings)).read([0])
    # Inside of the data it would be a class folder.
    run = tmp_path_factory.mktemp("runs") / "run"
    given = [f"data.{key}={value}" for key, value in settings.items()]
    assert main(["train", f"output_dir={run}", *given]) == 2
    assert "no image of class cat can be read" in capsys.readouterr().err
    assert not run.exists()


def test_folders_without_images_are_refused(tmp_path):
    config = DataConfig(source="folder", path=str(tmp_path / "none"), image_size=8)
    with pytest.raises(FileNotFoundError, match="is not a folder"):
        open_images(config)
    (tmp_path / "none").mkdir()
    with pytest.raises(FileNotFoundError, match="has no sub-folders"):
        open_images(config)
    (tmp_path / "none" / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="no images"):
        open_images(config)


def test_a_size_that_the_data_do_not_have_is_refused():
    with pytest.raises(ValueError, match="8 pixels wide"):
        open_images(DataConfig(image_size=16))
    with pytest.raises(ValueError, match="image_size"):
        DataConfig(source="folder", path="x")


def test_a_path_without_a_source_is_no_digits(tmp_path, capsys):
    with pytest.raises(ValueError, match=r"data\.path=images is given.*set data\.source=folder"):
        DataConfig(path="images")
    run = [f"output_dir={tmp_path / 'run'}", f"data.path={tmp_path}"]
    assert main(["train", *run]) == 2
    assert "data.source=digits reads no files" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_class_names_must_cover_the_labels():
    with pytest.raises(ValueError, match="must be in"):
        ArrayImages(np.zeros((1, 2, 2, 1), np.uint8), np.array([1]), ("only",))
