"""The kernels of tile attention against the float64 definition; without a GPU, interpreted."""

from functools import partial

import pytest
import torch
from test_tile_attention import LAYOUTS, attend, make
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from mhla_gen.ops import auto_tiles, tile_blockwise, tile_fused
from mhla_gen.ops.kernels import tile_form, tile_gradients
from mhla_gen.ops.kernels.tile_call import TileCall
from mhla_gen.ops.kernels.tile_owners import owners_of_tiles
from mhla_gen.ops.tile_attention import resolve_tile_implementation, tile_attention
from mhla_gen.ops.tiles import tile_lists, tiling, window_tiles
from mhla_gen.runtime.recomputing import _policy

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.float16] + [torch.bfloat16] * torch.cuda.is_available()
SMALL = {"grid": (5, 6), "tile": (2, 3), "window": (1, 1), "top": 2, "group": (2, 1)}
# Half precision rounds queries, keys and weights once more than blockwise does.
# In float32 the order of summation remains, about 1e-7 times the root of what is summed: at most
# 300 keys, and 64 channels, one after the other.
ROUNDING = {dtype: torch.finfo(dtype).eps for dtype in DTYPES} | {torch.float32: 3e-6}


def placed_by(options):
    return tiling(*(options.get(n) for n in ("grid", "tile", "window", "top", "group")))


def on_device(options):
    """With the same float32 tables for all: rounded ones may lead to other tiles."""
    options = dict(options)
    if "rotary" in options:
        options["rotary"] = tuple(x.to(DEVICE, torch.float32) for x in options["rotary"])
    if "mask" in options:
        options["mask"] = options["mask"].to(DEVICE)
    return options


def outputs_and_gradients(tensors, options, implementation, dtype=None):
    """Output, log-sum-exp and all gradients; every dtype gets the same, rounded numbers."""
    tensors = [x.detach() if dtype is None else x.detach().to(dtype) for x in tensors]
    tensors = [x.to(DEVICE).requires_grad_() for x in tensors]
    options = on_device(options)
    if dtype == torch.float64 and "rotary" in options:
        options["rotary"] = tuple(x.double() for x in options["rotary"])
    out, lse = attend(tensors, options, implementation)
    generator = torch.Generator().manual_seed(1)
    grads = [torch.randn(x.shape, generator=generator).bfloat16() for x in (out, lse)]
    grads = [g.to(x) for g, x in zip(grads, (out, lse), strict=True)]
    return out, lse, *torch.autograd.grad((out, lse), tensors, grads)


def errors(actual, expected):
    pairs = zip(actual, expected, strict=True)
    return [((a.double() - e).norm() / e.norm().clamp_min(1e-9)).item() for a, e in pairs]


def assert_accurate(tensors, options, dtype):
    """At most twice the error of blockwise in the same dtype, plus that of rounding weights.

    Those of backward are exp(score - lse), as in flash attention, with an lse rounded to float32,
    and a score that is rounded as well: twice that.
    """
    rounded = [x.detach().to(dtype) for x in tensors]
    expected = outputs_and_gradients(rounded, options, "naive", torch.float64)
    rounding = max(ROUNDING[dtype], 2**-23 * expected[1].abs().max().item())
    blockwise = errors(outputs_and_gradients(rounded, options, "blockwise"), expected)
    actual = errors(outputs_and_gradients(rounded, options, "fused"), expected)
    for found, allowed in zip(actual, blockwise, strict=True):
        assert found <= 2 * max(allowed, rounding), (actual, blockwise)


def arguments_of_tile_attend(tensors, options, scale=0.5):
    """A call of the operator, as `tile_attention` makes it."""
    placed, options = placed_by(options), on_device(options)
    tensors = [x.detach().to(DEVICE).requires_grad_() for x in tensors]
    rotary, extra = options.get("rotary", (None, None)), tensors[3:] or (None, None)
    sizes = [*map(list, placed[:5]), placed.top, scale]
    packs = tile_fused.tile_pack(*(x.detach() for x in tensors[:3]), *rotary, *sizes)
    return *tensors[:3], *rotary, *extra, options.get("mask"), *sizes, packs


