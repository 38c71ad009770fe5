"""From settings to a data set."""

from pathlib import Path

from mhla_gen.config import DataConfig
from mhla_gen.data.arrays import ArrayImages, digits, load_npz
from mhla_gen.data.caching.cached import CachedLatents
from mhla_gen.data.huggingface import saved_dataset
from mhla_gen.data.images import EncodedImages
from mhla_gen.data.protocol import TrainingData
from mhla_gen.data.stores import FileStore, ImageStore, class_folders, listed_images
from mhla_gen.data.webdataset import tar_shards
from mhla_gen.errors import MissingError, UserError


def load_data(config: DataConfig) -> TrainingData:
    """Open what a config says to train on.

    Raises:
        ValueError: If the data do not fit their description.
        FileNotFoundError: If they are missing.
    """
    if config.source == "cache":
        cache = CachedLatents.open(str(config.path))
        cache.require(config)
        return cache
    images = open_images(config)
    if config.source == "list":
        assert isinstance(images, EncodedImages) and isinstance(images.store, FileStore)
        missing = [path for path in images.store.paths if not path.is_file()]
        if missing:
            raise MissingError(f"{config.path} lists {missing[0]}, which does not exist")
    return images


def open_images(config: DataConfig) -> ArrayImages | EncodedImages:
    """Open images that a config names, in pixels.

    Raises:
        ValueError: If they do not fit their description, or it describes no images.
        FileNotFoundError: If they are missing.
    """
    if config.source == "digits":
        return _of_size(digits(), config)
    path = str(config.path)
    if config.source == "npz":
        return _of_size(load_npz(Path(path), config.num_classes), config)
    columns = config.label_column, config.caption_column, config.num_classes
    if config.source == "folder":
        store: ImageStore = class_folders(Path(path), config.num_classes)
    elif config.source == "list":
        store = listed_images(Path(path), *columns)
    elif config.source == "webdataset":
        store = tar_shards(path, *columns)
    elif config.source == "huggingface":
        store = saved_dataset(config)
    else:
        cached = "; run `mhla-gen cache` to train on clips" if config.source == "clips" else ""
        raise UserError(f"data.source={config.source} does not contain images in pixels{cached}")
    assert config.image_size is not None
    return EncodedImages(store, config.image_size, config.failed_reads)


def _of_size(images: ArrayImages, config: DataConfig) -> ArrayImages:
    size = images.image_shape[-1]
    if config.image_size not in (None, size):
        raise UserError(
            f"data.image_size is {config.image_size} but the {config.source} images are "
            f"{size} pixels wide; leave it out or set it to {size}"
        )
    return images
