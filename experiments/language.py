"""Small language models on Python's standard library: loss by position for each attention.

    python experiments/language.py OUT                      train, measure, write OUT/language.json
    python experiments/language.py OUT --table              print the tables
    python experiments/language.py OUT --figure FIGURE.png  draw the results

The text is the source code of the running Python's standard library, including docstrings, comments
and `pydoc_data.topics`; a token is a byte. Every tenth file is held out. Each arm is the same Llama
of 10 M parameters, trained on the same batches of 1,024 tokens and measured on held-out windows of
8,192 tokens (`--size small`: 0.2 M parameters, 256 and 2,048 tokens, for a CPU): loss by position,
and loss of the last bytes of a window by the length of the context given. Arms with a pretrained
start convert the softmax model of seed 0 and continue training.

Each arm is written when it is done, and the same command goes on with the missing ones. No arm
begins that would end after `--seconds` if it took as long as the one before.
OUT/softmax.safetensors is the pretrained start; without it, that model is trained again. Results of
other settings need another OUT.
"""

import argparse
import functools
import json
import multiprocessing
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from datetime import date
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from language_models import NAMES, SIZES, Sizes, attentions, build, measure, train
from language_tables import draw, tables
from language_text import held_out_windows, read_text
from safetensors.torch import load_file

import mhla_gen
from mhla_gen.files import write_json, write_tensors
from mhla_gen.outputs.folders import differing_values
from mhla_gen.runtime.devices import device_name

PRETRAINED = "softmax.safetensors"
# What decides the numbers of all arms.
_SAME = ("device", "torch", "sizes", "text")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
_last = 0.0


class Job(NamedTuple):
    """One arm to train."""

    name: str
    seed: int
    converted: bool
    sizes: Sizes
    out: Path
    deadline: float

    def __str__(self) -> str:
        return f"{self.name}, seed {self.seed}{', converted' * self.converted}"


@functools.cache
def load_text(sizes: Sizes) -> tuple[torch.Tensor, torch.Tensor]:
    """Training text, and held-out windows, on the device."""
    text, held_out, _ = read_text()
    windows = held_out_windows(held_out, sizes.longest + 1, sizes.held_out)
    return torch.from_numpy(text).to(DEVICE), torch.from_numpy(windows).to(DEVICE)


def run_arm(job: Job) -> dict[str, Any] | None:
    """Train and measure one arm; None if there is no time left for it."""
    global _last
    start = time.time()
    if start + _last > job.deadline:
        return None
    name, seed, converted, sizes, out, _ = job
    text, windows = load_text(sizes)
    model = build(sizes, seed).to(DEVICE)
    if converted:
        model.load_state_dict(pretrained(text, sizes, out))
    config = attentions(sizes, 0.98 if converted else 0.5)[name]
    if config is not None:
        mhla_gen.inject(model, config)
    report: dict[str, Any] = {"arm": name, "seed": seed, "converted": converted}
    report["parameters"] = sum(p.numel() for p in model.parameters())
    if converted:
        report["at_once"] = measure(model, windows, sizes)
        train(model, text, sizes, sizes.more_steps, 3e-4, seed=1000)
    else:
        train(model, text, sizes, sizes.steps, 1.5e-3, seed=seed)
        if name == "softmax" and seed == 0:
            write_tensors(out / PRETRAINED, model.state_dict())
    report |= measure(model, windows, sizes)
    if config is not None and config.has_halves:
        gates = [layer.self_attn.mhla.combine for layer in model.model.layers]
        report["gate_bias"] = [gate.to_share.bias.tolist() for gate in gates]
    if config is not None and config.linear:
        weights = [layer.self_attn.mhla.weights() for layer in model.model.layers]
        report["weights"] = [x.tolist() for x in weights]
    report["seconds"] = time.time() - start
    _last = report["seconds"]
    return report


def pretrained(text: torch.Tensor, sizes: Sizes, out: Path) -> dict[str, torch.Tensor]:
    """Weights of the softmax model of seed 0."""
    if not (out / PRETRAINED).exists():
        model = build(sizes, 0).to(DEVICE)
        train(model, text, sizes, sizes.steps, 1.5e-3, seed=0)
        write_tensors(out / PRETRAINED, model.state_dict())
    return load_file(out / PRETRAINED, device=DEVICE)


