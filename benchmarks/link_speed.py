"""Speed of the collectives that training uses, between the GPUs of a host.

    torchrun --standalone --nproc-per-node 2 benchmarks/link_speed.py link.json

DDP sums gradients in float32 in buckets of 25 MB; FSDP2 gathers the weights of a block, and sums
and scatters its gradients: 90 MB for a DiT-XL/2, 180 MB for a Wan-1.3B. Rates are bytes of the
whole buffer by time, and `sent`, bytes that each GPU sends, by time.
"""

import argparse
import json
import os
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rows import Row, machine
from sharing import turns
from steps import median_seconds

from mhla_gen.files import write_json


def main() -> None:
    """Measure each collective at each size."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--megabytes", type=float, nargs="+", default=[1, 25, 90, 180, 1000])
    parser.add_argument("--locks", nargs="*", default=[], help="see sharing.turns")
    options = parser.parse_args()
    gpu = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if gpu else torch.device("cpu")
    if gpu:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if gpu else "gloo")
    with turns(*options.locks) as alone, alone():
        rows = measure(options.megabytes, device)
    if dist.get_rank() == 0:
        facts = machine() | {"gpus": dist.get_world_size(), "links": links() if gpu else None}
        write_json(options.out, facts | {"rows": rows}, indent=1)
    dist.destroy_process_group()


def measure(sizes: Sequence[float], device: torch.device) -> list[Row]:
    """Each collective at each of these sizes in MB."""
    rows = []
    for megabytes in sizes:
        for name, (call, sent) in collectives(int(megabytes * 1e6), device).items():
            median_seconds(call, 3)
            seconds = median_seconds(call, 10)
            rate = megabytes / 1e3 / seconds
            row = {"collective": name, "megabytes": megabytes, "ms": 1e3 * seconds}
            row |= {"gb_per_s": rate, "sent_gb_per_s": rate * sent}
            rows.append(row)
            if dist.get_rank() == 0:
                print(json.dumps(row), flush=True)
    return rows


def collectives(size: int, device: torch.device) -> dict[str, tuple[Callable[[], Any], float]]:
    """Calls on buffers of this many bytes, and the share of the bytes that each GPU sends."""
    world = dist.get_world_size()
    part = torch.zeros(size // 4 // world, device=device)
    whole = torch.zeros(len(part) * world, device=device)
    share = (world - 1) / world
    return {
        "all-reduce": (lambda: dist.all_reduce(whole), 2 * share),
        "all-gather": (lambda: dist.all_gather_into_tensor(whole, part), share),
        "reduce-scatter": (lambda: dist.reduce_scatter_tensor(part, whole), share),
    }


def links() -> str:
    """How the GPUs are linked, as nvidia-smi draws it."""
    found = subprocess.run(["nvidia-smi", "topo", "-m"], capture_output=True, encoding="utf-8")
    return found.stdout or found.stderr


if __name__ == "__main__":
    main()
