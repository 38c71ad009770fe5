"""Settings of Linformer attention, and of any attention that a saved model has."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar, Literal, Self

from mhla_gen.config.checks import (
    check_gate,
    check_odd,
    elements,
    is_whole,
    normalize_integers,
    normalize_layers,
    plain,
)
from mhla_gen.config.fields import Count, Settings
from mhla_gen.config.mhla import MHLAConfig
from mhla_gen.errors import UserError

KIND = "linformer"


@dataclass(frozen=True, kw_only=True)
class LinformerConfig(Settings):
    r"""How a transformer's self-attention is replaced by Linformer's.

    Each head is $\mathrm{softmax}(Q (E K)^\top / \sqrt{d}) \, F V$: keys and values are projected
    along the token axis to a few mixed tokens.

    Raises:
        ValueError: If a value is out of its range.

    Source:
        Wang et al. 2020, arXiv:2006.04768.
    """

    projected_len: Any = 64
    """k, the number of projected keys: a whole number for tokens in raster order, as in the paper,
    for sequences no longer than those of `grid`; or one number per axis of the token grid, such as
    (8, 8), for an E and an F along each axis, which take every size."""
    projected_len_by_layer: Any = None
    """One projected_len for each converted layer, in order, instead of one for all."""
    layers: Any = "all"
    """Which layers, as in `MHLAConfig`."""
    projection: Literal["linear", "mean_pool", "max_pool", "conv"] = "linear"
    """E and F: learned matrices, or the mean, the maximum or a learned sum per channel over windows
    of tokens."""
    sharing: Literal["none", "headwise", "key_value", "layerwise"] = "headwise"
    """Which projections are shared: none (each head has its own), those of all heads, also E and F,
    or all of the model."""
    grid: Any = "auto"
    """Token grid that the projections are sized for; "auto" is the model's own."""
    conv: bool = True
    """Add a depthwise convolution of V on the token grid; it starts at zero."""
    conv_kernel_size: Count = 3
    """Odd width of that convolution along every axis, in tokens."""
    gate: Any = True
    """Output gate: multiply the output by SiLU of a projection of the layer's input; it starts at
    one. true: one factor per channel; head: one per head; a whole number: one per channel, through
    a projection of this rank; false: no gate."""

    # What MHLA's settings say of its halves: no pair is exact, and nothing is MHLA.
    exact: ClassVar[float] = 0.0
    has_tiles: ClassVar[bool] = False
    has_linear: ClassVar[bool] = False
    unshared: ClassVar[str] = "Linformer's attention"

    def __post_init__(self):
        super().__post_init__()
        self._settle(
            projected_len=_normalize_length(self.key("projected_len"), self.projected_len),
            layers=normalize_layers(self.key("layers"), self.layers),
        )
        if self.grid != "auto":
            self._settle(grid=normalize_integers(self.key("grid"), self.grid, 1))
        check_gate(self.key("gate"), self.gate)
        check_odd(self.key("conv_kernel_size"), self.conv_kernel_size)
        if self.projection.endswith("pool") and self.sharing != "headwise":
            raise UserError(
                f"{self.key('projection')}={self.projection} has no weights to share; leave "
                f"{self.key('sharing')} out"
            )
        if self.projected_len_by_layer is not None:
            self._check_layers()

    def _check_layers(self) -> None:
        name = self.key("projected_len_by_layer")
        lengths = elements(self.projected_len_by_layer)
        if not lengths:
            raise UserError(
                f"{name} must be a list, one entry per converted layer, found "
                f"{self.projected_len_by_layer!r}"
            )
        if self.sharing == "layerwise":
            raise UserError(
                f"{self.key('sharing')}=layerwise has one projected_len; leave {name} out"
            )
        lengths = tuple(_normalize_length(name, length) for length in lengths)
        self._settle(projected_len_by_layer=lengths)

    @property
    def by_axis(self) -> bool:
        """Whether each axis of the grid has projections of its own."""
        return isinstance(self.projected_len, tuple)

    @property
    def lengths(self) -> tuple[int, ...]:
        """Tokens along each axis that is projected: the grid's, or their product."""
        return self.grid if self.by_axis else (math.prod(self.grid),)

    @property
    def projected(self) -> tuple[int, ...]:
        """What is left of `lengths`."""
        return self.projected_len if self.by_axis else (self.projected_len,)

    def of_layer(self, number: int) -> Self:
        """The settings of one converted layer, counted from 0."""
        if self.projected_len_by_layer is None:
            return self
        length = self.projected_len_by_layer[number]
        return replace(self, projected_len=length, projected_len_by_layer=None)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for a JSON config; `attention_from_dict` reads them back."""
        values = {field.name: plain(getattr(self, field.name)) for field in fields(self)}
        return {"kind": KIND, **values}


AttentionConfig = MHLAConfig | LinformerConfig


def attention_from_dict(values: Mapping[str, Any]) -> AttentionConfig:
    """The settings that `to_dict` of either kind wrote.

    Raises:
        ValueError: If they use what this version does not have.
    """
    if values.get("kind") == KIND:
        return LinformerConfig(**{k: v for k, v in values.items() if k != "kind"})
    return MHLAConfig.from_dict(values)


def _normalize_length(name: str, length: Any) -> Any:
    if is_whole(length, 1):
        return length
    if elements(length) is None:
        raise UserError(
            f"{name} must be a whole number of at least 1, or 1 to 3 of them, found {length!r}"
        )
    return normalize_integers(name, length, 1)
