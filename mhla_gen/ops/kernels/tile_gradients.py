"""Launches of tile attention's backward."""

import torch
import triton.language as tl
from torch import Tensor

from mhla_gen.ops.kernels import tile_form
from mhla_gen.ops.kernels.compiled import launch
from mhla_gen.ops.kernels.launch import alignment, padded, quotient_up
from mhla_gen.ops.kernels.tile_backward import (
    prepare_kernel,
    tile_backward_extra_kernel,
    tile_backward_keys_kernel,
    tile_backward_queries_kernel,
)
from mhla_gen.ops.kernels.tile_call import (
    LOG2E,
    Extra,
    TileCall,
    extra_strides,
    extra_tensors,
    kernel_constants,
    numbered_wide,
    without,
)
from mhla_gen.ops.kernels.tile_form import Loop, descriptor, few_queries, worth_packing
from mhla_gen.ops.kernels.tile_keys import tile_backward_packed_keys_kernel
from mhla_gen.ops.kernels.tile_owners import owners_of_tiles
from mhla_gen.ops.kernels.tile_reads import pack_tiles, read_groups, read_tiles

# Parts of all queries that gradients of few keys off the grid are summed in.
_ENOUGH_PROGRAMS = 512


def backward(
    grad: Tensor,
    grad_lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    extra: Extra | None,
    out: Tensor,
    lse: Tensor,
    lists: Tensor,
    call: TileCall,
    packed: tuple[Tensor, Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of query, key, value, and of the keys and values of `extra` (empty without).

    With `packed`, what the forward pass packed of them, `query`, `key` and `value` are not read.
    """
    loop = queries_loop(call)
    options = _backward_options(call, loop)
    if packed is None:
        queries, _, _ = read_groups(query, call, slots=call.whole_blocks(loop.rows))
        keys, _, _ = read_tiles(key, call, pack=loop.packed)
        values = pack_tiles(value, call) if loop.packed else value
    else:
        queries, keys, values = packed
    packs = pack_queries(queries, grad, grad_lse, out, lse, call, loop.rows)
    dquery = backward_queries(packs, keys, values, lists, extra, call, loop)
    owners = owners_of_tiles(lists, call.placed.num_tiles)
    gradients = backward_packed_keys if loop.packed else backward_keys
    dkey, dvalue = gradients(packs, keys, values, owners, options["keys"], call)
    dextra = _backward_extra(packs, extra, options["extra"], call)
    return dquery, dkey, dvalue, *dextra


def pack_queries(
    queries: Tensor,
    grad: Tensor,
    grad_lse: Tensor | None,
    out: Tensor,
    lse: Tensor,
    call: TileCall,
    rows: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Packed rotated queries, and do, lse in units of log 2 and δ, packed in the same way."""
    placed, slots = call.placed, queries.shape[2]
    blocks = slots // rows
    grads = grad.new_empty((call.batch_heads, placed.num_groups, slots, grad.shape[3]))
    packed_lse = lse.new_empty((call.batch_heads, placed.num_groups, slots))
    delta = torch.empty_like(packed_lse)
    strides = grad.stride(), out.stride()
    launch(
        prepare_kernel,
        (blocks * placed.num_groups * call.batch_heads,),
        (grad, out, lse, grad_lse, grads, packed_lse, delta),
        (
            *strides,
            call.box,
            call.groups,
            call.query.shape[1],
            call.query.shape[2],
            placed.num_groups,
            blocks,
        ),
        {
            **{name: call.pieces[name] for name in ("V", "V0", "V1")},
            "BM": rows,
            "RANK": call.rank,
            "ALIGN": alignment(*strides),
            "num_warps": max(1, rows // 32),
        },
    )
    return queries, grads, packed_lse, delta


def backward_queries(
    packs: tuple[Tensor, ...],
    keys: Tensor,
    values: Tensor,
    lists: Tensor,
    extra: Extra | None,
    call: TileCall,
    loop: Loop,
) -> Tensor:
    """Launch `tile_backward_queries_kernel` on packs of queries and on rotated keys."""
    placed = call.placed
    blocks = packs[0].shape[2] // loop.rows
    dquery = call.query.new_empty(call.query.shape)
    read, strides = (keys, values), (keys.stride(), values.stride())
    if loop.packed:
        read = descriptor(keys, loop.keys), descriptor(values, loop.keys)
        strides = ((0, 0, 0, 0),) * 2
    strides = *strides, dquery.stride(), *extra_strides(extra)
    launch(
        tile_backward_queries_kernel,
        (blocks * placed.num_groups * call.batch_heads,),
        (*packs, *read, call.cos, call.sin, lists, *extra_tensors(extra), dquery),
        (
            *strides,
            call.box,
            call.groups,
            call.query.shape[2],
            placed.num_groups,
            placed.num_tiles,
            placed.list_size,
            0 if extra is None else extra[0].shape[1],
            blocks,
            call.scale * LOG2E,
            call.scale,
        ),
        kernel_constants(call, loop.options, *strides)
        | {
            "WIDE": numbered_wide(*packs[:2]) or (not loop.packed and numbered_wide(keys, values)),
            "PACKED": loop.packed,
        },
    )
    return dquery


def backward_keys(
    packs: tuple[Tensor, ...],
    keys: Tensor,
    value: Tensor,
    owners: tuple[Tensor, Tensor],
    options: dict,
    call: TileCall,
) -> tuple[Tensor, Tensor]:
    """Launch `tile_backward_keys_kernel`."""
    dkey, dvalue = call.query.new_empty(call.query.shape), call.value.new_empty(call.value.shape)
    num_tiles = call.placed.num_tiles
    blocks = quotient_up(call.slots, options["BN"])
    strides = keys.stride(), value.stride(), dkey.stride(), dvalue.stride()
    constants = without(
        kernel_constants(call, options, *strides), "RAGGED", "TAIL", *call.slot_sizes
    )
    launch(
        tile_backward_keys_kernel,
        (blocks * num_tiles * call.batch_heads,),
        (*packs, keys, value, call.cos, call.sin, *owners, dkey, dvalue),
        (
            *strides,
            call.box,
            call.query.shape[2],
            num_tiles,
            call.placed.num_groups,
            blocks,
            call.scale * LOG2E,
            call.scale,
        ),
        constants | {"PACK": packs[0].shape[2], "WIDE": numbered_wide(*packs[:2])},
    )
    return dkey, dvalue


def backward_packed_keys(
    packs: tuple[Tensor, ...],
    keys: Tensor,
    values: Tensor,
    owners: tuple[Tensor, Tensor],
    options: dict,
    call: TileCall,
) -> tuple[Tensor, Tensor]:
    """Launch `tile_backward_packed_keys_kernel`."""
    dkey, dvalue = call.query.new_empty(call.query.shape), call.value.new_empty(call.value.shape)
    num_tiles, slots = call.placed.num_tiles, call.slot_sizes["SLOTS"]
    queries, grads, *sums = packs
    strides = dkey.stride(), dvalue.stride()
    constants = without(
        kernel_constants(call, options, *strides), "RAGGED", "TAIL", "SLOT_T", "SLOT_H", "SLOT_W"
    )
    launch(
        tile_backward_packed_keys_kernel,
        (slots // options["BN"] * num_tiles * call.batch_heads,),
        (
            *(descriptor(x, options["BM"]) for x in (queries, grads)),
            *sums,
            *(descriptor(x, options["BN"]) for x in (keys, values)),
            call.cos,
            call.sin,
            *owners,
            dkey,
            dvalue,
        ),
        (
            *strides,
            call.box,
            call.query.shape[2],
            num_tiles,
            call.placed.num_groups,
            call.scale * LOG2E,
            call.scale,
        ),
        constants | {"PACK": queries.shape[2]},
    )
    return dkey, dvalue


def _backward_extra(
    packs: tuple[Tensor, ...], extra: Extra | None, options: dict, call: TileCall
) -> tuple[Tensor, Tensor]:
    if extra is None:
        return call.query.new_empty(0), call.value.new_empty(0)
    keys, values, mask = extra
    batch, extra_len, heads, _ = keys.shape
    extra_blocks = quotient_up(extra_len, options["BN"])
    num_blocks = call.placed.num_groups * packs[0].shape[2] // options["BM"]
    parts = max(1, min(_ENOUGH_PROGRAMS // (extra_blocks * batch * heads), num_blocks))
    part_blocks = quotient_up(num_blocks, parts)
    parts = quotient_up(num_blocks, part_blocks)
    dkey, dvalue = (
        x.new_empty((parts, batch, extra_len, heads, x.shape[3]), dtype=torch.float32)
        for x in (keys, values)
    )
    constants = without(
        kernel_constants(call, options, *extra_strides(extra)),
        "RAGGED", "TAIL", "RANK", "ROTARY", *call.slot_sizes,
    )  # fmt: skip
    launch(
        tile_backward_extra_kernel,
        (parts * batch * heads * extra_blocks,),
        (*packs, keys, values, mask, dkey, dvalue),
        (
            *extra_strides(extra),
            heads,
            batch,
            extra_len,
            extra_blocks,
            num_blocks,
            part_blocks,
            call.scale * LOG2E,
            call.scale,
        ),
        constants | {"WIDE": numbered_wide(*packs[:2])},
    )
    return dkey.sum(dim=0).to(keys.dtype), dvalue.sum(dim=0).to(values.dtype)


def queries_loop(call: TileCall) -> Loop:
    """As `forward_loop`, for gradients of queries."""
    if call.operand["OPERAND"] == tl.float32:
        return Loop(call.block(32), 32, 4, 1)
    if worth_packing(call) and call.block(128) == 128:
        return Loop(128, 64, 8, 3, packed=True)
    rows, dim = call.block(64), max(call.query.shape[3], call.value.shape[3])
    return few_queries(rows, dim) if rows <= 32 else Loop(rows, 64, 4, 2)


def both_pack(call: TileCall) -> bool:
    """Whether both passes read the same packs."""
    return tile_form.forward_loop(call).packed and queries_loop(call).packed


def _backward_options(call: TileCall, loop: Loop) -> dict[str, dict]:
    """As `forward_loop`, for gradients of keys on and off the grid; `loop` is that of queries.

    Packs have blocks of `loop.rows`, of which a step takes all or a part, if it copies them whole.
    """
    single = call.operand["OPERAND"] == tl.float32
    rows, most = loop.rows, 32 if single else 64
    keys = min(padded(call.slots), most)
    warps = max(1, min(4, keys * max(call.pieces["D"], call.pieces["V"]) // 1024))
    return {
        "keys": {
            "BM": min(rows, most) if loop.packed else max(32, min(rows, most)),
            "BN": min(keys, call.slot_sizes["SLOTS"]) if loop.packed else keys,
            # Few keys need no more warps: they would wait for one another's weights.
            "num_warps": 4 if single else warps,
            "num_stages": 1 if single else 2,
        },
        "extra": {
            "BM": min(rows, most),
            "BN": most,
            "num_warps": 4,
            "num_stages": 1 if single else 2,
        },
    }
