"""Models for training: presets, latents, and pretrained ones with other attention or classes."""

import json
from types import SimpleNamespace

import pytest
import torch
from diffusers import DiTTransformer2DModel
from safetensors.torch import load_file
from test_training_runs import tiny_run
from tiny import disturb, dit_inputs, tiny_dit, tiny_dit_pipeline, tiny_wan

import mhla_gen
from mhla_gen.config import LinformerConfig, MHLAConfig, ModelConfig
from mhla_gen.errors import UserError
from mhla_gen.models.saved_transformer import load_transformer
from mhla_gen.training import build_model, initialize_dit, rehearse

LAYOUT = MHLAConfig(layout=(2, 2))


def saved(model, folder):
    model.save_pretrained(folder)
    return str(folder)


def pretrained(path, **changes):
    return ModelConfig(pretrained=path, **{"attention": "mhla", "mhla": LAYOUT} | changes)


# Table 1 of arXiv:2212.09748 counts DiT's own embedders once, diffusers has them in every block.
@pytest.mark.parametrize(
    ("preset", "millions"), [("DiT-S/2", 33), ("DiT-B/4", 130), ("DiT-L/8", 459), ("DiT-XL/2", 675)]
)
def test_presets_have_the_published_sizes(preset, millions):
    sizes = ModelConfig(preset=preset).sizes
    with torch.device("meta"):
        model = DiTTransformer2DModel(
            **sizes._asdict(), out_channels=8, num_embeds_ada_norm=1000, sample_size=32
        )
    copies = sum(
        p.numel() for block in model.transformer_blocks[1:] for p in block.norm1.emb.parameters()
    )
    parameters = sum(p.numel() for p in model.parameters()) - copies
    assert abs(parameters / 1e6 - millions) < 1


def test_a_size_that_is_given_replaces_the_presets():
    config = ModelConfig(preset="DiT-XL/4", num_layers=2)
    assert config.sizes == (4, 2, 16, 72)
    with pytest.raises(ValueError, match=r"model\.preset must be one of DiT-S/2"):
        ModelConfig(preset="DiT-XXL/2")
    with pytest.raises(ValueError, match=r"model\.num_layers cannot be set"):
        ModelConfig(pretrained="x", num_layers=2)


def test_a_model_of_latents_predicts_a_variance():
    config = ModelConfig(mhla=LAYOUT, num_layers=1, num_attention_heads=2, attention_head_dim=8)
    model = build_model(config, (4, 8, 8), num_classes=10, out_channels=8)
    assert model(**dit_inputs()).sample.shape == (2, 8, 8, 8)


@pytest.mark.parametrize(
    ("key", "said"),
    [("num_attention_heads", "GiB, and this machine has"), ("attention_head_dim", "overflow")],
)
def test_sizes_that_no_machine_has_memory_for_are_refused_before_it_is_filled(key, said):
    sizes = {"num_layers": 1, "num_attention_heads": 8, "attention_head_dim": 8}
    sizes[key] = {"num_attention_heads": 10**6, "attention_head_dim": 2**31 - 4}[key]
    with pytest.raises(UserError, match=f"^the sizes in model .*{said}"):
        build_model(ModelConfig(mhla=LAYOUT, **sizes), (4, 8, 8), num_classes=10)


def test_swap_counts_as_memory_and_a_model_elsewhere_takes_none(monkeypatch):
    config = ModelConfig(mhla=LAYOUT, num_layers=1, num_attention_heads=2, attention_head_dim=8)
    memory, swap = SimpleNamespace(total=0), SimpleNamespace(total=0)
    monkeypatch.setattr("psutil.virtual_memory", lambda: memory)
    monkeypatch.setattr("psutil.swap_memory", lambda: swap)
    with pytest.raises(UserError, match="with swap; take fewer"):
        build_model(config, (4, 8, 8), num_classes=10)
    with torch.device("meta"):
        assert build_model(config, (4, 8, 8), num_classes=10).device.type == "meta"
    swap.total = 10**6
    assert build_model(config, (4, 8, 8), num_classes=10).get_memory_footprint() < swap.total


def test_a_pretrained_softmax_model_gets_the_attention_asked_for(tmp_path):
    path = saved(tiny_dit(), tmp_path / "model")
    base = load_file(tmp_path / "model" / "diffusion_pytorch_model.safetensors")
    layouts = {"softmax": None, "linear": [1, 1], "mhla": [2, 2]}
    for attention, layout in layouts.items():
        model = build_model(pretrained(path, attention=attention), (4, 8, 8), 10)
        assert (model.config.mhla["layout"] if layout else None) == layout
        state = model.state_dict()
        assert all(torch.equal(state[key], base[key]) for key in base)
        embedder = model.transformer_blocks[0].norm1.emb.class_embedder
        assert embedder.dropout_prob == 0 and state["proj_out_2.weight"].dtype == torch.float32


def test_a_converted_model_is_gone_on_with(tmp_path):
    model = disturb(mhla_gen.inject(tiny_dit(), LAYOUT))
    path = saved(model, tmp_path / "model")
    for mhla in (MHLAConfig(), LAYOUT):
        again = build_model(pretrained(path, mhla=mhla), (4, 8, 8), 10).eval()
        inputs = dit_inputs()
        assert torch.equal(again(**inputs).sample, model(**inputs).sample)
    with pytest.raises(ValueError, match=r"layout: found \(2, 2\), asked for \(4, 4\)"):
        build_model(pretrained(path, mhla=MHLAConfig(layout=(4, 4))), (4, 8, 8), 10)
    with pytest.raises(ValueError, match=r"has MHLA layers; set model\.attention=mhla"):
        build_model(pretrained(path, attention="softmax"), (4, 8, 8), 10)


