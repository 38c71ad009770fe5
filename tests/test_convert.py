"""Checkpoints of other code, read and written: the functions they compute must be the same.

The other code is not at hand; its forward passes are written out here, from the papers and the
names of its weights.
"""

import argparse
import copy
import json
import math
import pickle

import pytest
import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler, DiTPipeline, DiTTransformer2DModel, WanTransformer3DModel
from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers
from safetensors.torch import save_file
from tiny import dit_inputs, tiny_dit, tiny_dit_pipeline, wan_inputs

import mhla_gen
from mhla_gen import (
    MHLAConfig,
    MHLADiTTransformer2DModel,
    MHLAWanTransformer3DModel,
    OriginalDiTTransformer2DModel,
)
from mhla_gen.cli import main
from mhla_gen.config import ConvertConfig
from mhla_gen.conversion import convert, mhla_dit, mhla_wan, original_dit, read_checkpoint
from mhla_gen.conversion.run import build

HIDDEN, HEADS, DEPTH, PATCH, SIDE = 32, 2, 3, 2, 4


def weights(shapes):
    return {key: 0.3 * torch.randn(shape) for key, shape in shapes.items()}


def linear(name, outputs, inputs):
    return {f"{name}.weight": (outputs, inputs), f"{name}.bias": (outputs,)}


