"""Gradient checkpointing of some blocks."""

import pytest
import torch
from tiny import dit_inputs, tiny_dit, tiny_wan, wan_inputs

import mhla_gen
from mhla_gen import MHLAConfig
from mhla_gen.config import BenchConfig, ConfigError, TrainConfig, load_config
from mhla_gen.runtime.compiling import repeated_blocks
from mhla_gen.runtime.recomputing import recompute_activations


@pytest.mark.parametrize("share", [0, 0.34, 0.67, 1, True])
@pytest.mark.parametrize(
    ("make", "make_inputs", "layout"),
    [(tiny_dit, dit_inputs, (2, 2)), (tiny_wan, wan_inputs, (1, 2, 2))],
)
def test_the_first_blocks_are_computed_again_with_the_same_gradients(
    make, make_inputs, layout, share
):
    model = mhla_gen.inject(make(), MHLAConfig(layout=layout))
    inputs = make_inputs()
    names = repeated_blocks(model)
    blocks = [m for m in model.modules() if type(m).__name__ in names]
    calls = dict.fromkeys(range(len(blocks)), 0)
    for index, block in enumerate(blocks):
        block.register_forward_pre_hook(lambda *_, i=index: calls.__setitem__(i, calls[i] + 1))

    def gradients():
        model.zero_grad()
        model.train()
        model(**inputs, return_dict=False)[0].square().mean().backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    torch.manual_seed(1)
    expected = gradients()
    calls.update(dict.fromkeys(calls, 0))
    recompute_activations(model, share)
    torch.manual_seed(1)
    for actual, each in zip(gradients(), expected, strict=True):
        torch.testing.assert_close(actual, each)
    again = round(share * len(blocks))
    assert list(calls.values()) == [2] * again + [1] * (len(blocks) - again)


@pytest.mark.parametrize("wrong", ["1.5", "-0.1", "half", "null"])
def test_a_share_is_a_share(wrong):
    message = "must be true, false or a number from 0 to 1"
    with pytest.raises(ConfigError, match=message):
        load_config(None, [f"gradient_checkpointing={wrong}"], TrainConfig)
    with pytest.raises(ConfigError, match=message):
        load_config(None, [f"checkpointing={wrong}"], BenchConfig)
