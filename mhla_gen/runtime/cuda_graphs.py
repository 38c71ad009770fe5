"""A model's passes, recorded on the GPU and replayed.

Every step of a sampler, or of training, launches the same kernels, hundreds of them. For a small
model, or few tokens, the host takes longer to launch them than the GPU to run them; a recorded pass
(a CUDA graph) is launched at once.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
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
        key = (len(args), *kwargs, *map(_kind, values))
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
        self._graph: Any = None
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
            _require_lack_of_memory(error)
        return None


class RecordedTraining:
    """A model's forward pass in training, with its backward pass: both recorded at the first call.

    Gradients and results are those of the model. The memory of both passes stays taken; weights may
    change in place, but not move. What a call returns, and the gradients it leads to, are written
    over by the next call: backward passes of two calls cannot be summed. Calls that autograd does
    not watch, and such with other shapes than the first, are not replayed.

    Args:
        model: In training mode, on its GPU.
        forward: Its forward pass, without a look at the values of tensors; arguments are tensors
            or hashable.
    """

    def __init__(self, model: nn.Module, forward: Callable[..., Any]):
        self.model, self.forward = model, forward
        self._call: Any = None
        self._replay: Any = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The forward pass's result."""
        if not (self.model.training and torch.is_grad_enabled()):
            return self.forward(*args, **kwargs)
        leaves, structure = tree_flatten((args, kwargs))
        call = (structure, *map(_kind, leaves))
        if self._call is None:
            self._call, self._replay = call, self._record(leaves, structure)
        if self._replay is None or call != self._call:
            return self.forward(*args, **kwargs)
        return self._replay(*(leaf for leaf in leaves if torch.is_tensor(leaf)))

    def _record(self, leaves: Sequence[Any], structure: TreeSpec) -> Any:
        """The recorded passes, or None if there is no memory for them."""
        tensors = tuple(leaf.clone() for leaf in leaves if torch.is_tensor(leaf))
        positional = _Positional(self.model, self.forward, leaves, structure)
        torch.cuda.empty_cache()
        try:
            # The passes before it, which compile, take nothing from the run's chance.
            with torch.random.fork_rng(devices=[tensors[0].device]):
                return torch.cuda.make_graphed_callables(
                    positional, tensors, allow_unused_input=True
                )
        except RuntimeError as error:
            _require_lack_of_memory(error)
        return None


class _Positional(nn.Module):
    """A model called with tensors alone, and all else as in its first call."""

    def __init__(
        self,
        model: nn.Module,
        function: Callable[..., Any],
        leaves: Sequence[Any],
        structure: TreeSpec,
    ):
        super().__init__()
        # Its parameters are those that get gradients.
        self.model = model
        self._function, self._structure = function, structure
        self._leaves = [None if torch.is_tensor(leaf) else leaf for leaf in leaves]
        self._places = [i for i, leaf in enumerate(leaves) if torch.is_tensor(leaf)]

    def forward(self, *tensors: Tensor) -> Any:
        leaves = list(self._leaves)
        for place, tensor in zip(self._places, tensors, strict=True):
            leaves[place] = tensor
        args, kwargs = tree_unflatten(leaves, self._structure)
        return self._function(*args, **kwargs)


def _kind(value: Any) -> Any:
    return (value.shape, value.dtype, value.device) if torch.is_tensor(value) else value


def _require_lack_of_memory(error: RuntimeError) -> None:
    """Say that a recording found no memory; raise an error that has another reason."""
    reason: BaseException | None = error
    # Leaving a recording that was broken off may fail in turn.
    while reason is not None and not isinstance(reason, torch.OutOfMemoryError):
        reason = reason.__context__
    if reason is None:
        raise error
    tqdm.write("no memory to record a step: it computes the same, and takes longer")
