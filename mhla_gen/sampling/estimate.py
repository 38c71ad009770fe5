"""How large a set will be and how long it will take, by timing two steps of a few samples."""

import math
import time

import torch

from mhla_gen.config import SampleConfig
from mhla_gen.runtime.devices import resolve_device
from mhla_gen.runtime.processes import tell
from mhla_gen.sampling.batched_sampler import BatchedSampler
from mhla_gen.sampling.prompt_sampler import PromptSampler
from mhla_gen.sampling.samplers import Sampler
from mhla_gen.sampling.units import Units

# Steps of the draw that is timed: the first compiles and allocates, the second counts.
_TIMED_STEPS = 2
# Sets of fewer steps, over all calls, are made in the time that it takes to time one.
_WORTH_TIMING = 20
# On a CPU a whole unit is timed if that takes about this many seconds.
_PATIENCE = 5.0


def remaining(
    sampler: Sampler, units: Units, missing: int, config: SampleConfig, processes: int
) -> str:
    """How long `missing` units take, as the end of a sentence; empty if that is short."""
    if missing * (config.num_inference_steps or 1) < _WORTH_TIMING:
        return ""
    rest = "" if missing == len(units) else f" for the {missing} of {len(units)} units left"
    return f"; {timed(sampler, units, config, processes, missing)}{rest}"


def timed(
    sampler: Sampler, units: Units, config: SampleConfig, processes: int, missing: int | None = None
) -> str:
    """How long a set takes, in words, by timing a unit, or on a CPU one sample, with few steps.

    Says first what it times.

    Args:
        sampler: Of the set, on its device.
        units: Of the set.
        config: Its settings.
        processes: How many share the work.
        missing: Units that are not there yet; all by default.
    """
    steps = config.num_inference_steps or 1
    rows, per_sample = _timed_rows(sampler, units, steps, config)
    missing = len(units) if missing is None else missing
    total = per_sample * units.rows * -(-missing // processes)
    rate = units.rows * missing / max(total, 1e-9)
    return (
        f"about {duration(total)} at {rate:.3g} samples/s, from one of {steps} steps with "
        f"{_samples(rows)}"
    )


def _timed_rows(
    sampler: Sampler, units: Units, steps: int, config: SampleConfig
) -> tuple[int, float]:
    """How many samples were timed together, and the seconds that one of them takes."""
    # A GPU takes a unit in the time of a few samples, and shows whether it fits into memory. On a
    # CPU each sample takes its time, and a unit of large ones would take many minutes.
    on_cpu = resolve_device(config.device).type == "cpu"
    first = Units(units.count, 1) if on_cpu else units
    tell(f"timing {_TIMED_STEPS} of {steps} steps with {_samples(first.rows)}")
    began = time.perf_counter()
    per_sample = _seconds_of_a_unit(sampler, first, steps, config.reproducible) / first.rows
    taken = time.perf_counter() - began
    if first.rows == units.rows or taken * units.rows > _PATIENCE:
        return first.rows, per_sample
    return units.rows, _seconds_of_a_unit(sampler, units, steps, config.reproducible) / units.rows


def _samples(count: int) -> str:
    return f"{count} sample{'s' if count > 1 else ''}"


def _seconds_of_a_unit(sampler: Sampler, units: Units, steps: int, reproducible: bool) -> float:
    ends: list[float] = []

    def end_step(_: float) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        ends.append(time.perf_counter())

    began = time.perf_counter()
    if isinstance(sampler, PromptSampler) and sampler.num_chunks:
        # All chunks take the same time, and the first is not denoised beside others.
        next(sampler.stream(0, _TIMED_STEPS, on_step=end_step))[1].cpu()
        rest = time.perf_counter() - ends[-1]
        return units.rows * sampler.num_chunks * (steps * (ends[-1] - ends[-2]) + rest)
    with BatchedSampler(sampler, units, _TIMED_STEPS, units.rows, reproducible) as batched:
        for _, samples in batched.draw([0], end_step):
            samples.cpu()
    total = time.perf_counter() - began
    if len(ends) < _TIMED_STEPS:
        # A pipeline that does not tell of its steps.
        return total / _TIMED_STEPS * steps
    # Pipelines with one image a call draw the samples of a unit one after the other.
    calls = len(ends) / _TIMED_STEPS
    return calls * (steps * (ends[-1] - ends[-2]) + began + total - ends[-1])


def size(sampler: Sampler, formats: tuple[str, ...]) -> str:
    """How much disk space the samples take, in words."""
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
