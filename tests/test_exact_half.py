"""Layers with an exact half: what they compute at every share, and what is refused."""

import copy
from dataclasses import replace

import pytest
import torch
from diffusers import ContextParallelConfig
from test_models import FAMILIES, cast, family, run, tiles
from tiny import disturb, dit_inputs, tiny_dit, tiny_wan

import mhla_gen
from mhla_gen import MHLAConfig
from mhla_gen.config import ConfigError, ModelConfig, load_config
from mhla_gen.models.additions import Inputs
from mhla_gen.models.exact import exact_attention, exact_share, tile_layout
from mhla_gen.models.overview import exact_pairs
from mhla_gen.ops import mhla, tile_attention, tile_share
from mhla_gen.training.dit import build_model

__all__ = ["family"]

SOFTMAX = [n for n, kind in FAMILIES.items() if kind[2].family.stock_kind == "softmax"]
GRID, LAYOUT = (5, 7), (2, 3)


def tokens(batch=2, heads=2, head_dim=8, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shape = (4, batch, 35, heads, head_dim)
    q, k, v, h = torch.randn(shape, generator=generator, dtype=torch.float64)
    return q, k, v, h.flatten(2)


UNROTATED = ("dit", "pixart", "sd3")


def layer(**options):
    settings = {"layout": LAYOUT, "conv": False, "gate": False, **tiles(LAYOUT)}
    model = mhla_gen.MHLA(2, 8, 16, MHLAConfig(**settings | options)).double()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.rand(parameter.shape, generator=generator))
    return model


def exact_half(q, k, v, config):
    tile, group, window, top = tile_layout(config, GRID)
    options = {"tile": tile, "group": group, "window": window, "top": top}
    return tile_attention(q, k, v, grid=GRID, implementation="naive", **options)


# Kandinsky 5 rounds the rotated queries and keys of a softmax layer to bfloat16.
@pytest.mark.parametrize("name", SOFTMAX)
@pytest.mark.parametrize("share", [1.0, 0.5])
def test_all_pairs_are_the_softmax_model(name, share):
    make, make_inputs, _, layout = FAMILIES[name]
    model, inputs = make(), make_inputs()
    before = run(model, inputs)
    everything = {} if share == 1 else {"exact_window": (99,) * len(layout), "linear": False}
    mhla_gen.inject(model, MHLAConfig(layout=layout, exact=share, **everything))
    tolerance = {"rtol": 1e-2, "atol": 1e-2} if name == "kandinsky5" else {}
    torch.testing.assert_close(run(model, inputs), before, **tolerance)
    assert {row.exact for row in mhla_gen.summary(model)} == {1.0}
    assert {row.kind for row in mhla_gen.summary(model)} == {"softmax" if share == 1 else "exact"}


# Parts of Kandinsky 5 and Cosmos stay float32.
@pytest.mark.parametrize("name", [n for n in SOFTMAX if n not in ("kandinsky5", "cosmos")])
def test_all_pairs_are_the_softmax_model_in_float64(name):
    make, make_inputs, _, layout = FAMILIES[name]
    model, inputs = make().double(), cast(make_inputs(), torch.float64)
    before = run(model, inputs)
    mhla_gen.inject(model, MHLAConfig(layout=layout, exact=1.0, conv=False, gate=False))
    # diffusers rotates in float32.
    tolerance = 1e-12 if name in UNROTATED else 1e-6
    torch.testing.assert_close(run(model, inputs), before, rtol=tolerance, atol=tolerance)


def test_the_gate_weighs_the_halves():
    model = layer()
    q, k, v, h = tokens()
    exact, _ = exact_half(q, k, v, model.config)
    linear = mhla(q, k, v, model.mixing, grid=GRID, layout=LAYOUT, implementation="naive")
    gate = model.combine.to_share
    a = (h @ gate.weight.T + gate.bias).sigmoid().unsqueeze(-1)
    expected = (a * exact + (1 - a) * linear).flatten(2)
    torch.testing.assert_close(model(q, k, v, h, GRID), expected)


def test_every_parameter_and_input_learns():
    model = layer(conv=True, gate=True, output_norm=True, learned_features=True)
    inputs = [x.requires_grad_() for x in tokens()]
    model(*inputs, GRID).square().sum().backward()
    for name, parameter in [*model.named_parameters(), *enumerate(inputs)]:
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, name


def test_without_the_linear_half_nothing_is_left_of_it():
    model = layer(linear=False)
    assert not list(model.parameters())
    q, k, v, h = tokens()
    expected, _ = exact_half(q, k, v, model.config)
    torch.testing.assert_close(model(q, k, v, h, GRID), expected.flatten(2))


