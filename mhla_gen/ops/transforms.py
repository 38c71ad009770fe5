"""Transforms of `torch.func` and forward-mode differentiation: what they do not take."""

from collections.abc import Callable
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint  # pyright: ignore[reportUnknownVariableType]

_forward_mode: Any = torch.autograd.forward_ad


def transformed() -> bool:
    """Whether a transform of `torch.func` or forward-mode differentiation is active.

    Custom operators lose tangents without an error, and vmap and grad do not take ours. torch tells
    this only under private names; if a release has changed them, the answer is no.
    """
    if torch.compiler.is_compiling():
        return False
    try:
        level = torch._C._functorch.maybe_current_level  # type: ignore[attr-defined]
        return level() is not None or _forward_mode._current_level >= 0
    except (AttributeError, TypeError):
        return False


def recomputed(function: Callable[..., Any], *inputs: Any) -> Any:
    """`function(*inputs)`, which backward computes again instead of keeping what it needs.

    The function draws no random numbers. Transforms of `torch.func` do not take this: inside them,
    and without gradients, the function is just called.
    """
    if not torch.is_grad_enabled() or transformed():
        return function(*inputs)
    return checkpoint(function, *inputs, use_reentrant=False, preserve_rng_state=False)
