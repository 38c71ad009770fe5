"""MHLA for diffusers' Cosmos: text and image to video."""

from typing import Any

from diffusers.models.transformers.transformer_cosmos import (
    CosmosAttnProcessor2_0,
    CosmosRotaryPosEmbed,
    CosmosTransformer3DModel,
)
from torch import Tensor

from mhla_gen.models.family import Family
from mhla_gen.models.processors import DropsGrid, MHLAProcessor, PatchGridCarrier
from mhla_gen.models.rotary import interleaved
from mhla_gen.models.transformer import MHLATransformerMixin


class GridCosmosRotaryPosEmbed(PatchGridCarrier, CosmosRotaryPosEmbed):
    """Cosmos' rotary embedding that also passes its grid to the attention layers."""


class SoftmaxCosmosAttnProcessor(DropsGrid, CosmosAttnProcessor2_0):
    """Stock attention for the softmax layers of a hybrid."""


class MHLACosmosAttnProcessor(MHLAProcessor):
    """MHLA of an `Attention` layer whose rotary pairs are halves of a head.

    Dot products do not depend on the order of channels, so the halves are interleaved.
    """

    def angles(self, attn: Any, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        """From tables `[seq_len, head_dim]`, whose two halves repeat the angles."""
        half = cos.shape[-1] // 2
        return cos[:, :half], sin[:, :half]

    def project(self, attn: Any, hidden_states: Tensor, *others: Any) -> tuple[Tensor, ...]:
        """As the stock projections, with queries and keys interleaved."""
        query, key, *rest = super().project(attn, hidden_states, *others)
        return interleaved(query), interleaved(key), *rest


class CosmosFamily(Family):
    """Cosmos: grids of frames, height and width; `attn2` reads the text."""

    base_class = CosmosTransformer3DModel
    rank = 3
    layers = ("transformer_blocks.*.attn1",)
    # 121 frames at 704×1280 after the VAE (8×8×8) and patches (1×2×2), its pipeline's default.
    native = (16, 44, 80)
    stock_processor = CosmosAttnProcessor2_0
    mhla_processor = MHLACosmosAttnProcessor
    unconverted_processor = SoftmaxCosmosAttnProcessor
    replaced_modules = {"rope": (CosmosRotaryPosEmbed, GridCosmosRotaryPosEmbed)}  # noqa: RUF012


class MHLACosmosTransformer3DModel(MHLATransformerMixin, CosmosTransformer3DModel):
    """`CosmosTransformer3DModel` with MHLA layers.

    Takes the arguments of its base class and `mhla`, an `MHLAConfig` or a dict of its values.
    """

    family = CosmosFamily()
    _repeated_blocks = ["CosmosTransformerBlock"]  # noqa: RUF012
