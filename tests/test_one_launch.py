"""The linear form's forward pass in one launch, beside that of several and the definition."""

from dataclasses import replace

import pytest
import torch

from mhla_gen.ops import locality_mixing, mhla
from mhla_gen.ops.fused import fused_mhla
from mhla_gen.ops.kernels import one_launch_form

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CASES = [
    # grid, layout, head_dim, value_dim, feature map, rotary, normalize
    ((10, 7), (3, 2), 24, 24, "relu", False, True),
    ((3, 3, 4), (1, 2, 2), 72, 72, "softplus", True, True),
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


def test_what_does_not_fit_is_launched_as_before(allowed, monkeypatch):
    for case, changes in (
        (CASES[0], {"fewest_heads": 3}),
        (CASES[0], {"allowed": False}),
        # Blocks of more than one tile, and more blocks than rows that a program holds.
        (((20, 20), (2, 2), 16, 16, "relu", False, True), {}),
        (((66,), (65,), 16, 16, "relu", False, True), {}),
    ):
        changed = replace(one_launch_form.SETTINGS, **changes)
        with monkeypatch.context() as patch:
            patch.setattr(one_launch_form, "SETTINGS", changed)
            tensors, options = call(case)
            with torch.no_grad():
                outputs = fused_mhla(
                    *tensors, **options, causal=False, eps=1e-6, use_attention_form=False,
                    stored=torch.float16,
                )  # fmt: skip
        assert outputs.isfinite().all() and allowed == []


@pytest.mark.gpu
def test_bfloat16_on_a_gpu(allowed):
    tensors, options = call(((32, 32), (4, 4), 72, 72, "relu", False, True), torch.bfloat16)
    actual = outputs_and_gradients(tensors, options)
    assert allowed == [1]
    defined = mhla(*(x.detach().double() for x in tensors), **options, implementation="blockwise")
    assert (actual[0].double() - defined).norm() < 1e-2 * defined.norm()
