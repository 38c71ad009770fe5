"""Attention over text and image tokens together.

Text queries attend to everything by softmax. Image queries attend to the text exactly, as keys off
their grid, and to their own grid by MHLA (and the exact tiles of its config); one weight combines
the two. Text is short, so the cost stays linear in image tokens.
"""

import math
from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from diffusers.models.attention_dispatch import dispatch_attention_fn
from torch import Tensor, nn

from mhla_gen.errors import UserError
from mhla_gen.models.family import Family
from mhla_gen.models.processors import MHLAProcessor, Rotary, normalized
from mhla_gen.models.rotary import pairs, rotated
from mhla_gen.ops.softmax import with_contiguous_gradient


class Tokens(NamedTuple):
    """Projections of tokens of one kind, each `[batch, length, num_heads, head_dim]`."""

    query: Tensor
    key: Tensor
    value: Tensor
    of_input: Sequence[Tensor] | None = None
    """For image tokens, outputs of MHLA's own linear layers for this input, if computed."""


class JointFamily(Family):
    """A family whose layers attend to text and image tokens together."""

    def reads_text(self, attention: Any) -> bool:
        """Whether a layer reads text tokens besides those of its grid."""
        return True

    def output_projection(self, attention: Any) -> nn.Module:
        """`to_out`, or the value projection where the block projects the joint output itself."""
        return attention.to_v if getattr(attention, "to_out", None) is None else attention.to_out[0]


