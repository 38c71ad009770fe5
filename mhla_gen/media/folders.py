"""The files of a folder: each real file once, in a fixed order, and what was ignored."""

import os
from collections import Counter
from collections.abc import Iterable, Set
from dataclasses import dataclass, field
from pathlib import Path

# Folders that other systems fill with files of their own, thumbnails and resource forks.
_FOREIGN = frozenset(("__MACOSX", "@eaDir"))


@dataclass(frozen=True)
class Found:
    """Files of the wanted kinds, and how many others there were."""

    paths: tuple[Path, ...]
    others: Counter[str] = field(default_factory=Counter)
    """Files of other suffixes, by suffix; hidden ones do not count."""


def is_hidden(name: str) -> bool:
    """Whether files and folders of this name are skipped silently."""
    return name.startswith(".") or name in _FOREIGN


def files_below(root: Path, suffixes: Set[str]) -> Found:
    """The files below a folder that have one of some suffixes, sorted by path.

    Links are followed, and a file that is met again on the way counts once: a link that leads to a
    folder above adds nothing. A link that leads nowhere is found like a file, and cannot be read.

    Args:
        root: The folder, or one file.
        suffixes: Such as .png, in lower case; those of files may be in any case.

    Raises:
        OSError: If a folder cannot be read.
    """
    files = _walked(root) if root.is_dir() else [root]
    wanted = [path for path in files if path.suffix.lower() in suffixes]
    others = Counter(path.suffix.lower() for path in files if path.suffix.lower() not in suffixes)
    return Found(tuple(_each_once(root, wanted)), others)


def by_number(names: Iterable[str]) -> list[str]:
    """Names in their order: that of the numbers, if all are whole numbers."""
    names = sorted(names)
    if names and all(name.isascii() and name.isdigit() for name in names):
        names.sort(key=int)
    return names


def passed_over(others: Counter[str], limit: int = 6) -> str:
    """For example `12 × .heic, 3 × .xml`, the most frequent first; empty if there are none."""
    shown = [f"{count} × {suffix or 'no suffix'}" for suffix, count in others.most_common(limit)]
    if len(others) > limit:
        shown.append(f"{len(others) - limit} other kinds")
    return ", ".join(shown)


def _walked(root: Path) -> list[Path]:
    files: list[Path] = []
    # Folders are met under their own names before they are met through links.
    waiting, through_links = [root], []
    visited = set(map(str, Path(os.path.realpath(root)).parents))
    while waiting or through_links:
        folder = waiting.pop() if waiting else through_links.pop(0)
        real = os.path.realpath(folder)
        if real in visited:
            continue
        visited.add(real)
        plain, links, inside = _listed(folder)
        waiting += plain
        through_links += links
        files += inside
    return files


def _listed(folder: Path) -> tuple[list[Path], list[Path], list[Path]]:
    """Folders, links to folders, and the rest of a folder, each in the order of names."""
    folders: list[Path] = []
    links: list[Path] = []
    rest: list[Path] = []
    with os.scandir(folder) as entries:
        for entry in sorted(entries, key=lambda entry: entry.name):
            if is_hidden(entry.name):
                continue
            is_folder = entry.is_dir()
            kind = (links if entry.is_symlink() else folders) if is_folder else rest
            kind.append(Path(folder, entry.name))
    return folders, links, rest


def _each_once(root: Path, paths: list[Path]) -> list[Path]:
    """Without links to files that are there anyway; sorted by path."""
    paths = sorted(paths, key=lambda path: path.relative_to(root).as_posix())
    links = {path: os.path.realpath(path) for path in paths if path.is_symlink()}
    if not links:
        return paths
    # A file in a folder that was itself met through a link has its real path elsewhere.
    seen = {os.path.realpath(path) for path in paths if path not in links}
    kept = []
    for path in paths:
        if path in links:
            if links[path] in seen:
                continue
            seen.add(links[path])
        kept.append(path)
    return kept
