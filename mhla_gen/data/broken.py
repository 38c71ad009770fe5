"""Images that training cannot read: reported once, listed, and not tried again."""

import json
import sys
from pathlib import Path
from threading import Lock

from tqdm import tqdm

from mhla_gen.files import append_line
from mhla_gen.files.saved import read_lines

FAILED = "could not be read"
"""The reason if reading the file failed, rather than the image being damaged."""


class BrokenImages:
    """What could not be read so far, by the image's number. Threads may share it."""

    def __init__(self):
        self._found: dict[int, dict[str, str]] = {}
        self._listing: Path | None = None
        self._lock = Lock()

    def __contains__(self, index: int) -> bool:
        return index in self._found

    def reason(self, index: int) -> str:
        """Why an image is among them."""
        return self._found[index]["reason"]

    @staticmethod
    def failed_in(path: Path) -> dict[str, str]:
        """Names and reasons of images that a listing has because their reading failed."""
        lines = read_lines(path)[0] if path.is_file() else []
        found = {str(line.get("name")): str(line.get("reason")) for line in lines}
        return {name: reason for name, reason in found.items() if reason.startswith(FAILED)}

    def add(self, index: int, name: str, reason: str) -> None:
        """Remember an image, report it on the terminal, and list it."""
        with self._lock:
            if index in self._found:
                return
            self._found[index] = {"name": name, "reason": reason}
            message = f"{name} {reason}; the next image of its class is used instead"
            tqdm.write(message, file=sys.stderr)
            self._list([self._found[index]])

    def list_in(self, path: Path) -> None:
        """Also list them in a file, those before and those to come: one JSON object a line.

        Processes of a run, and starts after an interruption, share the file.
        """
        with self._lock:
            self._listing = path
            self._list(list(self._found.values()))

    def _list(self, lines: list[dict[str, str]]) -> None:
        if self._listing is None or not lines:
            return
        known = (
            self._listing.read_text(encoding="utf-8", errors="replace").split("\n")
            if self._listing.is_file()
            else []
        )
        new = [line for line in map(json.dumps, lines) if line not in known]
        if new:
            append_line(self._listing, "\n".join(new))
