"""MHLA that is causal over frames: all at once and chunk by chunk against the definition."""

import math

import pytest
import torch

from mhla_gen.errors import UserError
from mhla_gen.ops import (
    FRAME_MIXING_INITS,
    FrameState,
    frame_causal_mhla,
    frame_locality,
    frame_mixing,
    fused_limits,
)

# Frames of a chunk, grid, blocks of a chunk along each axis but the first.
SHAPES = [
    (1, (4, 3, 5), (2, 3)),
    (2, (7, 5, 4), (2, 2)),
    (3, (7, 3, 7), (1, 3)),
    (3, (2, 4, 5), (3, 1)),
    (2, (5, 9), (4,)),
    (3, (8,), ()),
]


def tokens_of(grid, heads=2, head_dim=6, value_dim=5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = [(2, math.prod(grid), heads, size) for size in (head_dim, head_dim, value_dim)]
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]


def weights_of(distances, layout, heads=None):
    blocks = math.prod(layout)
    shape = (distances, blocks, blocks) if heads is None else (heads, distances, blocks, blocks)
    generator = torch.Generator().manual_seed(1)
    return torch.rand(shape, generator=generator, dtype=torch.float64)


def rotary_of(seq_len):
    rates = torch.tensor([1.0, 0.3, 0.02], dtype=torch.float64)
    angles = torch.arange(seq_len)[:, None] * rates
    return angles.cos(), angles.sin()


def chunk_by_chunk(query, key, value, weights, *, grid, rotary=None, **options):
    """Every chunk is read twice, first as something else, before it is appended."""
    state, out = FrameState(weights, **options), []
    frame = math.prod(grid[1:])
    for first in range(0, grid[0], options["chunk_frames"]):
        frames = min(options["chunk_frames"], grid[0] - first)
        rows = slice(first * frame, (first + frames) * frame)
        tables = None if rotary is None else tuple(table[rows] for table in rotary)
        given = {"grid": (frames, *grid[1:]), "rotary": tables}
        state.read(query[:, rows] + 1, key[:, rows] - 1, value[:, rows], **given)
        out.append(state.read(query[:, rows], key[:, rows], value[:, rows], **given, append=True))
    return torch.cat(out, dim=1)


