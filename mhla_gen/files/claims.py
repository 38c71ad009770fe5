"""Output folders that this process writes to, which nobody may remove or replace meanwhile."""

from pathlib import Path

from mhla_gen.errors import MissingError

# Which folder each was when it was claimed.
_claimed: dict[Path, tuple[int, int]] = {}


def claim(folder: Path) -> bool:
    """Take a folder as one that must not be removed while this process writes to it.

    Returns:
        False if this process had done so before.
    """
    folder = folder.absolute()
    if folder in _claimed:
        return False
    _claimed[folder] = _identity(folder)
    return True


def is_claimed(folder: Path) -> bool:
    """Whether this process has claimed a folder."""
    return folder.absolute() in _claimed


def release(folder: Path) -> None:
    """Undo `claim`."""
    _claimed.pop(folder.absolute(), None)


def make_folder(folder: Path) -> None:
    """Make a folder and its parents, but never an output folder that was removed meanwhile.

    Raises:
        MissingError: Naming an output folder that was removed, moved or replaced.
    """
    require_claimed(folder)
    root = _claimed_above(folder)
    if root is None:
        folder.mkdir(parents=True, exist_ok=True)
        return
    below = [path for path in (folder.absolute(), *folder.absolute().parents) if path != root]
    for path in reversed([path for path in below if path.is_relative_to(root)]):
        path.mkdir(exist_ok=True)


def require_claimed(path: Path) -> None:
    """Raise if the output folder that contains a path was removed or replaced.

    Raises:
        MissingError: Naming it.
    """
    root = _claimed_above(path)
    if root is None:
        return
    try:
        same = _identity(root) == _claimed[root]
    except FileNotFoundError:
        same = False
    if not same:
        raise MissingError(
            f"{root} was removed, moved or replaced while this command wrote to it, so it stopped; "
            "run the command again to start over"
        )


def _claimed_above(path: Path) -> Path | None:
    above = (path.absolute(), *path.absolute().parents)
    return next((folder for folder in above if folder in _claimed), None)


def _identity(folder: Path) -> tuple[int, int]:
    found = folder.stat()
    return found.st_dev, found.st_ino
