"""Work shared by several processes (accelerate launch, torchrun), or done by one for all."""

import pickle
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import Any, Protocol, TypeVar, cast

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object
from tqdm import tqdm

from mhla_gen.runtime.devices import resolve_device
from mhla_gen.runtime.recorded_training import forget_recordings

T = TypeVar("T")
R = TypeVar("R")


class Processes(Protocol):
    """What accelerate's PartialState, which has no types, says of the processes of this run."""

    process_index: int
    num_processes: int
    device: torch.device

    @property
    def is_main_process(self) -> bool:
        """Whether this is the first process."""
        ...

    def wait_for_everyone(self) -> None:
        """Return once all processes have called this."""


def processes() -> Processes:
    """The processes that this one has joined; itself alone if there are no others."""
    return cast(Processes, PartialState())


def join_processes(device: str) -> PartialState:
    """Join the other processes of this run, if there are any.

    Args:
        device: auto, cpu or cuda, as a config's `device`.

    Returns:
        The state, with this process's device. Processes wait for each other for up to a day: parts
        of such work differ in length.

    Raises:
        ValueError: If there is no such device.
    """
    if PartialState._shared_state:
        return PartialState()
    # Where there is no GPU, accelerate joins processes only if it is told to use the CPU.
    cpu = resolve_device(device).type == "cpu"
    return PartialState(cpu=cpu, timeout=timedelta(days=1))


def tell(message: str) -> None:
    """Print a line to standard error, only in the main process."""
    if not PartialState._shared_state or PartialState().is_main_process:
        tqdm.write(message, file=sys.stderr)


def part_processes() -> None:
    """Leave the process group at the end; otherwise torch may abort the process."""
    if PartialState._shared_state:
        forget_recordings()
        PartialState().destroy_process_group()


def on_main(compute: Callable[[], T]) -> T:
    """Call `compute` in the main process only; all processes get its result, or its error.

    Whatever the error is: the others would wait for a result for a day. One that does not pickle
    reaches them as a RuntimeError that says it.
    """
    state = PartialState()
    if state.num_processes == 1:
        return compute()
    result: list[Any] = [None, None]
    if not state.is_main_process:
        broadcast_object_list(result)
        if result[1] is not None:
            raise result[1]
        return result[0]
    try:
        result[0] = compute()
    except Exception as error:
        broadcast_object_list([None, _portable(error)])
        raise
    broadcast_object_list(result)
    return result[0]


def _portable(error: Exception) -> Exception:
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:  # by whatever its class does to be pickled
        return RuntimeError(f"{type(error).__name__} in the main process: {error}")
    return error


def shared_map(
    function: Callable[[T], R], items: Sequence[T], title: str, unit: str, threads: int = 8
) -> list[R]:
    """`[function(item) for item in items]`, computed by all processes with a few threads each.

    Args:
        function: Returns what pickles, and handles its own errors.
        items: The same in every process.
        title: What the progress bar says; the main process shows it.
        unit: What an item is called.
        threads: Calls at a time in one process.
    """
    state = PartialState()
    mine = items[state.process_index :: state.num_processes]
    shown = tqdm(desc=title, total=len(items), unit=unit, disable=not state.is_main_process)
    results = []
    with shown as bar, ThreadPoolExecutor(threads) as pool:
        for result in pool.map(function, mine):
            results.append(result)
            advance(bar, 1)
    if state.num_processes == 1:
        return results
    # gather_object joins lists of processes one after the other.
    whole: list[Any] = [None] * len(items)
    for process, part in enumerate(gather_object([results])):
        whole[process :: state.num_processes] = part
    return whole


def advance(bar: "tqdm[Any]", count: int) -> None:
    """Advance a progress bar as if all processes had done as much as this one."""
    bar.update(min(count * PartialState().num_processes, bar.total - bar.n))
