"""The arms of classification_run.py, and a table that compares them with the paper's.

python experiments/classification/classification_table.py RESULT.json
"""

import argparse
import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mhla_gen import LinformerConfig, MHLAConfig
from mhla_gen.config import AttentionConfig

_BLOCKS, _ONE = (4, 4), (1, 1)
_PLAIN: dict[str, Any] = {"conv": False, "gate": False}


class Arm(NamedTuple):
    """One row."""

    title: str
    config: AttentionConfig | None
    """None is softmax."""
    printed: float | None = None
    """Top-1 accuracy on ImageNet-1K that arXiv:2601.07832 prints for DeiT-T (Table 2a), in %."""
    main: bool = True
    """Trained before all that are not."""


ARMS = {
    "softmax": Arm("softmax", None, 72.2),
    "linear": Arm("linear", MHLAConfig(layout=_ONE, **_PLAIN), 69.8),
    "mhla": Arm("MHLA", MHLAConfig(layout=_BLOCKS, **_PLAIN)),
    "mhla-conv": Arm("MHLA + conv", MHLAConfig(layout=_BLOCKS, gate=False), 75.8),
    "mhla-conv-gate": Arm("MHLA + conv + gate", MHLAConfig(layout=_BLOCKS)),
    "exact": Arm(
        "12.5 % exact + MHLA + conv + gate",
        MHLAConfig(layout=_BLOCKS, exact=0.125, exact_start=0.5),
    ),
    "linformer": Arm("Linformer, k = 64", LinformerConfig(projected_len=64, **_PLAIN)),
    "softmax-conv-gate": Arm("softmax + conv + gate", MHLAConfig(exact=1.0), main=False),
    "linear-conv-gate": Arm("linear + conv + gate", MHLAConfig(layout=_ONE), main=False),
    "linear-conv": Arm("linear + conv", MHLAConfig(layout=_ONE, gate=False), main=False),
    "focused": Arm(
        "focused linear + conv 5 × 5",
        MHLAConfig(
            layout=_ONE,
            feature_map="focused",
            learned_features=True,
            conv_kernel_size=5,
            gate=False,
        ),
        74.1,
        main=False,
    ),
    "mala": Arm(
        "MALA + conv 5 × 5 + gate",
        MHLAConfig(layout=_ONE, feature_map="elu+1", magnitude=True, conv_kernel_size=5),
        75.1,
        main=False,
    ),
}


def right(runs: list[dict[str, Any]], side: str) -> np.ndarray | None:
    """Share of seeds that were right, for every held-out image; None without runs at this size."""
    found = [run["right"][side] for run in runs if side in run["right"]]
    return np.mean([[int(digit) for digit in each] for each in found], axis=0) if found else None


def _interval(values: np.ndarray) -> str:
    """Mean and 95 % interval over images, in per cent."""
    half = 1.96 * values.std(ddof=1) / len(values) ** 0.5
    return f"{100 * values.mean():.1f} ± {100 * half:.1f}"


def table(result: dict[str, Any]) -> str:
    """Markdown: accuracy with intervals, by seed, at other sizes, and throughput if measured."""
    by_arm = {arm: [run for run in result["runs"].values() if run["arm"] == arm] for arm in ARMS}
    base = right(by_arm["softmax"], "64")
    header = ["attention", "parameters", "held-out top-1", "against softmax", "seeds"]
    header += ["96 px", "128 px", "images/s, 256 tokens", "1,024", "4,096", "paper, ImageNet"]
    lines = []
    for name, arm in ARMS.items():
        runs, rows = by_arm[name], result["speed"].get(name, [])
        values = right(runs, "64")
        if values is None and not rows:
            continue
        cells = [arm.title, *["-"] * 10]
        if values is not None:
            cells[1] = f"{runs[0]['parameters'] / 1e6:.2f} M"
            cells[2] = _interval(values)
            if base is not None and name != "softmax":
                cells[3] = _interval(values - base)
            seeds = [np.mean([int(digit) for digit in run["right"]["64"]]) for run in runs]
            cells[4] = ", ".join(f"{100 * seed:.1f}" for seed in seeds)
            for place, side in ((5, "96"), (6, "128")):
                larger = right(runs, side)
                cells[place] = "-" if larger is None else f"{100 * larger.mean():.1f}"
        for place, row in zip((7, 8, 9), rows, strict=False):
            both = (row["forward_images_per_second"], row["training_images_per_second"])
            cells[place] = " / ".join(f"{value:,.0f}" for value in both)
        if arm.printed is not None:
            cells[10] = f"{arm.printed}"
        lines.append(cells)
    lines = [header, ["---"] * len(header), *lines]
    if not result["speed"]:
        lines = [[*cells[:7], *cells[10:]] for cells in lines]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("result", type=Path, help="what classification_run.py wrote")
    print(table(json.loads(parser.parse_args().result.read_bytes())))
