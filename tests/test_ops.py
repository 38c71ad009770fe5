"""The operator against its float64 definition, and its properties."""

import math

import pytest
import torch

from mhla_gen.ops import FEATURE_MAPS, linear_attention, linformer_attention, mhla
from mhla_gen.ops.blockwise import attention_form_is_cheaper, blockwise_mhla
from mhla_gen.ops.naive import naive_mhla
from mhla_gen.ops.partition import block_of_tokens

OPTIONS = {"feature_map": "relu", "rotary": None, "normalize": True, "causal": False, "eps": 1e-6}

# Lengths that do not divide, one block, one token a block, a head_dim that is no power of two.
SHAPES = [
    ((7,), (3,), 6, 6),
    ((5, 7), (2, 3), 10, 6),
    ((4, 5, 6), (2, 2, 3), 4, 4),
    ((6,), (6,), 4, 8),
    ((3, 13), (1, 1), 8, 8),
    ((2, 3, 52), (1, 3, 10), 60, 60),
    ((9, 9), (9, 9), 4, 4),
]


def make_inputs(grid, layout, head_dim, value_dim, *, heads=3, per_head=False, rotary=False):
    seq_len, num_blocks = math.prod(grid), math.prod(layout)
    query, key = torch.randn(2, 2, seq_len, heads, head_dim, dtype=torch.float64)
    value = torch.randn(2, seq_len, heads, value_dim, dtype=torch.float64)
    mixing = torch.rand(*(heads,) * per_head, num_blocks, num_blocks).double()
    tensors = [x.requires_grad_() for x in (query, key, value, mixing)]
    angles = torch.randn(seq_len, head_dim // 2, dtype=torch.float64)
    options = {**OPTIONS, "rotary": (angles.cos(), angles.sin()) if rotary else None}
    return tensors, {**options, "grid": grid, "layout": layout}


def outputs_and_gradients(function, tensors, **options):
    out = function(*tensors, **options)
    weights = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).reshape(out.shape)
    return out, *torch.autograd.grad((out * weights.to(out.dtype)).sum(), tensors)


def assert_same(function, tensors, options, **forced):
    expected = outputs_and_gradients(naive_mhla, tensors, **options)
    actual = outputs_and_gradients(function, tensors, **options, **forced)
    for name, a, e in zip(
        ("out", "query", "key", "value", "mixing"), actual, expected, strict=True
    ):
        # With one block, scaling mixing changes nothing: its gradient is rounding around 0.
        error = (a - e).norm() / e.norm().clamp_min(1)
        assert error < 1e-10, f"{name}: relative error {error:.1e}"


@pytest.mark.parametrize("attention_form", [False, True])
@pytest.mark.parametrize("rotary", [False, True])
@pytest.mark.parametrize("per_head", [False, True])
@pytest.mark.parametrize(("grid", "layout", "head_dim", "value_dim"), SHAPES)
def test_blockwise_equals_definition(
    grid, layout, head_dim, value_dim, per_head, rotary, attention_form
):
    tensors, options = make_inputs(
        grid, layout, head_dim, value_dim, per_head=per_head, rotary=rotary
    )
    assert_same(blockwise_mhla, tensors, options, attention_form=attention_form)


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("feature_map", FEATURE_MAPS)
@pytest.mark.parametrize("attention_form", [False, True])
def test_feature_maps_and_normalizer(feature_map, normalize, attention_form):
    tensors, options = make_inputs((5, 7), (2, 3), 10, 6)
    options |= {"feature_map": feature_map, "normalize": normalize}
    if feature_map == "identity" and normalize:
        # A signed denominator comes near zero; a large eps keeps the comparison well conditioned.
        options["eps"] = 1e3
    assert_same(blockwise_mhla, tensors, options, attention_form=attention_form)


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("per_head", [False, True])
@pytest.mark.parametrize(("length", "blocks"), [(7, 3), (6, 6), (150, 2), (200, 1), (64, 5)])
def test_causal_blockwise_equals_definition(length, blocks, per_head, normalize):
    tensors, options = make_inputs((length,), (blocks,), 6, 4, per_head=per_head, rotary=True)
    assert_same(blockwise_mhla, tensors, options | {"causal": True, "normalize": normalize})


