"""Blocks of ragged grids, automatic layouts and initial mixing matrices."""

import itertools
import math

import pytest
import torch

from mhla_gen.ops import (
    FRAME_MIXING_INITS,
    MIXING_INITS,
    auto_layout,
    auto_tiles,
    block_starts,
    locality_mixing,
    uniform_mixing,
)
from mhla_gen.ops.partition import block_of_tokens, block_slots


@pytest.mark.parametrize(("length", "num_blocks"), [(7, 3), (52, 10), (5, 5), (9, 1), (81, 7)])
def test_blocks_are_contiguous_and_nearly_equal(length, num_blocks):
    starts = block_starts(length, num_blocks)
    sizes = [b - a for a, b in itertools.pairwise([*starts, length])]
    assert starts[0] == 0 and len(starts) == num_blocks
    assert max(sizes) - min(sizes) <= 1 and sum(sizes) == length
    expected = [b for b, size in enumerate(sizes) for _ in range(size)]
    assert block_of_tokens((length,), (num_blocks,)).tolist() == expected


def test_more_blocks_than_tokens_is_an_error():
    with pytest.raises(ValueError, match="1 to 3 blocks, found 4"):
        block_starts(3, 4)


@pytest.mark.parametrize(
    ("grid", "layout"), [((7,), (3,)), ((5, 7), (2, 3)), ((3, 4, 52), (2, 4, 10)), ((4, 4), (2, 2))]
)
def test_slots_hold_every_token_once(grid, layout):
    tokens, filled, slots = block_slots(grid, layout)
    seq_len = math.prod(grid)
    assert torch.equal(tokens.reshape(-1)[slots], torch.arange(seq_len))
    count = tokens.numel() if filled is None else int(filled.sum())
    assert count == seq_len
    assert (filled is None) == all(n % k == 0 for n, k in zip(grid, layout, strict=True))
    block = block_of_tokens(grid, layout)
    rows = torch.arange(len(tokens))[:, None].expand_as(tokens)
    held = torch.ones_like(tokens, dtype=torch.bool) if filled is None else filled
    assert torch.equal(block[tokens[held]], rows[held])


@pytest.mark.parametrize(
    ("grid", "expected"),
    [
        ((16, 16), (4, 4)),
        ((32, 32), (4, 4)),
        ((128, 128), (8, 8)),
        ((21, 30, 52), (3, 5, 9)),
        ((1, 30, 52), (1, 3, 8)),
        ((1, 1), (1, 1)),
    ],
)
def test_automatic_layout(grid, expected):
    assert auto_layout(grid) == expected


def test_automatic_layout_obeys_the_rule_on_every_small_grid():
    for grid in itertools.product(range(1, 12), repeat=3):
        layout = auto_layout(grid)
        assert math.prod(layout) ** 2 <= math.prod(grid)
        assert all(1 <= k <= n for k, n in zip(layout, grid, strict=True))


@pytest.mark.parametrize("layout", [(1,), (5,), (4, 4), (3, 5, 10), (1, 3, 8)])
def test_locality_rows_sum_to_one_and_fall_with_distance(layout):
    mixing = locality_mixing(layout).double()
    assert mixing.dtype == torch.float64 and mixing.shape == (math.prod(layout),) * 2
    assert torch.allclose(mixing.sum(dim=1), torch.ones(len(mixing), dtype=torch.float64))
    assert mixing.min() >= 0
    places = list(itertools.product(*map(range, layout)))
    for i, row in enumerate(mixing.tolist()):
        distances = [math.dist(places[i], place) for place in places]
        furthest = max(distances) or 1.0
        # The row is proportional to 1 - d / max d.
        weights = [1 - d / furthest for d in distances]
        assert row == pytest.approx([w / sum(weights) for w in weights], abs=1e-6)


def test_uniform_mixing():
    assert torch.equal(uniform_mixing((2, 4)), torch.full((8, 8), 0.125))
    with pytest.raises(ValueError, match="at least one block"):
        uniform_mixing(())


@pytest.mark.parametrize("first", [0, 5])
def test_blocks_fixed_along_the_first_axis_must_fit_it(first):
    with pytest.raises(ValueError, match="first must be 1 to 4 blocks"):
        auto_layout((4, 4), first)


@pytest.mark.parametrize("grid", [(), (0, 4), (-4, -4), (2, 2, 2, 2)])
def test_a_grid_has_one_to_three_axes_of_tokens(grid):
    for choose in (auto_layout, lambda grid: auto_tiles(grid, 0.5)):
        with pytest.raises(ValueError, match="1 to 3 axes of at least one token"):
            choose(grid)


@pytest.mark.parametrize("inits", [MIXING_INITS, FRAME_MIXING_INITS], ids=["mixing", "frames"])
def test_first_weights_are_float32_whatever_torch_makes_by_default(inits):
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        assert {init((2, 3, 2)).dtype for init in inits.values()} == {torch.float32}
    finally:
        torch.set_default_dtype(before)
