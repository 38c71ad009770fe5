"""The causal kernels against the float64 definition, as `test_fused` does for the others."""

import pytest
import torch
from test_causal import rotary_of
from test_fused import (
    DEVICE,
    DTYPES,
    assert_accurate,
    assert_compiles,
    errors,
    make,
    outputs_and_gradients,
    poisoned,  # noqa: F401
)

from mhla_gen.ops import CausalState, causal_mhla, linear_attention, mhla, resolve_implementation
from mhla_gen.ops.causal_fused import causal_mhla_kernels
from mhla_gen.ops.fused import fused_mhla
from mhla_gen.ops.kernels import linear_form
from mhla_gen.ops.kernels.launch import Call
from mhla_gen.ops.kernels.linear_form import Summaries
from mhla_gen.ops.naive import naive_mhla

CAUSAL = {"causal": True}


@pytest.mark.parametrize(
    ("seq_len", "num_blocks", "dtype"),
    [(1, 1, torch.float32), (5, 5, torch.float32), (90, 2, torch.float32), (11, 4, torch.float32)]
    + [(53, 3, dtype) for dtype in DTYPES],
)
def test_lengths_and_blocks(poisoned, seq_len, num_blocks, dtype):  # noqa: F811
    # Few weights cancel where outputs are normalised, and leave no gradient to compare.
    options = {"normalize": num_blocks > 2, **CAUSAL}
    assert_accurate(*make((seq_len,), (num_blocks,), dtype, **options))


@pytest.mark.parametrize(
    ("feature_map", "head_dim", "value_dim", "changes"),
    [
        ("softplus", 36, 20, {"per_head": True}),
        ("elu+1", 20, 36, {"rotary": False}),
        ("squared_relu", 16, 24, {"normalize": False}),
        ("identity", 24, 16, {"normalize": False, "per_head": True}),
        ("relu", 72, 128, {"batch": 2, "heads": 1, "per_head": True}),
    ],
)
def test_options(poisoned, feature_map, head_dim, value_dim, changes):  # noqa: F811
    sizes = {"head_dim": head_dim, "value_dim": value_dim, "feature_map": feature_map}
    assert_accurate(*make((23,), (2,), **sizes, **CAUSAL, **changes))


def test_long_blocks_are_cut(poisoned):  # noqa: F811
    inputs, options = make((262,), (2,), heads=1, per_head=True, normalize=False, **CAUSAL)
    assert_accurate(inputs, options)
    q, k, v, _ = (x[:, :135].contiguous() for x in inputs)
    expected = linear_attention(q, k, v, causal=True, implementation="naive")
    actual = linear_attention(q, k, v, causal=True, implementation="fused")
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("scale", [1e-6, 1.0, 300.0])
def test_float16_summaries_neither_overflow_nor_vanish(scale):
    inputs, options = make((30,), (3,), torch.float16, heads=1, normalize=False, **CAUSAL)
    q, k, v, mixing = inputs
    inputs = q, (k * 0.1).half(), (v * scale).half(), mixing
    expected = outputs_and_gradients(naive_mhla, inputs, options, torch.float64)
    actual = outputs_and_gradients(fused_mhla, inputs, options | {"stored": torch.float16})
    # Operands are rounded to float16 once or twice, by half of its eps; eight times that. What
    # overflows or vanishes is off by all there is.
    few = 8 * torch.finfo(torch.float16).eps
    assert errors(actual[:1], expected[:1])[0] < (0.05 if scale < 1 else few)
    assert errors(actual[3:4], expected[3:4])[0] < few


def test_a_token_reads_nothing_after_it():
    (q, k, v, mixing), options = make((50,), (4,), **CAUSAL)
    changed = [x.clone() for x in (k, v)]
    for x in changed:
        x[:, 31:] = 1e3
    before = fused_mhla(q, k, v, mixing, **options)
    after = fused_mhla(q, *changed, mixing, **options)
    assert torch.equal(before[:, :31], after[:, :31])
    assert not torch.allclose(before[:, 31:], after[:, 31:])


