"""Optimizers by name, their state in checkpoints, and the averages of weights."""

from dataclasses import replace
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from test_training import TINY, assert_same, state_of, tiny_run, trained
from torch import nn

from mhla_gen.config import TrainConfig
from mhla_gen.config.fields import Range, kinds_of
from mhla_gen.errors import UserError
from mhla_gen.training import build_optimizer, train
from mhla_gen.training.dit import build_model
from mhla_gen.training.ema import WeightAverage, profile_exponent
from mhla_gen.training.optim import mixing_matrices

EIGHT_BIT = pytest.param(
    "bitsandbytes.AdamW8bit",
    # Smaller tensors than these keep a state of 32 bits.
    {"min_8bit_size": 16},
    marks=pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="no bitsandbytes"),
)
OPTIMIZERS = [
    ("AdamW", {"betas": [0.9, 0.95]}),
    ("Adafactor", {}),
    ("SGD", {}),
    ("NAdam", {}),
    EIGHT_BIT,
]


@pytest.mark.parametrize("name, options", OPTIMIZERS)
def test_every_optimizer_learns_and_keeps_mixing_in_range(name, options):
    torch.manual_seed(0)
    model = build_model(TINY, (1, 8, 8), num_classes=3)
    optimizer = build_optimizer(model, 0.02, 0.01, name=name, options=options)
    target = {n: torch.randn_like(p) for n, p in model.named_parameters() if p.requires_grad}

    def loss():
        return sum((p - target[n]).square().mean() for n, p in model.named_parameters())

    before = loss().item()
    for _ in range(20):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
        assert all(m.min() >= 0 and m.max() <= 1 for m in mixing_matrices(model))
    assert loss().item() < before


@pytest.mark.parametrize("name, options", OPTIMIZERS)
def test_any_optimizer_goes_on_bit_for_bit(name, options, tmp_path):
    changes = {"optimizer": name, "optimizer_options": options, "learning_rate": 1e-2}
    whole = tiny_run(tmp_path / "whole", **changes)
    parts = tiny_run(tmp_path / "parts", checkpoint_every=3, keep_checkpoints=9, **changes)
    train(parts)
    for part in ("pipeline", "checkpoint-6"):
        (tmp_path / "parts" / part).rename(tmp_path / f"done-{part}")
    assert_same(trained(whole), trained(replace(parts, resume="latest")))
    again = state_of(tmp_path / "parts" / "checkpoint-6")
    once = state_of(tmp_path / "done-checkpoint-6")
    assert again["state"] == once["state"]


@pytest.mark.parametrize(
    "name, options, message",
    [
        ("LBFGS", {}, "class of torch.optim for dense gradients"),
        ("SparseAdam", {}, "for dense gradients"),
        ("lr_scheduler", {}, "found 'lr_scheduler'"),
        ("torch.optim.AdamW", {}, "such as bitsandbytes.AdamW8bit, found 'torch.optim.AdamW'"),
        ("AdamW", {"momentum": 0.9}, "optimizer AdamW cannot be made.*momentum"),
        ("SGD", {"momentum": -1}, "optimizer SGD cannot be made.*momentum"),
        ("Muon", {}, "optimizer Muon cannot be made.*2D"),
        ("Rprop", {}, "Rprop has no weight decay; set weight_decay=0"),
    ],
)
def test_what_cannot_be_used_is_one_sentence(name, options, message):
    model = build_model(TINY, (1, 8, 8), num_classes=3)
    with pytest.raises(UserError, match=message) as caught:
        build_optimizer(model, 1e-3, 0.1, name=name, options=options)
    assert "\n" not in str(caught.value)


def test_a_missing_package_is_named(monkeypatch):
    # What the import system has for a package that must not be found.
    monkeypatch.setitem(__import__("sys").modules, "bitsandbytes", None)
    monkeypatch.setitem(__import__("sys").modules, "bitsandbytes.optim", None)
    with pytest.raises(UserError, match=r'pip install "mhla_gen\[bitsandbytes\]"'):
        build_optimizer(nn.Linear(2, 2), 1e-3, 0.0, name="bitsandbytes.AdamW8bit")


def test_weights_in_parts_want_an_optimizer_that_takes_them(tmp_path):
    with pytest.raises(UserError, match="optimizer Adafactor cannot work on parts"):
        tiny_run(tmp_path, parallelism="fsdp", optimizer="Adafactor")


@pytest.mark.parametrize("width", [0.02, 0.1, 0.25])
def test_the_profile_of_an_average_is_as_wide_as_asked(width):
    # The averages of n and of n² over a run are the first two moments of the profile.
    steps = 2000
    model = nn.Linear(2, 1, bias=False).double()
    average = WeightAverage(model, 0.9999, width)
    for n in range(1, steps + 1):
        with torch.no_grad():
            share = n / steps
            model.weight.copy_(torch.tensor([[share, share**2]]))
        average.step(model.parameters())
    mean, square = average.shadow_params[0].flatten().tolist()
    assert np.sqrt(square - mean**2) == pytest.approx(width, rel=0.03)
    exponent = profile_exponent(width)
    assert mean == pytest.approx((exponent + 1) / (exponent + 2), rel=0.01)


def test_every_width_that_is_taken_has_a_profile():
    limits = kinds_of(TrainConfig)["ema_width"].mark(Range)
    for width in (limits.low, limits.high):
        limits.check("ema_width", width, whole=False)
        gamma = profile_exponent(width)
        found = (gamma + 1) ** 0.5 / ((gamma + 2) * (gamma + 3) ** 0.5)
        assert found == pytest.approx(width, rel=1e-6)
    with pytest.raises(UserError, match=r"ema_width must be in \[0.001, 0.28\]"):
        limits.check("ema_width", 1e-300, whole=False)


def test_a_run_with_such_an_average_goes_on_with_it(tmp_path):
    whole = tiny_run(tmp_path / "whole", ema_width=0.1)
    parts = tiny_run(tmp_path / "parts", ema_width=0.1, checkpoint_every=3)
    train(replace(parts, max_steps=3))
    assert_same(trained(whole), trained(replace(parts, resume="latest")))
