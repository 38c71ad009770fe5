"""Training passes of a model, recorded on the GPU and replayed.

`torch.cuda.make_graphed_callables` does it for a model on one GPU whose gradients are not summed.
Here gradients add up over calls, and DistributedDataParallel averages them inside the recording, as
in its own passes: while the rest of the backward pass is computed.
"""

import atexit
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from mhla_gen.runtime.cuda_graphs import kind_of, recording, require_lack_of_memory

# All of this process.
_RECORDED: "WeakSet[RecordedTraining]" = WeakSet()
# Passes before one is recorded: the first compiles, and all allocate.
_WARM_UP = 3
# DistributedDataParallel also orders its buckets in the second pass, and reads its clocks, for
# which it waits, in the tenth.
_WARM_UP_SHARED = 11


class RecordedTraining:
    """A model's forward pass in training, with its backward pass: both recorded at the first call.

    Gradients and results are those of the model, also where the gradients of several calls add up,
    and where DistributedDataParallel averages them. The memory of both passes stays taken; weights
    may change in place, but not move. What a call returns is written over by the next call, so each
    call's backward pass comes before the next call, and gradients are set to None before a call,
    not between it and its backward pass. Calls that autograd does not watch, and such with other
    shapes than the first, are not replayed.

    Args:
        model: In training mode, on its GPU, as processes share it.
        forward: Its forward pass, without a look at the values of tensors; arguments are tensors
            that need no gradient, or hashable.
        stream: That on which DistributedDataParallel was made: there it receives gradients, and a
            recording must not leave its stream. None takes a new one.
    """

    def __init__(
        self,
        model: nn.Module,
        forward: Callable[..., Any],
        stream: "torch.cuda.Stream | None" = None,
    ):
        self.model, self.forward = model, forward
        self._stream = stream
        self._parameters = [p for p in model.parameters() if p.requires_grad]
        self._call: tuple[Any, ...] | None = None
        self._pool: tuple[int, int] | None = None
        self._recordings: dict[bool, list[_Passes]] = {False: [], True: []}
        self._records = True
        _RECORDED.add(self)

    @property
    def replays(self) -> bool:
        """Whether a call has been recorded."""
        return any(self._recordings.values())

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The forward pass's result."""
        if not (self.model.training and torch.is_grad_enabled() and self._records):
            return self.forward(*args, **kwargs)
        leaves, structure = tree_flatten((args, kwargs))
        call = (structure, *map(kind_of, leaves))
        if self._call is None:
            self._call = call
        if call != self._call:
            return self.forward(*args, **kwargs)
        passes = self._passes(leaves, structure)
        return self.forward(*args, **kwargs) if passes is None else passes(leaves)

    def forget(self) -> None:
        """Launch passes from now on, and give up what recordings hold."""
        self._records = False
        for recordings in self._recordings.values():
            for passes in recordings:
                passes.reset()
            recordings.clear()

    def _passes(self, leaves: Sequence[Any], structure: TreeSpec) -> "_Passes | None":
        """What to replay for the gradients as they are now; None if that is not recorded."""
        averages = getattr(self.model, "require_backward_grad_sync", False)
        gradients = [p.grad for p in self._parameters]
        for passes in self._recordings[averages]:
            if _same(gradients, passes.before):
                return passes
        # Gradients that launched passes have left lie elsewhere in every step.
        recorded = [passes.after for kind in self._recordings.values() for passes in kind]
        if any(_same(gradients, known) for known in ([None] * len(gradients), *recorded)):
            return self._record(leaves, structure, averages)
        return None

    def _record(
        self, leaves: Sequence[Any], structure: TreeSpec, averages: bool
    ) -> "_Passes | None":
        """The recorded passes, or None if there is no memory for them."""
        stream = self._stream = self._stream or torch.cuda.Stream()
        # Recordings are replayed one after the other, and have memory in common.
        pool = self._pool = self._pool or torch.cuda.graph_pool_handle()
        tensors = [leaf.clone() if torch.is_tensor(leaf) else leaf for leaf in leaves]

        def function() -> Any:
            args, kwargs = tree_unflatten(tensors, structure)
            return self.forward(*args, **kwargs)

        shared = isinstance(self.model, DistributedDataParallel)
        torch.cuda.empty_cache()
        try:
            # The passes before it take nothing from the run's randomness.
            with (
                torch.random.fork_rng(devices=[self._parameters[0].device]),
                _restored(self._parameters),
            ):
                passes = _Passes(function, tensors, self._parameters)
                passes.warm_up(stream, _WARM_UP_SHARED if shared else _WARM_UP)
                passes.record(stream, pool)
        except RuntimeError as error:
            error.add_note("cuda_graphs=false trains without recordings")
            if shared:
                # Others are in the midst of the same pass, and wait.
                raise
            require_lack_of_memory(error)
            self._records = False
            return None
        self._recordings[averages].append(passes)
        return passes


