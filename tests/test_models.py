"""Conversion of tiny real diffusers models: what it computes, saves, loads and undoes."""

import copy
import functools
import importlib
import inspect
import json
import pkgutil
import re
from dataclasses import replace
from pathlib import Path

import diffusers
import pytest
import torch
from diffusers import (
    ContextParallelConfig,
    DiTTransformer2DModel,
    ModelMixin,
    TensorParallelConfig,
)
from diffusers.models.attention_processor import AttnProcessor2_0
from families import FAMILIES, cast, output, run, two_inputs
from tiny import (
    CountsForms,
    disturb,
    dit_inputs,
    hunyuan_dit_inputs,
    kandinsky5_inputs,
    ltx_inputs,
    tiny_dit,
    tiny_dit_pipeline,
    tiny_hunyuan_dit,
    tiny_kandinsky5,
    tiny_ltx,
    tiny_wan,
    wan_inputs,
)
from tiny_joint import (
    tiny_cogvideox,
    tiny_flux,
    tiny_flux2,
    tiny_hunyuan_video,
    tiny_hunyuan_video15,
    tiny_mochi,
    tiny_sd3,
    tiny_z_image,
)
from tiny_wan_variants import ltx2_inputs, skyreels_v2_inputs, tiny_ltx2, tiny_skyreels_v2
from torch import nn

import mhla_gen
import mhla_gen.ops
from mhla_gen import (
    MHLAConfig,
    MHLADiTTransformer2DModel,
)
from mhla_gen.errors import UserError
from mhla_gen.models.families import MHLA_CLASSES
from mhla_gen.models.families.unsupported import REASONS
from mhla_gen.runtime.compiling import compile_blocks, repeated_blocks

EVERYTHING = {"output_norm": True, "mixing_per_head": True}
EXACT = {"exact": 0.3, "exact_start": 0.7}


def tiles(layout, **options):
    """Settings of an exact half whose tiles are small enough for tiny grids."""
    ones = (1,) * len(layout)
    small = {"exact_tile": (2,) * len(layout), "exact_window": ones, "exact_top": 1}
    return EXACT | small | options


def cast_model(model, dtype):
    """As loading with `torch_dtype` does: some models compute parts in float32 whatever else."""
    for name, module in model.to(dtype).named_modules():
        if name.rpartition(".")[2] in (model._keep_in_fp32_modules or ()):
            module.float()
    return model


# Compilation takes seconds: the rest of the families are for the slow run.
COMPILED = [
    pytest.param(name, marks=() if name in ("dit", "wan") else pytest.mark.slow)
    for name in FAMILIES
]


@pytest.fixture(params=FAMILIES)
def family(request):
    return FAMILIES[request.param]


@pytest.fixture(params=COMPILED)
def compiled_family(request):
    return FAMILIES[request.param]


@pytest.mark.parametrize(
    ("layers", "options"),
    [
        ("all", {}),
        ([1], EVERYTHING | EXACT),
        ("2/3", {"conv": False, "gate": False}),
        ("2/3", {"exact": 1.0}),
    ],
)
def test_save_and_load_is_exact(family, tmp_path, layers, options):
    make, make_inputs, mhla_class, layout = family
    model, inputs = make(), make_inputs()
    config = MHLAConfig(layout=layout, layers=layers, **options)
    assert mhla_gen.inject(model, config) is model
    disturb(model)
    model.save_pretrained(tmp_path)
    loaded, info = mhla_class.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert torch.equal(run(loaded, inputs), run(model, inputs))
    # The weight of text in layers that read it is settled by the size of the model.
    settled = replace(config, exact_start=model.mhla_config.exact_start)
    assert loaded.mhla_config == model.mhla_config == settled
    assert json.loads((tmp_path / "config.json").read_text())["mhla"] == settled.to_dict()


