"""What conversion refuses to read, run or write, and how it says so."""

import argparse
import pickle

import pytest
import torch
from other_code import HEADS, HIDDEN, dit_state, mhla_dit_state, wan_state
from tiny import tiny_dit

import mhla_gen
from mhla_gen import OriginalDiTTransformer2DModel
from mhla_gen.cli import main
from mhla_gen.config import ConvertConfig
from mhla_gen.conversion import convert, mhla_dit, mhla_wan, original_dit, read_checkpoint
from mhla_gen.errors import UserError


def cli(*arguments):
    return main(["convert", *map(str, arguments)])


def import_dit(state, folder, **changes):
    torch.save(state, folder / "dit.pt")
    options = {"num_attention_heads": HEADS, "output_dir": str(folder / "out")} | changes
    convert(ConvertConfig(source=str(folder / "dit.pt"), **options))
    return folder / "out"


def tiny_original(**changes):
    arguments = {k: v for k, v in tiny_dit(**changes).config.items() if not k.startswith("_")}
    return OriginalDiTTransformer2DModel(**arguments)


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
    # torch says of each something else, from an IndexError to one about text.
    names = ["cut.pt", "cut.safetensors", "empty.pt", "list.pt"]
    for number, text in enumerate((b"a red square\n", b"101", b"q\x00\xe3", b"(lp0\n", b"J\x01")):
        names.append(f"text{number}.pt")
        (tmp_path / names[-1]).write_bytes(text)
    for name in names:
        with pytest.raises(UserError, match=f"{name} (contains|is not)") as caught:
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
        (lambda s: changed(s, pos_embed=None), "the weight pos_embed"),
        (lambda s: {"a": torch.ones(1)}, r"x_embedder\.proj\.weight"),
    ],
)
def test_a_checkpoint_of_something_else_is_refused(change, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        import_dit(change(dit_state()), tmp_path)
    assert not (tmp_path / "out").exists()


def test_a_pipeline_needs_no_import(tmp_path):
    with pytest.raises(UserError, match=r"no \.safetensors files$"):
        read_checkpoint(tmp_path)
    (tmp_path / "model_index.json").write_text("{}")
    with pytest.raises(UserError, match=r"mhla_gen\.inject and .* take pipelines"):
        read_checkpoint(tmp_path)


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
    default = mhla_gen.inject(tiny_original(norm_eps=1e-6), mhla_gen.MHLAConfig())
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
    assert "set source to" in capsys.readouterr().err
    assert cli(f"source={tmp_path}", "direction=export", f"output_dir={tmp_path / 'x'}") == 2
    assert "nor a saved model (config.json)" in capsys.readouterr().err


@pytest.mark.parametrize(
    "settings",
    [
        {"layout": (2, 2), "format": "mhla_dit"},
        {"normalizer": "paper"},
        {"allow_differences": True, "format": "mhla_wan"},
    ],
)
def test_settings_of_another_format_are_refused(settings):
    with pytest.raises(ValueError, match="is for format=mhla_"):
        ConvertConfig(source="model.pt", **settings)