@pytest.mark.parametrize("share", [0.3, 1.0])
def test_tables_by_head_rotate_as_one_table_does(share):
    q, k, v, _ = tokens()
    angles = torch.rand(35, 4, dtype=torch.float64) * 6
    rotary = angles.cos(), angles.sin()
    by_head = tuple(table[None, :, None].expand(1, 35, 2, 4) for table in rotary)
    options = {"exact": 1.0} if share == 1 else tiles(LAYOUT)
    config = MHLAConfig(layout=LAYOUT, **options)
    out = exact_attention(q, k, v, config, GRID, by_head)
    torch.testing.assert_close(out, exact_attention(q, k, v, config, GRID, rotary))
    plain = exact_attention(q, k, v, config, GRID)
    assert not torch.allclose(plain, out, atol=1e-3)


def test_a_conversion_starts_at_the_exact_half_and_a_new_model_in_the_middle(family):
    make, _, mhla_class, layout = family
    base, config = make(), MHLAConfig(layout=layout, exact=0.3)
    arguments = {k: v for k, v in base.config.items() if not k.startswith("_")}
    starts = {
        0.98: mhla_gen.inject(base, config),
        0.5: mhla_class(**arguments, mhla=config),
        0.7: mhla_class(**arguments, mhla=MHLAConfig(layout=layout, exact=0.3, exact_start=0.7)),
    }
    for start, model in starts.items():
        assert model.mhla_config.exact_start == start
        gate = mhla_class.family.attentions(model)[0][1].mhla.combine.to_share
        assert not gate.weight.any()
        torch.testing.assert_close(gate.bias.sigmoid(), torch.full_like(gate.bias, start))


def test_without_settings_a_pretrained_model_gets_what_is_recommended_and_a_new_one_the_papers():
    base = tiny_dit()
    sizes = {k: v for k, v in base.config.items() if not k.startswith("_")}
    kept = mhla_gen.MHLADiTTransformer2DModel.from_base(base)
    assert kept.mhla_config == mhla_gen.inject(base).mhla_config
    assert (kept.mhla_config.exact, kept.mhla_config.exact_start) == (0.125, 0.98)
    assert kept.mhla_config.learned_features and kept.mhla_config.feature_map == "softmax"
    new = mhla_gen.MHLADiTTransformer2DModel(**sizes)
    assert new.mhla_config.exact == MHLAConfig().exact == 0


def test_tiles_follow_the_grid_and_no_parameter_does():
    model = mhla_gen.inject(tiny_dit(sample_size=32), MHLAConfig(layout=(2, 2), exact=0.25))
    shapes = {name: p.shape for name, p in model.named_parameters() if ".mhla." in name}
    config = model.mhla_config
    for grid in ((16, 16), (32, 32), (9, 40)):
        assert exact_share(config, grid) == pytest.approx(0.25, abs=0.1)
    other = mhla_gen.inject(tiny_dit(), MHLAConfig(layout=(2, 2), exact=0.25))
    assert shapes == {n: p.shape for n, p in other.named_parameters() if ".mhla." in n}


def test_settings_replace_what_the_rule_picks():
    grid = (32, 32)
    rule = tile_layout(MHLAConfig(exact=0.4), grid)
    near = tile_layout(MHLAConfig(exact=0.4, exact_top=0), grid)
    assert near == rule._replace(top=0) != rule
    own = MHLAConfig(exact=0.1, exact_tile=(4, 4), exact_window=(5, 5), exact_top=8)
    assert tile_layout(own, grid) == ((4, 4), (1, 1), (5, 5), 8)
    assert exact_share(own, grid) == tile_share(grid, (4, 4), (5, 5), 8) == 33 / 64
    for part in ({"exact_tile": (8, 8)}, {"exact_window": (0, 0), "exact_group": (2, 1)}):
        layout = tile_layout(MHLAConfig(exact=0.25, **part), grid)
        assert all(getattr(layout, name[len("exact_") :]) == size for name, size in part.items())
        assert exact_share(MHLAConfig(exact=0.25, **part), grid) == 0.25