@pytest.mark.parametrize("chunk_frames, grid, layout", SHAPES)
@pytest.mark.parametrize("distances", [1, 2, 3, 5])
@pytest.mark.parametrize("normalize", [False, True])
def test_both_forms_are_the_definition_with_all_gradients(
    chunk_frames, grid, layout, distances, normalize
):
    heads = 2 if distances == 2 else None
    rotary = rotary_of(math.prod(grid)) if normalize else None
    inputs = [*tokens_of(grid), weights_of(distances, layout, heads)]
    options = {"chunk_frames": chunk_frames, "layout": layout, "normalize": normalize}
    options["feature_map"] = "softplus" if distances == 3 else "relu"

    def run(function, **more):
        leaves = [x.clone().requires_grad_() for x in inputs]
        out = function(*leaves, grid=grid, rotary=rotary, **options, **more)
        generator = torch.Generator().manual_seed(2)
        probe = torch.randn(out.shape, generator=generator, dtype=torch.float64)
        return [out, *torch.autograd.grad((out * probe).sum(), leaves)]

    expected = run(frame_causal_mhla, implementation="naive")
    for found in (run(frame_causal_mhla), run(chunk_by_chunk)):
        for ours, defined in zip(found, expected, strict=True):
            torch.testing.assert_close(ours, defined, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_short_last_chunk_does_not_round_features(dtype):
    grid = (3, 2, 3)
    # Squares of features beyond the largest number of float16.
    query, key, value = (x.to(dtype) for x in tokens_of(grid))
    key = key * 300
    options = {"grid": grid, "chunk_frames": 2, "layout": (1, 2), "feature_map": "squared_relu"}
    weights = weights_of(2, (1, 2)).float()
    leaves = [x.requires_grad_() for x in (query, key, value, weights)]
    exact = [x.detach().double().requires_grad_() for x in leaves]
    out = frame_causal_mhla(*leaves, **options)
    expected = frame_causal_mhla(*exact, **options, implementation="naive")
    assert out.dtype == dtype
    found = (out, *torch.autograd.grad(out.float().square().sum(), leaves))
    # The same gradient of the output, which is rounded.
    given = (2 * out.detach().float()).to(dtype).double()
    wanted = (expected, *torch.autograd.grad(expected, exact, given))
    for ours, defined in zip(found, wanted, strict=True):
        assert ours.isfinite().all()
        error = (ours.double() - defined).norm() / defined.norm()
        # Rounded once, to `dtype`; float32 sums of 18 tokens are far below.
        assert error < torch.finfo(ours.dtype).eps + 1e-4, error


def test_nothing_is_read_of_later_chunks_and_all_of_the_own_one():
    grid, options = (6, 3, 4), {"grid": (6, 3, 4), "chunk_frames": 2, "layout": (2, 2)}
    query, key, value = tokens_of(grid)
    value.requires_grad_()
    out = frame_causal_mhla(query, key, value, weights_of(2, (2, 2)), **options)
    per_frame = out.unflatten(1, (6, 12))
    for frame in range(6):
        (gradient,) = torch.autograd.grad(per_frame[:, frame].sum(), value, retain_graph=True)
        reads = gradient.unflatten(1, (6, 12)).abs().sum((0, 2, 3, 4)) > 0
        assert reads.tolist() == [number < (frame // 2 + 1) * 2 for number in range(6)]


def test_a_longer_clip_continues_a_shorter_one():
    weights = weights_of(3, (2,))
    short, long = frame_mixing(weights, 3), frame_mixing(weights, 7)
    assert long[:6, :6].equal(short)
    # By the distance in time alone, and with the last weight from there on.
    assert long[4:6, 2:4].equal(weights[1]) and long[12:14, 0:2].equal(weights[2])
    assert long[0:2, 2:].eq(0).all()


def test_a_state_does_not_grow():
    weights, sizes = weights_of(3, (2, 2)), set()
    state = FrameState(weights, chunk_frames=1, layout=(2, 2))
    for seed in range(8):
        query, key, value = tokens_of((1, 3, 4), seed=seed)
        state.read(query, key, value, grid=(1, 3, 4), append=True)
        sizes.add(sum(x.numel() for x in (*state.finished, *state.past)))
    assert len(sizes) == 1 and not state.ended


def test_initial_weights_favour_near_chunks_and_blocks():
    weights = frame_locality((4, 2, 3))
    assert weights.shape == (4, 6, 6) and weights.min() > 0
    torch.testing.assert_close(weights.sum((0, 2)), torch.ones(6))
    assert (weights.diff(dim=0) < 0).all()
    assert weights[0].diagonal().eq(weights[0].amax(1)).all()


@pytest.mark.parametrize("init", FRAME_MIXING_INITS.values())
def test_initial_weights_need_blocks(init):
    for layout in ((), (0, 2), (2, 0)):
        with pytest.raises(ValueError, match="at least one block along every axis"):
            init(layout)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"chunk_frames": 0}, "chunk_frames must be at least 1"),
        ({"chunk_frames": 2.0}, "whole numbers"),
        ({"layout": (2,)}, "layout needs"),
        ({"layout": (4, 2)}, "no more than tokens"),
        ({"weights": weights_of(2, (2, 3))}, "weights for 4 blocks"),
        ({"weights": weights_of(2, (2, 2), 3)}, "or the same for each head"),
        ({"grid": (3, 3, 4)}, "multiply to seq_len"),
    ],
)
def test_what_does_not_fit_is_refused(changes, message):
    options = {"grid": (4, 3, 4), "chunk_frames": 2, "layout": (2, 2)} | changes
    weights = options.pop("weights", weights_of(2, (2, 2)))
    with pytest.raises(ValueError, match=message):
        frame_causal_mhla(*tokens_of((4, 3, 4)), weights, **options)


def test_chunks_come_one_at_a_time():
    state = FrameState(weights_of(2, (2, 2)), chunk_frames=2, layout=(2, 2))
    with pytest.raises(UserError, match="1 to 2 frames, found 3"):
        state.read(*tokens_of((3, 3, 4)), grid=(3, 3, 4))
    state.read(*tokens_of((1, 3, 4)), grid=(1, 3, 4), append=True)
    with pytest.raises(UserError, match="the clip's last"):
        state.read(*tokens_of((1, 3, 4)), grid=(1, 3, 4))


