"""Settings of the attention that replaces softmax."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal, Self

from mhla_gen.config.checks import normalize_layout
from mhla_gen.config.fields import Count, NotNegative, Settings
from mhla_gen.config.retired import without_retired
from mhla_gen.errors import UserError


@dataclass(frozen=True, kw_only=True)
class MHLAConfig(Settings):
    """How a transformer's self-attention is replaced.

    Raises:
        ValueError: If a value is out of its range.
    """

    layout: Any = "auto"
    """Blocks along each axis of the token grid, such as (4, 4), or "auto" (see `auto_layout`)."""
    layers: Any = "all"
    """Which layers: "all", a list of indices, or a fraction such as "2/3": every third stays
    softmax."""
    feature_map: str = "relu"
    """φ: relu, squared_relu, elu+1, softplus or identity."""
    normalize: bool = True
    """Divide by the denominator."""
    conv: bool = True
    """Add a depthwise convolution of V on the token grid; it starts at zero."""
    conv_kernel_size: Count = 3
    """Odd width of that convolution along every axis, in tokens."""
    gate: bool = True
    """Multiply the output by SiLU of a projection of the layer's input; it starts at one."""
    output_norm: bool = False
    """RMS-normalise the output of every head."""
    mixing_per_head: bool = False
    """One mixing matrix per head instead of one per layer."""
    mixing_init: Literal["locality", "uniform"] = "locality"
    """Initial mixing matrix: near blocks weigh more, or all blocks weigh alike."""
    mixing_learnable: bool = True
    """Train the mixing matrix; frozen otherwise."""
    eps: NotNegative = 1e-6
    """Added to the denominator."""
    implementation: str = "auto"
    """Which code runs, see `mhla_gen.ops.mhla`."""

    def __post_init__(self):
        super().__post_init__()
        object.__setattr__(self, "layout", normalize_layout(self.layout))
        object.__setattr__(self, "layers", _normalize_layers(self.layers))
        if self.conv_kernel_size % 2 == 0:
            raise UserError(
                f"conv_kernel_size must be odd and positive, found {self.conv_kernel_size}"
            )

    def to_dict(self) -> dict[str, Any]:
        """Plain values for a JSON config; `MHLAConfig.from_dict` reads them back."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """The settings that `to_dict` of this or an earlier version wrote.

        Raises:
            ValueError: If they use what this version no longer has.
        """
        return cls(**without_retired(values))


def _normalize_layers(layers: Any) -> Any:
    message = f'layers must be "all", a list of indices or a fraction like "2/3", found {layers!r}'
    if isinstance(layers, str):
        if layers == "all":
            return layers
        part, slash, whole = layers.partition("/")
        if not (slash and part.isdecimal() and whole.isdecimal() and 0 < int(part) <= int(whole)):
            raise UserError(message)
        return layers
    if not isinstance(layers, Sequence):
        raise UserError(message)
    if any(not isinstance(i, int) or isinstance(i, bool) or i < 0 for i in layers):
        raise UserError(message)
    if not layers or len(set(layers)) != len(layers):
        raise UserError(message + " (empty or with duplicates)")
    return tuple(sorted(layers))
