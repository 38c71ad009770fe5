"""Launch of tile attention's kernel for Hopper; import it only where there is such a GPU."""

import torch
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from mhla_gen.ops.kernels.compiled import launch
from mhla_gen.ops.kernels.tile_call import LOG2E, TileCall, three_axes
from mhla_gen.ops.kernels.tile_form import Loop
from mhla_gen.ops.kernels.tile_hopper import tile_attend_hopper_kernel
from mhla_gen.ops.kernels.tile_hopper_backward import tile_backward_queries_hopper_kernel


def attend(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    longest: Tensor,
    lists: Tensor,
    call: TileCall,
    loop: Loop,
) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp of packed queries `[batch · heads, groups, slots, dim]`."""
    batch, seq_len, heads, _ = call.query.shape
    out = call.value.new_empty(call.value.shape)
    lse = call.query.new_empty((batch, heads, seq_len), dtype=torch.float32)
    slots = call.slot_sizes["SLOTS"]
    blocks = queries.shape[2] // loop.rows
    items = blocks * call.placed.num_groups * call.batch_heads
    programs = items if "grid" in loop.packed else min(items, _multiprocessors(queries))
    flags = lists.new_empty(items * 2)
    launch(
        tile_attend_hopper_kernel,
        (programs,),
        (
            _descriptor(queries.flatten(0, 2), loop.rows // 2),
            _descriptor(keys.transpose(1, 2).flatten(0, 2), slots),
            _descriptor(values.transpose(1, 2).flatten(0, 2), slots),
            lists,
            longest,
            out,
            lse,
            flags,
        ),
        (
            out.stride(),
            call.box,
            three_axes(call.placed.groups),
            seq_len,
            heads,
            call.placed.num_groups,
            call.placed.num_tiles,
            items,
            call.placed.list_size,
            blocks,
            call.scale * LOG2E,
        ),
        {
            "V": call.value.shape[3],
            "BV": values.shape[3],
            "TILES": loop.keys // slots,
            "STAGES": loop.num_stages,
            **call.slot_sizes,
            "RAGGED": call.ragged,
            "RANK": call.rank,
            "Q_HELD": "held" in loop.packed,
            "num_warps": loop.num_warps,
        },
    )
    return out, lse


def _multiprocessors(x: Tensor) -> int:
    if x.device.type != "cuda":
        return 132
    return torch.cuda.get_device_properties(x.device).multi_processor_count


def _descriptor(rows: Tensor, count: int) -> TensorDescriptor:
    block = [count, rows.shape[1]]
    layout = gl.NVMMASharedLayout.get_default_for(block, gl.bfloat16)
    return TensorDescriptor.from_tensor(rows, block, layout)


def backward_queries(
    packs: tuple[Tensor, ...],
    keys: Tensor,
    values: Tensor,
    lists: Tensor,
    call: TileCall,
    loop: Loop,
) -> Tensor:
    """Gradients from packs as those of `tile_gradients.pack_queries`."""
    queries, grads, packed_lse, delta = packs
    dquery = call.query.new_empty(call.query.shape)
    slots = call.slot_sizes["SLOTS"]
    blocks = queries.shape[2] // loop.rows
    items = blocks * call.placed.num_groups * call.batch_heads
    launch(
        tile_backward_queries_hopper_kernel,
        (min(items, _multiprocessors(queries)),),
        (
            _descriptor(queries.flatten(0, 2), loop.rows // 2),
            _descriptor(grads.flatten(0, 2), loop.rows // 2),
            _descriptor(keys.transpose(1, 2).flatten(0, 2), slots),
            _descriptor(values.transpose(1, 2).flatten(0, 2), slots),
            lists,
            packed_lse,
            delta,
            call.cos,
            call.sin,
            dquery,
        ),
        (
            dquery.stride(),
            call.box,
            three_axes(call.placed.groups),
            call.query.shape[2],
            call.placed.num_groups,
            call.placed.num_tiles,
            items,
            call.placed.list_size,
            blocks,
            call.scale * LOG2E,
            call.scale,
        ),
        {
            "D": call.query.shape[3],
            "BV": values.shape[3],
            "STAGES": loop.num_stages,
            **call.slot_sizes,
            "RAGGED": call.ragged,
            "RANK": call.rank,
            "ROTARY": call.cos is not None,
            "num_warps": loop.num_warps,
        },
    )
    return dquery
