"""Cost of flushing a checkpoint of 3 GB to the disk before it is renamed.

    python benchmarks/flush_speed.py FOLDER

Measured three times: seconds to write three safetensors files of 1 GiB, to flush them, and to
compute the SHA-256 of all three. FOLDER must not exist; it must be on the disk to be measured.
"""

import itertools
import shutil
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from safetensors.torch import save_file

from mhla_gen.files import flush
from mhla_gen.files.digests import file_digest

NAMES = ("model", "average", "optimizer")


def main(folder: Path) -> None:
    """Measure in a new folder and remove it."""
    folder.mkdir(parents=True)
    tensors = {str(number): torch.randn(16, 2**20) for number in range(16)}
    files = [folder / f"{name}.safetensors" for name in NAMES]
    try:
        for _ in range(3):
            moments = [time.perf_counter()]
            for file in files:
                save_file(tensors, file)
            moments.append(time.perf_counter())
            flush(folder)
            moments.append(time.perf_counter())
            with ThreadPoolExecutor() as pool:
                list(pool.map(file_digest, files))
            moments.append(time.perf_counter())
            write, wait, digest = (b - a for a, b in itertools.pairwise(moments))
            print(f"write {write:.2f} s, flush {wait:.2f} s, SHA-256 {digest:.2f} s")
            for file in files:
                file.unlink()
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
