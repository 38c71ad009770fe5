"""Convolution, sum and gate in one pass: kernels against torch in float64."""

import math

import pytest
import torch
import torch.nn.functional as F

import mhla_gen
from mhla_gen import MHLAConfig
from mhla_gen.models.gates import _SILU_ONE
from mhla_gen.ops.depthwise import Blend, depthwise_conv, gated_conv

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# By lines and by taps; heads that fill tiles of 64 channels, cross them and are many to one.
CASES = [
    ((3, 5), (3, 3), 2, 33),
    ((9, 2), (3, 3), 3, 4),
    ((2, 2, 3), (3, 3, 3), 2, 32),
    ((11,), (3,), 3, 6),
]


def make_inputs(case, gate, dtype, blend=False, batch=2):
    """Attention's output (or two, and logits of the first one's weight), value, weight, …"""
    grid, sizes, heads, head_dim = case
    channels, tokens = heads * head_dim, math.prod(grid)
    # Views of one product, as in a model.
    joined = torch.randn(batch, tokens, 2 * channels + 32, device=DEVICE, dtype=dtype)
    value = joined[..., channels : 2 * channels]
    logits = {
        "none": None,
        "channel": torch.randn(batch, tokens, channels, device=DEVICE, dtype=dtype),
        "head": joined[..., 2 * channels : 2 * channels + heads],
    }[gate]
    weight = torch.randn(channels, 1, *sizes, device=DEVICE, dtype=dtype)
    bias = torch.randn(channels, device=DEVICE, dtype=dtype)
    added = torch.randn(batch, tokens, channels, device=DEVICE, dtype=dtype)
    given = [added, value, weight, bias, *([] if logits is None else [logits])]
    if blend:
        beside = torch.randn(batch, tokens, 3 * channels, device=DEVICE, dtype=dtype)
        shares = joined[..., 2 * channels + 16 : 2 * channels + 16 + heads]
        given += [beside[..., channels : 2 * channels], shares]
    return [x.detach().requires_grad_() for x in given]


def outputs_and_gradients(tensors, case, implementation, blend=False):
    *given, beside, shares = tensors if blend else (*tensors, None, None)
    logits = given[4] if len(given) == 5 else None
    added = given[0]
    if blend:
        first, second = (x.unflatten(2, (case[2], -1)) for x in (added, beside))
        added = Blend(first, second, shares)
    out = gated_conv(
        added, *given[1:4], logits, grid=case[0], num_heads=case[2], implementation=implementation
    )
    direction = (torch.arange(out.numel(), device=DEVICE) % 8 + 1) / 8
    loss = (out.double().flatten() * direction).sum()
    return out, *torch.autograd.grad(loss, tensors)


@pytest.mark.parametrize("blend", [False, True])
@pytest.mark.parametrize("gate", ["none", "channel", "head"])
@pytest.mark.parametrize("case", CASES)
def test_one_pass_equals_the_definition(case, gate, blend):
    tensors = make_inputs(case, gate, torch.float32, blend)
    doubles = [x.detach().double().requires_grad_() for x in tensors]
    expected = outputs_and_gradients(doubles, case, "torch", blend)
    actual = outputs_and_gradients(tensors, case, "fused", blend)
    for a, e in zip(actual, expected, strict=True):
        assert a.dtype == torch.float32
        assert (a.double() - e).norm() < 1e-6 * e.norm()


@pytest.mark.parametrize("gate", ["channel", "head"])
@pytest.mark.parametrize(
    ("form", "grid", "channels", "batch"),
    [((4, 64, 3), (4, 2, 5), 128, 1), ((2, 32, 1), (2, 3, 3), 64, 2)],
)
def test_every_form_of_a_clip_gives_the_same(monkeypatch, form, grid, channels, batch, gate):
    """Whatever its tiles are, and where a tile of channels is a part of a head."""
    from mhla_gen.ops.kernels import depthwise as kernels

    # The last tile of columns and, if it has several, that of frames is not full.
    case = (grid, (3, 3, 3), 1, channels)
    tensors = [x.detach() for x in make_inputs(case, gate, torch.float32, True, batch)]
    *given, beside, shares = tensors
    added, read = Blend(given[0][:, :, None], beside[:, :, None], shares), given[1:]
    options = {"grid": case[0], "num_heads": 1, "implementation": "fused"}
    expected = gated_conv(added, *read, **options)
    names = "_COLUMNS", "_CHANNELS", "_FRAMES"
    for name, value in zip(names, form, strict=True):
        monkeypatch.setattr(kernels, name, value)
    torch.testing.assert_close(gated_conv(added, *read, **options), expected)


@pytest.mark.parametrize("gate", ["channel", "head"])
@pytest.mark.parametrize("blend", [False, True])
def test_half_precision_is_rounded_once(gate, blend):
    tensors = make_inputs(CASES[0], gate, torch.float16, blend)
    doubles = [x.detach().double().requires_grad_() for x in tensors]
    expected = outputs_and_gradients(doubles, CASES[0], "torch", blend)
    actual = outputs_and_gradients(tensors, CASES[0], "fused", blend)
    for a, e in zip(actual, expected, strict=True):
        assert (a.double() - e).norm() < torch.finfo(torch.float16).eps * e.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("gate", ["channel", "head"])
def test_a_gate_at_its_start_changes_no_bit(gate, dtype):
    *given, logits = (x.detach() for x in make_inputs(CASES[0], gate, dtype))
    options = {"grid": CASES[0][0], "num_heads": CASES[0][2], "implementation": "fused"}
    logits = torch.full_like(logits, _SILU_ONE)
    assert torch.equal(gated_conv(*given, logits, **options), gated_conv(*given, None, **options))


