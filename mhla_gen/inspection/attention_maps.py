"""The attention weights that a model's self-attention layers induce, for chosen queries.

A linear or MHLA layer never forms its weights, but its output is `weights @ value` for some matrix;
row n of that matrix says how much token n reads of every token. Rows are computed on demand from
the queries and keys of a real forward pass, so memory is `rows × seq_len` and never `seq_len²`.
"""

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from mhla_gen.errors import UserError
from mhla_gen.models import MHLA
from mhla_gen.models.family import Family
from mhla_gen.ops import FEATURE_MAPS
from mhla_gen.ops.feature_maps import rotate
from mhla_gen.ops.partition import block_of_tokens


@dataclass(frozen=True, eq=False)
class LayerAttention(ABC):
    """What one layer did for one input, ready to be asked for rows of its weights."""

    query: Tensor
    """`[seq_len, num_heads, head_dim]`, as the layer's attention function got it."""
    key: Tensor
    """Like `query`."""

    @property
    def seq_len(self) -> int:
        """Tokens."""
        return self.query.shape[0]

    @property
    def num_heads(self) -> int:
        """Heads."""
        return self.query.shape[1]

    @property
    def head_dim(self) -> int:
        """Channels of a head."""
        return self.query.shape[2]

    @property
    def device(self) -> torch.device:
        """Where rows must be."""
        return self.query.device

    @property
    @abstractmethod
    def kind(self) -> str:
        """softmax, mhla, or linear for MHLA with a single block."""

    @property
    @abstractmethod
    def rank_bound(self) -> int:
        """The largest rank that the form of the layer allows."""

    @abstractmethod
    def weights(self, rows: Tensor, head: int) -> Tensor:
        """Rows of a head's attention weights, float64 `[len(rows), seq_len]`."""


@dataclass(frozen=True, eq=False)
class MHLAAttention(LayerAttention):
    """An MHLA layer: `((φ(Q) φ(K)ᵀ) ∘ m[block, block])`, divided by its denominator.

    Convolution, gate and output norm of the layer come after these weights.

    Source:
        Zhang et al. 2026, arXiv:2601.07832, Eq. (4), written as attention.
    """

    mixing: Tensor
    """`[num_blocks, num_blocks]` or `[num_heads, num_blocks, num_blocks]`."""
    grid: tuple[int, ...]
    layout: tuple[int, ...]
    feature_map: str
    normalize: bool
    eps: float
    rotary: tuple[Tensor, Tensor] | None = None
    """`(cos, sin)`, each `[seq_len, head_dim / 2]`. Rotated weights can be negative."""

    @property
    def kind(self) -> str:
        """`mhla`, or linear where there is one block only."""
        return "linear" if self.mixing.shape[-1] == 1 else "mhla"

    @property
    def rank_bound(self) -> int:
        """Sum over blocks of the smaller of block size and `head_dim`.

        Source:
            Zhang et al. 2026, arXiv:2601.07832, Sec. 4.
        """
        sizes = torch.bincount(block_of_tokens(self.grid, self.layout))
        return int(sizes.clamp(max=self.head_dim).sum())

    def weights(self, rows: Tensor, head: int) -> Tensor:
        """See `LayerAttention.weights`; rows sum to 1 if the layer normalises without rotation."""
        phi = FEATURE_MAPS[self.feature_map]
        phi_q = phi(self.query[rows, head].double())  # [rows, head_dim]
        phi_k = phi(self.key[:, head].double())
        mixing = (self.mixing if self.mixing.ndim == 2 else self.mixing[head]).double()
        block = block_of_tokens(self.grid, self.layout, device=rows.device)
        mixed = mixing[block[rows]][:, block]  # [rows, seq_len]
        plain = (phi_q @ phi_k.T) * mixed
        weights = plain
        if self.rotary is not None:
            cos, sin = (table.double() for table in self.rotary)
            rotated_q = rotate(phi_q.unsqueeze(1), (cos[rows], sin[rows])).squeeze(1)
            rotated_k = rotate(phi_k.unsqueeze(1), (cos, sin)).squeeze(1)
            weights = (rotated_q @ rotated_k.T) * mixed
        if self.normalize:
            # The rotation is left out of the denominator, as the operator does.
            weights = weights / (plain.sum(dim=1, keepdim=True) + self.eps)
        return weights


