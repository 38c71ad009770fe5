"""Settings of the attention that replaces softmax."""

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Annotated, Any, ClassVar, Literal, Self

from mhla_gen.config.checks import (
    check_gate,
    check_odd,
    normalize_integers,
    normalize_layers,
    normalize_layout,
    plain,
)
from mhla_gen.config.fields import Count, NotNegative, Range, Settings, Whole
from mhla_gen.config.retired import without_retired
from mhla_gen.errors import UserError


@dataclass(frozen=True, kw_only=True)
class MHLAConfig(Settings):
    """How a transformer's self-attention is replaced.

    `mhla-gen train --print-config` says under `model.mhla` what each setting means.

    Raises:
        ValueError: If a value is out of its range.
    """

    layout: Any = "auto"
    """Blocks along each axis of the token grid, such as (4, 4), or "auto" (see `auto_layout`)."""
    causal_frames: Count | None = None
    """For video sampled chunk by chunk: attend within chunks of this many latent frames and to
    earlier chunks, never to later ones. The first entry of layout is then the number of distances
    between chunks that have their own weights, the last one for all larger distances; the other
    entries are the blocks of a chunk."""
    layers: Any = "all"
    """Which layers: "all", a list of indices, a fraction such as "2/3" (of every three layers the
    first stays softmax), or, in Python, a function `(index, name) -> bool`."""
    exact: Annotated[float, Range(0, 1)] = 0.0
    """Share of query-key pairs that softmax computes exactly, beside MHLA for all pairs. 0 is the
    paper's MHLA, 1 is softmax with MHLA's convolution and gate. `mhla_gen.ops.auto_tiles` picks the
    tiles for each token grid, with those of the next three settings that are given; exact_top
    overrides it."""
    exact_tile: Any = None
    """Tokens of a tile along each axis, such as (4, 4)."""
    exact_group: Any = None
    """Tiles along each axis whose queries share one list of tiles. With exact_tile, None is 1."""
    exact_window: Any = None
    """Window of tiles around the query's own that it reads: an odd number per axis, or zeros."""
    exact_top: Whole | None = None
    """Number of further tiles that it reads: those whose mean key best matches its mean query."""
    exact_layers: Any = "all"
    """Which of the converted layers have the exact half, in the forms that `layers` takes; the
    others are MHLA alone."""
    linear: bool = True
    """Use MHLA beside the exact half; false is the control without it."""
    exact_start: Annotated[float, Range(0, 1, open_low=True, open_high=True)] | None = None
    """Weight of the exact half before training; None is 0.98 in a converted model and 0.5 in a new
    one. It becomes a function of the layer's input, per token and head."""
    feature_map: str = "relu"
    """φ: relu, squared_relu, elu+1, softplus, softmax or focused (both over the channels of
    a head), or identity."""
    learned_features: bool = False
    """Give φ a linear map of each head before it, one for queries and one for keys, which start at
    the identity: what MHLA can learn alone, since it shares its projections with the exact half."""
    normalize: bool = True
    """Divide the output by the denominator."""
    magnitude: bool = False
    """Let the norm of φ of a query sharpen its weights, as in MALA; needs normalize."""
    conv: bool = True
    """Add a depthwise convolution of V on the token grid; it starts at zero."""
    conv_kernel_size: Count = 3
    """Odd width of that convolution along every axis, in tokens."""
    gate: Any = True
    """Output gate: multiply the output by SiLU of a projection of the layer's input; it starts at
    one. true: one factor per channel; head: one per head; a whole number: one per channel, through
    a projection of this rank; false: no gate."""
    output_norm: bool = False
    """Apply RMSNorm to MHLA's output of every head."""
    mixing_per_head: bool = False
    """One mixing matrix per head instead of one per layer."""
    mixing_init: Literal["locality", "uniform"] = "locality"
    """Initial mixing matrix. locality: near blocks weigh more; uniform: all weigh the same."""
    mixing_learnable: bool = True
    """Train the mixing matrix; otherwise it is frozen."""
    eps: NotNegative = 1e-6
    """Added to the denominator."""
    implementation: str = "auto"
    """Implementation of the operator; see `mhla_gen.ops.mhla`."""

    # `exact` as text, no setting: torch.compile makes a number that two models have different
    # values of symbolic, and no tiles can be picked by that.
    share: ClassVar[str] = ""

    def __post_init__(self):
        super().__post_init__()
        self._settle(
            share=repr(self.exact),
            layout=normalize_layout(self.key("layout"), self.layout),
            layers=normalize_layers(self.key("layers"), self.layers),
            exact_layers=normalize_layers(self.key("exact_layers"), self.exact_layers),
        )
        check_gate(self.key("gate"), self.gate)
        check_odd(self.key("conv_kernel_size"), self.conv_kernel_size)
        self._check_exact()
        self._check_linear()
        self._check_causal()

    def _check_exact(self) -> None:
        key = self.key
        for name, least in (("exact_tile", 1), ("exact_group", 1), ("exact_window", 0)):
            if getattr(self, name) is not None:
                self._settle(**{name: normalize_integers(key(name), getattr(self, name), least)})
        window = self.exact_window or (1,)
        if any(window) and any(side % 2 == 0 for side in window):
            raise UserError(f"{key('exact_window')} must be odd numbers or zeros, found {window}")
        exact = key("exact")
        given = [name for name in _TILE_SETTINGS if getattr(self, name) is not None]
        if given and not self.has_tiles:
            raise UserError(f"{key(given[0])} needs {exact} between 0 and 1, found {self.exact}")
        if self.exact == 0 and self.exact_layers != "all":
            raise UserError(f"{key('exact_layers')} needs a share of exact pairs; set {exact}")
        if self.exact == 0 and not self.linear:
            raise UserError(
                f"{key('linear')}=false with {exact}=0 leaves no attention at all; set {exact}"
            )

    def _check_linear(self) -> None:
        key = self.key
        for name in _OF_LINEAR:
            if getattr(self, name) and not self.has_linear_layers:
                raise UserError(
                    f"{key(name)} needs MHLA's half, which is left out; set it to false"
                )
        if self.magnitude and not self.normalize:
            raise UserError(f"{key('magnitude')} needs {key('normalize')}=true")

    def _check_causal(self) -> None:
        if self.causal_frames is None:
            return
        key = self.key
        if self.layers != "all":
            raise UserError(
                f"{key('causal_frames')} needs {key('layers')}=all: layers that stay softmax would "
                f"read later frames; found {self.layers!r}"
            )
        if self.has_tiles:
            raise UserError(
                f"{key('causal_frames')} takes {key('exact')}=0 or 1, found {self.exact}: exact "
                "tiles are chosen among those of all frames, later ones too"
            )
        if self.magnitude:
            raise UserError(
                f"{key('causal_frames')} needs {key('magnitude')}=false, which reads a mean of all "
                "frames"
            )

    @property
    def has_tiles(self) -> bool:
        """Whether softmax attends within tiles, rather than to everything or nothing."""
        return 0 < self.exact < 1

    @property
    def has_linear(self) -> bool:
        """Whether there is an MHLA half."""
        return self.exact == 0 or (self.exact < 1 and self.linear)

    @property
    def has_linear_layers(self) -> bool:
        """Whether some layers have an MHLA half."""
        return self.has_linear or self.exact_layers != "all"

    @property
    def unshared(self) -> str | None:
        """What keeps processes from sharing a sequence, or None."""
        if self.causal_frames is not None:
            return f"causal_frames={self.causal_frames}"
        if self.exact > 0:
            return f"exact={self.exact:g}"
        return "magnitude=true" if self.magnitude else None

    @property
    def has_halves(self) -> bool:
        """Whether there are two halves to combine."""
        return self.has_tiles and self.linear

    def softmax(self) -> Self:
        """These settings with all pairs exact: softmax with the same convolution and gate."""
        return self._whole(1.0)

    def without_exact(self) -> Self:
        """These settings without an exact half: MHLA with the same additions."""
        return self._whole(0.0)

    def with_exact(self) -> Self:
        """The settings of the layers that `exact_layers` names."""
        unused = {} if self.has_linear else dict.fromkeys(_OF_LINEAR, False)
        return replace(self, exact_layers="all", **unused)

    def _whole(self, exact: float) -> Self:
        tiles = dict.fromkeys(_TILE_SETTINGS)
        return replace(self, exact=exact, linear=True, exact_layers="all", **tiles)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for a JSON config; `MHLAConfig.from_dict` reads them back."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {k: plain(v) for k, v in values.items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """The settings that `to_dict` of this or an earlier version wrote.

        Raises:
            ValueError: If they use what this version no longer has, or are of another attention.
        """
        if "kind" in values:
            raise UserError(f"expected settings of MHLA, found those of {values['kind']} layers")
        return cls(**without_retired(values))


_OF_LINEAR = ("output_norm", "magnitude", "learned_features")
_TILE_SETTINGS = ("exact_tile", "exact_group", "exact_window", "exact_top")

FOR_PRETRAINED = MHLAConfig(exact=0.125, feature_map="softmax", learned_features=True)
"""What docs/evidence.md recommends for a pretrained model; `MHLAConfig()` is the paper's MHLA."""