def sine_cosine_table():
    """Column in the first half of the channels, row in the second; sines, then cosines."""
    frequencies = 10000.0 ** (-torch.arange(HIDDEN // 4, dtype=torch.float64) / (HIDDEN // 4))
    angles = torch.arange(SIDE, dtype=torch.float64)[:, None] * frequencies
    place = torch.cat([angles.sin(), angles.cos()], dim=1)
    columns, rows = place.repeat(SIDE, 1), place.repeat_interleave(SIDE, 0)
    return torch.cat([columns, rows], dim=1)[None].float()


def dit_state(attention=("qkv", "proj")):
    """A checkpoint with the names and shapes of facebookresearch/DiT."""
    shapes = {
        "x_embedder.proj.weight": (HIDDEN, 4, PATCH, PATCH),
        "x_embedder.proj.bias": (HIDDEN,),
        "y_embedder.embedding_table.weight": (11, HIDDEN),
        **linear("t_embedder.mlp.0", HIDDEN, 256),
        **linear("t_embedder.mlp.2", HIDDEN, HIDDEN),
        **linear("final_layer.linear", 8 * PATCH**2, HIDDEN),
        **linear("final_layer.adaLN_modulation.1", 2 * HIDDEN, HIDDEN),
    }
    for i in range(DEPTH):
        shapes |= linear(f"blocks.{i}.attn.{attention[0]}", 3 * HIDDEN, HIDDEN)
        shapes |= linear(f"blocks.{i}.attn.{attention[1]}", HIDDEN, HIDDEN)
        shapes |= linear(f"blocks.{i}.mlp.fc1", 4 * HIDDEN, HIDDEN)
        shapes |= linear(f"blocks.{i}.mlp.fc2", HIDDEN, 4 * HIDDEN)
        shapes |= linear(f"blocks.{i}.adaLN_modulation.1", 6 * HIDDEN, HIDDEN)
    return weights(shapes) | {"pos_embed": sine_cosine_table()}


def mhla_dit_state():
    state = dit_state(("to_qkv", "to_out.0"))
    for i in range(DEPTH):
        state[f"blocks.{i}.attn.piece_attn.conv.weight"] = torch.rand(4, 4, 1, 1)
        state |= weights({f"blocks.{i}.attn.lepe.weight": (HIDDEN, 1, 3, 3)})
        state |= weights({f"blocks.{i}.attn.lepe.bias": (HIDDEN,)})
    return state


def apply(state, name, x):
    return F.linear(x, state[f"{name}.weight"], state[f"{name}.bias"])


def softmax_attention(state, name, x):
    query, key, value = (
        part.unflatten(2, (HEADS, -1)).transpose(1, 2)
        for part in apply(state, f"{name}.qkv", x).chunk(3, dim=2)
    )
    scores = query @ key.transpose(2, 3) / math.sqrt(HIDDEN // HEADS)
    out = (scores.softmax(-1) @ value).transpose(1, 2).flatten(2)
    return apply(state, f"{name}.proj", out)


def blocks_of(grid, layout):
    """Block number of every token of a grid that its layout divides."""
    axes = [torch.arange(n) * blocks // n for n, blocks in zip(grid, layout, strict=True)]
    number = torch.zeros((), dtype=torch.int64)
    for axis, blocks in zip(axes, layout, strict=True):
        number = number.unsqueeze(-1) * blocks + axis
    return number.flatten()


def eq4_attention(state, name, x):
    """Eq. 4 of the paper as one matrix of weights between tokens, plus the convolution of V."""
    query, key, value = apply(state, f"{name}.to_qkv", x).chunk(3, dim=2)
    q, k, v = (part.unflatten(2, (HEADS, -1)).transpose(1, 2) for part in (query, key, value))
    block = blocks_of((SIDE, SIDE), (2, 2))
    mixing = state[f"{name}.piece_attn.conv.weight"][:, :, 0, 0][block][:, block]
    pairs = ((q.relu() + 1e-6) @ (k.relu() + 1e-6).transpose(2, 3)) * mixing
    out = (pairs @ v / (pairs.sum(-1, keepdim=True) + 1e-6)).transpose(1, 2).flatten(2)
    image = value.transpose(1, 2).unflatten(2, (SIDE, SIDE))
    lepe = F.conv2d(
        image, state[f"{name}.lepe.weight"], state[f"{name}.lepe.bias"], padding=1, groups=HIDDEN
    )
    return apply(state, f"{name}.to_out.0", out + lepe.flatten(2).transpose(1, 2))


def other_dit(state, hidden_states, timestep, class_labels, attention=softmax_attention):
    """DiT as published: adaLN-zero blocks, one embedder for all of them."""
    patches = state["x_embedder.proj.weight"], state["x_embedder.proj.bias"]
    tokens = F.conv2d(hidden_states, *patches, stride=PATCH).flatten(2).transpose(1, 2)
    tokens = tokens + state["pos_embed"]
    angles = timestep[:, None] * torch.exp(-math.log(10000) * torch.arange(128) / 128)
    time = torch.cat([angles.cos(), angles.sin()], dim=1)
    time = apply(state, "t_embedder.mlp.2", F.silu(apply(state, "t_embedder.mlp.0", time)))
    condition = F.silu(time + state["y_embedder.embedding_table.weight"][class_labels])

    def modulated(x, shift, scale):
        return F.layer_norm(x, (HIDDEN,), eps=1e-6) * (1 + scale[:, None]) + shift[:, None]

    for i in range(DEPTH):
        name = f"blocks.{i}"
        parts = apply(state, f"{name}.adaLN_modulation.1", condition).chunk(6, dim=1)
        inner = attention(state, f"{name}.attn", modulated(tokens, *parts[:2]))
        tokens = tokens + parts[2][:, None] * inner
        inner = apply(state, f"{name}.mlp.fc1", modulated(tokens, *parts[3:5]))
        inner = apply(state, f"{name}.mlp.fc2", F.gelu(inner, approximate="tanh"))
        tokens = tokens + parts[5][:, None] * inner
    shift, scale = apply(state, "final_layer.adaLN_modulation.1", condition).chunk(2, dim=1)
    out = apply(state, "final_layer.linear", modulated(tokens, shift, scale))
    out = out.unflatten(2, (PATCH, PATCH, 8)).unflatten(1, (SIDE, SIDE))
    return out.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)


def wan_state(extras=(), layers=(1, 2), num_blocks=12):
    """A checkpoint with the names of Wan and, in some layers, of the authors' MHLA."""
    width = 24
    shapes = {
        "patch_embedding.weight": (width, 16, 1, 2, 2),
        "patch_embedding.bias": (width,),
        **linear("text_embedding.0", width, 16),
        **linear("text_embedding.2", width, width),
        **linear("time_embedding.0", width, 16),
        **linear("time_embedding.2", width, width),
        **linear("time_projection.1", 6 * width, width),
        **linear("head.head", 64, width),
        "head.modulation": (1, 2, width),
    }
    for i in range(DEPTH):
        for layer in ("self_attn", "cross_attn"):
            for name in "qkvo":
                shapes |= linear(f"blocks.{i}.{layer}.{name}", width, width)
            shapes |= {f"blocks.{i}.{layer}.norm_{name}.weight": (width,) for name in "qk"}
        shapes |= {f"blocks.{i}.norm3.{leaf}": (width,) for leaf in ("weight", "bias")}
        shapes |= linear(f"blocks.{i}.ffn.0", 32, width) | linear(f"blocks.{i}.ffn.2", width, 32)
        shapes[f"blocks.{i}.modulation"] = (1, 6, width)
    for i in layers:
        name = f"blocks.{i}.self_attn"
        shapes |= {f"{name}.g_norm.weight": (12,)}
        if "g" in extras:
            shapes |= linear(f"{name}.g", width, width)
        if "lepe" in extras:
            shapes |= {f"{name}.lepe.weight": (width, 1, 3, 3, 3), f"{name}.lepe.bias": (width,)}
    mixing = {
        f"blocks.{i}.self_attn.block_attn.conv.weight": torch.randn(num_blocks, num_blocks, 1, 1)
        for i in layers
    }
    return weights(shapes) | mixing


def authors_wan_attention(state, name, x, grid, layout):
    """No denominator, rotation behind the feature map, every head normalised, then the extras."""

    def rms(x, weight):
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * weight

    def rotated(x):
        """Complex rotation; half of the channels of a head in thirds for t, h and w."""
        pairs = torch.view_as_complex(x.double().unflatten(-1, (-1, 2)).contiguous())
        third = pairs.shape[-1] // 3
        angles = []
        for axis, count in enumerate((pairs.shape[-1] - 2 * third, third, third)):
            steps = torch.arange(grid[axis], dtype=torch.float64)
            steps = steps.view([-1 if i == axis else 1 for i in range(3)]).expand(grid).flatten()
            frequencies = 10000.0 ** (-torch.arange(count, dtype=torch.float64) / count)
            angles.append(steps[:, None] * frequencies)
        angle = torch.cat(angles, dim=1)[None, :, None]
        return torch.view_as_real(pairs * torch.polar(torch.ones_like(angle), angle)).flatten(-2)

    query, key, value = (apply(state, f"{name}.{part}", x) for part in "qkv")
    q, k = (
        (rms(part, state[f"{name}.norm_{letter}.weight"]).relu() + 1e-6).unflatten(2, (-1, 12))
        for part, letter in ((query, "q"), (key, "k"))
    )
    block = blocks_of(grid, layout)
    mixing = state[f"{name}.block_attn.conv.weight"][:, :, 0, 0][block][:, block].double()
    pairs = torch.einsum("bnhd,bmhd->bhnm", rotated(q), rotated(k)) * mixing
    out = torch.einsum("bhnm,bmhd->bnhd", pairs, value.unflatten(2, (-1, 12)).double()).float()
    out = rms(out, state[f"{name}.g_norm.weight"]).flatten(2)
    if f"{name}.g.weight" in state:
        out = out * F.silu(apply(state, f"{name}.g", x))
    if f"{name}.lepe.weight" in state:
        kernel = state[f"{name}.lepe.weight"], state[f"{name}.lepe.bias"]
        clip = value.transpose(1, 2).unflatten(2, grid)
        out = out + F.conv3d(clip, *kernel, padding=1, groups=24).flatten(2).transpose(1, 2)
    return apply(state, f"{name}.o", out)


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
    torch.testing.assert_close(run(model, inputs), expected, rtol=1e-4, atol=1e-4)
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
    inputs = dit_inputs() | {"timestep": torch.zeros(2)}
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


def test_training_checkpoints_are_read_without_unpickling(tmp_path):
    ema, model = dit_state(), dit_state()
    contents = {
        "model": {f"module.{key}": tensor for key, tensor in model.items()},
        "ema": ema,
        "opt": {"state": {}, "param_groups": []},
        "args": argparse.Namespace(model="DiT-S/2"),
    }
    torch.save(contents, tmp_path / "0050000.pt")
    for entry, expected in (("auto", ema), ("ema", ema), ("model", model)):
        found = read_checkpoint(tmp_path / "0050000.pt", entry)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[key], expected[key]) for key in found)
    with pytest.raises(ValueError, match="no weights 'state_dict'; it has ema, model"):
        read_checkpoint(tmp_path / "0050000.pt", "state_dict")


class Mine:
    def __reduce__(self):
        return (open, ("executed", "w"))


@pytest.mark.parametrize("zipped", [True, False])
def test_code_in_a_checkpoint_is_not_run(zipped, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if zipped:
        torch.save({"model": Mine()}, "bad.pt")
    else:
        (tmp_path / "bad.pt").write_bytes(pickle.dumps(Mine(), protocol=2))
    with pytest.raises(ValueError, match="not unpickled"):
        read_checkpoint("bad.pt")
    assert not (tmp_path / "executed").exists()


def test_broken_and_foreign_files_are_one_clear_sentence(tmp_path):
    torch.save(dit_state(), tmp_path / "whole.pt")
    whole = (tmp_path / "whole.pt").read_bytes()
    (tmp_path / "cut.pt").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "cut.safetensors").write_bytes(whole[:100])
    (tmp_path / "empty.pt").write_bytes(b"")
    torch.save([1, 2], tmp_path / "list.pt")
    (tmp_path / "folder").mkdir()
    for name in ("cut.pt", "cut.safetensors", "empty.pt", "list.pt"):
        with pytest.raises(ValueError, match=f"{name} (holds|is not)") as caught:
            read_checkpoint(tmp_path / name)
        assert "\n" not in str(caught.value)
    with pytest.raises(FileNotFoundError, match="does not exist"):
        read_checkpoint(tmp_path / "none.pt")
    with pytest.raises(FileNotFoundError, match=r"no \.safetensors"):
        read_checkpoint(tmp_path / "folder")


def changed(state, **changes):
    return {k: v for k, v in (state | changes).items() if v is not None}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: changed(s, extra=torch.ones(1)), "no extra"),
        (lambda s: mhla_dit_state(), r"blocks\.0\.attn\.lepe\.bias"),
        (lambda s: changed(s, **{"blocks.1.mlp.fc1.bias": None}), r"lacks.*ff\.net\.0\.proj"),
        (lambda s: changed(s, **{"blocks.1.mlp.fc1.bias": torch.ones(5)}), r"\(5,\), but"),
        (lambda s: changed(s, pos_embed=torch.rand(1, 16, HIDDEN)), "sine-cosine table"),
        (lambda s: changed(s, pos_embed=None), "no weight pos_embed"),
        (lambda s: {"a": torch.ones(1)}, r"x_embedder\.proj\.weight"),
    ],
)
def test_a_checkpoint_of_something_else_is_refused(change, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        import_dit(change(dit_state()), tmp_path)
    assert not (tmp_path / "out").exists()


def test_what_weights_do_not_tell_must_be_given():
    with pytest.raises(ValueError, match="num_attention_heads, a divisor of the hidden size 32"):
        original_dit.read(dit_state())
    with pytest.raises(ValueError, match="12 blocks: give layout"):
        mhla_wan.read(wan_state())
    with pytest.raises(ValueError, match=r"150 blocks.*\(3, 5, 10\)"):
        mhla_wan.read(wan_state(num_blocks=150), (3, 5, 7))


def test_what_cannot_be_exact_is_refused(tmp_path):
    with pytest.raises(ValueError, match="a gate and a convolution"):
        mhla_wan.read(wan_state(("g", "lepe")), (2, 2, 3))
    with pytest.raises(ValueError, match="no layer has a mixing matrix"):
        mhla_wan.read(wan_state(layers=()), (2, 2, 3))
    with pytest.raises(ValueError, match="normalises queries and keys"):
        mhla_dit.read(mhla_dit_state() | {"blocks.0.attn.q_norm.weight": torch.ones(HIDDEN)})
    with pytest.raises(ValueError, match="normalizer=paper"):
        mhla_dit.write({}, {})


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: tiny_dit(), "diffusers' frequencies"),
        (lambda: tiny_original(), "norm_eps=1e-06, but the model has 1e-05"),
        (lambda: tiny_original(norm_eps=1e-6), "block 1 has another"),
        (lambda: mhla_gen.inject(tiny_dit()), "holds a MHLADiTTransformer2DModel"),
    ],
)
def test_models_that_the_original_cannot_be_are_not_exported(make, message, tmp_path):
    make().save_pretrained(tmp_path / "model")
    options = {"source": str(tmp_path / "model"), "output_dir": str(tmp_path / "out")}
    with pytest.raises(ValueError, match=message):
        convert(ConvertConfig(direction="export", **options))
    assert not (tmp_path / "out").exists()


