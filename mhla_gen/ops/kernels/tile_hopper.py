"""Tile attention, forward, for Hopper: matrix products overlap the softmax.

A program multiplies queries with the keys of a tile while it multiplies the weights and values of
the tile before, and computes weights while the latter product still runs. Queries, keys and values
are packed, and copied to shared memory by tensor descriptors. Written in Gluon, Triton's language
with explicit layouts and waits, since Triton does not schedule a loop like this.
"""

import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from mhla_gen.ops.kernels.boxes import box_tokens, group_box

_LN2 = tl.constexpr(0.6931471805599453)
_VANISHED = tl.constexpr(2.0**-60)


@gluon.jit
def fetch(desc, row, full, buffer, bytes: gl.constexpr, wanted):
    """Start to copy a tile into shared memory."""
    mbarrier.expect(full, bytes, pred=wanted)
    tma.async_copy_global_to_shared(desc, [row, 0], full, buffer, pred=wanted)


@gluon.jit
def tile_tokens(entry, SLOT_T: gl.constexpr, SLOT_H: gl.constexpr, SLOT_W: gl.constexpr):
    """Tokens of the tile that an entry names."""
    return (SLOT_T - entry // 4 % 2) * (SLOT_H - entry // 2 % 2) * (SLOT_W - entry % 2)


@gluon.jit
def scores_of(q, k, BM: gl.constexpr, BN: gl.constexpr, LAYOUT: gl.constexpr):
    """Start the product of queries and a tile of keys."""
    zero = gl.zeros([BM, BN], gl.float32, LAYOUT)
    return warpgroup_mma(q, k.permute((1, 0)), zero, use_acc=False, is_async=True)


@gluon.jit
def masked(scores, count, BN: gl.constexpr, LAYOUT: gl.constexpr):
    """Scores, -∞ for keys from `count` on."""
    valid = gl.arange(0, BN, gl.SliceLayout(0, LAYOUT)) < count
    return gl.where(valid[None, :], scores, float("-inf"))


@gluon.jit
def attend_to_list(
    q,
    k_tiles,
    v_tiles,
    k_desc,
    v_desc,
    k_full,
    v_full,
    k_done,
    v_done,
    tiles_ptr,
    size,
    first,
    shift,
    scale,
    BM: gl.constexpr,
    BN: gl.constexpr,
    V: gl.constexpr,
    STAGES: gl.constexpr,
    SLOT_T: gl.constexpr,
    SLOT_H: gl.constexpr,
    SLOT_W: gl.constexpr,
    RAGGED: gl.constexpr,
    S_LAYOUT: gl.constexpr,
    O_LAYOUT: gl.constexpr,
    K_BYTES: gl.constexpr,
    V_BYTES: gl.constexpr,
):
    """Sums over a list. Scores of a tile are multiplied while the values of the one before are."""
    P_LAYOUT: gl.constexpr = gl.DotOperandLayout(0, O_LAYOUT, 2)
    for ahead in gl.static_range(STAGES):
        row = first + gl.load(tiles_ptr + gl.minimum(ahead, size - 1)) * BN
        k_slot, v_slot = (k_done + ahead) % STAGES, (v_done + ahead) % STAGES
        fetch(k_desc, row, k_full.index(k_slot), k_tiles.index(k_slot), K_BYTES, ahead < size)
        fetch(v_desc, row, v_full.index(v_slot), v_tiles.index(v_slot), V_BYTES, ahead < size)
    # Numbers are read a step ahead.
    next_k = gl.load(tiles_ptr + gl.minimum(STAGES, size - 1))
    next_v = next_k
    count = tile_tokens(gl.load(tiles_ptr + size), SLOT_T, SLOT_H, SLOT_W)
    acc = gl.zeros([BM, V], gl.float32, O_LAYOUT)
    total = gl.zeros([BM], gl.float32, gl.SliceLayout(1, S_LAYOUT))
    weights = gl.zeros([BM, BN], gl.bfloat16, P_LAYOUT)
    for step in range(0, size):
        k_row, v_row = first + next_k * BN, first + next_v * BN
        next_v = gl.load(tiles_ptr + gl.minimum(step + STAGES - 1, size - 1))
        next_k = gl.load(tiles_ptr + gl.minimum(step + STAGES + 1, size - 1))
        entry = gl.load(tiles_ptr + size + gl.minimum(step + 1, size - 1))
        k_slot = (k_done + step) % STAGES
        mbarrier.wait(k_full.index(k_slot), (k_done + step) // STAGES & 1)
        scores = scores_of(q, k_tiles.index(k_slot), BM, BN, S_LAYOUT)
        # In the first step, weights are still zero.
        v_step = v_done + gl.maximum(step - 1, 0)
        mbarrier.wait(v_full.index(v_step % STAGES), v_step // STAGES & 1)
        running = warpgroup_mma(weights, v_tiles.index(v_step % STAGES), acc, is_async=True)
        scores = warpgroup_mma_wait(1, deps=[scores])
        # Now all warps are through with these keys, and with the values two steps ago.
        gl.thread_barrier()
        v_slot = (v_done + step + STAGES - 2) % STAGES
        more_k, more_v = step + STAGES < size, (step > 1) & (step + STAGES - 2 < size)
        k_bar, v_bar = k_full.index(k_slot), v_full.index(v_slot)
        mbarrier.expect(k_bar, K_BYTES, pred=more_k)
        mbarrier.expect(v_bar, V_BYTES, pred=more_v)
        tma.async_copy_global_to_shared(
            k_desc, [k_row, 0], k_bar, k_tiles.index(k_slot), pred=more_k
        )
        tma.async_copy_global_to_shared(
            v_desc, [v_row, 0], v_bar, v_tiles.index(v_slot), pred=more_v
        )
        if RAGGED:
            scores = masked(scores, count, BN, S_LAYOUT)
        count = tile_tokens(entry, SLOT_T, SLOT_H, SLOT_W)
        powers = gl.exp2(scores * scale - shift[:, None])
        total += gl.sum(powers, axis=1)
        following = gl.convert_layout(powers.to(gl.bfloat16), P_LAYOUT)
        acc = warpgroup_mma_wait(0, deps=[running])
        weights = following
    v_slot = (v_done + size - 1) % STAGES
    mbarrier.wait(v_full.index(v_slot), (v_done + size - 1) // STAGES & 1)
    acc = warpgroup_mma(weights, v_tiles.index(v_slot), acc)
    gl.thread_barrier()
    return total, acc


@gluon.jit
def largest_scores(
    q,
    k_tiles,
    k_desc,
    k_full,
    k_done,
    tiles_ptr,
    size,
    first,
    scale,
    BM: gl.constexpr,
    BN: gl.constexpr,
    STAGES: gl.constexpr,
    SLOT_T: gl.constexpr,
    SLOT_H: gl.constexpr,
    SLOT_W: gl.constexpr,
    S_LAYOUT: gl.constexpr,
    K_BYTES: gl.constexpr,
):
    """Of every query, tile after tile."""
    peak = gl.full([BM], float("-inf"), gl.float32, gl.SliceLayout(1, S_LAYOUT))
    for step in range(0, size):
        slot = (k_done + step) % STAGES
        row = first + gl.load(tiles_ptr + step) * BN
        fetch(k_desc, row, k_full.index(slot), k_tiles.index(slot), K_BYTES, True)
        mbarrier.wait(k_full.index(slot), (k_done + step) // STAGES & 1)
        scores = scores_of(q, k_tiles.index(slot), BM, BN, S_LAYOUT)
        scores = warpgroup_mma_wait(0, deps=[scores])
        count = tile_tokens(gl.load(tiles_ptr + size + step), SLOT_T, SLOT_H, SLOT_W)
        peak = gl.maximum(peak, gl.max(masked(scores, count, BN, S_LAYOUT), axis=1) * scale)
        gl.thread_barrier()
    return peak


@gluon.jit
def tile_attend_hopper_kernel(
    q_desc,
    k_desc,
    v_desc,
    lists_ptr,
    longest_ptr,
    out_ptr,
    lse_ptr,
    out_strides,
    box,
    groups,
    seq_len,
    num_heads,
    num_groups,
    num_tiles,
    list_size,
    blocks,
    scale,
    D: gl.constexpr,
    V: gl.constexpr,
    BV: gl.constexpr,
    BM: gl.constexpr,
    BN: gl.constexpr,
    STAGES: gl.constexpr,
    SLOT_T: gl.constexpr,
    SLOT_H: gl.constexpr,
    SLOT_W: gl.constexpr,
    RAGGED: gl.constexpr,
    RANK: gl.constexpr,
    num_warps: gl.constexpr,
):
    """As `tile_attend_kernel` with a bound: queries, keys and values are packed."""
    BD: gl.constexpr = q_desc.block_type.shape[1]
    S_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [num_warps, 1], [16, BN, 16])
    O_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [num_warps, 1], [16, BV, 16])
    ROWS: gl.constexpr = gl.SliceLayout(1, O_LAYOUT)
    K_BYTES: gl.constexpr = BN * BD * 2
    V_BYTES: gl.constexpr = BN * BV * 2
    block = gl.program_id(0) % blocks
    group = gl.program_id(0) // blocks % num_groups
    head = gl.program_id(0) // blocks // num_groups % num_heads
    batch = gl.program_id(0) // blocks // num_groups // num_heads
    row = batch * num_heads + head
    q = gl.allocate_shared_memory(gl.bfloat16, [BM, BD], q_desc.layout)
    k_tiles = gl.allocate_shared_memory(gl.bfloat16, [STAGES, BN, BD], k_desc.layout)
    v_tiles = gl.allocate_shared_memory(gl.bfloat16, [STAGES, BN, BV], v_desc.layout)
    q_full = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    mbarrier.init(q_full, count=1)
    for stage in gl.static_range(STAGES):
        mbarrier.init(k_full.index(stage), count=1)
        mbarrier.init(v_full.index(stage), count=1)
    gl.thread_barrier()
    q_row = ((row * num_groups + group) * blocks + block) * BM
    fetch(q_desc, q_row, q_full, q, BM * BD * 2, True)
    tiles_ptr = lists_ptr + (row.to(gl.int64) * num_groups + group) * (2 * list_size)
    first = row * num_tiles * BN
    mbarrier.wait(q_full, 0)
    # No score exceeds the product of norms.
    x = q.load(gl.BlockedLayout([1, 8], [2, 16], [num_warps, 1], [1, 0])).to(gl.float32)
    norms = gl.convert_layout(gl.sum(x * x, axis=1), gl.SliceLayout(1, S_LAYOUT))
    shift = gl.sqrt(norms * gl.load(longest_ptr + row)) * scale
    total, acc = attend_to_list(
        q,
        k_tiles,
        v_tiles,
        k_desc,
        v_desc,
        k_full,
        v_full,
        0,
        0,
        tiles_ptr,
        list_size,
        first,
        shift,
        scale,
        BM,
        BN,
        BV,
        STAGES,
        SLOT_T,
        SLOT_H,
        SLOT_W,
        RAGGED,
        S_LAYOUT,
        O_LAYOUT,
        K_BYTES,
        V_BYTES,
    )
    slots = block * BM + gl.arange(0, BM, gl.SliceLayout(1, S_LAYOUT))
    first_t, first_h, first_w, size_t, size_h, size_w = group_box(group, box, groups, RANK)
    exists = slots < size_t * size_h * size_w
    # Where the bound is far too large, weights have vanished: find the largest scores.
    if gl.min(gl.where(exists, total, 1.0), axis=0) < _VANISHED:
        shift = largest_scores(
            q,
            k_tiles,
            k_desc,
            k_full,
            list_size,
            tiles_ptr,
            list_size,
            first,
            scale,
            BM,
            BN,
            STAGES,
            SLOT_T,
            SLOT_H,
            SLOT_W,
            S_LAYOUT,
            K_BYTES,
        )
        total, acc = attend_to_list(
            q,
            k_tiles,
            v_tiles,
            k_desc,
            v_desc,
            k_full,
            v_full,
            2 * list_size,
            list_size,
            tiles_ptr,
            list_size,
            first,
            shift,
            scale,
            BM,
            BN,
            BV,
            STAGES,
            SLOT_T,
            SLOT_H,
            SLOT_W,
            RAGGED,
            S_LAYOUT,
            O_LAYOUT,
            K_BYTES,
            V_BYTES,
        )
    tokens = box_tokens(slots, first_t, first_h, first_w, size_h, size_w, box[1], box[2], RANK)
    lse_ptr += row.to(gl.int64) * seq_len
    gl.store(lse_ptr + tokens, (shift + gl.log2(total)) * _LN2, mask=exists)
    out = acc * gl.convert_layout(1 / total, ROWS)[:, None]
    WIDE: gl.constexpr = gl.BlockedLayout([1, 8], [2, 16], [num_warps, 1], [1, 0])
    out = gl.convert_layout(out.to(gl.bfloat16), WIDE)
    slots = block * BM + gl.arange(0, BM, gl.SliceLayout(1, WIDE))
    exists = slots < size_t * size_h * size_w
    tokens = box_tokens(slots, first_t, first_h, first_w, size_h, size_w, box[1], box[2], RANK)
    channels = gl.arange(0, BV, gl.SliceLayout(0, WIDE))
    out_ptr += batch.to(gl.int64) * out_strides[0] + head.to(gl.int64) * out_strides[2]
    places = gl.multiple_of(tokens * out_strides[1], 8)[:, None] + channels[None, :]
    gl.store(out_ptr + places, out, mask=exists[:, None] & (channels < V)[None, :])