@pytest.mark.parametrize("exact", [0.0, 0.3])
def test_restore_is_bit_exact(family, exact):
    make, make_inputs, _, layout = family
    model, inputs = make(), make_inputs()
    before, base_class = run(model, inputs), type(model)
    config, state = dict(model.config), {k: v.clone() for k, v in model.state_dict().items()}
    mhla_gen.inject(model, MHLAConfig(layout=layout, **tiles(layout) if exact else {}))
    assert not torch.equal(run(model, inputs), before)
    assert mhla_gen.restore(model) is model
    assert type(model) is base_class and dict(model.config) == config
    assert torch.equal(run(model, inputs), before)
    assert state.keys() == model.state_dict().keys()
    with pytest.raises(ValueError, match="no MHLA layers"):
        mhla_gen.restore(model)


def test_from_base_leaves_the_base_alone(family, tmp_path):
    make, make_inputs, mhla_class, layout = family
    base, inputs = make(), make_inputs()
    before = run(base, inputs)
    config = MHLAConfig(layout=layout)
    model = mhla_class.from_base(base, config)
    assert torch.equal(run(base, inputs), before) and type(base) is mhla_class.family.base_class
    expected = run(mhla_gen.inject(copy.deepcopy(base), config), inputs)
    assert torch.equal(run(model, inputs), expected)
    base.save_pretrained(tmp_path)
    loaded = mhla_class.from_base(tmp_path, config)
    assert torch.equal(run(loaded, inputs), expected)
    with pytest.raises(ValueError, match="from_base needs a"):
        mhla_class.from_base(model, config)


def test_building_from_scratch_equals_conversion(family):
    make, make_inputs, mhla_class, layout = family
    base, inputs = make(), make_inputs()
    arguments = {k: v for k, v in base.config.items() if not k.startswith("_")}
    model = mhla_class(**arguments, mhla={"layout": list(layout)}).eval()
    model.load_state_dict(base.state_dict(), strict=False)
    mhla_gen.inject(base, MHLAConfig(layout=layout))
    assert torch.equal(run(model, inputs), run(base, inputs))
    # from_config keeps every setting although diffusers marks defaulted ones.
    assert mhla_class.from_config(model.config).config == model.config


def test_conv_and_gate_start_as_the_identity(family):
    make, make_inputs, mhla_class, layout = family
    base, inputs = make(), make_inputs()
    plain = mhla_class.from_base(base, MHLAConfig(layout=layout, conv=False, gate=False))
    full = mhla_class.from_base(base, MHLAConfig(layout=layout))
    for dtype in (torch.float32, torch.bfloat16):
        results = [run(cast_model(model, dtype), cast(inputs, dtype)) for model in (full, plain)]
        assert torch.equal(*results)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_gate_starts_at_exactly_one(dtype):
    layer = mhla_gen.MHLA(2, 8, 16, MHLAConfig(layout=(2, 2))).to(dtype)
    gate = nn.functional.silu(layer.gate(torch.randn(5, 16, dtype=dtype)))
    assert torch.equal(gate, torch.ones_like(gate))


def test_what_a_family_cannot_take_is_refused():
    with pytest.raises(ValueError, match="multiply to the number of tokens, 90"):
        run(mhla_gen.inject(tiny_ltx2()), ltx2_inputs() | {"height": None})
    skyreels = mhla_gen.inject(tiny_skyreels_v2(num_frame_per_block=2))
    with pytest.raises(ValueError, match="neither an attention mask"):
        run(skyreels, skyreels_v2_inputs(frames=4))
    model = mhla_gen.inject(tiny_ltx(), MHLAConfig(layout=(1, 2, 2)))
    inputs = ltx_inputs()
    coordinates = torch.rand(1, 3, 90)
    assert run(model, inputs | {"video_coords": coordinates}).isfinite().all()
    with pytest.raises(ValueError, match="multiply to the number of tokens, 90"):
        run(model, inputs | {"video_coords": coordinates, "num_frames": None})
    model = mhla_gen.inject(tiny_kandinsky5(), MHLAConfig(layout=(1, 2, 2)))
    with pytest.raises(ValueError, match="image_rotary_emb"):
        hunyuan_dit = mhla_gen.inject(tiny_hunyuan_dit())
        run(hunyuan_dit, hunyuan_dit_inputs() | {"image_rotary_emb": None})
    with pytest.raises(ValueError, match="attention_type='regular'"):
        run(model, kandinsky5_inputs() | {"sparse_params": {"to_fractal": True}})


