"""Prompts: from a config, a text file or a JSONL file."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

_KEYS = {"prompt": str, "negative_prompt": str, "seed": int, "image": str}


@dataclass(frozen=True)
class Prompt:
    """What one sample shows."""

    prompt: str = ""
    negative_prompt: str | None = None
    seed: int | None = None
    """None derives one from the config's seed."""
    image: str | None = None
    """File with the first frame."""


def read_prompts(prompts: Any) -> list[Prompt]:
    """The prompts that a config's `prompts` means.

    Args:
        prompts: One prompt, several, or a .txt or .jsonl file.

    Raises:
        FileNotFoundError: If a file is missing.
        ValueError: If there is no prompt, or a line of a file is none.
    """
    if isinstance(prompts, Sequence) and not isinstance(prompts, str):
        found = [Prompt(str(text)) for text in prompts]
    elif Path(prompts).suffix in (".txt", ".jsonl"):
        found = _read_file(Path(prompts))
    else:
        found = [Prompt(prompts)]
    if not found:
        raise ValueError(f"prompts={prompts} has no prompt; write one a line")
    return found


def _read_file(path: Path) -> list[Prompt]:
    if not path.is_file():
        raise FileNotFoundError(f"prompts={path} does not exist")
    try:
        # Some editors begin a file with a mark of its encoding.
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(
            f"prompts={path} is not UTF-8 ({error.reason}); save it as such"
        ) from error
    read = _parse_line if path.suffix == ".jsonl" else lambda text, _: Prompt(text.strip())
    found = [read(text, f"{path}:{i}") for i, text in enumerate(lines, 1) if text.strip()]
    # Images stand beside the file that names them.
    return [
        replace(p, image=str(path.parent / p.image)) if p.image is not None else p for p in found
    ]


def _parse_line(text: str, where: str) -> Prompt:
    try:
        values = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where} is not JSON: {error.msg}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{where} must be an object with the keys {', '.join(_KEYS)}")
    for key, value in values.items():
        if key not in _KEYS:
            raise ValueError(f"{where} has the key {key!r}; known are {', '.join(_KEYS)}")
        if value is not None and not isinstance(value, _KEYS[key]):
            raise ValueError(f"{where}: {key} must be a {_KEYS[key].__name__}, found {value!r}")
    if values.get("seed") is not None and values["seed"] < 0:
        raise ValueError(f"{where}: seed must be at least 0, found {values['seed']}")
    return Prompt(**values)
