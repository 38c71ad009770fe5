"""Time the kernels of tile attention in several forms, and check each against softmax.

python benchmarks/tile_sweep.py OUT.json [--sweep images] [--seconds S] [--only WORD]   needs CUDA

Each row: milliseconds of the kernel, its registers, spills, shared memory and the programs that fit
on a multiprocessor, and the largest error of sampled groups, in parts of the largest entry, against
softmax over the same lists in float32. A form that does not compile or launch has an `error`
instead. Two rows of a place are whole passes in the forms in use, with the time of each launch.
Rows are written as they come. Kernels are compiled beforehand, in parallel.
"""

import argparse
import json
import math
import multiprocessing
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from kernel_resources import AbsentCard, watch
from kernel_speed import time_ms
from rows import machine
from tile_kernels import kernel_ms
from torch import Tensor
from triton.runtime import driver

from mhla_gen.bench.ops import Case
from mhla_gen.files import write_json
from mhla_gen.ops import auto_tiles
from mhla_gen.ops.feature_maps import rotate
from mhla_gen.ops.kernels import tile_form, tile_gradients, tile_reads
from mhla_gen.ops.kernels.tile_call import TileCall
from mhla_gen.ops.kernels.tile_form import Loop
from mhla_gen.ops.kernels.tile_owners import owners_of_tiles
from mhla_gen.ops.tiles import TileLayout, group_slots, tile_share, tiling


class Place(NamedTuple):
    """A problem size and the tiles that are read."""

    case: Case
    layout: TileLayout


class Sweep(NamedTuple):
    """Forms of kernels to be timed at places."""

    places: tuple[Place, ...]
    forms: dict[str, tuple[Loop, ...]]
    """By kernel. Blocks of queries are as large as a group has them, if that is smaller."""


def by_rule(case: Case, share: float) -> Place:
    """With the tiles that `auto_tiles` chooses."""
    return Place(case, auto_tiles(case.grid, share))


def in_place(*forms: tuple[int, int, int]) -> tuple[Loop, ...]:
    """Loops of keys a step, warps and stages, over tiles that are not packed."""
    return tuple(Loop(64, *form) for form in forms)


WAN_480 = Case(1, 12, (21, 30, 50), 128, (3, 5, 10), True)
WAN_720 = Case(1, 12, (21, 45, 80), 128, (3, 5, 10), True)
IMAGES = Case(32, 4, (64, 64), 64, (8, 8), False)
LARGE_IMAGE = Case(1, 6, (128, 128), 64, (16, 16), False)
FLUX = Case(2, 24, (64, 64), 128, (8, 8), True)
# Lists of two tiles, of four, and of one: 5 % and 12.5 % of 4,096 tokens.
TWO, FOUR = TileLayout((4, 4), (1, 2), (3, 3), 1), TileLayout((4, 4), (2, 2), (3, 3), 16)
ONE, ONE_WIDE = TileLayout((4, 4), (1, 1), (3, 3), 4), TileLayout((4, 4), (1, 1), (5, 5), 7)
CLIPS = Sweep(
    (by_rule(WAN_480, 0.05), by_rule(WAN_480, 0.125), by_rule(WAN_720, 0.05)),
    {
        "tile_backward_queries_kernel": (
            Loop(128, 64, 8, 3, packed=True),
            Loop(128, 32, 8, 3, packed=True, max_registers=128),
        ),
        "tile_backward_packed_keys_kernel": (
            Loop(64, 64, 4, 2, packed=True),
            Loop(64, 64, 4, 3, packed=True),
            Loop(32, 64, 4, 3, packed=True),
        ),
        # All three launches: tokens that a program reads at once, and its warps.
        "read_boxes_kernel": (
            Loop(64, 64, 4, 1, packed=True),
            Loop(32, 64, 2, 1, packed=True),
            Loop(16, 64, 1, 1, packed=True),
            Loop(32, 64, 1, 1, packed=True),
            Loop(64, 64, 2, 1, packed=True),
            Loop(16, 64, 2, 1, packed=True),
        ),
        "tile_attend_kernel": (
            Loop(128, 64, 8, 3, packed=True),
            Loop(128, 64, 4, 2, packed=True),
            Loop(64, 64, 4, 2, packed=True),
        ),
    },
)
SMALL_GROUPS = Sweep(
    (
        *(Place(IMAGES, layout) for layout in (TWO, FOUR, ONE, ONE_WIDE)),
        Place(LARGE_IMAGE, TileLayout((4, 4), (2, 2), (3, 3), 35)),
        *(Place(FLUX, layout) for layout in (TWO, FOUR, ONE_WIDE)),
    ),
    {
        "tile_attend_kernel": (
            *in_place((16, 1, 2), (16, 1, 5), (32, 1, 2), (32, 1, 3), (32, 1, 5), (32, 2, 3)),
            *in_place((32, 4, 2), (32, 4, 3), (64, 1, 3), (64, 4, 2), (64, 4, 3), (64, 4, 5)),
        ),
        "tile_backward_queries_kernel": (
            *in_place((16, 1, 2), (16, 1, 5), (32, 1, 2), (32, 1, 5), (32, 2, 3), (32, 4, 2)),
            *in_place((64, 1, 2), (64, 4, 2), (64, 4, 3)),
        ),
        "tile_backward_keys_kernel": (
            Loop(16, 16, 1, 2),
            Loop(32, 16, 1, 2),
            Loop(32, 16, 1, 3),
            Loop(32, 16, 2, 2),
            Loop(64, 16, 1, 2),
            Loop(64, 16, 2, 2),
            Loop(64, 16, 4, 2),
        ),
        # Of keys and of queries: tokens that a program reads at once, and its warps.
        "read_boxes_kernel": (
            Loop(64, 16, 4, 1),
            Loop(64, 16, 2, 1),
            Loop(32, 16, 1, 1),
            Loop(16, 16, 1, 1),
        ),
    },
)
SWEEPS = {"clips": CLIPS, "images": SMALL_GROUPS}
# Kernels with a program for a block of a group's queries.
_BY_GROUP = ("tile_attend_kernel", "tile_backward_queries_kernel")
_PASSES = ("forward", "backward")
Job = tuple[Place, str, Loop | None]
"""A kernel in a form, or a whole pass."""
Results = tuple[Tensor, Tensor]
_SAMPLES = 24


