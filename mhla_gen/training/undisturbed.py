"""Keeps other packages from printing into the progress bar of a run."""

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import diffusers.utils.logging
import transformers.utils.logging

# It logs what it warns of.
_CHECKPOINTS = logging.getLogger("torch._higher_order_ops.wrap")


@contextmanager
def undisturbed() -> Iterator[None]:
    """No bars of saving and loading inside, nor warnings of what is meant or does no harm.

    Under autocast Wan's norms get tokens in bfloat16 and keep weights in float32, which is meant:
    torch then runs them in two kernels in place of one. On a CPU, gradients of a convolution have
    other strides than DistributedDataParallel expects, along an axis of one element. If a compiled
    block chooses what to recompute, torch asks for one that changes nothing in place: what is kept,
    outputs of products and of attention, nothing changes.
    """
    packages = [diffusers.utils.logging, transformers.utils.logging]
    shown = [package for package in packages if package.is_progress_bar_enabled()]
    for package in shown:
        package.disable_progress_bar()
    _CHECKPOINTS.addFilter(_of_interest)
    try:
        with warnings.catch_warnings():
            for message in ("Mismatch dtype between input and weight", "Grad strides do not match"):
                warnings.filterwarnings("ignore", message=message)
            yield
    finally:
        _CHECKPOINTS.removeFilter(_of_interest)
        for package in shown:
            package.enable_progress_bar()


def _of_interest(record: logging.LogRecord) -> bool:
    return "context_fn is passed to torch.utils.checkpoint" not in record.getMessage()
