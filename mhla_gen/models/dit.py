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
from mhla_gen.models.family import Family
from mhla_gen.models.projection import mhla_attention, refuse_mask_and_other_keys
from mhla_gen.models.transformer import MHLATransformerMixin, accepts, accepts_mhla

# Of diffusers' DiT; the original's is 0.
_DIFFUSERS_SHIFT = 1.0


class MHLAAttnProcessor:
    """Runs the `mhla` child of an `Attention` layer on the grid it is handed, or a square one."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
        grid: tuple[int, ...] | None = None,
    ) -> Tensor:
        """Project, attend, project; `[batch, seq_len, hidden_size]` in and out.

        Raises:
            ValueError: If a mask or other keys are given, or the tokens form no square and no
                grid is given.
        """
        refuse_mask_and_other_keys(attention_mask, encoder_hidden_states)
        if grid is None:
            grid = _square(hidden_states.shape[1])
        return mhla_attention(attn, hidden_states, grid)


def _square(seq_len: int) -> tuple[int, int]:
    # As an index: torch.compile, which would leave the length open, compiles for each square.
    side = math.isqrt(operator.index(seq_len))
    if side * side != seq_len:
        raise ValueError(f"DiT's tokens form a square grid, found {seq_len}")
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
    stock_processor = AttnProcessor2_0
    mhla_processor = MHLAAttnProcessor
    unconverted_processor = AttnProcessor2_0

    def attentions(self, model: Any) -> list[tuple[str, Any]]:
        """`attn1` of every block."""
        return [
            (f"transformer_blocks.{i}.attn1", block.attn1)
            for i, block in enumerate(model.transformer_blocks)
        ]

    def sizes(self, model: Any) -> tuple[int, int, int]:
        """Heads, channels of a head, channels of the layer's input."""
        config = model.config
        return config.num_attention_heads, config.attention_head_dim, model.inner_dim

    def native_grid(self, model: Any) -> tuple[int, ...]:
        """Patches along both sides at the model's own resolution."""
        side = model.config.sample_size // model.config.patch_size
        return side, side

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

    # A saved pipeline names this module; diffusers looks there for the class and for ModelMixin.
    __module__ = "mhla_gen"

    family = DiTFamily()
    _repeated_blocks = ["BasicTransformerBlock"]  # noqa: RUF012
    _keep_in_fp32_modules = ["mixing"]  # noqa: RUF012
    _skip_layerwise_casting_patterns = [  # noqa: RUF012
        *DiTTransformer2DModel._skip_layerwise_casting_patterns,
        "mhla",
    ]

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
