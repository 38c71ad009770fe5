"""A sequence shared by several processes gives what one process gives: outputs and gradients."""

from functools import partial
from types import SimpleNamespace

import pytest
import ranks
import ranks_of_wan
import torch
from torch._inductor import config
from torch.torch_version import TorchVersion

from mhla_gen.ops import sharded
from mhla_gen.ops.kernels import linear_form
from mhla_gen.ops.kernels.launch import Call
from mhla_gen.ops.partition import block_of_tokens
from mhla_gen.ops.shard import HeldBlocks, Shard
from mhla_gen.runtime.compiling import keep_shapes_of_sums

# Ragged columns, a border inside a block, more ranks than planes, and one token a rank.
SHAPES = [
    {"grid": (3, 5, 52), "layout": (2, 2, 5)},
    {"grid": (5, 3, 4), "layout": (5, 2, 3), "feature_map": "elu+1"},
    {"grid": (1, 3, 7), "layout": (1, 2, 3), "normalize": False, "mixing_shape": (2,)},
    {"grid": (4, 5), "layout": (3, 2), "feature_map": "softplus", "rotary": False},
    {"grid": (17,), "layout": (4,), "feature_map": "squared_relu", "mixing_shape": (2,)},
    {"grid": (4,), "layout": (2,), "feature_map": "identity", "normalize": False},
    {"grid": (3, 4, 5), "layout": (2, 2, 2), "dtype": torch.bfloat16, "tolerance": 3e-2},
]
FUSED = {"heads": 1, "head_dim": 16, "value_dim": 16, "implementation": "fused"}
FILTERS = [((3, 4, 5), 3), ((2, 3, 4), 5), ((6, 3), 3), ((9,), 5), ((4,), 1)]
# Small filters and large ones; a part of a plane, rows of an image, and halos from several ranks.
FUSED_FILTERS = [
    {"grid": grid, "size": size, "implementation": "fused", "dtype": torch.float32} | options
    for grid, size, options in (
        ((5, 2, 3), 3, {}),
        ((2, 2, 3), 5, {"batch": 1}),
        ((5, 3), 3, {"bias": False}),
        ((9,), 5, {}),
    )
]


@pytest.mark.parametrize("num_ranks", [2, 3, pytest.param(4, marks=pytest.mark.slow)])
def test_ranks_compute_what_one_process_computes(num_ranks):
    filters = [{"grid": grid, "size": size} for grid, size in FILTERS]
    ranks.launch(num_ranks, ranks.operators_equal_one_process, SHAPES, filters)


# A border inside a plane, all ranks inside one plane, two axes with matrices per head, one axis
# with a block a rank, one long block that is cut into parts, and more ranks than blocks.
WINDOWS = [
    {"grid": (3, 2, 7), "layout": (2, 1, 3)},
    {"grid": (3, 2, 7), "layout": (3, 2, 1), "feature_map": "elu+1"},
    {"grid": (1, 3, 7), "layout": (1, 2, 3), "normalize": False},
    {"grid": (4, 5), "layout": (3, 2), "rotary": False, "heads": 2, "mixing_shape": (2,)},
    {"grid": (4,), "layout": (2,), "feature_map": "identity", "normalize": False},
    {"grid": (3, 9, 10), "layout": (1, 1, 1)},
    {"grid": (3, 2, 7), "layout": (2, 1, 3), "dtype": torch.float16, "tolerance": 2e-2},
]
SINGLE = FUSED | {"dtype": torch.float32, "tolerance": 2e-5}


def test_kernels_compute_on_ranks_what_one_process_computes():
    # Rank 0 ends inside row 1 of rows [0, 1) [1, 3).
    ranks.launch(
        2,
        ranks.operators_equal_one_process,
        [SINGLE | {"grid": (3, 5), "layout": (2, 1)}],
        FUSED_FILTERS[:1],
    )


