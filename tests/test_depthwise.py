"""Depthwise convolution over tokens: kernels against torch in float64."""

import math
from functools import partial
from itertools import cycle

import pytest
import torch

from mhla_gen.ops import depthwise_conv

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CASES = [
    ((37,), (3,), 5),
    ((5, 7), (3, 3), 66),
    ((3, 4, 5), (3, 3, 3), 6),
    ((2, 9, 1), (1, 5, 3), 4),
    ((3, 5), (5, 5), 3),
    ((2, 9, 5), (1, 3, 3), 3),
    ((19, 18), (3, 3), 2),
    ((4, 9, 3), (3, 3, 3), 2),
    ((2, 3, 3), (5, 3, 3), 2),
]


def make_inputs(grid, sizes, channels, dtype):
    # A view of a fused projection: rows lie three times as far apart as they are long.
    fused = torch.randn(2, math.prod(grid), 3 * channels, device=DEVICE, dtype=dtype)
    tokens = fused.chunk(3, dim=-1)[1].requires_grad_()
    weight = torch.randn(channels, 1, *sizes, device=DEVICE, dtype=dtype, requires_grad=True)
    bias = torch.randn(channels, device=DEVICE, dtype=dtype, requires_grad=True)
    return tokens, weight, bias


def outputs_and_gradients(tensors, grid, implementation):
    out = depthwise_conv(*tensors, grid=grid, implementation=implementation)
    # Eighths are exact in every dtype, and all positive, so that no sum cancels.
    direction = (torch.arange(out.numel(), device=DEVICE) % 8 + 1) / 8
    loss = (out.double().flatten() * direction).sum()
    return out, *torch.autograd.grad(loss, tensors)


# Where a token lies does not depend on its dtype, so each case has one of the two.
@pytest.mark.parametrize(("dtype", "case"), zip(cycle([torch.float32, torch.float16]), CASES))
def test_kernels_equal_torch_in_float64(dtype, case):
    grid, sizes, channels = case
    tensors = make_inputs(grid, sizes, channels, dtype)
    doubles = [x.detach().double().requires_grad_() for x in tensors]
    expected = outputs_and_gradients(doubles, grid, "torch")
    actual = outputs_and_gradients(tensors, grid, "fused")
    for name, a, e in zip(("out", "tokens", "weight", "bias"), actual, expected, strict=True):
        assert a.dtype == dtype
        error = (a.double() - e).norm() / e.norm()
        assert error < max(torch.finfo(dtype).eps, 1e-6), f"{name}: {error:.1e}"


@pytest.mark.parametrize("sizes", [(3, 3), (1, 5)])
def test_parts_of_a_grid_add_up_to_all_of_it(monkeypatch, sizes):
    from mhla_gen.ops.kernels import depthwise as kernels

    tensors = make_inputs((9, 17), sizes, 2, torch.float32)
    found = []
    for programs in (1, 1024):
        monkeypatch.setattr(kernels, "_ENOUGH_PROGRAMS", programs)
        found.append(outputs_and_gradients(tensors, (9, 17), "fused"))
    for whole, parts in zip(*found, strict=True):
        assert (whole - parts).norm() < 1e-6 * whole.norm()


def test_gradients_may_have_any_strides():
    tensors = make_inputs((3, 4), (3, 3), 6, torch.float32)
    out = depthwise_conv(*tensors, grid=(3, 4), implementation="fused")
    wide = torch.randn(2, 12, 12, device=DEVICE)
    for grad in (wide[..., 3:9], wide[..., ::2], wide[:1, :, :6].expand(2, -1, -1)):
        expected = torch.autograd.grad(out, tensors, grad.contiguous(), retain_graph=True)
        actual = torch.autograd.grad(out, tensors, grad, retain_graph=True)
        assert all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True))


def test_registration_is_sound():
    tokens, weight, bias = make_inputs((3, 4), (3, 3), 8, torch.float32)
    from mhla_gen.ops.kernels.depthwise import depthwise_tokens, depthwise_tokens_backward

    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(depthwise_tokens, (tokens, weight, bias, [3, 4]), test_utils=checks)
    torch.library.opcheck(depthwise_tokens, (tokens, weight, None, [3, 4]), test_utils=checks)
    # Compiled training relies on the strides of its gradients.
    gradients = (torch.randn(2, 12, 8, device=DEVICE), tokens.detach(), weight.detach(), [3, 4])
    torch.library.opcheck(depthwise_tokens_backward, gradients, test_utils=checks)


def test_a_centred_one_is_the_identity():
    tokens = torch.randn(1, 12, 4)
    weight = torch.zeros(4, 1, 3, 3)
    weight[:, :, 1, 1] = 1
    assert torch.equal(depthwise_conv(tokens, weight, None, grid=(3, 4)), tokens)


@pytest.mark.parametrize(
    ("weight", "grid", "message"),
    [
        ((4, 1, 3), (3, 4), "one odd size for each axis"),
        ((4, 1, 3, 2), (3, 4), "one odd size for each axis"),
        ((5, 1, 3, 3), (3, 4), "do not fit"),
        ((4, 1, 3, 3), (3, 5), "do not fit"),
    ],
)
def test_wrong_sizes_are_named(weight, grid, message):
    with pytest.raises(ValueError, match=message):
        depthwise_conv(torch.randn(1, 12, 4), torch.randn(weight), None, grid=grid)


def test_tokens_grid_and_bias_are_checked():
    tokens, weight = torch.randn(1, 12, 4), torch.randn(4, 1, 3, 3)
    with pytest.raises(ValueError, match="tokens must be"):
        depthwise_conv(tokens[0], weight, None, grid=(3, 4))
    with pytest.raises(ValueError, match="1 to 3 axes"):
        depthwise_conv(tokens, torch.randn(4, 1, 3, 3, 3, 3), None, grid=(1, 1, 3, 4))
    with pytest.raises(ValueError, match=r"bias must be \[4\], found \(1,\)"):
        depthwise_conv(tokens, weight, torch.randn(1), grid=(3, 4))


def test_kernels_are_refused_where_they_would_lose_tangents():
    tokens, weight = torch.randn(1, 12, 4, device=DEVICE), torch.randn(4, 1, 3, 3, device=DEVICE)

    def run(tokens, implementation):
        return depthwise_conv(tokens, weight, None, grid=(3, 4), implementation=implementation)

    with pytest.raises(ValueError, match=r"outside of torch\.func"):
        torch.func.jvp(partial(run, implementation="fused"), (tokens,), (tokens,))
    # A convolution is linear.
    out, tangent = torch.func.jvp(partial(run, implementation="auto"), (tokens,), (tokens,))
    torch.testing.assert_close(tangent, out)


def test_unknown_implementations_are_refused():
    with pytest.raises(ValueError, match="auto, torch or fused"):
        depthwise_conv(
            torch.randn(1, 12, 4), torch.randn(4, 1, 3, 3), None, grid=(3, 4), implementation="fast"
        )


@pytest.mark.gpu
@pytest.mark.parametrize(("grid", "sizes", "channels"), CASES)
def test_bfloat16_on_a_gpu(grid, sizes, channels):
    tensors = make_inputs(grid, sizes, channels, torch.bfloat16)
    doubles = [x.detach().double().requires_grad_() for x in tensors]
    expected = outputs_and_gradients(doubles, grid, "torch")
    for a, e in zip(outputs_and_gradients(tensors, grid, "fused"), expected, strict=True):
        assert (a.double() - e).norm() / e.norm() < torch.finfo(torch.bfloat16).eps
