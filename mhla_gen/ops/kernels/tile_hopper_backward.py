"""Tile attention, gradients of queries, for Hopper; see `tile_hopper.py`."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from mhla_gen.ops.kernels.boxes import box_tokens, group_box
from mhla_gen.ops.kernels.tile_hopper import barrier, copy_rows, fetch_tiles, tile_tokens


@gluon.jit
def produce_backward(
    q_desc, do_desc, k_desc, v_desc, q, do, k_tiles, v_tiles, q_full, k_full, v_full, q_free,
    k_free, v_free, lists_ptr, blocks, num_groups, num_tiles, num_items, size,
    SLOTS: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """One warp that copies queries, do, keys and values as room for them gets free."""
    PARTS: gl.constexpr = q.shape[0]
    ROWS: gl.constexpr = q.shape[1]
    for item in range(gl.program_id(0), num_items, gl.num_programs(0)):
        turn = item // gl.num_programs(0)
        tiles_ptr = lists_ptr + (item // blocks).to(gl.int64) * (2 * size)
        first = item // blocks // num_groups * (num_tiles * SLOTS)
        mbarrier.wait(q_free, turn & 1 ^ 1)
        mbarrier.expect(q_full, PARTS * ROWS * (q.shape[2] + do.shape[2]) * 2)
        for part in gl.static_range(PARTS):
            rows = (item * PARTS + part) * ROWS
            copy_rows(q_desc, [rows, 0], q_full, q.index(part))
            copy_rows(do_desc, [rows, 0], q_full, do.index(part))
        for step in range(0, size):
            used = turn * size + step
            fetch_tiles(
                k_desc, tiles_ptr, step, used, size, first, k_tiles, k_full, k_free,
                SLOTS, 1, STAGES,
            )  # fmt: skip
            fetch_tiles(
                v_desc, tiles_ptr, step, used, size, first, v_tiles, v_full, v_free,
                SLOTS, 1, STAGES,
            )  # fmt: skip


@gluon.jit
def consume_backward(
    part: gl.constexpr, q_parts, do_parts, k_tiles, v_tiles, q_full, k_full, v_full, q_free,
    k_free, v_free, lists_ptr, lse_ptr, delta_ptr, cos_ptr, sin_ptr, dq_ptr, dq_strides, box,
    groups, num_heads, num_groups, num_items, size, blocks, scale, factor, D: gl.constexpr,
    SLOTS: gl.constexpr, STAGES: gl.constexpr, SLOT_T: gl.constexpr, SLOT_H: gl.constexpr,
    SLOT_W: gl.constexpr, RAGGED: gl.constexpr, RANK: gl.constexpr, ROTARY: gl.constexpr,
):  # fmt: skip
    """Four warps that sum dq of one part of the queries."""
    PARTS: gl.constexpr = q_parts.shape[0]
    BM: gl.constexpr = q_parts.shape[1]
    BD: gl.constexpr = q_parts.shape[2]
    S_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, SLOTS, 16])
    O_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BD, 16])
    P_LAYOUT: gl.constexpr = gl.DotOperandLayout(0, O_LAYOUT, 2)
    WIDE: gl.constexpr = gl.BlockedLayout([1, 8], [2, 16], [4, 1], [1, 0])
    nothing = gl.zeros([BM, SLOTS], gl.float32, S_LAYOUT)
    q, do = q_parts.index(part), do_parts.index(part)
    for item in range(gl.program_id(0), num_items, gl.num_programs(0)):
        turn = item // gl.num_programs(0)
        block = item % blocks
        group = item // blocks % num_groups
        row = item // blocks // num_groups
        tiles_ptr = lists_ptr + (item // blocks).to(gl.int64) * (2 * size)
        rows = gl.arange(0, BM, gl.SliceLayout(1, S_LAYOUT))
        places = (item * PARTS + part).to(gl.int64) * BM + rows
        lse = gl.load(lse_ptr + places)[:, None]
        delta = gl.load(delta_ptr + places)[:, None]
        ds = gl.zeros([BM, SLOTS], gl.bfloat16, P_LAYOUT)
        dq = gl.zeros([BM, BD], gl.float32, O_LAYOUT)
        mbarrier.wait(q_full, turn & 1)
        for step in range(0, size):
            used = turn * size + step
            slot, before = used % STAGES, (turn * size + gl.maximum(step - 1, 0)) % STAGES
            count = tile_tokens(gl.load(tiles_ptr + size + step), SLOT_T, SLOT_H, SLOT_W)
            mbarrier.wait(k_full.index(slot), used // STAGES & 1)
            keys = k_tiles.index(slot).permute((1, 0))
            scores = warpgroup_mma(q, keys, nothing, use_acc=False, is_async=True)
            # ds of a step is multiplied with keys in the next; it is zero before the first.
            running = warpgroup_mma(ds, k_tiles.index(before), dq, is_async=True)
            mbarrier.wait(v_full.index(slot), used // STAGES & 1)
            values = v_tiles.index(slot).permute((1, 0))
            products = warpgroup_mma(do, values, nothing, use_acc=False, is_async=True)
            scores = warpgroup_mma_wait(2, deps=[scores])
            weights = gl.exp2(scores * scale - lse)
            if RAGGED:
                valid = gl.arange(0, SLOTS, gl.SliceLayout(0, S_LAYOUT)) < count
                weights = gl.where(valid[None, :], weights, 0.0)
            dq, products = warpgroup_mma_wait(0, deps=[running, products])
            barrier()
            mbarrier.arrive(v_free.index(slot))
            mbarrier.arrive(k_free.index(before), pred=step > 0)
            ds = gl.convert_layout((weights * (products - delta)).to(gl.bfloat16), P_LAYOUT)
        mbarrier.arrive(q_free)
        last = turn * size + size - 1
        dq = warpgroup_mma(ds, k_tiles.index(last % STAGES), dq)
        barrier()
        mbarrier.arrive(k_free.index(last % STAGES))

        first_t, first_h, first_w, size_t, size_h, size_w = group_box(group, box, groups, RANK)
        first_slot = (block * PARTS + part) * BM
        dq = dq * factor
        if ROTARY:
            even, odd = gl.split(gl.reshape(dq, (BM, BD // 2, 2)))
            PAIRS: gl.constexpr = even.type.layout
            slots = first_slot + gl.arange(0, BM, gl.SliceLayout(1, PAIRS))
            exists = slots < size_t * size_h * size_w
            tokens = box_tokens(
                slots, first_t, first_h, first_w, size_h, size_w, box[1], box[2], RANK
            )
            pairs = gl.arange(0, BD // 2, gl.SliceLayout(0, PAIRS))
            places = tokens[:, None] * (D // 2) + pairs[None, :]
            mask = exists[:, None] & (pairs < D // 2)[None, :]
            cos = gl.load(cos_ptr + places, mask=mask, other=0.0).to(gl.float32)
            sin = gl.load(sin_ptr + places, mask=mask, other=0.0).to(gl.float32)
            turned = gl.join(even * cos + odd * sin, odd * cos - even * sin)
            dq = gl.convert_layout(gl.reshape(turned, (BM, BD)), O_LAYOUT)
        wide = gl.convert_layout(dq.to(gl.bfloat16), WIDE)
        slots = first_slot + gl.arange(0, BM, gl.SliceLayout(1, WIDE))
        exists = slots < size_t * size_h * size_w
        tokens = box_tokens(slots, first_t, first_h, first_w, size_h, size_w, box[1], box[2], RANK)
        channels = gl.arange(0, BD, gl.SliceLayout(0, WIDE))
        start = dq_ptr + (row // num_heads).to(gl.int64) * dq_strides[0]
        start += (row % num_heads).to(gl.int64) * dq_strides[2]
        offsets = gl.multiple_of(tokens * dq_strides[1], 8)[:, None] + channels[None, :]
        gl.store(start + offsets, wide, mask=exists[:, None] & (channels < D)[None, :])


@gluon.jit
def tile_backward_queries_hopper_kernel(
    q_desc,
    do_desc,
    k_desc,
    v_desc,
    lists_ptr,
    lse_ptr,
    delta_ptr,
    cos_ptr,
    sin_ptr,
    dq_ptr,
    dq_strides,
    box,
    groups,
    num_heads,
    num_groups,
    num_tiles,
    num_items,
    list_size,
    blocks,
    scale,
    factor,
    D: gl.constexpr,
    BV: gl.constexpr,
    STAGES: gl.constexpr,
    SLOTS: gl.constexpr,
    SLOT_T: gl.constexpr,
    SLOT_H: gl.constexpr,
    SLOT_W: gl.constexpr,
    RAGGED: gl.constexpr,
    RANK: gl.constexpr,
    ROTARY: gl.constexpr,
):
    """As `tile_backward_queries_kernel`, of blocks of 128 queries; all inputs are packed."""
    PARTS: gl.constexpr = 2
    BM: gl.constexpr = q_desc.block_type.shape[0]
    BD: gl.constexpr = q_desc.block_type.shape[1]
    q = gl.allocate_shared_memory(gl.bfloat16, [PARTS, BM, BD], q_desc.layout)
    do = gl.allocate_shared_memory(gl.bfloat16, [PARTS, BM, BV], do_desc.layout)
    k_tiles = gl.allocate_shared_memory(gl.bfloat16, [STAGES, SLOTS, BD], k_desc.layout)
    v_tiles = gl.allocate_shared_memory(gl.bfloat16, [STAGES, SLOTS, BV], v_desc.layout)
    q_full = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    q_free = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    k_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    mbarrier.init(q_full, count=1)
    mbarrier.init(q_free, count=PARTS)
    for stage in gl.static_range(STAGES):
        mbarrier.init(k_full.index(stage), count=1)
        mbarrier.init(v_full.index(stage), count=1)
        mbarrier.init(k_free.index(stage), count=PARTS)
        mbarrier.init(v_free.index(stage), count=PARTS)
    barrier()
    gl.warp_specialize(
        [
            (
                consume_backward,
                (
                    0, q, do, k_tiles, v_tiles, q_full, k_full, v_full, q_free, k_free, v_free,
                    lists_ptr, lse_ptr, delta_ptr, cos_ptr, sin_ptr, dq_ptr, dq_strides, box,
                    groups, num_heads, num_groups, num_items, list_size, blocks, scale, factor, D,
                    SLOTS, STAGES, SLOT_T, SLOT_H, SLOT_W, RAGGED, RANK, ROTARY,
                ),
            ),
            (
                consume_backward,
                (
                    1, q, do, k_tiles, v_tiles, q_full, k_full, v_full, q_free, k_free, v_free,
                    lists_ptr, lse_ptr, delta_ptr, cos_ptr, sin_ptr, dq_ptr, dq_strides, box,
                    groups, num_heads, num_groups, num_items, list_size, blocks, scale, factor, D,
                    SLOTS, STAGES, SLOT_T, SLOT_H, SLOT_W, RAGGED, RANK, ROTARY,
                ),
            ),
            (
                produce_backward,
                (
                    q_desc, do_desc, k_desc, v_desc, q, do, k_tiles, v_tiles, q_full, k_full,
                    v_full, q_free, k_free, v_free, lists_ptr, blocks, num_groups, num_tiles,
                    num_items, list_size, SLOTS, STAGES,
                ),
            ),
        ],
        [4, 1],
        [240, 24],
    )  # fmt: skip
