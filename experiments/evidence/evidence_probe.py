"""Long-range probe: find one of many key-value pairs on a grid, by the key.

    python experiments/evidence/evidence_probe.py OUT [ARM ...] [--steps 800] [--seeds 0 1]

A cell of a 12 × 12 grid holds a pair of a random key and a value, a query (a key whose value is to
be predicted), or nothing. In the task "anywhere" the pair can be in any cell, in "near" at most two
cells away in each direction. Keys are new in every sample, so nothing can be memorised: the model
has to match the query's key among the keys of all pairs. Linear attention keeps one summary of all
pairs and is known to fail at this (Arora et al. 2024, arXiv:2402.18668).

A small transformer is trained on samples with 4 to 64 pairs and tested for each number of pairs.
OUT gets one JSON file per arm, task and seed; existing results are not run again, and several
processes share the work. With --seconds, no run is started that would exceed that time.
"""

import argparse
import itertools
import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from evidence_data import claimed
from evidence_settings import require_attention, with_tiles
from torch import Tensor, nn

from mhla_gen import MHLAConfig
from mhla_gen.files import write_json
from mhla_gen.models import MHLA
from mhla_gen.runtime.devices import resolve_device
from mhla_gen.training import build_optimizer

SIDE, LAYOUT = 12, (3, 3)
NUM_PAIRS = (4, 8, 16, 32, 64)
TASKS = ("anywhere", "near")
_REACH = 2
_QUERIES, _KEY_DIM, _VALUES = 8, 16, 16
_HEADS, _HEAD_DIM, _LAYERS = 2, 24, 2
_BATCH, _TEST_BATCHES = 32, 16
_LEARNING_RATE = 2e-3


def arm(title: str, layout: tuple[int, int], additions: bool, **options: object):
    """Title and settings of one kind of attention."""
    settings = {"layout": layout, "conv": additions, "gate": additions, **options}
    return title, MHLAConfig(**settings)  # pyright: ignore[reportArgumentType]


def tiles(tile: tuple[int, int], top: int) -> dict[str, object]:
    """Settings of an exact half that reads its own tile and `top` others chosen by content."""
    return {"exact": 0.125, "exact_tile": tile, "exact_window": (1, 1), "exact_top": top}


ARMS: dict[str, tuple[str, MHLAConfig | None]] = {
    "softmax": ("softmax", None),
    "linear": arm("linear", (1, 1), False),
    "linear-conv-gate": arm("linear + conv + gate", (1, 1), True),
    "mhla": arm("MHLA", LAYOUT, False),
    "mhla-conv-gate": arm("MHLA + conv + gate", LAYOUT, True),
    "exact-pairs": arm("exact 11.1 % (2 × 2 cells) + MHLA", LAYOUT, True, **tiles((2, 2), 3)),
    "exact-dominoes": arm("exact 12.5 % (1 × 2 cells) + MHLA", LAYOUT, True, **tiles((1, 2), 8)),
    "exact-cells": arm("exact 12.5 % (single cells) + MHLA", LAYOUT, True, **tiles((1, 1), 17)),
    "exact-cells-alone": arm(
        "exact 12.5 % (single cells) alone", LAYOUT, True, **tiles((1, 1), 17), linear=False
    ),
}


@dataclass(frozen=True)
class Samples:
    """Grids with pairs and queries; cells are in raster order."""

    keys: Tensor
    """`[batch, cells, key_dim]`; zero where there is neither pair nor query."""
    values: Tensor
    """int64 `[batch, cells]`: value of a pair; `_VALUES` for a query, one more for nothing."""
    queries: Tensor
    """Cells of the queries, int64 `[batch, queries]`."""
    answers: Tensor
    """int64 `[batch, queries]`."""


