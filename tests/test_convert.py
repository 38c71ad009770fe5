"""Checkpoints of other code, read and written: the functions they compute must be the same."""

import copy
import json

import torch
from diffusers import DDIMScheduler, DiTPipeline, DiTTransformer2DModel
from tiny import dit_inputs, tiny_dit, tiny_dit_pipeline

import mhla_gen
from mhla_gen import MHLAConfig, MHLADiTTransformer2DModel, OriginalDiTTransformer2DModel


def run(model, inputs):
    with torch.no_grad():
        return model(**inputs).sample


def settings(model):
    return {k: v for k, v in model.config.items() if not k.startswith("_")}


def tiny_original(**changes):
    return OriginalDiTTransformer2DModel(**settings(tiny_dit(**changes))).eval()


def test_the_original_frequencies_survive_saving_conversion_and_restoring(tmp_path):
    model, inputs = tiny_original(), dit_inputs()
    stock = tiny_dit()
    stock.load_state_dict(model.state_dict())
    before = run(model, inputs)
    assert not torch.allclose(run(stock, inputs), before)
    model.save_pretrained(tmp_path / "softmax")
    loaded = OriginalDiTTransformer2DModel.from_pretrained(tmp_path / "softmax")
    assert torch.equal(run(loaded, inputs), before)
    assert settings(loaded) == settings(model)
    assert torch.equal(run(copy.deepcopy(model), inputs), before)

    config = MHLAConfig(layout=(2, 2))
    from_folder = MHLADiTTransformer2DModel.from_base(tmp_path / "softmax", config)
    converted = MHLADiTTransformer2DModel.from_base(model, config)
    # EMA copies are built this way.
    assert settings(MHLADiTTransformer2DModel.from_config(converted.config)) == settings(converted)
    assert torch.equal(run(from_folder, inputs), run(converted, inputs))
    assert not torch.equal(
        run(MHLADiTTransformer2DModel.from_base(stock, config), inputs), run(converted, inputs)
    )
    converted.save_pretrained(tmp_path / "mhla")
    reloaded = MHLADiTTransformer2DModel.from_pretrained(tmp_path / "mhla")
    assert torch.equal(run(reloaded, inputs), run(converted, inputs))

    restored = mhla_gen.restore(reloaded)
    assert type(restored) is OriginalDiTTransformer2DModel and settings(restored) == settings(model)
    assert torch.equal(run(restored, inputs), before)
    # The stock class is what it was: nothing of this in its config.
    mhla_gen.restore(mhla_gen.inject(stock, config))
    assert type(stock) is DiTTransformer2DModel
    assert "timestep_freq_shift" not in stock.config


def test_a_pipeline_reloads_the_original_frequencies(tmp_path):
    model = tiny_original(num_embeds_ada_norm=1000, out_channels=8)
    vae = tiny_dit_pipeline().vae
    DiTPipeline(transformer=model, vae=vae, scheduler=DDIMScheduler()).save_pretrained(tmp_path)
    assert json.loads((tmp_path / "model_index.json").read_text())["transformer"][0] == "mhla_gen"
    loaded = DiTPipeline.from_pretrained(tmp_path).transformer
    assert type(loaded) is OriginalDiTTransformer2DModel
    inputs = dit_inputs()
    assert torch.equal(run(loaded, inputs), run(model, inputs))