class JointMHLAProcessor(MHLAProcessor):
    """Runs the `mhla` child of a layer that attends to text and image; families override parts.

    Text comes as a separate tensor, or in one tensor with the image.
    """

    image_first: ClassVar[bool] = False
    """In one tensor, image tokens come before text tokens."""
    zeroes_padding: ClassVar[bool] = False
    """Whether the attention output of padded text tokens is zero; if not, only keys are masked."""
    takes_mask: ClassVar[bool] = False
    """Whether diffusers passes a mask `[batch, text_len]` of the text."""

    def __call__(  # type: ignore[override]
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: Any = None,
        grid: tuple[int, ...] | None = None,
        encoder_hidden_states_mask: Tensor | None = None,
        freqs_cis: Any = None,
    ) -> Any:
        """Project, attend, project; returns what the stock processor returns.

        Raises:
            ValueError: If the grid is missing or does not fit the tokens.
        """
        tables = image_rotary_emb if freqs_cis is None else freqs_cis
        grid = find_grid(grid, tables)
        num_image = math.prod(grid)
        joined = encoder_hidden_states is None
        if joined:
            image, text = self.split(hidden_states, num_image)
        else:
            image, text = hidden_states, encoder_hidden_states
        check_grid(grid, image.shape[1])
        mask = attention_mask if encoder_hidden_states_mask is None else encoder_hidden_states_mask
        query, key, value, *of_input = self.project(attn, image, *attn.mhla.input_layers())
        image_out, text_out = self.attend(
            attn,
            Tokens(query, key, value, of_input),
            Tokens(*self.project_text(attn, text)),
            image,
            grid=grid,
            rotary=self.rotary(attn, tables, num_image),
            mask=self.text_mask(mask, num_image),
        )
        image_out = self.project_back(attn, image_out)
        text_out = self.project_text_back(attn, text_out)
        return self.join(image_out, text_out) if joined else (image_out, text_out)

    def attend(
        self,
        attn: Any,
        image: Tokens,
        text: Tokens,
        hidden_states: Tensor,
        *,
        grid: tuple[int, ...],
        rotary: tuple[Rotary, Rotary],
        mask: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """Attention of image and of text queries.

        Args:
            attn: The layer.
            image: Projections of image tokens, raster order of `grid`.
            text: Projections of text tokens.
            hidden_states: The layer's input for image tokens.
            grid: Image tokens along each axis.
            rotary: Tables of image tokens, as in `MHLA.forward`, and likewise of text tokens.
            mask: Bool `[batch, text_len]`, True for valid text tokens; None if all are.

        Returns:
            Both `[batch, length, num_heads * head_dim]`.
        """
        image_rotary, text_rotary = rotary
        text = text._replace(
            query=rotated(text.query, text_rotary), key=rotated(text.key, text_rotary)
        )
        valid = () if mask is None else (mask,)
        image_out = attn.mhla(
            *image[:3],
            hidden_states,
            grid,
            image_rotary,
            extra=(text.key, text.value, *valid),
            of_input=image.of_input,
        )
        out: Any = dispatch_attention_fn(
            text.query,
            torch.cat((text.key, rotated(image.key, image_rotary)), dim=1),
            torch.cat((text.value, image.value), dim=1),
            attn_mask=None if mask is None else self._key_mask(mask, image.key.shape[1]),
            backend=self._attention_backend,
        )
        out = with_contiguous_gradient(out)
        if mask is not None and self.zeroes_padding:
            out = out * mask[..., None, None]
        return image_out, out.flatten(2)

    @staticmethod
    def _key_mask(mask: Tensor, num_image: int) -> Tensor:
        return F.pad(mask, (0, num_image), value=True)[:, None, None]

    def split(self, joined: Tensor, num_image: int) -> tuple[Tensor, Tensor]:
        """Image and text tokens of `[batch, seq_len, …]`."""
        if self.image_first:
            return joined[:, :num_image], joined[:, num_image:]
        num_text = joined.shape[1] - num_image
        return joined[:, num_text:], joined[:, :num_text]

    def join(self, image: Tensor, text: Tensor) -> Tensor:
        """Undo `split`."""
        return torch.cat((image, text) if self.image_first else (text, image), dim=1)

    def rotary(self, attn: Any, tables: Any, num_image: int) -> tuple[Rotary, Rotary]:
        """Rotary embeddings of image and text tokens, from the tables that diffusers passes.

        Tables may begin with rows for the text, or have none for it.
        """
        if tables is None:
            return None, None
        cos, sin = self.angles(attn, *tables[:2])
        num_text = len(cos) - num_image
        if num_text == 0:
            return (cos, sin), None
        return (cos[num_text:], sin[num_text:]), (cos[:num_text], sin[:num_text])

    def angles(self, attn: Any, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        """From tables `[rows, head_dim]`."""
        return pairs(cos, sin)

    def text_mask(self, mask: Tensor | None, num_image: int) -> Tensor | None:
        """Bool `[batch, text_len]` from the mask that diffusers passes to the layer.

        Raises:
            ValueError: If the family has no mask, but one is given.
        """
        if mask is None:
            return None
        if not self.takes_mask:
            raise UserError("MHLA layers of this model take no attention mask")
        return mask.bool()

    def project_text(self, attn: Any, states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """As `project`, for text tokens, with the layer's text projections if it has any."""
        if getattr(attn, "add_q_proj", None) is None:
            query, key, value = self.project(attn, states)
            return query, key, value
        if getattr(attn, "fused_projections", False):
            projected = attn.to_added_qkv(states).chunk(3, dim=-1)
        else:
            layers = (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj)
            projected = [layer(states) for layer in layers]
        return normalized(projected, attn.heads, (attn.norm_added_q, attn.norm_added_k))

    def project_back(self, attn: Any, out: Tensor) -> Tensor:
        """The layer's output; some blocks project it themselves."""
        if getattr(attn, "to_out", None) is None:
            return out
        return super().project_back(attn, out)

    def project_text_back(self, attn: Any, out: Tensor) -> Tensor:
        """As `project_back`, for text tokens; a last layer may not project them."""
        if getattr(attn, "add_q_proj", None) is None:
            return self.project_back(attn, out)
        projection = getattr(attn, "to_add_out", None)
        return out if projection is None else projection(out)


def find_grid(grid: tuple[int, ...] | None, tables: Any) -> tuple[int, ...]:
    """The grid that a layer receives: directly, or as the shape of a third table.

    Raises:
        ValueError: If there is none.
    """
    if grid is not None:
        return tuple(grid)
    if not isinstance(tables, tuple | list) or len(tables) != 3:
        raise UserError("MHLA layers need the token grid, but the layer got none")
    return tuple(tables[2].shape[:-1])


def check_grid(grid: tuple[int, ...], num_tokens: int) -> None:
    """Check that image tokens fill one grid.

    Raises:
        ValueError: If not, as with several images in one sequence.
    """
    if math.prod(grid) != num_tokens:
        raise UserError(
            f"MHLA layers take one image per sequence, whose tokens fill a grid: found "
            f"{num_tokens} tokens for {'×'.join(map(str, grid))}"
        )
