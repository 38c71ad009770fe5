"""Extraction: images → features, in chunks that any number of processes can share."""

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from mhla_gen.evaluation.errors import EvaluationError
from mhla_gen.evaluation.extractor import Extractor
from mhla_gen.evaluation.feature_cache import SETTINGS_NAME, limit_cache
from mhla_gen.evaluation.feature_files import FeatureSet, collect, is_complete, write_chunk
from mhla_gen.evaluation.sources import ImageSource, frame_shape
from mhla_gen.files import remove_leftovers, write_json
from mhla_gen.files.digests import settings_digest
from mhla_gen.media.pictures import UnreadableImageError
from mhla_gen.runtime.processes import on_main, processes

# Images per file of features. Fixed, so that another number of processes can use the same
# files; an interruption loses one chunk per process, and in the end the others wait for it.
CHUNK = 256
# Of the files; those of another are computed again.
FORMAT = 2
_LISTED = 10


class ImageBatch(NamedTuple):
    """What a loader returns: the readable images of a range, and why others are missing."""

    images: Tensor
    """uint8 [n, height, width, 3] or [n, frames, height, width, 3]."""
    unreadable: dict[int, str]
    mismatch: str
    """Set if an image has another size than the first one."""


class ImageBatchReader(Dataset[ImageBatch]):
    """Reads ranges of a source; runs in worker processes."""

    def __init__(self, source: ImageSource, ranges: Sequence[range], frame_shape: tuple[int, ...]):
        self._source, self._ranges, self._shape = source, ranges, frame_shape

    def __len__(self) -> int:
        return len(self._ranges)

    def __getitem__(self, item: int) -> ImageBatch:
        images: list[np.ndarray] = []
        unreadable: dict[int, str] = {}
        mismatch = ""
        for index in self._ranges[item]:
            try:
                image = self._source.read(index)
            except UnreadableImageError as error:
                unreadable[index] = f"{self._source.label(index)} {error}"
                continue
            if image.shape[:-1] != self._shape:
                mismatch = f"{self._source.label(index)} is {_size(image.shape[:-1])}"
                break
            images.append(image)
        stacked = np.stack(images) if images else np.zeros((0, *self._shape, 3), np.uint8)
        return ImageBatch(torch.as_tensor(stacked, device="cpu"), unreadable, mismatch)


def extract_features(
    source: ImageSource,
    extractor: Extractor,
    names: Sequence[str],
    *,
    cache_dir: str | Path,
    cache_limit_gb: float,
    settings: dict[str, Any],
    batch_size: int = 64,
    num_workers: int = 0,
    skip_corrupt: bool = False,
) -> FeatureSet:
    """Features of all images, computed once per content and protocol.

    Every process takes each n-th chunk and writes it to `cache_dir`, which all must share; chunks
    that exist are not computed again. So an interrupted run is resumed where it stopped, and the
    result does not depend on the number of processes.

    Args:
        source: The images.
        extractor: On its device already.
        names: Features wanted, of `extractor.dims`.
        cache_dir: Folder for features, shared by all sources and extractors.
        cache_limit_gb: What this folder may hold; see `limit_cache`.
        settings: What else decides the features, such as the crop; part of the fingerprint.
        batch_size: Images per forward pass.
        num_workers: Processes that decode.
        skip_corrupt: Leave unreadable images out.

    Returns:
        The features.

    Raises:
        EvaluationError: If images differ in size, or some are unreadable and may not be skipped.
    """
    digest, shape = on_main(lambda: (source.digest(), frame_shape(source)))
    cache_dir = Path(cache_dir).expanduser()
    folder = _open_folder(cache_dir, digest, extractor, settings, source)
    chunks = [range(i, min(i + CHUNK, len(source))) for i in range(0, len(source), CHUNK)]
    state = processes()
    mine = range(state.process_index, len(chunks), state.num_processes)
    missing = [i for i in mine if not is_complete(folder, names, i)]
    batches = [
        [range(i, min(i + batch_size, chunks[c].stop)) for i in chunks[c][::batch_size]]
        for c in missing
    ]
    reader = ImageBatchReader(source, [batch for chunk in batches for batch in chunk], shape)
    stream = iter(_loader(reader, num_workers, extractor))
    rows = max((len(indices) for chunk in batches for indices in chunk), default=0)
    # Chunks are copied from the device and written in the background.
    with _progress(source, missing, len(mine)) as bar, ThreadPoolExecutor(1) as writer:
        written: list[Future[None]] = []
        for chunk, ranges in zip(missing, batches, strict=True):
            outputs: list[dict[str, Tensor]] = []
            unreadable: dict[int, str] = {}
            for indices in ranges:
                batch = next(stream)
                _require_one_size(batch, source, shape)
                unreadable |= batch.unreadable
                if len(batch.images):
                    outputs.append(_forward(extractor, batch.images, names, rows))
                bar.update(len(indices) * state.num_processes)
            dims = {name: extractor.dims[name] for name in names}
            written.append(writer.submit(write_chunk, folder, chunk, outputs, dims, unreadable))
            if len(written) > 1:
                written[-2].result()
        if written:
            written[-1].result()
    state.wait_for_everyone()
    on_main(lambda: limit_cache(cache_dir, cache_limit_gb))
    found = collect(folder, len(chunks), names[0], digest)
    _require_readable(found, source, skip_corrupt)
    return found