def make_samples(num_pairs: int, task: str, batch: int, generator: torch.Generator) -> Samples:
    """Draw samples of one task.

    Args:
        num_pairs: Pairs on each grid, at least as many as queries are possible for.
        task: One of `TASKS`.
        batch: Samples.
        generator: Source of randomness, on the CPU.
    """
    cells, num_queries = SIDE * SIDE, min(_QUERIES, num_pairs)
    chance = torch.rand(batch, cells, generator=generator)
    order = chance.argsort(dim=1)
    pairs = order[:, :num_pairs]  # the first ones are asked for
    if task == "near":
        queries = _near_cells(pairs, num_queries, generator)
    else:
        queries = order[:, num_pairs : num_pairs + num_queries]
    keys = torch.randn(batch, num_pairs, _KEY_DIM, generator=generator)
    answers = torch.randint(_VALUES, (batch, num_pairs), generator=generator)
    field = torch.zeros(batch, cells, _KEY_DIM)
    values = torch.full((batch, cells), _VALUES + 1)
    field.scatter_(1, pairs[..., None].expand_as(keys), keys)
    values.scatter_(1, pairs, answers)
    asked = keys[:, :num_queries]
    field.scatter_(1, queries[..., None].expand_as(asked), asked)
    values.scatter_(1, queries, torch.full_like(queries, _VALUES))
    return Samples(field, values, queries, answers[:, :num_queries])


def _near_cells(pairs: Tensor, num_queries: int, generator: torch.Generator) -> Tensor:
    """A free cell near each of the first pairs of each grid, a different one for each pair."""
    free = torch.ones(len(pairs), SIDE * SIDE, dtype=torch.bool).scatter_(1, pairs, False)
    rows, columns = torch.arange(SIDE * SIDE) // SIDE, torch.arange(SIDE * SIDE) % SIDE
    chosen = []
    for pair in pairs[:, :num_queries].unbind(1):
        distance = torch.maximum(
            (rows - rows[pair][:, None]).abs(), (columns - columns[pair][:, None]).abs()
        )
        # If all cells around a pair are taken, the nearest free cell is used.
        score = torch.rand(distance.shape, generator=generator) + (distance - _REACH).clamp_min(0)
        cell = score.where(free, torch.inf).argmin(dim=1)
        free.scatter_(1, cell[:, None], False)
        chosen.append(cell)
    return torch.stack(chosen, dim=1)


class Attention(nn.Module):
    """Softmax attention, or MHLA."""

    def __init__(self, config: MHLAConfig | None):
        super().__init__()
        hidden = _HEADS * _HEAD_DIM
        self.projection = nn.Linear(hidden, 3 * hidden)
        self.mhla = MHLA(_HEADS, _HEAD_DIM, hidden, config) if config else None
        self.out = nn.Linear(hidden, hidden)

    def forward(self, hidden: Tensor) -> Tensor:
        """`[batch, cells, hidden]` in and out."""
        q, k, v = self.projection(hidden).unflatten(-1, (3, _HEADS, _HEAD_DIM)).unbind(2)
        if self.mhla is not None:
            return self.out(self.mhla(q, k, v, hidden, (SIDE, SIDE)))
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Model(nn.Module):
    """A pre-norm transformer over the cells of a grid."""

    def __init__(self, config: MHLAConfig | None):
        super().__init__()
        hidden = _HEADS * _HEAD_DIM
        self.key = nn.Linear(_KEY_DIM, hidden, bias=False)
        self.value = nn.Embedding(_VALUES + 2, hidden)
        self.place = nn.Parameter(0.02 * torch.randn(SIDE * SIDE, hidden))
        self.attentions = nn.ModuleList(Attention(config) for _ in range(_LAYERS))
        self.mlps = nn.ModuleList(
            nn.Sequential(
                nn.LayerNorm(hidden),
                nn.Linear(hidden, 2 * hidden),
                nn.GELU(),
                nn.Linear(2 * hidden, hidden),
            )
            for _ in range(_LAYERS)
        )
        self.norms = nn.ModuleList(nn.LayerNorm(hidden) for _ in range(_LAYERS))
        self.answer = nn.Sequential(nn.LayerNorm(hidden), nn.Linear(hidden, _VALUES))

    def forward(self, samples: Samples) -> Tensor:
        """Logits of the answers, `[batch, queries, values]`."""
        hidden = self.key(samples.keys) + self.value(samples.values) + self.place
        for attention, mlp, norm in zip(self.attentions, self.mlps, self.norms, strict=True):
            hidden = hidden + attention(norm(hidden))
            hidden = hidden + mlp(hidden)
        places = samples.queries[..., None].expand(-1, -1, hidden.shape[-1])
        return self.answer(hidden.gather(1, places))


