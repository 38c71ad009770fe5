"""What a set would be, how large, and how long it would take: one small batch is timed."""

import math
import time

import torch

from mhla_gen.config import SampleConfig
from mhla_gen.sampling.batched_sampler import BatchedSampler
from mhla_gen.sampling.samplers import Sampler
from mhla_gen.sampling.units import Units

_TIMED_STEPS = (2, 4)


def timed(sampler: Sampler, units: Units, config: SampleConfig, processes: int) -> str:
    """How long the set would take, in words, from two short draws of one unit.

    Args:
        sampler: Of the set, on its device.
        units: Of the set.
        config: Its settings.
        processes: How many share the work.
    """
    seconds = []
    for steps in (_TIMED_STEPS[0], *_TIMED_STEPS):
        # The first draw compiles and allocates; it does not count.
        with BatchedSampler(sampler, units, steps, units.rows, config.reproducible) as batched:
            began = time.perf_counter()
            for _, samples in batched.draw([0]):
                samples.cpu()
            seconds.append(time.perf_counter() - began)
    few, more = _TIMED_STEPS
    per_step = max(0.0, seconds[2] - seconds[1]) / (more - few)
    fixed = max(0.0, seconds[1] - few * per_step)
    per_unit = fixed + per_step * config.num_inference_steps
    total = per_unit * -(-len(units) // processes)
    return (
        f"about {duration(total)} at {units.count / max(total, 1e-9):.3g} samples/s, from {few} "
        f"and {more} of {config.num_inference_steps} steps with {units.rows} samples"
    )


def size(sampler: Sampler, formats: tuple[str, ...]) -> str:
    """How much disk the samples take, in words."""
    pixels = len(sampler) * math.prod(sampler.shape)
    # PNG of photographs saves about a third; mp4 depends on the content too much to say.
    sizes = {"npz": f"npz {megabytes(pixels)}", "png": f"png at most {megabytes(pixels)}"}
    return ", ".join(sizes.get(name, f"{name} of unknown size") for name in formats) or "no samples"


def megabytes(count: float) -> str:
    """Bytes in words."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"


def duration(seconds: float) -> str:
    """Seconds in words."""
    if seconds < 100:
        return f"{seconds:.2g} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def memory() -> str:
    """The most GPU memory used so far, in words; nothing without a GPU."""
    if not torch.cuda.is_available():
        return ""
    return f", {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB of GPU memory"
