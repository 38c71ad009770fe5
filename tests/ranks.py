"""Processes that share one sequence, and what each of them checks against one process.

Kept apart from the tests, because every process imports this file.
"""

import contextlib
import multiprocessing
import os
import runpy
import sys
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist

from mhla_gen import MHLAConfig
from mhla_gen.models.attention import MHLA
from mhla_gen.ops import depthwise_conv, mhla
from mhla_gen.ops.halo import sharded_depthwise_conv
from mhla_gen.ops.shard import Shard
from mhla_gen.ops.sharded import sharded_mhla


def launch(num_ranks, check, *arguments, nccl=False, gpu=False):
    """Run `check(*arguments)` in processes of one group; the first error of any is raised.

    With `nccl` each has a GPU of its own; else gloo carries everything, tensors of one GPU too
    with `gpu`.
    """
    with tempfile.TemporaryDirectory() as folder:
        rest = num_ranks, f"file://{folder}/store", nccl, check, arguments
        _start(_worker, num_ranks, *rest, gpu=gpu or nccl)


def torchrun(num_ranks, *command):
    """`torchrun --nproc-per-node NUM_RANKS COMMAND` on a CPU, without its seconds of importing.

    Returns what all processes print.
    """
    # As torchrun does: its store listens before there are processes, at a port that the system
    # picks, so that nothing else can take the port in between.
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    with tempfile.TemporaryDirectory() as folder:
        try:
            _start(_launched, num_ranks, num_ranks, store.port, folder, command)
        finally:
            said = "".join(path.read_text() for path in sorted(Path(folder).iterdir()))
            sys.stderr.write(said)
        return said


def _start(function, num_ranks, *arguments, gpu=False):
    # From one process that has imported what takes seconds, and has no threads. An import may have
    # asked it for its GPUs; then no process that it starts can use one.
    multiprocessing.set_forkserver_preload(
        ["diffusers", "mhla_gen.training.loop", "mhla_gen.evaluation.evaluation"]
    )
    torch.multiprocessing.start_processes(  # type: ignore[attr-defined]
        function, arguments, nprocs=num_ranks, start_method="spawn" if gpu else "forkserver"
    )


