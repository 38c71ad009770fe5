"""Causal MHLA: the parallel form and the state against the definition, in float64."""

import io

import pytest
import torch
from torch._inductor.decomposition import select_decomp_table
from torch.fx.experimental.proxy_tensor import make_fx

from mhla_gen.ops import (
    CausalState,
    causal_mhla,
    distance_mixing,
    frame_mixing,
    locality_weights,
    mhla,
)
from mhla_gen.ops.blockwise import lengthened
from mhla_gen.ops.feature_maps import FEATURE_MAPS, rotate

BLOCK = 4


def tokens(seq_len, batch=2, heads=4, key_heads=2, head_dim=6, value_dim=5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = ((heads, head_dim), (key_heads, head_dim), (key_heads, value_dim))
    return [
        torch.randn(batch, seq_len, *shape, generator=generator, dtype=torch.float64)
        for shape in shapes
    ]


def weights_of(num_distances, key_heads=None, seed=1):
    shape = (num_distances,) if key_heads is None else (key_heads, num_distances)
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(shape, generator=generator, dtype=torch.float64)


def rotary_of(positions, head_dim=6):
    angles = positions[..., None].double() * torch.tensor([1.0, 0.3, 0.02], dtype=torch.float64)
    return angles.cos(), angles.sin()


def definition(query, key, value, weights, rotary=None, feature_map="relu", normalize=True):
    """The sum over pairs of tokens, as the docstring of `causal_mhla` writes it."""
    group = query.shape[2] // key.shape[2]
    key, value = (x.repeat_interleave(group, dim=2) for x in (key, value))
    weights = weights.expand(query.shape[2] // group, -1).repeat_interleave(group, dim=0)
    phi_q, phi_k = FEATURE_MAPS[feature_map](query), FEATURE_MAPS[feature_map](key)
    q, k = rotate(phi_q, rotary), rotate(phi_k, rotary)
    out = torch.zeros_like(query[..., :1]).repeat(1, 1, 1, value.shape[3])
    for n in range(query.shape[1]):
        numerator, denominator = 0, 0
        for s in range(n + 1):
            distance = n // BLOCK - s // BLOCK
            weight = weights[:, min(distance, weights.shape[1] - 1)]
            score = weight * (q[:, n] * k[:, s]).sum(-1)
            numerator = numerator + score.unsqueeze(-1) * value[:, s]
            denominator = denominator + weight * (phi_q[:, n] * phi_k[:, s]).sum(-1)
        if normalize:
            numerator = numerator / (denominator.unsqueeze(-1) + 1e-6)
        out[:, n] = numerator
    return out


@pytest.mark.parametrize("seq_len", [1, 3, 4, 5, 16, 23])
@pytest.mark.parametrize("num_distances", [1, 2, 3, 9])
@pytest.mark.parametrize("by_head", [False, True])
def test_parallel_form_and_state_are_the_definition(seq_len, num_distances, by_head):
    q, k, v = tokens(seq_len)
    weights = weights_of(num_distances, 2 if by_head else None)
    rotary = rotary_of(torch.arange(seq_len))
    expected = definition(q, k, v, weights, rotary)
    out = causal_mhla(q, k, v, weights, block_size=BLOCK, rotary=rotary)
    torch.testing.assert_close(out, expected)
    state = CausalState(weights, block_size=BLOCK)
    steps = [
        state.step(q[:, [n]], k[:, [n]], v[:, [n]], rotary=tuple(t[[n]] for t in rotary))
        for n in range(seq_len)
    ]
    torch.testing.assert_close(torch.cat(steps, dim=1), expected)
    assert state.num_summaries == min(num_distances, 1 + seq_len // BLOCK)
    assert state.lengths.tolist() == [seq_len] * 2


@pytest.mark.parametrize("cuts", [(5, 1, 1, 9, 7), (4, 8, 11), (1, 22), (13, 10), (23,)])
@pytest.mark.parametrize("feature_map, normalize", [("relu", True), ("identity", False)])
@pytest.mark.parametrize("num_distances", [1, 3, 8])
def test_any_cut_into_calls_gives_the_same(cuts, feature_map, normalize, num_distances):
    q, k, v = tokens(23)
    weights = weights_of(num_distances)
    expected = definition(q, k, v, weights, feature_map=feature_map, normalize=normalize)
    state = CausalState(weights, block_size=BLOCK, feature_map=feature_map, normalize=normalize)
    parts = zip(q.split(cuts, 1), k.split(cuts, 1), v.split(cuts, 1), strict=True)
    out = torch.cat(
        [state.step(*p) if p[0].shape[1] == 1 else state.prefill(*p) for p in parts], dim=1
    )
    torch.testing.assert_close(out, expected)


@pytest.mark.parametrize(
    ("mixing", "shape"), [(distance_mixing, (2, 3)), (frame_mixing, (3, 2, 2))]
)
def test_gradients_of_weights_of_distances_are_summed_in_a_fixed_order(mixing, shape):
    """Compiled code adds to indices, and to windows, by atomic operations."""

    def gradient(weights, grad):
        weights = weights.detach().requires_grad_()
        return torch.autograd.grad(mixing(weights, 5), weights, grad)

    weights = torch.rand(shape)
    given = weights, torch.rand(mixing(weights, 5).shape)
    graph = make_fx(gradient, decomposition_table=select_decomp_table())(*given).graph
    called = {str(node.target) for node in graph.nodes if node.op == "call_function"}
    assert not [name for name in called if "index" in name or "scatter_add" in name]


def test_a_matrix_for_more_blocks_continues_one_for_fewer():
    weights = weights_of(3, 2)
    large = distance_mixing(weights, 7)
    assert torch.equal(large[:, :5, :5], distance_mixing(weights, 5))
    assert torch.equal(large[:, 4:, 4:], distance_mixing(weights, 3))
    assert torch.equal(large[:, 6, :5], weights[:, 2:].expand(2, 5))
    q, k, v = tokens(28, heads=2)
    options = {"grid": (28,), "layout": (7,), "causal": True, "implementation": "naive"}
    torch.testing.assert_close(
        causal_mhla(q, k, v, weights, block_size=BLOCK), mhla(q, k, v, large, **options)
    )


def test_locality_favours_near_blocks_and_forgets_none():
    weights = locality_weights(5)
    assert weights[0] == 1
    assert (weights.diff() < 0).all()
    assert weights[-1] > 0
    with pytest.raises(ValueError, match="at least 1"):
        locality_weights(0)


@pytest.mark.parametrize("side", ["left", "right", "scattered"])
@pytest.mark.parametrize("with_rotary", [False, True])
def test_padding_is_not_read_wherever_it_is(side, with_rotary):
    lengths, longest = (3, 9, 14), 14
    mask = torch.zeros(3, longest, dtype=torch.bool)
    for row, length in zip(mask, lengths, strict=True):
        places = {
            "left": torch.arange(longest - length, longest),
            "right": torch.arange(length),
            "scattered": torch.randperm(longest, generator=torch.Generator().manual_seed(length)),
        }[side]
        row[places[:length]] = True
    q, k, v = tokens(longest, batch=3)
    positions = mask.long().cumsum(1) - 1
    rotary = rotary_of(positions) if with_rotary else None
    weights = weights_of(3)
    for x in (q, k, v):
        x[~mask] = float("nan")
    out = causal_mhla(q, k, v, weights, block_size=BLOCK, mask=mask, rotary=rotary)
    state = CausalState(weights, block_size=BLOCK)
    assert torch.equal(out[~mask], torch.zeros_like(out[~mask]))
    torch.testing.assert_close(state.prefill(q, k, v, mask=mask, rotary=rotary), out)
    assert state.lengths.tolist() == list(lengths)
    more = tokens(6, batch=3, seed=7)
    steps = torch.cat([state.step(*(x[:, [n]] for x in more)) for n in range(6)], dim=1)
    for b in range(3):
        alone = [x[[b]][:, mask[b]] for x in (q, k, v)]
        table = None if rotary is None else tuple(t[b, mask[b]] for t in rotary)
        torch.testing.assert_close(out[[b]][:, mask[b]], definition(*alone, weights, table))
        if rotary is None:
            whole = [torch.cat((x, y[[b]]), dim=1) for x, y in zip(alone, more, strict=True)]
            torch.testing.assert_close(steps[[b]], definition(*whole, weights)[:, -6:])


def test_changing_padding_changes_nothing_and_gets_no_gradient():
    mask = torch.ones(2, 11, dtype=torch.bool)
    mask[0, :5] = False
    inputs = tokens(11)
    changed = [torch.where(mask[..., None, None], x, 1e3 * x) for x in inputs]
    inputs[1].requires_grad_()
    options = {"block_size": BLOCK, "mask": mask}
    out = causal_mhla(*inputs, weights_of(2), **options)
    assert torch.equal(out, causal_mhla(*changed, weights_of(2), **options))
    out.square().sum().backward()
    assert (inputs[1].grad[0, :5] == 0).all()
    assert (inputs[1].grad[mask] != 0).any()


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("normalize", [False, True])
def test_gradients(masked, normalize):
    q, k, v = tokens(7, batch=1, heads=2, key_heads=1, head_dim=4, value_dim=3)
    weights = weights_of(2, 1)
    mask = torch.tensor([[False, True, True, True, True, False, True]]) if masked else None
    inputs = [x.requires_grad_() for x in (q, k, v, weights)]
    options = {"block_size": 3, "mask": mask, "feature_map": "elu+1", "normalize": normalize}
    assert torch.autograd.gradcheck(lambda *x: causal_mhla(*x, **options), inputs)


def test_query_heads_that_share_a_key_head_take_less_memory():
    def saved_bytes(key_heads):
        saved = {}

        def keep(x):
            saved[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        inputs = [x.requires_grad_() for x in tokens(32, heads=8, key_heads=key_heads)]
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            out = causal_mhla(*inputs, weights_of(2), block_size=BLOCK)
        return sum(saved.values()) - out.nbytes

    # Queries and outputs have the same size in both; keys, values and summaries have an eighth.
    assert saved_bytes(1) < 0.8 * saved_bytes(8)


@pytest.mark.parametrize("missing", [0, 3])
def test_gradients_where_compiled_code_takes_any_size(missing):
    """Of tokens in chunks, whose gradients come in the strides of a product."""

    def scores(x, other):
        blocks = x.shape[1] // 4
        blocked = torch.unflatten(x, 1, (blocks, -(-x.shape[1] // blocks)))
        blocked = lengthened(blocked, 2, -blocked.shape[2] % (4 + missing))
        return torch.einsum("bmshk,bmthk->bmhst", blocked, other)

    x = torch.randn(2, 20, 3, 8, requires_grad=True)
    other = torch.randn(2, 5, 4, 3, 8)
    compiled = torch.compile(scores, backend="aot_eager", dynamic=True)
    found, expected = (f(x, other).square().sum() for f in (compiled, scores))
    torch.testing.assert_close(
        torch.autograd.grad(found, x)[0], torch.autograd.grad(expected, x)[0]
    )


def test_a_token_reads_nothing_after_it():
    q, k, v = tokens(13)
    k.requires_grad_()
    causal_mhla(q, k, v, weights_of(2), block_size=BLOCK)[:, 6].sum().backward()
    assert (k.grad[:, 7:] == 0).all()
    assert (k.grad[:, :7] != 0).any()


def test_memory_stays_within_its_limit_by_ending_the_weights_there():
    q, k, v = tokens(41)
    weights = weights_of(9)
    state = CausalState(weights, block_size=BLOCK, memory_blocks=3)
    out = [state.prefill(q[:, :18], k[:, :18], v[:, :18])]
    for n in range(18, 41):
        out.append(state.step(q[:, [n]], k[:, [n]], v[:, [n]]))
        assert state.num_summaries <= 3
    torch.testing.assert_close(torch.cat(out, dim=1), definition(q, k, v, weights[:3]))


def test_a_state_saves_loads_moves_and_reorders():
    q, k, v = tokens(19, batch=3)
    mask = torch.ones(3, 10, dtype=torch.bool)
    mask[1, :7] = False
    weights = weights_of(3)
    state = CausalState(weights, block_size=BLOCK)
    state.prefill(q[:, :10], k[:, :10], v[:, :10], mask=mask)
    file = io.BytesIO()
    torch.save(state.state_dict(), file)
    file.seek(0)
    loaded = CausalState.from_state_dict(torch.load(file, weights_only=True)).to("cpu")
    index = torch.tensor([2, 1, 1, 0])
    loaded.reorder(index)
    assert loaded.lengths.tolist() == [10, 3, 3, 10]
    for n in range(10, 19):
        expected = state.step(q[:, [n]], k[:, [n]], v[:, [n]])
        found = loaded.step(q[index][:, [n]], k[index][:, [n]], v[index][:, [n]])
        torch.testing.assert_close(found, expected[index])
    moved = loaded.to("meta")
    assert {moved.open.device.type, moved.finished.device.type} == {"meta"}
    with pytest.raises(ValueError, match="give what state_dict returned"):
        CausalState.from_state_dict({"weights": weights})


def test_half_precision_sums_in_float32():
    q, k, v = tokens(150, head_dim=16)
    rounded = [x.bfloat16() for x in (q, k, v)]
    weights = weights_of(4).float()
    exact = causal_mhla(*(x.double() for x in rounded), weights, block_size=BLOCK)
    state = CausalState(weights, block_size=BLOCK)
    for out in (causal_mhla(*rounded, weights, block_size=BLOCK), state.prefill(*rounded)):
        assert out.dtype == torch.bfloat16
        torch.testing.assert_close(out.double(), exact, atol=1e-2, rtol=8e-3)
    assert state.open.dtype == torch.float32


@pytest.mark.parametrize(
    "change, message",
    [
        ({"block_size": 0}, "block_size must be at least 1"),
        ({"block_size": 2.0}, "whole numbers"),
        ({"weights": torch.ones(2, dtype=torch.int64)}, "weights must be in a floating dtype"),
        ({"weights": torch.ones(2, device="meta")}, "weights are on meta"),
        ({"weights": torch.tensor(1.0)}, "num_distances"),
        ({"mask": torch.ones(2, 5, dtype=torch.bool, device="meta")}, "mask is on meta"),
        ({"rotary": (torch.ones(2, 5, 3), torch.ones(5, 3))}, "of one shape"),
        ({"rotary": (torch.ones(5, 3, dtype=torch.complex64),) * 2}, "floating dtype"),
        ({"feature_map": "exp"}, "feature_map must be one of"),
        ({"mask": torch.ones(2, 5)}, "mask must be bool"),
        ({"rotary": rotary_of(torch.arange(4))}, "rotary must be"),
        ({"weights": torch.ones(3, 2)}, "for 2 key heads"),
        ({"value": torch.ones(2, 5, 3, 5, dtype=torch.float64)}, "heads of key"),
        ({"key": torch.ones(2, 4, 2, 6, dtype=torch.float64)}, "head_dim of query"),
        ({"key": torch.ones(2, 5, 2, 6)}, "one floating dtype"),
    ],
)
def test_what_does_not_fit_is_named(change, message):
    q, k, v = tokens(5)
    arguments = {"query": q, "key": k, "value": v, "weights": weights_of(2), "block_size": BLOCK}
    with pytest.raises(ValueError, match=message):
        causal_mhla(**(arguments | change))


def test_a_state_names_tokens_that_do_not_continue_it():
    state = CausalState(weights_of(2), block_size=BLOCK)
    state.prefill(*tokens(5))
    with pytest.raises(ValueError, match="the state holds"):
        state.prefill(*tokens(5, batch=3))
    with pytest.raises(
        ValueError, match=r"in torch.float64, found .*, whose sums are torch.float32"
    ):
        state.prefill(*(x.bfloat16() for x in tokens(5)))
    with pytest.raises(ValueError, match="step reads one token"):
        state.step(*tokens(2))
    with pytest.raises(ValueError, match="weights are on cpu but query on meta"):
        state.prefill(*(x.to("meta") for x in tokens(5)))
    with pytest.raises(ValueError, match="floating dtype"):
        CausalState(torch.ones(2, dtype=torch.int64), block_size=BLOCK)
    with pytest.raises(ValueError, match="memory_blocks"):
        CausalState(weights_of(2), block_size=BLOCK, memory_blocks=0)


@pytest.mark.parametrize("index", [[0, -1], [2], [0.0], [True, False], [[0, 1]]])
def test_a_state_is_as_before_if_it_cannot_be_reordered(index):
    state = CausalState(weights_of(2), block_size=BLOCK)
    state.prefill(*tokens(5))
    before = {name: value for name, value in state.state_dict().items()}
    with pytest.raises(ValueError, match="sequences by their numbers, 0 to 1"):
        state.reorder(torch.tensor(index))
    assert all(value is before[name] for name, value in state.state_dict().items())


def test_a_matrix_needs_a_block_and_a_weight():
    for weights, num_blocks in ((weights_of(2), 0), (torch.ones(0), 3), (torch.tensor(1.0), 3)):
        with pytest.raises(ValueError, match="at least one block and one weight"):
            distance_mixing(weights, num_blocks)