def test_causal_attention_does_not_see_later_tokens():
    (query, key, value, mixing), options = make_inputs((20,), (4,), 6, 6)
    options |= {"causal": True, "implementation": "blockwise"}
    before = mhla(query, key, value, mixing, **options)
    later = torch.cat([value[:, :13], torch.randn_like(value[:, 13:])], dim=1)
    after = mhla(query, key, later, mixing, **options)
    assert torch.equal(before[:, :13], after[:, :13])
    assert not torch.allclose(before[:, 13:], after[:, 13:])


def test_one_block_is_linear_attention():
    (query, key, value, _), _ = make_inputs((5, 7), (1, 1), 10, 6)
    phi_q, phi_k = query.relu() + 1e-6, key.relu() + 1e-6
    scores = torch.einsum("bnhk,bshk->bhns", phi_q, phi_k)
    weights = scores / (scores.sum(-1, keepdim=True) + 1e-6)
    expected = torch.einsum("bhns,bshv->bnhv", weights, value)
    torch.testing.assert_close(linear_attention(query, key, value), expected)
    one = torch.ones(1, 1, dtype=torch.float64)
    actual = mhla(query, key, value, one, grid=(5, 7), layout=(1, 1))
    torch.testing.assert_close(actual, expected)


def test_linear_attention_takes_the_options_of_mhla():
    (query, key, value, _), made = make_inputs((5, 7), (1, 1), 10, 6, rotary=True)
    one = torch.ones(1, 1, dtype=torch.float64)
    plain = linear_attention(query, key, value)
    for options in (
        {"feature_map": "elu+1"}, {"rotary": made["rotary"]}, {"normalize": False},
        {"causal": True}, {"eps": 0.1},
    ):  # fmt: skip
        actual = linear_attention(query, key, value, **options)
        expected = mhla(query, key, value, one, grid=(35,), layout=(1,), **options)
        torch.testing.assert_close(actual, expected)
        assert not torch.allclose(actual, plain)


@pytest.mark.parametrize("implementation", ["naive", "blockwise"])
def test_identity_mixing_makes_blocks_independent(implementation):
    (query, key, value, _), _ = make_inputs((5, 7), (2, 3), 10, 6)
    eye = torch.eye(6, dtype=torch.float64)
    out = mhla(query, key, value, eye, grid=(5, 7), layout=(2, 3), implementation=implementation)
    block = block_of_tokens((5, 7), (2, 3))
    for b in range(6):
        tokens = block == b
        alone = linear_attention(query[:, tokens], key[:, tokens], value[:, tokens])
        torch.testing.assert_close(out[:, tokens], alone)


def test_permuting_tokens_of_a_block_permutes_its_outputs():
    (query, key, value, mixing), _ = make_inputs((6, 8), (2, 2), 8, 8)
    options = {"grid": (6, 8), "layout": (2, 2)}
    order = torch.arange(48)
    inside = (block_of_tokens(**options) == 2).nonzero().squeeze(1)
    order[inside] = inside[torch.randperm(len(inside))]
    out = mhla(query, key, value, mixing, **options)
    permuted = mhla(query[:, order], key[:, order], value[:, order], mixing, **options)
    torch.testing.assert_close(permuted, out[:, order])


def test_scaling_mixing_changes_nothing_when_normalized():
    (query, key, value, mixing), _ = make_inputs((6, 8), (2, 2), 8, 8)
    options = {"grid": (6, 8), "layout": (2, 2), "eps": 0.0}
    out = mhla(query, key, value, mixing, **options)
    torch.testing.assert_close(mhla(query, key, value, 7 * mixing, **options), out)
    # A constant value is returned as it is: weights of a query sum to one.
    ones = mhla(query, key, torch.ones_like(value), mixing, **options)
    torch.testing.assert_close(ones, torch.ones_like(value))


