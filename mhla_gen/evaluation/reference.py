"""Building references: statistics of the user's own images, in a file."""

from pathlib import Path

import numpy as np
from tqdm import tqdm

from mhla_gen.config import ReferenceConfig
from mhla_gen.evaluation.measurer import Measurer
from mhla_gen.evaluation.outs import check_statistics
from mhla_gen.evaluation.sources import ImageSource, frame_shape
from mhla_gen.evaluation.statistics_file import STATISTICS_KEYS, write_statistics
from mhla_gen.files import remove_leftovers
from mhla_gen.media.pictures import UnreadableImageError
from mhla_gen.runtime.processes import on_main


def build_reference(config: ReferenceConfig, dry_run: bool = False) -> Path | None:
    """Write statistics of the user's own images under ADM's keys.

    Args:
        config: Which images, size and extractor.
        dry_run: Check that everything is there, and stop.

    Returns:
        The file; None after a dry run.

    Raises:
        UserError: If settings are missing or do not fit, as an `EvaluationError` if images or
            extractor are missing or unusable.
    """
    config.check_files()
    out = Path(config.out)
    check_statistics(out)
    measurer = Measurer.start(config.features, config.size, config.skip_corrupt)
    source = measurer.open(config.data)
    labels = source.labels()
    protocol = measurer.protocol(frame_shape(source))
    if dry_run:
        print(f"would measure {len(source)} images of {source.name}: {protocol}")
        return None
    on_main(lambda: remove_leftovers(out.parent))
    names = [name for name in STATISTICS_KEYS if name in measurer.extractor.dims]
    measured = measurer.features(source, names)

    def write() -> None:
        statistics = {name: measured.statistics(name) for name in names}
        kept = {} if measurer.clip else kept_images(source, config.keep_images, config.seed, labels)
        write_statistics(out, statistics, protocol, kept)
        labelled = ", labels" if "labels" in kept else ""
        print(f"{out}: {measured.count} images{labelled}, {protocol}")

    on_main(write)
    return out


def kept_images(
    source: ImageSource, count: int, seed: int, labels: np.ndarray | None
) -> dict[str, np.ndarray]:
    """A random subset of readable images, in order; all of them if there are not more.

    Args:
        source: All images.
        count: How many are wanted.
        seed: Fixes which.
        labels: Of all images, if they have any.

    Returns:
        `arr_0`, uint8 [count, height, width, 3], and their `labels`, int64 [count]; nothing if no
        images are wanted.
    """
    chosen = np.random.default_rng(seed).permutation(len(source))
    images: dict[int, np.ndarray] = {}
    wanted = min(count, len(source))
    with tqdm(desc="keeping", total=wanted, unit="image", delay=3, leave=False) as bar:
        for index in chosen.tolist():
            if len(images) == count:
                break
            try:
                images[index] = source.read(index)
            except UnreadableImageError:
                continue
            bar.update()
    if not images:
        return {}
    numbers = sorted(images)
    kept = {"arr_0": np.stack([images[number] for number in numbers])}
    return kept if labels is None else kept | {"labels": labels[numbers]}
