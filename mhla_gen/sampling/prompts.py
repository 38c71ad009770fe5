"""Prompts: from a config, a text file or a JSONL file."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mhla_gen.config.fields import SEEDS, expand_home
from mhla_gen.errors import UserError
from mhla_gen.files.text import Row, read_jsonl, read_text

_READ = (".txt", ".jsonl", ".ndjson")
_OTHER = (".csv", ".tsv", ".json", ".yaml", ".yml", ".parquet", ".md", ".xlsx")
_KEYS = {"prompt": str, "negative_prompt": str, "seed": int, "image": str}


@dataclass(frozen=True)
class Prompt:
    """The prompt of one sample."""

    prompt: str = ""
    negative_prompt: str | None = None
    seed: int | None = None
    """None derives one from the config's seed."""
    image: str | None = None
    """File with the first frame."""


def read_prompts(prompts: Any) -> list[Prompt]:
    """The prompts of a config's `prompts`.

    Args:
        prompts: One prompt, several, or a .txt or .jsonl file.

    Raises:
        MissingError: If a file is missing.
        UserError: If there is no prompt, a line of a file is none, or a file is of another kind.
    """
    if isinstance(prompts, Sequence) and not isinstance(prompts, str):
        found = [Prompt(str(text)) for text in prompts]
    elif (path := _file_of(prompts)) is not None:
        found = _read_file(path)
    else:
        found = [Prompt(prompts)]
    if not found:
        raise UserError(f"prompts={prompts} has no prompt; write one per line")
    return found


def missing_prompts(name: str, pipeline: str) -> str:
    """The message if a pipeline of this class gets no prompts."""
    return f"the {name} in {pipeline} takes prompts; set prompts=TEXT or FILE"


def _file_of(prompts: str) -> Path | None:
    """The file named by a text; None if it is a prompt itself."""
    if Path(prompts).suffix.lower() in _READ:
        return Path(expand_home("prompts", prompts))
    looks_like_one = Path(prompts).suffix.lower() in _OTHER and not re.search(r"\s", prompts)
    try:
        # One word may be both a prompt and a folder here, a path only a folder.
        is_path = Path(prompts).is_file() or ("/" in prompts and Path(prompts).is_dir())
    except (OSError, ValueError):
        # Longer than a name can be, or with characters that no name has.
        is_path = False
    if is_path or looks_like_one:
        kind = "a folder" if Path(prompts).is_dir() else "a file of a kind"
        raise UserError(
            f"prompts={prompts} names {kind} that prompts are not read from; they are read from "
            ".txt, one per line, and .jsonl"
        )
    return None


def _read_file(path: Path) -> list[Prompt]:
    if path.suffix.lower() == ".txt":
        lines = read_text(path, "prompts file").split("\n")
        return [Prompt(line.strip()) for line in lines if line.strip()]
    found = [_prompt_of(row) for row in read_jsonl(path, "prompts file")]
    # Images stand beside the file that names them.
    return [
        p if p.image is None else replace(p, image=str(path.parent / expand_home("image", p.image)))
        for p in found
    ]


def _prompt_of(row: Row) -> Prompt:
    place, values = row
    for key, value in values.items():
        if key not in _KEYS:
            raise UserError(f"{place} has the key {key!r}; known keys are {', '.join(_KEYS)}")
        # true and false are whole numbers to Python.
        if value is not None and (not isinstance(value, _KEYS[key]) or isinstance(value, bool)):
            kind = "a text" if _KEYS[key] is str else "a whole number"
            raise UserError(f"{place}: {key} must be {kind}, found {value!r}")
    if "prompt" not in values:
        raise UserError(f"{place} has no prompt")
    if values.get("seed") is not None:
        SEEDS.check(f"{place}: seed", values["seed"], whole=True)
    given: dict[str, Any] = values | {"prompt": values["prompt"] or ""}
    return Prompt(**given)
