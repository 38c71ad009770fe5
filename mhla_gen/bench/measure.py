"""Latency and memory of a function, on a GPU or a CPU."""

import statistics
import time
from collections.abc import Callable, Collection
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch.nn.attention import SDPBackend

from mhla_gen.errors import UserError
from mhla_gen.runtime.softmax_kernels import cudnn_fault, softmax_on

# Rows of `BenchConfig.methods` that are softmax; None is torch's own choice.
SOFTMAX = {
    "softmax": None,
    "softmax_causal": None,
    "softmax_cudnn": SDPBackend.CUDNN_ATTENTION,
    "softmax_flash": SDPBackend.FLASH_ATTENTION,
}
_CPU_SECONDS = 0.3
_LONG_MS = 50


def kernels_of(method: str, device: torch.device) -> AbstractContextManager[Any]:
    """Let softmax attention run on the kernels that a method names alone, inside.

    Raises:
        UserError: If the device cannot have them.
    """
    if method == "softmax_cudnn" and device.type != "cuda":
        raise UserError(f"softmax_cudnn needs a CUDA GPU, found {device.type}; use softmax")
    backend = SOFTMAX.get(method)
    return nullcontext() if backend is None else softmax_on(backend)


def training_kernels_of(
    method: str, lengths: Collection[int], kinds: int, device: torch.device
) -> AbstractContextManager[Any]:
    """Let softmax attention train on the kernels that `train` takes, inside: not always cuDNN's.

    Args:
        method: If it names kernels, these stay.
        lengths: See `cudnn_fault`, like all other arguments.
        kinds: Kinds of blocks.
        device: Where the model trains.
    """
    reason = cudnn_fault(lengths, kinds, device)
    if SOFTMAX.get(method) is not None or reason is None:
        return nullcontext()
    print(f"{method} trains without cuDNN's softmax, which may fault where {reason}", flush=True)
    return softmax_on(SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH)


def latency_ms(function: Callable[[], object], device: torch.device) -> float:
    """Median time of one call, launch by launch as Python issues them."""
    if device.type == "cuda":
        function()
        if _event_ms(function) > _LONG_MS:
            return statistics.median(_event_ms(function) for _ in range(3))
        from triton.testing import do_bench

        median: Any = do_bench(function, warmup=25, rep=150, return_mode="median")
        return median
    function()
    times: list[float] = []
    while len(times) < 3 or sum(times) < _CPU_SECONDS:
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return 1e3 * statistics.median(times)


def _event_ms(function: Callable[[], object]) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    function()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def device_ms(function: Callable[[], object], device: torch.device) -> float:
    """Median time of one call, without what Python takes to launch it.

    On a GPU the call is replayed as a CUDA graph, unless it is so long that launching it does not
    count.
    """
    if device.type != "cuda":
        return latency_ms(function, device)
    # The first call compiles and loads kernels.
    function()
    if _event_ms(function) > _LONG_MS:
        return latency_ms(function, device)
    # Calls on this stream first allocate what a recording must find there, such as workspaces.
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            function()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        function()
    return latency_ms(graph.replay, device)


def peak_memory_gib(function: Callable[[], object], device: torch.device) -> float | None:
    """Peak memory of one call beyond what is allocated before it, in GiB; on a GPU only."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    result = function()
    torch.cuda.synchronize()
    del result
    return (torch.cuda.max_memory_allocated() - before) / 2**30


def copy_bandwidth(device: torch.device) -> float:
    """Bytes per second that a large copy reads and writes."""
    size = 2**30 if device.type == "cuda" else 2**26
    source = torch.empty(size, dtype=torch.uint8, device=device).fill_(1)
    target = torch.empty_like(source)
    return 2 * size / (1e-3 * latency_ms(lambda: target.copy_(source), device))
