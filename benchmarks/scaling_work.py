"""The work of each process of scaling.py for samples and for features, started by torchrun.

torchrun --nproc-per-node 8 benchmarks/scaling_work.py OUT.json samples --folder SHARED
"""

import argparse
import hashlib
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from diffusers import DiTTransformer2DModel, FlowMatchEulerDiscreteScheduler
from rows import machine
from sharing import Alone, turns
from steps import synchronize

from mhla_gen import ClassConditionalPipeline, MHLAConfig, inject
from mhla_gen.config import SampleConfig, load_config
from mhla_gen.evaluation import InceptionExtractor, load_images
from mhla_gen.evaluation.features import extract_features
from mhla_gen.evaluation.inception import write_random_weights
from mhla_gen.files import write_json
from mhla_gen.runtime.processes import join_processes, on_main, part_processes
from mhla_gen.sampling.batched_sampler import BatchedSampler
from mhla_gen.sampling.building import place
from mhla_gen.sampling.samplers import ClassSampler
from mhla_gen.sampling.units import Units

_MODEL = {"num_attention_heads": 6, "attention_head_dim": 64, "num_layers": 12, "patch_size": 4}
_TINY = {"num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 1, "patch_size": 4}
_SIDE = 64


def main() -> None:
    """Do one of the two, and write the results of the main process."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("work", choices=WORK)
    parser.add_argument("--folder", type=Path, required=True, help="that all processes share")
    parser.add_argument("--count", type=int, default=50_000)
    parser.add_argument("--batch-size", type=int, help="of each process; by default 625 and 256")
    parser.add_argument("--attention", default="mhla")
    parser.add_argument("--tiny", action="store_true", help="a small model, to try the script")
    parser.add_argument("--locks", nargs="*", default=[], help="see sharing.turns")
    options = parser.parse_args()
    state = join_processes("auto")
    with turns(*options.locks) as alone:
        row = WORK[options.work](options, state, alone)
    if state.is_main_process:
        rate = round(options.count / row["seconds"], 1)
        row = {"devices": state.num_processes, "images": options.count} | row
        write_json(options.out, {**machine(), "rows": [row | {"images_per_second": rate}]})
    part_processes()


def timed(state: PartialState, alone: Alone, run: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds of work that all processes do together, and this process's result."""
    with alone():
        state.wait_for_everyone()
        began = time.perf_counter()
        result = run()
        synchronize()
        state.wait_for_everyone()
        return time.perf_counter() - began, result


def samples(options: argparse.Namespace, state: PartialState, alone: Alone) -> dict[str, Any]:
    """Class-conditional samples of 32 × 32 pixels in 25 steps, as `mhla-gen sample` draws them.

    No files are written: every process keeps the digests of its units.
    """
    on_gpu = state.device.type == "cuda"
    torch.manual_seed(0)
    sizes = {"in_channels": 3, "sample_size": 32, "num_embeds_ada_norm": 1000}
    model: Any = DiTTransformer2DModel(**(_TINY if options.tiny else _MODEL), **sizes).eval()
    name, *settings = options.attention.split()
    if name == "mhla":
        inject(model, load_config(None, ["layout=[2,2]", *settings], MHLAConfig))
    pipeline = ClassConditionalPipeline(model, FlowMatchEulerDiscreteScheduler())
    pipeline.set_progress_bar_config(disable=True)
    pipeline.to(state.device, torch.bfloat16 if on_gpu else torch.float32)
    for parameter_name, parameter in model.named_parameters():
        if parameter_name.endswith("mixing"):
            # The state in which from_pretrained leaves a model.
            parameter.data = parameter.data.float()
    place(SampleConfig(pipeline="", output_dir="", compile=on_gpu), pipeline, state.device)
    labels = np.arange(options.count) % 1000
    sampler = ClassSampler(pipeline, labels, seed=0, guidance_scale=1.5)
    # The same number of units for each of eight GPUs.
    units = Units.split(options.count, options.batch_size or 625)
    mine = range(len(units))[state.process_index :: state.num_processes]
    steps = 2 if options.tiny else 25

    def draw(chosen: Any) -> list[tuple[int, str]]:
        batched = BatchedSampler(sampler, units, steps, units.rows, True)
        with batched:
            return [
                (unit, hashlib.sha256(drawn.cpu().numpy().tobytes()).hexdigest())
                for unit, drawn in batched.draw(chosen)
            ]

    # Compiles, and records.
    draw(mine[:1])
    seconds, digests = timed(state, alone, lambda: draw(mine))
    together = sorted(gather_object(digests))
    whole = hashlib.sha256("".join(digest for _, digest in together).encode()).hexdigest()
    return {"attention": options.attention, "seconds": seconds, "sha256": whole}


def features(options: argparse.Namespace, state: PartialState, alone: Alone) -> dict[str, Any]:
    """Inception's three features of random images in an npz file, as `mhla-gen evaluate` does."""
    on_main(lambda: _write_images(options))
    extractor = InceptionExtractor(options.folder / "weights.pth").to(state.device)
    batch = options.batch_size or 256
    # What an earlier run has left would only be read.
    caches = options.folder / f"features-{state.num_processes}"
    on_main(lambda: shutil.rmtree(caches, ignore_errors=True))
    # Enough images to give every process whole batches.
    start = min(options.count, 2 * batch * state.num_processes)

    def extract(name: str, count: int) -> Any:
        return extract_features(
            load_images(options.folder / f"images-{count}.npz"),
            extractor,
            ["pool", "spatial", "logits"],
            cache_dir=caches / name,
            cache_limit_gb=1000,
            settings={},
            batch_size=batch,
        )

    on_main(lambda: _write_first(options, start))
    extract("start", start)
    seconds, found = timed(state, alone, lambda: extract("all", options.count))
    row: dict[str, Any] = {"seconds": seconds}
    if state.is_main_process:
        pool, of_one = found.load("pool"), options.folder / "pool.npy"
        if state.num_processes == 1:
            np.save(of_one, pool.numpy())
        if of_one.is_file():
            expected = torch.from_numpy(np.load(of_one))
            row["relative_difference"] = float((pool - expected).norm() / expected.norm())
    return row


def _write_images(options: argparse.Namespace) -> None:
    options.folder.mkdir(parents=True, exist_ok=True)
    path = options.folder / f"images-{options.count}.npz"
    if not path.is_file():
        rng = np.random.default_rng(0)
        images = rng.integers(0, 256, (options.count, _SIDE, _SIDE, 3), dtype=np.uint8)
        np.savez(path, arr_0=images)
        write_random_weights(options.folder / "weights.pth")


def _write_first(options: argparse.Namespace, count: int) -> None:
    path = options.folder / f"images-{count}.npz"
    if not path.is_file():
        with np.load(options.folder / f"images-{options.count}.npz") as file:
            np.savez(path, arr_0=file["arr_0"][:count])


WORK = {"samples": samples, "features": features}

if __name__ == "__main__":
    main()