def read_as_the_kernels(monkeypatch, tensors, options):
    """Let blockwise read the tiles that the kernels read: no others may be better.

    Which of two tiles is read if their products differ by float32's rounding is left open.
    """
    *_, entries = tile_fused.tile_attend(*arguments_of_tile_attend(tensors, options))
    batch, _, heads, _ = tensors[0].shape
    lists = entries[:, :, 0].unflatten(0, (batch, heads)).long()

    def lists_of_kernels(mean_query, mean_key, placed):
        near, chosen = lists.split([placed.window_size, placed.top], dim=-1)
        assert torch.equal(near, window_tiles(placed, DEVICE).expand_as(near))
        assert (lists.sort(dim=-1).values.diff(dim=-1) > 0).all()
        if placed.top:
            products = mean_query @ mean_key.mT
            left = products.scatter(-1, lists, float("-inf")).amax(dim=-1)
            largest = mean_query.norm(dim=-1) * mean_key.norm(dim=-1).amax(dim=-1, keepdim=True)
            better = left - products.gather(-1, chosen).amin(dim=-1)
            assert (better / largest).max() < 1e-5
        return lists

    monkeypatch.setattr(tile_blockwise, "tile_lists", lists_of_kernels)


def pack(monkeypatch, steps=1):
    """Let calls of few channels take packed tiles, each in so many steps."""

    def loop(call):
        return tile_form.Loop(16, call.slot_sizes["SLOTS"] // steps, 4, 2, packed=True)

    monkeypatch.setattr(tile_form, "forward_loop", loop)
    monkeypatch.setattr(tile_gradients, "queries_loop", loop)


@pytest.fixture
def poisoned():
    """Fresh memory holds NaN, so that an element nobody wrote is found."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("number", range(len(LAYOUTS)))
def test_fused_equals_definition(poisoned, number):
    sizes = {"heads": 1 + (number == 0), "head_dim": 20, "value_dim": 12, "batch": 1}
    extra = 5 if number % 2 else None
    tensors, options = make(LAYOUTS[number], rotary=number != 4, extra=extra, **sizes)
    assert_accurate(tensors, options, torch.float32)


@pytest.mark.parametrize("dtype", DTYPES[1:])
@pytest.mark.parametrize("rotary", [False, True])
def test_half_precision(poisoned, dtype, rotary):
    layout = {"grid": (9, 8), "tile": (4, 4), "window": (1, 1), "top": 2, "group": (1, 2)}
    tensors, options = make(
        layout, head_dim=16, value_dim=36, rotary=rotary, extra=3, heads=1, batch=1
    )
    assert_accurate(tensors, options, dtype)


@pytest.mark.parametrize(
    ("number", "dtype", "steps"), [(1, torch.float32, 1), (4, torch.float16, 2)]
)
def test_packed_tiles(poisoned, monkeypatch, number, dtype, steps):
    """As calls of many channels take them; a tile is read in so many steps."""
    pack(monkeypatch, steps)
    sizes = {"heads": 2, "head_dim": 16, "value_dim": 24, "batch": 1}
    tensors, options = make(LAYOUTS[number], rotary=number != 4, extra=5 * (number == 4), **sizes)
    assert_accurate(tensors, options, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_list_that_ends_within_a_step(poisoned, dtype):
    """13 even tiles of 16 tokens, so that no slot is empty but those of the last step."""
    layout = {"grid": (16, 16), "tile": (4, 4), "window": (3, 3), "top": 4}
    tensors, options = make(layout, head_dim=16, value_dim=16, rotary=False, heads=1, batch=1)
    assert_accurate(tensors, options, dtype)


def test_empty_slots_count_for_nothing_where_all_scores_are_low(poisoned, monkeypatch):
    """A missing key has score 0: its weight would overflow beside scores of -500."""
    pack(monkeypatch)
    tensors, options = make(LAYOUTS[1], heads=1, head_dim=16, value_dim=8, batch=1, rotary=False)
    far = torch.tensor([-8.0, 8.0, 0.0], dtype=torch.float64)
    tensors = [(x.detach() / 8 + c).requires_grad_() for x, c in zip(tensors, far, strict=True)]
    assert_accurate(tensors, options, torch.float32)


def test_keys_off_the_grid_alone(poisoned):
    layout = {"grid": (5, 6), "tile": (2, 3), "window": (0, 0), "top": 0}
    tensors, options = make(layout, heads=1, batch=2, head_dim=8, extra=3)
    assert_accurate(tensors, options, torch.float32)


def test_strided_views(poisoned):
    layout = SMALL
    tensors, options = make(layout, head_dim=8, value_dim=8, heads=1, batch=1)
    seq_len = tensors[0].shape[1]
    projected = torch.cat([x.detach() for x in tensors], dim=-1).float().to(DEVICE)
    views = projected.transpose(1, 2).contiguous().transpose(1, 2).split([8, 8, 8], dim=-1)
    options["rotary"] = tuple(x.float().to(DEVICE) for x in options["rotary"])
    assert views[0].shape[1] == seq_len and not views[0].is_contiguous()
    expected = attend([x.contiguous() for x in views], options, "fused")
    assert all(map(torch.equal, attend(views, options, "fused"), expected))


def test_repeated_runs_are_bit_equal():
    tensors, options = make(SMALL, extra=4, heads=1, batch=1)
    first = outputs_and_gradients(tensors, options, "fused", torch.float32)
    second = outputs_and_gradients(tensors, options, "fused", torch.float32)
    assert all(map(torch.equal, first, second))


@pytest.mark.parametrize(
    "layout",
    [
        {"grid": (8, 8), "tile": (2, 2), "window": (3, 1), "top": 5, "group": (2, 1)},
        {"grid": (32,), "tile": (2,), "window": (0,), "top": 6, "group": (4,)},
        {"grid": (4, 4, 8), "tile": (2, 2, 2), "window": (1, 1, 3), "top": 3},
    ],
)
def test_ties_are_broken_as_by_the_definition(layout):
    """Means of few whole numbers are exact, and many products are equal."""
    seq_len = torch.Size(layout["grid"]).numel()
    query, key = torch.randint(-1, 2, (2, 1, seq_len, 1, 16)).float().to(DEVICE)
    value = torch.randn(1, seq_len, 1, 16, device=DEVICE)
    naive, fused = (
        tile_attention(query, key, value, implementation=name, **layout)
        for name in ("naive", "fused")
    )
    torch.testing.assert_close(fused, naive, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("numbers", ["many octaves", "few octaves", "all negative"])
def test_tiles_are_chosen_from_products_of_any_size(numbers):
    """The search begins near the largest product if enough are there, else at its sign."""
    layout = {"grid": (16, 16), "tile": (2, 2), "window": (3, 3), "top": 9}
    tensors, _ = make(layout, rotary=False, heads=2, batch=1, head_dim=8)
    query, _, value = (x.detach().float().to(DEVICE) for x in tensors)
    placed = placed_by(layout)
    means = torch.randn(2, 2, 64, 8, dtype=torch.float64).mul(4).round().div(4)
    means[..., 1:] = 0
    if numbers == "many octaves":
        means[1] = means[1].sign() * torch.randint(-60, 60, means[1].shape).double().exp2()
    elif numbers == "all negative":
        means = torch.stack((means[0].abs(), -means[1].abs()))
    expected = tile_lists(means[0][None], means[1][None], placed)[0]
    call = TileCall(query, value, None, None, placed, 1.0)
    found = tile_form.tile_lists(*means.float().to(DEVICE), call)[:, :, 0].cpu().long()
    assert torch.equal(found.sort(dim=-1).values, expected.sort(dim=-1).values)


def test_tiles_are_chosen_by_means_of_rows_that_are_not_rounded(monkeypatch):
    """Products of means that differ by less than half precision would round rotated rows by."""
    layout = {"grid": (128,), "tile": (4,), "window": (0,), "top": 4}
    tensors, options = make(layout, rotary=False, heads=1, batch=1, head_dim=16)
    with torch.no_grad():
        keys = tensors[1].unflatten(1, (32, 4))
        keys.copy_(keys[:, :1] + 2**-10 * keys)
        tensors = [x.half() for x in tensors]
        angle = torch.ones(128, 8)
        options["rotary"] = angle.cos(), angle.sin()
        read_as_the_kernels(monkeypatch, tensors, options)
        attend([x.double().to(DEVICE) for x in tensors], on_device(options), "blockwise")


def test_autocast_chooses_the_same_tiles():
    layout = {"grid": (8, 8), "tile": (2, 2), "window": (1, 1), "top": 3}
    tensors, options = make(layout, rotary=False, heads=1, batch=1)
    tensors = [x.detach().half().to(DEVICE) for x in tensors]
    expected = attend(tensors, options, "fused")
    with torch.autocast(DEVICE, torch.bfloat16):
        assert all(map(torch.equal, attend(tensors, options, "fused"), expected))


@pytest.mark.parametrize("number", [0, 1, 2, 3])
def test_owners_are_the_groups_that_read_a_tile(number):
    layout = LAYOUTS[number]
    placed = tiling(*(layout.get(n) for n in ("grid", "tile", "window", "top", "group")))
    means = torch.randn(2, 3, placed.num_groups, 4), torch.randn(2, 3, placed.num_tiles, 4)
    lists = tile_lists(*means, placed).flatten(0, 1).int()
    inverted = owners_of_tiles(torch.stack((lists, -lists), dim=2).to(DEVICE), placed.num_tiles)
    owners, counts = (x.cpu() for x in inverted)
    for head in range(6):
        for tile in range(placed.num_tiles):
            found = owners[head, tile, : counts[head, tile]]
            expected = (lists[head] == tile).any(dim=-1).nonzero()[:, 0]
            assert torch.equal(found.long(), expected)


@pytest.mark.parametrize("packed", [False, True])
def test_opcheck(monkeypatch, packed):
    if packed:
        pack(monkeypatch)
    tensors, options = make(SMALL, heads=1, batch=1, head_dim=8, value_dim=8, extra=2)
    tensors = [x.detach().float() for x in tensors]
    arguments = arguments_of_tile_attend(tensors, options)
    assert bool(arguments[-1]) == packed
    torch.library.opcheck(tile_fused.tile_attend, arguments)
    inputs = *(x.detach() for x in arguments[:3]), *arguments[3:5], *arguments[8:-1]
    torch.library.opcheck(tile_fused.tile_pack, inputs)


@pytest.mark.parametrize("keeps", [False, True])
def test_packs_are_kept_instead_of_inputs_or_computed_again(monkeypatch, keeps):
    """Without recomputing they are kept; where only costly outputs are, they are not."""
    pack(monkeypatch)
    made, ordinary = [], tile_form.read
    monkeypatch.setattr(tile_form, "read", lambda *a: made.append(ordinary(*a)) or made[-1])
    tensors, options = make(SMALL, heads=1, batch=1, head_dim=8, value_dim=8)
    tensors = [x.detach().float().to(DEVICE).requires_grad_() for x in tensors]
    doubled = [2 * x for x in tensors]
    kept = []

    def keep(x):
        kept.append(x.data_ptr())
        return x

    contexts = partial(create_selective_checkpoint_contexts, _policy)
    expected = torch.autograd.grad(attend(doubled, options, "fused")[0].sum(), tensors)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        doubled = [2 * x for x in tensors]
        if keeps:
            out, _ = attend(doubled, options, "fused")
        else:
            out, _ = checkpoint(
                attend, doubled, options, "fused", use_reentrant=False, context_fn=contexts
            )
    packs = {x.data_ptr() for x in made[-1][:3]}
    assert packs <= set(kept) if keeps else not packs & set(kept)
    assert not keeps or not {x.data_ptr() for x in doubled} & set(kept)
    before = len(made)
    found = torch.autograd.grad(out.sum(), tensors)
    assert len(made) == before + (not keeps)
    assert all(map(torch.equal, found, expected))


@pytest.fixture
def graphs_of_its_own():
    """torch keeps graphs by a function's code, which does not say whether tiles are packed."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("dynamic", [None, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("packed", [False, True])
def test_compiles_into_one_graph(graphs_of_its_own, monkeypatch, packed, dynamic):
    if packed:
        pack(monkeypatch)
    tensors, options = make(SMALL, rotary=False, heads=1, batch=1, head_dim=8, value_dim=8)
    tensors = [x.detach().float().to(DEVICE).requires_grad_() for x in tensors]
    run = torch.compile(attend, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    expected, actual = (f(tensors, options, "fused") for f in (attend, run))
    torch.testing.assert_close(actual, expected)
    gradients = [
        torch.autograd.grad(out.sum() + lse.sum(), tensors) for out, lse in (expected, actual)
    ]
    torch.testing.assert_close(*gradients)


def test_activation_checkpointing():
    tensors, options = make(SMALL, rotary=False, heads=1, batch=1)
    tensors = [x.detach().float().to(DEVICE).requires_grad_() for x in tensors]
    expected = torch.autograd.grad(attend(tensors, options, "fused")[0].sum(), tensors)
    out = checkpoint(lambda *x: attend(x, options, "fused")[0], *tensors, use_reentrant=False)
    assert all(map(torch.equal, torch.autograd.grad(out.sum(), tensors), expected))


@pytest.mark.parametrize(
    ("dtype", "head_dim", "message"),
    [(torch.float64, 6, "float32, float16 and bfloat16"), (torch.float32, 136, "up to 128")],
)
def test_unsupported_calls_say_why(dtype, head_dim, message):
    tensors, options = make(SMALL, rotary=False, head_dim=head_dim)
    with pytest.raises(ValueError, match=message):
        attend([x.detach().to(DEVICE, dtype) for x in tensors], options, "fused")


def test_auto_takes_the_kernels_where_they_run():
    query = torch.empty(1, 4, 1, 64)
    assert resolve_tile_implementation("auto", query, query) == "blockwise"
    meta = torch.empty(1, 4, 1, 64, device="meta")
    assert resolve_tile_implementation("auto", meta, meta) == "blockwise"


@pytest.mark.gpu
@pytest.mark.parametrize("head_dim", [32, 64, 72, 128])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_head_sizes_on_gpu(poisoned, layout, head_dim):
    tensors, options = make(layout, head_dim=head_dim, value_dim=head_dim, extra=70)
    assert_accurate(tensors, options, torch.bfloat16)


@pytest.mark.gpu
@pytest.mark.parametrize("value_dim", [128, 104])
@pytest.mark.parametrize("far", [False, True])
def test_many_channels_on_gpu(poisoned, value_dim, far):
    """Packed tiles; keys far longer than scores tell are attended to twice."""
    layout = {"grid": (7, 10, 19), "tile": (3, 5, 4), "window": (1, 1, 1), "group": (1, 2, 1)}
    tensors, options = make(layout | {"top": 4}, head_dim=128, value_dim=value_dim, rotary=not far)
    if far:
        with torch.no_grad():
            tensors[0][..., :64] *= 10
            tensors[0][..., 64:] = 0
            tensors[1][..., :64] *= 0.1
            tensors[1][..., 64:] *= 10
    assert_accurate(tensors, options, torch.bfloat16)


@pytest.mark.gpu
@pytest.mark.parametrize("share", [0.02, 0.05, 0.125, 0.5, 1.0])
@pytest.mark.parametrize(
    ("grid", "tile"),
    [((48, 64), None), ((7, 22, 26), None), ((7, 22, 26), (7, 3, 3)), ((3000,), None)],
)
def test_automatic_layouts_on_gpu(poisoned, monkeypatch, grid, tile, share):
    layout = {"grid": grid, **auto_tiles(grid, share, tile=tile)._asdict()}
    tensors, options = make(layout, head_dim=64, value_dim=64, batch=1, heads=2)
    rounded = [x.detach().bfloat16() for x in tensors]
    read_as_the_kernels(monkeypatch, rounded, options)
    expected = outputs_and_gradients(rounded, options, "blockwise", torch.float64)
    actual = outputs_and_gradients(rounded, options, "fused")
    assert max(errors(actual, expected)) < 2 * ROUNDING[torch.bfloat16]


@pytest.mark.gpu
def test_cuda_graph():
    tensors, options = make(LAYOUTS[3], head_dim=64, value_dim=64, extra=6)
    tensors = [x.detach().bfloat16().cuda() for x in tensors]
    options["rotary"] = tuple(x.float().cuda() for x in options["rotary"])
    options["mask"] = options["mask"].cuda()
    with torch.no_grad():
        expected = attend(tensors, options, "fused")
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = attend(tensors, options, "fused")
        for x in out:
            x.zero_()
        graph.replay()
    assert all(map(torch.equal, out, expected))


@pytest.mark.gpu
def test_more_than_two_billion_elements_on_gpu():
    heads, dim, seq_len = 8, 128, 4096
    batch = 2**31 // (3 * heads * dim * seq_len) + 2
    projected = torch.randn(batch, seq_len, heads, 3 * dim, dtype=torch.bfloat16, device="cuda")
    options = {"grid": (64, 64), "tile": (8, 8), "window": (1, 1), "top": 2}
    out, _ = tile_attention(*projected.chunk(3, dim=-1), implementation="fused", **options)
    last, _ = tile_attention(
        *projected[-1:].contiguous().chunk(3, dim=-1), implementation="fused", **options
    )
    assert torch.equal(out[-1:], last)


def test_elements_numbered_in_64_bits_are_the_same(monkeypatch):
    tensors, options = make(SMALL, extra=4, heads=1, batch=1)
    expected = outputs_and_gradients(tensors, options, "fused", torch.float32)
    asked = []
    for module in (tile_form, tile_gradients):
        monkeypatch.setattr(module, "numbered_wide", lambda *x: asked.append(len(x)) or True)
    actual = outputs_and_gradients(tensors, options, "fused", torch.float32)
    # Keys and values in place, forward; packed queries and their gradients, three times.
    assert asked == [2] * 4 and all(map(torch.equal, actual, expected))


@pytest.mark.parametrize("far", [False, True])
def test_scores_bounded_by_lengths(poisoned, monkeypatch, far):
    """As bfloat16 takes them; keys far longer than scores tell take the second loop."""
    monkeypatch.setattr(tile_form, "takes_bound", lambda query: True)
    tensors, options = make(SMALL, rotary=False, heads=1, batch=1, head_dim=16, extra=2)
    if far:
        with torch.no_grad():
            tensors[0][..., :8] *= 60
            tensors[0][..., 8:] = 0
            for keys in (tensors[1], tensors[3]):
                keys[..., :8] *= 0.02
                keys[..., 8:] *= 60
    expected = outputs_and_gradients(tensors, options, "naive", torch.float64)
    assert (
        max(errors(outputs_and_gradients(tensors, options, "fused", torch.float32), expected))
        < 1e-5
    )


def test_products_of_means_take_any_number_of_heads(monkeypatch):
    # CUDA launches so many programs along an axis.
    monkeypatch.setattr(tile_form, "_MOST_PROGRAMS", 2)
    queries, keys = torch.randn(5, 3, 20, device=DEVICE), torch.randn(5, 70, 20, device=DEVICE)
    found = tile_form.mean_products(queries, keys)
    torch.testing.assert_close(found, queries @ keys.mT, rtol=1e-4, atol=1e-4)
