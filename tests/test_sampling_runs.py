"""Samples of a run: from its checkpoints alone, with its own settings, and of other sizes."""

import filecmp
import json
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, WanPipeline
from PIL import Image
from tiny import tiny_clip_cache, tiny_dit_pipeline, tiny_wan_pipeline
from tiny_sampling import arrays_of, set_of, tiny_pipeline

from mhla_gen.cli import main
from mhla_gen.config import (
    DataConfig,
    MHLAConfig,
    ModelConfig,
    ObjectiveConfig,
    PreviewConfig,
    TrainConfig,
    WanConfig,
)
from mhla_gen.errors import UserError
from mhla_gen.sampling import sample
from mhla_gen.sampling.saved_pipeline import load_pipeline
from mhla_gen.training import train

SMALL = {"num_layers": 1, "num_attention_heads": 2, "attention_head_dim": 12, "ffn_dim": 32}
OWN = {"num_inference_steps": 3, "guidance_scale": 2.0}


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    return tiny_clip_cache(tmp_path_factory.mktemp("clips"))


@pytest.fixture(scope="module")
def run(tmp_path_factory, clips):
    """A Wan with two checkpoints and the text encoder, whose data and base are gone by now."""
    folder = tmp_path_factory.mktemp("run")
    shutil.copytree(clips, folder / "cache")
    pair = tiny_wan_pipeline(text=True)
    pair.register_modules(vae=load_pipeline(str(clips.parent / "pipeline"), torch.float32).vae)
    pair.save_pretrained(folder / "base")
    config = TrainConfig(
        output_dir=str(folder / "run"),
        data=DataConfig(source="cache", path=str(folder / "cache")),
        model=ModelConfig(pretrained=str(folder / "base"), mhla=MHLAConfig(layout=(2, 2, 2))),
        wan=WanConfig(save_text_encoder=True),
        objective=ObjectiveConfig(shift=4.0),
        samples=PreviewConfig(num_images=1, **OWN),
        max_steps=4,
        batch_size=2,
        warmup_steps=0,
        learning_rate=1e-2,
        ema_decay=0.5,
        mixed_precision="fp32",
        checkpoint_every=2,
        sample_every=0,
        report_to="none",
    )
    train(config)
    for name in ("cache", "base"):
        shutil.rmtree(folder / name)
    return folder / "run"


def videos_of(folder, pipeline, **changes):
    options = {"prompts": "a red square moves right", "formats": ["npz"]}
    return set_of(folder, pipeline, **options | {"num_inference_steps": None} | changes)


def test_a_checkpoint_carries_all_that_sampling_needs(run, tmp_path, monkeypatch):
    """Copied to another machine, without the data, the base model, or anything pickled."""
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("a pickle is read"))
    alone = tmp_path / "elsewhere"
    shutil.copytree(run / "checkpoint-4", alone, ignore=shutil.ignore_patterns("*.pkl", "*.bin"))
    sample(videos_of(tmp_path / "checkpoint", alone))
    sample(videos_of(tmp_path / "run", run))
    found, expected = (arrays_of(tmp_path / name)["arr_0"] for name in ("checkpoint", "run"))
    assert (found == expected).all() and np.ptp(expected) > 0
    # It is a pipeline of diffusers, of the average at that step.
    pipelines = [
        WanPipeline.from_pretrained(folder / "pipeline")
        for folder in (alone, run / "checkpoint-2", run)
    ]
    weights = [pipeline.transformer.state_dict() for pipeline in pipelines]
    assert all(torch.equal(weights[0][name], value) for name, value in weights[2].items())
    assert any(not torch.equal(weights[1][name], value) for name, value in weights[2].items())
    assert isinstance(pipelines[0], DiffusionPipeline) and pipelines[0].text_encoder is not None


