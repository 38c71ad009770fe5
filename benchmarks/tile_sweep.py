"""Time tile attention's forward and dq kernels in several forms, and check each against softmax.

python benchmarks/tile_sweep.py OUT.json [--seconds S]        needs CUDA

Each row: milliseconds of the kernel, registers and spills, and the largest error of sampled groups,
in parts of the largest entry, against softmax over the same lists in float32. A form that does not
compile or launch has an `error` instead. Rows are written as they come. Kernels are compiled
beforehand, in parallel.
"""

import argparse
import json
import math
import multiprocessing
import queue
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from datetime import date
from pathlib import Path
from typing import Any

import torch
from kernel_resources import AbsentCard, watch
from kernel_speed import time_ms
from torch import Tensor
from triton.runtime import driver

from mhla_gen.bench.ops import Case
from mhla_gen.ops import auto_tiles
from mhla_gen.ops.feature_maps import rotate
from mhla_gen.ops.kernels import tile_form, tile_gradients, tile_hopper_form
from mhla_gen.ops.kernels.launch import quotient_up
from mhla_gen.ops.kernels.tile_call import TileCall
from mhla_gen.ops.kernels.tile_form import Loop
from mhla_gen.ops.kernels.tile_hopper_form import Form
from mhla_gen.ops.tiles import group_slots, tiling

WAN_480 = Case(1, 12, (21, 30, 50), 128, (3, 5, 10), True)
WAN_720 = Case(1, 12, (21, 45, 80), 128, (3, 5, 10), True)
PLACES = ((WAN_480, 0.05), (WAN_480, 0.125), (WAN_720, 0.05))
# The first is the one in use.
FORMS = {
    "forward": (
        Loop(128, 64, 8, 3, packed=True),
        Loop(128, 64, 4, 2, packed=True),
        Loop(64, 64, 4, 2, packed=True),
        Form(3),
        Form(4),
        Form(3, persistent=False),
        Form(3, held=True),
        Form(2, tiles=2),
        Form(2, tiles=2, held=True),
        Form(2, tiles=2, persistent=False),
    ),
    "dq": (Loop(128, 64, 8, 3, packed=True), Form(3), Form(4), Form(3, persistent=False)),
}
READS = (
    (1, False, 64, 16),
    (4, False, 64, 16),
    (12, False, 64, 16),
    (4, False, 64, 8),
    (4, False, 32, 8),
    (4, True, 64, 16),
    (4, True, 64, 8),
    (12, True, 64, 8),
    (4, True, 128, 8),
)
Job = tuple[Case, float, str, Loop | Form]
_KERNELS = {"forward": "tile_attend", "dq": "tile_backward_queries"}
_SAMPLES = 24