@pytest.mark.parametrize(
    "given, key",
    [
        ({"mhla": MHLAConfig(layout=(9, 9))}, "model.mhla.layout"),
        ({"mhla": MHLAConfig(feature_map="cos")}, "model.mhla.feature_map"),
        (
            {"attention": "linformer", "linformer": LinformerConfig(projected_len=900)},
            "model.linformer.projected_len",
        ),
    ],
)
def test_what_does_not_fit_the_model_is_named_by_its_whole_key(given, key, tmp_path):
    model = ModelConfig(patch_size=4, num_layers=1, num_attention_heads=1, **given)
    with pytest.raises(ValueError, match=key.replace(".", r"\.")):
        rehearse(tiny_run(tmp_path / "run", model=model))


def test_the_class_is_the_one_that_was_saved(tmp_path):
    original = mhla_gen.OriginalDiTTransformer2DModel(**{**tiny_dit().config, "num_layers": 1})
    assert type(load_transformer(saved(original, tmp_path / "original"))) is type(original)
    model = build_model(pretrained(str(tmp_path / "original")), (4, 8, 8), 10)
    assert model.config.timestep_freq_shift == 0
    tiny_dit_pipeline().save_pretrained(tmp_path / "pipeline")
    assert type(load_transformer(str(tmp_path / "pipeline"))) is DiTTransformer2DModel
    # DiTs on the hub say so, from before diffusers had a class of their own for them.
    former = tmp_path / "former"
    tiny_dit().save_pretrained(former)
    config = json.loads((former / "config.json").read_text())
    (former / "config.json").write_text(json.dumps(config | {"_class_name": "Transformer2DModel"}))
    assert type(load_transformer(str(former))) is DiTTransformer2DModel


@pytest.mark.parametrize(
    ("shape", "classes", "out_channels", "message"),
    [
        ((3, 8, 8), 10, 3, "in_channels is 4, but 3 is the channels of the data"),
        ((4, 16, 16), 10, 4, "sample_size is 8, but 16 is the side of the data"),
        ((4, 8, 8), 3, 4, r"num_embeds_ada_norm is 10, but 3 .*new_classes"),
        ((4, 8, 8), 10, 8, "out_channels is 4, but 8 is the channels that the objective needs"),
        ((4, 8, 10), 10, 4, "square images"),
    ],
)
def test_a_pretrained_model_that_does_not_fit_is_refused(
    tmp_path, shape, classes, out_channels, message
):
    path = saved(tiny_dit(), tmp_path / "model")
    with pytest.raises(ValueError, match=message):
        build_model(pretrained(path), shape, classes, out_channels)


def test_what_is_no_dit_is_refused(tmp_path):
    with pytest.raises(ValueError, match="is a MHLAWanTransformer3DModel, but class labels"):
        config = pretrained(saved(tiny_wan(), tmp_path / "wan"), mhla=MHLAConfig())
        build_model(config, (16, 8, 8), 10)
    tiny_dit_pipeline().vae.save_pretrained(tmp_path / "vae")
    with pytest.raises(ValueError, match="is a AutoencoderKL; known are"):
        load_transformer(str(tmp_path / "vae"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="is neither a saved pipeline"):
        load_transformer(str(tmp_path / "empty"))


def test_new_classes_start_as_no_class(tmp_path):
    base = tiny_dit()
    initialize_dit(base)
    torch.nn.init.normal_(base.proj_out_2.weight)
    path = saved(base, tmp_path / "model")
    model = build_model(
        pretrained(path, attention="softmax", new_classes=True), (4, 8, 8), 3
    ).eval()
    assert model.config.num_embeds_ada_norm == 3
    inputs = dit_inputs(batch=2)
    new = model(**inputs | {"class_labels": torch.tensor([0, 3])}).sample
    old = base(**inputs | {"class_labels": torch.tensor([10, 10])}).sample
    assert torch.equal(new, old)
    again = DiTTransformer2DModel.from_pretrained(saved(model, tmp_path / "again")).eval()
    assert torch.equal(again(**inputs).sample, model(**inputs).sample)


def test_weights_of_other_sizes_than_the_settings_are_one_sentence(tmp_path):
    path = saved(tiny_dit(), tmp_path / "model")
    file = next((tmp_path / "model").rglob("config.json"))
    config = json.loads(file.read_text())
    file.write_text(json.dumps(config | {"attention_head_dim": 2 * config["attention_head_dim"]}))
    with pytest.raises(
        UserError, match=r"model.* cannot be loaded: .* but got torch\.Size\(\[\d+\]\)$"
    ):
        load_transformer(path)


@pytest.mark.parametrize("content", ["[1]", "{}"])
def test_settings_that_name_no_class_are_damaged(content, tmp_path):
    tiny_dit_pipeline().save_pretrained(tmp_path / "model")
    (tmp_path / "model/transformer/config.json").write_text(content)
    with pytest.raises(ValueError, match=r"transformer/config\.json is damaged \(it names no"):
        load_transformer(str(tmp_path / "model"))
