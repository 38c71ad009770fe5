"""The progress bar of a set that several processes make."""

import time
from collections.abc import Callable

from tqdm import tqdm

_SECONDS = 0.5
_FEW = 10


class Progress:
    """Samples done by all processes, and the main process's share of those in progress.

    Args:
        total: Samples of the set.
        count: Samples done so far, by all processes.
        title: What the bar says.
        show: Whether this process shows it.
    """

    def __init__(self, total: int, count: Callable[[], int], title: str, show: bool):
        self._count, self._done = count, count()
        self._bar = tqdm(
            total=total, initial=self._done, desc=title, unit="sample", disable=not show
        )
        self._looked = time.monotonic()

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is None:
            self._show(self._count())
        self._bar.close()

    def step(self, in_work: float) -> None:
        """Samples in work, counted by the share of their steps that is done."""
        if self._bar.disable or time.monotonic() - self._looked < _SECONDS:
            return
        self._looked, self._done = time.monotonic(), self._count()
        self._show(self._done + in_work)

    def _show(self, done: float) -> None:
        # A clip may take hours: a few samples are shown with their fractions.
        done = round(done, 2) if done < _FEW else int(done)
        done = int(done) if done == int(done) else done
        # Steps are counted before their unit is done; the bar never goes back.
        self._bar.n = max(self._bar.n, min(done, self._bar.total))
        self._bar.refresh()
