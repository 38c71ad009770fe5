"""One pass over the weights does what clipping, AdamW and the average do one after the other.

Run as a script it trains in one of several processes.
"""

import copy
import os
import subprocess
import sys

import pytest
import torch
from ranks import torchrun
from test_training import assert_same_state, tiny_run, trained, trained_weights
from torch import nn

from mhla_gen.errors import OccupiedError, UserError
from mhla_gen.outputs.folders import is_free
from mhla_gen.training import one_pass, train
from mhla_gen.training.checkpoints import load_latest, save_checkpoint
from mhla_gen.training.ema import WeightAverage
from mhla_gen.training.one_pass import OnePass, build_one_pass
from mhla_gen.training.optim import build_optimizer, mixing_matrices
from mhla_gen.training.shards import clipping_factor, gradient_norm, scale_gradients
from mhla_gen.training.training_run import build_run

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
        self.one_pass = OnePass(self.optimizer, self.average, others) if in_one else None

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
        update = OnePass(optimizer, average, [])
        for number in range(4):
            gradient = torch.arange(20.0, device=DEVICE).view(4, 5) + number
            model[0].grad = gradient.t().contiguous().t() if number == 2 else gradient
            done = update(list(model), torch.ones((), device=DEVICE)) if in_one else set()
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


def chosen(wanted, kind=torch.optim.AdamW, device="cuda", shared=False, **options):
    """What a run takes; it asks for the kind of its device only."""
    model = nn.Linear(3, 4)
    optimizer, average = kind(model.parameters(), lr=0.1, **options), WeightAverage(model, 0.9)
    return build_one_pass(wanted, optimizer, average, [], torch.device(device), shared=shared)


@pytest.mark.parametrize(
    "case, reason",
    [
        ({"kind": torch.optim.SGD}, "needs optimizer=AdamW, found SGD"),
        ({"kind": torch.optim.Adam}, "needs optimizer=AdamW, found Adam;"),
        ({"amsgrad": True}, "needs AdamW without amsgrad"),
        ({"maximize": True}, "needs AdamW without maximize"),
        ({"shared": True}, "needs whole weights, which parallelism=fsdp"),
        ({"device": "cpu"}, "needs a GPU, found cpu"),
        ({"device": "mps"}, "needs a GPU, found mps"),
    ],
)
def test_three_passes_are_taken_where_one_is_impossible_and_said_if_it_is_wanted(
    case, reason, monkeypatch
):
    monkeypatch.setattr(one_pass, "INTERPRETED", False)
    assert chosen(None, **case) is None and chosen(False, **case) is None
    with pytest.raises(UserError, match=f"one_pass=true {reason}"):
        chosen(True, **case)
    assert isinstance(chosen(None), OnePass) and isinstance(chosen(True), OnePass)
    assert chosen(False) is None


def test_triton_is_needed(monkeypatch):
    monkeypatch.setattr(one_pass, "HAS_TRITON", False)
    assert chosen(None) is None
    with pytest.raises(UserError, match="one_pass=true needs the package triton"):
        chosen(True)


def test_runs_take_what_their_settings_say(tmp_path):
    def taken(**changes):
        return build_run(tiny_run(tmp_path / "run", **changes)).one_pass is not None

    # Triton's interpreter would be slower.
    assert taken() == (DEVICE == "cuda")
    assert taken(one_pass=True) and not taken(one_pass=False)
    assert not taken(optimizer="SGD")
    for changes in ({"optimizer": "SGD"}, {"optimizer_options": {"amsgrad": True}}):
        with pytest.raises(UserError, match="one_pass=true needs"):
            train(tiny_run(tmp_path / "run", one_pass=True, **changes))
    # Nothing was begun.
    assert is_free(tmp_path / "run")


def after(steps, run, start=0):
    for number, parts in enumerate(run.batches(start, steps), start):
        run.step(number, parts)
    return run


def assert_same_step(found, expected):
    """Two runs agree that began a second step with the same numbers.

    A step is at most 3.2 times the learning rate long. In the second one, fused AdamW has 2e-5 less
    than 1 - 0.999**2, whose root it takes. Four roundings of a weight; 30 times of it all.
    """
    rate = found.config.learning_rate
    for kind in ("model", "ema"):
        pairs = [
            list(run.model.parameters() if kind == "model" else run.ema.shadow_params)
            for run in (found, expected)
        ]
        for one, other in zip(*pairs, strict=True):
            torch.testing.assert_close(one, other, rtol=30 * 4 * 6e-8, atol=30 * 3.2 * rate * 1e-5)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"max_grad_norm": 0.01, "gradient_accumulation_steps": 2, "weight_decay": 0.1},
        {"max_grad_norm": None, "ema_width": 0.1, "mixing_learning_rate": 0.01},
    ],
)
def test_steps_of_runs_are_those_of_three_passes(changes, tmp_path, monkeypatch):
    updated, call = [], OnePass.__call__
    monkeypatch.setattr(
        OnePass, "__call__", lambda *args: updated.append(call(*args)) or updated[-1]
    )
    changes = {"warmup_steps": 0, **changes}
    one = after(2, build_run(tiny_run(tmp_path, one_pass=True, **changes)))
    three = after(2, build_run(tiny_run(tmp_path, one_pass=False, **changes)))
    assert_same_step(one, three)
    others = {id(matrix) for matrix in mixing_matrices(one.model)}
    every = {id(p) for p in one.model.parameters() if p.requires_grad}
    # The first step is AdamW's own.
    assert others and updated == [set(), every - others]


def test_a_resumed_run_has_the_same_bits(tmp_path):
    def run(name, **changes):
        options = {"one_pass": True, "max_steps": 4, "checkpoint_every": 2}
        train(tiny_run(tmp_path / name, **options | changes))

    run("straight")
    run("stopped", max_steps=2)
    run("stopped", resume="latest")
    assert_same_state(tmp_path / "straight/checkpoint-4", tmp_path / "stopped/checkpoint-4")


@pytest.mark.parametrize("before", [True, False])
def test_checkpoints_of_both_ways_are_read_by_both_but_a_run_keeps_its_own(before, tmp_path):
    options = {"max_steps": 2, "warmup_steps": 0, "lr_scheduler": "constant_with_warmup"}
    run = after(1, build_run(tiny_run(tmp_path / "run", one_pass=before, **options)))
    save_checkpoint(run, 1)
    resumed = build_run(tiny_run(tmp_path / "run", one_pass=not before, **options))
    assert load_latest(resumed) == 1
    assert_same_step(after(2, resumed, 1), after(2, run, 1))

    train(tiny_run(tmp_path / "whole", one_pass=before, **options))
    with pytest.raises(OccupiedError, match=f"one_pass: found {before}, asked for {not before}"):
        train(tiny_run(tmp_path / "whole", one_pass=not before, resume="latest", **options))


def test_two_processes_train_as_one(tmp_path):
    expected = trained(tiny_run(tmp_path / "one", one_pass=False))
    torchrun(2, __file__, tmp_path / "two")
    found = trained_weights(tmp_path / "two")
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-3, atol=1e-4, msg=name)


if __name__ == "__main__":
    train(tiny_run(sys.argv[1], one_pass=True))
