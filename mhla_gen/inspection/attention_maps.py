"""Run a model and see what each of its self-attention layers attends to."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from mhla_gen.errors import UserError
from mhla_gen.inspection.weights import (
    BothHalves,
    ExactAttention,
    LayerAttention,
    MHLAAttention,
    SoftmaxAttention,
)
from mhla_gen.models import MHLA, Linformer
from mhla_gen.models.exact import tile_layout
from mhla_gen.models.family import Family
from mhla_gen.models.projections import products
from mhla_gen.models.rotary import rotated

Observer = Callable[[int, LayerAttention], None]


def watch(family: Family, model: Any, inputs: dict[str, Any], observe: Observer) -> list[int]:
    """Run a model and pass every self-attention layer to an observer as soon as it has run.

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
                if isinstance(child, Linformer):
                    continue
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
        if given.get("extra") is not None:
            raise UserError(
                "inspect draws attention among tokens of one grid; this model joins text"
            )
        rotary = given.get("rotary")
        self.observe(self.index, _of_layer(module, given, rotary))


def _of_layer(
    module: MHLA, given: dict[str, Any], rotary: tuple[Tensor, Tensor] | None
) -> LayerAttention:
    """From the arguments of `MHLA.forward`."""
    config, grid = module.config, tuple(given["grid"])
    if config.magnitude or config.causal_frames is not None:
        found = "magnitude=true" if config.magnitude else f"causal_frames={config.causal_frames}"
        raise UserError(f"inspect does not draw layers with {found}")
    if config.exact == 0:
        return _linear_half(module, given, grid, rotary)
    query, key = (rotated(given[name], rotary)[0] for name in ("query", "key"))
    if config.exact == 1:
        return SoftmaxAttention(query, key, scale=query.shape[-1] ** -0.5)
    exact = ExactAttention(query, key, grid=grid, layout=tile_layout(config, grid))
    if module.combine is None:
        return exact
    linear = _linear_half(module, given, grid, rotary)
    share = products(module.input_layers(), given["hidden_states"])[-1].sigmoid()[0]
    return BothHalves(query, key, exact=exact, linear=linear, share=share)


def _linear_half(
    module: MHLA,
    given: dict[str, Any],
    grid: tuple[int, ...],
    rotary: tuple[Tensor, Tensor] | None,
) -> MHLAAttention:
    # Small grids use some of the blocks only, and the layer knows which.
    layout, mixing = module.occupied_blocks(grid)
    assert module.features is not None
    query, key = module.features(given["query"], given["key"])
    return MHLAAttention(
        query=query[0],
        key=key[0],
        mixing=mixing.detach(),
        grid=grid,
        layout=layout,
        feature_map=module.features.operator_map,
        normalize=module.config.normalize,
        eps=module.config.eps,
        rotary=rotary,
    )


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
        """A hook after which calls belong to this layer; None for no layer."""

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
        raise UserError(f"inspect takes one input at a time, found a batch of {len(query)}")
