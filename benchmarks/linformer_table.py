"""Linformer's Table 3 on today's hardware: speed-up and memory of inference against softmax.

    python benchmarks/linformer_table.py OUT.json [--tokens 512 1024 …]     needs CUDA
    python benchmarks/linformer_table.py OUT.json --table                   only print the tables

Attention of RoBERTa-base's size (12 heads of 64 channels, bfloat16), for one sequence and one
layer's operator; the paper times whole models with shared projections on a V100. Softmax is cuDNN's
and, as far as it fits into memory, the plain matrix products that the paper compares with. Times
are medians over replays of a CUDA graph; memory is the peak above that before the call. Without
CUDA, torch's softmax replaces cuDNN's, to try the script.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from rows import Row, make_parser, markdown, measure_rows, number
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from mhla_gen.bench.measure import device_ms, peak_memory_gib
from mhla_gen.ops import linformer_attention

HEADS, HEAD_DIM = 12, 64
_RATIOS = {"faster": "ms", "less_memory": "peak_mib"}
PROJECTED = (128, 256, 512, 1024, 2048)
# Wang et al. 2020, arXiv:2006.04768, Table 3: tokens → (times faster, times less memory) by k.
PRINTED: dict[int, tuple[tuple[float, ...], tuple[float, ...]]] = {
    512: ((1.5, 1.3), (1.7, 1.5)),
    1024: ((1.7, 1.6, 1.3), (3.0, 2.9, 1.8)),
    2048: ((2.6, 2.4, 2.1, 1.3), (6.1, 5.6, 3.6, 2.0)),
    4096: ((3.4, 3.2, 2.8, 2.2, 1.3), (14, 13, 8.3, 4.3, 2.3)),
    8192: ((5.5, 5.0, 4.4, 3.5, 2.1), (28, 26, 17, 8.5, 4.5)),
    16384: ((8.6, 7.8, 7.0, 5.6, 3.3), (56, 48, 32, 16, 8)),
    32768: ((13, 12, 11, 8.8, 5.0), (56, 48, 36, 18, 16)),
    65536: ((20, 18, 16, 14, 7.9), (60, 52, 40, 20, 18)),
}


def cudnn(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """CuDNN's softmax attention, on tokens first."""
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION if query.is_cuda else SDPBackend.MATH):
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)


def plain(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Softmax attention with all weights in memory, as the paper's baseline."""
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    weights = (q @ k.mT * HEAD_DIM**-0.5).softmax(dim=-1)
    return (weights @ v).transpose(1, 2)


@torch.no_grad()
def measured(attend: Callable[[], Tensor], device: torch.device) -> dict[str, Any] | None:
    """Milliseconds and peak MiB of a call; None where it does not fit in memory."""
    try:
        ms = device_ms(attend, device)
        gib = peak_memory_gib(attend, device)
    except torch.OutOfMemoryError:
        return None
    finally:
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return {"ms": ms, "peak_mib": None if gib is None else 1024 * gib}


def measure(tokens: int, device: torch.device) -> Row:
    """Softmax, and every k that the paper has for so many tokens, with its figures."""
    shape = (3, 1, tokens, HEADS, HEAD_DIM)
    inputs = torch.randn(shape, dtype=torch.bfloat16, device=device)
    softmax = {
        "cudnn": measured(partial(cudnn, *inputs), device),
        "plain": measured(partial(plain, *inputs), device),
    }
    found = []
    for k, *printed in zip(PROJECTED, *PRINTED[tokens], strict=False):
        projection = torch.randn(k, tokens, dtype=torch.bfloat16, device=device) * k**-0.5
        linformer = measured(partial(linformer_attention, *inputs, projection), device)
        row: dict[str, Any] = {"k": k, "linformer": linformer}
        row["printed"] = dict(zip(_RATIOS, printed, strict=True))
        for name, other in softmax.items():
            if linformer is not None and other is not None:
                row[f"against_{name}"] = {
                    ratio: other[quantity] / linformer[quantity]
                    for ratio, quantity in _RATIOS.items()
                    if linformer[quantity]
                }
        found.append(row)
    return {"softmax": softmax, "projected": found}


def table(rows: list[Row]) -> str:
    """Markdown: for every k, times against cuDNN's and plain softmax, and those of the paper."""
    tables = []
    for ratio, title in (("faster", "times faster"), ("less_memory", "times less memory")):
        lines = []
        for row in sorted(rows, key=lambda row: row["tokens"]):
            cells = ["-"] * len(PROJECTED)
            for place, found in enumerate(row["projected"]):
                ratios = [found.get(f"against_{name}", {}) for name in ("cudnn", "plain")]
                both = " / ".join(number(each.get(ratio)) for each in ratios)
                cells[place] = f"{both} ({found['printed'][ratio]:g})"
            lines.append([f"{row['tokens']:,}", *cells])
        tables.append(markdown([f"{title}, n", *(f"k = {k}" for k in PROJECTED)], lines))
    return "\n\n".join(tables)


def main() -> None:
    """Measure every size."""
    parser = make_parser(__doc__, seconds=60)
    parser.add_argument("--tokens", type=int, nargs="+", choices=PRINTED, default=list(PRINTED))
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    cases: list[Row] = [{"tokens": tokens} for tokens in options.tokens]
    measure_rows(options, cases, lambda case: measure(case["tokens"], device), table)


if __name__ == "__main__":
    main()
