"""Causal attention over token counts: MHLA's kernels and PyTorch code beside causal softmax.

    python benchmarks/causal_speed.py OUT.json             needs CUDA
    python benchmarks/causal_speed.py OUT.json --table     only print the table

Milliseconds of forward, and of forward and backward: medians over replays of a CUDA graph;
bfloat16, blocks of 64 tokens, a weight for each of 32 distances, rotary tables of a language model.
`kernels` are the parts of the fused form.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from kernel_speed import time_ms
from rows import Row, make_parser, markdown, measure_rows
from torch.nn.attention import SDPBackend, sdpa_kernel

from mhla_gen.bench.measure import device_ms
from mhla_gen.ops import causal_mhla, distance_mixing, locality_weights, window_attention
from mhla_gen.ops.blockwise import blockwise_mhla
from mhla_gen.ops.kernels import causal_form, linear_form
from mhla_gen.ops.kernels.launch import Call, stored_dtype

# [batch, heads, tokens, head_dim], in the order of what they decide
SHAPES = ([1, 16, 16384, 64], [4, 16, 4096, 64], [1, 16, 131072, 64], [32, 5, 1024, 64],
          [1, 16, 16384, 128])  # fmt: skip
BLOCK = 64


def arms(tokens: tuple[torch.Tensor, ...], rotary: Any) -> dict[str, Callable[..., torch.Tensor]]:
    """Functions of query, key and value to time, by name."""
    seq_len = tokens[0].shape[1]
    weights = locality_weights(32).cuda()
    mixing = distance_mixing(weights, seq_len // BLOCK)

    def softmax(backend: SDPBackend, *x: torch.Tensor) -> torch.Tensor:
        heads_first = (t.transpose(1, 2) for t in x)
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(*heads_first, is_causal=True).transpose(1, 2)

    def fused(*x: torch.Tensor) -> torch.Tensor:
        return causal_mhla(*x, weights, block_size=BLOCK, rotary=rotary)

    def blockwise(*x: torch.Tensor) -> torch.Tensor:
        return blockwise_mhla(
            *x, mixing, grid=(seq_len,), layout=(seq_len // BLOCK,), feature_map="relu",
            rotary=rotary, normalize=True, causal=True, eps=1e-6,
        )  # fmt: skip

    def window(*x: torch.Tensor) -> torch.Tensor:
        return window_attention(*x, window=256, rotary=rotary)[0]

    return {
        "softmax, cuDNN": partial(softmax, SDPBackend.CUDNN_ATTENTION),
        "softmax, flash": partial(softmax, SDPBackend.FLASH_ATTENTION),
        "MHLA": fused,
        "window of 256": window,
        "MHLA in PyTorch": blockwise,
    }


def kernels(tokens: tuple[torch.Tensor, ...], rotary: Any) -> dict[str, Callable[[], object]]:
    """Parts of the fused form."""
    query, key, value, grad = tokens
    num_blocks = query.shape[1] // BLOCK
    mixing = distance_mixing(locality_weights(32).cuda(), num_blocks)
    call = Call(
        query, value, *rotary, [query.shape[1]], [num_blocks], "relu", True, 1e-6,
        stored_dtype(query.dtype),
    )  # fmt: skip
    _, inverse, summaries, mixed = causal_form.forward(query, key, value, mixing, call)
    lower = mixing.tril(-1)
    return {
        "summarise": lambda: linear_form.summarise(key, value, call),
        "mix": lambda: linear_form.mix(lower, summaries, call, "lower"),
        "correlate": lambda: linear_form.correlate(mixed, summaries, mixing, call, lower=True),
        "forward": lambda: causal_form.forward(query, key, value, mixing, call),
        "backward": lambda: causal_form.backward(
            grad, query, key, value, mixing, inverse, summaries, mixed, call
        ),
    }


def measure(shape: list[int]) -> Row:
    """One row."""
    batch, heads, seq_len, dim = shape
    device = torch.device("cuda")
    query, key, value, grad = torch.randn(
        4, batch, seq_len, heads, dim, dtype=torch.bfloat16, device=device
    )
    positions = torch.arange(seq_len, device=device)[:, None]
    angles = positions * 1e4 ** (-torch.arange(dim // 2, device=device) / (dim // 2))
    rotary = angles.cos(), angles.sin()
    row: Row = {"ms": {}}
    for name, function in arms((query, key, value), rotary).items():
        trained = [x.detach().clone().requires_grad_() for x in (query, key, value)]

        def both(function: Any = function, trained: Any = trained) -> object:
            return torch.autograd.grad(function(*trained), trained, grad)

        try:
            with torch.no_grad():
                row["ms"][name] = [device_ms(lambda f=function: f(query, key, value), device)]
            row["ms"][name].append(device_ms(both, device))
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
            row["ms"].setdefault(name, []).append(None)
    found = kernels((query, key, value, grad), rotary)
    row["kernels"] = {name: time_ms(function) for name, function in found.items()}
    return row


def table(rows: list[Row]) -> str:
    """Markdown for docs/kernel-speed.md: milliseconds forward, forward and backward."""
    rows = sorted((row for row in rows if "ms" in row), key=lambda row: row["shape"][2:])
    names = list(rows[0]["ms"]) if rows else []
    lines = [[str(row["shape"]), *(_both(row["ms"][name]) for name in names)] for row in rows]
    return markdown(["[batch, heads, tokens, head_dim]", *names], lines)


def _both(times: list[float | None]) -> str:
    return ", ".join("out of memory" if ms is None else f"{ms:.2f}" for ms in times)


def main() -> None:
    """Measure every shape."""
    options = make_parser(__doc__, seconds=60).parse_args()
    cases: list[Row] = [{"shape": shape} for shape in SHAPES]
    measure_rows(options, cases, lambda case: measure(case["shape"]), table)


if __name__ == "__main__":
    main()
