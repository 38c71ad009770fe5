"""Optimizers and clipping work on what a process holds, as on whole tensors."""

import copy
import math

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from mhla_gen.training.ema import WeightAverage
from mhla_gen.training.optim import build_optimizer
from mhla_gen.training.shards import (
    clipping_factor,
    gradient_norm,
    scale_gradients,
    step_on_shards,
)


@pytest.fixture
def mesh():
    """Of one process: others are in tests of whole runs."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def a_model():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 5), nn.SiLU(), nn.Linear(5, 2), nn.LayerNorm(2))
    model[3].bias.requires_grad_(False)
    return model


def clip_gradients(parameters, limit):
    parameters = list(parameters)
    norm = gradient_norm(parameters)
    scale_gradients(parameters, clipping_factor(norm, limit))
    return norm


def train(model, optimizer, steps, limit):
    generator = torch.Generator().manual_seed(steps[0])
    norms = []
    for number in steps:
        model(torch.randn(7, 3, generator=generator)).square().sum().backward()
        if number == 3:
            # As that of an adapter that a step does not use.
            model[0].bias.grad = None
        norms.append(clip_gradients(model.parameters(), limit).item())
        optimizer.step()
        optimizer.zero_grad()
    return norms


def whole(value):
    return value.full_tensor() if isinstance(value, DTensor) else value


@pytest.mark.parametrize("limit", [None, 0.1, 1e6])
@pytest.mark.parametrize("name, options", [("AdamW", {}), ("SGD", {"momentum": 0.9}), ("SGD", {})])
def test_steps_are_those_of_whole_tensors(name, options, limit, mesh):
    plain, shared = a_model(), a_model()
    fully_shard(shared, mesh=mesh)
    optimizers = [build_optimizer(m, 0.1, 0.1, name=name, options=options) for m in (plain, shared)]
    step_on_shards(optimizers[1])
    for steps in (range(5), range(5, 8)):
        norms = [
            train(model, optimizer, steps, limit)
            for model, optimizer in zip((plain, shared), optimizers, strict=True)
        ]
        assert norms[0] == norms[1]
        parameters = list(zip(plain.parameters(), shared.parameters(), strict=True))
        for mine, other in parameters:
            assert isinstance(other, DTensor) and other.grad is None
            assert torch.equal(mine, whole(other))
            values, others = (
                o.state.get(p, {}) for o, p in zip(optimizers, (mine, other), strict=True)
            )
            assert values.keys() == others.keys()
            for key, value in values.items():
                # A process that resumes asks for the rows of such tensors.
                wanted = torch.is_tensor(value) and value.shape == mine.shape
                assert isinstance(others[key], DTensor) == wanted
                if value is not None:
                    assert torch.equal(torch.as_tensor(value), torch.as_tensor(whole(others[key])))
        named = [p for group in optimizers[1].param_groups for p in group["params"]]
        assert {id(p) for p in named} <= {id(p) for p in shared.parameters()}
        # As resuming does, into an optimizer that has taken steps.
        optimizers[1].load_state_dict(copy.deepcopy(optimizers[1].state_dict()))


def test_whole_averages_are_read_in_parts(mesh):
    """As a checkpoint of an earlier version has them."""
    plain, shared = a_model(), a_model()
    fully_shard(shared, mesh=mesh)
    averages = [WeightAverage(model, 0.9) for model in (plain, shared)]
    saved = averages[0].state_dict()
    saved["shadow_params"] = [x + 1 for x in saved["shadow_params"]]
    averages[1].load_state_dict(saved)
    for mine, wanted in zip(averages[1].shadow_params, saved["shadow_params"], strict=True):
        assert not isinstance(mine, DTensor) and torch.equal(mine, wanted)
    with averages[1].applied(shared):
        for weight, wanted in zip(shared.parameters(), saved["shadow_params"], strict=True):
            assert torch.equal(whole(weight), wanted)


def test_clipping_returns_the_norm_of_all_gradients():
    model = a_model()
    model(torch.ones(1, 3)).sum().backward()
    model[0].weight.grad.fill_(2.0)
    before = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    norm = math.sqrt(sum(g.double().square().sum().item() for g in before))
    assert clip_gradients(model.parameters(), None).item() == pytest.approx(norm)
    assert clip_gradients(model.parameters(), norm / 4).item() == pytest.approx(norm)
    clipped = [p.grad for p in model.parameters() if p.grad is not None]
    for gradient, old in zip(clipped, before, strict=True):
        torch.testing.assert_close(gradient, old / 4)