def test_a_grid_smaller_than_the_layout_uses_evenly_spaced_blocks():
    layer = mhla_gen.MHLA(2, 8, 16, MHLAConfig(layout=(3, 2, 2), conv=False, gate=False))
    nn.init.uniform_(layer.mixing)
    hidden_states = torch.randn(1, 24, 16)
    for frames, kept in ((1, [1]), (2, [0, 2])):
        grid = (frames, 3, 4)
        query, key, value = torch.randn(3, 1, 12 * frames, 2, 8)
        out = layer(query, key, value, hidden_states[:, : 12 * frames], grid)
        blocks = torch.tensor([4 * k + b for k in kept for b in range(4)])
        expected = mhla_gen.ops.mhla(
            query, key, value, layer.mixing[blocks][:, blocks], grid=grid, layout=(frames, 2, 2)
        )
        torch.testing.assert_close(out, expected.flatten(2))


def test_one_set_of_weights_for_images_and_clips():
    model = mhla_gen.inject(tiny_wan(), MHLAConfig(layout=(3, 2, 3)))
    for frames in (1, 2, 5):
        inputs = wan_inputs(frames, 4, 8)
        assert run(model, inputs).shape == inputs["hidden_states"].shape


def test_wan_two_dimensional_timesteps():
    model = mhla_gen.inject(tiny_wan(), MHLAConfig(layout=(1, 2, 3)))
    inputs = wan_inputs()  # 3 × 5 × 6 tokens
    expected = run(model, inputs)
    inputs["timestep"] = inputs["timestep"][:, None].expand(1, 90)
    torch.testing.assert_close(run(model, inputs), expected)


@pytest.mark.parametrize(("layers", "exact"), [("all", True), ("2/3", False)])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", FAMILIES)
def test_two_resolutions_alive_before_one_backward(name, checkpointing, layers, exact):
    make, _, _, layout = FAMILIES[name]
    options = tiles(layout) if exact else {}
    model = mhla_gen.inject(make(), MHLAConfig(layout=layout, layers=layers, **options))
    reference = copy.deepcopy(model)
    if checkpointing and name == "hunyuan_dit":
        pytest.skip("diffusers has no gradient checkpointing for HunyuanDiT")
    if checkpointing:
        model.enable_gradient_checkpointing()
    batches = two_inputs(name)
    sum(output(model, batch).square().mean() for batch in batches).backward()
    for batch in batches:
        output(reference, batch).square().mean().backward()
    for (path, a), b in zip(model.named_parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, msg=lambda text, path=path: f"{path}: {text}")
        assert ".mhla." not in path or torch.isfinite(a.grad).all()


def test_whole_model_compiles_without_graph_breaks(compiled_family):
    make, make_inputs, _, layout = compiled_family
    # A layer that stays softmax, and one that does not.
    sizes = {"num_layers": 2} if make in (tiny_dit, tiny_wan) else {}
    model, inputs = make(**sizes), make_inputs()
    if make in (tiny_hunyuan_video15, tiny_mochi):
        pytest.skip("diffusers sorts out padded text by its values")
    if make in (tiny_flux, tiny_flux2):
        inputs["joint_attention_kwargs"] = {"grid": (4, 6)}
    mhla_gen.inject(model, MHLAConfig(layout=layout, layers="2/3", **EXACT))
    expected = run(model, inputs)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(run(compiled, inputs), expected)


def test_regional_compilation(compiled_family):
    make, make_inputs, _, layout = compiled_family
    model, inputs = make(), make_inputs()
    mhla_gen.inject(model, MHLAConfig(layout=layout))
    expected = run(model, inputs)
    torch._dynamo.reset()
    model.compile_repeated_blocks(fullgraph=True, backend="eager")
    torch.testing.assert_close(run(model, inputs), expected)


# Blocks of one class that differ: the second half of HunyuanDiT's also take what one of the first
# half made, and what joins text and image hands each next block its tokens as parts of one tensor.
KINDS_OF_BLOCKS = {
    tiny_cogvideox: 2,
    tiny_flux: 3,
    tiny_hunyuan_dit: 2,
    tiny_hunyuan_video: 5,
    tiny_mochi: 2,
    tiny_sd3: 3,
    tiny_z_image: 3,
}