class Inputs:
    """Random inputs of a place."""

    def __init__(self, place: Place, device: str):
        case, layout = place
        tokens = math.prod(case.grid)
        shape = (case.batch, tokens, case.heads, case.head_dim)
        self.query, self.key, self.value, self.grad = torch.randn(
            4, *shape, dtype=torch.bfloat16, device=device
        )
        angles = torch.rand(tokens, case.head_dim // 2, device=device) * 2 * math.pi
        self.rotary = (angles.cos(), angles.sin()) if case.rotary else (None, None)
        self.placed = tiling(case.grid, layout.tile, layout.window, layout.top, layout.group)
        scale = case.head_dim**-0.5
        self.call = TileCall(self.query, self.value, *self.rotary, self.placed, scale)

    def rotated(self, x: Tensor, tokens: Tensor, sign: int = 1) -> Tensor:
        """Rows of `tokens`, rotated or, if `sign` is -1, rotated back."""
        cos, sin = self.rotary
        if cos is None or sin is None:
            return x
        return rotate(x[None, :, None], (cos[tokens], sign * sin[tokens]))[0, :, 0]

    def forward(self) -> tuple[Tensor, Tensor, Tensor]:
        """The whole pass: output, log-sum-exp and lists."""
        return tile_form.forward(self.query, self.key, self.value, None, self.call)

    def backward(self, results: Results, lists: Tensor) -> Callable[[], object]:
        """The whole pass, ready to be called."""
        tokens = self.query, self.key, self.value
        packed = None
        if tile_gradients.both_pack(self.call):
            packed = tile_form.read(*tokens, self.call, tile_form.forward_loop(self.call))[:3]
        return lambda: tile_gradients.backward(
            self.grad, None, *tokens, None, *results, lists, self.call, packed
        )

    def read(self, loop: Loop) -> None:
        """Rotate, pack and measure all inputs."""
        form = "_NARROW" if self.query.shape[3] <= 64 else "_WIDE"
        kept = getattr(tile_reads, form)
        setattr(tile_reads, form, (loop.rows, loop.num_warps))
        tokens = self.query, self.key, self.value
        tile_form.read(*tokens, self.call, tile_form.forward_loop(self.call))
        setattr(tile_reads, form, kept)

    def unwritten(self) -> tuple[Tensor, Tensor, Tensor]:
        """Room for what `forward` returns."""
        batch, tokens, heads, _ = self.query.shape
        placed = self.placed
        lists = (self.call.batch_heads, placed.num_groups, 2, placed.list_size)
        return (
            torch.empty_like(self.value),
            self.query.new_empty((batch, heads, tokens), dtype=torch.float32),
            self.query.new_empty(lists, dtype=torch.int32),
        )

    def kernel(
        self, name: str, loop: Loop, results: Results, lists: Tensor
    ) -> Callable[[], Tensor | tuple[Tensor, Tensor] | None]:
        """One kernel, ready to be called; that of the forward pass takes any bound of scores."""
        call = self.call
        if name == "read_boxes_kernel":
            return partial(self.read, loop)
        bounded = tile_form.takes_bound(self.query)
        keys, _, longest = tile_reads.read_tiles(self.key, call, lengths=bounded, pack=loop.packed)
        values = tile_reads.pack_tiles(self.value, call) if loop.packed else self.value
        if name == "tile_attend_kernel":
            slots = call.whole_blocks(loop.rows) if loop.packed else None
            queries, _, lengths = tile_reads.read_groups(
                self.query, call, lengths=loop.packed, slots=slots
            )
            read = queries, keys, values, lists
            bound = None if longest is None else (longest, lengths)
            return lambda: tile_form.attend(read, bound, None, None, results, call, loop)
        rows = tile_gradients.queries_loop(call).rows
        queries, _, _ = tile_reads.read_groups(self.query, call, slots=call.whole_blocks(rows))
        packs = tile_gradients.pack_queries(queries, self.grad, None, *results, call, rows)
        if name == "tile_backward_queries_kernel":
            return lambda: tile_gradients.backward_queries(
                packs, keys, values, lists, None, call, loop
            )
        gradients = tile_gradients.backward_keys
        if loop.packed:
            gradients = tile_gradients.backward_packed_keys
        owners = owners_of_tiles(lists, self.placed.num_tiles)
        return lambda: gradients(packs, keys, values, owners, loop.options, call)


def compile_job(job: Job) -> dict[str, Any]:
    """Compile what a job launches, without a GPU, into Triton's cache.

    Returns:
        Figures from the machine code of a kernel, or why there is none; of a pass, nothing.
    """
    place, name, loop = job
    driver.set_active(AbsentCard(90))  # pyright: ignore[reportArgumentType]
    found: dict[str, Any] = {}
    watch(lambda _name, figures: found.update(figures), "" if loop is None else name)
    inputs = Inputs(place, "meta")
    out, lse, lists = inputs.unwritten()
    if loop is None:
        inputs.forward() if name == "forward" else inputs.backward((out, lse), lists)()
        return {}
    try:
        inputs.kernel(name, loop, (out, lse), lists)()
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"[:400]}
    return {figure: found[figure] for figure in ("registers", "spills", "shared", "programs")}


class Reference:
    """Softmax over the lists of a few groups, in float32."""

    def __init__(self, inputs: Inputs, lists: Tensor):
        placed, heads, device = inputs.placed, inputs.query.shape[2], inputs.query.device
        groups, group_filled = group_slots(placed, device)
        tiles, tile_filled = group_slots(placed._replace(groups=placed.tiles), device)
        self.expected: list[tuple[tuple[Any, Any, Any], Tensor, Tensor, Tensor]] = []
        for _ in range(_SAMPLES):
            row, group = (int(torch.randint(n, ())) for n in (len(lists), len(groups)))
            listed = lists[row, group, 0].long()
            at = groups[group][group_filled[group]]
            there = tiles[listed][tile_filled[listed]]
            batch, head = divmod(row, heads)
            query, grad = (x[batch, at, head].float() for x in (inputs.query, inputs.grad))
            key, value = (x[batch, there, head].float() for x in (inputs.key, inputs.value))
            query.requires_grad_()
            scores = inputs.rotated(query, at) @ inputs.rotated(key, there).mT * inputs.call.scale
            out = scores.softmax(-1) @ value
            (dquery,) = torch.autograd.grad(out, query, grad)
            lse = scores.detach().logsumexp(-1)
            self.expected.append(((batch, head, at), out.detach(), lse, dquery))

    def errors(self, out: Tensor, lse: Tensor) -> dict[str, float]:
        """Of a forward pass."""
        return {
            "error_out": _worst([(out[b, at, h], x) for (b, h, at), x, _, _ in self.expected]),
            "error_lse": _worst([(lse[b, h, at], x) for (b, h, at), _, x, _ in self.expected]),
        }

    def query_errors(self, dquery: Tensor) -> dict[str, float]:
        """Of dq."""
        found = [(dquery[b, at, h], x) for (b, h, at), _, _, x in self.expected]
        return {"error_dq": _worst(found)}


class KeysReference:
    """Gradients of the keys and values of a few tiles, in float32."""

    def __init__(self, inputs: Inputs, lists: Tensor, out: Tensor, lse: Tensor):
        placed, heads, device = inputs.placed, inputs.query.shape[2], inputs.query.device
        groups, group_filled = group_slots(placed, device)
        tiles, tile_filled = group_slots(placed._replace(groups=placed.tiles), device)
        scale = inputs.call.scale
        self.expected: list[tuple[tuple[Any, Any, Any], Tensor, Tensor]] = []
        for _ in range(_SAMPLES):
            row, tile = (int(torch.randint(n, ())) for n in (len(lists), len(tiles)))
            readers = (lists[row, :, 0] == tile).any(dim=1)
            at, there = groups[readers][group_filled[readers]], tiles[tile][tile_filled[tile]]
            batch, head = divmod(row, heads)
            key, value = (x[batch, there, head].float() for x in (inputs.key, inputs.value))
            query, grad, found = (
                x[batch, at, head].float() for x in (inputs.query, inputs.grad, out)
            )
            queries = inputs.rotated(query, at)
            scores = queries @ inputs.rotated(key, there).mT * scale
            weights = (scores - lse[batch, head, at][:, None]).exp()
            delta = (grad * found).sum(-1, keepdim=True)
            dscores = weights * (grad @ value.mT - delta) * scale
            dkey = inputs.rotated(dscores.mT @ queries, there, -1)
            self.expected.append(((batch, head, there), dkey, weights.mT @ grad))

    def errors(self, dkey: Tensor, dvalue: Tensor) -> dict[str, float]:
        """Of dk and dv."""
        return {
            "error_dk": _worst([(dkey[b, at, h], x) for (b, h, at), x, _ in self.expected]),
            "error_dv": _worst([(dvalue[b, at, h], x) for (b, h, at), _, x in self.expected]),
        }


def _worst(pairs: list[tuple[Tensor, Tensor]]) -> float:
    found = [((a.float() - e).abs().max() / e.abs().max()).nan_to_num(math.inf) for a, e in pairs]
    return round(float(torch.stack(found).max()), 6)


class Bench:
    """Measures jobs one after the other, at one place at a time."""

    def __init__(self) -> None:
        self.place: Place | None = None

    def __call__(self, job: Job) -> dict[str, Any]:
        """Time and error of a form, or why there are none; of a pass, times."""
        place, name, loop = job
        if self.place != place:
            self.place, self.inputs = place, Inputs(place, "cuda")
            *self.saved, self.lists = self.inputs.forward()
            self.reference = Reference(self.inputs, self.lists)
            self.keys_reference = KeysReference(self.inputs, self.lists, *self.saved)
        if loop is None:
            whole = self.inputs.forward
            if name == "backward":
                whole = self.inputs.backward((self.saved[0], self.saved[1]), self.lists)
            return {"ms": time_ms(whole), "launches": kernel_ms(whole)}
        out, lse = (torch.full_like(x, math.nan) for x in self.saved)
        if name != "tile_attend_kernel":
            out, lse = self.saved
        try:
            run = self.inputs.kernel(name, loop, (out, lse), self.lists)
            gradients = run()
            ms = time_ms(run)
        except Exception as error:
            return {"error": f"{type(error).__name__}: {error}"[:400]}
        if isinstance(gradients, tuple):
            return {"ms": ms, **self.keys_reference.errors(*gradients)}
        if name == "tile_backward_queries_kernel" and gradients is not None:
            return {"ms": ms, **self.reference.query_errors(gradients)}
        return {"ms": ms, **self.reference.errors(out, lse)}


def jobs(sweep: Sweep, only: str) -> list[Job]:
    """Both passes and all forms of every place, of kernels with `only` in their name."""
    found: list[Job] = []
    for place in sweep.places:
        found += [(place, name, None) for name in _PASSES]
        call = Inputs(place, "meta").call
        for name, loops in sweep.forms.items():
            for loop in loops if only in name else ():
                rows = call.block(loop.rows) if name in _BY_GROUP else loop.rows
                found.append((place, name, replace(loop, rows=rows)))
    return found


def main() -> None:
    """Compile, measure, print and write row by row."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--sweep", choices=SWEEPS, default="clips")
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--only", default="", metavar="WORD", help="kernels with it in their name")
    options = parser.parse_args()
    started = time.monotonic()
    rows: list[dict[str, Any]] = []
    # Forked before CUDA is in use: imports take longer than all that is compiled.
    pool = ProcessPoolExecutor(12, multiprocessing.get_context("fork"))
    compiled = {
        job: pool.submit(compile_job, job) for job in jobs(SWEEPS[options.sweep], options.only)
    }
    bench = Bench()
    for job, figures in compiled.items():
        if time.monotonic() - started > options.seconds:
            print("out of time")
            break
        (case, layout), name, loop = job
        row = {"shape": [case.batch, case.heads, math.prod(case.grid), case.head_dim]}
        row |= {"layout": layout._asdict(), "share": tile_share(case.grid, **layout._asdict())}
        row |= {"kernel": name, **(asdict(loop) if loop else {}), **figures.result()}
        if "error" not in row:
            row |= bench(job)
        rows.append(row)
        print(json.dumps(row), flush=True)
        write_json(options.out, {**machine(), "rows": rows}, indent=1)
    pool.shutdown(cancel_futures=True)


if __name__ == "__main__":
    main()