@atexit.register
def forget_recordings() -> None:
    """Give up all recordings, before processes part: NCCL waits for those that hold its calls."""
    for recorded in list(_RECORDED):
        recorded.forget()


class _Passes:
    """A forward and a backward pass, with the memory of arguments, results and gradients.

    Args:
        function: The forward pass, of `arguments`.
        arguments: Tensors, which are this object's own, and others.
        parameters: What gets gradients. Those that they have when this object is made are the ones
            that the backward pass adds to.
    """

    def __init__(
        self,
        function: Callable[[], Any],
        arguments: Sequence[Any],
        parameters: Sequence[nn.Parameter],
    ):
        self._function, self._parameters = function, parameters
        self._inputs = [x for x in arguments if torch.is_tensor(x)]
        self.before = [p.grad for p in parameters]
        """What the backward pass adds to: nothing in the first micro-batch of a step."""
        self._forward, self._backward = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        # Makes autograd watch a call whose arguments need no gradient.
        self._watched = torch.zeros((), device=parameters[0].device, requires_grad=True)

    def warm_up(self, stream: torch.cuda.Stream, times: int) -> None:
        """Do as is recorded later, on the same stream."""
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(times):
                for parameter in self._parameters:
                    parameter.grad = None
                outputs = _watched(self._function())
                torch.autograd.backward(outputs, [torch.zeros_like(x) for x in outputs])
        torch.cuda.current_stream().wait_stream(stream)

    def record(self, stream: torch.cuda.Stream, pool: tuple[int, int]) -> None:
        """Record both passes; nothing is computed."""
        for parameter, gradient in zip(self._parameters, self.before, strict=True):
            parameter.grad = gradient
        with recording(self._forward, pool=pool, stream=stream):
            found = self._function()
        leaves, self._structure = tree_flatten(found)
        watched = _watched(leaves)
        self._gradients = [torch.zeros_like(x) for x in watched]
        with recording(self._backward, pool=pool, stream=stream):
            torch.autograd.backward(watched, self._gradients)
        self.after = [p.grad for p in self._parameters]
        self._is_watched = [torch.is_tensor(x) and x.requires_grad for x in leaves]
        self._outputs = [x.detach() if torch.is_tensor(x) else x for x in leaves]

    def reset(self) -> None:
        """Give up the recordings."""
        self._forward.reset()
        self._backward.reset()

    def __call__(self, leaves: Sequence[Any]) -> Any:
        """The result for these arguments; its backward pass leaves gradients."""
        given = (x for x in leaves if torch.is_tensor(x))
        for own, value in zip(self._inputs, given, strict=True):
            own.copy_(value)
        self._forward.replay()
        watched = [x for x, yes in zip(self._outputs, self._is_watched, strict=True) if yes]
        replayed = iter(_Replay.apply(self, self._watched, *watched))
        outputs = [
            next(replayed) if yes else x
            for x, yes in zip(self._outputs, self._is_watched, strict=True)
        ]
        return tree_unflatten(outputs, self._structure)

    def backward(self, gradients: Sequence[Tensor]) -> None:
        """The gradients of all parameters, for those of the watched results.

        Raises:
            RuntimeError: If the parameters' gradients are not those of the forward pass, to which
                this pass was recorded to add.
        """
        if not _same([p.grad for p in self._parameters], self.before):
            raise RuntimeError(
                "gradients were set between a recorded forward pass and its backward pass, which "
                "adds to those before; call zero_grad before the forward pass"
            )
        for own, value in zip(self._gradients, gradients, strict=True):
            own.copy_(value)
        self._backward.replay()
        for parameter, gradient in zip(self._parameters, self.after, strict=True):
            parameter.grad = gradient


class _Replay(torch.autograd.Function):
    """Results of a recorded forward pass, that lead to its backward pass."""

    @staticmethod
    def forward(ctx: Any, passes: _Passes, _: Tensor, *outputs: Tensor) -> tuple[Tensor, ...]:
        ctx.passes, ctx.count = passes, len(outputs)
        return tuple(x.detach() for x in outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx.passes.backward(gradients)
        return (None,) * (2 + ctx.count)


def _same(gradients: Sequence[Any], known: Sequence[Any]) -> bool:
    return all(a is b for a, b in zip(gradients, known, strict=True))


def _watched(found: Any) -> list[Tensor]:
    return [x for x in tree_flatten(found)[0] if torch.is_tensor(x) and x.requires_grad]


@contextmanager
def _restored(parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """Give the parameters the gradients back that they had."""
    before = [p.grad for p in parameters]
    try:
        yield
    finally:
        for parameter, gradient in zip(parameters, before, strict=True):
            parameter.grad = gradient