def test_a_state_names_what_does_not_fit():
    weights = weights_of(2, (2, 2))
    for wrong, message in (
        ({"chunk_frames": 0}, "at least 1"),
        ({"layout": (2, 3)}, "weights for 6 blocks"),
        ({"feature_map": "exp"}, "feature_map must be one of"),
    ):
        with pytest.raises(ValueError, match=message):
            FrameState(weights, **{"chunk_frames": 1, "layout": (2, 2)} | wrong)
    state = FrameState(weights, chunk_frames=1, layout=(2, 2))
    chunk = tokens_of((1, 3, 4))
    expected = state.read(*(x[:1] for x in chunk), grid=(1, 3, 4), append=True)
    kept = state.finished
    # A batch of one would be read by every sample.
    others = chunk, tokens_of((1, 3, 4), heads=3), tokens_of((1, 3, 4), head_dim=4)
    for other in others:
        with pytest.raises(ValueError, match="the state holds"):
            state.read(*other, grid=(1, 3, 4), append=True)
    assert state.finished is kept and expected.shape[0] == 1


def test_a_state_never_runs_another_implementation_than_asked_for(monkeypatch):
    weights, grid = weights_of(2, (1, 2)), (1, 2, 5)
    for name in ("naive", "fast"):
        with pytest.raises(UserError, match="auto, blockwise or fused"):
            FrameState(weights, chunk_frames=1, layout=(1, 2), implementation=name)
    state = FrameState(weights, chunk_frames=1, layout=(1, 2), implementation="fused")
    # Kernels take no float64, wherever they run.
    with pytest.raises(UserError, match=r"implementation='fused' (takes float32|needs tensors)"):
        state.read(*tokens_of(grid), grid=grid)
    # They would not give rotary tables a gradient.
    tables = tuple(table.requires_grad_() for table in rotary_of(10))
    with pytest.raises(UserError, match="without gradients"):
        state.read(*tokens_of(grid), grid=grid, rotary=tables)
    monkeypatch.setattr(fused_limits, "HAS_TRITON", False)
    with pytest.raises(UserError, match="needs the package triton"):
        state.read(*tokens_of(grid), grid=grid)


KERNELS = [(torch.float32, True, 1e-5), (torch.float16, False, 1e-3)]
# Triton's interpreter multiplies bfloat16 wrongly.
KERNELS += [(torch.bfloat16, True, 2e-2)] * torch.cuda.is_available()


@pytest.mark.parametrize("dtype, normalize, close", KERNELS)
def test_the_kernels_give_the_same_chunk_by_chunk(dtype, normalize, close, monkeypatch):
    pytest.importorskip("triton")
    from mhla_gen.ops.kernels import linear_form

    if not (torch.cuda.is_available() or fused_limits.INTERPRETED):
        pytest.skip("needs a GPU, or TRITON_INTERPRET=1")
    calls = []
    summarise = linear_form.summarise
    monkeypatch.setattr(linear_form, "summarise", lambda *x: calls.append(1) or summarise(*x))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    grid = (3, 2, 5)
    inputs = [x[:1].to(device, dtype) for x in tokens_of(grid, head_dim=16, value_dim=16)]
    rotary = tuple(table.repeat(1, 3)[:, :8].float().to(device) for table in rotary_of(30))
    weights = weights_of(2, (1, 2), 2).float().to(device)
    options = {"grid": grid, "chunk_frames": 2, "layout": (1, 2), "normalize": normalize}
    options["rotary"] = rotary
    wide = [x.double() for x in (*inputs, weights)]
    expected = frame_causal_mhla(*wide, **options, implementation="naive")
    found = chunk_by_chunk(*inputs, weights, **options, implementation="fused")
    torch.testing.assert_close(found.double(), expected, rtol=close, atol=close)
    assert calls
    with pytest.raises(UserError, match="without gradients"):
        chunk_by_chunk(*inputs, weights.requires_grad_(), **options, implementation="fused")
