"""Causal MHLA in fused Triton kernels, as torch custom operators with fake and autograd rules.

`mhla_gen/ops/README.md` explains the kernels. For training they save the inputs, the summaries
before and after mixing, and one number per token and head.
"""
# torch says what fake and autograd rules take, and Triton's kernels have no types.
# pyright: reportMissingParameterType=false, reportUnknownParameterType=false
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false

import torch
from torch import Tensor

from mhla_gen.ops.kernels import causal_form
from mhla_gen.ops.kernels.launch import Call, stored_dtype
from mhla_gen.ops.kernels.linear_form import Summaries


def fused_causal_mhla(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mixing: Tensor,
    *,
    num_blocks: int,
    most_blocks: int,
    feature_map: str,
    rotary: tuple[Tensor, Tensor] | None,
    normalize: bool,
    eps: float,
    stored: torch.dtype | None = None,
) -> Tensor:
    """Causal MHLA on a CUDA device; see `mhla_gen.ops.mhla`.

    Long blocks are split into parts with the weights of their block, which computes the same
    function: a part reads the earlier parts of its block with the weight m_ii.
    """
    cos, sin = rotary if rotary is not None else (None, None)
    cuts = causal_form.num_cuts([query.shape[1]], [num_blocks], most_blocks)
    if cuts > 1:
        parts = (*mixing.shape[:-2], num_blocks, cuts, num_blocks, cuts)
        mixing = mixing.unsqueeze(-1).unsqueeze(-3).expand(parts).flatten(-4, -3).flatten(-2)
    return causal_mhla_kernels(
        query, key, value, mixing, cos, sin, feature_map, normalize, eps,
        stored or stored_dtype(query.dtype),
    )[0]  # fmt: skip


@torch.library.custom_op("mhla_gen::causal_mhla", mutates_args=())
def causal_mhla_kernels(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mixing: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    feature_map: str,
    normalize: bool,
    eps: float,
    stored: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The output, inverse denominators, summaries and mixed summaries with scales and key sums."""
    call = _call(query, value, mixing, cos, sin, feature_map, normalize, eps, stored)
    with torch.cuda.device_of(query):
        out, inverse, s, x = causal_form.forward(query, key, value, mixing, call)
    return out, inverse, s[0], s[1], s[2], x[0], x[1], x[2]


@causal_mhla_kernels.register_fake
def _(query, key, value, mixing, cos, sin, feature_map, normalize, eps, stored):
    num_blocks = mixing.shape[-1]
    return (
        value.new_empty(value.shape),
        causal_form.empty_vector(query, normalize),
        *Summaries.empty(query, value, num_blocks, stored, normalize),
        *Summaries.empty(query, value, num_blocks, stored, normalize),
    )


@torch.library.custom_op("mhla_gen::causal_mhla_backward", mutates_args=())
def causal_mhla_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mixing: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    inverse: Tensor,
    summaries: list[Tensor],
    mixed: list[Tensor],
    feature_map: str,
    normalize: bool,
    mixing_trains: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of query, key, value and mixing; the last is empty if mixing is frozen."""
    # eps is already in the inverse denominators.
    stored = summaries[0].dtype
    call = _call(query, value, mixing, cos, sin, feature_map, normalize, 0.0, stored)
    with torch.cuda.device_of(query):
        return causal_form.backward(
            grad, query, key, value, mixing, inverse, Summaries(*summaries), Summaries(*mixed),
            call, mixing_trains,
        )  # fmt: skip


@causal_mhla_backward.register_fake
def _(grad, query, key, value, mixing, *options):
    gradients = (x.new_empty(x.shape) for x in (query, key, value))
    return *gradients, mixing.new_empty(mixing.shape if options[-1] else 0)


def _setup(ctx, inputs, output):
    query, key, value, mixing, cos, sin, feature_map, normalize, _, _ = inputs
    ctx.options = feature_map, normalize
    ctx.save_for_backward(query, key, value, mixing, cos, sin, *output[1:])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _backward(ctx, grad, *_):
    *inputs, inverse, s0, s1, s2, x0, x1, x2 = ctx.saved_tensors
    if grad is None:
        return (None,) * 10
    trains = ctx.needs_input_grad[3]
    *gradients, dmixing = causal_mhla_backward(
        grad, *inputs, inverse, [s0, s1, s2], [x0, x1, x2], *ctx.options, trains
    )
    return *gradients, dmixing if trains else None, *(None,) * 6


causal_mhla_kernels.register_autograd(_backward, setup_context=_setup)


def _call(query, value, mixing, cos, sin, *options) -> Call:
    if cos is not None and sin is not None:
        cos, sin = cos.contiguous(), sin.contiguous()
    return Call(query, value, cos, sin, [query.shape[1]], [mixing.shape[-1]], *options)
