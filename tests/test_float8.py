"""Products of 8 bits in feed-forward layers, which torchao emulates on a CPU."""

import pytest
import torch
from families import FAMILIES
from test_training import tiny_run
from tiny import dit_inputs, tiny_dit

import mhla_gen
from mhla_gen import MHLAConfig
from mhla_gen.config import ConfigError, TrainConfig, load_config
from mhla_gen.training import float8
from mhla_gen.training.loop import train


def test_only_feed_forward_layers_change_and_no_name_does():
    pytest.importorskip("torchao")
    torch.manual_seed(0)
    model, inputs = mhla_gen.inject(tiny_dit(), MHLAConfig(layout=(2, 2))), dit_inputs()
    names, weights = list(model.state_dict()), dict(model.named_parameters())
    plain = model(**inputs)[0]
    assert float8.use_float8(model, emulate=True) == 2 * len(model.transformer_blocks)
    assert list(model.state_dict()) == names
    assert all(parameter is weights[name] for name, parameter in model.named_parameters())
    changed = {name for name, m in model.named_modules() if type(m).__name__ == "Float8Linear"}
    assert all(".ff.net." in name for name in changed)
    rounded = model(**inputs)[0]
    error = (rounded - plain).norm() / plain.norm()
    assert 0 < error < 0.05
    rounded.square().mean().backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize("family", FAMILIES)
def test_feed_forward_layers_of_every_family_are_found(family, monkeypatch):
    pytest.importorskip("torchao")
    monkeypatch.setattr(float8, "_MULTIPLE", 1)
    model = FAMILIES[family][0]()
    if family in ("sana", "sana_video"):
        # Their feed-forward layers are convolutions.
        with pytest.raises(ValueError, match="no feed-forward layer"):
            float8.use_float8(model, emulate=True)
    else:
        assert float8.use_float8(model, emulate=True) > 0


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [32, 33])
def test_any_number_of_tokens(tokens):
    pytest.importorskip("torchao")
    layers = torch.nn.ModuleDict({"ff": torch.nn.Linear(32, 16)}).cuda()
    inputs = torch.randn(1, tokens, 32, device="cuda", requires_grad=True)
    weight = layers["ff"].weight

    def gradients():
        with torch.autocast("cuda", torch.bfloat16):
            out = layers["ff"](inputs)
        return torch.autograd.grad(out.float().square().sum(), (inputs, weight))

    expected = gradients()
    assert float8.use_float8(layers) == 1
    for actual, each in zip(gradients(), expected, strict=True):
        assert 0 < (actual - each).norm() / each.norm() < 0.1


def test_a_model_without_such_layers_is_refused():
    pytest.importorskip("torchao")
    with pytest.raises(ValueError, match="no feed-forward layer of a Linear"):
        float8.use_float8(torch.nn.Linear(16, 16))


def test_what_is_missing_is_said_before_anything_is_written(tmp_path, monkeypatch):
    config = tiny_run(tmp_path / "run", float8=True, mixed_precision="bf16")
    monkeypatch.setattr(float8, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="needs the package torchao"):
        train(config)
    monkeypatch.setattr(float8, "find_spec", lambda name: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="needs a GPU with products of 8 bits, found none"):
        float8.require_float8()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "A100")
    with pytest.raises(ValueError, match=r"8\.9 or more\), found A100"):
        float8.require_float8()
    assert not (tmp_path / "run" / "config.yaml").exists()


def test_it_needs_bf16():
    with pytest.raises(ConfigError, match="float8 needs mixed_precision=bf16"):
        load_config(None, ["float8=true", "mixed_precision=fp32"], TrainConfig)
