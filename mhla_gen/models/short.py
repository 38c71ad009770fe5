"""A warning for models whose sequences are too short for MHLA to be faster."""

import math
from collections.abc import Sequence

from mhla_gen.config import AttentionConfig, MHLAConfig

FEWEST_TOKENS = 800
"""With fewer tokens, softmax is faster than the fused kernels; see docs/training.md."""


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
        f"{FEWEST_TOKENS} softmax is faster, which exact=1 keeps; `mhla-gen bench ops` finds the "
        "crossover of your device"
    )
