"""The report that the quickstart prints at the end."""

import os
import re
import shlex
import shutil
import sys
from pathlib import Path
from typing import Any


def table(metrics: dict[str, Any]) -> str:
    """The scores side by side, and those of perfect samples."""
    rows = [("", "class named", "copies", "Fréchet", "loss", "training")]
    for name in ("mhla", "linear"):
        model = metrics[name]
        rows.append(
            (
                model["title"],
                f"{model['class_accuracy']:.1%}",
                f"{model['copy_share']:.1%}",
                f"{model['frechet_distance']:.2f}",
                f"{model['loss']:.4f}",
                f"{model['training_seconds']:.0f} s",
            )
        )
    real = metrics["real"]
    distance = f"{real['frechet_distance_same_size']:.2f}"
    rows.append(("real digits", f"{real['class_accuracy']:.1%}", "", distance, "", ""))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]
    lines += [
        "",
        f"class named: share of {metrics['num_samples']} samples whose 5 nearest of "
        f"{metrics['num_real']} real digits vote for the requested class.",
        "copies: share closer to a real digit than any two real digits of that class are.",
        f"Fréchet: distance to the real digits, {metrics['feature_space']}. The last row compares "
        f"as many real digits with the rest; two halves are "
        f"{real['frechet_distance_halves']:.2f} apart.",
        "Both models have the same size, convolution, gate, seed and training; only the number "
        "of blocks differs.",
    ]
    return "\n".join(lines)


def next_commands(folder: Path, max_steps: int) -> list[str]:
    """Three commands to continue with, as a shell takes them."""
    command, python = _program("mhla-gen"), shlex.quote(_relative(sys.executable))
    pipeline = shlex.quote(str(folder / "pipeline"))
    trained = shlex.quote(str(folder / "training" / "mhla" / "config.yaml"))
    more, longer = (shlex.quote(f"{folder}-{name}") for name in ("more", "longer"))
    code = (
        "import mhla_gen; "
        f"pipe = mhla_gen.ClassConditionalPipeline.from_pretrained({str(folder / 'pipeline')!r}); "
        "pipe([7]).images[0].resize((256, 256)).save('seven.png')"
    )
    return [
        f"{command} sample pipeline={pipeline} 'classes=[3,8]' samples_per_class=50 "
        f"guidance_scale=3 output_dir={more}",
        f"{command} train {trained} max_steps={4 * max_steps} output_dir={longer}",
        f'{python} -c "{_in_double_quotes(code)}"',
    ]


def _in_double_quotes(text: str) -> str:
    """Escape what a shell reads between double quotes; Python code has single ones of its own."""
    return re.sub(r'([\\"$`])', r"\\\1", text)


def _program(name: str) -> str:
    """How to call a program installed beside this Python."""
    here = Path(sys.executable).parent / name
    found = shutil.which(name)
    if found is not None and Path(found).resolve() == here.resolve():
        return name
    return shlex.quote(_relative(str(here)))


def _relative(path: str) -> str:
    relative = os.path.relpath(path)
    return path if relative.startswith("..") else relative
