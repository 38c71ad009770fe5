"""MHLA for diffusers' Kandinsky 5, images and videos."""

from typing import Any

from diffusers.models.transformers.transformer_kandinsky import (
    Kandinsky5AttnProcessor,
    Kandinsky5Transformer3DModel,
)
from torch import Tensor, nn

from mhla_gen.errors import UserError
from mhla_gen.models.family import Family, patch_grid
from mhla_gen.models.processors import MHLAProcessor, Rotary
from mhla_gen.models.projections import products
from mhla_gen.models.transformer import MHLATransformerMixin


class SoftmaxKandinsky5AttnProcessor(Kandinsky5AttnProcessor):
    """Stock attention for the softmax layers of a hybrid: drops the grid."""

    def __call__(  # type: ignore[override]
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        rotary_emb: Tensor | None = None,
        sparse_params: dict[str, Any] | None = None,
    ) -> Tensor:
        """As `Kandinsky5AttnProcessor`."""
        return super().__call__(attn, hidden_states, encoder_hidden_states, rotary_emb, None)


class MHLAKandinsky5AttnProcessor(MHLAProcessor):
    """MHLA of a `Kandinsky5Attention` layer."""

    def __call__(  # type: ignore[override]
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        rotary_emb: Tensor | None = None,
        sparse_params: dict[str, Any] | None = None,
    ) -> Tensor:
        """As `MHLAProcessor`, with the grid in `sparse_params`."""
        tables = (rotary_emb, (sparse_params or {}).get("grid"))
        return super().__call__(attn, hidden_states, encoder_hidden_states, rotary_emb=tables)

    def place(
        self, attn: Any, hidden_states: Tensor, tables: Any
    ) -> tuple[tuple[int, ...], Rotary]:
        """From matrices [[cos, -sin], [sin, cos]] for interleaved pairs, and the grid.

        Raises:
            ValueError: If either is missing.
        """
        rotations, grid = tables
        if rotations is None or grid is None:
            raise UserError("MHLA layers need rotary_emb, and the grid in sparse_params")
        # They are the same for the whole batch and all heads.
        matrices = rotations[0, :, 0]
        return grid, (matrices[..., 0, 0], matrices[..., 1, 0])

    def project(self, attn: Any, hidden_states: Tensor, *others: Any) -> tuple[Tensor, ...]:
        """Queries and keys are normalised in float32, per head."""
        layers = (attn.to_query, attn.to_key, attn.to_value, *others)
        joined = products(layers, hidden_states)
        query, key, value = (x.unflatten(-1, (attn.num_heads, -1)) for x in joined[:3])
        query = attn.query_norm(query.float()).type_as(value)
        return query, attn.key_norm(key.float()).type_as(value), value, *joined[3:]

    def project_back(self, attn: Any, out: Tensor) -> Tensor:
        """The layer's output, by `out_layer`."""
        return attn.out_layer(out)


class Kandinsky5Family(Family):
    """Kandinsky 5: grids of frames, height and width; text blocks have no grid and stay."""

    base_class = Kandinsky5Transformer3DModel
    rank = 3
    layers = ("visual_transformer_blocks.*.self_attention",)
    # 121 frames at 512×768 after the VAE (4×8×8) and patches (1×2×2), the default of its pipeline.
    native = (31, 32, 48)
    stock_processor = Kandinsky5AttnProcessor
    mhla_processor = MHLAKandinsky5AttnProcessor
    unconverted_processor = SoftmaxKandinsky5AttnProcessor

    def sizes(self, model: Any) -> tuple[int, int, int]:
        """Number of heads, channels per head, channels of the layer's input."""
        head_dim = sum(model.config.axes_dims)
        return model.config.model_dim // head_dim, head_dim, model.config.model_dim

    def output_projection(self, attention: Any) -> nn.Module:
        """`out_layer`."""
        return attention.out_layer

    def arguments(self, model: Any, given: dict[str, Any]) -> dict[str, Any]:
        """The grid is passed in `sparse_params`, which diffusers does not change.

        Raises:
            ValueError: If `sparse_params` is given: NABLA reorders the tokens and masks attention.
        """
        if given.get("sparse_params") is not None:
            raise UserError(
                "MHLA layers take no sparse_params: they replace NABLA; load the model with "
                "attention_type='regular', so that the pipeline passes none"
            )
        grid = patch_grid(given["hidden_states"].shape[1:4], model.patch_size)
        return given | {"sparse_params": {"to_fractal": False, "grid": grid}}


class MHLAKandinsky5Transformer3DModel(MHLATransformerMixin, Kandinsky5Transformer3DModel):
    """`Kandinsky5Transformer3DModel` with MHLA layers.

    Takes the arguments of its base class and `mhla`, an `MHLAConfig` or a dict of its values.
    """

    family = Kandinsky5Family()