def test_what_is_not_trained_lies_on_the_disk_once(run, tmp_path):
    places = [run / name / "pipeline" for name in ("checkpoint-2", "checkpoint-4", ".")]
    for part in ("vae", "text_encoder"):
        files = [[*sorted((place / part).glob("*.safetensors"))] for place in places]
        assert len({file.stat().st_ino for (file,) in files}) == 1
    trained = [(place / "transformer").glob("*.safetensors") for place in places]
    assert len({file.stat().st_ino for files in trained for file in files}) == 3
    # What diffusers would have written, and the settings of the run.
    WanPipeline.from_pretrained(places[2]).save_pretrained(tmp_path / "again")
    difference = filecmp.dircmp(tmp_path / "again", places[2])
    beside = {"sampling.json", "run.json", "examples"}
    assert difference.left_only == [] and set(difference.right_only) == beside
    assert difference.subdirs.keys() >= {"vae", "scheduler", "transformer", "text_encoder"}
    for inner in difference.subdirs.values():
        assert not inner.left_only and not inner.right_only


def test_a_run_is_sampled_with_its_own_settings(run, tmp_path, capsys):
    sample(videos_of(tmp_path / "own", run, formats=["npz", "mp4"]))
    made = json.loads((tmp_path / "own" / "manifest.json").read_text())
    expected = {**OWN, "height": 32, "width": 48, "num_frames": 9, "fps": 16.0, "dtype": "float32"}
    assert {name: made["settings"][name] for name in expected} == expected
    assert made["shape"] == [9, 32, 48, 3] and made["scheduler"]["flow_shift"] == 4.0
    said = capsys.readouterr().out
    assert "writing 1 video from prompts" in said and "3 steps each: 9 × 32 × 48 × 3" in said
    assert "16 frames per second, guidance 2, float32" in said and "about" not in said
    # A second start finds the set complete; another number of steps is another set.
    sample(videos_of(tmp_path / "own", run, formats=["npz", "mp4"]))
    assert "nothing to do" in capsys.readouterr().out
    with pytest.raises(FileExistsError, match="num_inference_steps: found 3, asked for 2"):
        sample(videos_of(tmp_path / "own", run, formats=["npz", "mp4"], num_inference_steps=2))


@pytest.mark.parametrize("size", [(17, 64, 80), (33, 64, 80), (1, 16, 16)])
def test_other_sizes_than_trained(run, tmp_path, size):
    frames, height, width = size
    changes = {"num_frames": frames, "height": height, "width": width, "num_inference_steps": 1}
    sample(videos_of(tmp_path / "set", run, guidance_scale=1.0, **changes))
    assert arrays_of(tmp_path / "set")["arr_0"].shape == (1, frames, height, width, 3)


def test_how_long_a_set_takes_is_said_before_it_is_made(tmp_path, capsys, monkeypatch):
    tiny_pipeline().save_pretrained(tmp_path / "pipe")
    said = []
    from mhla_gen.sampling.sampling import Job

    draw = Job._draw
    monkeypatch.setattr(
        Job, "_draw", lambda *args: said.append(capsys.readouterr().out) or draw(*args)
    )
    sample(set_of(tmp_path / "set", tmp_path / "pipe", num_samples=2, num_inference_steps=None))
    (line,) = said
    assert line.startswith("writing 2 images of 2 classes to ") and "40 steps each: 8 × 8" in line
    assert (
        "guidance 1.5, float32, npz 128 B, by 1 process on cpu; about " in line
        and "samples/s" in line
    )


def test_what_nobody_gives_is_the_pipelines_own(tmp_path):
    """Of a pipeline of diffusers: Wan's guidance and steps, and the arithmetic of its weights."""
    tiny_wan_pipeline(text=True).to(torch.bfloat16).save_pretrained(tmp_path / "wan")
    sizes = {"height": 16, "width": 16, "num_frames": 1}
    sample(videos_of(tmp_path / "set", tmp_path / "wan", **sizes, scheduler_options={}))
    settings = json.loads((tmp_path / "set" / "manifest.json").read_text())["settings"]
    found = {name: settings[name] for name in ("guidance_scale", "num_inference_steps", "dtype")}
    assert found == {"guidance_scale": 5.0, "num_inference_steps": 50, "dtype": "bfloat16"}
    dit = tiny_dit_pipeline()
    dit.save_pretrained(tmp_path / "dit")
    sample(set_of(tmp_path / "images", tmp_path / "dit", num_samples=1))
    settings = json.loads((tmp_path / "images" / "manifest.json").read_text())["settings"]
    assert settings["guidance_scale"] == 1.5 and settings["dtype"] == "float32"


