"""MHLA for diffusers' class-conditional DiT."""

import math
import operator
from typing import Any

from diffusers.configuration_utils import register_to_config
from diffusers.loaders.peft import PeftAdapterMixin
from diffusers.models.attention import AttentionMixin
from diffusers.models.attention_processor import AttnProcessor2_0
from diffusers.models.transformers.dit_transformer_2d import DiTTransformer2DModel
from torch import Tensor

from mhla_gen.config import MHLAConfig
from mhla_gen.errors import UserError
from mhla_gen.models.family import Family
from mhla_gen.models.processors import MHLAProcessor, Rotary
from mhla_gen.models.transformer import MHLATransformerMixin, accepts, accepts_mhla

# Value in diffusers' DiT; the original DiT has 0.
_DIFFUSERS_SHIFT = 1.0


class MHLADiTAttnProcessor(MHLAProcessor):
    """MHLA of an `Attention` layer on a square grid."""

    def place(
        self, attn: Any, hidden_states: Tensor, tables: Any
    ) -> tuple[tuple[int, ...], Rotary]:
        """The square grid of these tokens, and no rotary embedding.

        Raises:
            ValueError: If the number of tokens is not a square.
        """
        return _square(hidden_states.shape[1]), None


def _square(seq_len: int) -> tuple[int, int]:
    # As an index, so that torch.compile specializes on each square instead of a dynamic length.
    side = math.isqrt(operator.index(seq_len))
    if side * side != seq_len:
        raise UserError(f"DiT's tokens form a square grid, found {seq_len}")
    return side, side


class OriginalDiTTransformer2DModel(DiTTransformer2DModel):
    """`DiTTransformer2DModel` with the timestep frequencies of the original DiT.

    Takes the arguments of its base class and `timestep_freq_shift`: frequency `i` of `n` is
    `10000 ** (-i / (n - timestep_freq_shift))`. diffusers computes with 1, the original with 0.
    """

    # A saved pipeline names this module; diffusers looks there for the class and for ModelMixin.
    __module__ = "mhla_gen"

    @register_to_config
    @accepts(DiTTransformer2DModel, timestep_freq_shift=0.0)
    def __init__(self, timestep_freq_shift: float = 0.0, **base: Any):
        super().__init__(**base)
        _set_frequency_shift(self, timestep_freq_shift)


class DiTFamily(Family):
    """DiT: square image grids, no rotary embedding."""

    base_class = DiTTransformer2DModel
    variants = (OriginalDiTTransformer2DModel,)
    rank = 2
    layers = ("transformer_blocks.*.attn1",)
    stock_processor = AttnProcessor2_0
    mhla_processor = MHLADiTAttnProcessor
    unconverted_processor = AttnProcessor2_0

    def settings(self, model: Any) -> dict[str, Any]:
        """The timestep frequencies that the model computes with."""
        return {"timestep_freq_shift": _frequency_shift(model)}

    def softmax_class(self, model: Any) -> type:
        """The class of diffusers, or ours where the timestep frequencies are not diffusers'."""
        if _frequency_shift(model) == _DIFFUSERS_SHIFT:
            return DiTTransformer2DModel
        return OriginalDiTTransformer2DModel


def _frequency_shift(model: Any) -> float:
    return float(model.transformer_blocks[0].norm1.emb.time_proj.downscale_freq_shift)


def _set_frequency_shift(model: Any, shift: float) -> None:
    # Every block has its own copy of the embedder; the first one's also drives the output layer.
    for block in model.transformer_blocks:
        block.norm1.emb.time_proj.downscale_freq_shift = shift


class MHLADiTTransformer2DModel(
    MHLATransformerMixin, DiTTransformer2DModel, PeftAdapterMixin, AttentionMixin
):
    """`DiTTransformer2DModel` with MHLA layers.

    Takes the arguments of its base class, `mhla` (an `MHLAConfig` or a dict of its values) and
    `timestep_freq_shift` (see `OriginalDiTTransformer2DModel`).
    """

    family = DiTFamily()
    _repeated_blocks = ["BasicTransformerBlock"]  # noqa: RUF012

    @register_to_config
    @accepts_mhla(DiTTransformer2DModel, timestep_freq_shift=_DIFFUSERS_SHIFT)
    def __init__(
        self,
        mhla: MHLAConfig | dict[str, Any] | None = None,
        timestep_freq_shift: float = _DIFFUSERS_SHIFT,
        **base: Any,
    ):
        super().__init__(**base)
        _set_frequency_shift(self, timestep_freq_shift)
        self.convert_new(mhla)


def disable_label_dropout(model: Any) -> None:
    """Make a DiT keep all labels in training mode, too."""
    for block in model.transformer_blocks:
        block.norm1.emb.class_embedder.dropout_prob = 0.0
