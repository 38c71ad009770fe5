"""The kernels in which a step spends its time."""

import re
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

_STEPS = 3
_LISTED = 40
# By part of a kernel's name; the first that fits.
_KINDS = (
    # Their names list all that was fused.
    ("fused elementwise", r"^triton_"),
    ("communication", r"nccl"),
    ("optimizer", r"multi_tensor|fused_adam|aten::lerp_|foreach|adamw"),
    ("softmax attention", r"fmha|flash|cudnn_generated|cudnn::fusion|sdpa|attention_[fb]wd"),
    (
        "exact tiles",
        r"tile_|read_boxes|(prepare|entries|products|list|reads|owners)_kernel",
    ),
    ("depthwise convolution", r"conv_lines|backward_lines|conv_frames|conv_taps|sums_"),
    (
        "MHLA",
        r"summarise_|apply_kernel|coefficients_|mix_kernel|correlate_|backward_queries|backward_keys"
        r"|attend_kernel|causal_step|linear_mhla|attention_mhla",
    ),
    ("products", r"gemm|nvjet|cutlass|xmma|cublas|splitk|addmm|aten::mm|aten::bmm|scaled_mm"),
    ("copies", r"memcpy|memset|copy_kernel|aten::copy_"),
)


def kernel_times(step: Callable[[], Any], device: torch.device) -> dict[str, Any]:
    """Time that a step spends in each kernel, or on a CPU in each operator.

    Args:
        step: Called a few times; it has run before.
        device: Where it runs.

    Returns:
        `ms`, the sum of a step; `kinds`, its parts in ms; and `kernels`, the longest first, each
        with its name, kind, ms a step and calls a step. On a GPU also `step_ms`, which is more than
        without a profile where the host is the limit, and of it `communication_alone_ms` and
        `idle_ms`: the time in which it only communicates, and does nothing.
    """
    gpu = device.type == "cuda"
    with profile(activities=[ProfilerActivity.CUDA if gpu else ProfilerActivity.CPU]) as profiled:
        for _ in range(_STEPS):
            step()
        if gpu:
            torch.cuda.synchronize()
    kernels = []
    for event in profiled.key_averages():
        microseconds = event.self_device_time_total if gpu else event.self_cpu_time_total
        # Annotations are drawn around kernels, as if they were kernels, too.
        if microseconds > 0 and not event.is_user_annotation:
            kernels.append(
                {
                    "name": event.key[:120],
                    "kind": kind_of(event.key),
                    "ms": round(microseconds / 1e3 / _STEPS, 4),
                    "calls": round(event.count / _STEPS, 1),
                }
            )
    kernels.sort(key=lambda kernel: -kernel["ms"])
    kinds: dict[str, float] = {}
    for kernel in kernels:
        kinds[kernel["kind"]] = kinds.get(kernel["kind"], 0.0) + kernel["ms"]
    unused = {}
    if gpu:
        spans = [
            (event.time_range.start, event.time_range.end, kind_of(event.name) == "communication")
            for event in profiled.events() or ()
            if event.device_type == DeviceType.CUDA and not event.is_user_annotation
        ]
        unused = {name: round(us / 1e3 / _STEPS, 3) for name, us in unused_time(spans).items()}
    return {
        "ms": round(sum(kinds.values()), 3),
        **unused,
        "kinds": {name: round(ms, 3) for name, ms in sorted(kinds.items(), key=lambda x: -x[1])},
        "kernels": kernels[:_LISTED],
    }


def unused_time(spans: Iterable[tuple[float, float, bool]]) -> dict[str, float]:
    """Time from the first kernel to the last, and the part of it in which none computes.

    Args:
        spans: Start and end of each kernel, and whether it communicates.

    Returns:
        `step_ms`, all of this time, `communication_alone_ms` and `idle_ms`, in the unit of `spans`.
    """
    # +1 where a kernel starts, -1 where it ends, for each of the two kinds.
    changes = sorted(
        (time, kind, change)
        for start, end, kind in spans
        for time, change in ((start, 1), (end, -1))
    )
    running, alone, idle = [0, 0], 0.0, 0.0
    before = changes[0][0] if changes else 0.0
    for time, kind, change in changes:
        if not running[False]:
            if running[True]:
                alone += time - before
            else:
                idle += time - before
        running[kind] += change
        before = time
    span = before - changes[0][0] if changes else 0.0
    return {"step_ms": span, "communication_alone_ms": alone, "idle_ms": idle}


def as_table(found: dict[str, Any], lines: int = 15) -> str:
    """What `kernel_times` found, as lines of text: parts of the step, then the longest kernels."""
    unused = {
        "only communication": found.get("communication_alone_ms"),
        "nothing": found.get("idle_ms"),
    }
    times = {"all": found["ms"], **found["kinds"], **unused}
    parts = [f"{ms:9.2f} ms  {name}" for name, ms in times.items() if ms is not None]
    longest = [
        f"{kernel['ms']:9.3f} ms {kernel['calls']:7.0f}×  {kernel['name'][:90]}"
        for kernel in found["kernels"][:lines]
    ]
    return "\n".join([*parts, *longest])


def kind_of(name: str) -> str:
    """The kind of a kernel or operator, by its name."""
    found = (kind for kind, names in _KINDS if re.search(names, name, re.IGNORECASE))
    return next(found, "others")
