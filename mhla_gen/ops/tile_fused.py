"""Tile attention in fused Triton kernels, as torch custom operators with fake and autograd rules.

`mhla_gen/ops/README.md` explains the kernels.
"""
# torch says what fake and autograd rules take, and Triton's kernels have no types.
# pyright: reportMissingParameterType=false, reportUnknownParameterType=false
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false

import torch
from torch import Tensor

from mhla_gen.errors import UserError
from mhla_gen.ops import fused_limits
from mhla_gen.ops.fused_limits import trains
from mhla_gen.ops.kernels import tile_form, tile_gradients
from mhla_gen.ops.kernels.tile_call import TileCall
from mhla_gen.ops.tiles import Tiling

MAX_TILES = 16384
"""Most tiles: one program holds the products of a group with all of them."""
# Entries of tiles are 16 times their first token, in 32 bits.
_MAX_TOKENS = 2**27


def fused_tile_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    placed: Tiling,
    rotary: tuple[Tensor, Tensor] | None,
    extra: tuple[Tensor, Tensor, Tensor] | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Tile attention on a CUDA device, summed in float32; see `tile_attention`.

    Raises:
        ValueError: If the kernels do not support the call; the message says why.
    """
    reason = unsupported(query, value, rotary, placed.num_tiles)
    if reason is not None:
        raise UserError(f"implementation='fused' {reason}; use 'blockwise' or 'auto'")
    cos, sin = rotary if rotary is not None else (None, None)
    keys, values, mask = extra if extra is not None else (None, None, None)
    layout = *map(list, placed[:5]), placed.top, float(scale)
    packs = tile_pack(*(x.detach() for x in (query, key, value)), cos, sin, *layout)
    out, lse, _ = tile_attend(query, key, value, cos, sin, keys, values, mask, *layout, packs)
    return out, lse


def unsupported(
    query: Tensor, value: Tensor, rotary: tuple[Tensor, Tensor] | None, num_tiles: int
) -> str | None:
    """Why the kernels cannot run a call, or None if they can."""
    if num_tiles > MAX_TILES:
        return f"takes up to {MAX_TILES} tiles, found {num_tiles}"
    if query.shape[1] >= _MAX_TOKENS:
        return f"takes fewer than {_MAX_TOKENS} tokens, found {query.shape[1]}"
    sizes = query.shape[3], value.shape[3], 0
    return fused_limits.unsupported(query.device, query.dtype, *sizes, trains(rotary))


@torch.library.custom_op("mhla_gen::tile_pack", mutates_args=())
def tile_pack(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    grid: list[int],
    tiles: list[int],
    groups: list[int],
    reach: list[int],
    before: list[int],
    top: int,
    scale: float,
) -> list[Tensor]:
    """The tensors of `tile_form.Reads`, if both passes read them packed; else nothing.

    An operator of its own, so that recomputing that keeps the output of `tile_attend` can make
    these again.
    """
    call = _call(query, value, cos, sin, grid, tiles, groups, reach, before, top, scale)
    if not tile_gradients.both_pack(call):
        return []
    loop = tile_form.forward_loop(call)
    with torch.cuda.device_of(query):
        return [x for x in tile_form.read(query, key, value, call, loop) if x is not None]


@tile_pack.register_fake
def _(query, key, value, cos, sin, *options):
    call = _call(query, value, cos, sin, *options)
    if not tile_gradients.both_pack(call):
        return []
    loop, placed = tile_form.forward_loop(call), call.placed
    tiles = call.batch_heads, placed.num_tiles, call.slot_sizes["SLOTS"]
    groups = call.batch_heads, placed.num_groups, call.whole_blocks(loop.rows)
    packs = [query.new_empty((*groups, query.shape[3]))]
    packs += [x.new_empty((*tiles, x.shape[3])) for x in (key, value)]
    sizes = [(*n[:2], query.shape[3]) for n in (groups, tiles)] if placed.top > 0 else []
    sizes += [groups[:1], groups] if tile_form.takes_bound(query) else []
    return packs + [query.new_empty(size, dtype=torch.float32) for size in sizes]


@torch.library.custom_op("mhla_gen::tile_attend", mutates_args=())
def tile_attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    extra_key: Tensor | None,
    extra_value: Tensor | None,
    extra_mask: Tensor | None,
    grid: list[int],
    tiles: list[int],
    groups: list[int],
    reach: list[int],
    before: list[int],
    top: int,
    scale: float,
    packs: list[Tensor],
) -> tuple[Tensor, Tensor, Tensor]:
    """Output, log-sum-exp and lists, see `tile_form.tile_lists`; `packs` are those of `tile_pack`.

    With `packs`, `query`, `key` and `value` are not read and not kept: they get the gradients.
    """
    call = _call(query, value, cos, sin, grid, tiles, groups, reach, before, top, scale)
    with torch.cuda.device_of(query):
        return tile_form.forward(
            query,
            key,
            value,
            _extra(extra_key, extra_value, extra_mask),
            call,
            _reads(packs, call) if packs else None,
        )


@tile_attend.register_fake
def _(query, key, value, cos, sin, extra_key, extra_value, extra_mask, *options):
    *sizes, _scale, _packs = options
    placed = _placed(*sizes)
    batch, seq_len, heads, _ = query.shape
    return (
        value.new_empty(value.shape),
        query.new_empty((batch, heads, seq_len), dtype=torch.float32),
        query.new_empty((batch * heads, placed.num_groups, 2, placed.list_size), dtype=torch.int32),
    )


@torch.library.custom_op("mhla_gen::tile_attend_backward", mutates_args=())
def tile_attend_backward(
    grad: Tensor,
    grad_lse: Tensor | None,
    query: Tensor | None,
    key: Tensor | None,
    value: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    extra_key: Tensor | None,
    extra_value: Tensor | None,
    extra_mask: Tensor | None,
    out: Tensor,
    lse: Tensor,
    lists: Tensor,
    grid: list[int],
    tiles: list[int],
    groups: list[int],
    reach: list[int],
    before: list[int],
    top: int,
    scale: float,
    packs: list[Tensor],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of query, key, value and of extra keys and values; empty if there are none.

    Either `query`, `key` and `value` are given or, in `packs`, what `tile_pack` made of them.
    """
    like_query, like_key, like_value = _shaped(grad, query, key, value, packs)
    call = _call(like_query, like_value, cos, sin, grid, tiles, groups, reach, before, top, scale)
    with torch.cuda.device_of(grad):
        return tile_gradients.backward(
            grad,
            None if grad_lse is None else grad_lse.contiguous(),
            like_query,
            like_key,
            like_value,
            _extra(extra_key, extra_value, extra_mask),
            out,
            lse,
            lists,
            call,
            (packs[0], packs[1], packs[2]) if packs else None,
        )


