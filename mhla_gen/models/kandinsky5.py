"""MHLA for diffusers' Kandinsky 5, images and videos."""

from typing import Any

from diffusers.configuration_utils import register_to_config
from diffusers.models.transformers.transformer_kandinsky import (
    Kandinsky5AttnProcessor,
    Kandinsky5Transformer3DModel,
)
from torch import Tensor, nn

from mhla_gen.config import MHLAConfig
from mhla_gen.models.family import Family
from mhla_gen.models.projection import refuse_mask_and_other_keys
from mhla_gen.models.transformer import MHLATransformerMixin, accepts_mhla

# 121 frames at 512×768 after the VAE (4×8×8) and patches (1×2×2), the default of its pipeline.
_NATIVE_GRID = (31, 32, 48)


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


class MHLAKandinsky5AttnProcessor:
    """Runs the `mhla` child of a `Kandinsky5Attention` layer."""

    # diffusers skips, without a word, processors that lack these two.
    _attention_backend = None
    _parallel_config = None

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        rotary_emb: Tensor | None = None,
        sparse_params: dict[str, Any] | None = None,
    ) -> Tensor:
        """Project, attend, project; `[batch, seq_len, hidden_size]` in and out.

        Raises:
            ValueError: If other keys are given, or rotary embedding or grid are missing.
        """
        refuse_mask_and_other_keys(None, encoder_hidden_states)
        if rotary_emb is None or sparse_params is None:
            raise ValueError("MHLA layers need rotary_emb, and the grid in sparse_params")
        query, key, value = (
            project(hidden_states).unflatten(-1, (attn.num_heads, -1))
            for project in (attn.to_query, attn.to_key, attn.to_value)
        )
        query = attn.query_norm(query.float()).type_as(value)
        key = attn.key_norm(key.float()).type_as(value)
        # Matrices [[cos, -sin], [sin, cos]] for interleaved pairs, the same for the whole batch.
        matrices = rotary_emb[0, :, 0]
        rotary = (matrices[..., 0, 0], matrices[..., 1, 0])
        out = attn.mhla(query, key, value, hidden_states, sparse_params["grid"], rotary)
        return attn.out_layer(out)


class Kandinsky5Family(Family):
    """Kandinsky 5: grids of frames, height and width; rotary embedding over all three."""

    base_class = Kandinsky5Transformer3DModel
    rank = 3
    stock_processor = Kandinsky5AttnProcessor
    mhla_processor = MHLAKandinsky5AttnProcessor
    unconverted_processor = SoftmaxKandinsky5AttnProcessor

    def attentions(self, model: Any) -> list[tuple[str, Any]]:
        """`self_attention` of every visual block; text blocks have no grid."""
        return [
            (f"visual_transformer_blocks.{i}.self_attention", block.self_attention)
            for i, block in enumerate(model.visual_transformer_blocks)
        ]

    def sizes(self, model: Any) -> tuple[int, int, int]:
        """Heads, channels of a head, channels of the layer's input."""
        head_dim = sum(model.config.axes_dims)
        return model.config.model_dim // head_dim, head_dim, model.config.model_dim

    def native_grid(self, model: Any) -> tuple[int, ...]:
        """121 frames at 512×768, whatever the model: Kandinsky 5 takes any size."""
        return _NATIVE_GRID

    def output_projection(self, attention: Any) -> nn.Module:
        """`out_layer`."""
        return attention.out_layer


class MHLAKandinsky5Transformer3DModel(MHLATransformerMixin, Kandinsky5Transformer3DModel):
    """`Kandinsky5Transformer3DModel` with MHLA layers.

    Takes the arguments of its base class and `mhla`, an `MHLAConfig` or a dict of its values.
    """

    # A saved pipeline names this module; diffusers looks there for the class and for ModelMixin.
    __module__ = "mhla_gen"

    family = Kandinsky5Family()
    _keep_in_fp32_modules = [  # noqa: RUF012
        *Kandinsky5Transformer3DModel._keep_in_fp32_modules,
        "mixing",
    ]
    _skip_layerwise_casting_patterns = ["mhla"]  # noqa: RUF012

    @register_to_config
    @accepts_mhla(Kandinsky5Transformer3DModel)
    def __init__(self, mhla: MHLAConfig | dict[str, Any] | None = None, **base: Any):
        super().__init__(**base)
        self.convert_new(mhla)

    def forward(  # type: ignore[override]
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        timestep: Tensor,
        pooled_projections: Tensor,
        visual_rope_pos: Any,
        text_rope_pos: Any,
        scale_factor: tuple[float, float, float] = (1.0, 1.0, 1.0),
        sparse_params: dict[str, Any] | None = None,
        return_dict: bool = True,
    ) -> Any:
        """As `Kandinsky5Transformer3DModel`; hands the grid to the visual blocks.

        Raises:
            ValueError: If `sparse_params` is given: NABLA reorders the tokens and masks attention.
        """
        if sparse_params is not None:
            raise ValueError(
                "MHLA layers take no sparse_params: they replace NABLA; load the model with "
                "attention_type='regular', so that the pipeline passes none"
            )
        sizes = zip(hidden_states.shape[1:4], self.patch_size, strict=True)
        grid = tuple(length // patch for length, patch in sizes)
        return super().forward(
            hidden_states,
            encoder_hidden_states,
            timestep,
            pooled_projections,
            visual_rope_pos,
            text_rope_pos,
            scale_factor=scale_factor,
            # The only argument that diffusers hands through to the layers as it is.
            sparse_params={"to_fractal": False, "grid": grid},
            return_dict=return_dict,
        )
