"""Checkpoints of other code, read and written: the functions they compute must be the same."""

import copy
import json

import pytest
import torch
from diffusers import DDIMScheduler, DiTPipeline, DiTTransformer2DModel, WanTransformer3DModel
from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers
from other_code import (
    DEPTH,
    HEADS,
    HIDDEN,
    authors_wan_attention,
    dit_state,
    eq4_attention,
    mhla_dit_state,
    other_dit,
    wan_state,
    weights,
)
from safetensors.torch import save_file
from tiny import dit_inputs, tiny_dit, tiny_dit_pipeline, wan_inputs

import mhla_gen
from mhla_gen import (
    MHLAConfig,
    MHLADiTTransformer2DModel,
    MHLAWanTransformer3DModel,
    OriginalDiTTransformer2DModel,
    files,
)
from mhla_gen.cli import main
from mhla_gen.config import ConvertConfig
from mhla_gen.conversion import convert, mhla_dit, mhla_wan, original_dit, read_checkpoint
from mhla_gen.conversion.conversion import build


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


def cli(*arguments):
    return main(["convert", *map(str, arguments)])


def import_dit(state, folder, **changes):
    file = folder / "model.safetensors"
    save_file({key: tensor.contiguous() for key, tensor in state.items()}, file)
    options = {"num_attention_heads": HEADS, "output_dir": str(folder / "out")} | changes
    convert(ConvertConfig(source=str(file), **options))
    return folder / "out"


def test_an_imported_dit_computes_what_the_original_does(tmp_path):
    state = dit_state()
    folder = import_dit(state, tmp_path)
    model = OriginalDiTTransformer2DModel.from_pretrained(folder)
    inputs = dit_inputs() | {"timestep": torch.tensor([7, 950])}
    expected = other_dit(state, **inputs)
    # Layers of numbers up to 28: float32 may leave 28 * 6e-8 for each of some additions, half
    # precision would leave 28 * 5e-4.
    torch.testing.assert_close(run(model, inputs), expected, rtol=5e-4, atol=5e-4)
    stock = DiTTransformer2DModel.from_pretrained(folder)
    assert (run(stock, inputs) - expected).abs().max() > 0.1
    assert json.loads((folder / "conversion.json").read_text())["exact"] is True


def test_an_imported_dit_is_the_original_in_float64():
    state = dit_state()
    for key in state:
        # Small tokens, so that the norms' eps counts.
        if "x_embedder" in key or "attn.proj" in key:
            state[key] *= 0.1
    model = build(original_dit.read(state, HEADS)).double()
    # At timestep 0 the angles are exact; elsewhere both round them to float32, each its own way.
    inputs = dit_inputs() | {"timestep": torch.zeros(2, dtype=torch.float64)}
    inputs["hidden_states"] = inputs["hidden_states"].double()
    expected = other_dit({key: tensor.double() for key, tensor in state.items()}, **inputs)
    torch.testing.assert_close(run(model, inputs), expected, rtol=1e-9, atol=1e-9)


def test_a_dit_survives_the_way_there_and_back(tmp_path, capsys):
    state = dit_state()
    folder = import_dit(state, tmp_path)
    assert cli(f"source={folder}", f"output_dir={tmp_path / 'back'}", "direction=export") == 0
    assert "equal bit for bit" in capsys.readouterr().out
    back = torch.load(tmp_path / "back" / "model.pt", weights_only=True)
    assert back.keys() == state.keys()
    assert all(torch.equal(back[key], state[key]) for key in state if key != "pos_embed")
    torch.testing.assert_close(back["pos_embed"], state["pos_embed"], rtol=0, atol=1e-6)


def test_an_imported_mhla_dit_computes_eq_4(tmp_path):
    state = mhla_dit_state()
    folder = import_dit(state, tmp_path, format="mhla_dit", normalizer="paper")
    model = MHLADiTTransformer2DModel.from_pretrained(folder)
    assert model.mhla_config.layout == (2, 2)
    inputs = dit_inputs()
    expected = other_dit(state, **inputs, attention=eq4_attention)
    torch.testing.assert_close(run(model, inputs), expected, rtol=1e-4, atol=1e-4)
    back = mhla_dit.write(model.state_dict(), model.config, normalizer="paper")
    assert back.keys() == state.keys()
    assert all(torch.equal(back[key], state[key]) for key in state if key != "pos_embed")


