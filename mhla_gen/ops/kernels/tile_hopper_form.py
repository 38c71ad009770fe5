"""Launch of tile attention's kernel for Hopper; import it only where there is such a GPU."""

from dataclasses import dataclass

import torch
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from mhla_gen.ops.kernels.compiled import launch
from mhla_gen.ops.kernels.launch import padded
from mhla_gen.ops.kernels.tile_call import LOG2E, TileCall, three_axes
from mhla_gen.ops.kernels.tile_hopper import tile_attend_hopper_kernel
from mhla_gen.ops.kernels.tile_hopper_backward import tile_backward_queries_hopper_kernel

ROWS = 128
"""Queries of a program."""


@dataclass(frozen=True)
class Form:
    """Constants of a kernel."""

    stages: int
    """Steps of keys, and of values, in shared memory."""
    tiles: int = 1
    """Tiles of a step."""
    held: bool = False
    """Whether queries are held in registers."""
    persistent: bool = True
    """Whether a multiprocessor starts one program, which takes block after block."""


FORWARD, BACKWARD = Form(3), Form(3)


def attend(
    sources: tuple[Tensor, Tensor, Tensor, Tensor],
    longest: Tensor,
    results: tuple[Tensor, Tensor],
    call: TileCall,
    form: Form = FORWARD,
) -> Tensor:
    """As `tile_form.attend` with a bound; flags are those of programs of 64 queries."""
    queries, keys, values, lists = sources
    out, lse = results
    blocks = queries.shape[2] // ROWS
    items = blocks * call.placed.num_groups * call.batch_heads
    flags = lists.new_empty(items * 2)
    launch(
        tile_attend_hopper_kernel,
        (_programs(items, form, queries),),
        (
            _descriptor(queries, ROWS // 2),
            _descriptor(keys, keys.shape[2]),
            _descriptor(values, values.shape[2]),
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
            call.query.shape[1],
            call.query.shape[2],
            call.placed.num_groups,
            call.placed.num_tiles,
            items,
            call.placed.list_size,
            blocks,
            call.scale * LOG2E,
        ),
        {
            "V": call.value.shape[3],
            "BV": padded(values.shape[3]),
            "TILES": form.tiles,
            "STAGES": form.stages,
            **call.slot_sizes,
            "RAGGED": call.ragged,
            "RANK": call.rank,
            "Q_HELD": form.held,
            "num_warps": 4,
        },
    )
    return flags


def _programs(items: int, form: Form, x: Tensor) -> int:
    if not form.persistent or x.device.type != "cuda":
        return items
    return min(items, torch.cuda.get_device_properties(x.device).multi_processor_count)


def _descriptor(packed: Tensor, count: int) -> TensorDescriptor:
    rows = packed.flatten(0, -2)
    block = [count, padded(rows.shape[1])]
    layout = gl.NVMMASharedLayout.get_default_for(block, gl.bfloat16)
    return TensorDescriptor.from_tensor(rows, block, layout)


def backward_queries(
    packs: tuple[Tensor, ...],
    keys: Tensor,
    values: Tensor,
    lists: Tensor,
    call: TileCall,
    form: Form = BACKWARD,
) -> Tensor:
    """Gradients from packs as those of `tile_gradients.pack_queries`."""
    queries, grads, packed_lse, delta = packs
    dquery = call.query.new_empty(call.query.shape)
    blocks = queries.shape[2] // ROWS
    items = blocks * call.placed.num_groups * call.batch_heads
    launch(
        tile_backward_queries_hopper_kernel,
        (_programs(items, form, queries),),
        (
            _descriptor(queries, ROWS // 2),
            _descriptor(grads, ROWS // 2),
            _descriptor(keys, keys.shape[2]),
            _descriptor(values, values.shape[2]),
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
            "BV": padded(values.shape[3]),
            "STAGES": form.stages,
            **call.slot_sizes,
            "RAGGED": call.ragged,
            "RANK": call.rank,
            "ROTARY": call.cos is not None,
            "num_warps": 4,
        },
    )
    return dquery