def test_blocks_are_compiled_once_for_all_of_them(compiled_family, monkeypatch):
    make, make_inputs, _, layout = compiled_family
    model, inputs = mhla_gen.inject(make(), MHLAConfig(layout=layout)), make_inputs()
    expected = run(model, inputs)
    torch._dynamo.reset()
    counter = CountsForms()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=counter))
    compile_blocks(model)
    torch.testing.assert_close(run(model, inputs), expected)
    assert counter.frame_count == KINDS_OF_BLOCKS.get(make, len(repeated_blocks(model)))


@pytest.mark.parametrize("name", COMPILED)
def test_compiled_blocks_take_another_size(name, monkeypatch):
    make, _, _, layout = FAMILIES[name]
    model = mhla_gen.inject(make(), MHLAConfig(layout=layout, **EXACT))
    batches = two_inputs(name)
    expected = [run(model, batch) for batch in batches]
    torch._dynamo.reset()
    compiler = functools.partial(torch.compile, backend="eager")
    monkeypatch.setattr(torch, "compile", compiler)
    compile_blocks(model)
    for batch, result in zip(batches, expected, strict=True):
        torch.testing.assert_close(run(model, batch), result)


def test_deepcopy_is_independent(family):
    make, make_inputs, _, layout = family
    model, inputs = mhla_gen.inject(make(), MHLAConfig(layout=layout)), make_inputs()
    twin = copy.deepcopy(model)
    before = run(model, inputs)
    assert torch.equal(run(disturb(twin), inputs), before) is False
    assert torch.equal(run(model, inputs), before)
    mhla_gen.restore(twin)
    assert torch.equal(run(model, inputs), before)


def test_summary_counts_what_was_added(family):
    make, _, mhla_class, layout = family
    base = make()
    model = mhla_class.from_base(base, MHLAConfig(layout=layout, layers="2/3"))
    rows = mhla_gen.summary(model)
    stock = mhla_class.family.stock_kind
    assert [row.kind for row in rows][:3] == [stock, "mhla", "mhla"]
    assert [row.layout for row in rows][:3] == [None, layout, layout]
    added = sum(row.added_parameters for row in rows)
    assert added == model.num_parameters() - base.num_parameters() > 0
    assert f"{added:,}" in str(rows) and rows[1].name in str(rows)
    assert {row.kind for row in mhla_gen.summary(base)} == {stock}
    one = mhla_class.from_base(base, MHLAConfig(layout=(1,) * len(layout)))
    assert {row.kind for row in mhla_gen.summary(one)} == {"linear"}


def test_attention_backend_survives_conversion_and_back():
    model = tiny_wan()
    model.set_attention_backend("native")
    mhla_gen.inject(model, MHLAConfig(layout=(1, 2, 3), layers="2/3"))
    backends = {str(b.attn1.processor._attention_backend) for b in model.blocks}
    mhla_gen.restore(model)
    assert backends == {str(b.attn1.processor._attention_backend) for b in model.blocks}
    assert "native" in next(iter(backends)).lower()


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"layout": (2, 2, 2)}, "2-D token grid"),
        ({"layers": [0, 3]}, "names layer 3"),
        ({"feature_map": "exp"}, "feature_map must be one of"),
        ({"implementation": "quick"}, "implementation must be one of"),
        ({"layers": "1/4"}, "chooses none of 3 layers"),
        ({"layout": (5, 1)}, "more blocks than"),
    ],
)
def test_a_refused_conversion_changes_nothing(config, message):
    model, inputs = tiny_dit(), dit_inputs()
    before, keys = run(model, inputs), list(model.state_dict())
    with pytest.raises(ValueError, match=message):
        mhla_gen.inject(model, MHLAConfig(**config))
    assert type(model) is DiTTransformer2DModel and list(model.state_dict()) == keys
    assert torch.equal(run(model, inputs), before)


