"""MHLA in fused Triton kernels, as torch custom operators with fake and autograd rules.

`mhla_gen/ops/README.md` explains the kernels. Besides their outputs, the operators allocate nothing
as large as the tokens; for training they save the summaries before and after mixing.
"""
# torch says what fake and autograd rules take, and Triton's kernels have no types.
# pyright: reportMissingParameterType=false, reportUnknownParameterType=false
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false

import torch
from torch import Tensor

from mhla_gen.ops.causal_fused import fused_causal_mhla
from mhla_gen.ops.fused_limits import MAX_BLOCKS, require_fused, trains
from mhla_gen.ops.kernels import attention_form, linear_form
from mhla_gen.ops.kernels.launch import Call, merge_axes, num_parts, stored_dtype
from mhla_gen.ops.kernels.linear_form import Summaries

# Measured on an H100: beyond either limit, summaries cost less than scores.
_ATTENTION_SEQ_LEN = 512
_ATTENTION_BLOCKS = 32


def fused_mhla(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mixing: Tensor,
    *,
    grid: tuple[int, ...],
    layout: tuple[int, ...],
    feature_map: str,
    rotary: tuple[Tensor, Tensor] | None,
    normalize: bool,
    causal: bool,
    eps: float,
    use_attention_form: bool | None = None,
    stored: torch.dtype | None = None,
) -> Tensor:
    """MHLA on a CUDA device, summed in float32; see `mhla_gen.ops.mhla`.

    By default the cheaper form runs, and summaries have the `stored_dtype` of the inputs;
    `use_attention_form` and `stored` (float16 or float32) override this.

    Raises:
        ValueError: If the kernels do not support the call; the message says why.
    """
    require_fused(
        device=query.device,
        dtype=query.dtype,
        head_dim=query.shape[3],
        value_dim=value.shape[3],
        num_blocks=mixing.shape[-1],
        trainable_rotary=trains(rotary),
    )
    if causal:
        return fused_causal_mhla(
            query, key, value, mixing, num_blocks=layout[0], most_blocks=MAX_BLOCKS,
            feature_map=feature_map, rotary=rotary, normalize=normalize, eps=eps, stored=stored,
        )  # fmt: skip
    cos, sin = rotary if rotary is not None else (None, None)
    if use_attention_form is None:
        use_attention_form = attention_form_is_cheaper(query.shape[1], mixing.shape[-1])
    if _needs_dispatcher(query, key, value, mixing):
        run = attention_mhla if use_attention_form else linear_mhla
    else:
        # The same function without the dispatcher, which takes longer than a short call.
        run = _attention_form if use_attention_form else _linear_form
    return run(
        query, key, value, mixing, cos, sin, list(grid), list(layout), feature_map, normalize, eps,
        stored or stored_dtype(query.dtype),
    )[0]  # fmt: skip


def _needs_dispatcher(*tensors: Tensor) -> bool:
    """Whether gradients are needed, tensors are not plain, or something intercepts operators."""
    return (
        (torch.is_grad_enabled() and any(x.requires_grad for x in tensors))
        or any(type(x) not in (Tensor, torch.nn.Parameter) for x in tensors)
        or torch.compiler.is_compiling()
        or torch.jit.is_tracing()  # pyright: ignore[reportPrivateImportUsage]
        or _intercepted()
    )


def _intercepted() -> bool:
    """Whether a dispatch mode or a transform of `torch.func` is active.

    torch tells this only under private names. If a release has changed them, the answer is yes, and
    the call goes through the dispatcher, which costs time but changes nothing.
    """
    try:
        modes = torch._C._len_torch_dispatch_stack()  # pyright: ignore[reportPrivateUsage]
        level = torch._C._functorch.maybe_current_level  # type: ignore[attr-defined]
        return modes > 0 or level() is not None
    except (AttributeError, TypeError):
        return True


def attention_form_is_cheaper(seq_len: int, num_blocks: int) -> bool:
    """Whether scores take less time than summaries; both forms are close to the memory floor."""
    return seq_len <= _ATTENTION_SEQ_LEN and num_blocks <= _ATTENTION_BLOCKS


