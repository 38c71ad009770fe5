"""The blocks of a sharded model are gathered before their turn, in both passes."""

from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from tiny import dit_inputs, tiny_dit
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from mhla_gen.training import parallel
from mhla_gen.training.parallel import gather_ahead, keep_gathered

SHARDED = SimpleNamespace(is_fsdp2=True, device=torch.device("cpu"))


@pytest.fixture
def mesh():
    """Of one process: what is gathered when does not depend on the number."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def is_gathered(block):
    """Whether a block's weights are there, or on their way."""
    group = block._get_fsdp_state()._fsdp_param_group
    return group.is_unsharded or group._all_gather_result is not None


def watched_step(model, inputs):
    """The blocks that are gathered while each computes, forward and backward; then gradients."""
    blocks, seen = list(model.transformer_blocks), {}

    def look(step, index):
        seen[step, index] = {i for i, block in enumerate(blocks) if is_gathered(block)}

    for index, block in enumerate(blocks):
        block.norm3.register_forward_hook(lambda *_, i=index: look("forward", i))
        block.norm3.register_full_backward_hook(lambda *_, i=index: look("backward", i))
    model(**inputs, return_dict=False)[0].square().mean().backward()
    return seen, [p.grad for p in model.parameters()]


def sharded_step(mesh):
    """`watched_step` of a sharded model, whose gradients are those of the model in one piece."""

    def make():
        torch.manual_seed(0)
        return tiny_dit(num_layers=6, dropout=0.0).eval()

    plain, model, inputs = make(), make(), dit_inputs()
    plain(**inputs, return_dict=False)[0].square().mean().backward()
    for block in model.transformer_blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    keep_gathered(SHARDED, model, ["transformer_blocks.0"])
    gather_ahead(SHARDED, model)
    seen, gradients = watched_step(model, inputs)
    for parameter, gradient in zip(plain.parameters(), gradients, strict=True):
        if parameter.grad is None:
            assert gradient is None
        else:
            torch.testing.assert_close(gradient.full_tensor(), parameter.grad)
    assert not any(is_gathered(block) for block in model.transformer_blocks)
    return seen


def test_two_blocks_are_gathered_ahead_and_gradients_stay(mesh):
    seen = sharded_step(mesh)
    for index in range(6):
        # The first one stays, since the model's end calls a part of it.
        assert seen["forward", index] == {0, *range(index, min(index + 3, 6))}, index
        assert seen["backward", index] >= set(range(max(index - 2, 0), index + 1)), index
        assert not seen["backward", index] - {0, *range(index - 2, index + 2)}, index


def test_blocks_stay_whole_where_they_fit(mesh, monkeypatch):
    monkeypatch.setattr(parallel, "has_room", lambda device, model: True)
    seen = sharded_step(mesh)
    for index in range(6):
        assert seen["forward", index] == set(range(min(index + 3, 6))), index
        assert seen["backward", index] >= set(range(index + 1)), index


def test_whole_weights_may_take_an_eighth_of_a_gpu(monkeypatch):
    model, gpu = torch.nn.Linear(3, 4), torch.device("cuda")
    for memory, fits in ((16 * 4 * 8, True), (16 * 4 * 8 - 1, False)):
        found = SimpleNamespace(total_memory=memory)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device, x=found: x)
        assert parallel.has_room(gpu, model) == fits
    assert not parallel.has_room(torch.device("cpu"), model)
