"""Previews of a model in training: samples, mixing matrices, and metrics.

Nothing here touches the randomness or the weights of training.
"""

import sys
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import cast

import matplotlib
import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm

from mhla_gen.config import PreviewConfig
from mhla_gen.errors import NotFiniteError, UserError, not_worth_failing
from mhla_gen.files import write_arrays, write_picture
from mhla_gen.media.videos import shown_frames, write_video
from mhla_gen.models import MHLA
from mhla_gen.runtime.processes import on_main
from mhla_gen.training.parallel import whole
from mhla_gen.training.training_run import Run

PREVIEWS_NAME = "previews"
_METRICS_NAME = "metrics.json"
# Least side of a mixing matrix in its picture, in pixels.
_MATRIX_SIDE = 64
_GAP = 2


def write_previews(run: Run, step: int) -> None:
    """Write samples and mixing matrices to `previews`, and to the trackers.

    Every process must call it.
    """
    # Where processes share a model, one that gave up would leave the others waiting.
    shared = run.accelerator.is_fsdp2 and run.accelerator.num_processes > 1
    kept = not_worth_failing(f"the preview of step {step}", "training continues")
    with nullcontext() if shared else kept:
        samples = make_samples(run, run.config.samples)
        matrices = mean_mixing(run.accelerator.unwrap_model(run.model))
        if run.accelerator.is_main_process:
            _write_pictures(run, step, samples, matrices)


def _write_pictures(
    run: Run, step: int, samples: np.ndarray | None, matrices: Sequence[np.ndarray]
) -> None:
    pictures = {}
    if samples is not None and samples.ndim == 5:
        pictures["samples"] = np.concatenate([np.hstack([*shown_frames(clip)]) for clip in samples])
    elif samples is not None:
        pictures["samples"] = tiled(list(samples))
    if matrices:
        pictures["mixing"] = mixing_picture(matrices)
    folder = Path(run.config.output_dir) / PREVIEWS_NAME
    if samples is not None and samples.ndim == 5:
        for number, clip in enumerate(samples):
            write_video(folder / f"clip-{step:07d}-{number:02d}.mp4", clip, run.task.fps)
    # Last: they say that the previews of this step are there.
    for name, picture in pictures.items():
        write_picture(folder / f"{name}-{step:07d}.png", Image.fromarray(picture))
    for tracker in run.accelerator.trackers:
        axes = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
        tracker.log_images({name: p[None] for name, p in pictures.items()}, step=step, **axes)


def has_previews(folder: Path, step: int) -> bool:
    """Whether a run's folder has what `write_previews` writes."""
    return any((folder / PREVIEWS_NAME).glob(f"*-{step:07d}.png"))


def has_scores(folder: Path, step: int) -> bool:
    """Whether a run's folder has what `evaluate_samples` writes."""
    return (_scores(folder, step) / _METRICS_NAME).is_file()


def _scores(folder: Path, step: int) -> Path:
    return folder / "evaluations" / f"{step:07d}"


def evaluate_samples(run: Run, step: int) -> None:
    """Evaluate samples of the EMA weights, into `evaluations/<step>` and the trackers.

    Every process must call it.

    Raises:
        ValueError: If samples and reference do not compare any more; a run opens both at its start.
    """
    # Training alone needs none of the packages that evaluation brings.
    from mhla_gen.evaluation import evaluate

    try:
        samples = make_samples(run, run.config.evaluation.samples)
    except NotFiniteError as error:
        if run.accelerator.is_main_process:
            tqdm.write(f"no metrics of step {step}: {error}", file=sys.stderr)
        return
    assert samples is not None, "such a run does not start"
    folder = _scores(Path(run.config.output_dir), step)
    on_main(lambda: write_arrays(folder / "samples.npz", {"arr_0": samples}))
    settings = run.config.evaluation.settings
    drawn, out = str(folder / "samples.npz"), str(folder / _METRICS_NAME)
    results = evaluate(replace(settings, samples=drawn, out=out))
    run.accelerator.log({f"evaluation/{r.metric}": r.value for r in results}, step=step)