def _linear_form(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mixing: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    grid: list[int],
    layout: list[int],
    feature_map: str,
    normalize: bool,
    eps: float,
    stored: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Linear form: the output, then summaries and mixed summaries with scales and key sums."""
    call = _call(query, value, cos, sin, grid, layout, feature_map, normalize, eps, stored)
    with torch.cuda.device_of(query):
        out, summaries, mixed = linear_form.forward(query, key, value, mixing, call)
    s, x = summaries, mixed
    return out, s.matrices, s.scales, s.key_sums, x.matrices, x.scales, x.key_sums


linear_mhla = torch.library.custom_op("mhla_gen::linear_mhla", _linear_form, mutates_args=())


@linear_mhla.register_fake
def _(query, key, value, mixing, cos, sin, grid, layout, feature_map, normalize, eps, stored):
    num_blocks = mixing.shape[-1]
    rows = num_blocks * num_parts(query.shape[0] * query.shape[2], grid, layout)
    return (
        value.new_empty(value.shape),
        *Summaries.empty(query, value, rows, stored, normalize),
        *Summaries.empty(query, value, num_blocks, stored, normalize),
    )


@torch.library.custom_op("mhla_gen::linear_mhla_backward", mutates_args=())
def linear_mhla_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mixing: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    summaries: list[Tensor],
    mixed: list[Tensor],
    grid: list[int],
    layout: list[int],
    feature_map: str,
    normalize: bool,
    eps: float,
    mixing_trains: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of query, key, value and mixing; the last is empty if mixing is frozen."""
    stored = summaries[0].dtype
    call = _call(query, value, cos, sin, grid, layout, feature_map, normalize, eps, stored)
    with torch.cuda.device_of(query):
        return linear_form.backward(
            grad, query, key, value, mixing, Summaries(*summaries), Summaries(*mixed), call,
            mixing_trains,
        )  # fmt: skip


@linear_mhla_backward.register_fake
def _(grad, query, key, value, mixing, *options):
    gradients = (x.new_empty(x.shape) for x in (query, key, value))
    return *gradients, mixing.new_empty(mixing.shape if options[-1] else 0)


def _linear_setup(ctx, inputs, output):
    query, key, value, mixing, cos, sin, *options, _ = inputs
    ctx.options = options
    ctx.save_for_backward(query, key, value, mixing, cos, sin, *output[1:])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _linear_backward(ctx, grad, *_):
    query, key, value, mixing, cos, sin, *summaries = ctx.saved_tensors
    if grad is None:
        return (None,) * 12
    trains = ctx.needs_input_grad[3]
    *gradients, dmixing = linear_mhla_backward(
        grad, query, key, value, mixing, cos, sin, summaries[:3], summaries[3:],
        *ctx.options, trains,
    )  # fmt: skip
    return *gradients, dmixing if trains else None, *(None,) * 8


linear_mhla.register_autograd(_linear_backward, setup_context=_linear_setup)


def _attention_form(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mixing: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    grid: list[int],
    layout: list[int],
    feature_map: str,
    normalize: bool,
    eps: float,
    stored: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Attention form: the output and the inverse denominators."""
    call = _call(query, value, cos, sin, grid, layout, feature_map, normalize, eps, stored)
    with torch.cuda.device_of(query):
        return attention_form.forward(query, key, value, mixing, call)


attention_mhla = torch.library.custom_op(
    "mhla_gen::attention_mhla", _attention_form, mutates_args=()
)


@attention_mhla.register_fake
def _(query, key, value, mixing, cos, sin, grid, layout, feature_map, normalize, eps, stored):
    return value.new_empty(value.shape), attention_form.empty_inverse(query, normalize)


@torch.library.custom_op("mhla_gen::attention_mhla_backward", mutates_args=())
def attention_mhla_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mixing: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    out: Tensor,
    inverse: Tensor,
    grid: list[int],
    layout: list[int],
    feature_map: str,
    normalize: bool,
    stored: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of query, key, value and mixing in the attention form."""
    # eps is already in the inverse denominators.
    call = _call(query, value, cos, sin, grid, layout, feature_map, normalize, 0.0, stored)
    with torch.cuda.device_of(query):
        return attention_form.backward(grad, query, key, value, mixing, out, inverse, call)


@attention_mhla_backward.register_fake
def _(grad, query, key, value, mixing, *_):
    return tuple(x.new_empty(x.shape) for x in (query, key, value, mixing))


def _attention_setup(ctx, inputs, output):
    query, key, value, mixing, cos, sin, grid, layout, feature_map, normalize, _, stored = inputs
    ctx.options = grid, layout, feature_map, normalize, stored
    ctx.save_for_backward(query, key, value, mixing, cos, sin, *output)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _attention_backward(ctx, grad, _):
    if grad is None:
        return (None,) * 12
    gradients = attention_mhla_backward(grad, *ctx.saved_tensors, *ctx.options)
    return *gradients, *(None,) * 8


attention_mhla.register_autograd(_attention_backward, setup_context=_attention_setup)


def _call(query, value, cos, sin, grid, layout, *options) -> Call:
    if cos is not None and sin is not None:
        cos, sin = cos.contiguous(), sin.contiguous()
    return Call(query, value, cos, sin, *merge_axes(grid, layout), *options)
