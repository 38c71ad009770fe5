"""Models whose sequences are too short for MHLA to pay."""

import warnings
from dataclasses import replace

import pytest
from diffusers import DiTTransformer2DModel
from test_training import tiny_run
from tiny import tiny_dit

import mhla_gen
from mhla_gen import LinformerConfig, MHLAConfig
from mhla_gen.models.short import ShortSequenceWarning, too_short
from mhla_gen.training.loop import train


@pytest.mark.parametrize(("grid", "short"), [((16, 16), True), ((28, 28), True), ((29, 28), False)])
def test_fewer_than_800_tokens_gain_nothing(grid, short):
    said = too_short(MHLAConfig(), grid)
    assert (said is not None) == short
    if said:
        assert said.startswith(f"{grid[0] ** 2} tokens ({grid[0]}×{grid[1]}) gain no speed")
        assert said.count("\n") == 0 and "bench ops" in said
    assert too_short(MHLAConfig(exact=1), grid) is None
    assert too_short(LinformerConfig(), grid) is None


def test_inject_warns_once_and_converts():
    with pytest.warns(ShortSequenceWarning, match="16 tokens") as found:
        model = mhla_gen.inject(tiny_dit(), MHLAConfig(layout=(2, 2)))
    assert len(found) == 1 and found[0].filename == __file__
    assert mhla_gen.summary(model)[0].kind == "mhla"


def test_inject_says_nothing_where_mhla_may_pay():
    large = DiTTransformer2DModel(
        num_attention_heads=1, attention_head_dim=8, num_layers=1, sample_size=64
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        mhla_gen.inject(large, MHLAConfig(layout=(2, 2)))
        mhla_gen.inject(tiny_dit(), MHLAConfig(layout=(2, 2), exact=1))


def test_training_says_so_in_one_sentence(tmp_path, capsys):
    config = tiny_run(tmp_path / "mhla", max_steps=1)
    train(config)
    assert capsys.readouterr().err.count("gain no speed from MHLA") == 1
    softmax = replace(config.model, attention="softmax")
    train(replace(config, model=softmax, output_dir=str(tmp_path / "softmax")))
    assert "gain no speed" not in capsys.readouterr().err
