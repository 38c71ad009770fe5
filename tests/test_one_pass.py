"""One pass over the weights does what clipping, AdamW and the average do one after the other."""

import copy
import os
import subprocess
import sys

import pytest
import torch
from torch import nn

from mhla_gen.training.ema import WeightAverage
from mhla_gen.training.one_pass import OnePass
from mhla_gen.training.optim import build_optimizer
from mhla_gen.training.shards import clipping_factor, gradient_norm, scale_gradients

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Near zero, of a weight that eight steps of 0.1 may have brought there: 6e-8 of what it was, and of
# the five numbers that each step is made of, so 8 * 6e-8 * (0.8 + 5 * 0.1) at worst.
ROUNDING = 6.5e-7


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
            parameter.grad = None if number == 4 and index == 0 else gradient * 0.7**number
        factor = clipping_factor(gradient_norm(parameters), self.limit)
        done = set() if self.one_pass is None else self.one_pass(parameters, factor)
        scale_gradients(parameters, factor)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.average.step(parameters, done)
        return {index for index, p in enumerate(parameters) if id(p) in done}

    def numbers(self):
        """All that a step changes, and what it may differ by near zero."""
        for weight in (*self.model.parameters(), *self.average.shadow_params):
            yield weight, ROUNDING
        for parameter in self.model.parameters():
            for name, value in self.optimizer.state.get(parameter, {}).items():
                squares = self.optimizer.state[parameter]["exp_avg_sq"]
                # Gradients of that size cancel in their average.
                root = float(squares.sum() / max(1, squares.numel())) ** 0.5
                yield value, 5e-6 * root if name == "exp_avg" else 0.0


def assert_rounded(found, expected, near_zero):
    """Equal but for eight steps of four roundings each, 6e-8 at worst."""
    torch.testing.assert_close(found, expected, rtol=2e-6, atol=near_zero)


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
        for expected, (found, _) in pairs:
            assert_rounded(found, *expected)
    with_decay, without = {0, 2, 4, 6}, {1, 3, 5}
    assert done[:4] == [set(), *[with_decay | without] * 3]
    assert done[4:] == [with_decay - {0} | without, *[without] * 3]


def test_steps_of_the_optimizer_alone_are_counted():
    """As of a gradient that does not lie as its weight does."""
    results = []
    for in_one in (False, True):
        model = nn.ParameterList([torch.ones(4, 5, device=DEVICE)])
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
        average = WeightAverage(model, 0.9)
        one_pass = OnePass(optimizer, average, [], DEVICE)
        for number in range(4):
            gradient = torch.arange(20.0, device=DEVICE).view(4, 5) + number
            model[0].grad = gradient.t().contiguous().t() if number == 2 else gradient
            done = one_pass(list(model), torch.ones((), device=DEVICE)) if in_one else set()
            assert len(done) == (in_one and number in (1, 3))
            optimizer.step()
            average.step(model, done)
        results.append([*model, *average.shadow_params])
    for expected, found in zip(*results, strict=True):
        assert_rounded(found, expected, ROUNDING)


EXACT = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from mhla_gen.ops.kernels.adamw import adamw_kernel

kinds = {"addresses_ptr": "*i64", "sizes_ptr": "*i64", "owners_ptr": "*i32", "firsts_ptr": "*i64"}
kinds |= {"factor_ptr": "*fp32", "CHUNK": "constexpr", "ALIGNED": "constexpr"}
signature = {name: kinds.get(name, "fp32") for name in adamw_kernel.arg_names}
source = ASTSource(adamw_kernel, signature, {"CHUNK": 256, "ALIGNED": True})
print(triton.compile(source, target=GPUTarget("cuda", 90, 32)).asm["ptx"])
"""


def test_operations_on_a_gpu_are_rounded_correctly():
    """Triton's interpreter always does; the machine code of a root may be an approximation."""
    environment = {name: text for name, text in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", EXACT]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "sqrt.rn.f32" in done.stdout and "div.rn.f32" in done.stdout
    assert "approx" not in done.stdout and "div.full" not in done.stdout
    # Of w - a alone: 1 - beta is not computed in float32.
    assert done.stdout.count("sub.f32") == done.stdout.count("sqrt.rn.f32")


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
