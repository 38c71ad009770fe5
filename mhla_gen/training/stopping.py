"""Stopping a run on a signal, at the same step in every process."""

import signal
import threading
from types import FrameType
from typing import Any, cast

import torch
from accelerate import Accelerator

_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class StopRequest:
    """Catches SIGTERM and the first SIGINT, so that the current step is finished.

    A second SIGINT interrupts at once. Use as a context manager around the loop.

    Args:
        accelerator: Of the run.
    """

    def __init__(self, accelerator: Accelerator):
        self.signal: signal.Signals | None = None
        self._old: dict[signal.Signals, Any] = {}
        self._group: torch.distributed.ProcessGroup | None = None
        self._several = accelerator.num_processes > 1
        if self._several:
            # Beside the group of the device: to ask must not wait for the device.
            group = torch.distributed.new_group(backend="gloo")
            self._group = cast(torch.distributed.ProcessGroup, group)

    def __enter__(self) -> "StopRequest":
        # Python lets only the main thread handle signals.
        if threading.current_thread() is threading.main_thread():
            self._old = {number: signal.signal(number, self._note) for number in _SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.signal = signal.Signals(number)
        signal.signal(number, self._old[self.signal])

    @property
    def name(self) -> str:
        """The name of what stopped the run."""
        return "" if self.signal is None else f"stopped by {self.signal.name}"

    def made(self) -> bool:
        """Whether any process was asked to stop; every process must call this after every step."""
        if not self._several:
            return self.signal is not None
        asked = torch.tensor(0 if self.signal is None else int(self.signal))
        torch.distributed.all_reduce(asked, torch.distributed.ReduceOp.MAX, self._group)
        if asked:
            self.signal = signal.Signals(int(asked))
        return bool(asked)


class Stopped(KeyboardInterrupt):
    """A run was stopped by a signal, after its checkpoint was written; the message says so."""
