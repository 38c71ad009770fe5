"""Checkpoints of the MHLA authors' DeiT: the function they compute must be ours, or be refused."""

import argparse
import json

import pytest
import torch
import torch.nn.functional as F
from other_code import HEADS, HIDDEN, apply, blocks_of, linear, weights
from safetensors.torch import save_file
from test_vision import softmax_model

import mhla_gen
from mhla_gen import MHLAConfig, MHLAVisionTransformer
from mhla_gen.cli import main
from mhla_gen.conversion import mhla_deit
from mhla_gen.conversion.conversion import build

SIDE, PATCH, DEPTH = 4, 2, 2


def deit_state(released=False):
    """Names and shapes of the authors' DeiT; `released` with the norms of their code."""
    shapes = {
        "pos_embed": (1, SIDE**2, HIDDEN),
        "patch_embed.proj.weight": (HIDDEN, 3, PATCH, PATCH),
        "patch_embed.proj.bias": (HIDDEN,),
        **linear("head", 5, HIDDEN),
    }
    norms = ["fc_norm"]
    for i in range(DEPTH):
        name = f"blocks.{i}"
        shapes[f"{name}.attn.to_qkv.weight"] = (3 * HIDDEN, HIDDEN)
        shapes |= linear(f"{name}.attn.to_out.0", HIDDEN, HIDDEN)
        shapes |= linear(f"{name}.mlp.fc1", 4 * HIDDEN, HIDDEN)
        shapes |= linear(f"{name}.mlp.fc2", HIDDEN, 4 * HIDDEN)
        shapes[f"{name}.attn.lepe.weight"] = (HIDDEN, 1, 5, 5)
        shapes[f"{name}.attn.lepe.bias"] = (HIDDEN,)
        norms += [f"{name}.norm1", f"{name}.norm2"] + [f"{name}.attn.norm"] * released
        if released:
            shapes |= {f"{name}.attn.{part}_norm.weight": (HIDDEN,) for part in "qk"}
    for name in norms:
        shapes |= {f"{name}.weight": (HIDDEN,), f"{name}.bias": (HIDDEN,)}
    state = weights(shapes)
    for i in range(DEPTH):
        state[f"blocks.{i}.attn.piece_attn.conv.weight"] = torch.rand(4, 4, 1, 1)
        for part in "qk" * released:
            state[f"blocks.{i}.attn.{part}_norm.weight"].abs_()
    return state


def normed(state, name, x):
    return F.layer_norm(x, (HIDDEN,), state[f"{name}.weight"], state[f"{name}.bias"], eps=1e-6)


def attention(state, name, x):
    """Eq. 4 as one matrix of weights between tokens, and LePE. Norms scale and shift only."""
    if f"{name}.norm.weight" in state:
        x = x * state[f"{name}.norm.weight"] + state[f"{name}.norm.bias"]
    query, key, value = F.linear(x, state[f"{name}.to_qkv.weight"]).chunk(3, dim=2)
    query = query * state.get(f"{name}.q_norm.weight", 1)
    key = key * state.get(f"{name}.k_norm.weight", 1)
    q, k, v = (part.unflatten(2, (HEADS, -1)).transpose(1, 2) for part in (query, key, value))
    block = blocks_of((SIDE, SIDE), (2, 2))
    mixing = state[f"{name}.piece_attn.conv.weight"][:, :, 0, 0][block][:, block]
    pairs = ((q.relu() + 1e-6) @ (k.relu() + 1e-6).transpose(2, 3)) * mixing
    out = (pairs @ v / (pairs.sum(-1, keepdim=True) + 1e-6)).transpose(1, 2).flatten(2)
    filters = state[f"{name}.lepe.weight"], state[f"{name}.lepe.bias"]
    image = value.mT.unflatten(2, (SIDE, SIDE))
    lepe = F.conv2d(image, *filters, padding=2, groups=HIDDEN)
    return apply(state, f"{name}.to_out.0", out + lepe.flatten(2).mT)


def other_deit(state, images):
    patches = state["patch_embed.proj.weight"], state["patch_embed.proj.bias"]
    x = F.conv2d(images, *patches, stride=PATCH).flatten(2).mT + state["pos_embed"]
    for i in range(DEPTH):
        name = f"blocks.{i}"
        x = x + attention(state, f"{name}.attn", normed(state, f"{name}.norm1", x))
        inner = apply(state, f"{name}.mlp.fc1", normed(state, f"{name}.norm2", x))
        x = x + apply(state, f"{name}.mlp.fc2", F.gelu(inner))
    return apply(state, "head", normed(state, "fc_norm", x.mean(1)))


