"""MHLA for diffusers' Flux (1) and Flux 2: text-to-image, any aspect ratio."""

from typing import Any

import torch
from diffusers.models.transformers.transformer_flux import FluxAttnProcessor, FluxTransformer2DModel
from diffusers.models.transformers.transformer_flux2 import (
    Flux2AttnProcessor,
    Flux2ParallelSelfAttention,
    Flux2ParallelSelfAttnProcessor,
    Flux2Transformer2DModel,
)
from torch import Tensor, nn

from mhla_gen.errors import UserError
from mhla_gen.models.joint import (
    JointFamily,
    JointMHLAProcessor,
    Tokens,
    check_grid,
    find_grid,
    normalized,
)
from mhla_gen.models.processors import DropsGrid
from mhla_gen.models.transformer import MHLATransformerMixin


class SoftmaxFluxAttnProcessor(DropsGrid, FluxAttnProcessor):
    """Stock attention for the softmax layers of a hybrid."""


class SoftmaxFlux2AttnProcessor(DropsGrid, Flux2AttnProcessor):
    """Stock attention for the softmax layers of a hybrid."""


class SoftmaxFlux2ParallelAttnProcessor(DropsGrid, Flux2ParallelSelfAttnProcessor):
    """Stock attention for the softmax layers of a hybrid."""


class MHLAFlux2ParallelAttnProcessor(JointMHLAProcessor):
    """MHLA of a layer that shares its projections with the block's feed-forward part."""

    def __call__(  # type: ignore[override]
        self,
        attn: Any,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        image_rotary_emb: Any = None,
        grid: tuple[int, ...] | None = None,
    ) -> Tensor:
        """As `JointMHLAProcessor`, for text and image in one tensor.

        Raises:
            ValueError: If the grid is missing or a mask is given.
        """
        grid = find_grid(grid, image_rotary_emb)
        num_image = torch.Size(grid).numel()
        projected = attn.to_qkv_mlp_proj(hidden_states)
        attention, feed_forward = projected.tensor_split([3 * attn.inner_dim], dim=-1)
        norms = (attn.norm_q, attn.norm_k)
        tokens = normalized(attention.chunk(3, dim=-1), attn.heads, norms)
        image, text = zip(*(self.split(x, num_image) for x in tokens), strict=True)
        image_states, _ = self.split(hidden_states, num_image)
        check_grid(grid, image_states.shape[1])
        out = self.attend(
            attn,
            Tokens(*image),
            Tokens(*text),
            image_states,
            grid=grid,
            rotary=self.rotary(attn, image_rotary_emb, num_image),
            mask=self.text_mask(attention_mask, num_image),
        )
        return attn.to_out(torch.cat((self.join(*out), attn.mlp_act_fn(feed_forward)), dim=-1))


class FluxFamily(JointFamily):
    """Flux: image grids packed in a sequence; rotary embedding of text and image positions."""

    base_class = FluxTransformer2DModel
    rank = 2
    layers = ("transformer_blocks.*.attn", "single_transformer_blocks.*.attn")
    # 1024×1024 after the VAE (8×8) and packing (2×2).
    native = (64, 64)
    text_length = 512
    stock_processor = FluxAttnProcessor
    mhla_processor = JointMHLAProcessor
    unconverted_processor = SoftmaxFluxAttnProcessor

    def arguments(self, model: Any, given: dict[str, Any]) -> dict[str, Any]:
        """The grid is passed with the layers' own arguments; if missing, it is read from `img_ids`.

        Raises:
            ValueError: If there is more than one image, or the whole model is compiled as one
                graph, in which the values of `img_ids` cannot be read.
        """
        own = given.get("joint_attention_kwargs") or {}
        if "grid" in own:
            return given
        grid = _grid_of_positions(given["img_ids"])
        return given | {"joint_attention_kwargs": {**own, "grid": grid}}


def _grid_of_positions(positions: Tensor) -> tuple[int, int]:
    if torch.compiler.is_compiling():
        raise UserError(
            "where a whole model is compiled as one graph, MHLA layers need the token grid as "
            "joint_attention_kwargs={'grid': (height, width)}; compile_repeated_blocks does not"
        )
    # The last token of one image in raster order tells the grid. In any other sequence its image
    # number differs, or the number of tokens.
    number, row, column = positions.reshape(-1, positions.shape[-1])[-1, :3].int().tolist()
    grid = (row + 1, column + 1)
    if number != 0 or grid[0] * grid[1] != positions.shape[-2]:
        raise UserError(
            "MHLA layers take one image per sequence, in raster order; img_ids have "
            f"{positions.shape[-2]} tokens, the last one of image {number} at {row}, {column}"
        )
    return grid


class Flux2Family(FluxFamily):
    """Flux 2: as Flux; single-stream blocks compute attention and feed-forward together."""

    base_class = Flux2Transformer2DModel
    stock_processor = Flux2AttnProcessor
    unconverted_processor = SoftmaxFlux2AttnProcessor

    def processors(self, attention: Any) -> tuple[type, type, type]:
        """Those of the family, or those for layers that share their projections."""
        if isinstance(attention, Flux2ParallelSelfAttention):
            return (
                Flux2ParallelSelfAttnProcessor,
                MHLAFlux2ParallelAttnProcessor,
                SoftmaxFlux2ParallelAttnProcessor,
            )
        return super().processors(attention)

    def output_projection(self, attention: Any) -> nn.Module:
        """`to_out`, which is a single module in single-stream blocks."""
        return attention.to_out if isinstance(attention.to_out, nn.Linear) else attention.to_out[0]

    def arguments(self, model: Any, given: dict[str, Any]) -> dict[str, Any]:
        """As Flux.

        Raises:
            ValueError: As Flux, and if keys of reference images are to be cached or read.
        """
        if given.get("kv_cache_mode") is not None:
            raise UserError("MHLA layers keep no keys of reference images: kv_cache_mode=None")
        return super().arguments(model, given)


class MHLAFluxTransformer2DModel(MHLATransformerMixin, FluxTransformer2DModel):
    """`FluxTransformer2DModel` with MHLA layers.

    Takes the arguments of its base class and `mhla`, an `MHLAConfig` or a dict of its values.
    """

    family = FluxFamily()


class MHLAFlux2Transformer2DModel(MHLATransformerMixin, Flux2Transformer2DModel):
    """`Flux2Transformer2DModel` with MHLA layers.

    Takes the arguments of its base class and `mhla`, an `MHLAConfig` or a dict of its values.
    """

    family = Flux2Family()
