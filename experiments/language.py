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
OUT/softmax.safetensors is the pretrained start; without it, that model is trained again.
"""

import argparse
import functools
import json
import multiprocessing
import platform
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager, nullcontext
from datetime import date
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from language_tables import draw, tables
from language_text import END_OF_FILE, held_out_windows, read_text
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

import mhla_gen
from mhla_gen import CausalMHLAConfig
from mhla_gen.files import write_json, write_tensors
from mhla_gen.models.language import MHLALanguageModel
from mhla_gen.runtime.recorded_training import RecordedTraining

PRETRAINED = "softmax.safetensors"
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
EDGES = (0, 64, 256, 512, 1024, 2048, 4096, 8192)
_last = 0.0


class Sizes(NamedTuple):
    """Sizes of models and of training."""

    hidden_size: int = 320
    layers: int = 8
    heads: int = 5
    seq_len: int = 1024
    batch: int = 32
    steps: int = 400
    more_steps: int = 100
    """Steps of the arms that start from a trained softmax model."""
    window: int = 128
    block_size: int = 64
    held_out: int = 96
    """Number of windows of held-out text."""
    longest: int = 8192
    """Tokens per window."""


SMALL = Sizes(64, 3, 2, 256, 8, 800, 150, 32, 16, 24, 2048)
TINY = Sizes(32, 2, 2, 64, 4, 3, 2, 16, 8, 2, 256)
SIZES = {"full": Sizes(), "small": SMALL, "tiny": TINY}


def attentions(sizes: Sizes, start: float) -> dict[str, CausalMHLAConfig | None]:
    """The arms. `start` is the weight of the window before training."""
    block, distances = sizes.block_size, sizes.seq_len // sizes.block_size
    mhla = {"block_size": block, "num_blocks": distances}
    window = {"window": sizes.window, "exact_start": start}
    return {
        "softmax": None,
        "linear": CausalMHLAConfig(block_size=block, num_blocks=1, mixing_learnable=False),
        "mhla": CausalMHLAConfig(**mhla),
        "mhla + window": CausalMHLAConfig(**mhla, **window),
        "window": CausalMHLAConfig(**window, linear=False),
    }


NAMES = tuple(attentions(SMALL, 0.5))


def build(sizes: Sizes, seed: int) -> LlamaForCausalLM:
    """A Llama with new weights, the same for all arms of a seed."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=sizes.hidden_size,
        intermediate_size=sizes.hidden_size * 8 // 3 // 32 * 32,
        num_hidden_layers=sizes.layers,
        num_attention_heads=sizes.heads,
        num_key_value_heads=sizes.heads,
        max_position_embeddings=sizes.longest,
        bos_token_id=None,
        eos_token_id=END_OF_FILE,
    )
    return LlamaForCausalLM(config)


def train(model: Any, text: torch.Tensor, sizes: Sizes, steps: int, rate: float, seed: int) -> None:
    """Train with AdamW, a warm-up and a cosine; batches depend on the seed only."""
    decayed = [p for n, p in model.named_parameters() if p.ndim > 1 and "log_weights" not in n]
    ids = {id(p) for p in decayed}
    others = [p for p in model.parameters() if id(p) not in ids]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.95), fused=True)
    generator = torch.Generator().manual_seed(seed)
    warm_up = max(1, steps // 20)
    model.train()

    def mean_loss(tokens: torch.Tensor) -> torch.Tensor:
        with autocast(tokens):
            return losses(model, tokens).mean()

    # A small model takes longer to launch than to run. Softmax layers would get another kernel,
    # because transformers gives them a mask of all pairs while it is recorded.
    records = text.is_cuda and isinstance(model, MHLALanguageModel)
    compute = RecordedTraining(model, mean_loss) if records else mean_loss
    for step in range(steps):
        place = min(1.0, (step + 1) / warm_up)
        cosine = 0.55 + 0.45 * np.cos(np.pi * step / steps)
        for group in optimizer.param_groups:
            group["lr"] = rate * place * cosine
        starts = torch.randint(len(text) - sizes.seq_len, (sizes.batch, 1), generator=generator)
        index = (starts + torch.arange(sizes.seq_len + 1)).to(text.device, non_blocking=True)
        loss = compute(text[index])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if step % 100 == 0:
            print(f"    step {step}: {loss.item() / np.log(2):.3f} bits a byte", flush=True)
    if isinstance(compute, RecordedTraining):
        compute.forget()


def losses(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    """Nats of every token after the first, float32 `[batch, seq_len]`."""
    tokens = tokens.long()
    logits = model(tokens[:, :-1], use_cache=False).logits.float()
    return F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="none").view(
        len(tokens), -1
    )


def autocast(tensor: torch.Tensor) -> Any:
    """bfloat16 on a GPU."""
    return torch.autocast("cuda", torch.bfloat16) if tensor.is_cuda else nullcontext()


@torch.no_grad()
def measure(model: Any, windows: torch.Tensor, sizes: Sizes) -> dict[str, Any]:
    """Bits per byte for each window: by position, and of the last bytes by context length.

    The same bytes, the last half of a training length, are read with a context of one training
    length, of two, and so on, so that only the more distant context differs.
    """
    model.eval()
    asked = sizes.seq_len // 2
    given = [sizes.seq_len]
    while given[-1] < sizes.longest:
        given.append(given[-1] * 2)
    edges = [e for e in EDGES if e <= sizes.longest]
    by_position, by_given = [], {length: [] for length in given}
    with autocast(windows):
        for batch in windows.split(8):
            for length in given:
                bits = losses(model, batch[:, -length - 1 :]) / np.log(2)
                by_given[length].append(bits[:, -asked:].mean(dim=1))
            by_position.append(bits)
    bits = torch.cat(by_position)
    parts = [bits[:, a:b].mean(dim=1) for a, b in pairwise(edges)]
    return {
        "edges": edges,
        "by_position": torch.stack(parts, dim=1).tolist(),
        "asked": asked,
        "given": given,
        "by_given": torch.stack([torch.cat(by_given[n]) for n in given], dim=1).tolist(),
        "curve": bits.mean(dim=0).unflatten(0, (-1, sizes.seq_len // 16)).mean(dim=1).tolist(),
    }


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
        "device": torch.cuda.get_device_name() if DEVICE == "cuda" else platform.machine(),
        "torch": torch.__version__,
        "date": date.today().isoformat(),
        "command": " ".join(["python", "experiments/language.py", *sys.argv[1:]]),
        "sizes": sizes._asdict(),
        "text": facts,
        "arms": [],
    }
    path = out / "language.json"
    if path.exists():
        earlier = json.loads(path.read_text())
        same = ("device", "sizes", "text")
        if other := [key for key in same if earlier[key] != report[key]]:
            raise SystemExit(f"{path} has results for another {other[0]}; choose another folder")
        report["arms"] = earlier["arms"]
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
        report = json.loads((args.out / "language.json").read_text())
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