def test_a_file_of_settings_with_other_keys_is_refused(tmp_path):
    tiny_pipeline().save_pretrained(tmp_path / "pipe")
    (tmp_path / "pipe" / "sampling.json").write_text('{"output_dir": "x"}')
    with pytest.raises(
        UserError, match="has the keys output_dir; known keys are num_inference_steps"
    ):
        sample(set_of(tmp_path / "set", tmp_path / "pipe"))


def hint_of(arguments, capsys):
    """What `mhla-gen train` says at its end, as a shell takes it apart."""
    assert main(["train", *arguments]) == 0
    said = capsys.readouterr().out.strip().splitlines()[-1]
    command = shlex.split(said.partition("to sample from it: ")[2])
    assert command[:2] == ["mhla-gen", "sample"]
    return command[1:]


def test_the_hint_after_training_on_clips_works(run, tmp_path, monkeypatch, capsys):
    hint = hint_of([str(run / "config.yaml"), "resume=latest"], capsys)
    monkeypatch.chdir(tmp_path)
    assert main(hint) == 0
    made = json.loads((run.parent / f"{run.name}-samples" / "manifest.json").read_text())
    assert made["samples"][0]["prompt"].startswith("a red square moves")
    assert made["shape"] == [9, 32, 48, 3]


@pytest.mark.parametrize("image", [False, True])
def test_the_hint_works_without_a_text_encoder(clips, image, tmp_path, monkeypatch, capsys):
    settings = [f"output_dir={tmp_path / 'run'}", "data.source=cache", f"data.path={clips}"]
    settings += [f"wan.{name}={value}" for name, value in SMALL.items()]
    settings += [f"wan.first_frame={image}", f"wan.times_of_tokens={image}"]
    settings += ["model.mhla.layout=[1,2,2]", "max_steps=1", "batch_size=2", "checkpoint_every=1"]
    settings += ["sample_every=0", "report_to=none", "samples.num_inference_steps=2"]
    hint = hint_of(settings, capsys)
    monkeypatch.chdir(tmp_path)
    assert main(hint) == 0
    (video,) = (tmp_path / "run-samples" / "videos").iterdir()
    assert video.stat().st_size > 0


def test_the_hint_after_training_on_classes_works(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    settings = ["data.source=digits", "model.patch_size=2", "model.num_layers=1", "max_steps=1"]
    settings += ["model.num_attention_heads=2", "model.attention_head_dim=8", "batch_size=2"]
    settings += ["model.mhla.layout=[2,2]", "report_to=none", "sample_every=0"]
    hint = hint_of([*settings, "samples.num_inference_steps=1"], capsys)
    assert main(hint) == 0 and (tmp_path / "runs" / "train-samples" / "samples.npz").is_file()


@pytest.mark.parametrize(
    ("recipe", "changes"),
    [
        ("train_cpu.yaml", ["sample_every=1", "samples.num_inference_steps=1"]),
        (
            "train_pixels128.yaml",
            ["model.num_layers=1", "compile=none", "batch_size=1", "sample_every=0"],
        ),
    ],
)
def test_recipes_take_a_folder_of_images(recipe, changes, tmp_path, monkeypatch, capsys):
    rng = np.random.default_rng(0)
    for name in ("bee", "cow"):
        (tmp_path / "images" / name).mkdir(parents=True)
        for number in range(3):
            pixels = rng.integers(0, 256, (60, 50, 3), np.uint8)
            Image.fromarray(pixels).save(tmp_path / "images" / name / f"{number}.png")
    config = Path(__file__).parent.parent / "configs" / recipe
    monkeypatch.chdir(tmp_path)
    hint = hint_of([str(config), "max_steps=1", *changes], capsys)
    settings = ["num_inference_steps=1", "num_samples=1", "device=cpu"]
    assert main([*hint, *settings]) == 0
    side = 32 if recipe == "train_cpu.yaml" else 128
    made = tmp_path / "runs" / f"{recipe.removeprefix('train_').removesuffix('.yaml')}-samples"
    assert arrays_of(made)["arr_0"].shape == (1, side, side, 3)
