"""Samplers: the samples of a set by number, made by a pipeline."""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from mhla_gen.errors import NotFiniteError, one_line
from mhla_gen.pipelines.class_conditional import ClassConditionalPipeline
from mhla_gen.pipelines.noise import generator_of, sample_seed

# Called with what is done: steps of a call, or samples of a set. Either may be a fraction.
OnStep = Callable[[float], None]


class Sampler(Protocol):
    """A set of samples to be made.

    Sample i is a function of i alone: it has its own source of noise.
    """

    pipeline: Any
    model_batch_size: int
    """Samples of one call of the models, unless the config says."""
    one_call: bool
    """Whether one call of the pipeline is repeatable only as a whole."""
    is_video: bool
    num_chunks: int | None
    """Chunks that a clip is made in, one after the other; None if it is made at once."""
    shape: tuple[int, ...]
    """Of a sample: (height, width, channels), or (frames, height, width, channels)."""

    def __len__(self) -> int: ...

    def draw(self, numbers: Sequence[int], steps: int, on_step: OnStep | None = None) -> Tensor:
        """Samples, uint8 `[batch, *shape]` on the pipeline's device.

        Args:
            numbers: Which samples.
            steps: Denoising steps.
            on_step: Called with the number of steps done.

        Raises:
            NotFiniteError: If a sample is NaN or infinite somewhere.
        """
        ...

    def title(self, number: int) -> str:
        """The title of a sample in a picture: its class or its prompt."""
        ...

    def record(self, number: int) -> dict[str, Any]:
        """How a sample was made: label or prompt, and seed."""
        ...

    def rows(self) -> list[tuple[str, list[int]]]:
        """Titled rows of samples for a picture of the set."""
        ...


class ClassSampler:
    """Images of classes."""

    model_batch_size = 64
    one_call = False
    is_video = False
    num_chunks: int | None = None

    def __init__(
        self,
        pipeline: ClassConditionalPipeline,
        labels: np.ndarray,
        *,
        seed: int,
        **options: Any,
    ):
        """Take the labels `[samples]`, the seed of the set, and arguments for the pipeline."""
        self.pipeline, self.labels, self.seed, self.options = pipeline, labels, seed, options
        vae, config = pipeline.vae, pipeline.transformer.config
        channels = config.in_channels if vae is None else vae.config.out_channels
        side = options.get("image_size") or config.sample_size * pipeline.vae_scale_factor
        self.shape = (side, side, channels)

    def __len__(self) -> int:
        return len(self.labels)

    def draw(self, numbers: Sequence[int], steps: int, on_step: OnStep | None = None) -> Tensor:
        """See `Sampler`."""
        done = Steps(on_step)
        result: Any = self.pipeline(
            self.labels[list(numbers)].tolist(),
            num_inference_steps=steps,
            generator=[generator_of(sample_seed(self.seed, int(i))) for i in numbers],
            output_type="pt",
            callback_on_step_end=done,
            **self.options,
        )
        require_finite(self, numbers, result.images, done.latents)
        return to_pixels(result.images)

    def title(self, number: int) -> str:
        """See `Sampler`."""
        return self.pipeline.class_names[self.labels[number]]

    def record(self, number: int) -> dict[str, Any]:
        """See `Sampler`."""
        label = int(self.labels[number])
        seed = sample_seed(self.seed, number)
        return {"label": label, "class": self.title(number), "seed": seed}

    def rows(self) -> list[tuple[str, list[int]]]:
        """See `Sampler`."""
        names = self.pipeline.class_names
        chosen = list(dict.fromkeys(self.labels.tolist()))[:_SHEET_ROWS]
        return [
            (names[label], np.flatnonzero(self.labels == label)[:_SHEET_COLUMNS].tolist())
            for label in chosen
        ]


# A picture of the set is to be looked at: no more than this.
_SHEET_ROWS, _SHEET_COLUMNS = 40, 10


def to_pixels(samples: Tensor) -> Tensor:
    """`[…, channels, height, width]` in [0, 1] as uint8 `[…, height, width, channels]`."""
    return samples.mul(255).round().to(torch.uint8).movedim(-3, -1).contiguous()


class Steps:
    """What diffusers calls after every step: counts them, and keeps the last latents."""

    def __init__(self, on_step: OnStep | None):
        self.on_step = on_step
        self.latents: Tensor | None = None

    def __call__(
        self, pipeline: Any, step: int, timestep: Any, tensors: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """See `callback_on_step_end` of diffusers."""
        self.latents = tensors.get("latents")
        if self.on_step is not None:
            self.on_step(step + 1)
        return {}


def require_finite(sampler: Sampler, numbers: Sequence[int], *tensors: Tensor | None) -> None:
    """Raise if a sample has a pixel or a latent that is NaN or infinite.

    As an integer it would be black, and infinity is clipped to white: pictures like any other.

    Args:
        sampler: Names the samples.
        numbers: Of the samples.
        tensors: `[samples, …]`, before pixels become integers; None is left out.

    Raises:
        NotFiniteError: Naming the first of them.
    """
    kept = [tensor for tensor in tensors if tensor is not None and len(tensor) == len(numbers)]
    # One value to wait for.
    finite = torch.stack([tensor.isfinite().flatten(1).all(1) for tensor in kept]).all(0)
    if finite.all():
        return
    first = numbers[int((~finite).nonzero()[0])]
    seed = sampler.record(first)["seed"]
    raise NotFiniteError(
        f"sample {first} ({one_line(sampler.title(first))}, seed {seed}) is not finite: the model "
        "returned NaN or infinity; try dtype=float32 or bfloat16, or another checkpoint"
    )