def test_a_blend_in_words():
    first, second = torch.randn(2, 1, 15, 2, 4, dtype=torch.float64)
    logits = torch.randn(1, 15, 2, dtype=torch.float64)
    share = logits.sigmoid()[..., None]
    found = Blend(first, second, logits).combined()
    torch.testing.assert_close(found, share * first + (1 - share) * second)


def test_the_definition_in_words():
    added, value, weight, bias, logits = make_inputs(CASES[0], "channel", torch.float64)
    grid = CASES[0][0]
    out = gated_conv(added, value, weight, bias, logits, grid=grid, num_heads=2)
    expected = (added + depthwise_conv(value, weight, bias, grid=grid)) * F.silu(logits)
    torch.testing.assert_close(out, expected)


def test_without_gradients_nothing_is_kept():
    from mhla_gen.ops.kernels import gated_conv as kernels

    tensors = make_inputs(CASES[0], "head", torch.float32)
    call = (tensors[0], None, None, *tensors[1:], [3, 5], 2)
    with torch.no_grad():
        out, kept = kernels.gated_conv_tokens(*call, False)
        again, more = kernels.gated_conv_tokens(*call, True)
    assert kept.numel() == 0 and more.shape == out.shape and torch.equal(out, again)
    assert not gated_conv(*tensors, grid=(3, 5), num_heads=2, implementation="torch").isnan().any()


@pytest.mark.parametrize("gate", ["none", "channel", "head"])
@pytest.mark.parametrize("blend", [False, True])
def test_registration_is_sound(gate, blend):
    from mhla_gen.ops.kernels.gated_conv import gated_conv_tokens

    tensors = make_inputs(((3, 4), (3, 3), 2, 4), gate, torch.float32, blend)
    *tensors, beside, shares = tensors if blend else (*tensors, None, None)
    logits = tensors[4] if len(tensors) == 5 else None
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    given = tensors[0], beside, shares, *tensors[1:4], logits
    call = (*given, [3, 4], 2, logits is not None)
    torch.library.opcheck(gated_conv_tokens, call, test_utils=checks)


def test_wrong_logits_are_named():
    tensors = make_inputs(CASES[0], "head", torch.float32)
    options = {"grid": (3, 5), "num_heads": 2}
    # Those that would be broadcast, too.
    for shape in ((2, 15, 3), (1, 15, 2), (2, 1, 66), (15, 2)):
        with pytest.raises(ValueError, match=r"logits must be \[2, 15, 66\] or \[2, 15, 2\]"):
            gated_conv(*tensors[:4], torch.randn(shape), **options)
    with pytest.raises(ValueError, match="num_heads must divide 66 channels, found 4"):
        gated_conv(*tensors[:4], None, grid=(3, 5), num_heads=4)


def test_what_is_added_must_have_the_shape_of_tokens():
    tensors = make_inputs(CASES[0], "none", torch.float32)
    options = {"grid": (3, 5), "num_heads": 2}
    for shape in ((1, 15, 66), (2, 1, 66), (2, 15, 2, 33)):
        with pytest.raises(ValueError, match=r"added must be \[2, 15, 66\]"):
            gated_conv(torch.randn(shape), *tensors[1:4], None, **options)
    half, logits = torch.randn(2, 15, 2, 33), torch.randn(2, 15, 2)
    for blend in (Blend(half[:1], half, logits), Blend(half, half, logits[..., :1])):
        with pytest.raises(ValueError, match=r"(first|logits of a blend) must be \[2, 15, 2"):
            gated_conv(blend, *tensors[1:4], None, **options)


@pytest.mark.parametrize(
    "settings",
    [{"gate": gate} for gate in (False, True, "head", 4)]
    + [{"gate": gate, "exact": 0.5} for gate in (True, False)],
)
def test_a_layer_in_kernels_equals_one_in_torch(settings, monkeypatch):
    from mhla_gen.ops import depthwise

    torch.manual_seed(0)
    config = MHLAConfig(layout=(2, 2), **settings)
    layer = mhla_gen.MHLA(2, 8, 12, config).to(DEVICE)
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            if name != "mixing":
                parameter.normal_()
    query, key, value = (torch.randn(2, 20, 2, 8, device=DEVICE) for _ in range(3))
    hidden = torch.randn(2, 20, 12, device=DEVICE).requires_grad_()
    value.requires_grad_()
    reads = config.gate or config.exact
    trained = [value, *([hidden] if reads else []), *layer.parameters()]
    found = []
    for fused in (False, True):
        monkeypatch.setattr(depthwise, "_fused_can_run", lambda tokens, fused=fused: fused)
        out = layer(query, key, value, hidden, (5, 4))
        found.append([out, *torch.autograd.grad(out.square().sum(), trained)])
    # Gradients sum up to 640 float32 terms, of which some cancel: next to others of 2e4, what is
    # near zero is off by 640 * 6e-8 of those, at worst.
    for actual, expected in zip(*found, strict=True):
        scale = expected.abs().max()
        torch.testing.assert_close(actual / scale, expected / scale, rtol=0, atol=4e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("gate", ["none", "channel", "head"])
@pytest.mark.parametrize("blend", [False, True])
@pytest.mark.parametrize("case", [*CASES, ((32, 32), (3, 3), 16, 72)])
def test_bfloat16_on_a_gpu(case, gate, blend):
    tensors = make_inputs(case, gate, torch.bfloat16, blend)
    doubles = [x.detach().double().requires_grad_() for x in tensors]
    expected = outputs_and_gradients(doubles, case, "torch", blend)
    actual = outputs_and_gradients(tensors, case, "fused", blend)
    for a, e in zip(actual, expected, strict=True):
        assert (a.double() - e).norm() < 2 * torch.finfo(torch.bfloat16).eps * e.norm()
