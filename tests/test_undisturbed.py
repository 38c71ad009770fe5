"""Warnings that runs leave out."""

import logging
from contextlib import nullcontext
from functools import partial

import pytest
import torch
from torch._logging._internal import warning_once
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts
from torch.utils.checkpoint import checkpoint as recompute

from mhla_gen.training.undisturbed import undisturbed


class Seen(logging.Handler):
    """What a logger passes on."""

    def __init__(self):
        super().__init__()
        self.messages = []

    def emit(self, record):
        self.messages.append(record.getMessage())


@pytest.mark.parametrize("inside", [False, True])
def test_compiled_recomputing_does_not_warn_of_operations_in_place(inside):
    logger = logging.getLogger("torch._higher_order_ops.wrap")
    seen = Seen()
    logger.addHandler(seen)
    warning_once.cache_clear()
    chosen = partial(
        create_selective_checkpoint_contexts, lambda *_, **__: CheckpointPolicy.PREFER_RECOMPUTE
    )

    @partial(torch.compile, backend="aot_eager")
    def compiled(x):
        return recompute(lambda x: x.sin().sin(), x, use_reentrant=False, context_fn=chosen)

    x = torch.ones(3, requires_grad=True)
    try:
        with undisturbed() if inside else nullcontext():
            compiled(x).sum().backward()
            logger.warning("something else")
    finally:
        logger.removeHandler(seen)
    assert seen.messages[-1] == "something else"
    assert ["in-place ops" in message for message in seen.messages[:-1]] == [True] * (not inside)
    torch.testing.assert_close(x.grad, torch.tensor(1.0).sin().cos() * torch.ones(3).cos())