@pytest.mark.slow
@pytest.mark.parametrize("num_ranks", [2, 3, 4])
def test_kernels_compute_on_ranks_at_many_shapes(num_ranks):
    cases = [SINGLE | case for case in WINDOWS]
    ranks.launch(num_ranks, ranks.operators_equal_one_process, cases, FUSED_FILTERS)


def test_a_block_without_tokens_has_no_scale():
    # As 1 it would coarsen the sum of summaries that are small.
    device = "cuda" if torch.cuda.is_available() else "cpu"
    key, value = torch.rand(2, 1, 6, 1, 16, device=device).half()
    # Of planes 0 to 3, tokens 6 to 11 are planes 2 and 3: the second of two blocks.
    options = "relu", True, 1e-6, torch.float16, (2, 0, 6, 12)
    call = Call(key, value * 1e-4, None, None, [4, 1, 3], [2, 1, 1], *options)
    parts = linear_form.summarise(key, value * 1e-4, call)
    assert parts.scales[0, 0].item() == 0 and 0 < parts.scales[0, 1].item() < 1e-2
    assert parts.matrices[0, 0].count_nonzero() == 0 == parts.key_sums[0, 0].count_nonzero()
    mixed = linear_form.mix(torch.ones(2, 2, device=device), parts, call)
    assert mixed.scales.allclose(parts.scales[:, 1:])


def test_kernels_are_not_picked_where_rotary_tables_are_trained():
    cuda = SimpleNamespace(device=torch.device("cuda"), dtype=torch.bfloat16, shape=(1, 6, 2, 16))
    tables = torch.ones(6, 8), torch.zeros(6, 8)
    picked = partial(sharded._implementation, "auto", cuda, cuda, 4)
    assert picked(tables) is not sharded._begin_blockwise_shard
    assert picked((tables[0], tables[1].requires_grad_())) is sharded._begin_blockwise_shard


LAYERS = [
    {"grid": (3, 5, 4), "layout": (2, 2, 2)},
    {"grid": (1, 4, 5), "layout": (1, 2, 2), "output_norm": True, "gate": "head"},
    {"grid": (7, 3), "layout": (3, 1), "conv_kernel_size": 5, "normalize": False, "gate": 2},
]


