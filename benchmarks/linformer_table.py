"""Linformer's Table 3 on today's hardware: speed-up and memory of inference against softmax.

python benchmarks/linformer_table.py OUT.json        needs CUDA

Attention of RoBERTa-base's size (12 heads of 64 channels, bfloat16), one sequence, one layer's
operator: the paper times whole models with shared projections on a V100. Softmax is cuDNN's, and
the plain product of three matrices that the paper compares with, while it fits. Medians over
replays of a CUDA graph; memory is the peak beyond what was there before the call.
"""

import argparse
import json
from collections.abc import Callable
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from kernel_speed import time_ms
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from mhla_gen.ops import linformer_attention

HEADS, HEAD_DIM = 12, 64
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
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        q, k, v = (x.transpose(1, 2) for x in (query, key, value))
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)


def plain(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Softmax attention with all weights in memory, as the paper's baseline."""
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    weights = (q @ k.mT * HEAD_DIM**-0.5).softmax(dim=-1)
    return (weights @ v).transpose(1, 2)


@torch.no_grad()
def measured(attend: Callable[[], Tensor]) -> dict[str, float] | None:
    """Milliseconds and peak MiB of a call; None where it does not fit in memory."""
    try:
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        attend()
        torch.cuda.synchronize()
        mib = (torch.cuda.max_memory_allocated() - before) / 2**20
        return {"ms": time_ms(attend), "peak_mib": mib}
    except torch.OutOfMemoryError:
        return None


def rows(tokens: int) -> list[dict[str, Any]]:
    """Every k that is smaller than a number of tokens, beside what the paper prints."""
    inputs = torch.randn(3, 1, tokens, HEADS, HEAD_DIM, dtype=torch.bfloat16, device="cuda")
    softmax = {
        "cudnn": measured(partial(cudnn, *inputs)),
        "plain": measured(partial(plain, *inputs)),
    }
    found = []
    for k, *printed in zip(PROJECTED, *PRINTED[tokens], strict=False):
        projection = torch.randn(k, tokens, dtype=torch.bfloat16, device="cuda") * k**-0.5
        row: dict[str, Any] = {"tokens": tokens, "k": k, "softmax": softmax}
        row["linformer"] = linformer = measured(partial(linformer_attention, *inputs, projection))
        row["printed"] = dict(zip(("faster", "less_memory"), printed, strict=True))
        for name, other in softmax.items():
            if linformer is not None and other is not None:
                row[f"against_{name}"] = {
                    "faster": other["ms"] / linformer["ms"],
                    "less_memory": other["peak_mib"] / linformer["peak_mib"],
                }
        print(json.dumps(row), flush=True)
        found.append(row)
    return found


def main() -> None:
    """Measure every size and write the rows as they come."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    out = parser.parse_args().out
    result: dict[str, Any] = {
        "command": f"python benchmarks/linformer_table.py {out.name}",
        "date": date.today().isoformat(),
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "rows": [],
    }
    for tokens in PRINTED:
        result["rows"] += rows(tokens)
        out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
