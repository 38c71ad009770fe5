"""Small sample sets, made in memory."""

import numpy as np

from mhla_gen.pipelines.class_conditional import ClassConditionalPipeline
from mhla_gen.sampling.batched_sampler import BatchedSampler
from mhla_gen.sampling.progress import Progress
from mhla_gen.sampling.samplers import ClassSampler
from mhla_gen.sampling.units import Units


def generate(
    pipeline: ClassConditionalPipeline,
    labels: np.ndarray,
    *,
    seed: int,
    batch_size: int,
    num_inference_steps: int,
    guidance_scale: float,
    title: str = "sampling",
) -> np.ndarray:
    """One image per label, those that `mhla-gen sample` makes of these settings.

    Args:
        pipeline: Where the images come from.
        labels: Class numbers `[images]`.
        seed: Of the set; each image has its own, derived from it.
        batch_size: Images in work at a time; the images do not depend on it.
        num_inference_steps: Denoising steps.
        guidance_scale: Classifier-free guidance; 1 is none.
        title: Name of the progress bar.

    Returns:
        uint8 `[images, height, width, channels]`.
    """
    pipeline.set_progress_bar_config(disable=True)
    sampler = ClassSampler(pipeline, labels, seed=seed, guidance_scale=guidance_scale)
    units = Units.split(len(labels), sampler.model_batch_size)
    drawn: list[np.ndarray] = []
    progress = Progress(len(labels), lambda: sum(map(len, drawn)), title, show=True)
    batched = BatchedSampler(sampler, units, num_inference_steps, batch_size, reproducible=True)
    with progress, batched:
        for _, images in batched.draw(range(len(units)), progress.step):
            drawn.append(images.cpu().numpy())
    return np.concatenate(drawn)
