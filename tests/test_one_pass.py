"""One pass over the weights does what clipping, AdamW and the average do one after the other."""

import copy

import pytest
import torch
from torch import nn

from mhla_gen.training.ema import WeightAverage
from mhla_gen.training.one_pass import OnePass
from mhla_gen.training.optim import build_optimizer
from mhla_gen.training.parts import clipping_factor, gradient_norm, scale_gradients

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def a_model():
    """Sizes below, at and above those of a program; with and without whole vectors."""
    torch.manual_seed(0)
    sizes = [(3, 5), (2048,), (4, 513), (1,), (67, 129), (), (0, 4)]
    model = nn.ParameterList([torch.randn(size, device=DEVICE) for size in sizes])
    model.append(nn.Parameter(torch.randn(4, 4, device=DEVICE)))
    model.append(nn.Parameter(torch.randn(3, device=DEVICE), requires_grad=False))
    return model


class Trained:
    """A model with optimizer and average, updated in one pass or not."""

    def __init__(self, in_one, limit, **options):
        self.model, self.limit = a_model(), limit
        # Fused, torch computes 1 - beta**step in float32, to four digits.
        options = {"eps": 1e-6, "fused": False, **options}
        self.optimizer = build_optimizer(self.model, 0.1, 0.3, options=options)
        self.average = WeightAverage(self.model, 0.9)
        others = [self.model[7]]
        self.one_pass = OnePass(self.optimizer, self.average, others, DEVICE) if in_one else None

    def step(self, number):
        generator = torch.Generator().manual_seed(number)
        parameters = list(self.model.parameters())
        for index, parameter in enumerate(parameters[:-1]):
            gradient = torch.randn(parameter.shape, generator=generator).to(DEVICE)
            # One that a step does not use, then an optimizer whose parameters differ in steps.
            parameter.grad = None if number == 4 and index == 0 else gradient * 10.0**-number
        factor = clipping_factor(gradient_norm(parameters), self.limit)
        done = set() if self.one_pass is None else self.one_pass(parameters, factor)
        scale_gradients(parameters, factor)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.average.step(parameters, done)
        return {index for index, p in enumerate(parameters) if id(p) in done}

    def numbers(self):
        """All that a step changes."""
        yield from self.model.parameters()
        yield from self.average.shadow_params
        for parameter in self.model.parameters():
            yield from self.optimizer.state.get(parameter, {}).values()


@pytest.mark.parametrize("limit", [None, 0.1, 1e6])
def test_numbers_are_those_of_three_passes(limit):
    plain, fused = Trained(False, limit), Trained(True, limit)
    done = []
    for number in range(8):
        plain.step(number)
        done.append(fused.step(number))
        if number == 2:
            # As resuming does.
            fused.optimizer.load_state_dict(copy.deepcopy(fused.optimizer.state_dict()))
        pairs = list(zip(plain.numbers(), fused.numbers(), strict=True))
        assert len(pairs) > 2 * len(fused.model)
        for expected, found in pairs:
            # Every step rounds a weight of up to 4, by 2e-7, once more or less often.
            torch.testing.assert_close(found, expected, rtol=2e-6, atol=2e-6)
    with_decay, without = {0, 2, 4, 6}, {1, 3, 5}
    assert done[:4] == [set(), *[with_decay | without] * 3]
    assert done[4:] == [with_decay - {0} | without, *[without] * 3]


@pytest.mark.parametrize("options", [{"amsgrad": True}, {"maximize": True}])
def test_variants_of_the_optimizer_are_left_to_it(options):
    fused = Trained(True, 0.1, **options)
    assert not fused.step(0) and not fused.step(1)


def test_other_optimizers_and_devices_are_left_alone():
    model = nn.Linear(3, 4)
    for optimizer in (torch.optim.SGD(model.parameters()), torch.optim.AdamW(model.parameters())):
        one_pass = OnePass(optimizer, WeightAverage(model, 0.9), [])
        for _ in range(2):
            model(torch.ones(1, 3)).sum().backward()
            assert not one_pass(list(model.parameters()), torch.ones(()))
            assert model.weight.grad is not None
            optimizer.step()