def test_summary_shows_the_share_of_each_layer():
    model = mhla_gen.inject(
        tiny_dit(sample_size=32), MHLAConfig(layout=(2, 2), layers=[1, 2], exact=0.125)
    )
    rows = mhla_gen.summary(model)
    assert [row.kind for row in rows] == ["softmax", "exact + mhla", "exact + mhla"]
    assert rows[0].exact == 1 and rows[1].exact == exact_share(model.mhla_config, (16, 16))
    assert f"{rows[1].exact:.1%}" in str(rows) and "2 of 3" in str(rows)
    control = mhla_gen.inject(tiny_dit(), MHLAConfig(exact=1.0))
    rows = mhla_gen.summary(control)
    assert [(row.kind, row.layout, row.implementation) for row in rows] == [
        ("softmax", None, "sdpa")
    ] * 3
    assert all(row.added_parameters for row in rows) and "3 of 3" in str(rows)


def test_layers_can_be_chosen_by_a_function():
    config = MHLAConfig(layout=(2, 2), layers=lambda index, name: name.endswith(f"{index}.attn1"))
    assert mhla_gen.inject(tiny_dit(), config).mhla_config.layers == (0, 1, 2)
    last = MHLAConfig(layout=(2, 2), layers=lambda index, name: index == 2)
    base = tiny_dit()
    model = mhla_gen.MHLADiTTransformer2DModel.from_base(base, last)
    assert model.mhla_config.layers == (2,)
    assert [row.converted for row in mhla_gen.summary(model)] == [False, False, True]
    with pytest.raises(ValueError, match="chooses none of 3 layers"):
        mhla_gen.inject(base, MHLAConfig(layers=lambda index, name: False))


@pytest.mark.parametrize("exact", [0.25, 1.0])
def test_some_layers_have_the_exact_half_and_the_others_are_mhla(tmp_path, exact):
    config = MHLAConfig(layout=(2, 2), exact=exact, linear=False, exact_layers="1/3")
    model = disturb(mhla_gen.inject(tiny_dit(sample_size=32), config))
    *rest, last = mhla_gen.summary(model)
    assert [(row.kind, row.exact) for row in rest] == [("mhla", 0.0)] * 2
    assert last.kind == ("softmax" if exact == 1 else "exact") and last.exact >= exact
    assert exact_pairs(model, (16, 16)) == pytest.approx(last.exact / 3)
    # Each layer is what it is in a model where all are alike.
    for number, other in ((0, MHLAConfig(layout=(2, 2))), (2, replace(config, exact_layers="all"))):
        alike = mhla_gen.inject(tiny_dit(), other).transformer_blocks[number].attn1.mhla
        layer = model.transformer_blocks[number].attn1.mhla
        alike.load_state_dict(layer.state_dict())
        inputs = [x.float() for x in tokens(heads=2, head_dim=layer.head_dim)]
        assert torch.equal(alike(*inputs, GRID), layer(*inputs, GRID))
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    assert again.mhla_config == model.mhla_config
    inputs = dit_inputs(side=32)
    assert torch.equal(run(again, inputs), run(model, inputs))


@pytest.mark.parametrize("share", [{"exact": 1}, {"exact": 0.25, "linear": False}])
def test_layers_of_mhla_use_settings_that_layers_without_it_cannot(share):
    settings = {"output_norm": True, "learned_features": True, "magnitude": True}
    config = MHLAConfig(layout=(2, 2), exact_layers=[2], **settings, **share)
    model = mhla_gen.inject(tiny_dit(), config)
    first, _, last = (block.attn1.mhla for block in model.transformer_blocks)
    assert first.norm is not None and first.features.query_map is not None
    assert last.norm is None and last.features is None and not last.config.magnitude
    run(model, dit_inputs())
    for layers in ([0, 1, 2], "1/1", lambda index, name: True):
        with pytest.raises(ValueError, match="output_norm needs MHLA's half"):
            mhla_gen.inject(tiny_dit(), replace(config, exact_layers=layers))


def test_joint_layers_without_an_exact_half_still_read_the_text():
    make, make_inputs, _, layout = FAMILIES["sd3"]
    some = mhla_gen.inject(make(), MHLAConfig(layout=layout, exact=0.5, exact_layers=[0]))
    none = mhla_gen.inject(make(), MHLAConfig(layout=layout))
    starts = [m.combine.start for m in some.modules() if isinstance(m, mhla_gen.MHLA) and m.combine]
    plain = [m.combine.start for m in none.modules() if isinstance(m, mhla_gen.MHLA) and m.combine]
    assert starts[0] == 0.98 and starts[1:] == plain[1:] and len(starts) > 1
    run(some, make_inputs())


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("exact_layers=1/2", "exact_layers needs a share"),
        ("exact=0.1 exact_layers=most", 'exact_layers must be "all", a list'),
        ("exact=1.5", r"exact must be in \[0, 1\]"),
        ("exact=.nan", "exact must be a number"),
        ("exact_tile=[4,4]", "exact_tile needs exact between 0 and 1"),
        ("exact=0.1 exact_tile=[4,0]", "exact_tile"),
        ("exact=0.1 exact_window=[2,2]", "odd"),
        ("exact=0.1 exact_window=[3,0]", "odd"),
        ("exact=0.1 exact_top=-1", "exact_top"),
        ("exact=0.1 exact_start=1", "exact_start"),
        ("linear=false", "leaves no attention"),
        ("exact=1 output_norm=true", "output_norm"),
        ("exact=1 learned_features=true", "learned_features"),
    ],
)
def test_mistakes_are_named(setting, message):
    with pytest.raises(ConfigError, match=message):
        load_config(None, setting.split(), MHLAConfig)