@pytest.mark.parametrize("masked", [False, True])
def test_sequences_with_padding_and_grouped_queries(masked, monkeypatch):
    """`causal_mhla` through the kernels is what it is without them."""
    seq_len, block = 17, 5
    q, k, v = (torch.randn(2, seq_len, h, 12, device=DEVICE) for h in (2, 1, 1))
    weights = torch.rand(1, 3, device=DEVICE)
    mask = None
    if masked:
        mask = torch.ones(2, seq_len, dtype=torch.bool, device=DEVICE)
        mask[0, :8], mask[1, 10:13] = False, False
    tables = rotary_of(torch.arange(seq_len), 12)
    tables = tuple(t.repeat(1, 2).float().to(DEVICE) for t in tables)
    options = {"block_size": block, "rotary": tables, "mask": mask}
    found = []
    for implementation in ("blockwise", "fused"):
        inputs = [x.detach().clone().requires_grad_() for x in (q, k, v, weights)]
        monkeypatch.setattr(
            "mhla_gen.ops.dispatch.resolve_implementation", lambda *_, i=implementation, **__: i
        )
        out = causal_mhla(*inputs, **options)
        grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out)
        found.append((out, *torch.autograd.grad(out, inputs, grad)))
    for actual, expected in zip(found[1], found[0], strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize(
    ("head_dim", "value_dim", "key_heads", "changes"),
    [
        (12, 20, 2, {}),
        (64, 36, 4, {"normalize": False, "feature_map": "softplus"}),
        (20, 16, 1, {"memory_blocks": 2}),
    ],
)
@pytest.mark.parametrize("tables", [None, "shared", "own"])
def test_steps_in_one_launch(head_dim, value_dim, key_heads, changes, tables, monkeypatch):
    shapes = ((4, head_dim), (key_heads, head_dim), (key_heads, value_dim))
    q, k, v = (torch.randn(3, 12, *shape, device=DEVICE) for shape in shapes)
    weights = torch.rand(key_heads, 4, device=DEVICE)
    rotary = None
    if tables:
        angles = 6 * torch.rand(3 if tables == "own" else 1, 12, head_dim // 2, device=DEVICE)
        rotary = angles.cos(), angles.sin()
    found = []
    for fused in (False, True):
        monkeypatch.setattr(CausalState, "_has_kernel", lambda *_, f=fused: f)
        state = CausalState(weights, block_size=3, **changes)
        state.prefill(
            q[:, :4], k[:, :4], v[:, :4], rotary=rotary and tuple(t[0, :4] for t in rotary)
        )
        out = [
            state.step(
                *(x[:, [n]] for x in (q, k, v)), rotary=rotary and tuple(t[:, [n]] for t in rotary)
            )
            for n in range(4, 12)
        ]
        found.append((torch.cat(out, dim=1), state.open, state.open_keys, state.finished))
    # Sums of 12 tokens by 64 channels in float32, some of which cancel: 768 * 6e-8 at worst.
    for actual, expected in zip(found[1], found[0], strict=True):
        scale = expected.abs().max().clamp(min=1)
        torch.testing.assert_close(actual / scale, expected / scale, rtol=0, atol=5e-5)


@pytest.mark.parametrize("stored", [torch.float32, torch.float16])
def test_what_a_triangle_leaves_out_changes_nothing(stored):
    blocks, dim = 70, 4
    token = torch.randn(1, blocks, 1, dim, device=DEVICE, dtype=torch.float16)
    call = Call(token, token, None, None, [blocks], [blocks], "relu", True, 1e-6, stored)
    made = [torch.rand(x.shape, device=DEVICE).to(x.dtype) for x in
            Summaries.empty(token, token, blocks, stored, True)]  # fmt: skip
    lower = torch.rand(blocks, blocks, device=DEVICE).tril(-1)
    for mixing, triangle in ((lower, "lower"), (lower.mT, "upper")):
        expected = linear_form.mix(mixing, Summaries(*made), call)
        actual = linear_form.mix(mixing, Summaries(*made), call, triangle)
        assert all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True))
    expected = linear_form.correlate(Summaries(*made), Summaries(*made), lower, call)
    actual = linear_form.correlate(Summaries(*made), Summaries(*made), lower, call, lower=True)
    assert torch.equal(actual.tril(), expected.tril()) and not torch.equal(actual, expected)