def test_an_mhla_dit_is_exported_for_mended_code_only(tmp_path):
    folder = import_dit(mhla_dit_state(), tmp_path, format="mhla_dit", normalizer="paper")
    options = {"source": str(folder), "format": "mhla_dit", "direction": "export"}
    with pytest.raises(ValueError, match="mended code"):
        convert(ConvertConfig(output_dir=str(tmp_path / "back"), **options))
    convert(ConvertConfig(output_dir=str(tmp_path / "back"), normalizer="paper", **options))
    assert (tmp_path / "back" / "model.pt").is_file()
    default = mhla_gen.inject(tiny_original(norm_eps=1e-6))
    with pytest.raises(ValueError, match="gate=False, but the model has True"):
        mhla_dit.write(default.state_dict(), default.config, normalizer="paper")


def test_the_command_is_dry_repeatable_and_careful(tmp_path, capsys):
    torch.save(dit_state(), tmp_path / "dit.pt")
    command = [f"source={tmp_path / 'dit.pt'}", f"output_dir={tmp_path / 'out'}"]
    command.append(f"num_attention_heads={HEADS}")
    assert cli(*command, "--dry-run") == 0
    assert "nothing was written" in capsys.readouterr().out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dit.pt"]
    assert cli(*command) == 0 and cli(*command) == 0
    assert "already" in capsys.readouterr().out
    assert cli(*command, "num_attention_heads=4") == 2
    assert "other settings (num_attention_heads: found 2" in capsys.readouterr().err
    assert cli() == 2
    assert "source is missing" in capsys.readouterr().err
    assert cli(f"source={tmp_path}", "direction=export", f"output_dir={tmp_path / 'x'}") == 2
    assert "no config.json" in capsys.readouterr().err