def test_what_does_not_fit_is_refused_before_anything_changes():
    model = tiny_wan()
    keys = list(model.state_dict())
    with pytest.raises(ValueError, match="exact_tile needs 3 entries"):
        mhla_gen.inject(model, MHLAConfig(exact=0.1, exact_tile=(4, 4)))
    with pytest.raises(ValueError, match="leave no exact pair"):
        mhla_gen.inject(model, MHLAConfig(exact=0.1, exact_window=(0, 0, 0), exact_top=0))
    assert list(model.state_dict()) == keys
    mhla_gen.inject(model, MHLAConfig(exact=0.1))
    with pytest.raises(NotImplementedError, match=r"exact=0\.1 cannot share a sequence"):
        model.enable_parallelism(config=ContextParallelConfig(ring_degree=2))
    layer = copy.deepcopy(model.blocks[0].attn1.mhla)
    q = torch.randn(1, 8, 2, 12)
    with pytest.raises(ValueError, match="cannot share a sequence"):
        layer(q, q, q, torch.randn(1, 8, 24), (2, 2, 2), None, object())


def test_softmax_with_convolution_and_gate_is_a_choice_of_a_new_model():
    config = ModelConfig(
        attention="gated_softmax", num_layers=1, num_attention_heads=2, attention_head_dim=8,
        mhla=MHLAConfig(exact=0.1, exact_top=3),
    )  # fmt: skip
    model = build_model(config, (4, 8, 8), num_classes=3)
    (row,) = mhla_gen.summary(model)
    assert row.kind == "softmax" and row.added_parameters > 0
    child = model.transformer_blocks[0].attn1.mhla
    assert child.conv is not None and child.gate is not None and child.mixing is None
    assert torch.isfinite(
        run(disturb(model), {**dit_inputs(), "class_labels": torch.tensor([0, 2])})
    ).all()


@pytest.mark.parametrize("feature_map", ["relu", "softmax"])
def test_learned_features_start_as_none_and_serve_the_linear_half_alone(feature_map):
    q, k, v, h = tokens()
    options = {"feature_map": feature_map}
    plain, learned = layer(**options), layer(**options, learned_features=True)
    learned.load_state_dict(plain.state_dict(), strict=False)
    learned.features.reset_parameters()
    expected = plain(q, k, v, h, GRID)
    torch.testing.assert_close(learned(q, k, v, h, GRID), expected)
    with torch.no_grad():
        learned.features.query_map.normal_()
    assert not torch.allclose(learned(q, k, v, h, GRID), expected, atol=1e-4)
    alone = exact_attention(q, k, v, learned.config, GRID)
    assert torch.equal(alone, exact_attention(q, k, v, plain.config, GRID))
    if feature_map == "softmax":
        options = {"grid": GRID, "layout": LAYOUT, "feature_map": "identity"}
        linear = mhla(q.softmax(-1), k.softmax(-1), v, plain.mixing, **options)
        found = plain._begin_linear(Inputs(q, k, v, (), GRID, None, None, None))()
        torch.testing.assert_close(found, linear)


def test_models_of_two_shares_compile_into_one_graph_each():
    torch._dynamo.reset()
    hidden = torch.randn(1, 35, 16, dtype=torch.float64)
    query, key, value = (hidden.unflatten(-1, (2, 8)) * n for n in (1, 2, 3))
    for share in (0.25, 0.5, 0.3):
        module = mhla_gen.MHLA(2, 8, 16, MHLAConfig(layout=LAYOUT, exact=share)).double()
        compiled = torch.compile(module, fullgraph=True, backend="eager")
        found = compiled(query, key, value, hidden, GRID)
        torch.testing.assert_close(found, module(query, key, value, hidden, GRID))
