"""Settings of the attention that replaces softmax."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal

from mhla_gen.config.checks import check_choice, normalize_layout


@dataclass(frozen=True, kw_only=True)
class MHLAConfig:
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
    conv_kernel_size: int = 3
    """Odd width of that convolution along every axis, in tokens."""
    gate: bool = True
    """Multiply the output by SiLU of a projection of the layer's input; it starts at one."""
    output_norm: bool = False
    """RMS-normalise the output of every head."""
    mixing_per_head: bool = False
    """One mixing matrix per head instead of one per layer."""
    mixing_init: Literal["locality", "uniform", "multiscale"] = "locality"
    """Initial mixing matrix: near blocks weigh more, all blocks weigh alike, or, with
    mixing_per_head, heads from all blocks alike to the own block only."""
    mixing_learnable: bool = True
    """Train the mixing matrix; frozen otherwise."""
    content_mixing: bool = False
    """Weigh the mixing matrix of every sample and head by how well pooled queries and keys of
    blocks agree; it starts as the plain matrix."""
    eps: float = 1e-6
    """Added to the denominator."""
    implementation: str = "auto"
    """Which code runs, see `mhla_gen.ops.mhla`."""

    def __post_init__(self):
        object.__setattr__(self, "layout", normalize_layout(self.layout))
        object.__setattr__(self, "layers", _normalize_layers(self.layers))
        if self.conv_kernel_size < 1 or self.conv_kernel_size % 2 == 0:
            raise ValueError(
                f"conv_kernel_size must be odd and positive, found {self.conv_kernel_size}"
            )
        if self.eps < 0:
            raise ValueError(f"eps must not be negative, found {self.eps}")
        check_choice("mixing_init", self.mixing_init, ("locality", "uniform", "multiscale"))
        if self.mixing_init == "multiscale" and not self.mixing_per_head:
            raise ValueError(
                "mixing_init=multiscale gives every head a matrix of its own; "
                "set mixing_per_head=true with it"
            )

    def to_dict(self) -> dict[str, Any]:
        """Plain values for a JSON config; `MHLAConfig(**d)` reads them back."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}


def _normalize_layers(layers: Any) -> Any:
    message = f'layers must be "all", a list of indices or a fraction like "2/3", found {layers!r}'
    if isinstance(layers, str):
        if layers == "all":
            return layers
        part, slash, whole = layers.partition("/")
        if not (slash and part.isdecimal() and whole.isdecimal() and 0 < int(part) <= int(whole)):
            raise ValueError(message)
        return layers
    if not isinstance(layers, Sequence):
        raise ValueError(message)
    if any(not isinstance(i, int) or isinstance(i, bool) or i < 0 for i in layers):
        raise ValueError(message)
    if not layers or len(set(layers)) != len(layers):
        raise ValueError(message + " (empty or with duplicates)")
    return tuple(sorted(layers))