@tile_attend_backward.register_fake
def _(grad, grad_lse, query, key, value, cos, sin, extra_key, extra_value, *options):
    query, key, value = _shaped(grad, query, key, value, options[-1])
    gradients = [x.new_empty(x.shape) for x in (query, key, value)]
    beside = [
        like.new_empty(0) if x is None else x.new_empty(x.shape)
        for x, like in ((extra_key, query), (extra_value, value))
    ]
    return *gradients, *beside


def _shaped(grad, query, key, value, packs) -> list[Tensor]:
    """Inputs, or tensors that have their shapes and nothing else."""
    if not packs:
        return [query, key, value]
    batch, seq_len, heads, _ = grad.shape
    return [x.new_empty(()).expand(batch, seq_len, heads, x.shape[3]) for x in packs]


def _setup(ctx, inputs, output):
    *tensors, ctx.options, packs = *inputs[:8], inputs[8:15], inputs[15]
    ctx.has_extra, ctx.num_packs = tensors[5] is not None, len(packs)
    if packs:
        tensors[:3] = [None] * 3
    ctx.save_for_backward(*tensors, *output, *packs[:3])
    ctx.mark_non_differentiable(output[2])
    ctx.set_materialize_grads(False)


def _backward(ctx, grad, grad_lse, _):
    nothing = (*(None,) * 15, [None] * ctx.num_packs)
    if grad is None and grad_lse is None:
        return nothing
    saved = ctx.saved_tensors
    if grad is None:
        grad = torch.zeros_like(saved[8])
    gradients = tile_attend_backward(grad, grad_lse, *saved[:11], *ctx.options, list(saved[11:]))
    beside = gradients[3:] if ctx.has_extra else (None, None)
    return *gradients[:3], None, None, *beside, *nothing[7:]


tile_attend.register_autograd(_backward, setup_context=_setup)


def _placed(grid, tiles, groups, reach, before, top) -> Tiling:
    return Tiling(tuple(grid), tuple(tiles), tuple(groups), tuple(reach), tuple(before), top)


def _call(query, value, cos, sin, grid, tiles, groups, reach, before, top, scale) -> TileCall:
    if cos is not None and sin is not None:
        cos, sin = cos.contiguous(), sin.contiguous()
    placed = _placed(grid, tiles, groups, reach, before, top)
    return TileCall(query, value, cos, sin, placed, scale)


def _reads(packs, call) -> tile_form.Reads:
    """What `tile_pack` has read."""
    queries, keys, values, *rest = packs
    means = rest[:2] if call.placed.top > 0 else (None, None)
    bound = rest[-2:] if tile_form.takes_bound(queries) else (None, None)
    return tile_form.Reads(queries, keys, values, *means, *bound)


def _extra(keys, values, mask) -> tuple[Tensor, Tensor, Tensor] | None:
    return None if keys is None else (keys, values, mask.contiguous())
