"""Forward passes, recorded on the GPU and replayed.

Every step of a sampler, or of training, launches the same kernels, hundreds of them. For a small
model, or few tokens, the host takes longer to launch them than the GPU to run them; a recorded pass
(a CUDA graph) is launched at once.
"""

import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import TreeSpec, tree_flatten, tree_map_only, tree_unflatten
from tqdm import tqdm

# Calls of one shape before it is recorded: the first compiles, and both allocate.
_WARM_UP = 2
# Guidance on an interval calls with two shapes in turn.
_MOST_RECORDINGS = 2


class RecordedForward:
    """A function of CUDA tensors, recorded once for each shape of its arguments.

    Kernels and their order are those of the function, so results are the same bits. A recording
    keeps the memory of one call. It reads the model's weights where they were, so weights may
    change in place, but not move. Calls that autograd watches, and such with a tensor on another
    device, are not recorded.

    Args:
        function: A forward pass without random numbers and without a look at the values of tensors;
            arguments are tensors, what compares by `==`, and lists and dicts of both.
    """

    def __init__(self, function: Callable[..., Any]):
        self.function = function
        # The oldest first.
        self._recordings: list[_Recording] = []

    @property
    def replays(self) -> bool:
        """Whether a call has been recorded."""
        return any(recording.graph is not None for recording in self._recordings)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The function's result, in memory of its own."""
        leaves, structure = tree_flatten((args, kwargs))
        if torch.is_grad_enabled() or not _on_gpu(leaves):
            return self.function(*args, **kwargs)
        call = (structure, *map(kind_of, leaves))
        for recording in self._recordings:
            if recording.call == call:
                return recording(leaves)
        del self._recordings[: len(self._recordings) + 1 - _MOST_RECORDINGS]
        recording = _Recording(self.function, leaves, structure, call)
        self._recordings.append(recording)
        return recording(leaves)


def _on_gpu(leaves: Sequence[Any]) -> bool:
    return all(x.is_cuda for x in leaves if torch.is_tensor(x))


class _Recording:
    """One shape's pass, with the memory of its arguments and results."""

    def __init__(
        self, function: Callable[..., Any], leaves: Sequence[Any], structure: TreeSpec, call: Any
    ):
        self.call = call
        """What a call must share with the recorded one to be replayed."""
        self._function, self._structure = function, structure
        # Cloned for earlier calls, too: compiled code would compile again for other strides.
        self._leaves = [x.clone() if torch.is_tensor(x) else x for x in leaves]
        self._calls = 0
        self.graph: torch.cuda.CUDAGraph | None = None
        self._outputs: Any = None

    def __call__(self, leaves: Sequence[Any]) -> Any:
        for own, value in zip(self._leaves, leaves, strict=True):
            if torch.is_tensor(value):
                own.copy_(value)
        self._calls += 1
        if self._calls == _WARM_UP + 1:
            self.graph = self._record()
        if self.graph is None:
            return self._launch()
        self.graph.replay()
        return tree_map_only(Tensor, torch.clone, self._outputs)

    def _launch(self) -> Any:
        # Unflattened for every call, because the function may remove entries of its dicts.
        args, kwargs = tree_unflatten(self._leaves, self._structure)
        return self._function(*args, **kwargs)

    def _record(self) -> torch.cuda.CUDAGraph | None:
        """The recording, or None if there is no memory for it."""
        # What the calls before have left in the allocator is needed by the recording's own.
        torch.cuda.empty_cache()
        graph = torch.cuda.CUDAGraph()
        try:
            with recording(graph):
                self._outputs = self._launch()
            return graph
        except RuntimeError as error:
            require_lack_of_memory(error)
        return None


@contextmanager
def recording(graph: torch.cuda.CUDAGraph, **options: Any) -> Iterator[None]:
    """Record what is done inside; nothing is computed.

    Args:
        graph: New.
        options: Others of `torch.cuda.graph`.
    """
    # An older recording that Python's garbage collection destroys meanwhile would break this one
    # off (issue 161037 of pytorch).
    gc.collect()
    collects = gc.isenabled()
    gc.disable()
    try:
        # A recording that is broken off would leave its stream the current one. Another thread may
        # copy finished samples meanwhile.
        with (
            torch.cuda.stream(torch.cuda.current_stream()),
            torch.cuda.graph(graph, capture_error_mode="thread_local", **options),
        ):
            yield
    finally:
        if collects:
            gc.enable()


def kind_of(value: Any) -> Any:
    """What an argument of a recorded call must have in common with that of the recording."""
    return (value.shape, value.dtype, value.device) if torch.is_tensor(value) else value


def require_lack_of_memory(error: RuntimeError) -> None:
    """Say that a recording found no memory; raise an error that has another reason."""
    reason: BaseException | None = error
    # Leaving a recording that was broken off may fail in turn.
    while reason is not None and not isinstance(reason, torch.OutOfMemoryError):
        reason = reason.__context__
    if reason is None:
        raise error
    tqdm.write("no memory left for CUDA graphs: steps compute the same but take longer")
