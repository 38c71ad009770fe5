"""The check of what kernels in the interpreter touch finds what it is there to find."""

import pytest
import torch

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")

from triton.tools.tensor_descriptor import TensorDescriptor  # noqa: E402

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are not interpreted")


@triton.jit
def _first(x_ptr, shift):
    return x_ptr + shift + tl.arange(0, 8)


@triton.jit
def add_kernel(x_ptr, out_ptrs, shift, count, MASKED: tl.constexpr, ATOMIC: tl.constexpr):
    """Add what lies from `shift` on, as far as below `count`, to the second of `out_ptrs`."""
    places = shift + tl.arange(0, 8)
    inside = (places >= 0) & (places < count)
    if MASKED:
        x = tl.load(_first(x_ptr, shift), mask=inside, other=0.0)
    else:
        x = tl.load(_first(x_ptr, shift))
    if ATOMIC:
        tl.atomic_add(_first(out_ptrs[1], shift), x, mask=inside)
    else:
        tl.store(_first(out_ptrs[1], shift), x, mask=inside)


@triton.jit
def read_kernel(tiles, out_ptr):
    """Copy two rows, of which the second one does not exist if there are four."""
    places = tl.arange(0, 2)[:, None] * 16 + tl.arange(0, 16)[None, :]
    tl.store(out_ptr + places, tiles.load([3, 0]))


def added(x, out, shift, count, *, masked=True, atomic=False):
    """`out` after the kernel; what `x` and `out` are slices of lies around them."""
    add_kernel[(1,)](x, (x, out), shift, count, MASKED=masked, ATOMIC=atomic, num_warps=1)
    return out


@pytest.mark.parametrize("atomic", [False, True])
@pytest.mark.parametrize("shift", [-3, 0, 2])
def test_accesses_inside_are_as_without_the_check(shift, atomic):
    x, out = torch.arange(20.0)[5:11], torch.zeros(20)
    written = slice(max(shift, 0), min(shift + 8, 6))
    expected = torch.zeros(20)
    expected[7:13][written] = x[written]
    added(x, out[7:13], shift, 6, atomic=atomic)
    assert torch.equal(out, expected)


@pytest.mark.parametrize(
    ("change", "found"),
    [
        ({"masked": False}, "loads what is no element of x_ptr, between offsets 0 and 7"),
        ({"shift": -1, "masked": False}, "loads .* x_ptr, between offsets -1 and 6"),
        ({"x": torch.zeros(5)}, "loads .* x_ptr, between offsets 0 and 5"),
        ({"x": torch.zeros(0)}, "loads .* x_ptr, between offsets 0 and 5"),
        ({"x": torch.zeros(20)[:12:2]}, "loads .* x_ptr, between offsets 0 and 5; it is .6. with"),
        ({"x": torch.zeros(9).as_strided((2, 3), (6, 1))}, "loads .* it is .2, 3. with strides .6"),
        ({"out": torch.zeros(20)[:5]}, "stores .* out_ptrs, between offsets 0 and 5; it is .5."),
        ({"out": torch.zeros(5), "atomic": True}, "changes .* out_ptrs, between offsets 0 and 5"),
    ],
)
def test_an_access_outside_is_found(change, found):
    options = {"x": torch.zeros(20)[5:11], "out": torch.zeros(20)[7:13], "shift": 0, "count": 6}
    with pytest.raises(Exception, match=f"add_kernel {found}"):
        added(**options | change)


def test_a_neighbour_is_not_the_tensor_itself():
    """Not even one that the kernel may touch, too."""
    both = torch.zeros(16)
    with pytest.raises(Exception, match=r"loads .* x_ptr, between offsets -8 and -1"):
        added(both[8:], both[:8], -8, 0, masked=False)


def test_descriptors_end_with_their_tensor():
    """What is copied beyond it is zero."""
    tiles, out = TensorDescriptor.from_tensor(torch.ones(4, 16), [2, 16]), torch.ones(2, 16)
    read_kernel[(1,)](tiles, out)
    assert out.tolist() == [[1.0] * 16, [0.0] * 16]
    with pytest.raises(Exception, match=r"read_kernel stores .* out_ptr"):
        read_kernel[(1,)](tiles, out[:1])