@pytest.mark.parametrize("num_ranks", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_layers_compute_on_ranks_what_one_process_computes(num_ranks):
    ranks.launch(num_ranks, ranks.layers_equal_one_process, LAYERS)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_layers_on_two_gpus_wait_for_what_is_under_way():
    small = {"grid": (5, 9, 13), "layout": (3, 2, 4), "head_dim": 16}
    large = {"grid": (9, 45, 80), "layout": (3, 5, 9), "heads": 12, "head_dim": 128, "repeats": 3}
    exact = {"dtype": torch.float32, "tolerance": 1e-4, "device": "cuda"}
    half = {"dtype": torch.bfloat16, "tolerance": 6e-2, "device": "cuda"}
    cases = [small | exact, small | half, large | half]
    ranks.launch(2, ranks.layers_equal_one_process, cases, nccl=True)


@pytest.mark.gpu
def test_kernels_on_a_gpu_store_summaries_in_float16_on_all_ranks():
    wide = {"heads": 4, "head_dim": 64, "value_dim": 64, "dtype": torch.bfloat16}
    case = {"grid": (5, 12, 26), "layout": (3, 2, 4), "tolerance": 3e-2, "device": "cuda"}
    ranks.launch(2, ranks.operators_equal_one_process, [FUSED | wide | case], gpu=True)


HYBRID = {"layout": (2, 2, 3), "layers": "2/3"}
ULYSSES = {"ulysses_degree": 2}
RING = {"ring_degree": 2, "ring_anything": True}


def test_ranks_share_a_hybrid_through_diffusers():
    ranks.launch(2, ranks_of_wan.model_equals_one_process, HYBRID, ULYSSES)


def test_ranks_share_a_compiled_model():
    ranks.launch(2, ranks_of_wan.compiled_model_equals_one_process, {"layout": (2, 2, 3)}, RING)


@pytest.mark.slow
def test_ranks_share_a_compiled_model_whose_convolution_is_computed_by_kernels():
    check = ranks_of_wan.compiled_model_with_kernels_equals_one_process
    ranks.launch(2, check, {"layout": (2, 2, 3)}, RING)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_gradients_of_a_compiled_model_on_two_gpus_have_their_shapes():
    ranks.launch(2, ranks_of_wan.gradients_of_compiled_blocks_are_those_of_eager_ones, nccl=True)


@pytest.mark.parametrize(("version", "kept"), [("2.11.0+cu130", False), ("2.14.0", True)])
def test_sums_lose_their_shape_in_no_shared_model(version, kept, monkeypatch):
    monkeypatch.setattr(torch, "__version__", TorchVersion(version))
    with config.patch({"triton.mix_order_reduction": True}):
        keep_shapes_of_sums()
        assert config.triton.mix_order_reduction is kept


@pytest.mark.slow
def test_ranks_share_a_number_of_tokens_that_they_do_not_divide():
    ranks.launch(2, ranks_of_wan.any_number_of_tokens_can_be_sampled, HYBRID, ULYSSES)


@pytest.mark.slow
def test_distributed_data_parallel_needs_the_loss_times_the_ranks():
    ranks.launch(2, ranks_of_wan.model_under_ddp_equals_one_process, HYBRID, ULYSSES)


@pytest.mark.slow
@pytest.mark.parametrize("num_ranks", [3, 4])
def test_ranks_share_a_model_without_softmax_layers(num_ranks):
    mhla = {"layout": (3, 2, 2), "mixing_per_head": True}
    ring = {"ring_degree": num_ranks, "ring_anything": True}
    ranks.launch(num_ranks, ranks_of_wan.model_equals_one_process, mhla, ring)


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 7, 60])
def test_shards_are_the_pieces_that_torch_cuts(num_ranks):
    grid, tokens = (3, 4, 5), torch.arange(60)
    for rank, piece in enumerate(tokens.tensor_split(num_ranks)):
        shard = Shard.of_rank(grid, rank, num_ranks)
        assert list(range(shard.first, shard.stop)) == piece.tolist()
        planes = shard.whole_planes(piece[None, :, None] + 1)
        assert planes.shape[1] % 20 == 0
        assert shard.from_whole_planes(planes).flatten().tolist() == (piece + 1).tolist()
    with pytest.raises(ValueError, match="use fewer ranks"):
        Shard.of_rank(grid, 60, 61)


def test_slabs_cover_the_planes_of_a_shard_block_by_block():
    # Blocks of the first axis start at planes 0, 2 and 4.
    shard = Shard((7, 2, 3), 10, 38)
    slabs = shard.slabs((3, 2, 1))
    assert [(slab.block, slab.first, slab.stop) for slab in slabs] == [
        (0, 1, 2),
        (1, 2, 4),
        (2, 4, 7),
    ]
    assert slabs[1].blocks == slice(2, 4) and slabs[1].grid == (2, 2, 3)


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 5, 8])
def test_ranks_hold_the_blocks_that_their_tokens_fall_into(num_ranks):
    grid, layout = (7, 2, 3), (3, 2, 1)
    held = HeldBlocks.of_ranks(grid, layout, num_ranks)
    blocks = block_of_tokens(grid, layout)
    mixing = torch.arange(36.0).view(6, 6)
    starts = [first * 2 for first in held.firsts]
    size = held.count * 2
    columns = [block for start in starts for block in range(start, start + size)]
    assert held.num_parts == len(columns)
    for rank, start in enumerate(starts):
        shard = Shard.of_rank(grid, rank, num_ranks)
        mine = blocks[shard.first : shard.stop]
        assert start <= mine.min() and mine.max() < start + size <= 6
        assert held.entries(mixing, rank).equal(mixing[start : start + size][:, columns])
