"""The attention layers of timm's ViTs, and the family of these models."""

import math
from typing import Any

import torch
from timm.layers import Attention
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from mhla_gen.errors import UserError
from mhla_gen.models.additions import AddedAttention
from mhla_gen.models.family import Family
from mhla_gen.models.projections import products
from mhla_gen.ops.softmax import softmax_attention


class VisionFamily(Family):
    """timm's ViTs: grids of patches, which prefix tokens may precede.

    Args:
        num_prefix: Number of the model's prefix tokens.
    """

    base_class = VisionTransformer
    rank = 2
    layers = ("blocks.*.attn",)

    def __init__(self, num_prefix: int):
        # What `Family` calls text are any keys off the grid, here the prefix tokens.
        self.text_length = num_prefix  # type: ignore[misc]

    def reads_text(self, attention: Any) -> bool:
        """Whether there are prefix tokens."""
        return self.text_length > 0

    def sizes(self, model: Any) -> tuple[int, int, int]:
        """Number of heads, channels per head, channels of the layer's input."""
        attention = model.blocks[0].attn
        return attention.num_heads, attention.head_dim, attention.qkv.in_features

    def native_grid(self, model: Any) -> tuple[int, ...]:
        """Number of patches along both sides at the model's current image size."""
        return tuple(model.patch_embed.grid_size)

    def output_projection(self, attention: Any) -> nn.Module:
        """The layer's last linear map."""
        return attention.proj


class MHLAVisionAttention(Attention):
    """timm's attention with MHLA over the patch grid; its weights and dropout are kept."""

    mhla: AddedAttention

    def forward(
        self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        """Project, attend, project; `[batch, prefix + patches, hidden_size]` in and out.

        Args:
            x: Prefix tokens, then patches in raster order.
            attn_mask: The grid, as the shape `(height, width, 0)` of an empty tensor.
            is_causal: Must be false.

        Raises:
            ValueError: If the grid is missing, or a real mask is given.
        """
        grid = _grid_of(attn_mask, is_causal)
        qkv, *of_input = products((self.qkv, *self.mhla.input_layers()), x)
        query, key, value = qkv.unflatten(2, (3, self.num_heads, -1)).unbind(2)
        # Under autocast a norm may return float32.
        query, key = self.q_norm(query).type_as(value), self.k_norm(key).type_as(value)
        first = x.shape[1] - math.prod(grid)
        if first == 0:
            out = self.mhla(query, key, value, x, grid, of_input=of_input)
        else:
            patches = [tokens[:, first:] for tokens in (query, key, value, x)]
            of_input = [product[:, first:] for product in of_input]
            prefix = key[:, :first], value[:, :first]
            out = self.mhla(*patches, grid, extra=prefix, of_input=of_input)
            of_prefix = softmax_attention(query[:, :first], key, value)
            out = torch.cat((of_prefix.flatten(2), out), dim=1)
        out = self.norm(out)
        if self.gate is not None:
            out = out * self.gate(x).sigmoid()
        return self.proj_drop(self.proj(out))


class SoftmaxVisionAttention(Attention):
    """timm's attention, for layers that stay softmax but also receive the grid."""

    def forward(
        self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        """As timm's, over all tokens."""
        _grid_of(attn_mask, is_causal)
        return super().forward(x)


def _grid_of(carrier: Tensor | None, is_causal: bool) -> tuple[int, int]:
    if carrier is None or carrier.ndim != 3 or carrier.shape[-1] != 0 or is_causal:
        raise UserError(
            "MHLA layers take the token grid in place of an attention mask; call the model, its "
            "forward_features or its forward_intermediates, without mask and is_causal"
        )
    height, width, _ = carrier.shape
    return height, width