@dataclass(frozen=True, eq=False)
class SoftmaxAttention(LayerAttention):
    """A softmax layer: `softmax(scale Q Kᵀ)`."""

    scale: float

    @property
    def kind(self) -> str:
        """`softmax`."""
        return "softmax"

    @property
    def rank_bound(self) -> int:
        """`seq_len`: the exponential leaves no bound."""
        return self.seq_len

    def weights(self, rows: Tensor, head: int) -> Tensor:
        """See `LayerAttention.weights`; rows sum to 1."""
        scores = self.query[rows, head].double() @ self.key[:, head].double().T
        return (scores * self.scale).softmax(dim=1)


Observer = Callable[[int, LayerAttention], None]


def watch(family: Family, model: Any, inputs: dict[str, Any], observe: Observer) -> list[int]:
    """Run a model and hand every self-attention layer to an observer as soon as it has run.

    Args:
        family: The model's family.
        model: A transformer, converted or not.
        inputs: Arguments of its `forward`; one input, so batch size 1.
        observe: Called with the layer's index and its attention. What it does not keep is freed.

    Returns:
        Indices of layers that are neither softmax nor MHLA, which were not observed.

    Raises:
        ValueError: If a softmax layer uses a mask, or the batch is not one input.
    """
    seen: set[int] = set()

    def note(index: int, attention: LayerAttention) -> None:
        seen.add(index)
        observe(index, attention)

    layers = [layer for _, layer in family.attentions(model)]
    handles = []
    with _SoftmaxSpy(note) as spy, torch.no_grad():
        try:
            for index, layer in enumerate(layers):
                child = getattr(layer, "mhla", None)
                if child is not None:
                    hook = _MHLAHook(index, note)
                    handles.append(child.register_forward_pre_hook(hook, with_kwargs=True))
                else:
                    handles.append(layer.register_forward_pre_hook(spy.listen_to(index)))
                    handles.append(layer.register_forward_hook(spy.listen_to(None)))
            model(**inputs)
        finally:
            for handle in handles:
                handle.remove()
    return sorted(set(range(len(layers))) - seen)


@dataclass(frozen=True)
class _MHLAHook:
    """Reads the arguments of `MHLA.forward`."""

    index: int
    observe: Observer

    def __call__(self, module: MHLA, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = inspect.signature(module.forward).bind(*args, **kwargs).arguments
        _check_single(given["query"])
        # Small grids use some of the blocks only, and the layer knows which.
        layout, mixing = module.occupied_blocks(given["grid"])
        attention = MHLAAttention(
            query=given["query"][0],
            key=given["key"][0],
            mixing=mixing.detach(),
            grid=tuple(given["grid"]),
            layout=layout,
            feature_map=module.config.feature_map,
            normalize=module.config.normalize,
            eps=module.config.eps,
            rotary=given.get("rotary"),
        )
        self.observe(self.index, attention)


class _SoftmaxSpy(TorchFunctionMode):
    """Reads the arguments of the first `scaled_dot_product_attention` that a layer calls.

    Every family projects, normalises and rotates in its own way; what reaches this function is what
    they all have in common.
    """

    def __init__(self, observe: Observer):
        super().__init__()
        self.observe = observe
        self.index: int | None = None

    def listen_to(self, index: int | None) -> Callable[..., None]:
        """A hook from which on calls belong to this layer; None for no layer."""

        def hook(*_: Any) -> None:
            self.index = index

        return hook

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention and self.index is not None:
            index, self.index = self.index, None
            self.observe(index, _softmax_attention(*args, **kwargs))
        return func(*args, **kwargs)


def _softmax_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> SoftmaxAttention:
    """From the arguments of `scaled_dot_product_attention`, `[batch, heads, tokens, channels]`."""
    _check_single(query)
    if attn_mask is not None or is_causal:
        raise UserError("inspect draws self-attention without a mask; this model uses one")
    if enable_gqa:
        key = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
    return SoftmaxAttention(
        query=query[0].transpose(0, 1),
        key=key[0].transpose(0, 1),
        scale=query.shape[-1] ** -0.5 if scale is None else scale,
    )


def _check_single(query: Tensor) -> None:
    if len(query) != 1:
        raise UserError(f"inspect looks at one input at a time, found a batch of {len(query)}")
