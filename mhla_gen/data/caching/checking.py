"""Checks of the files of a cache."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from mhla_gen.data.caching.chunks import MISSING, Chunk, examine
from mhla_gen.data.caching.index import Index
from mhla_gen.errors import UserError
from mhla_gen.runtime.processes import shared_map

Facts = dict[str, Any]
"""What `examine` finds in a file."""
EXTRAS = {"mean_flipped", "condition", "image_embeds"}
"""Tensors that a cache has beside its latents, if its settings say so."""


def examine_all(folder: Path, names: Sequence[str]) -> dict[str, Facts]:
    """What is in each file, by name; processes share the work.

    Raises:
        ValueError: If one is missing, cannot be read, or has values that are not finite.
    """
    found = shared_map(lambda name: examine(folder / name), names, "checking", "file")
    for facts in found:
        if "problem" in facts:
            raise broken(facts["path"], facts["problem"])
    return {facts["file"]: facts for facts in found}


def require_latents(
    facts: Facts, chunk: Chunk, shape: tuple[int, ...], dtype: str, extras: set[str]
) -> None:
    """Raise unless a chunk has the expected latents.

    Args:
        facts: What is in it.
        chunk: What it was to hold.
        shape: Of a sample, `[channels, …]`.
        dtype: Of a sample.
        extras: Which of `EXTRAS` are in it.

    Raises:
        ValueError: If rows, tensors, shapes or types are others.
    """
    record, shapes = facts["record"], facts["shapes"]
    rows = len(record["names"])
    if rows + len(record["quarantined"]) != len(chunk.items) or shapes["item"] != [rows]:
        raise broken(facts["path"], f"has {shapes['item'][0]} samples of {len(chunk.items)}")
    if rows == 0:
        return
    if "mean" not in shapes or extras != EXTRAS & shapes.keys():
        raise broken(facts["path"], f"has the tensors {', '.join(shapes)}")
    for name in ("mean", "std", "mean_flipped", "std_flipped", "condition"):
        found = facts["dtypes"].get(name), shapes.get(name)
        if name in shapes and found != (dtype, [rows, *shape]):
            raise broken(
                facts["path"], f"has {name} of {found[0]} {found[1]}, not {dtype} {[rows, *shape]}"
            )


def require_prompts(facts: Facts, chunk: Chunk) -> None:
    """Raise unless a chunk has the expected number of captions.

    Raises:
        ValueError: If not.
    """
    counts = [shape for name, shape in facts["shapes"].items() if name.endswith("lengths")]
    if any(shape != [len(chunk.items)] for shape in counts):
        found = counts[0][0]
        raise broken(facts["path"], f"has {found} captions of {len(chunk.items)}")


def require_digests(found: Iterable[Facts], known: dict[str, Facts]) -> None:
    """Raise unless files have the digests of an index.

    Raises:
        ValueError: If one has changed.
    """
    for facts in found:
        name = facts["file"]
        if name in known and known[name]["sha256"] != facts["sha256"]:
            raise broken(facts["path"], "has changed since it was written")


def broken(path: str, problem: str) -> UserError:
    """The error for a file that must be computed again."""
    delete = "" if problem == MISSING else "delete this file and "
    return UserError(
        f"{path} {problem}; {delete}run `mhla-gen cache` with its config again, which "
        "computes it once more"
    )


def verify(folder: Path) -> str:
    """Read every file of a finished cache and compare it with its digest; a line for the user.

    Raises:
        ValueError: If a file is broken or has changed.
        FileNotFoundError: If there is no finished cache.
    """
    index = Index.read(folder)
    require_digests(examine_all(folder, list(index.files)).values(), index.files)
    total = sum(facts["bytes"] for facts in index.files.values())
    return f"{folder}: {len(index.files)} files, {total / 2**30:.2f} GiB, all unchanged"