def test_both_rotary_tables_are_where_the_tokens_are():
    tensors, options = make_inputs((4,), (2,), 6, 4, rotary=True)
    cos, sin = options["rotary"]
    with pytest.raises(ValueError, match="rotary is on meta but query on cpu"):
        mhla(*tensors, grid=(4,), layout=(2,), rotary=(cos, sin.to("meta")))


def test_rotary_scores_depend_on_relative_positions():
    (query, key, value, _), _ = make_inputs((9,), (1,), 8, 8)
    one = torch.ones(1, 1, dtype=torch.float64)
    angles = torch.arange(9, dtype=torch.float64)[:, None] * torch.tensor([1.0, 0.3, 0.1, 0.01])
    options = {"grid": (9,), "layout": (1,), "normalize": False}
    out = [
        mhla(query, key, value, one, rotary=(a.cos(), a.sin()), **options)
        for a in (angles, angles + angles[5])
    ]
    torch.testing.assert_close(out[0], out[1])


def test_the_score_form_is_taken_for_short_sequences_only():
    assert attention_form_is_cheaper(64, 16, 64, 64)
    assert not attention_form_is_cheaper(256, 1, 64, 64)
    assert not attention_form_is_cheaper(31500, 150, 128, 128)
    # One token a block: scores are always cheaper than a summary per token.
    assert attention_form_is_cheaper(1024, 1024, 64, 64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("attention_form", [False, True])
def test_low_precision_inputs_sum_in_float32(dtype, attention_form):
    tensors, options = make_inputs((20, 31), (3, 4), 16, 16)
    query, key, value, mixing = (x.detach() for x in tensors)
    rounded = [x.to(dtype) for x in (query, key, value)]
    out = blockwise_mhla(*rounded, mixing.float(), attention_form=attention_form, **options)
    expected = naive_mhla(*(x.double() for x in rounded), mixing, **options)
    assert out.dtype == dtype
    error = (out.double() - expected).norm() / expected.norm()
    # What is left is the output's own rounding, or that of float32 additions: one for each token.
    assert error < max(torch.finfo(dtype).eps, 620 * 6e-8)


@pytest.mark.parametrize("compute", [naive_mhla, blockwise_mhla])
def test_autocast_does_not_lower_the_precision_of_sums(compute):
    tensors, options = make_inputs((20, 31), (3, 4), 16, 16)
    tensors = [x.detach().float() for x in tensors]
    with torch.autocast("cpu", torch.bfloat16):
        inside = compute(*tensors, **options)
    assert torch.equal(inside, compute(*tensors, **options))


def test_blockwise_compiles_without_graph_breaks():
    tensors, options = make_inputs((5, 7), (2, 3), 8, 8, rotary=True)
    rotary = options.pop("rotary")
    options.pop("grid"), options.pop("layout")

    def run(query, key, value, mixing):
        return mhla(query, key, value, mixing, grid=(5, 7), layout=(2, 3), rotary=rotary, **options)

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*tensors), run(*tensors))


def test_linformer_with_identity_projections_is_softmax_attention():
    query, key, value = torch.randn(3, 2, 11, 3, 8)
    out = linformer_attention(query, key, value, torch.eye(11))
    expected = torch.nn.functional.scaled_dot_product_attention(
        *(x.transpose(1, 2) for x in (query, key, value))
    )
    torch.testing.assert_close(out, expected.transpose(1, 2))
    per_head = torch.randn(3, 4, 11)
    assert linformer_attention(query, key, value, per_head, per_head).shape == value.shape
    with pytest.raises(ValueError, match="one column per key"):
        linformer_attention(query, key, value, torch.eye(10))


def call(**changes):
    arguments = {
        "query": torch.randn(1, 12, 2, 8),
        "key": torch.randn(1, 12, 2, 8),
        "value": torch.randn(1, 12, 2, 8),
        "mixing": torch.rand(4, 4),
        "grid": (3, 4),
        "layout": (2, 2),
    } | changes
    tensors = [arguments.pop(name) for name in ("query", "key", "value", "mixing")]
    return mhla(*tensors, **arguments)