def test_refusals_name_the_remedy():
    model = mhla_gen.inject(tiny_dit())
    with pytest.raises(ValueError, match="restore"):
        mhla_gen.inject(model)
    with pytest.raises(ValueError, match="found a Linear"):
        mhla_gen.inject(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="takes MHLAConfig or LinformerConfig, found dict"):
        mhla_gen.inject(tiny_dit(), {"exact": 0.1})
    with pytest.raises(ValueError, match=r"before torch\.compile"):
        mhla_gen.inject(torch.compile(tiny_dit()))
    pipeline = tiny_dit_pipeline()
    pipeline.transformer = torch.compile(pipeline.transformer)
    with pytest.raises(ValueError, match="the transformer is compiled; convert it"):
        mhla_gen.inject(pipeline)
    with pytest.raises(NotImplementedError, match=r"DiTTransformer2DModel.*restore"):
        model.enable_parallelism(config=ContextParallelConfig(ring_degree=2))
    with pytest.raises(NotImplementedError, match="tensor parallelism"):
        mhla_gen.inject(tiny_wan()).enable_parallelism(config=TensorParallelConfig(tp_degree=2))
    with pytest.raises(ValueError, match="need their own processors"):
        model.set_attn_processor(AttnProcessor2_0())
    custom = tiny_wan()
    custom.blocks[0].attn1.processor = lambda *args: None
    with pytest.raises(ValueError, match="WanAttnProcessor first"):
        mhla_gen.inject(custom)


def test_loading_refuses_missing_or_foreign_weights(family, tmp_path):
    make, _, mhla_class, layout = family
    make().save_pretrained(tmp_path / "softmax")
    with pytest.raises(ValueError, match="from_base"):
        mhla_class.from_pretrained(tmp_path / "softmax")
    with pytest.raises(ValueError, match="missing MHLA weights"):
        mhla_class.from_pretrained(tmp_path / "softmax", mhla={"layout": list(layout)})
    model = mhla_gen.inject(make(), MHLAConfig(layout=layout))
    model.save_pretrained(tmp_path / "mhla")
    file = tmp_path / "mhla" / "config.json"
    saved = json.loads(file.read_text())
    saved["mhla"]["conv"] = False
    file.write_text(json.dumps(saved))
    with pytest.raises(ValueError, match="unexpected MHLA weights"):
        mhla_class.from_pretrained(tmp_path / "mhla")


def test_a_model_of_another_class_is_named_with_what_loads_it(tmp_path):
    dit, wan = mhla_gen.MHLADiTTransformer2DModel, mhla_gen.MHLAWanTransformer3DModel
    tiny_wan().save_pretrained(tmp_path / "softmax")
    mhla_gen.inject(tiny_wan(), MHLAConfig(layout=(1, 2, 3))).save_pretrained(tmp_path / "mhla")
    llama = {"architectures": ["MHLALlamaForCausalLM"], "mhla": {}}
    (tmp_path / "llama").mkdir()
    (tmp_path / "llama" / "config.json").write_text(json.dumps(llama))
    remedies = {
        "softmax": "WanTransf.*, not MHLADiT.*convert it with mhla_gen.MHLAWan.*from_base",
        "mhla": "MHLAWan.*, not MHLADiT.*load it with mhla_gen.MHLAWan.*from_pretrained",
        "llama": "MHLALlama.*, not MHLADiT.*load it with mhla_gen.MHLALlama.*from_pretrained",
    }
    for name, said in remedies.items():
        for load in (dit.from_pretrained, dit.from_base):
            with pytest.raises(UserError, match=said):
                load(tmp_path / name)
    assert type(wan.from_pretrained(tmp_path / "mhla")) is wan

    class Derived(wan):
        """A user's own class."""

    model = wan.from_pretrained(tmp_path / "mhla")
    model.__class__ = Derived
    model.save_pretrained(tmp_path / "derived")
    for folder in ("mhla", "derived"):
        for kind in (wan, Derived):
            assert type(kind.from_pretrained(tmp_path / folder)) is kind


