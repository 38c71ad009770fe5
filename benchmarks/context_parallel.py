"""One sequence on several GPUs: equality, seconds, memory and bytes, MHLA beside softmax.

    torchrun --standalone --nproc-per-node=2 benchmarks/context_parallel.py OUT --grids 21x30x52

The model is Wan2.1-1.3B with random weights in bfloat16. Measured are one forward pass (a denoising
step without guidance) and, for grids in `--train`, one training step with gradient checkpointing.
Softmax is cuDNN's in denoising. In training it is flash attention, as `mhla-gen train` picks at
these lengths: cuDNN's may fault there (`mhla_gen/training/softmax.py`), and in a compiled ring its
backward pass ends with an error about the strides of its statistics (torch 2.11).
Every process first runs the whole sequence alone, then all share it. Bytes are counted at every
collective of a forward pass: what one process receives if messages are passed around a ring.
"""

import argparse
import gc
import json
import os
import statistics
import time
import traceback
from collections import defaultdict
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist
from diffusers import ContextParallelConfig, WanTransformer3DModel
from diffusers.utils import logging
from rows import machine
from sharing import turns
from torch.distributed.device_mesh import init_device_mesh
from torch.utils._python_dispatch import TorchDispatchMode

import mhla_gen
from mhla_gen.bench.profiles import kernel_times
from mhla_gen.config import MHLAConfig
from mhla_gen.files import write_json

METHODS = {
    "mhla": ("all", "ring"),
    "mhla 2/3, ulysses": ("2/3", "ulysses"),
    "softmax, ring": (None, "ring"),
    "softmax, ulysses": (None, "ulysses"),
}
TINY = {"num_attention_heads": 4, "attention_head_dim": 16, "ffn_dim": 64, "text_dim": 4096}
LARGE = {"num_attention_heads": 12, "ffn_dim": 8960}


def build(layers, options, device) -> WanTransformer3DModel:
    """A model with random weights, with MHLA in these layers; None is softmax."""
    torch.manual_seed(0)
    sizes = TINY if device.type == "cpu" else LARGE
    with device:
        model = WanTransformer3DModel(**sizes, num_layers=options.layers)
    if layers is not None:
        # Mixing, convolution and gate differ from their initial values, as in a trained model.
        mhla_gen.inject(model, MHLAConfig(layers=layers))
        for name, parameter in model.named_parameters():
            if ".mhla." in name:
                parameter.data.add_(torch.randn_like(parameter), alpha=0.02)
    if device.type == "cuda":
        model.to(torch.bfloat16)
        choose_softmax(model, "_native_cudnn")
    if options.compile:
        # Collectives between them stay outside of the graphs.
        model.compile_repeated_blocks(dynamic=False)
    return model


def measure(grid, method, options, device, alone, keep) -> dict:
    """Measure one method at one size: alone, then shared by all processes.

    Before training steps are compiled, `keep` gets the row as it is.
    """
    layers, degree = METHODS[method]
    model = build(layers, options, device)
    dtype = model.patch_embedding.weight.dtype
    frames, height, width = grid
    inputs = {
        "hidden_states": torch.randn(1, 16, frames, 2 * height, 2 * width, device=device).to(dtype),
        "timestep": torch.full((1,), 500, device=device),
        "encoder_hidden_states": torch.randn(1, 512, 4096, device=device).to(dtype),
        "return_dict": False,
    }

    @torch.no_grad()
    def forward():
        return model(**inputs)[0]

    def training_step():
        model(**inputs)[0].float().square().mean().backward()
        model.zero_grad()

    world = dist.get_world_size()
    row = {"grid": grid, "method": method, "gpus": world, "layers": options.layers}
    row["compiled"] = options.compile
    trains = "x".join(map(str, grid)) in options.train

    def time_forward(name):
        with alone():
            row[f"{name}_forward_s"] = seconds(forward, device)
            list_kernels(f"{name}_forward", forward)

    def time_training(name):
        with training(model):
            # Compiles, before others have to wait.
            training_step()
            with alone():
                row.update(trained(name, training_step, device))
                list_kernels(f"{name}_training", training_step)

    def list_kernels(name, step):
        if options.profile:
            row[f"{name}_kernels"] = kernel_times(step, device)

    expected = forward()
    time_forward("alone")
    if trains:
        time_training("alone")
    mesh = init_device_mesh(device.type, mesh_shape(degree), mesh_dim_names=("ring", "ulysses"))
    model.enable_parallelism(config=ContextParallelConfig(**{f"{degree}_degree": world}, mesh=mesh))
    row["received_mib"] = received_mib(forward)
    difference = (forward().float() - expected.float()).norm() / expected.float().norm()
    row["relative_difference"] = difference.item()
    time_forward("shared")
    row["speed_up"] = row["alone_forward_s"] / row["shared_forward_s"]
    if trains:
        keep(row | {"error": "ended before its training steps were timed"})
        time_training("shared")
        row["training_speed_up"] = row["alone_training_s"] / row["shared_training_s"]
    return row