def _launched(rank, num_ranks, port, folder, command):
    torch.set_num_threads(1)
    facts = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": num_ranks}
    facts |= {"LOCAL_WORLD_SIZE": num_ranks, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    facts |= {"TORCHELASTIC_USE_AGENT_STORE": True, "TORCHELASTIC_RESTART_COUNT": 0}
    os.environ |= {name: str(value) for name, value in facts.items()}
    os.environ["ACCELERATE_USE_CPU"] = "true"
    module = command[0] == "-m"
    sys.argv = [str(word) for word in (command[1:] if module else command)]
    run = runpy.run_module if module else runpy.run_path
    with (
        Path(folder, str(rank)).open("w") as said,
        contextlib.redirect_stdout(said),
        contextlib.redirect_stderr(said),
    ):
        try:
            run(sys.argv[0], run_name="__main__")
        except SystemExit as end:
            if end.code:
                raise RuntimeError(f"ended with {end.code}") from None


def _worker(rank, num_ranks, store, nccl, check, arguments):
    torch.set_num_threads(1)
    if nccl:
        torch.cuda.set_device(rank)
    backends = f"cpu:gloo,cuda:{'nccl' if nccl else 'gloo'}"
    dist.init_process_group(backends, init_method=store, rank=rank, world_size=num_ranks)
    try:
        check(*arguments)
    finally:
        dist.destroy_process_group()


def close(found, expected, tolerance, name):
    torch.testing.assert_close(
        found.cpu().double(), expected.cpu().double(), rtol=tolerance, atol=tolerance,
        msg=lambda text: f"{name}, rank {dist.get_rank()}: {text}",
    )  # fmt: skip


def operators_equal_one_process(shapes, filters=()):
    for shape in shapes:
        torch.manual_seed(0)
        _check_mhla(**shape)
    for case in filters:
        torch.manual_seed(0)
        _check_convolution(**case)


def _check_mhla(
    grid, layout, dtype=torch.float64, tolerance=1e-12, heads=2, head_dim=6, value_dim=5,
    mixing_shape=(), rotary=True, device="cpu", **options,
):  # fmt: skip
    group = dist.group.WORLD
    shard = Shard.of_rank(grid, dist.get_rank(), dist.get_world_size())
    seq_len, num_blocks = torch.tensor(grid).prod(), torch.tensor(layout).prod()
    query, key = torch.randn(2, 2, seq_len, heads, head_dim).to(dtype)
    value, probe = torch.randn(2, 2, seq_len, heads, value_dim).to(dtype)
    mixing = torch.rand(*mixing_shape, num_blocks, num_blocks)
    angles = torch.rand(seq_len, head_dim // 2)
    tables = (angles.cos(), angles.sin()) if rotary else None

    whole = [x.to(torch.float64, copy=True).requires_grad_() for x in (query, key, value, mixing)]
    plain = {name: option for name, option in options.items() if name != "implementation"}
    double = tables and tuple(table.double() for table in tables)
    expected = mhla(
        *whole, grid=grid, layout=layout, rotary=double, implementation="naive", **plain
    )
    held = slice(shard.first, shard.stop)
    if dtype == torch.float64:
        mixing = mixing.double()
    mine = [x[:, held] for x in (query, key, value)]
    mine = [x.to(device, copy=True).requires_grad_() for x in (*mine, mixing)]
    out = sharded_mhla(
        *mine, grid=grid, layout=layout, group=group,
        rotary=tables and tuple(table[held].to(device) for table in tables), **options,
    )  # fmt: skip
    assert out.dtype == dtype
    close(out, expected[:, held], tolerance, f"output of {grid}")
    if dtype == torch.float64:
        found, wanted = (
            _second(*each, 3) for each in ((out, probe[:, held], mine), (expected, probe, whole))
        )
        for name, local, full in zip(("query", "key", "value"), found, wanted, strict=True):
            # A query without features has a denominator near eps, and large derivatives.
            scale = full.abs().max()
            name = f"second derivative by {name} of {grid}"
            close(local / scale, full[:, held] / scale, 1e-8, name)
    expected.backward(probe.double())
    out.backward(probe[:, held].to(device))
    for name, local, full in zip(("query", "key", "value"), mine, whole, strict=False):
        close(local.grad, full.grad[:, held], tolerance, f"gradient of {name} of {grid}")
    dist.all_reduce(mine[3].grad)
    scale = whole[3].grad.abs().max().clamp(min=1)
    close(mine[3].grad / scale, whole[3].grad / scale, tolerance, f"gradient of mixing of {grid}")


def _second(out, probe, tensors, count):
    """Derivatives, by the first `count` tensors, of their gradients' squares."""
    first = torch.autograd.grad(out, tensors[:count], probe, create_graph=True)
    squares = sum(x.square().sum() for x in first)
    return torch.autograd.grad(squares, tensors[:count], retain_graph=True)


def layers_equal_one_process(cases):
    """With convolution, whose halo is under way together with the summaries, and gate."""
    for case in cases:
        torch.manual_seed(0)
        _check_layer(**case)


def _check_layer(
    grid, layout, dtype=torch.float64, tolerance=1e-12, heads=2, head_dim=6, device="cpu",
    repeats=1, **config,
):  # fmt: skip
    group = dist.group.WORLD
    shard = Shard.of_rank(grid, dist.get_rank(), dist.get_world_size())
    seq_len, channels = int(torch.tensor(grid).prod()), heads * head_dim
    layer = MHLA(heads, head_dim, channels, MHLAConfig(layout=layout, **config))
    for parameter in layer.parameters():
        parameter.data.add_(torch.rand_like(parameter), alpha=0.1)
    layer.to(device, dtype)
    layer.mixing.data = layer.mixing.data.to(torch.promote_types(dtype, torch.float32))
    tokens = torch.randn(3, 1, seq_len, heads, head_dim).to(device, dtype)
    hidden, probe = torch.randn(2, 1, seq_len, channels).to(device, dtype)
    angles = torch.rand(seq_len, head_dim // 2, device=device)

    def run(held, group):
        inputs = [x[:, held].clone().requires_grad_() for x in (*tokens, hidden)]
        tables = angles[held].cos(), angles[held].sin()
        out = layer(*inputs, grid, tables, group)
        out.backward(probe[:, held])
        weights = [parameter.grad for parameter in layer.parameters()]
        layer.zero_grad()
        return [out.detach(), *(x.grad for x in inputs)], weights

    expected, expected_weights = run(slice(None), None)
    held = slice(shard.first, shard.stop)
    found, weights = run(held, group)
    for _ in range(repeats - 1):
        again, weights_again = run(held, group)
        for x, y in zip(found + weights, again + weights_again, strict=True):
            assert x.equal(y), f"run again, rank {dist.get_rank()}: other bits"
    for number, (x, y) in enumerate(zip(found, expected, strict=True)):
        close(x, y[:, held], tolerance, f"output or gradient of input {number} of {grid}")
    for (name, _), x, y in zip(layer.named_parameters(), weights, expected_weights, strict=True):
        dist.all_reduce(x)
        scale = y.abs().max().clamp(min=1)
        close(x / scale, y / scale, tolerance, f"gradient of {name} of {grid}")


def _check_convolution(grid, size, dtype=torch.float64, implementation="torch", batch=2, bias=True):
    exact = dtype == torch.float64
    tolerance, channels = 1e-12 if exact else 1e-5, 3
    shard = Shard.of_rank(grid, dist.get_rank(), dist.get_world_size())
    held = slice(shard.first, shard.stop)
    tokens, probe = torch.randn(2, batch, int(torch.tensor(grid).prod()), channels).to(dtype)
    weight = torch.randn(channels, 1, *[size] * len(grid)).to(dtype)
    given = [weight, *([torch.randn(channels).to(dtype)] if bias else [])]
    whole = [x.to(torch.float64, copy=True).requires_grad_() for x in (tokens, *given)]
    expected = depthwise_conv(*whole, *[None] * (not bias), grid=grid)
    mine = [x.clone().requires_grad_() for x in (tokens[:, held], *given)]
    out = sharded_depthwise_conv(
        *mine, *[None] * (not bias), grid=grid, group=dist.group.WORLD,
        implementation=implementation,
    )  # fmt: skip
    assert out.dtype == dtype
    close(out, expected[:, held], tolerance, f"convolution of {grid}")
    probes = probe[:, held], probe.double()
    if exact:
        seconds: list[torch.Tensor] = []
        for y, direction, (tokens, weight, *_) in (
            (out, probes[0], mine),
            (expected, probes[1], whole),
        ):
            (first,) = torch.autograd.grad(y, tokens, direction, create_graph=True)
            seconds += torch.autograd.grad(first.square().sum(), weight, retain_graph=True)
        dist.all_reduce(seconds[0])
        close(*seconds, tolerance, f"second derivative by weight of {grid}")
    expected.backward(probes[1])
    out.backward(probes[0])
    close(mine[0].grad, whole[0].grad[:, held], tolerance, f"gradient of tokens of {grid}")
    for name, local, full in zip(("weight", "bias"), mine[1:], whole[1:], strict=False):
        dist.all_reduce(local.grad)
        # Sums over all tokens in float32 round relative to their size.
        scale = 1 if exact else full.grad.abs().max().clamp(min=1)
        close(local.grad / scale, full.grad / scale, tolerance, f"gradient of {name} of {grid}")
