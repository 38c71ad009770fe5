"""The convolution's kernels read what a rank received where it lies; without processes."""

import math

import pytest
import torch

from mhla_gen.ops import depthwise_conv
from mhla_gen.ops.halo import halo_size, with_halo
from mhla_gen.ops.shard import Shard

pytest.importorskip("triton")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Over frames, whose filters are small, and by taps; ranks that hold whole planes, end inside one
# and hold less than one; halos from several ranks; an axis that no filter reaches along.
CASES = [
    ((9, 1, 2), (3, 3, 3), 2, 2),
    ((3, 3, 2), (3, 3, 3), 3, 4),
    ((3, 1, 2), (3, 3, 3), 1, 6),
    ((3, 2, 3), (1, 3, 3), 3, 3),
    ((3, 4, 5), (1, 1, 1), 2, 2),
    ((2, 3, 4), (5, 3, 3), 2, 3),
    ((5, 7), (3, 3), 2, 4),
    ((4, 3), (5, 7), 3, 2),
    ((37,), (3,), 66, 3),
    ((9,), (31,), 2, 2),
    ((3, 4), (3, 3), 2, 1),
]


def make_inputs(case, dtype):
    grid, sizes, channels, num_ranks = case
    # A view of a fused projection.
    tokens = torch.randn(2, math.prod(grid), 3 * channels).chunk(3, dim=-1)[1]
    grad = torch.randn(2, math.prod(grid), channels)
    weight, bias = torch.randn(channels, 1, *sizes), torch.randn(channels)
    shards = [Shard.of_rank(grid, rank, num_ranks) for rank in range(num_ranks)]
    return grid, shards, *(x.to(DEVICE, dtype) for x in (tokens, grad, weight, bias))


def held(whole, shard, sizes):
    """A rank's part of `whole`; the grid that its kernels get; and the halo around the part."""
    from mhla_gen.ops.halo_fused import placed

    around = with_halo(shard, sizes)
    parts = whole[:, around.first : shard.first], whole[:, shard.stop : around.stop]
    # As it comes from other ranks: tokens first.
    received = torch.cat(parts, dim=1).transpose(0, 1).contiguous().transpose(0, 1)
    return whole[:, shard.first : shard.stop], *placed(shard, sizes, received)


def check(case, dtype):
    """Outputs and gradients of all ranks together are those of the whole sequence in float64."""
    from mhla_gen.ops.kernels import depthwise as kernels

    def close(found, expected):
        error = (found.double() - expected).norm() / expected.norm()
        assert error < max(torch.finfo(dtype).eps, 1e-6)

    grid, shards, tokens, grad, weight, bias = make_inputs(case, dtype)
    doubles = [x.double().requires_grad_() for x in (tokens, weight, bias)]
    expected = depthwise_conv(*doubles, grid=grid, implementation="torch")
    dtokens, *filters = torch.autograd.grad(expected, doubles, grad.double())
    sizes = tuple(weight.shape[2:])
    out, back, sums = [], [], []
    for shard in shards:
        own, planes, halo = held(tokens, shard, sizes)
        out.append(kernels.convolve(own, weight, bias, planes, halo=halo)[0])
        own_grad = grad[:, shard.first : shard.stop]
        sums.append(kernels.filter_gradients(own_grad, own, weight, planes, halo))
        own, planes, halo = held(grad, shard, sizes)
        back.append(kernels.convolve(own, kernels.flipped(weight), None, planes, halo=halo)[0])
    close(torch.cat(out, dim=1), expected)
    close(torch.cat(back, dim=1), dtokens)
    for found, whole in zip(zip(*sums, strict=True), filters, strict=True):
        close(sum(x.double() for x in found), whole)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_parts_of_a_sequence_give_what_it_gives_whole(case):
    check(case, torch.float32)


@pytest.mark.gpu
@pytest.mark.parametrize("case", [*CASES, ((21, 9, 16), (3, 3, 3), 1536, 2)], ids=str)
def test_bfloat16_on_a_gpu(case):
    check(case, torch.bfloat16)


def test_a_halo_is_a_plane_a_row_and_a_token():
    assert halo_size((21, 30, 52), (3, 3, 3)) == 30 * 52 + 52 + 1
    assert halo_size((30, 52), (5, 1)) == 2 * 52