def _progress(source: ImageSource, missing: Sequence[int], mine: int) -> "tqdm[Any]":
    # Shown by the main process, which takes the others to be as far as itself.
    done = (mine - len(missing)) * CHUNK * processes().num_processes
    return tqdm(
        desc=source.name[-40:],
        total=len(source),
        initial=min(done, len(source)),
        unit="image",
        disable=not processes().is_main_process,
    )


def _open_folder(
    cache_dir: Path,
    digest: str,
    extractor: Extractor,
    settings: dict[str, Any],
    source: ImageSource,
) -> Path:
    everything = {
        "images": digest,
        "count": len(source),
        "extractor": asdict(extractor.identity),
        "chunk": CHUNK,
        "format": FORMAT,
        **settings,
    }
    folder = cache_dir / settings_digest(everything)[:32]

    def make() -> None:
        for place in (cache_dir, folder):
            remove_leftovers(place)
        write_json(folder / SETTINGS_NAME, {**everything, "source": source.name})

    on_main(make)
    return folder


def _loader(
    reader: ImageBatchReader, num_workers: int, extractor: Extractor
) -> DataLoader[ImageBatch]:
    return DataLoader(
        reader,
        batch_size=None,
        shuffle=False,
        num_workers=min(num_workers, len(reader)),
        pin_memory=extractor.device.type == "cuda",
    )


def _forward(
    extractor: Extractor, images: Tensor, names: Sequence[str], rows: int
) -> dict[str, Tensor]:
    """Features by name, `[images, dim]`.

    On a GPU every batch has as many rows: for another number cuDNN would try its algorithms again,
    which takes as long as thousands of images.
    """
    count, device = len(images), extractor.device
    pixels = images.to(device, non_blocking=True).movedim(-1, -3)
    if device.type == "cuda" and count < rows:
        pixels = torch.cat([pixels, pixels[:1].expand(rows - count, *pixels.shape[1:])])
    features = extractor(pixels)
    return {name: features[name][:count] for name in names}


def _require_one_size(batch: ImageBatch, source: ImageSource, shape: tuple[int, ...]) -> None:
    if batch.mismatch:
        raise EvaluationError(
            f"{source.name} holds images of different sizes: the first is {_size(shape)}, "
            f"{batch.mismatch}; size=N crops and scales all of them as ADM does"
        )


def _require_readable(found: FeatureSet, source: ImageSource, skip_corrupt: bool) -> None:
    if found.unreadable and not skip_corrupt:
        lines = list(found.unreadable.values())[:_LISTED]
        listed = "".join(f"\n  {line}" for line in lines)
        more = len(found.unreadable) - _LISTED
        rest = f"\n  and {more} more" if more > 0 else ""
        raise EvaluationError(
            f"{len(found.unreadable)} of {len(source)} images of {source.name} cannot be read; "
            f"fix them, or leave them out with skip_corrupt=true:{listed}{rest}"
        )


def _size(shape: tuple[int, ...]) -> str:
    return " × ".join(map(str, shape))
