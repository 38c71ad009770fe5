"""Time tile attention beside cuDNN's softmax and FlexAttention, at shares of the pairs.

python benchmarks/tile_speed.py OUT.json [--cases 3] [--shares 0.05] [--forward]        needs CUDA

Medians over replays of a CUDA graph; bfloat16. `limit` is the project's target for the exact half,
share · softmax / 0.7 + 60 µs. `whole` adds MHLA on the same inputs.
"""

import argparse
import math
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from kernel_speed import time_ms
from rows import machine
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from mhla_gen.bench.ops import Case
from mhla_gen.files import write_json
from mhla_gen.ops import auto_layout, auto_tiles, locality_mixing, mhla, tile_attention, tile_share

SHARES = (0.02, 0.05, 0.125, 0.25)
CASES = (
    Case(32, 4, (64, 64), 64, (8, 8), False),
    Case(1, 6, (128, 128), 64, auto_layout((128, 128)), False),
    Case(1, 12, (21, 30, 50), 128, (3, 5, 10), True),
    Case(1, 40, (21, 45, 80), 128, (3, 5, 10), True),
    Case(14, 4, (9, 32, 32), 64, (3, 4, 8), False),
    Case(1, 12, (9, 32, 32), 128, (3, 4, 8), True),
)


def both(
    attend: Callable[..., Tensor], inputs: list[Tensor], grad: Tensor | None
) -> dict[str, float]:
    """Milliseconds of a forward pass and, with `grad`, of forward and backward."""
    with torch.no_grad():
        forward = time_ms(lambda: attend(*inputs))
    if grad is None:
        return {"forward_ms": forward}
    inputs = [x.detach().requires_grad_() for x in inputs]
    train = time_ms(lambda: torch.autograd.grad(attend(*inputs), inputs, grad))
    return {"forward_ms": forward, "train_ms": train}


def softmax(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """cuDNN's, on tokens first."""
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        q, k, v = (x.transpose(1, 2) for x in (query, key, value))
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)


def measure(
    case: Case, shares: Sequence[float] = SHARES, *, forward: bool = False
) -> dict[str, Any]:
    """Softmax, MHLA and every share at one shape."""
    tokens = math.prod(case.grid)
    shape = (case.batch, tokens, case.heads, case.head_dim)
    *inputs, grad = torch.randn(4, *shape, dtype=torch.bfloat16, device="cuda")
    grad = None if forward else grad
    angles = torch.rand(tokens, case.head_dim // 2, device="cuda") * 2 * math.pi
    rotary = (angles.cos(), angles.sin()) if case.rotary else None
    mixing = locality_mixing(case.layout).cuda()
    linear = partial(mhla, mixing=mixing, grid=case.grid, layout=case.layout, rotary=rotary)
    reference = both(softmax, inputs, grad)
    row: dict[str, Any] = {**case._asdict(), "softmax": reference, "shares": []}
    row["mhla"] = both(linear, inputs, grad)
    for share in shares:
        layout = auto_tiles(case.grid, share)._asdict()
        exact = partial(tile_attention, grid=case.grid, rotary=rotary, **layout)

        def half(q: Tensor, k: Tensor, v: Tensor, exact: Any = exact) -> Tensor:
            return exact(q, k, v)[0]

        def whole(q: Tensor, k: Tensor, v: Tensor, exact: Any = exact) -> Tensor:
            return exact(q, k, v)[0] + linear(q, k, v)

        found = tile_share(case.grid, **layout)
        limit = {name: found * ms / 0.7 + 0.06 for name, ms in reference.items()}
        row["shares"].append(
            {
                "share": found,
                "layout": layout,
                "exact": both(half, inputs, grad),
                "limit": limit,
                "whole": both(whole, inputs, grad),
            }
        )
        print(case.grid, row["shares"][-1], flush=True)
    return row


def flex() -> dict[str, Any]:
    """FlexAttention on random lists of blocks of 128 tokens; tiles of 64 in groups of two."""
    blocks, read, heads = 246, 12, 12
    tokens = 128 * blocks
    *inputs, grad = torch.randn(4, 1, tokens, heads, 128, dtype=torch.bfloat16, device="cuda")
    order = torch.rand(1, heads, blocks, blocks, device="cuda").argsort(dim=-1).int()
    count = torch.full((1, heads, blocks), read, dtype=torch.int32, device="cuda")
    mask = BlockMask.from_kv_blocks(torch.zeros_like(count), order, count, order, BLOCK_SIZE=128)
    compiled: Any = torch.compile(partial(flex_attention, block_mask=mask))

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (query, key, value))
        return compiled(q, k, v).transpose(1, 2)

    layout = {"tile": (64,), "group": (2,), "window": (0,), "top": 2 * read}
    tiles = partial(tile_attention, grid=(tokens,), **layout)
    return {
        "shape": [1, heads, tokens, 128],
        "share": read / blocks,
        "flex_attention": both(attend, inputs, grad),
        "tile_attention": both(lambda q, k, v: tiles(q, k, v)[0], inputs, grad),
    }


def main() -> None:
    """Measure every shape; print and write each row when it is done."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--cases", type=int, nargs="+", help="some shapes, without FlexAttention")
    parser.add_argument("--shares", type=float, nargs="+", default=SHARES)
    parser.add_argument("--forward", action="store_true", help="the forward pass only")
    options = parser.parse_args()
    found: dict[str, Any] = {**machine(), "rows": []}
    for number in range(len(CASES)) if options.cases is None else options.cases:
        case = CASES[number]
        found["rows"].append(measure(case, options.shares, forward=options.forward))
        write_json(options.out, found, indent=1)
    if options.cases is None:
        found["flex"] = flex()
        print(found["flex"])
        write_json(options.out, found, indent=1)


if __name__ == "__main__":
    main()
