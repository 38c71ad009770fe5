"""Models whose sequences are too short for MHLA to pay."""

import warnings
from dataclasses import replace

import pytest
from diffusers import DiTTransformer2DModel
from test_training import tiny_run
from tiny import tiny_dit

import mhla_gen
from mhla_gen import LinformerConfig, MHLAConfig
from mhla_gen.cli import main
from mhla_gen.config import ModelConfig
from mhla_gen.models.short import ShortSequenceWarning, too_short
from mhla_gen.training.loop import train
from mhla_gen.training.rehearsal import rehearse


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
    # Beside what libraries say when they are used for the first time.
    (short,) = (each for each in found if each.category is ShortSequenceWarning)
    assert short.filename == __file__
    assert mhla_gen.summary(model)[0].kind == "mhla"


def test_inject_says_nothing_where_mhla_may_pay():
    large = DiTTransformer2DModel(
        num_attention_heads=1, attention_head_dim=8, num_layers=1, sample_size=64
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error", ShortSequenceWarning)
        mhla_gen.inject(large, MHLAConfig(layout=(2, 2)))
        mhla_gen.inject(tiny_dit(), MHLAConfig(layout=(2, 2), exact=1))


def said(capsys):
    """How often the sentence stands in what was printed."""
    printed = capsys.readouterr()
    return (printed.out + printed.err).count("gain no speed from MHLA")


@pytest.mark.parametrize("pretrained", [False, True])
def test_training_says_so_in_one_sentence(pretrained, tmp_path, capsys):
    config = tiny_run(tmp_path / "mhla", max_steps=1)
    if pretrained:
        base = tiny_dit(in_channels=1, num_embeds_ada_norm=10)
        base.save_pretrained(tmp_path / "softmax")
        model = ModelConfig(pretrained=str(tmp_path / "softmax"), mhla=config.model.mhla)
        config = replace(config, model=model)
    with warnings.catch_warnings():
        warnings.simplefilter("error", ShortSequenceWarning)
        train(config)
        assert said(capsys) == 1
        assert (
            rehearse(replace(config, output_dir=str(tmp_path / "dry"))).count("gain no speed") == 1
        )
        softmax = replace(config.model, attention="softmax")
        train(replace(config, model=softmax, output_dir=str(tmp_path / "other")))
    assert said(capsys) == 0


def test_a_measurement_and_an_adapter_are_no_choice_to_warn_of(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error", ShortSequenceWarning)
        settings = ["grids=[[4,4]]", "num_layers=1", "methods=[blockwise]", "backward=false"]
        assert main(["bench", "model", f"output_dir={tmp_path / 'bench'}", *settings]) == 0
        warnings.simplefilter("ignore", ShortSequenceWarning)
        model = mhla_gen.inject(tiny_dit(), MHLAConfig(layout=(2, 2)))
        mhla_gen.save_adapter(model, tmp_path / "adapter")
        warnings.simplefilter("error", ShortSequenceWarning)
        mhla_gen.load_adapter(mhla_gen.restore(model), tmp_path / "adapter")


def test_inject_warns_of_a_classifier_of_small_images():
    timm = pytest.importorskip("timm")
    vit = timm.create_model("vit_tiny_patch16_224", img_size=64, depth=1, embed_dim=16, num_heads=2)
    with pytest.warns(ShortSequenceWarning, match=r"16 tokens \(4×4\)"):
        mhla_gen.inject(vit, MHLAConfig(layout=(2, 2)))