def test_models_of_earlier_versions_load_or_say_what_is_gone(tmp_path):
    model = mhla_gen.inject(tiny_dit(), MHLAConfig(layout=(2, 2)))
    model.save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    saved = json.loads(file.read_text())
    saved["mhla"]["content_mixing"] = True
    file.write_text(json.dumps(saved))
    with pytest.raises(ValueError, match="train again"):
        mhla_gen.MHLADiTTransformer2DModel.from_pretrained(tmp_path)
    saved["mhla"] |= {"content_mixing": False, "combine": "denominator"}
    file.write_text(json.dumps(saved))
    with pytest.raises(ValueError, match="combine=denominator is no longer supported"):
        mhla_gen.MHLADiTTransformer2DModel.from_pretrained(tmp_path)
    saved["mhla"]["combine"] = "gate"
    file.write_text(json.dumps(saved))
    loaded = mhla_gen.MHLADiTTransformer2DModel.from_pretrained(tmp_path)
    assert loaded.mhla_config == model.mhla_config
    assert not {"content_mixing", "combine"} & set(loaded.config.mhla)


def test_loading_in_bfloat16_keeps_mixing_in_float32(family, tmp_path):
    make, make_inputs, mhla_class, layout = family
    mhla_gen.inject(make(), MHLAConfig(layout=layout)).save_pretrained(tmp_path)
    model = mhla_class.from_pretrained(tmp_path, torch_dtype=torch.bfloat16)
    dtypes = {n: p.dtype for n, p in model.named_parameters() if ".mhla." in n}
    assert {d for n, d in dtypes.items() if n.endswith("mixing")} == {torch.float32}
    assert {d for n, d in dtypes.items() if not n.endswith("mixing")} == {torch.bfloat16}
    assert run(model, cast(make_inputs(), torch.bfloat16)).dtype == torch.bfloat16


def test_low_cpu_mem_usage_can_be_off_where_it_can_for_the_base(family, tmp_path):
    make, _, mhla_class, layout = family
    config = MHLAConfig(layout=layout, mixing_init="uniform", mixing_per_head=True)
    disturb(mhla_gen.inject(make(), config)).save_pretrained(tmp_path)
    load = functools.partial(mhla_class.from_pretrained, tmp_path, torch_dtype=torch.bfloat16)
    if mhla_class.family.base_class._keep_in_fp32_modules is not None:
        with pytest.raises(ValueError, match="leave the argument out"):
            load(low_cpu_mem_usage=False)
        return
    loaded, expected = load(low_cpu_mem_usage=False), load()
    assert type(loaded) is mhla_class and loaded.config == expected.config
    weights, same = dict(loaded.named_parameters()), dict(expected.named_parameters())
    torch.testing.assert_close(weights, same, rtol=0, atol=0)


@pytest.mark.skipif(
    not diffusers.__version__.startswith("0.42."), reason="docs/models.md describes diffusers 0.42"
)
def test_the_page_of_models_is_complete():
    package = importlib.import_module("diffusers.models.transformers")
    modules = [
        importlib.import_module(found.name)
        for found in pkgutil.iter_modules(package.__path__, f"{package.__name__}.")
    ]
    defined = {
        name: value
        for module in modules
        for name, value in vars(module).items()
        if inspect.isclass(value) and value.__module__ == module.__name__
    }
    models = {name for name, value in defined.items() if issubclass(value, ModelMixin)}
    page = (Path(__file__).parents[1] / "docs" / "models.md").read_text()
    rows = re.findall(r"^\| `(\w+)` \|", page, re.MULTILINE)
    assert len(rows) == len(set(rows))
    assert models <= set(rows) <= defined.keys()
    converted = re.findall(r"^\| `(\w+)` \| `(\w+)` \|", page, re.MULTILINE)
    # What `inject` says of the others is what the page says.
    assert set(rows) - {base for base, _ in converted} == REASONS.keys()
    for name, said in re.findall(r"^\| `(\w+)` \| ([^`].*) \|$", page, re.MULTILINE):
        assert REASONS[name].endswith(said.replace("`", ""))
    assert set(converted) == {
        (mhla_class.family.base_class.__name__, mhla_class.__name__)
        for _, _, mhla_class, _ in FAMILIES.values()
    }
    assert {c.family for c in MHLA_CLASSES.values()} == {
        c.family for _, _, c, _ in FAMILIES.values()
    }


