"""Commands name the next one at their end, and what they name works."""

import shlex
from pathlib import Path

import numpy as np
import pytest
from other_code import HEADS, dit_state
from PIL import Image
from safetensors.torch import save_file
from tiny import tiny_autoencoder, tiny_clip_cache, tiny_wan_pipeline

from mhla_gen.cli import main
from mhla_gen.config import CacheConfig, load_config

SMALL = ["max_steps=1", "mixed_precision=fp32", "report_to=none", "sample_every=0", "--dry-run"]
TINY = ["model.num_layers=1", "model.num_attention_heads=2", "model.attention_head_dim=8"]


def pointer(after, *arguments, capsys):
    """The command at the end of what another one prints, as a shell takes it apart."""
    assert main([after, *arguments]) == 0
    words = shlex.split(capsys.readouterr().out.strip().splitlines()[-1].partition(": ")[2])
    assert words[:2] == ["mhla-gen", "train"]
    return words[1:]


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    """A cache of captioned clips, and the settings that made it."""
    folder = tmp_path_factory.mktemp("clips")
    cache = tiny_clip_cache(folder, clips=1, pipeline=tiny_wan_pipeline(text=True))
    return cache, load_config(cache / "config.yaml", schema=CacheConfig)


@pytest.fixture
def images(tmp_path):
    """Settings that cache images of two classes, 64 pixels wide."""
    rng = np.random.default_rng(0)
    for name in ("bee", "cow"):
        (tmp_path / "images" / name).mkdir(parents=True)
        for number in range(2):
            pixels = rng.integers(0, 256, (64, 64, 3), np.uint8)
            Image.fromarray(pixels).save(tmp_path / "images" / name / f"{number}.png")
    tiny_autoencoder().save_pretrained(tmp_path / "vae")
    data = ["data.source=folder", f"data.path={tmp_path / 'images'}", "data.image_size=64"]
    return [*data, f"vae.path={tmp_path / 'vae'}", "device=cpu", f"output_dir={tmp_path / 'cache'}"]


def test_a_cache_of_classes_names_how_to_train_on_it(images, tmp_path, capsys):
    command = pointer("cache", *images, capsys=capsys)
    assert f"data.path={tmp_path / 'cache'}" in command
    assert main([*command, *TINY, f"output_dir={tmp_path / 'run'}", *SMALL]) == 0
    assert main(["cache", *images, "verify=true"]) == 0
    assert "mhla-gen train" not in capsys.readouterr().out


@pytest.mark.parametrize("clone", [False, True])
def test_a_cache_of_clips_names_how_to_tune_its_pipeline(
    clips, clone, tmp_path, monkeypatch, capsys
):
    cache, _ = clips
    monkeypatch.chdir(Path(__file__).parent.parent if clone else tmp_path)
    command = pointer("cache", str(cache / "config.yaml"), capsys=capsys)
    assert command[1] == ("configs/train_wan.yaml" if clone else "data.source=cache")
    assert main([*command, f"output_dir={tmp_path / 'run'}", *SMALL]) == 0
    assert "clips, latents 16 × 3 × 4 × 6" in capsys.readouterr().out


def test_a_cache_of_clips_without_captions_names_nothing(clips, tmp_path, capsys):
    settings = [str(clips[0] / "config.yaml"), "text.path=null", f"output_dir={tmp_path / 'cache'}"]
    assert main(["cache", *settings]) == 0
    assert "mhla-gen train" not in capsys.readouterr().out


def test_images_as_latents_of_clips_are_refused_and_named_nowhere(images, tmp_path, capsys):
    tiny_wan_pipeline().save_pretrained(tmp_path / "wan")
    assert main(["cache", *images, f"vae.path={tmp_path / 'wan'}"]) == 0
    assert "mhla-gen train" not in capsys.readouterr().out
    data = ["data.source=cache", f"data.path={tmp_path / 'cache'}"]
    assert main(["train", *data, f"output_dir={tmp_path / 'run'}", *SMALL]) == 2
    assert "a DiT learns images, the data are [16, 1, 8, 8]" in capsys.readouterr().err


def test_an_imported_dit_names_how_to_tune_it(images, tmp_path, capsys):
    assert main(["cache", *images]) == 0
    state = {key: tensor.contiguous() for key, tensor in dit_state().items()}
    save_file(state, tmp_path / "model.safetensors")
    source = [f"source={tmp_path / 'model.safetensors'}", f"num_attention_heads={HEADS}"]
    command = pointer("convert", *source, f"output_dir={tmp_path / 'dit'}", capsys=capsys)
    cache = str(tmp_path / "cache")
    command = [word.replace("CACHE", cache) for word in command]
    assert main([*command, f"output_dir={tmp_path / 'run'}", *SMALL]) == 0
    back = [f"source={tmp_path / 'dit'}", "direction=export", f"output_dir={tmp_path / 'back'}"]
    assert main(["convert", *back]) == 0
    assert "mhla-gen train" not in capsys.readouterr().out.splitlines()[-1]
