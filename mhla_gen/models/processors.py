"""What the attention processors of all families share: project, attend, project back.

diffusers calls processors with arguments whose names differ between models, and inspects a
processor's signature to see which of them it accepts. So the signatures here list all names.
"""

import inspect
from collections.abc import Sequence
from typing import Any, ClassVar

from torch import Tensor

from mhla_gen.errors import UserError
from mhla_gen.models.family import patch_grid
from mhla_gen.models.parallel import sequence_group
from mhla_gen.models.projections import products

Rotary = tuple[Tensor, Tensor] | None


class MHLAProcessor:
    """Runs the `mhla` child of an attention layer; families override parts.

    The grid is passed as an argument, or as the shape `(…, 0)` of an empty third tensor beside the
    rotary tables.
    """

    # diffusers silently skips processors without these two attributes.
    _attention_backend = None
    _parallel_config = None

    norm_across_heads: ClassVar[bool] = False
    """Whether queries and keys are normalised over all heads at once, not per head."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        rotary_emb: Any = None,
        image_rotary_emb: Any = None,
        grid: tuple[int, ...] | None = None,
    ) -> Tensor:
        """Project, attend, project; `[batch, seq_len, hidden_size]` in and out.

        Raises:
            ValueError: If a mask or other keys are given, or the grid is missing.
        """
        self.check(attention_mask, encoder_hidden_states)
        tables = rotary_emb if image_rotary_emb is None else image_rotary_emb
        if grid is None:
            grid, rotary = self.place(attn, hidden_states, tables)
        else:
            rotary = None
        query, key, value, *of_input = self.project(attn, hidden_states, *attn.mhla.input_layers())
        group = sequence_group(self._parallel_config)
        out = attn.mhla(query, key, value, hidden_states, grid, rotary, group, of_input=of_input)
        return self.project_back(attn, out)

    @staticmethod
    def check(attention_mask: Any, encoder_hidden_states: Any) -> None:
        """Refuse what MHLA cannot use.

        Raises:
            ValueError: If either argument is not None.
        """
        if attention_mask is not None or encoder_hidden_states is not None:
            raise UserError("MHLA layers take neither an attention mask nor other keys and values")

    def place(
        self, attn: Any, hidden_states: Tensor, tables: Any
    ) -> tuple[tuple[int, ...], Rotary]:
        """The grid of the tokens, and the rotary embedding as `MHLA.forward` takes it.

        Args:
            attn: The layer.
            hidden_states: `[batch, seq_len, hidden_size]`.
            tables: The rotary embedding that diffusers passes to the layer, and the grid carrier.

        Raises:
            ValueError: If the rotary embedding or the grid is missing.
        """
        if tables is None or len(tables) != 3:
            raise UserError(
                "MHLA layers of this model need the rotary embedding and the grid: "
                "(rotary_emb or image_rotary_emb) = (cos, sin, grid carrier)"
            )
        cos, sin, carrier = tables
        return tuple(carrier.shape[:-1]), self.angles(attn, cos, sin)

    def angles(self, attn: Any, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        """Tables as `MHLA.forward` takes them, with one angle per pair of channels."""
        raise NotImplementedError

    def project(self, attn: Any, hidden_states: Tensor, *others: Any) -> tuple[Tensor, ...]:
        """Queries, keys and values, normalised, each `[batch, seq_len, num_heads, head_dim]`.

        The outputs of other linear layers that are joined into the same product follow them.
        """
        if getattr(attn, "fused_projections", False):
            projected = attn.to_qkv(hidden_states).chunk(3, dim=-1)
            more = products(others, hidden_states)
        else:
            joined = products((attn.to_q, attn.to_k, attn.to_v, *others), hidden_states)
            projected, more = joined[:3], joined[3:]
        norms = (attn.norm_q, attn.norm_k)
        by_head = normalized(projected, attn.heads, norms, across_heads=self.norm_across_heads)
        return (*by_head, *more)

    def project_back(self, attn: Any, out: Tensor) -> Tensor:
        """The layer's output from `[batch, seq_len, num_heads * head_dim]`."""
        return attn.to_out[1](attn.to_out[0](out))


def normalized(
    projected: Sequence[Tensor],
    num_heads: int,
    norms: tuple[Any, Any],
    *,
    across_heads: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values by head, the first two normalised.

    Args:
        projected: Queries, keys and values, each `[batch, seq_len, num_heads * head_dim]`.
        num_heads: Number of heads.
        norms: Norm layers of queries and of keys; None for no norm.
        across_heads: Normalise all heads at once.

    Returns:
        Each `[batch, seq_len, num_heads, head_dim]`.
    """

    def normalize(x: Tensor, norm: Any) -> Tensor:
        by_head = x.unflatten(2, (num_heads, -1))
        if norm is None:
            return by_head
        return norm(x).unflatten(2, (num_heads, -1)) if across_heads else norm(by_head)

    query, key, value = projected
    # Under autocast a norm may return float32.
    return (
        normalize(query, norms[0]).type_as(value),
        normalize(key, norms[1]).type_as(value),
        value.unflatten(2, (num_heads, -1)),
    )


class DropsGrid:
    """Mixin for a stock processor: stock attention for layers that also receive the grid.

    The grid is dropped, whether it is an argument or the third of three tables.
    """

    def __init_subclass__(cls) -> None:
        mixed_into: Any = super()
        stock = mixed_into.__call__

        def call(self: Any, *args: Any, grid: Any = None, **kwargs: Any) -> Any:
            named = {name: _without_grid(value) for name, value in kwargs.items()}
            return stock(self, *map(_without_grid, args), **named)

        signature = inspect.signature(stock)
        grid = inspect.Parameter("grid", inspect.Parameter.KEYWORD_ONLY, default=None)
        parameters = sorted((*signature.parameters.values(), grid), key=lambda one: one.kind)
        call.__signature__ = signature.replace(parameters=parameters)
        cls.__call__ = call


def _without_grid(argument: Any) -> Any:
    is_tables = isinstance(argument, tuple | list) and len(argument) == 3
    return argument[:2] if is_tables else argument


class PatchGridCarrier:
    """Mixin for a rotary embedding of latents: passes the grid to the attention layers.

    The grid is passed as the shape `(frames, height, width, 0)` of an empty third tensor. Unlike
    module state, this survives `torch.compile`, checkpointing while two grids are in use, copies of
    the model, and offloading hooks.
    """

    patch_size: Any

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """`(cos, sin, grid carrier)` for latents `[batch, channels, frames, height, width]`."""
        cos, sin = super().forward(hidden_states, *args, **kwargs)  # type: ignore[misc]
        patches = self.patch_size
        if isinstance(patches, int):
            patches = (self.patch_size_t, patches, patches)  # type: ignore[attr-defined]
        grid = patch_grid(hidden_states.shape[2:], patches)
        return cos, sin, cos.new_empty((*grid, 0))