def test_repeated_runs_are_bit_equal():
    inputs, options = make((41,), (2,), torch.float16, **CAUSAL)
    first = outputs_and_gradients(fused_mhla, inputs, options)
    second = outputs_and_gradients(fused_mhla, inputs, options)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_frozen_mixing_has_no_gradient():
    inputs, options = make((20,), (3,), **CAUSAL)
    *expected, _ = outputs_and_gradients(fused_mhla, inputs, options)
    tokens = [x.detach().requires_grad_() for x in inputs[:3]]
    out = fused_mhla(*tokens, inputs[3], **options)
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    gradients = torch.autograd.grad(out, tokens, grad.to(out).bfloat16().to(out.dtype))
    assert all(torch.equal(a, e) for a, e in zip((out, *gradients), expected, strict=True))


def test_opcheck():
    (q, k, v, mixing), options = make((6,), (2,), heads=1)
    inputs = [x.detach().clone().requires_grad_() for x in (q, k, v, mixing)]
    arguments = (*inputs, *options["rotary"], "relu", True, 1e-6, torch.float32)
    torch.library.opcheck(causal_mhla_kernels, arguments)


def test_compiles_into_one_graph():
    tensors, _ = make((20,), (3,))
    assert_compiles(tensors, grid=(20,), layout=(3,), implementation="fused", causal=True)


def test_auto_takes_the_kernels_where_they_run():
    assert resolve_implementation("auto", device="cuda", num_blocks=2048) == "fused"
    assert resolve_implementation("auto", device="cuda", num_blocks=2049) == "blockwise"


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("head_dim", "block"), [(64, 64), (64, 300), (128, 64), (128, 100), (72, 17), (60, 128)]
)
def test_head_sizes_on_gpu(poisoned, head_dim, block):  # noqa: F811
    sizes = {"head_dim": head_dim, "value_dim": 72, **CAUSAL}
    assert_accurate(*make((5 * block + 3,), (5,), torch.bfloat16, **sizes))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_steps_are_the_parallel_form_on_gpu(dtype):
    q, k, v = (torch.randn(2, 150, h, 64, device=DEVICE, dtype=dtype) for h in (8, 2, 2))
    weights = torch.rand(2, 3, device=DEVICE)
    whole = causal_mhla(q, k, v, weights, block_size=16)
    state = CausalState(weights, block_size=16)
    out = [state.prefill(q[:, :70], k[:, :70], v[:, :70])]
    out += [state.step(q[:, [n]], k[:, [n]], v[:, [n]]) for n in range(70, 150)]
    assert errors([torch.cat(out, dim=1)], [whole.double()])[0] < (
        1e-5 if dtype.itemsize == 4 else 1e-2
    )


@pytest.mark.gpu
@pytest.mark.parametrize("head_dim", [64, 128])
def test_many_tokens_on_gpu(head_dim):
    options = {"head_dim": head_dim, "value_dim": head_dim, "heads": 2, **CAUSAL}
    inputs, options = make((16384,), (256,), torch.bfloat16, **options)
    found = outputs_and_gradients(fused_mhla, inputs, options)
    expected = outputs_and_gradients(
        mhla, inputs, options | {"implementation": "blockwise"}, torch.float32
    )
    assert max(errors(found, [x.double() for x in expected])) < 2e-2


@pytest.mark.gpu
def test_inductor_on_gpu():
    (q, k, v, mixing), options = make((200,), (5,), torch.bfloat16, **CAUSAL)
    compiled = torch.compile(lambda *x: fused_mhla(*x, **options) * 2, fullgraph=True)
    torch.testing.assert_close(
        compiled(q, k, v, mixing), fused_mhla(q, k, v, mixing, **options) * 2
    )
