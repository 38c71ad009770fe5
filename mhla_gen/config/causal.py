"""Settings of causal MHLA in language models."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Annotated, Any, Self

from mhla_gen.config.checks import normalize_layers, plain
from mhla_gen.config.fields import Count, NotNegative, Range, Settings, Whole
from mhla_gen.errors import UserError


@dataclass(frozen=True, kw_only=True)
class CausalMHLAConfig(Settings):
    """How the attention of a language model is replaced.

    Raises:
        ValueError: If a value is out of its range.
    """

    block_size: Count = 64
    """Tokens per block."""
    num_blocks: Count = 32
    """Number of distances between blocks that have their own weight; at most the number of blocks
    in training sequences can be learned. Blocks farther away are read with the last weight."""
    memory_blocks: Count | None = None
    """Maximum number of summaries kept in generation; older blocks are merged. None keeps
    num_blocks, which is exact."""
    window: Whole = 0
    """Number of tokens, including the current one, that softmax reads exactly; MHLA reads all
    tokens before this window. 0 uses MHLA for all tokens; a window as long as the sequence is
    softmax. With a window, a converted model keeps what it has learned."""
    linear: bool = True
    """Use MHLA before the window; false is the control without it."""
    exact_start: Annotated[float, Range(0, 1, open_low=True, open_high=True)] | None = None
    """Weight of the window before training; it is learned per token and head. None is 0.98 in a
    converted model and 0.5 in a new one."""
    layers: Any = "all"
    """Which layers: "all", a list of indices, a fraction such as "2/3" (of every three layers the
    first stays softmax), or, in Python, a function `(index, name) -> bool`."""
    feature_map: str = "relu"
    """φ: relu, squared_relu, elu+1, softplus or identity."""
    mixing_per_head: bool = False
    """Separate weights for each key head instead of one set per layer."""
    mixing_learnable: bool = True
    """Train the weights; otherwise they are frozen."""
    normalize: bool = True
    """Divide by the denominator."""
    eps: NotNegative = 1e-6
    """Added to the denominator."""

    def __post_init__(self):
        super().__post_init__()
        self._settle(layers=normalize_layers("layers", self.layers))
        if not self.linear and not self.window:
            raise UserError("linear=false leaves no attention at all with window=0; set window")

    @property
    def has_halves(self) -> bool:
        """Whether there are two halves to combine."""
        return self.window > 0 and self.linear

    def to_dict(self) -> dict[str, Any]:
        """Plain values for a JSON config; `from_dict` reads them back."""
        values = asdict(self)
        return {k: plain(v) for k, v in values.items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """The settings that `to_dict` wrote."""
        return cls(**values)


FOR_PRETRAINED_LANGUAGE = CausalMHLAConfig(window=256)
"""What docs/language.md recommends for a pretrained model; `CausalMHLAConfig()` is the paper's."""