@pytest.mark.parametrize("attention_form", [False, True])
def test_transforms_of_functions_are_right(attention_form):
    # Queries come in tiles of one in the attention form, which are computed again in backward.
    tensors, options = make_inputs((40,), (1,), 3, 3, heads=1)
    options |= {"feature_map": "elu+1", "attention_form": attention_form}
    query, *others = (x.detach() for x in tensors)

    def run(query):
        return blockwise_mhla(query, *others, **options)

    leaf = query.clone().requires_grad_()
    (expected,) = torch.autograd.grad(run(leaf).sum(), leaf)
    torch.testing.assert_close(torch.func.grad(lambda x: run(x).sum())(query), expected)
    both = torch.stack((query, -query))
    torch.testing.assert_close(torch.vmap(run)(both), torch.stack([run(x) for x in both]))
    tangent = torch.randn_like(query)
    _, found = torch.func.jvp(run, (query,), (tangent,))
    step = 1e-6 * tangent
    # Central differences: errors of 1e-12 of the third derivative, and of rounding over 1e-6.
    torch.testing.assert_close(
        found, (run(query + step) - run(query - step)) / 2e-6, rtol=1e-6, atol=1e-7
    )


def test_no_tokens_are_refused_and_no_samples_are_not():
    none = torch.randn(1, 0, 2, 8)
    with pytest.raises(ValueError, match="at least one token, found"):
        linear_attention(none, none, none)
    with pytest.raises(ValueError, match="must both be"):
        linear_attention(torch.randn(3), torch.randn(3), torch.randn(3))
    empty = {name: torch.randn(0, 12, 2, 8) for name in ("query", "key", "value")}
    assert call(**empty).shape == (0, 12, 2, 8)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"grid": (3, 5)}, "multiply to seq_len=12"),
        ({"grid": (1, 1, 3, 4), "layout": (1, 1, 1, 1)}, "1 to 3 axes"),
        ({"grid": (-3, -4)}, "at least one token"),
        ({"grid": (3.0, 4)}, "grid must be given in whole numbers"),
        ({"layout": (2.0, 2)}, "layout must be given in whole numbers"),
        ({"query": torch.randn(1, 12, 2, 0), "key": torch.randn(1, 12, 2, 0)}, "head_dim must be"),
        ({"rotary": (torch.ones(12, 4, dtype=torch.complex64),) * 2}, "floating dtype"),
        ({"layout": (4, 1)}, "1 to 3 blocks along axis 0"),
        ({"layout": (0, 4)}, "1 to 3 blocks along axis 0"),
        ({"layout": (2,)}, "one entry per axis"),
        ({"mixing": torch.rand(5, 5)}, r"shape \(4, 4\) or \(2, 4, 4\), found"),
        ({"mixing": torch.rand(3, 4, 4)}, r"shape \(4, 4\) or \(2, 4, 4\), found"),
        ({"mixing": torch.rand(3, 2, 4, 4)}, r"found torch.float32 \(3, 2, 4, 4\)"),
        ({"mixing": torch.ones(4, 4, dtype=torch.int64)}, "must be floating"),
        ({"key": torch.randn(1, 12, 3, 8)}, "query and key must both be"),
        ({"value": torch.randn(1, 12, 3, 8)}, "first three sizes"),
        ({"value": torch.randn(1, 12, 2, 8).half()}, "share one floating dtype"),
        ({"value": torch.randn(1, 12, 2, 8, device="meta")}, "must be on one device"),
        ({"mixing": torch.rand(4, 4, device="meta")}, "mixing is on meta"),
        ({"rotary": (torch.ones(11, 4), torch.ones(11, 4))}, r"= \(12, 4\)"),
        ({"rotary": (torch.ones(12, 8), torch.ones(12, 8))}, r"= \(12, 4\)"),
        ({"feature_map": "exp"}, "feature_map must be one of"),
        ({"causal": True}, "one-dimensional grid"),
        ({"implementation": "quick"}, "implementation must be one of"),
    ],
)
def test_wrong_arguments_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        call(**changes)