def test_inject_says_why_a_model_does_not_fit():
    def named(name):
        return type(name, (torch.nn.Module,), {})()

    for name, said in (
        ("StableAudio3DiTModel", "does not fit: differential attention"),
        ("ChronoEditTransformer3DModel", "fits, but no adapter is written: as Wan"),
        ("Flux3Transformer2DModel", "fits in part only"),
        ("UNet2DConditionModel", "does not fit: a UNet"),
        ("Linear", "expected a pipeline or one of"),
    ):
        for tried in (mhla_gen.inject, mhla_gen.summary):
            with pytest.raises(ValueError, match=said):
                tried(named(name))
    unet = diffusers.UNet2DModel(
        sample_size=8,
        block_out_channels=(8,),
        norm_num_groups=4,
        layers_per_block=1,
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
    )
    pipe = diffusers.DDPMPipeline(unet, diffusers.DDPMScheduler())
    with pytest.raises(ValueError, match=r"DDPMPipeline has no model .*UNet2DModel does not fit"):
        mhla_gen.inject(pipe)


def test_peft_beside_mhla_is_counted_once_and_never_restored_away():
    peft = pytest.importorskip("peft")
    base = tiny_wan()
    expected = {key: value.clone() for key, value in base.state_dict().items()}
    model = mhla_gen.inject(base, MHLAConfig(layout=(1, 2, 2)))
    alone = [row.added_parameters for row in mhla_gen.summary(model)]
    saved = peft.LoraConfig(r=2, target_modules=["to_q"], modules_to_save=["mhla"])
    copied = copy.deepcopy(model)
    copied.add_adapter(saved)
    assert [row.added_parameters for row in mhla_gen.summary(copied)] == alone
    with pytest.raises(ValueError, match=r"peft \(default\) changed MHLA's own layers"):
        mhla_gen.restore(copied)
    low_rank = copy.deepcopy(model)
    low_rank.add_adapter(peft.LoraConfig(r=2, target_modules=["mhla.gate", "to_v"]))
    assert [row.added_parameters for row in mhla_gen.summary(low_rank)] == alone
    before = low_rank.state_dict().keys()
    with pytest.raises(ValueError, match=r"unload_lora\(\) of the model"):
        mhla_gen.restore(low_rank)
    assert low_rank.state_dict().keys() == before
    low_rank.unload_lora()
    # On layers that stay, adapters do too: the softmax model with them, exactly.
    model.add_adapter(peft.LoraConfig(r=2, target_modules=["to_v"], init_lora_weights=False))
    plain = tiny_wan()
    plain.load_state_dict(expected)
    plain.add_adapter(peft.LoraConfig(r=2, target_modules=["to_v"]))
    lora = {key: value for key, value in model.state_dict().items() if ".lora_" in key}
    plain.load_state_dict(lora, strict=False)
    restored = mhla_gen.restore(model)
    inputs = wan_inputs()
    with torch.no_grad():
        assert torch.equal(run(restored.eval(), inputs), run(plain.eval(), inputs))
    restored.unload_lora()
    for state in (restored.state_dict(), mhla_gen.restore(low_rank).state_dict()):
        assert state.keys() == expected.keys()
        assert all(torch.equal(value, expected[key]) for key, value in state.items())


def test_auto_model_finds_the_transformer_of_a_pipeline(tmp_path):
    pipe = mhla_gen.inject(tiny_dit_pipeline(), MHLAConfig(layout=(2, 2)))
    pipe.save_pretrained(tmp_path)
    found = diffusers.AutoModel.from_pretrained(str(tmp_path), subfolder="transformer")
    assert type(found) is MHLADiTTransformer2DModel


def test_positional_arguments_and_defaults():
    model = MHLADiTTransformer2DModel(2, 8, num_layers=1, sample_size=8, norm_num_groups=4)
    assert model.config.num_attention_heads == 2 and model.mhla_config.layout == (2, 2)
    with pytest.raises(TypeError, match="unexpected keyword argument 'num_head'"):
        MHLADiTTransformer2DModel(num_head=2)