def mesh_shape(degree: str) -> tuple[int, int]:
    """Ranks along the axes ring and ulysses."""
    world = dist.get_world_size()
    return (world, 1) if degree == "ring" else (1, world)


def seconds(function, device) -> float:
    """Median time of a call that all processes make equally often: five times, or once if slow."""
    first = torch.tensor(timed(function, device), device=device)
    dist.all_reduce(first, dist.ReduceOp.MAX)
    return statistics.median(timed(function, device) for _ in range(5 if first < 1 else 1))


def timed(function, device) -> float:
    """Seconds of one call that all processes start together."""
    dist.barrier()
    synchronize(device)
    start = time.perf_counter()
    function()
    synchronize(device)
    return time.perf_counter() - start


def synchronize(device) -> None:
    """Wait for all work queued on a GPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@contextmanager
def training(model):
    """The model as in training, with gradient checkpointing."""
    model.train().enable_gradient_checkpointing()
    choose_softmax(model, "_native_flash")
    yield
    model.eval().disable_gradient_checkpointing()
    choose_softmax(model, "_native_cudnn")


def choose_softmax(model, name: str) -> None:
    """Choose the kernels of softmax attention on a GPU."""
    if model.device.type == "cuda":
        model.set_attention_backend(name)


def trained(name: str, step, device) -> dict:
    """Seconds and peak memory of a training step."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    row = {f"{name}_training_s": seconds(step, device)}
    if device.type == "cuda":
        row[f"{name}_training_peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
        row["softmax"] = {"denoising": "cudnn", "training": "flash"}
    return row


class Received(TorchDispatchMode):
    """Counts the bytes that a process receives, by collective, if messages go around a ring."""

    def __init__(self):
        super().__init__()
        self.bytes = defaultdict(float)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        space, _, name = func._schema.name.partition("::")
        name = name.strip("_")
        world = dist.get_world_size()
        if space not in ("c10d", "_c10d_functional"):
            return result
        if name.startswith(("allreduce", "all_reduce")):
            self.bytes["all_reduce"] += 2 * (world - 1) / world * size(args[0])
        elif name in ("alltoall_base", "all_to_all_single"):
            # Splits indicate that a halo is sent; without them a process keeps its own part.
            splits = args[-2] if name == "alltoall_base" else args[2]
            kept = 1.0 if len(set(splits)) > 1 else (world - 1) / world
            self.bytes["all_to_all"] += kept * size(args[0])
        elif name.startswith(("allgather", "all_gather")):
            pieces = args[0] if space == "_c10d_functional" else args[1]
            self.bytes["all_gather"] += (world - 1) * size(pieces)
        elif name not in ("wait_tensor", "barrier", "wrap_tensor_autograd"):
            raise NotImplementedError(f"bytes of {func}")
        return result


def size(tensors) -> int:
    """Bytes of a tensor, or of all in a list."""
    tensors = [tensors] if torch.is_tensor(tensors) else tensors
    return sum(x.numel() * x.element_size() for x in tensors)


def received_mib(function) -> dict[str, float]:
    """MiB that this process receives in one call, by collective."""
    # The mode does not see inside compiled code.
    with torch.compiler.set_stance("force_eager"), Received() as counted:
        function()
    return {name: count / 2**20 for name, count in counted.bytes.items()}


def main() -> None:
    """Measure, print one line per row, and write all rows."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--grids", nargs="+", default=["21x30x52", "21x45x80"])
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--compile", action="store_true", help="each block by torch.compile")
    parser.add_argument("--train", nargs="*", default=[], help="grids with a training step too")
    parser.add_argument("--profile", action="store_true", help="also list kernels and waiting")
    parser.add_argument("--locks", nargs="*", default=[], help="see sharing.turns")
    options = parser.parse_args()
    logging.set_verbosity_error()
    gpu = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if gpu else torch.device("cpu")
    if gpu:
        torch.cuda.set_device(device)
    else:
        torch.accelerator.device_count = lambda: 1
    # Messages must not queue behind a kernel that fills the GPU.
    os.environ.setdefault("TORCH_NCCL_HIGH_PRIORITY", "1")
    dist.init_process_group("cuda:nccl,cpu:gloo" if gpu else "cpu:gloo")
    rows = []

    def write(found):
        if dist.get_rank() == 0:
            print(json.dumps(found[-1]), flush=True)
            write_json(options.out, {**machine(), "rows": found}, indent=1)

    for grid in options.grids:
        for method in options.methods:
            grid_sizes = tuple(map(int, grid.split("x")))
            measured = {"grid": grid_sizes, "method": method}

            def keep(row, measured=measured):
                measured |= row
                write([*rows, row])

            try:
                with turns(*options.locks) as alone:
                    rows.append(measure(grid_sizes, method, options, device, alone, keep))
            except (RuntimeError, ValueError, NotImplementedError) as error:
                traceback.print_exc()
                rows.append(measured | {"error": str(error).splitlines()[0]})
            gc.collect()
            if gpu:
                torch.cuda.empty_cache()
            write(rows)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
