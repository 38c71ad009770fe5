"""Work on what this process holds of tensors that processes share (FSDP2), as plain tensors.

On shared tensors themselves every operation takes the host long, and a model has hundreds of them:
the GPU would wait for it in every step.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.utils import get_total_norm


def held(tensors: Iterable[Tensor]) -> list[Any]:
    """What this process holds of each tensor, in the same memory."""
    return [t.to_local() if isinstance(t, DTensor) else t for t in tensors]


def as_shared(shard: Tensor, like: DTensor) -> DTensor:
    """The shared tensor of which this process holds a shard, in the same memory.

    Args:
        shard: Of this process.
        like: Of the same shape, and shared in the same way.
    """
    return DTensor.from_local(
        shard,
        like.device_mesh,
        like.placements,
        run_check=False,
        shape=like.shape,
        stride=like.stride(),
    )


@torch.no_grad()
def gradient_norm(parameters: Iterable[nn.Parameter]) -> Tensor:
    """The norm of the gradients of a whole model, a scalar; every process must call this."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    norm = get_total_norm(held(gradients))
    if any(isinstance(gradient, DTensor) for gradient in gradients):
        squares = norm.square()
        dist.all_reduce(squares)
        norm = squares.sqrt()
    return norm


def clipping_factor(norm: Tensor, limit: float | None) -> Tensor:
    """What scales gradients of a norm to at most a limit, a scalar; None is no limit."""
    return torch.ones_like(norm) if limit is None else (limit / (norm + 1e-6)).clamp(max=1)


@torch.no_grad()
def scale_gradients(parameters: Iterable[nn.Parameter], factor: Tensor) -> None:
    """Multiply all gradients by a scalar."""
    gradients = held(p.grad for p in parameters if p.grad is not None)
    if gradients:
        torch._foreach_mul_(gradients, factor)


def step_on_shards(optimizer: torch.optim.Optimizer) -> None:
    """Have an optimizer compute on what this process holds of each parameter.

    Between steps its parameters and its state are those that processes share, as without.

    Args:
        optimizer: One that treats every element by itself, of parameters that processes share.
    """
    shards = _Shards()
    optimizer.register_step_pre_hook(shards.take)
    optimizer.register_step_post_hook(shards.give_back)


class _Shards:
    """Parameters and state of an optimizer, as plain tensors and as shared ones in turn."""

    def __init__(self) -> None:
        self._shards: dict[int, nn.Parameter] = {}
        # Of plain tensors, and the one of shared tensors that it was made of.
        self._state: dict[Any, dict[str, Any]] = defaultdict(dict)
        self._shared_state: dict[Any, dict[str, Any]] | None = None
        self._shared: list[list[nn.Parameter]] = []

    @torch.no_grad()
    def take(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        """Give the optimizer plain tensors."""
        self._shared = [group["params"] for group in optimizer.param_groups]
        for shared in self._each():
            shard = self._shard(shared)
            # Loading a model can give it other memory.
            shard.data = shared.to_local()  # type: ignore[attr-defined]
            shard.grad = None if shared.grad is None else held([shared.grad])[0]
        if optimizer.state is not self._shared_state:
            # At first, and when a checkpoint has been read.
            self._shared_state = optimizer.state
            self._state.clear()
            for shared, values in optimizer.state.items():
                self._state[self._shard(shared)] = dict(
                    zip(values, held(values.values()), strict=True)
                )
        optimizer.state = self._state  # type: ignore[assignment]
        for group in optimizer.param_groups:
            group["params"] = [self._shard(shared) for shared in group["params"]]

    @torch.no_grad()
    def give_back(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        """Give it back what processes share."""
        for group, shared in zip(optimizer.param_groups, self._shared, strict=True):
            group["params"] = shared
        state: Any = self._shared_state
        optimizer.state = state
        for shared in self._each():
            shard = self._shard(shared)
            shard.grad = None
            if shard in self._state and shared not in state:
                state[shared] = {
                    name: as_shared(value, shared) if _is_like(value, shard) else value  # type: ignore[arg-type]
                    for name, value in self._state[shard].items()
                }

    def _each(self) -> Iterator[nn.Parameter]:
        return (shared for group in self._shared for shared in group)

    def _shard(self, shared: Tensor) -> nn.Parameter:
        if id(shared) not in self._shards:
            (shard,) = held([shared])
            self._shards[id(shared)] = nn.Parameter(shard.detach(), shared.requires_grad)
        return self._shards[id(shared)]


def _is_like(value: Any, shard: Tensor) -> bool:
    """Whether it is a value for each element, and no number of steps."""
    return isinstance(value, Tensor) and value.shape == shard.shape and shard.ndim > 0
