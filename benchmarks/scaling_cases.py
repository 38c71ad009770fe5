"""What scaling.py measures: a case is a benchmark, a kind of attention and a size."""

import argparse
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from fnmatch import fnmatch
from typing import Any

from jobs import Job
from rows import Row

SOFTMAX, MHLA, EXACT = "softmax", "mhla", "mhla exact=0.05"


@dataclass(frozen=True)
class Case:
    """What a row measures, on any number of GPUs."""

    part: str
    attention: str = ""
    pixels: int | None = None
    variable: str = ""
    """`NAME=VALUE` in the environment, of a case that is compared with the one without."""

    @property
    def facts(self) -> dict[str, Any]:
        """What tells its rows from all others, but for the number of GPUs."""
        return {name: value for name, value in asdict(self).items() if value}

    @property
    def name(self) -> str:
        """For a table, in which the kind of attention has its own column."""
        title = TITLES[self.part].format(pixels=self.pixels)
        return f"{title}, {self.variable}" if self.variable else title

    def log_name(self, gpus: int) -> str:
        """The name of its log on that many GPUs, such as dit-ddp-mhla-512-2."""
        parts = self.part, self.variable, self.attention, self.pixels or "", gpus
        return re.sub("[^A-Za-z0-9.]+", "-", " ".join(map(str, parts)))

    def job(self, gpus: int, options: argparse.Namespace) -> Job:
        """The benchmark that measures it."""
        script, arguments, gib = PARTS[self.part](self, gpus, options)
        return Job(
            self.log_name(gpus),
            script,
            tuple(arguments),
            gpus,
            gib,
            grouped=self.part == "sequence",
            variables=tuple(filter(None, [self.variable])),
            # It compiles two models, each for two kinds of steps.
            patience=2.0 if self.part == "sequence" else 1.0,
        )


def dit(case: Case, gpus: int, options: argparse.Namespace) -> tuple[str, list[str], float]:
    """Training of DiT-XL/2."""
    how = "fsdp" if case.part == "dit-fsdp" and gpus > 1 else "ddp"
    arguments = ["--parallelism", how, *_timing(options), "--attention", case.attention]
    arguments += ["--pixels", str(case.pixels), *["--no-cuda-graphs"] * options.no_cuda_graphs]
    small = ["--models", "DiT-S/8", "--num-layers", "1", "--batch-size", "2", "--compile", "none"]
    arguments += small if options.tiny else ["--models", "DiT-XL/2"]
    return "train_speed.py", arguments, 30 if how == "fsdp" else 34


def wan(case: Case, gpus: int, options: argparse.Namespace) -> tuple[str, list[str], float]:
    """Training of Wan2.1-1.3B on clips of 81 frames of 480 × 832, one on each GPU."""
    arguments = [*_timing(options), "--attention", case.attention]
    small = ["--tiny", "--num-layers", "1", "--clip", "9", "64", "96", "--compile", "none"]
    # As measured, and what contexts and NCCL take.
    return "wan_speed.py", arguments + small * options.tiny, {1: 42, 2: 38}.get(gpus, 34)


def sequence(case: Case, gpus: int, options: argparse.Namespace) -> tuple[str, list[str], float]:
    """A denoising step and a training step of Wan2.1-1.3B with one shared 720p sequence.

    Also measured with one process alone, in the same run. Without an exact half, which does not
    support shared sequences.
    """
    grid = "3x8x10" if options.tiny else "21x45x80"
    arguments = ["--grids", grid, "--train", grid, "--methods", case.attention]
    arguments += ["--profile"] * options.profile
    arguments += ["--layers=1"] if options.tiny else ["--compile"]
    return "context_parallel.py", arguments, 24


def work(case: Case, gpus: int, options: argparse.Namespace) -> tuple[str, list[str], float]:
    """Samples or features computed by all GPUs."""
    arguments = [case.part, "--folder", str(options.folder)]
    small = ["--tiny", "--count=12", "--batch-size=3"]
    arguments += small if options.tiny else [f"--count={options.count}"]
    arguments += ["--attention", case.attention] if case.attention else []
    return "scaling_work.py", arguments, 12


def _timing(options: argparse.Namespace) -> list[str]:
    return ["--seconds", str(options.row_seconds), *["--profile"] * options.profile]


PARTS = {
    "dit-ddp": dit,
    "dit-fsdp": dit,
    "wan": wan,
    "sequence": sequence,
    "samples": work,
    "features": work,
}
TITLES = {
    "dit-ddp": "DiT-XL/2, {pixels} px, DDP",
    "dit-fsdp": "DiT-XL/2, {pixels} px, FSDP2",
    "wan": "Wan2.1-1.3B, 480 × 832 × 81, FSDP2",
    "sequence": "Wan2.1-1.3B, one sequence of 720 × 1280 × 81",
    "samples": "samples of 32 × 32 pixels",
    "features": "Inception features",
}
NAMES = {MHLA: "MHLA", EXACT: "MHLA, 5 % exact"}
CASES = (
    *(Case("dit-ddp", kind, pixels) for pixels in (512, 256) for kind in (MHLA, SOFTMAX)),
    *(Case("dit-fsdp", kind, 512) for kind in (MHLA, SOFTMAX)),
    Case("wan", MHLA),
    Case("sequence", MHLA),
    Case("dit-ddp", EXACT, 512),
    Case("samples", MHLA),
    Case("features"),
    # NCCL sums with fewer multiprocessors, and before what else is waiting.
    Case("dit-ddp", MHLA, 512, "NCCL_MAX_CTAS=8"),
    Case("dit-ddp", MHLA, 512, "TORCH_NCCL_HIGH_PRIORITY=1"),
    Case("dit-fsdp", MHLA, 512, "NCCL_MAX_CTAS=8"),
    Case("dit-ddp", EXACT, 256),
    *(Case("dit-fsdp", kind, 256) for kind in (MHLA, SOFTMAX)),
    Case("wan", SOFTMAX),
    Case("sequence", "softmax, ring"),
    Case("samples", SOFTMAX),
    Case("wan", EXACT),
    Case("samples", EXACT),
    *(Case("dit-fsdp", EXACT, pixels) for pixels in (512, 256)),
    Case("sequence", "softmax, ulysses"),
)
"""All cases, those first that say most."""


def missing(
    options: argparse.Namespace, counts: Sequence[int], rows: list[Row]
) -> Iterator[tuple[Case, int]]:
    """The cases, and numbers of GPUs, that have no row without an error."""
    ddp = "dit-ddp" in options.parts
    for case in CASES:
        if case.part not in options.parts:
            continue
        # The sequence is also measured alone, in the same run; one GPU needs no FSDP2, and sends
        # nothing.
        sends = case.part == "sequence" or case.variable
        least = 2 if sends or (case.part == "dit-fsdp" and ddp) else 1
        for gpus in counts:
            facts = case.facts | {"gpus": gpus}
            done = any(is_of(row, facts) for row in rows if "error" not in row)
            asked = any(fnmatch(case.log_name(gpus), name) for name in options.names)
            if gpus >= least and asked and not done:
                yield case, gpus


def is_of(row: Row, facts: Row) -> bool:
    """Whether a row is of this case, and not of one with a variable more."""
    return facts.items() <= row.items() and row.get("variable") == facts.get("variable")
