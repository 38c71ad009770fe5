"""The kernels in which a step spends its time."""

import re
from collections.abc import Callable
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

_STEPS = 3
_LISTED = 40
# By part of a kernel's name; the first that fits.
_KINDS = (
    ("softmax attention", r"fmha|flash|cudnn_generated|sdpa|attention_fwd|attention_bwd"),
    ("exact tiles", r"tile_|prepare_kernel|entries_kernel|list_kernel|read_boxes"),
    ("depthwise convolution", r"conv_lines|backward_lines|conv_taps|sums_taps|finish_"),
    (
        "MHLA",
        r"summarise_|apply_kernel|coefficients_|mix_kernel|correlate_|backward_queries|backward_keys"
        r"|attend_kernel|linear_mhla|attention_mhla",
    ),
    ("products", r"gemm|nvjet|cutlass|xmma|cublas|splitk|addmm|aten::mm|aten::bmm|scaled_mm"),
    ("optimizer", r"multi_tensor|fused_adam|lerp|foreach|adamw"),
    ("copies", r"memcpy|memset|copy_kernel|aten::copy_"),
    ("fused elementwise", r"triton_"),
)


def kernel_times(step: Callable[[], Any], device: torch.device) -> dict[str, Any]:
    """Time that a step spends in each kernel, or on a CPU in each operator.

    Args:
        step: Called a few times; it has run before.
        device: Where it runs.

    Returns:
        `ms`, the sum of a step; `kinds`, its parts in ms; and `kernels`, the longest first, each
        with its name, kind, ms a step and calls a step.
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
        if microseconds > 0:
            kernels.append(
                {
                    "name": event.key[:120],
                    "kind": _kind(event.key),
                    "ms": round(microseconds / 1e3 / _STEPS, 4),
                    "calls": round(event.count / _STEPS, 1),
                }
            )
    kernels.sort(key=lambda kernel: -kernel["ms"])
    kinds: dict[str, float] = {}
    for kernel in kernels:
        kinds[kernel["kind"]] = kinds.get(kernel["kind"], 0.0) + kernel["ms"]
    return {
        "ms": round(sum(kinds.values()), 3),
        "kinds": {name: round(ms, 3) for name, ms in sorted(kinds.items(), key=lambda x: -x[1])},
        "kernels": kernels[:_LISTED],
    }


def as_table(found: dict[str, Any], lines: int = 15) -> str:
    """What `kernel_times` found, as lines of text: parts of the step, then the longest kernels."""
    parts = [f"{ms:9.2f} ms  {name}" for name, ms in {"all": found["ms"], **found["kinds"]}.items()]
    longest = [
        f"{kernel['ms']:9.3f} ms {kernel['calls']:7.0f}×  {kernel['name'][:90]}"
        for kernel in found["kernels"][:lines]
    ]
    return "\n".join([*parts, *longest])


def _kind(name: str) -> str:
    found = (kind for kind, names in _KINDS if re.search(names, name, re.IGNORECASE))
    return next(found, "others")
