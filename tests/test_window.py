"""Softmax within a window and MHLA before it, against sums over pairs of tokens, in float64."""

import io

import pytest
import torch
from test_causal import BLOCK, rotary_of, tokens, weights_of

from mhla_gen.ops import CausalState, WindowState, causal_mhla, window_attention
from mhla_gen.ops.feature_maps import relu, rotate


def definition(query, key, value, weights, window, rotary):
    """Both halves of every token, from its own sums over earlier ones."""
    group = query.shape[2] // key.shape[2]
    key, value = (x.repeat_interleave(group, dim=2) for x in (key, value))
    seq_len, head_dim = query.shape[1], query.shape[3]
    q, k = rotate(query, rotary), rotate(key, rotary)
    exact, linear = torch.zeros_like(value), torch.zeros_like(value)
    for n in range(seq_len):
        near = range(max(0, n - window + 1), n + 1)
        scores = torch.stack([(q[:, n] * k[:, s]).sum(-1) for s in near]) / head_dim**0.5
        share = scores.softmax(0)
        exact[:, n] = sum(share[i].unsqueeze(-1) * value[:, s] for i, s in enumerate(near))
        late = n - window
        numerator, denominator = 0, 0
        for s in range(late + 1):
            tables = None if rotary is None else [tuple(t[[i]] for t in rotary) for i in (late, s)]
            phi_q, phi_k = relu(query[:, [n]]), relu(key[:, [s]])
            weight = weights[min(late // BLOCK - s // BLOCK, len(weights) - 1)]
            denominator = denominator + weight * (phi_q * phi_k).sum(-1)[:, 0]
            if tables is not None:
                phi_q, phi_k = rotate(phi_q, tables[0]), rotate(phi_k, tables[1])
            score = weight * (phi_q * phi_k).sum(-1)[:, 0]
            numerator = numerator + score.unsqueeze(-1) * value[:, s]
        if late >= 0:
            linear[:, n] = numerator / (denominator.unsqueeze(-1) + 1e-6)
        else:
            linear[:, n] = exact[:, n]
    return exact, linear


def both_halves(q, k, v, weights, window, rotary=None, mask=None):
    exact, late = window_attention(q, k, v, window=window, rotary=rotary, mask=mask)
    if late is None:
        return exact, exact
    options = {"block_size": BLOCK, "rotary": late.rotary, "mask": late.mask}
    linear = causal_mhla(late.query, late.key, late.value, weights, **options)
    return exact, late.completed(linear, exact)


def read(states, q, k, v, rotary=None, mask=None):
    window, linear = states
    exact, late = window.read(q, k, v, rotary=rotary, mask=mask)
    if late is None:
        return exact, exact
    if late.query.shape[1] == 1 and late.mask is None:
        out = linear.step(late.query, late.key, late.value, rotary=late.rotary)
    else:
        out = linear.prefill(
            late.query, late.key, late.value, rotary=late.rotary, mask=late.mask
        )  # fmt: skip
    return exact, late.completed(out, exact)


def states_of(weights, window):
    return WindowState(window), CausalState(weights, block_size=BLOCK)


@pytest.mark.parametrize("window", [1, 3, 7, 22, 23, 40])
@pytest.mark.parametrize("cuts", [(23,), (1,) * 23, (2, 1, 1, 12, 1, 6), (7, 16)])
@pytest.mark.parametrize("rotated", [False, True])
def test_whole_sequences_and_states_are_the_definition(window, cuts, rotated):
    q, k, v = tokens(23)
    weights = weights_of(3)
    rotary = rotary_of(torch.arange(23)) if rotated else None
    expected = definition(q, k, v, weights, window, rotary)
    torch.testing.assert_close(both_halves(q, k, v, weights, window, rotary), expected)
    states, found, start = states_of(weights, window), [], 0
    for count in cuts:
        part = slice(start, start + count)
        tables = None if rotary is None else tuple(t[part] for t in rotary)
        found.append(read(states, q[:, part], k[:, part], v[:, part], tables))
        start += count
    for half, whole in zip(zip(*found, strict=True), expected, strict=True):
        torch.testing.assert_close(torch.cat(half, dim=1), whole)
    assert states[0].key.shape[1] == min(window, 23)


@pytest.mark.parametrize("window", [1, 64, 70])
def test_chunks_of_long_sequences_are_one_band(window):
    q, k, v = tokens(333, batch=1, heads=2, key_heads=1)
    exact, _ = window_attention(q, k, v, window=window)
    scores = torch.einsum("bqhk,bshk->bhqs", q, k.expand_as(q)) / 6**0.5
    distance = torch.arange(333)[:, None] - torch.arange(333)
    scores = scores.masked_fill((distance < 0) | (distance >= window), -torch.inf)
    expected = torch.einsum("bhqs,bshv->bqhv", scores.softmax(-1), v.expand(-1, -1, 2, -1))
    torch.testing.assert_close(exact, expected)


@pytest.mark.parametrize("seq_len, window", [(9, 3), (150, 40)])
@pytest.mark.parametrize("masked", [False, True])
def test_gradients(seq_len, window, masked):
    q, k, v = (x.requires_grad_() for x in tokens(seq_len, 1, 2, 1, 4, 3))
    mask = torch.arange(seq_len)[None] % 5 != 2 if masked else None
    check = torch.autograd.gradcheck
    function = lambda *x: window_attention(*x, window=window, mask=mask)[0]  # noqa: E731
    assert check(function, (q, k, v), fast_mode=seq_len > 10)


@pytest.mark.parametrize("masked", [False, True])
def test_gradients_of_both_halves(masked):
    q, k, v = (x.requires_grad_() for x in tokens(11, 1, 2, 1, 6, 3))
    weights = weights_of(2).requires_grad_()
    mask = torch.arange(11)[None] % 5 != 2 if masked else None
    rotary = rotary_of(torch.arange(11))
    function = lambda *x: both_halves(*x, 4, rotary, mask)  # noqa: E731
    assert torch.autograd.gradcheck(function, (q, k, v, weights), fast_mode=True)


@pytest.mark.parametrize("window", [2, 5, 30])
def test_padding_anywhere_is_no_part_of_a_sequence(window):
    q, k, v = tokens(24, batch=3)
    weights = weights_of(3)
    mask = torch.ones(3, 24, dtype=torch.bool)
    mask[0, :9] = False
    mask[1, 5:11] = False
    mask[2, 1:23] = False
    angles = rotary_of(torch.arange(24))
    found = both_halves(q, k, v, weights, window, angles, mask)
    noisy = [torch.where(mask[..., None, None], x, torch.nan) for x in (q, k, v)]
    for half, same in zip(found, both_halves(*noisy, weights, window, angles, mask), strict=True):
        assert torch.equal(half, same)
    states, parts = states_of(weights, window), []
    for part in (slice(0, 7), slice(7, 8), slice(8, 20), slice(20, 21), slice(21, 24)):
        tables = tuple(t[part] for t in angles)
        tokens_now = (x[:, part] for x in (q, k, v))
        parts.append(read(states, *tokens_now, tables, mask[:, part]))
    cut = [torch.cat(half, dim=1) for half in zip(*parts, strict=True)]
    for b in range(3):
        alone = (x[b : b + 1, mask[b]] for x in (q, k, v))
        expected = definition(*alone, weights, window, tuple(t[mask[b]] for t in angles))
        for half, other, whole in zip(found, cut, expected, strict=True):
            torch.testing.assert_close(half[b : b + 1, mask[b]], whole)
            torch.testing.assert_close(other[b : b + 1, mask[b]], whole)
            assert (half[b, ~mask[b]] == 0).all()


@pytest.mark.parametrize("cuts", [(1, 1, 7), (2, 1, 1, 5), (3, 6)])
def test_a_state_may_begin_with_nothing_but_padding(cuts):
    q, k, v = tokens(9)
    mask = torch.ones(2, 9, dtype=torch.bool)
    mask[:, : cuts[0]] = False
    expected, _ = window_attention(q, k, v, window=3, mask=mask)
    state, out = WindowState(3), []
    for rows in torch.arange(9).split(cuts):
        some = None if mask[:, rows].all() else mask[:, rows]
        out.append(state.read(q[:, rows], k[:, rows], v[:, rows], mask=some)[0])
    torch.testing.assert_close(torch.cat(out, dim=1), expected)
    assert state.lengths.tolist() == [9 - cuts[0]] * 2


def test_a_window_saves_loads_moves_and_reorders():
    q, k, v = tokens(19, batch=3)
    mask = torch.ones(3, 10, dtype=torch.bool)
    mask[1, :7] = False
    rotary = rotary_of(torch.arange(19))
    state = WindowState(4)
    state.read(q[:, :10], k[:, :10], v[:, :10], mask=mask, rotary=tuple(t[:10] for t in rotary))
    file = io.BytesIO()
    torch.save(state.state_dict(), file)
    file.seek(0)
    loaded = WindowState.from_state_dict(torch.load(file, weights_only=True)).to("cpu")
    index = torch.tensor([2, 1, 1, 0])
    loaded.reorder(index)
    assert loaded.lengths.tolist() == [10, 3, 3, 10]
    for n in range(10, 19):
        tables = tuple(t[[n]] for t in rotary)
        expected, _ = state.read(q[:, [n]], k[:, [n]], v[:, [n]], rotary=tables)
        now = (x[index][:, [n]] for x in (q, k, v))
        torch.testing.assert_close(loaded.read(*now, rotary=tables)[0], expected[index])
    assert loaded.to("meta").value.device.type == "meta"
    with pytest.raises(ValueError, match="give what state_dict returned"):
        WindowState.from_state_dict({"window": 3})


def test_a_window_keeps_nothing_else_of_a_long_prompt():
    state = WindowState(4)
    state.read(*tokens(100))
    for n in range(3):
        state.read(*tokens(1, seed=n))
    held = (state.key, state.rotated, state.value)
    assert all(x.untyped_storage().nbytes() <= 5 / 4 * x.numel() * 8 for x in held)


def test_what_does_not_fit_is_named():
    q, k, v = tokens(5)
    with pytest.raises(ValueError, match="window must be at least 1"):
        window_attention(q, k, v, window=0)
    with pytest.raises(ValueError, match="whole numbers"):
        window_attention(q, k, v, window=2.5)
    with pytest.raises(ValueError, match="mask must be bool"):
        window_attention(q, k, v, window=2, mask=torch.ones(2, 5))
    state = WindowState(3)
    state.read(q, k, v)
    with pytest.raises(ValueError, match="the window holds"):
        state.read(q[:1], k[:1], v[:1])
    with pytest.raises(ValueError, match=r"torch.float64 on cpu, found .*, torch.bfloat16 on cpu"):
        state.read(*(x.bfloat16() for x in (q, k, v)))
    with pytest.raises(ValueError, match=r"on cpu, found tokens of .* on meta"):
        state.read(*(x.to("meta") for x in (q, k, v)))


@pytest.mark.gpu
@pytest.mark.parametrize("head_dim", [64, 128, 72])
@pytest.mark.parametrize("masked", [False, True])
def test_a_window_on_gpu(head_dim, masked):
    torch.manual_seed(0)
    shapes = [(2, 700, heads, head_dim) for heads in (4, 2, 2, 4)]
    *inputs, grad = (torch.randn(shape, device="cuda", dtype=torch.bfloat16) for shape in shapes)
    mask = (
        (torch.arange(700, device="cuda") >= torch.tensor([[0], [77]]).cuda()) if masked else None
    )

    def results(inputs, grad):
        leaves = [x.detach().requires_grad_() for x in inputs]
        out, _ = window_attention(*leaves, window=100, mask=mask)
        return out, *torch.autograd.grad(out, leaves, grad)

    # float64 is computed in chunks, half precision by a kernel.
    expected = results([x.double() for x in inputs], grad.double())
    for one, other in zip(results(inputs, grad), expected, strict=True):
        assert (one.double() - other).norm() < 1e-2 * other.norm()