def probe(name: str, task: str, steps: int, seed: int, device: torch.device) -> dict:
    """Train and test one arm on one task."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    title, config = ARMS[name]
    model = Model(config).to(device)
    optimizer = build_optimizer(model, _LEARNING_RATE, 0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, _LEARNING_RATE, total_steps=steps, pct_start=0.1
    )
    began = time.perf_counter()
    for step in range(steps):
        samples = _draw(NUM_PAIRS[step % len(NUM_PAIRS)], task, generator, device)
        loss = F.cross_entropy(model(samples).flatten(0, 1), samples.answers.flatten())
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    seconds = time.perf_counter() - began
    test = torch.Generator().manual_seed(2**31 + seed)
    return {
        "arm": name,
        "title": title,
        "task": task,
        "seed": seed,
        "steps": steps,
        "attention": stated(name),
        "parameters": sum(p.numel() for p in model.parameters()),
        "accuracy": {n: _accuracy(model, n, task, test, device) for n in NUM_PAIRS},
        "chance": 1 / _VALUES,
        "seconds": round(seconds, 1),
        "device": device.type,
        "torch": torch.__version__,
    }


def _draw(num_pairs: int, task: str, generator: torch.Generator, device: torch.device) -> Samples:
    samples = make_samples(num_pairs, task, _BATCH, generator)
    return Samples(**{name: x.to(device) for name, x in vars(samples).items()})


@torch.no_grad()
def _accuracy(
    model: Model, num_pairs: int, task: str, generator: torch.Generator, device: torch.device
) -> float:
    right = []
    for _ in range(_TEST_BATCHES):
        samples = _draw(num_pairs, task, generator, device)
        right.append(model(samples).argmax(dim=-1) == samples.answers)
    return round(float(torch.cat(right).float().mean()), 4)


def require_settings(out: Path, steps: int) -> None:
    """Raise unless all probes in a folder are of this number of steps and of the arms as they are.

    Older ones do not say their attention.
    """
    for path in sorted(out.glob("probe-*.json")):
        found = json.loads(path.read_bytes())
        if found["steps"] != steps:
            raise SystemExit(
                f"{path} is of --steps {found['steps']}, not {steps}; choose another folder"
            )
        if "attention" in found and found["arm"] in ARMS:
            require_attention(path, found["attention"], stated(found["arm"]))


def stated(name: str) -> dict[str, Any] | str:
    """The attention of an arm as its results keep it."""
    _, config = ARMS[name]
    return "softmax" if config is None else asdict(with_tiles(config, (SIDE, SIDE)))


def main(arguments: Sequence[str] | None = None) -> None:
    """Run all probes without a result."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("arms", nargs="*", metavar="ARM", help=f"{', '.join(ARMS)}; default: all")
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=TASKS)
    parser.add_argument("--seconds", type=float, default=float("inf"))
    options = parser.parse_intermixed_args(arguments)
    unknown = sorted(set(options.arms) - set(ARMS))
    if unknown:
        parser.error(f"no arm {', '.join(unknown)}; there are {', '.join(ARMS)}")
    require_settings(options.out, options.steps)
    locks = options.out / "work"
    locks.mkdir(parents=True, exist_ok=True)
    began, longest = time.perf_counter(), 0.0
    for task, seed, name in itertools.product(options.tasks, options.seeds, options.arms or ARMS):
        path = options.out / f"probe-{name}-{task}-s{seed}.json"
        left = options.seconds - (time.perf_counter() - began)
        with claimed(locks / f"{path.stem}.lock") as ours:
            if not ours or path.is_file() or left < longest:
                continue
            started = time.perf_counter()
            found = probe(name, task, options.steps, seed, resolve_device("auto"))
            longest = max(longest, time.perf_counter() - started)
            write_json(path, found, indent=1)
            print(f"{path.stem}: {found['accuracy']} in {found['seconds']} s", flush=True)


if __name__ == "__main__":
    main()