@pytest.mark.parametrize("released", [False, True])
def test_an_imported_deit_computes_eq_4_in_float64(released):
    state = deit_state(released)
    options = {"normalizer": "paper", "allow_differences": released}
    converted = mhla_deit.read(state, HEADS, **options)
    assert len(converted.differences) == 2 * released
    model = build(converted).double()
    for block in model.blocks:
        mixing = block.attn.mhla.mixing
        mixing.data = mixing.data.double()
    images = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    expected = other_deit({key: tensor.double() for key, tensor in state.items()}, images)
    # Folding a norm rounds weights to float32.
    tolerance = 1e-5 if released else 1e-9
    torch.testing.assert_close(model(images), expected, rtol=tolerance, atol=tolerance)


def cli(*arguments):
    return main(["convert", "format=mhla_deit", f"num_attention_heads={HEADS}", *arguments])


def test_a_checkpoint_of_timms_script_goes_there_and_back(tmp_path, capsys):
    state, ema = deit_state(), deit_state()
    contents = {
        "arch": "deit_tiny",
        "epoch": 3,
        "state_dict": state,
        "state_dict_ema": {f"module.{key}": tensor for key, tensor in ema.items()},
        "args": argparse.Namespace(model="deit_tiny"),
    }
    torch.save(contents, tmp_path / "last.pth.tar")
    imported = [f"source={tmp_path / 'last.pth.tar'}", f"output_dir={tmp_path / 'in'}"]
    assert cli(*imported, "normalizer=paper") == 0
    assert "equal bit for bit" in capsys.readouterr().out
    assert json.loads((tmp_path / "in" / "conversion.json").read_text())["exact"]
    model = MHLAVisionTransformer.from_pretrained(tmp_path / "in")
    images = torch.randn(2, 3, 8, 8)
    torch.testing.assert_close(model(images), other_deit(ema, images), rtol=1e-4, atol=1e-4)
    assert model.mhla_config.layout == (2, 2)

    exported = [f"source={tmp_path / 'in'}", f"output_dir={tmp_path / 'out'}", "direction=export"]
    assert cli(*exported, "normalizer=paper") == 0
    back = torch.load(tmp_path / "out" / "model.pt", weights_only=True)
    assert back.keys() == ema.keys()
    assert all(torch.equal(back[key], ema[key]) for key in ema)
    assert cli(*exported[:1], f"output_dir={tmp_path / 'other'}", "direction=export") == 2
    assert "normalizer=paper" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.update(deit_state(True)), "normalises the input of attention once more"),
        (lambda s: s.pop("blocks.0.attn.piece_attn.conv.weight"), "not a checkpoint of"),
        (lambda s: s.update({"cls_token": torch.zeros(1, 1, HIDDEN)}), "has no cls_token"),
        (lambda s: s.update({"pos_embed": torch.zeros(1, 15, HIDDEN)}), "square number of pos"),
        (lambda s: s.pop("fc_norm.bias"), "lacks"),
    ],
)
def test_what_is_not_the_same_function_is_refused(change, message, tmp_path, capsys):
    state = deit_state()
    change(state)
    save_file(state, tmp_path / "model.safetensors")
    source = [f"source={tmp_path / 'model.safetensors'}", f"output_dir={tmp_path / 'out'}"]
    assert cli(*source, "normalizer=paper") == 2
    assert message in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_the_released_normalizer_is_refused_and_heads_are_asked_for():
    with pytest.raises(ValueError, match="sum over other blocks' queries"):
        mhla_deit.read(deit_state(), HEADS)
    with pytest.raises(ValueError, match="set num_attention_heads"):
        mhla_deit.read(deit_state(), normalizer="paper")


@pytest.mark.parametrize(
    ("head", "config", "message"),
    [
        ("average", MHLAConfig(layout=(2, 2)), "always has gate=False"),
        ("average", MHLAConfig(layout=(2, 3), gate=False), "as many blocks along both axes"),
        ("average", MHLAConfig(layout=(2, 2), gate=False, layers=[1]), "some layers here are"),
        ("class", MHLAConfig(layout=(2, 2), gate=False), "has no blocks.0.attn.mhla.combine"),
    ],
)
def test_models_that_their_code_does_not_have_are_not_exported(head, config, message, tmp_path):
    model = mhla_gen.inject(softmax_model(head), config)
    settings = {"mhla": model.mhla_config.to_dict()}
    with pytest.raises(ValueError, match=message):
        mhla_deit.write(model.state_dict(), settings, normalizer="paper")