def make_samples(run: Run, config: PreviewConfig) -> np.ndarray | None:
    """Images of the EMA weights; every process makes its share, and gets all.

    Returns:
        uint8 `[images, height, width, channels]`; None for a model that no samples are made of.

    Raises:
        Exception: Whatever the drawing raises, in every process if in one.
    """
    if run.task.sampler is None:
        return None
    accelerator = run.accelerator
    count = accelerator.num_processes
    # As many for every process: where a model is shared, all must call it as often.
    share = -(-config.num_images // count)
    numbers = [(accelerator.process_index * share + i) % config.num_images for i in range(share)]
    if count == 1 or accelerator.is_fsdp2:
        images = _drawn(run, numbers, config)
    else:
        images, error = None, None
        try:
            images = _drawn(run, numbers, config)
        except Exception as found:
            error = found
        raised = torch.tensor([error is not None]).to(accelerator.device)
        failed = cast(Tensor, accelerator.gather(raised))
        if failed.any():
            raise error or UserError("another process could not draw its samples")
    gathered = accelerator.gather(torch.from_numpy(images).to(accelerator.device))
    return gathered[: config.num_images].cpu().numpy()


def _drawn(run: Run, numbers: Sequence[int], config: PreviewConfig) -> np.ndarray:
    assert run.task.sampler is not None
    with run.averaged_model(gather=False) as model:
        pipeline = run.task.pipeline(model)
        pipeline.set_progress_bar_config(disable=True)
        own = [
            run.task.sampler(pipeline, numbers[first : first + config.batch_size], config)
            for first in range(0, len(numbers), config.batch_size)
        ]
    return np.concatenate(own)


def mean_mixing(model: nn.Module) -> list[np.ndarray]:
    """The mixing matrix of every MHLA layer, the mean over heads where they have their own."""
    return [
        mean_over_heads(layer.matrix(whole(layer.mixing.detach())))
        for layer in model.modules()
        if isinstance(layer, MHLA) and layer.mixing is not None
    ]


def mean_over_heads(mixing: Tensor) -> np.ndarray:
    """A mixing matrix `[(heads,) blocks, blocks]` as one picture of it, float32."""
    return mixing.float().reshape(-1, *mixing.shape[-2:]).mean(0).cpu().numpy()


def mixing_picture(matrices: Sequence[np.ndarray]) -> np.ndarray:
    """Heat maps of mixing matrices in the order of the layers, dark 0, bright the largest weight.

    Returns:
        uint8 `[height, width, 3]`.
    """
    largest = max(float(matrix.max()) for matrix in matrices) or 1.0
    colours = matplotlib.colormaps["viridis"]
    pictures = []
    for matrix in matrices:
        scale = -(-_MATRIX_SIDE // len(matrix))
        shown = np.kron(matrix / largest, np.ones((scale, scale)))
        pictures.append((colours(shown)[..., :3] * 255).astype(np.uint8))
    return tiled(pictures)


def tiled(pictures: Sequence[np.ndarray]) -> np.ndarray:
    """Pictures of one size in rows, as square as possible; uint8 `[height, width, 3]`."""
    columns = int(np.ceil(np.sqrt(len(pictures))))
    height, width = pictures[0].shape[:2]
    rows = -(-len(pictures) // columns)
    size = rows * (height + _GAP) - _GAP, columns * (width + _GAP) - _GAP
    sheet = np.full((*size, 3), 255, dtype=np.uint8)
    for number, picture in enumerate(pictures):
        top, left = (number // columns) * (height + _GAP), (number % columns) * (width + _GAP)
        # Grey becomes three equal channels.
        sheet[top : top + height, left : left + width] = picture
    return sheet
