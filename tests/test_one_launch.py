"""The linear form's forward pass in one launch, beside that of several and the definition."""

from dataclasses import replace

import pytest
import torch

from mhla_gen.ops import locality_mixing, mhla
from mhla_gen.ops.fused import fused_mhla
from mhla_gen.ops.kernels import one_launch_form
from mhla_gen.ops.kernels.launch import Call

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CASES = [
    # grid, layout, head_dim, value_dim, feature map, rotary, normalize
    ((5, 7), (2, 2), 24, 24, "relu", False, True),
    ((2, 2, 3), (1, 2, 1), 72, 72, "softplus", True, True),
    ((30,), (4,), 16, 40, "identity", False, False),
    ((5, 7), (3, 2), 32, 32, "elu+1", True, True),
]


def call(case, dtype=torch.float32):
    grid, layout, head_dim, value_dim, feature_map, rotates, normalize = case
    tokens, heads = torch.Size(grid).numel(), 2
    joined = torch.randn(1, tokens, heads, 2 * head_dim + value_dim, device=DEVICE, dtype=dtype)
    sizes = [head_dim, head_dim, value_dim]
    tensors = [x.detach().requires_grad_() for x in joined.split(sizes, dim=-1)]
    mixing = (locality_mixing(layout) + torch.rand(2, 1, 1) / 8).to(DEVICE).requires_grad_()
    angles = torch.rand(tokens, head_dim // 2, device=DEVICE)
    options = {
        "grid": grid,
        "layout": layout,
        "feature_map": feature_map,
        "rotary": (angles.cos(), angles.sin()) if rotates else None,
        "normalize": normalize,
    }
    return [*tensors, mixing], options


def outputs_and_gradients(tensors, options):
    more = {"causal": False, "eps": 1e-6, "use_attention_form": False, "stored": torch.float16}
    out = fused_mhla(*tensors, **options, **more)
    direction = (torch.arange(out.numel(), device=DEVICE).view(out.shape) % 7).to(out.dtype)
    return [out, *torch.autograd.grad(out, tensors, direction)]


@pytest.fixture
def allowed(monkeypatch):
    settings = replace(one_launch_form.SETTINGS, allowed=True, fewest_heads=2)
    monkeypatch.setattr(one_launch_form, "SETTINGS", settings)
    calls = []
    forward = one_launch_form.forward
    monkeypatch.setattr(
        one_launch_form, "forward", lambda *args: (calls.append(1), forward(*args))[1]
    )
    return calls


@pytest.mark.parametrize("case", CASES)
def test_one_launch_gives_what_several_give(case, allowed, monkeypatch):
    tensors, options = call(case)
    actual = outputs_and_gradients(tensors, options)
    assert allowed == [1]
    monkeypatch.setattr(one_launch_form.SETTINGS, "allowed", False)
    expected = outputs_and_gradients(tensors, options)
    assert allowed == [1]
    for a, e in zip(actual, expected, strict=True):
        # Both round summaries to float16, from sums in another order.
        assert (a - e).norm() < 1e-3 * e.norm()
    doubles = [x.detach().double() for x in tensors]
    if options["rotary"]:
        options["rotary"] = tuple(x.double() for x in options["rotary"])
    defined = mhla(*doubles, **options, implementation="naive")
    # Summaries are float16 with a scale each.
    assert (actual[0] - defined).norm() < 2e-3 * defined.norm()


@pytest.mark.parametrize(
    ("grid", "layout", "stored", "changes", "expected"),
    [
        ([8, 8], [2, 2], torch.float16, {}, True),
        ([8, 8], [2, 2], torch.float16, {"fewest_heads": 7}, False),
        ([8, 8], [2, 2], torch.float16, {"allowed": False}, False),
        ([8, 8], [2, 2], torch.float32, {}, False),
        # Blocks of more than one tile, and more blocks than rows that a program holds.
        ([18, 9], [2, 1], torch.float16, {}, False),
        ([65], [65], torch.float16, {}, False),
    ],
)
def test_what_fits(grid, layout, stored, changes, expected, monkeypatch):
    settings = replace(one_launch_form.SETTINGS, **{"allowed": True, "fewest_heads": 6} | changes)
    monkeypatch.setattr(one_launch_form, "SETTINGS", settings)
    tokens = torch.zeros(2, torch.Size(grid).numel(), 3, 16)
    asked = Call(tokens, tokens, None, None, grid, layout, "relu", True, 1e-6, stored)
    assert one_launch_form.fits(asked) == expected


@pytest.mark.gpu
def test_bfloat16_on_a_gpu(allowed):
    tensors, options = call(((32, 32), (4, 4), 72, 72, "relu", False, True), torch.bfloat16)
    actual = outputs_and_gradients(tensors, options)
    assert allowed == [1]
    defined = mhla(*(x.detach().double() for x in tensors), **options, implementation="blockwise")
    assert (actual[0].double() - defined).norm() < 1e-2 * defined.norm()
