"""Settings of causal MHLA in language models."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Self

from mhla_gen.config.checks import normalize_layers
from mhla_gen.config.fields import Count, NotNegative, Settings


@dataclass(frozen=True, kw_only=True)
class CausalMHLAConfig(Settings):
    """How the attention of a language model is replaced.

    Raises:
        ValueError: If a value is out of its range.
    """

    block_size: Count = 64
    """Tokens per block."""
    num_blocks: Count = 32
    """Distances between blocks with a weight of their own, which is as far as training reaches: the
    number of blocks of its sequences. Further blocks are read with the last weight."""
    memory_blocks: Count | None = None
    """Summaries that generation keeps at most; older blocks merge. None keeps num_blocks, which is
    exact."""
    layers: Any = "all"
    """Which layers: "all", a list of indices, a fraction such as "2/3" (of every three layers the
    first stays softmax), or, in Python, a function `(index, name) -> bool`."""
    feature_map: str = "relu"
    """φ: relu, squared_relu, elu+1, softplus or identity."""
    mixing_per_head: bool = False
    """Weights for every key head instead of for a layer."""
    mixing_learnable: bool = True
    """Train the weights; frozen otherwise."""
    normalize: bool = True
    """Divide by the denominator."""
    eps: NotNegative = 1e-6
    """Added to the denominator."""

    def __post_init__(self):
        super().__post_init__()
        object.__setattr__(self, "layers", normalize_layers(self.layers))

    def to_dict(self) -> dict[str, Any]:
        """Plain values for a JSON config; `from_dict` reads them back."""
        values = asdict(self)
        return {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """The settings that `to_dict` wrote."""
        return cls(**values)
