"""Tile attention, forward, for Hopper: matrix products overlap the softmax, and copies both.

One warp copies packed keys and values to shared memory, by tensor descriptors. Two groups of four
warps have 64 queries each: while a group computes the weights of a step, the tensor cores multiply
those of the step before with its values, and whatever the other group has queued. Written in Gluon,
Triton's language with explicit layouts and waits, since Triton does not schedule a loop like this.
"""

import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_init,
    warpgroup_mma_wait,
)

from mhla_gen.ops.kernels.boxes import box_tokens, group_box

# Releases after Triton 3.6 have other names for both.
barrier = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier
copy_rows = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared

_LN2 = tl.constexpr(0.6931471805599453)
_VANISHED = tl.constexpr(2.0**-60)


@gluon.jit
def tile_tokens(entry, SLOT_T: gl.constexpr, SLOT_H: gl.constexpr, SLOT_W: gl.constexpr):
    """Tokens of the tile that an entry names."""
    return (SLOT_T - entry // 4 % 2) * (SLOT_H - entry // 2 % 2) * (SLOT_W - entry % 2)


@gluon.jit
def fetch_tiles(
    desc, tiles_ptr, step, used, size, first, buffers, full, free, SLOTS: gl.constexpr,
    TILES: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Copy the tiles of a step, as soon as there is room; after a list's last tile, it again."""
    stage = used % STAGES
    bar = full.index(stage)
    buffer = buffers.index(stage)
    mbarrier.wait(free.index(stage), used // STAGES & 1 ^ 1)
    mbarrier.expect(bar, SLOTS * TILES * buffer.shape[1] * 2)
    for part in gl.static_range(TILES):
        tile = gl.load(tiles_ptr + gl.minimum(step * TILES + part, size - 1))
        rows = buffer if TILES == 1 else buffer.slice(part * SLOTS, SLOTS)
        copy_rows(desc, [first + tile * SLOTS, 0], bar, rows)


@gluon.jit
def produce(
    q_desc, k_desc, v_desc, q, k_tiles, v_tiles, q_full, k_full, v_full, q_free, k_free, v_free,
    lists_ptr, blocks, num_groups, num_tiles, num_items, size, SLOTS: gl.constexpr,
    TILES: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """One warp that copies queries, keys and values as room for them gets free."""
    PARTS: gl.constexpr = q.shape[0]
    ROWS: gl.constexpr = q.shape[1]
    steps = gl.cdiv(size, TILES)
    for item in range(gl.program_id(0), num_items, gl.num_programs(0)):
        turn = item // gl.num_programs(0)
        tiles_ptr = lists_ptr + (item // blocks).to(gl.int64) * (2 * size)
        first = item // blocks // num_groups * (num_tiles * SLOTS)
        mbarrier.wait(q_free, turn & 1 ^ 1)
        mbarrier.expect(q_full, PARTS * ROWS * q.shape[2] * 2)
        for part in gl.static_range(PARTS):
            rows = (item * PARTS + part) * ROWS
            copy_rows(q_desc, [rows, 0], q_full, q.index(part))
        # Values are needed a step later than keys.
        used = turn * steps
        for step in range(0, steps + 1):
            if step < steps:
                fetch_tiles(
                    k_desc, tiles_ptr, step, used + step, size, first, k_tiles, k_full, k_free,
                    SLOTS, TILES, STAGES,
                )  # fmt: skip
            if step > 0:
                fetch_tiles(
                    v_desc, tiles_ptr, step - 1, used + step - 1, size, first, v_tiles, v_full,
                    v_free, SLOTS, TILES, STAGES,
                )  # fmt: skip


@gluon.jit
def listed_tokens(
    tiles_ptr, step, size, TILES: gl.constexpr, SLOT_T: gl.constexpr, SLOT_H: gl.constexpr,
    SLOT_W: gl.constexpr,
):  # fmt: skip
    """Tokens of the tiles of a step, 0 after the last tile of a list."""
    first = tile_tokens(gl.load(tiles_ptr + size + step * TILES), SLOT_T, SLOT_H, SLOT_W)
    if TILES == 1:
        return first, first
    else:
        place = step * 2 + 1
        entry = gl.load(tiles_ptr + size + gl.minimum(place, size - 1))
        second = tile_tokens(entry, SLOT_T, SLOT_H, SLOT_W)
        return first, gl.where(place < size, second, 0)


@gluon.jit
def weights_of(
    scores, counts, shift, scale, SLOTS: gl.constexpr, TILES: gl.constexpr, RAGGED: gl.constexpr,
    LAYOUT: gl.constexpr,
):  # fmt: skip
    """Powers of scores less `shift`, zero for keys that are not there."""
    if RAGGED or TILES > 1:
        slots = gl.arange(0, SLOTS * TILES, gl.SliceLayout(0, LAYOUT))
        valid = slots < counts[0]
        if TILES == 2:
            valid = gl.where(slots < SLOTS, valid, slots - SLOTS < counts[1])
        scores = gl.where(valid[None, :], scores, float("-inf"))
    return gl.exp2(scores * scale - shift[:, None])


@gluon.jit
def consume(
    part: gl.constexpr, q_parts, k_tiles, v_tiles, q_full, k_full, v_full, q_free, k_free, v_free,
    lists_ptr, longest_ptr, out_ptr, lse_ptr, flags_ptr, out_strides, box, groups, seq_len,
    num_heads, num_groups, num_items, size, blocks, scale, V: gl.constexpr, SLOTS: gl.constexpr,
    TILES: gl.constexpr, STAGES: gl.constexpr, SLOT_T: gl.constexpr, SLOT_H: gl.constexpr,
    SLOT_W: gl.constexpr, RAGGED: gl.constexpr, RANK: gl.constexpr, Q_HELD: gl.constexpr,
):  # fmt: skip
    """Four warps that attend with one part of the queries."""
    PARTS: gl.constexpr = q_parts.shape[0]
    BM: gl.constexpr = q_parts.shape[1]
    BV: gl.constexpr = v_tiles.shape[2]
    BN: gl.constexpr = SLOTS * TILES
    S_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BN, 16])
    O_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BV, 16])
    P_LAYOUT: gl.constexpr = gl.DotOperandLayout(0, O_LAYOUT, 2)
    WIDE: gl.constexpr = gl.BlockedLayout([1, 8], [2, 16], [4, 1], [1, 0])
    Q_LAYOUT: gl.constexpr = gl.DotOperandLayout(0, S_LAYOUT, 2)
    nothing = gl.zeros([BM, BN], gl.float32, S_LAYOUT)
    steps = gl.cdiv(size, TILES)
    for item in range(gl.program_id(0), num_items, gl.num_programs(0)):
        turn = item // gl.num_programs(0)
        block = item % blocks
        group = item // blocks % num_groups
        row = item // blocks // num_groups
        tiles_ptr = lists_ptr + (item // blocks).to(gl.int64) * (2 * size)
        mbarrier.wait(q_full, turn & 1)
        # No score exceeds the product of norms.
        x = q_parts.index(part).load(WIDE).to(gl.float32)
        norms = gl.convert_layout(gl.sum(x * x, axis=1), gl.SliceLayout(1, S_LAYOUT))
        shift = gl.sqrt(norms * gl.load(longest_ptr + row)) * scale
        q = q_parts.index(part)
        if Q_HELD:
            q = q.load(Q_LAYOUT)

        # Weights of a step are multiplied with values in the next, behind the product of its keys.
        used = turn * steps
        counts = listed_tokens(tiles_ptr, 0, size, TILES, SLOT_T, SLOT_H, SLOT_W)
        slot = used % STAGES
        mbarrier.wait(k_full.index(slot), used // STAGES & 1)
        keys = k_tiles.index(slot).permute((1, 0))
        scores = warpgroup_mma(q, keys, nothing, use_acc=False)
        barrier()
        mbarrier.arrive(k_free.index(slot))
        powers = weights_of(scores, counts, shift, scale, SLOTS, TILES, RAGGED, S_LAYOUT)
        total = gl.sum(powers, axis=1)
        weights = gl.convert_layout(powers.to(gl.bfloat16), P_LAYOUT)
        running = warpgroup_mma_init(gl.zeros([BM, BV], gl.float32, O_LAYOUT))
        for step in range(1, steps):
            used = turn * steps + step
            slot, before, freed = used % STAGES, (used - 1) % STAGES, (used + STAGES - 2) % STAGES
            counts = listed_tokens(tiles_ptr, step, size, TILES, SLOT_T, SLOT_H, SLOT_W)
            mbarrier.wait(k_full.index(slot), used // STAGES & 1)
            keys = k_tiles.index(slot).permute((1, 0))
            scores = warpgroup_mma(q, keys, nothing, use_acc=False, is_async=True)
            acc = warpgroup_mma_wait(1, deps=[running])
            mbarrier.wait(v_full.index(before), (used - 1) // STAGES & 1)
            running = warpgroup_mma(weights, v_tiles.index(before), acc, is_async=True)
            scores = warpgroup_mma_wait(1, deps=[scores])
            barrier()
            mbarrier.arrive(k_free.index(slot))
            mbarrier.arrive(v_free.index(freed), pred=step > 1)
            powers = weights_of(scores, counts, shift, scale, SLOTS, TILES, RAGGED, S_LAYOUT)
            total += gl.sum(powers, axis=1)
            weights = gl.convert_layout(powers.to(gl.bfloat16), P_LAYOUT)
        used = turn * steps + steps - 1
        slot = used % STAGES
        acc = warpgroup_mma_wait(0, deps=[running])
        barrier()
        mbarrier.arrive(q_free)
        mbarrier.wait(v_full.index(slot), used // STAGES & 1)
        acc = warpgroup_mma(weights, v_tiles.index(slot), acc)
        barrier()
        mbarrier.arrive(v_free.index((used + STAGES - 1) % STAGES), pred=steps > 1)
        mbarrier.arrive(v_free.index(slot))

        first_t, first_h, first_w, size_t, size_h, size_w = group_box(group, box, groups, RANK)
        first_slot = (block * PARTS + part) * BM
        slots = first_slot + gl.arange(0, BM, gl.SliceLayout(1, S_LAYOUT))
        exists = slots < size_t * size_h * size_w
        lost = gl.min(gl.where(exists, total, 1.0), axis=0) < _VANISHED
        gl.store(flags_ptr + item * PARTS + part, lost.to(gl.int32))
        tokens = box_tokens(slots, first_t, first_h, first_w, size_h, size_w, box[1], box[2], RANK)
        places = lse_ptr + row.to(gl.int64) * seq_len + tokens
        gl.store(places, (shift + gl.log2(total)) * _LN2, mask=exists)
        out = acc * gl.convert_layout(1 / total, gl.SliceLayout(1, O_LAYOUT))[:, None]
        out = gl.convert_layout(out.to(gl.bfloat16), WIDE)
        slots = first_slot + gl.arange(0, BM, gl.SliceLayout(1, WIDE))
        exists = slots < size_t * size_h * size_w
        tokens = box_tokens(slots, first_t, first_h, first_w, size_h, size_w, box[1], box[2], RANK)
        channels = gl.arange(0, BV, gl.SliceLayout(0, WIDE))
        places = out_ptr + (row // num_heads).to(gl.int64) * out_strides[0]
        places += (row % num_heads).to(gl.int64) * out_strides[2]
        offsets = gl.multiple_of(tokens * out_strides[1], 8)[:, None] + channels[None, :]
        gl.store(places + offsets, out, mask=exists[:, None] & (channels < V)[None, :])


@gluon.jit
def tile_attend_hopper_kernel(
    q_desc,
    k_desc,
    v_desc,
    lists_ptr,
    longest_ptr,
    out_ptr,
    lse_ptr,
    flags_ptr,
    out_strides,
    box,
    groups,
    seq_len,
    num_heads,
    num_groups,
    num_tiles,
    num_items,
    list_size,
    blocks,
    scale,
    V: gl.constexpr,
    BV: gl.constexpr,
    TILES: gl.constexpr,
    STAGES: gl.constexpr,
    SLOTS: gl.constexpr,
    SLOT_T: gl.constexpr,
    SLOT_H: gl.constexpr,
    SLOT_W: gl.constexpr,
    RAGGED: gl.constexpr,
    RANK: gl.constexpr,
    Q_HELD: gl.constexpr,
):
    """Output and log-sum-exp of blocks of 128 queries of a group and head; inputs are packed.

    Each program takes every n-th block, n being the number of programs. A flag of each half of a
    block tells where weights have vanished, since the bound of scores is far too large.
    """
    PARTS: gl.constexpr = 2
    BM: gl.constexpr = q_desc.block_type.shape[0]
    BD: gl.constexpr = q_desc.block_type.shape[1]
    q = gl.allocate_shared_memory(gl.bfloat16, [PARTS, BM, BD], q_desc.layout)
    k_tiles = gl.allocate_shared_memory(gl.bfloat16, [STAGES, SLOTS * TILES, BD], k_desc.layout)
    v_tiles = gl.allocate_shared_memory(gl.bfloat16, [STAGES, SLOTS * TILES, BV], v_desc.layout)
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
                consume,
                (
                    0, q, k_tiles, v_tiles, q_full, k_full, v_full, q_free, k_free, v_free,
                    lists_ptr, longest_ptr, out_ptr, lse_ptr, flags_ptr, out_strides, box, groups,
                    seq_len, num_heads, num_groups, num_items, list_size, blocks, scale, V, SLOTS,
                    TILES, STAGES, SLOT_T, SLOT_H, SLOT_W, RAGGED, RANK, Q_HELD,
                ),
            ),
            (
                consume,
                (
                    1, q, k_tiles, v_tiles, q_full, k_full, v_full, q_free, k_free, v_free,
                    lists_ptr, longest_ptr, out_ptr, lse_ptr, flags_ptr, out_strides, box, groups,
                    seq_len, num_heads, num_groups, num_items, list_size, blocks, scale, V, SLOTS,
                    TILES, STAGES, SLOT_T, SLOT_H, SLOT_W, RAGGED, RANK, Q_HELD,
                ),
            ),
            (
                produce,
                (
                    q_desc, k_desc, v_desc, q, k_tiles, v_tiles, q_full, k_full, v_full, q_free,
                    k_free, v_free, lists_ptr, blocks, num_groups, num_tiles, num_items, list_size,
                    SLOTS, TILES, STAGES,
                ),
            ),
        ],
        [4, 1],
        [240, 24],
    )  # fmt: skip
