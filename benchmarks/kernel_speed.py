"""Time every fused kernel alone, and both passes of the form that runs, at the shapes of models.

python benchmarks/kernel_speed.py OUT.json        needs CUDA

Medians over replays of a CUDA graph with a flushed cache; bfloat16.
"""

import argparse
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rows import machine
from torch import Tensor
from triton.testing import do_bench

from mhla_gen.bench.ops import MODELS, Case
from mhla_gen.files import write_json
from mhla_gen.ops import locality_mixing
from mhla_gen.ops.fused import attention_form_is_cheaper
from mhla_gen.ops.kernels import attention_form, linear_form
from mhla_gen.ops.kernels.launch import Call, merge_axes, stored_dtype


def time_ms(function: Callable[[], object]) -> float:
    """Median milliseconds of a call, without Python's launch time."""
    for _ in range(3):
        function()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function()
    median: Any = do_bench(graph.replay, warmup=10, rep=60, return_mode="median")
    return round(median, 4)


def kernels(case: Case) -> tuple[str, dict[str, Callable[[], object]]]:
    """The form used at this shape, and its kernels and passes by name."""
    tokens = math.prod(case.grid)
    query, key, value, grad = torch.randn(
        4, case.batch, tokens, case.heads, case.head_dim, dtype=torch.bfloat16, device="cuda"
    )
    angles = torch.rand(tokens, case.head_dim // 2, device="cuda") * 2 * math.pi
    tables = (angles.cos(), angles.sin()) if case.rotary else (None, None)
    box = merge_axes(list(case.grid), list(case.layout))
    call = Call(query, value, *tables, *box, "relu", True, 1e-6, stored_dtype(query.dtype))
    mixing = locality_mixing(case.layout).cuda()
    if attention_form_is_cheaper(tokens, call.num_blocks):
        return "attention", _attention(query, key, value, grad, mixing, call)
    return "linear", _linear(query, key, value, grad, mixing, call)


def _attention(
    query: Tensor, key: Tensor, value: Tensor, grad: Tensor, mixing: Tensor, call: Call
) -> dict[str, Callable[[], object]]:
    form = attention_form
    out, inverse = form.forward(query, key, value, mixing, call)
    shared = grad, query, key, value, mixing
    _, delta, _ = form.backward_queries(*shared, out, inverse, call)
    return {
        "forward": lambda: form.forward(query, key, value, mixing, call),
        "backward_queries": lambda: form.backward_queries(*shared, out, inverse, call),
        "backward_keys": lambda: form.backward_keys(*shared, inverse, delta, call),
        "backward": lambda: form.backward(*shared, out, inverse, call),
    }


def _linear(
    query: Tensor, key: Tensor, value: Tensor, grad: Tensor, mixing: Tensor, call: Call
) -> dict[str, Callable[[], object]]:
    form = linear_form
    summaries = form.summarise(key, value, call)
    mixed = form.mix(mixing, summaries, call)
    _, dmixed = form.backward_queries(grad, query, value, mixed, call)
    dsummaries = form.mix(mixing.mT, dmixed, call)
    tokens = grad, query, key, value, mixing
    return {
        "summarise": lambda: form.summarise(key, value, call),
        "mix": lambda: form.mix(mixing, summaries, call),
        "apply": lambda: form.apply(query, value, mixed, call),
        "forward": lambda: form.forward(query, key, value, mixing, call),
        "backward_queries": lambda: form.backward_queries(grad, query, value, mixed, call),
        "correlate": lambda: form.correlate(dmixed, summaries, mixing, call),
        "backward_keys": lambda: form.backward_keys(key, value, dsummaries, call),
        "backward": lambda: form.backward(*tokens, summaries, mixed, call),
    }


def main() -> None:
    """Measure every shape; print and write each row when it is done."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    out = parser.parse_args().out
    found: dict[str, Any] = {**machine(), "rows": []}
    for case in MODELS:
        form, functions = kernels(case)
        row = {**case._asdict(), "form": form, "ms": {k: time_ms(f) for k, f in functions.items()}}
        found["rows"].append(row)
        print(row, flush=True)
        write_json(out, found, indent=1)


if __name__ == "__main__":
    main()
