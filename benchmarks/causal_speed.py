"""Causal attention over token counts: MHLA's kernels and PyTorch code beside causal softmax.

python benchmarks/causal_speed.py OUT.json        needs CUDA

Medians in milliseconds of forward, and of forward and backward; bfloat16, blocks of 64 tokens, a
weight for each of 32 distances, rotary tables of a language model. `kernels` are the parts of the
fused form, timed by replaying a CUDA graph.
"""

import argparse
import json
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import triton
from kernel_speed import time_ms
from triton.testing import do_bench

from mhla_gen.ops import causal_mhla, distance_mixing, locality_weights, window_attention
from mhla_gen.ops.blockwise import blockwise_mhla
from mhla_gen.ops.kernels import causal_form, linear_form
from mhla_gen.ops.kernels.launch import Call, stored_dtype

# [batch, heads, tokens, head_dim]
SHAPES = ((32, 5, 1024, 64), (4, 16, 4096, 64), (1, 16, 16384, 64), (1, 16, 16384, 128),
          (1, 16, 131072, 64))  # fmt: skip
BLOCK = 64


def arms(tokens: tuple[torch.Tensor, ...], rotary: Any) -> dict[str, Callable[..., torch.Tensor]]:
    """Functions of query, key and value to time, by name."""
    seq_len = tokens[0].shape[1]
    weights = locality_weights(32).cuda()
    mixing = distance_mixing(weights, seq_len // BLOCK)

    def softmax(*x: torch.Tensor) -> torch.Tensor:
        heads_first = (t.transpose(1, 2) for t in x)
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

    return {"softmax": softmax, "mhla": fused, "window": window, "blockwise": blockwise}


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


def median_ms(function: Callable[[], object]) -> float:
    """Median time of a call, including its launches."""
    median: Any = do_bench(function, warmup=10, rep=60, return_mode="median")
    return round(median, 4)


def measure(shape: tuple[int, int, int, int]) -> dict[str, Any]:
    """One row."""
    batch, heads, seq_len, dim = shape
    query, key, value, grad = torch.randn(
        4, batch, seq_len, heads, dim, dtype=torch.bfloat16, device="cuda"
    )
    positions = torch.arange(seq_len, device="cuda")[:, None]
    angles = positions * 1e4 ** (-torch.arange(dim // 2, device="cuda") / (dim // 2))
    rotary = angles.cos(), angles.sin()
    row: dict[str, Any] = {"shape": shape}
    for name, function in arms((query, key, value), rotary).items():
        trained = [x.detach().clone().requires_grad_() for x in (query, key, value)]

        def both(function: Any = function, trained: Any = trained) -> None:
            function(*trained).backward(grad, inputs=trained)
            for x in trained:
                x.grad = None

        try:
            with torch.no_grad():
                row[name] = [median_ms(lambda f=function: f(query, key, value))]
            row[name].append(median_ms(both))
        except torch.cuda.OutOfMemoryError:
            row[name] = "out of memory"
    found = kernels((query, key, value, grad), rotary)
    row["kernels"] = {name: time_ms(function) for name, function in found.items()}
    return row


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown for mhla_gen/ops/README.md: milliseconds forward, forward and backward."""
    names = [name for name in rows[0] if name not in ("shape", "kernels")]
    header = ["[batch, heads, tokens, head_dim]", *names]
    lines = [f"| {' | '.join(header)} |", "|---" * len(header) + "|"]
    for row in rows:
        times = (row[name] for name in names)
        cells = [t if isinstance(t, str) else ", ".join(f"{ms:.2f}" for ms in t) for t in times]
        lines.append(f"| {list(row['shape'])} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Measure every shape; print and write each row when it is done."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    out = parser.parse_args().out
    found: dict[str, Any] = {
        "command": f"python benchmarks/causal_speed.py {out}",
        "date": date.today().isoformat(),
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "rows": [],
    }
    for shape in SHAPES:
        row = measure(shape)
        found["rows"].append(row)
        print(row, flush=True)
        out.write_text(json.dumps(found, indent=1) + "\n")
    print(table(found["rows"]))


if __name__ == "__main__":
    main()
