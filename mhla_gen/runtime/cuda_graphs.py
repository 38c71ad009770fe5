"""Forward passes, recorded on the GPU and replayed.

Every step of a sampler, or of training, launches the same kernels, hundreds of them. For a small
model, or few tokens, the host takes longer to launch them than the GPU to run them; a recorded pass
(a CUDA graph) is launched at once.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only
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
            arguments are tensors or hashable.
    """

    def __init__(self, function: Callable[..., Any]):
        self.function = function
        self._recordings: dict[Any, _Recording] = {}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The function's result, in memory of its own."""
        values = [*args, *kwargs.values()]
        if torch.is_grad_enabled() or not all(x.is_cuda for x in values if torch.is_tensor(x)):
            return self.function(*args, **kwargs)
        key = (len(args), *kwargs, *map(kind_of, values))
        if key not in self._recordings:
            while len(self._recordings) >= _MOST_RECORDINGS:
                self._recordings.pop(next(iter(self._recordings)))
            self._recordings[key] = _Recording(self.function, args, kwargs)
        return self._recordings[key](values)


class _Recording:
    """One shape's pass, with the memory of its arguments and results."""

    def __init__(self, function: Callable[..., Any], args: Any, kwargs: Any):
        self._function = function
        # Also for the calls before: compiled code would compile again for other strides.
        self._args, self._kwargs = tree_map_only(Tensor, torch.clone, (args, kwargs))
        self._calls = 0
        self._graph: torch.cuda.CUDAGraph | None = None
        self._outputs: Any = None

    def __call__(self, values: list[Any]) -> Any:
        for own, value in zip([*self._args, *self._kwargs.values()], values, strict=True):
            if torch.is_tensor(value):
                own.copy_(value)
        self._calls += 1
        if self._calls == _WARM_UP + 1:
            self._graph = self._record()
        if self._graph is None:
            return self._function(*self._args, **self._kwargs)
        self._graph.replay()
        return tree_map_only(Tensor, torch.clone, self._outputs)

    def _record(self) -> torch.cuda.CUDAGraph | None:
        """The recording, or None if there is no memory for it."""
        # What the calls before have left in the allocator is needed by the recording's own.
        torch.cuda.empty_cache()
        graph = torch.cuda.CUDAGraph()
        try:
            # Another thread may copy finished samples meanwhile.
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                self._outputs = self._function(*self._args, **self._kwargs)
            return graph
        except RuntimeError as error:
            require_lack_of_memory(error)
        return None


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