def test_what_differs_in_the_authors_dit_is_named_and_must_be_allowed(tmp_path, capsys):
    state = mhla_dit_state()
    for i in range(DEPTH):
        state |= weights({f"blocks.{i}.attn.norm.{leaf}": (HIDDEN,) for leaf in ("weight", "bias")})
    with pytest.raises(ValueError, match=r"once more.*Eq\. 4.*allow_differences"):
        import_dit(state, tmp_path, format="mhla_dit")
    assert not (tmp_path / "out").exists()
    folder = import_dit(state, tmp_path, format="mhla_dit", allow_differences=True)
    assert capsys.readouterr().out.count("NOT the same function") == 2
    report = json.loads((folder / "conversion.json").read_text())
    assert report["exact"] is False and len(report["differences"]) == 2

    # The normalisation is left out, its scale and shift are not.
    def folded(state, name, x):
        x = x * state[f"{name}.norm.weight"] + state[f"{name}.norm.bias"]
        return eq4_attention(state, name, x)

    model, inputs = MHLADiTTransformer2DModel.from_pretrained(folder), dit_inputs()
    expected = other_dit(state, **inputs, attention=folded)
    torch.testing.assert_close(run(model, inputs), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("extras", [(), ("g",), ("lepe",)])
def test_an_imported_wan_layer_computes_what_the_authors_do(extras, tmp_path):
    state, layout, grid = wan_state(extras), (2, 2, 3), (4, 6, 6)
    torch.save({"state_dict": state}, tmp_path / "wan.pth")
    out = tmp_path / "out"
    arguments = [f"source={tmp_path / 'wan.pth'}", "format=mhla_wan", f"output_dir={out}"]
    assert cli(*arguments, "layout=[2,2,3]") == 0
    model = MHLAWanTransformer3DModel.from_pretrained(out)
    assert [row.kind for row in mhla_gen.summary(model)] == ["softmax", "mhla", "mhla"]
    seen = {}
    for i in (1, 2):
        model.blocks[i].attn1.register_forward_hook(
            lambda _, args, out, i=i: seen.update({i: (args[0], out)})
        )
    run(model, wan_inputs(grid[0], 2 * grid[1], 2 * grid[2]))
    for i, (hidden_states, found) in seen.items():
        name = f"blocks.{i}.self_attn"
        expected = authors_wan_attention(state, name, hidden_states, grid, layout)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    back = mhla_wan.write(model.state_dict(), model.config)
    assert back.keys() == state.keys() and all(torch.equal(back[k], state[k]) for k in state)


def test_the_rest_of_wan_is_what_diffusers_makes_of_it():
    state = wan_state()
    converted = mhla_wan.read(state, (2, 2, 3))
    stock = convert_wan_transformer_to_diffusers(wan_state(layers=()))
    assert converted.state.keys() - stock.keys() == {
        f"blocks.{i}.attn1.mhla.{name}" for i in (1, 2) for name in ("mixing", "norm.weight")
    }
    assert stock.keys() <= converted.state.keys()
    arguments = {k: v for k, v in converted.arguments.items() if k != "mhla"}
    WanTransformer3DModel(**arguments).load_state_dict(stock)
    renamed = convert_wan_transformer_to_diffusers(
        {k: v for k, v in state.items() if not any(w in k for w in ("g_norm", "block_attn"))}
    )
    assert all(torch.equal(converted.state[key], renamed[key]) for key in renamed)


def test_an_exported_wan_imports_as_the_same_model(tmp_path, capsys):
    arguments = mhla_wan.read(wan_state(), (2, 2, 3)).arguments
    config = MHLAConfig(layout=(2, 2, 3), normalize=False, output_norm=True, conv=False)
    model = MHLAWanTransformer3DModel(**arguments | {"mhla": config}).eval()
    model.save_pretrained(tmp_path / "model")
    command = [f"source={tmp_path / 'model'}", "format=mhla_wan", "direction=export"]
    assert cli(*command, f"output_dir={tmp_path / 'out'}") == 0
    found = mhla_wan.read(read_checkpoint(tmp_path / "out" / "model.pt"), (2, 2, 3))
    assert all(torch.equal(found.state[k], v) for k, v in model.state_dict().items())
    mhla_gen.inject(
        mhla_gen.restore(model), MHLAConfig(layout=(2, 2, 3), normalize=False, output_norm=True)
    ).save_pretrained(tmp_path / "both")
    command[0] = f"source={tmp_path / 'both'}"
    assert cli(*command, f"output_dir={tmp_path / 'none'}") == 2
    assert "a gate and a convolution" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()


def test_half_precision_checkpoints_stay_half_precision(tmp_path):
    state = {key: tensor.bfloat16() for key, tensor in dit_state().items()}
    folder = import_dit(state, tmp_path)
    model = OriginalDiTTransformer2DModel.from_pretrained(folder, torch_dtype=torch.bfloat16)
    assert torch.equal(model.proj_out_2.weight, state["final_layer.linear.weight"])
    stored = read_checkpoint(folder)
    assert {tensor.dtype for tensor in stored.values()} == {torch.bfloat16}


def test_a_damaged_conversion_is_not_taken_for_a_finished_one(tmp_path, capsys):
    torch.save(dit_state(), tmp_path / "dit.pt")
    folder = tmp_path / "out"
    command = ["convert", f"source={tmp_path}/dit.pt", f"num_attention_heads={HEADS}"]
    command.append(f"output_dir={folder}")
    assert main(command) == 0 and main(command) == 0
    assert "already contains this conversion" in capsys.readouterr().out
    for path in [p for p in folder.iterdir() if p.name != "config.yaml"]:
        whole = path.read_bytes()
        for damaged in (whole[: len(whole) // 2], b"", None):
            path.unlink()
            if damaged is not None:
                path.write_bytes(damaged)
            assert main(command) == 2
            assert f"{path} is damaged" in capsys.readouterr().err
            path.write_bytes(whole)
    # What a killed one left is removed.
    left = tmp_path / files.partial_of(folder).name
    left.mkdir()
    assert main([*command[:-1], f"output_dir={tmp_path}/other"]) == 0
    assert not left.exists()
