"""The text of language.py: the source of the running Python's standard library, as bytes."""

import hashlib
import platform
import sysconfig
from pathlib import Path
from typing import Any

import numpy as np

# Separates two files; this byte never occurs in UTF-8 text.
END_OF_FILE = 0
LEFT_OUT = {"site-packages", "dist-packages", "test", "tests", "encodings", "__pycache__"}


def read_text() -> tuple[np.ndarray, list[np.ndarray], dict[str, Any]]:
    """Bytes to train on, held-out files, and a description of both."""
    root = Path(sysconfig.get_paths()["stdlib"])
    files = (p for p in root.rglob("*.py") if not LEFT_OUT & set(p.relative_to(root).parts))
    train, held_out, digest = [], [], hashlib.sha256()
    for path in sorted(files):
        name, text = path.relative_to(root).as_posix(), path.read_bytes()
        digest.update(text)
        number = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big")
        tokens = np.frombuffer(text, np.uint8)
        if number % 10 == 0:
            held_out.append(tokens)
        else:
            train += [tokens, np.array([END_OF_FILE], np.uint8)]
    text = np.concatenate(train)
    facts = {
        "python": platform.python_version(),
        "sha256": digest.hexdigest(),
        "train_bytes": len(text),
        "held_out_bytes": sum(map(len, held_out)),
    }
    return text, held_out, facts


def held_out_windows(files: list[np.ndarray], tokens: int, most: int) -> np.ndarray:
    """Full windows of held-out files, from all files in turn, `[at most most, tokens]`."""
    per_file = [[f[i : i + tokens] for i in range(0, len(f) - tokens, tokens)] for f in files]
    windows = [
        w for turn in range(max(map(len, per_file))) for ws in per_file for w in ws[turn : turn + 1]
    ]
    return np.stack(windows[:most])
