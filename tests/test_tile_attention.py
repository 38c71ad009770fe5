"""Tile attention against its float64 definition, and its properties."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.testing import CompileCounter

from mhla_gen.ops import auto_tiles, tile_attention, tile_share
from mhla_gen.ops.partition import block_of_tokens
from mhla_gen.ops.tiles import group_slots, tile_lists, tiling, token_places, window_tiles

# Lengths that do not divide, windows and tops larger than the grid, groups, no window at all.
LAYOUTS = [
    {"grid": (13,), "tile": (3,), "window": (3,), "top": 1},
    {"grid": (9, 11), "tile": (4, 3), "window": (1, 3), "top": 2},
    {"grid": (9, 11), "tile": (2, 3), "window": (3, 1), "top": 3, "group": (2, 3)},
    {"grid": (5, 4, 7), "tile": (2, 3, 2), "window": (1, 3, 1), "top": 2, "group": (1, 2, 2)},
    {"grid": (6, 5), "tile": (2, 2), "window": (0, 0), "top": 4, "group": (2, 1)},
    {"grid": (4, 6), "tile": (3, 2), "window": (9, 9), "top": 0},
    {"grid": (7, 5), "tile": (2, 2), "window": (1, 1), "top": 99},
]


def make(layout, *, heads=2, head_dim=6, value_dim=4, batch=2, rotary=True, extra=None, seed=0):
    """Tensors that want gradients, and the options of a call."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    seq_len = math.prod(layout["grid"])
    tensors = [draw(batch, seq_len, heads, d) for d in (head_dim, head_dim, value_dim)]
    options = dict(layout)
    if rotary:
        angles = draw(seq_len, head_dim // 2)
        options["rotary"] = angles.cos(), angles.sin()
    if extra:
        tensors += [draw(batch, extra, heads, d) for d in (head_dim, value_dim)]
        mask = torch.rand(batch, extra, generator=generator) < 0.7
        mask[:, 0] = True
        options["mask"] = mask
    return [x.requires_grad_() for x in tensors], options


def attend(tensors, options, implementation):
    options = dict(options)
    mask = options.pop("mask", None)
    extra = None if mask is None else (*tensors[3:], mask)
    return tile_attention(*tensors[:3], extra=extra, implementation=implementation, **options)


def outputs_and_gradients(tensors, options, implementation):
    out, lse = attend(tensors, options, implementation)
    total = sum(
        (x * torch.linspace(-1, 1, x.numel(), dtype=x.dtype).reshape(x.shape)).sum()
        for x in (out, lse)
    )
    return out, lse, *torch.autograd.grad(total, tensors)


@pytest.mark.parametrize("extra", [None, 5])
@pytest.mark.parametrize("rotary", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_blockwise_equals_definition(layout, rotary, extra):
    tensors, options = make(layout, rotary=rotary, extra=extra)
    expected = outputs_and_gradients(tensors, options, "naive")
    actual = outputs_and_gradients(tensors, options, "blockwise")
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("implementation", ["naive", "blockwise"])
@pytest.mark.parametrize("tile", [(2, 3), (20, 20), (1, 1)])
def test_a_window_that_covers_the_grid_is_softmax(tile, implementation):
    layout = {"grid": (5, 4), "tile": tile, "window": (9, 9), "top": 0}
    tensors, options = make(layout, rotary=False)
    out, lse = attend(tensors, options, implementation)
    q, k, v = (x.transpose(1, 2) for x in tensors)
    expected = F.scaled_dot_product_attention(q, k, v).transpose(1, 2)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(lse, (q @ k.mT * q.shape[-1] ** -0.5).logsumexp(dim=-1))


@pytest.mark.parametrize("implementation", ["naive", "blockwise"])
def test_autocast_does_not_lower_the_precision_of_sums(implementation):
    layout = {"grid": (5, 4), "tile": (2, 3), "window": (1, 1), "top": 1}
    tensors, options = make(layout, rotary=False)
    tensors = [x.float() for x in tensors]
    with torch.autocast("cpu", torch.bfloat16):
        inside = attend(tensors, options, implementation)
    outside = attend(tensors, options, implementation)
    assert all(torch.equal(*both) for both in zip(inside, outside, strict=True))


def test_extra_keys_alone_are_softmax_over_the_valid_ones():
    layout = {"grid": (5, 4), "tile": (2, 2), "window": (0, 0), "top": 0}
    tensors, options = make(layout, rotary=False, extra=6)
    out, _ = attend(tensors, options, "blockwise")
    q, _, _, k, v = (x.transpose(1, 2) for x in tensors)
    mask = options["mask"][:, None, None]
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)
    torch.testing.assert_close(out, expected)


@pytest.mark.parametrize("implementation", ["naive", "blockwise"])
def test_a_query_without_any_key_gets_nan(implementation):
    layout = {"grid": (5, 4), "tile": (2, 2), "window": (0, 0), "top": 0}
    tensors, options = make(layout, rotary=False, extra=3)
    options["mask"] = torch.tensor([[True, False, True], [False] * 3])
    out, lse = attend(tensors, options, implementation)
    assert out[0].isfinite().all() and lse[0].isfinite().all()
    assert out[1].isnan().all() and lse[1].eq(-torch.inf).all()


def test_transforms_of_functions_are_right():
    tensors, options = make(LAYOUTS[1], rotary=False, batch=1)
    query, key, value = (x.detach() for x in tensors)

    def run(value):
        return tile_attention(query, key, value, **options)[0]

    weights = torch.randn_like(run(value))
    leaf = value.clone().requires_grad_()
    (expected,) = torch.autograd.grad((run(leaf) * weights).sum(), leaf)
    found = torch.func.grad(lambda x: (run(x) * weights).sum())(value)
    torch.testing.assert_close(found, expected)
    # The output is linear in the values.
    torch.testing.assert_close(torch.func.jvp(run, (value,), (value,))[1], run(value))


@pytest.mark.parametrize("wrong", [torch.nan, torch.inf, -torch.inf])
def test_nothing_is_read_of_masked_keys_whatever_they_hold(wrong):
    tensors, options = make(LAYOUTS[1], extra=5)
    masked = ~options["mask"]
    assert masked.any()
    expected = outputs_and_gradients(tensors, options, "blockwise")
    with torch.no_grad():
        tensors[3][masked], tensors[4][masked] = wrong, -wrong
    found = outputs_and_gradients(tensors, options, "blockwise")
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert all(gradient[masked].eq(0).all() for gradient in found[-2:])


@pytest.mark.parametrize("extra", [None, 3])
def test_weights_sum_to_one_however_large_scores_are(extra):
    layout = {"grid": (6, 5), "tile": (2, 2), "window": (1, 1), "top": 1}
    tensors, options = make(layout, head_dim=4, extra=extra)
    # Scores of thousands: float32 rounds their log-sum-exp by more than weights may be wrong.
    q, k, v, *others = (x.detach().float() for x in tensors)
    keys = [others[0] * 80] if others else []
    one = [torch.ones_like(x) for x in (v, *others[1:])]
    tensors = [x.requires_grad_() for x in (q * 80, k * 80, one[0], *keys, *one[1:])]
    out, lse = attend(tensors, options, "blockwise")
    assert lse.max() > 5000
    # Three tiles of four tokens, and three keys: their weights, each rounded, and the sums of both.
    torch.testing.assert_close(out, torch.ones_like(out), rtol=0, atol=30 * 2**-24)
    # Values that are all equal leave the queries nothing to choose.
    (gradient,) = torch.autograd.grad(out.sum(), tensors[0])
    assert gradient.abs().max() < 30 * 2**-24 * tensors[1].abs().max() * 4


def test_order_inside_a_tile_does_not_matter():
    layout = {"grid": (8, 8), "tile": (4, 4), "window": (1, 1), "top": 1}
    tensors, options = make(layout, rotary=False)
    tile = block_of_tokens((8, 8), (2, 2))
    order = torch.cat(
        [t[torch.randperm(len(t))] for t in ((tile == i).nonzero()[:, 0] for i in range(4))]
    )
    place = torch.empty_like(order)
    place[torch.cat([(tile == i).nonzero()[:, 0] for i in range(4)])] = order
    out, lse = attend(tensors, options, "blockwise")
    permuted, permuted_lse = attend([x[:, place] for x in tensors], options, "blockwise")
    torch.testing.assert_close(permuted, out[:, place])
    torch.testing.assert_close(permuted_lse, lse[..., place])


def test_content_finds_the_tile_that_holds_the_answer():
    """One far tile has keys like the query; with top=1 it is read, without it is not."""
    layout = {"grid": (16, 16), "tile": (4, 4), "window": (1, 1)}
    query, key = torch.zeros(2, 1, 256, 1, 8)
    value = torch.zeros(1, 256, 1, 1)
    tile = block_of_tokens((16, 16), (4, 4))
    key[0, tile == 13], value[0, tile == 13] = 10.0, 1.0
    query[0, tile == 0] = 1.0
    found, _ = tile_attention(query, key, value, top=1, **layout)
    missed, _ = tile_attention(query, key, value, top=0, **layout)
    assert found[0, tile == 0].min() > 0.99
    assert missed[0, tile == 0].max() == 0


def test_ties_go_to_the_first_tiles():
    layout = {"grid": (12,), "tile": (2,), "window": (1,), "top": 2}
    query = torch.zeros(1, 12, 1, 4)
    value = torch.eye(12).reshape(1, 12, 1, 12)
    for implementation in ("naive", "blockwise"):
        out, _ = tile_attention(query, query, value, implementation=implementation, **layout)
        read = out[0, :, 0] > 0
        assert read[0].nonzero()[:, 0].tolist() == [0, 1, 2, 3, 4, 5]
        assert read[11].nonzero()[:, 0].tolist() == [0, 1, 2, 3, 10, 11]


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("precision", ["highest", "high", "medium"])
def test_the_choice_does_not_depend_on_the_precision_of_float32_products(precision, device):
    placed = tiling((6,), (1,), (0,), 1)
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision(precision)
        for large, small in ((1e4, 1.0), (1.0, 2**-13)):
            # Products that differ by less than float32, or TF32, can tell.
            key = torch.tensor([[large, 0.0]] * 6, device=device)
            key[4, 1] = small
            query = torch.tensor([[large, 1.0]] * 6, device=device)
            assert tile_lists(query[None, None], key[None, None], placed).eq(4).all()
    finally:
        torch.set_float32_matmul_precision(before)


def test_every_query_reads_equally_many_tiles_and_its_own():
    placed = tiling((11, 9), (2, 2), (3, 3), 1, (2, 1))
    window = window_tiles(placed)
    assert window.shape == (placed.num_groups, placed.window_size) == (15, 12)
    group = block_of_tokens(placed.tiles, placed.groups)
    for tile in range(placed.num_tiles):
        row = window[group[tile]].tolist()
        assert len(set(row)) == len(row)
        assert tile in row


def test_groups_hold_every_token_once():
    placed = tiling((11, 9, 5), (2, 3, 2), (1, 1, 1), 0, (2, 2, 3))
    tokens, filled = group_slots(placed)
    assert sorted(tokens[filled].tolist()) == list(range(11 * 9 * 5))
    assert torch.equal(tokens.flatten()[token_places(placed)], torch.arange(11 * 9 * 5))


@pytest.mark.parametrize("grid", [(16, 16), (64, 64), (37, 41), (21, 30, 52), (9, 32, 32), (4096,)])
@pytest.mark.parametrize("share", [0.05, 0.125, 0.25, 1.0])
def test_the_rule_keeps_to_the_share(grid, share):
    layout = auto_tiles(grid, share)
    one_tile = 1 / tiling(grid, layout.tile, layout.window, layout.top).num_tiles
    found = tile_share(grid, layout.tile, layout.window, layout.top, layout.group)
    assert abs(found - share) <= max(one_tile / 2, one_tile - share) + 1e-9


@pytest.mark.parametrize("grid", [(1, 120, 150), (5, 60, 60), (21, 45, 80), (39, 5, 90), (4096,)])
@pytest.mark.parametrize("share", [0.25, 0.5, 0.9])
def test_an_axis_that_the_window_covers_does_not_keep_it_from_growing(grid, share):
    layout = auto_tiles(grid, share)
    placed = tiling(grid, layout.tile, layout.window, layout.top, layout.group)
    # Two more tiles along one axis are at most three times as many in all.
    assert 3 * placed.window_size > placed.list_size // 2 >= placed.window_size


def test_a_rule_with_given_sizes_keeps_to_the_share_as_far_as_they_allow():
    grid, share = (64, 64), 0.125
    for sizes in ({"tile": (8, 8)}, {"tile": (2, 2)}, {"window": (0, 0)}, {"group": (1, 4)}):
        layout = auto_tiles(grid, share, **sizes)
        assert sizes.items() <= layout._asdict().items()
        assert tile_share(grid, layout.tile, layout.window, layout.top, layout.group) == share
    # With 3×3 tiles around a group of 2×2, the window alone would be more.
    layout = auto_tiles(grid, 0.05, group=(2, 2))
    assert (layout.window, layout.top) == ((1, 1), 9)
    # What shares a list keeps the window that was compared, also where a wider one would fit.
    assert auto_tiles(grid, share, group=(2, 2)) == ((4, 4), (2, 2), (3, 3), 16)
    assert auto_tiles(grid, 0.25, group=(2, 2)) == ((4, 4), (2, 2), (3, 3), 48)
    for sizes in ({"window": (7, 7)}, {"group": (8, 8), "window": (1, 1)}):
        layout = auto_tiles(grid, share, group=sizes.get("group"), window=sizes.get("window"))
        assert sizes.items() <= layout._asdict().items() and layout.top == 0
    assert auto_tiles(grid, share, group=(8, 8)) == layout
    with pytest.raises(ValueError, match="window needs one number per axis"):
        auto_tiles(grid, share, window=(3, 3, 3))
    with pytest.raises(ValueError, match="tile and group must be positive"):
        auto_tiles(grid, share, tile=(0, 4))


@pytest.mark.parametrize("grid", [(9, 32, 32), (1, 30, 52), (16, 22, 38), (13, 16, 24)])
@pytest.mark.parametrize("share", [0.02, 0.05, 0.125, 0.25])
def test_a_short_clip_has_the_tiles_of_an_image_in_each_frame(grid, share):
    layout, image = auto_tiles(grid, share), auto_tiles(grid[1:], 1)
    placed = tiling(grid, layout.tile, layout.window, layout.top, layout.group)
    assert layout.tile == (1, *image.tile)
    assert layout.group[0] == 1
    assert all(a <= b for a, b in zip(layout.group[1:], image.group, strict=True))
    if share >= 0.125:
        assert 9 <= placed.window_size < placed.list_size
    # Asking for the tiles that the rule picks changes nothing.
    for given in (("tile",), ("tile", "group"), ("tile", "group", "window")):
        same = auto_tiles(grid, share, **{name: getattr(layout, name) for name in given})
        assert same.top == layout.top


def test_a_clip_of_one_frame_is_read_as_an_image():
    for share in (0.02, 0.05, 0.125, 0.25, 0.5, 1.0):
        image, clip = auto_tiles((30, 52), share), auto_tiles((1, 30, 52), share)
        for name in ("tile", "group", "window"):
            assert getattr(clip, name)[1:] == getattr(image, name)
        assert clip.top == image.top


@pytest.mark.parametrize("side", [64, 80, 90])
@pytest.mark.parametrize(("share", "window"), [(0.05, 3), (0.125, 5), (0.25, 5)])
def test_every_tile_of_a_small_image_has_a_list_of_its_own(side, share, window):
    layout = auto_tiles((side, side), share)
    assert (layout.group, layout.window) == ((1, 1), (window, window))
    # Asking for the sizes that the rule picks changes nothing.
    for given in (("tile",), ("group",), ("window",), ("tile", "group", "window")):
        same = {name: getattr(layout, name) for name in given}
        assert auto_tiles((side, side), share, **same) == layout
    # Where lists are short or long, images are large, or tiles are small, lists are shared.
    for grid, other in (((side, side), 0.26), ((128, 128), share), ((32, 32), 0.125)):
        assert math.prod(auto_tiles(grid, other).group) > 1
    assert math.prod(auto_tiles((2, side * side // 2), share).group) > 1
    assert math.prod(auto_tiles((side, side), share, tile=(2, 2)).group) > 1


def test_the_images_of_the_evidence_keep_the_tiles_that_were_compared():
    """docs/evidence.md recommends these."""
    assert auto_tiles((64, 64), 0.125) == ((4, 4), (1, 1), (5, 5), 7)
    assert auto_tiles((64, 64), 0.05) == ((4, 4), (1, 1), (3, 3), 4)
    # A window that takes nearly all of the share is too much: 25 of 30 tiles.
    assert auto_tiles((48, 80), 0.125) == ((4, 4), (1, 1), (3, 3), 21)


def test_the_clips_of_the_evidence_keep_the_tiles_that_were_compared():
    """docs/evidence.md recommends these; longer clips keep the tiles that were timed."""
    assert auto_tiles((9, 32, 32), 0.125) == ((1, 4, 4), (1, 2, 2), (3, 3, 3), 24)
    assert auto_tiles((5, 32, 32), 0.125).group == (1, 2, 2)
    assert auto_tiles((9, 32, 32), 0.05) == ((1, 4, 4), (1, 2, 2), (1, 3, 3), 13)
    assert auto_tiles((21, 30, 50), 0.05) == ((7, 3, 3), (1, 2, 1), (1, 3, 3), 14)
    assert auto_tiles((21, 45, 80), 0.125) == ((7, 3, 3), (1, 1, 2), (3, 5, 3), 92)


@pytest.mark.parametrize("grid", [(21, 30, 50), (21, 30, 52), (21, 45, 80), (14, 30, 52)])
@pytest.mark.parametrize("share", [0.05, 0.125])
def test_tiles_of_clips_fill_the_slots_of_keys_and_queries(grid, share):
    layout = auto_tiles(grid, share)
    placed = tiling(grid, layout.tile, layout.window, layout.top, layout.group)
    assert math.prod(layout.tile) <= 64
    assert math.prod(grid) / (64 * placed.num_tiles) > 0.94
    assert math.prod(grid) / (128 * placed.num_groups) > 0.93


def test_two_calls_are_bit_equal():
    tensors, options = make(LAYOUTS[2])
    first = outputs_and_gradients(tensors, options, "blockwise")
    second = outputs_and_gradients(tensors, options, "blockwise")
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_a_layout_is_constant_in_what_is_compiled_for_any_size():
    """Compiling a symbolic one takes a minute."""
    counter = CompileCounter()

    def attend(q, k, v, grid):
        layout = {"grid": grid, "tile": (2, 2), "window": (1, 1), "top": 1}
        return tile_attention(q, k, v, **layout, implementation="blockwise")[0]

    run = torch.compile(attend, fullgraph=True, dynamic=True, backend=counter)
    for grid in ((6, 5), (7, 5)):
        tokens = [torch.randn(1, math.prod(grid), 1, 4) for _ in range(3)]
        torch.testing.assert_close(run(*tokens, grid), attend(*tokens, grid))
    assert counter.frame_count == 2


def test_compiles_into_one_graph():
    tensors, options = make(LAYOUTS[3], extra=3)
    run = torch.compile(attend, fullgraph=True, backend="aot_eager")
    out, lse = run(tensors, options, "blockwise")
    expected = outputs_and_gradients(tensors, options, "blockwise")
    torch.testing.assert_close((out, lse), expected[:2])
    weights = [torch.linspace(-1, 1, x.numel(), dtype=x.dtype).reshape(x.shape) for x in (out, lse)]
    gradients = torch.autograd.grad((out * weights[0]).sum() + (lse * weights[1]).sum(), tensors)
    torch.testing.assert_close(gradients, expected[2:])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"window": (2, 3)}, "odd"),
        ({"window": (3,)}, "one number per axis"),
        ({"window": (0, 0), "top": 0}, "no query has a key"),
        ({"top": -1}, "negative"),
        ({"top": 1.0}, "whole numbers"),
        ({"tile": (2.0, 2)}, "whole numbers"),
        ({"grid": (-4, -5)}, "axes of at least one token"),
        ({"scale": -0.5}, "scale must be positive"),
        ({"scale": math.inf}, "positive and finite"),
        ({"tile": (0, 2)}, "positive"),
        ({"implementation": "flash"}, "implementation must be one of"),
        ({"extra": (torch.zeros(1, 2, 1, 3), torch.zeros(1, 2, 1, 4))}, "extra keys and values"),
        ({"extra": (torch.zeros(4), torch.zeros(4))}, "extra keys and values"),
        ({"extra": (torch.zeros(1, 2, 1, 4), torch.zeros(1, 2, 1, 4, device="meta"))}, "on meta"),
        (
            {"window": (0, 0), "top": 0, "extra": (torch.zeros(1, 0, 1, 4),) * 2},
            "no query has a key",
        ),
    ],
)
def test_wrong_calls_say_what_is_expected(changes, message):
    query = torch.zeros(1, 20, 1, 4)
    options = {"grid": (4, 5), "tile": (2, 2), "window": (1, 1), "top": 1}
    with pytest.raises(ValueError, match=message):
        tile_attention(query, query, query, **options | changes)
