"""MHLA for diffusers' LTX-2 (video and audio): only the video's self-attention is replaced."""

from typing import Any

import torch
from diffusers.models.transformers.transformer_ltx2 import (
    LTX2AudioVideoAttnProcessor,
    LTX2AudioVideoRotaryPosEmbed,
    LTX2PerturbedAttnProcessor,
    LTX2VideoTransformer3DModel,
)
from torch import Tensor

from mhla_gen.models.families.ltx import MHLALTXAttnProcessor, given_grid
from mhla_gen.models.family import Family
from mhla_gen.models.processors import DropsGrid
from mhla_gen.models.rotary import interleaved
from mhla_gen.models.transformer import MHLATransformerMixin


class GridLTX2RotaryPosEmbed(LTX2AudioVideoRotaryPosEmbed):
    """LTX-2's rotary embedding of video that also passes its grid to the attention layers.

    It is called with coordinates only; the model sets the grid in the same call of `forward`.
    """

    grid: Any

    def forward(self, coords: Tensor, device: Any = None) -> Any:  # type: ignore[override]
        """`(cos, sin, grid carrier)`."""
        cos, sin = super().forward(coords, device)
        return cos, sin, cos.new_empty((*self.grid, 0))


class SoftmaxLTX2AttnProcessor(DropsGrid, LTX2AudioVideoAttnProcessor):
    """Stock attention for the softmax layers of a hybrid."""


class SoftmaxLTX2PerturbedAttnProcessor(DropsGrid, LTX2PerturbedAttnProcessor):
    """Stock attention for the softmax layers of a hybrid."""


class MHLALTX2AttnProcessor(MHLALTXAttnProcessor):
    """MHLA of an `LTX2Attention` layer, with the layer's own per-head gate."""

    def __call__(  # type: ignore[override]
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        query_rotary_emb: Any = None,
        key_rotary_emb: Any = None,
        perturbation_mask: Tensor | None = None,
        all_perturbed: Any = None,
    ) -> Tensor:
        """As `MHLAProcessor`; a perturbed layer returns its values instead of its attention.

        Raises:
            ValueError: If a mask or other keys are given, or the grid is missing.
        """
        self.check(attention_mask, encoder_hidden_states)
        grid, rotary = self.place(attn, hidden_states, query_rotary_emb)
        query, key, value = self.project(attn, hidden_states)
        if attn.rope_type == "split":
            query, key = interleaved(query), interleaved(key)
        if all_perturbed is None and perturbation_mask is not None:
            all_perturbed = torch.all(perturbation_mask == 0)
        if all_perturbed:
            out = value.flatten(2)
        else:
            out = attn.mhla(query, key, value, hidden_states, grid, rotary)
            if perturbation_mask is not None:
                out = torch.lerp(value.flatten(2), out, perturbation_mask)
        if attn.to_gate_logits is not None:
            gates = 2 * torch.sigmoid(attn.to_gate_logits(hidden_states))
            out = (out.unflatten(2, (attn.heads, -1)) * gates.unsqueeze(-1)).flatten(2)
        return self.project_back(attn, out)

    def angles(self, attn: Any, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        """From tables `[batch, seq_len, channels]` or `[batch, num_heads, seq_len, …]`."""
        if attn.rope_type == "split":
            return cos.transpose(1, 2), sin.transpose(1, 2)
        return super().angles(attn, cos, sin)


class MHLALTX2PerturbedAttnProcessor(MHLALTX2AttnProcessor):
    """`MHLALTX2AttnProcessor` for models whose layers can be perturbed."""


class LTX2Family(Family):
    """LTX-2: grids of frames, height and width; audio and cross-attention stay softmax."""

    base_class = LTX2VideoTransformer3DModel
    rank = 3
    layers = ("transformer_blocks.*.attn1",)
    # 121 frames at 512×768 after the VAE (8×32×32), the default of its pipeline.
    native = (16, 16, 24)
    stock_processor = LTX2AudioVideoAttnProcessor
    mhla_processor = MHLALTX2AttnProcessor
    unconverted_processor = SoftmaxLTX2AttnProcessor
    replaced_modules = {  # noqa: RUF012
        "rope": (LTX2AudioVideoRotaryPosEmbed, GridLTX2RotaryPosEmbed)
    }

    def processors(self, attention: Any) -> tuple[type, type, type]:
        """Those of the family, or those for layers that can be perturbed."""
        perturbed = (LTX2PerturbedAttnProcessor, MHLALTX2PerturbedAttnProcessor)
        if isinstance(attention.processor, perturbed):
            return (*perturbed, SoftmaxLTX2PerturbedAttnProcessor)
        return super().processors(attention)

    def arguments(self, model: Any, given: dict[str, Any]) -> dict[str, Any]:
        """The grid goes to the rotary embedding, which passes it to the layers.

        Raises:
            ValueError: If num_frames, height and width do not multiply to the number of tokens.
        """
        sizes = (given.get(name) for name in ("num_frames", "height", "width"))
        model.rope.grid = given_grid(given["hidden_states"], *sizes)
        return given


class MHLALTX2VideoTransformer3DModel(MHLATransformerMixin, LTX2VideoTransformer3DModel):
    """`LTX2VideoTransformer3DModel` with MHLA layers.

    Takes the arguments of its base class and `mhla`, an `MHLAConfig` or a dict of its values.
    """

    family = LTX2Family()