def run(out: Path, sizes: Sizes, seeds: int, seconds: float, processes: int = 1) -> None:
    """Train and measure the arms that OUT/language.json lacks, and write it after each."""
    began = time.time()
    facts = read_text()[2]
    report: dict[str, Any] = {
        "device": device_name(),
        "torch": torch.__version__,
        "date": date.today().isoformat(),
        "command": " ".join(["python", "experiments/language.py", *sys.argv[1:]]),
        "sizes": sizes._asdict(),
        "text": facts,
        "arms": [],
    }
    path = out / "language.json"
    if path.exists():
        earlier = json.loads(path.read_bytes())
        found, asked = ({key: each.get(key) for key in _SAME} for each in (earlier, report))
        if changes := differing_values(found, asked):
            raise SystemExit(
                f"{path} has results of other settings ({'; '.join(changes)}); choose another "
                "folder"
            )
        report["arms"] = earlier["arms"]
    elif (out / PRETRAINED).exists():
        raise SystemExit(f"{out / PRETRAINED} is of unknown settings, without {path}; remove it")
    else:
        # Before the pretrained start, which is of these settings, too.
        write_json(path, report, indent=None)
    print(facts, flush=True)
    arms = [(name, seed, False) for seed in range(seeds) for name in NAMES]
    arms += [(name, 0, True) for name in NAMES]
    done = [(arm["arm"], arm["seed"], arm["converted"]) for arm in report["arms"]]
    jobs = [Job(*arm, sizes, out, began + seconds) for arm in arms if arm not in done]
    new, converted = ([job for job in jobs if job.converted == kind] for kind in (False, True))
    # The control comes last of the new ones; a window is what converts a pretrained model.
    new.sort(key=lambda job: job.name == "window")
    converted.sort(key=lambda job: "window" not in job.name)
    missing = False
    with started(processes) as work:
        # The first converted arm may have to train its start, which the others read.
        for part in (new, converted[:1], converted[1:]):
            for job, found in work(part):
                missing |= found is None
                if found is not None:
                    report["arms"].append(found)
                    report["arms"].sort(key=_place)
                    write_json(path, report, indent=None)
                    mean = np.round(np.mean(found["by_position"], axis=0), 3)
                    print(f"{time.time() - began:.0f} s: {job}: {mean}", flush=True)
    if missing:
        print(f"{seconds:.0f} s are over; run this again for the other arms")


def _place(arm: dict[str, Any]) -> tuple[bool, int, int]:
    return arm["converted"], arm["seed"], NAMES.index(arm["arm"])


@contextmanager
def started(processes: int) -> Iterator[Callable[[list[Job]], Iterator[tuple[Job, Any]]]]:
    """What runs arms, several at a time if there are several processes."""
    if processes == 1:
        yield lambda jobs: ((job, run_arm(job)) for job in jobs)
        return
    # CUDA does not survive a fork.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, mp_context=context) as pool:

        def work(jobs: list[Job]) -> Iterator[tuple[Job, Any]]:
            running = {pool.submit(run_arm, job): job for job in jobs}
            for future in as_completed(running):
                if error := future.exception():
                    # One failing arm must not stop the others.
                    traceback.print_exception(error)
                yield running[future], None if error else future.result()

        yield work


def main() -> None:
    """Train and measure, or draw the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--table", action="store_true", help="only print the tables")
    parser.add_argument("--figure", type=Path, help="only draw the results")
    parser.add_argument("--seconds", type=float, default=200)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--processes", type=int, default=1, help="arms trained side by side")
    parser.add_argument("--steps", type=int, help="instead of 400")
    parser.add_argument(
        "--size", choices=SIZES, default="full", help="small: for a CPU; tiny: shows that it runs"
    )
    args = parser.parse_args()
    if args.table or args.figure:
        report = json.loads((args.out / "language.json").read_bytes())
        if args.figure:
            draw(report, args.figure)
        if args.table:
            print(tables(report))
        return
    sizes = SIZES[args.size]
    if args.steps:
        sizes = sizes._replace(steps=args.steps)
    run(args.out, sizes, args.seeds, args.seconds, args.processes)


if __name__ == "__main__":
    main()