class Inputs:
    """Random inputs of a shape at a share, and what the kernels read."""

    def __init__(self, case: Case, share: float, device: str):
        tokens = math.prod(case.grid)
        shape = (case.batch, tokens, case.heads, case.head_dim)
        draw = torch.Generator(device).manual_seed(0) if device != "meta" else None
        self.query, self.key, self.value, self.grad = (
            torch.randn(shape, dtype=torch.bfloat16, device=device, generator=draw)
            for _ in range(4)
        )
        angles = torch.rand(tokens, case.head_dim // 2, device=device, generator=draw)
        self.rotary = (angles.cos(), angles.sin()) if case.rotary else None
        layout = auto_tiles(case.grid, share)
        self.placed = tiling(case.grid, layout.tile, layout.window, layout.top, layout.group)
        cos, sin = self.rotary or (None, None)
        self.call = TileCall(self.query, self.value, cos, sin, self.placed, case.head_dim**-0.5)

    def forward(self, loop: Loop | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """The whole pass."""
        return tile_form.forward(self.query, self.key, self.value, None, self.call, loop)

    def read(self) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Packed queries, keys and values, and the largest lengths of keys."""
        call = self.call
        keys, _, longest = tile_form.read_tiles(self.key, call, lengths=True, pack=True)
        slots = quotient_up(call.queries, 128) * 128
        queries, _ = tile_form.read_groups(self.query, call, slots=slots)
        return queries, keys, tile_form.pack_tiles(self.value, call), longest

    def empty(self) -> tuple[Tensor, Tensor, Tensor]:
        """Lists, an output and log-sum-exps, which nobody has written."""
        heads, placed = self.call.batch_heads, self.placed
        lists = self.query.new_empty(
            (heads, placed.num_groups, 2, placed.list_size), dtype=torch.int32
        )
        batch, tokens, heads, _ = self.query.shape
        lse = self.query.new_empty((batch, heads, tokens), dtype=torch.float32)
        return lists, torch.empty_like(self.value), lse

    def attend(self, form: Loop | Form, lists: Tensor, results: tuple[Tensor, Tensor]) -> Any:
        """The kernel of the forward pass alone, with a bound, ready to be called."""
        *read, longest = self.read()
        sources = *read, lists
        if isinstance(form, Form):
            return lambda: tile_hopper_form.attend(sources, longest, results, self.call, form)
        return lambda: tile_form.attend(sources, longest, None, None, results, self.call, form)

    def queries(self, form: Loop | Form, lists: Tensor, results: tuple[Tensor, Tensor]) -> Any:
        """The kernel of dq alone, ready to be called."""
        _, keys, values, _ = self.read()
        packs = tile_gradients.pack_queries(self.grad, None, self.query, *results, self.call, 128)
        if isinstance(form, Form):
            return lambda: tile_hopper_form.backward_queries(
                packs, keys, values, lists, self.call, form
            )
        return lambda: tile_gradients.backward_queries(
            packs, keys, values, lists, None, self.call, form
        )


def compile_form(job: Job) -> dict[str, Any]:
    """Compile one form, without a GPU, into Triton's cache; figures from its machine code."""
    case, share, kind, form = job
    driver.set_active(AbsentCard(90))  # pyright: ignore[reportArgumentType]
    found: dict[str, Any] = {}
    watch(lambda _name, figures: found.update(figures), _KERNELS[kind])
    inputs = Inputs(case, share, "meta")
    lists, *results = inputs.empty()
    try:
        (inputs.attend if kind == "forward" else inputs.queries)(form, lists, tuple(results))()
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"[:400]}
    return found


class Reference:
    """Softmax over the lists of a few groups, in float32."""

    def __init__(self, inputs: Inputs, lists: Tensor):
        placed, heads = inputs.placed, inputs.query.shape[2]
        device = inputs.query.device
        groups, group_filled = group_slots(placed, device)
        tiles, tile_filled = group_slots(placed._replace(groups=placed.tiles), device)
        draw = torch.Generator().manual_seed(1)
        self.expected: list[tuple[Any, ...]] = []
        for _ in range(_SAMPLES):
            row, group = (
                int(torch.randint(n, (), generator=draw)) for n in (len(lists), len(groups))
            )
            listed = lists[row, group, 0].long()
            at = groups[group][group_filled[group]]
            there = tiles[listed][tile_filled[listed]]
            batch, head = divmod(row, heads)
            query, grad = (x[batch, at, head].float() for x in (inputs.query, inputs.grad))
            key, value = (x[batch, there, head].float() for x in (inputs.key, inputs.value))
            query.requires_grad_()
            turned = [query[None, :, None], key[None, :, None]]
            if inputs.rotary is not None:
                turned = [
                    rotate(x, tuple(t[places] for t in inputs.rotary))
                    for x, places in zip(turned, (at, there), strict=True)
                ]
            scores = turned[0][0, :, 0] @ turned[1][0, :, 0].mT * inputs.call.scale
            out = scores.softmax(-1) @ value
            (dquery,) = torch.autograd.grad(out, query, grad)
            lse = scores.detach().logsumexp(-1)
            self.expected.append(((batch, head, at), out.detach(), lse, dquery))

    def errors(self, out: Tensor, lse: Tensor) -> dict[str, float]:
        """Of a forward pass."""
        pairs = [(out[b, at, h], expected) for (b, h, at), expected, _, _ in self.expected]
        logs = [(lse[b, h, at], expected) for (b, h, at), _, expected, _ in self.expected]
        return {"error_out": _worst(pairs), "error_lse": _worst(logs)}

    def gradient_errors(self, dquery: Tensor) -> dict[str, float]:
        """Of dq."""
        pairs = [(dquery[b, at, h], expected) for (b, h, at), _, _, expected in self.expected]
        return {"error_dq": _worst(pairs)}


def _worst(pairs: list[tuple[Tensor, Tensor]]) -> float:
    found = [((a.float() - e).abs().max() / e.abs().max()).nan_to_num(math.inf) for a, e in pairs]
    return round(float(torch.stack(found).max()), 6)


def jobs() -> list[Job]:
    """Every form at every place."""
    return [
        (case, share, kind, form)
        for case, share in PLACES
        for kind, forms in FORMS.items()
        for form in forms
    ]


def measure(
    inputs: Inputs, reference: Reference, kind: str, form: Loop | Form, saved: tuple[Tensor, ...]
) -> dict[str, Any]:
    """Time and error of one form."""
    *results, lists = saved
    if kind == "dq":
        run = inputs.queries(form, lists, tuple(results))
        return {**reference.gradient_errors(run()), "ms": time_ms(run)}
    results = tuple(map(torch.empty_like, results))
    run = inputs.attend(form, lists, results)
    run()
    return {**reference.errors(*results), "ms": time_ms(run)}


def reading(inputs: Inputs, read: tuple[int, bool, int, int]) -> dict[str, Any]:
    """Milliseconds of what is read before attention."""
    tile_form.READ = read
    query, key, value, call = inputs.query, inputs.key, inputs.value, inputs.call
    calls = {
        "keys": lambda: tile_form.read_tiles(key, call, mean=True, lengths=True, pack=True),
        "queries": lambda: tile_form.read_groups(query, call, mean=True, slots=128),
        "pack values": lambda: tile_form.pack_tiles(value, call),
    }
    try:
        return {name: time_ms(function) for name, function in calls.items()}
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"[:400]}


class Bench:
    """Measures forms one after the other, at one place at a time."""

    def __init__(self) -> None:
        self.place: Any = None

    def __call__(self, job: Job) -> dict[str, Any]:
        """Time and error of a form, or why there are none."""
        case, share, kind, form = job
        try:
            if self.place != (case, share):
                self.place, self.inputs = (case, share), Inputs(case, share, "cuda")
                self.saved = self.inputs.forward()
                self.reference = Reference(self.inputs, self.saved[2])
            return measure(self.inputs, self.reference, kind, form, self.saved)
        except Exception as error:
            return {"error": f"{type(error).__name__}: {error}"[:400]}


class Apart:
    """A bench in a process of its own, for kernels that may hang or spoil the context."""

    def __init__(self) -> None:
        self.start()

    def start(self) -> None:
        """Start a process that has measured nothing yet."""
        context = multiprocessing.get_context("spawn")
        self.jobs, self.rows, self.patience = context.Queue(), context.Queue(), 30
        self.process = context.Process(target=_serve, args=(self.jobs, self.rows), daemon=True)
        self.process.start()

    def __call__(self, job: Job) -> dict[str, Any]:
        """As `Bench`."""
        self.jobs.put(job)
        try:
            row = self.rows.get(timeout=self.patience)
        except queue.Empty:
            row = {"error": "hung"}
        self.patience = 10
        # After an error, such as a wrong address, a context may be of no more use.
        if "error" in row:
            self.process.kill()
            self.start()
        return row


def _serve(jobs: Any, rows: Any) -> None:
    bench = Bench()
    while True:
        rows.put(bench(jobs.get()))


def main() -> None:
    """Compile, measure, print and write row by row."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--seconds", type=float, default=70.0)
    options = parser.parse_args()
    started = time.monotonic()
    rows: list[dict[str, Any]] = []
    found: dict[str, Any] = {
        "command": f"python benchmarks/tile_sweep.py {options.out.name}",
        "date": date.today().isoformat(),
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "rows": rows,
    }
    pool = ProcessPoolExecutor(12, multiprocessing.get_context("spawn"))
    compiled = {job: pool.submit(compile_form, job) for job in jobs()}
    bench, apart = Bench(), Apart()
    for job in compiled:
        case, share, kind, form = job
        if time.monotonic() - started > options.seconds:
            print("out of time")
            break
        figures = compiled[job].result()
        row = {"shape": [case.batch, case.heads, math.prod(case.grid), case.head_dim]}
        row |= {"share": share, "kernel": kind}
        row |= {"form": type(form).__name__, **asdict(form)}
        row |= {name: figures[name] for name in figures if name in ("registers", "spills", "error")}
        if "error" not in row:
            row |= (apart if isinstance(form, Form) else bench)(job)
        rows.append(row)
        print(json.dumps(row), flush=True)
        options.out.write_text(json.dumps(found, indent=1) + "\n")
    for place in (PLACES[0], PLACES[-1]):
        inputs = Inputs(*place, "cuda")
        call, tiles = inputs.call, inputs.placed.num_tiles
        means = (
            torch.randn(call.batch_heads, count, 128, device="cuda")
            for count in (inputs.placed.num_groups, tiles)
        )
        means = tuple(means)
        for tile_form.WARP_TILES in (128, 256, 512, 1024, 2048):
            row = {"tiles": tiles, "of a warp": tile_form.WARP_TILES}
            row["lists"] = time_ms(lambda: tile_form.tile_lists(*means, call))  # noqa: B023
            rows.append(row)
            print(json.dumps(row), flush=True)
    tile_form.WARP_TILES = 512
    inputs = Inputs(*PLACES[0], "cuda")
    for read in READS:
        row = {"read": read, **reading(inputs, read)}
        rows.append(row)
        print(json.dumps(row), flush=True)
        options.out.write_text(json.dumps(found, indent=1) + "\n")
    pool.shutdown(cancel_futures=True)
    apart.process.kill()


if __name__ == "__main__":
    main()
