"""What is said about models whose sequences are too short for MHLA to be faster."""

import math
import warnings
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from typing import Any

from mhla_gen.config import AttentionConfig, MHLAConfig
from mhla_gen.models.transformer import MHLATransformerMixin

FEWEST_TOKENS = 800
"""With fewer tokens, softmax is faster than the fused kernels; see docs/speed.md."""


class ShortSequenceWarning(UserWarning):
    """Softmax attention is faster at the model's own size."""


def too_short(config: AttentionConfig, grid: Sequence[int]) -> str | None:
    """A warning if MHLA is no faster than softmax on a token grid; None if it may be.

    Args:
        config: Settings of the converted layers.
        grid: Tokens along each axis.
    """
    tokens = math.prod(grid)
    if not isinstance(config, MHLAConfig) or config.exact == 1 or tokens >= FEWEST_TOKENS:
        return None
    return (
        f"{tokens} tokens ({'×'.join(map(str, grid))}) gain no speed from MHLA: below about "
        f"{FEWEST_TOKENS} softmax is faster (exact=1 keeps it); `mhla-gen bench ops` finds the "
        "crossover of your device"
    )


def too_short_model(model: Any) -> str | None:
    """The same for a transformer at its own size; None if it has no MHLA layers."""
    if not isinstance(model, MHLATransformerMixin):
        return None
    return too_short(model.mhla_config, model.family.native_grid(model))


@contextmanager
def unmentioned() -> Generator[None]:
    """Silence `inject` about short sequences, where a command mentions them itself or need not."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ShortSequenceWarning)
        yield
