"""Where pipelines come from: runs, checkpoints, folders, names on the hub; and their cards."""

import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler
from huggingface_hub import ModelCard, constants
from tiny import tiny_dit_pipeline
from tiny_sampling import arrays_of, set_of, tiny_pipeline

import mhla_gen
from mhla_gen import ClassConditionalPipeline, MHLAConfig
from mhla_gen.config import EvaluateConfig, FeaturesConfig, ModelConfig, TrainConfig
from mhla_gen.errors import OccupiedError
from mhla_gen.evaluation import evaluate
from mhla_gen.models.saved_transformer import load_transformer
from mhla_gen.sampling import sample, saved_pipeline
from mhla_gen.sampling.saved_pipeline import load_pipeline
from mhla_gen.training import train

FIRST = {"num_samples": 3}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of two steps with a checkpoint at its end, whose average lags behind its weights."""
    folder = tmp_path_factory.mktemp("run") / "run"
    model = ModelConfig(
        num_layers=1, num_attention_heads=2, attention_head_dim=8, mhla=MHLAConfig(layout=(2, 2))
    )
    settings = {"max_steps": 2, "batch_size": 8, "warmup_steps": 1, "mixed_precision": "fp32"}
    settings |= {"checkpoint_every": 2, "report_to": "none", "sample_every": 0, "ema_decay": 0.9}
    train(TrainConfig(output_dir=str(folder), model=model, learning_rate=0.1, **settings))
    return folder


def test_a_run_its_checkpoint_and_its_pipeline_sample_alike(run, tmp_path):
    sample(set_of(tmp_path / "run", run, **FIRST))
    sample(set_of(tmp_path / "pipeline", run / "pipeline", **FIRST))
    sample(set_of(tmp_path / "checkpoint", run / "checkpoint-2", **FIRST))
    unfinished = tmp_path / "unfinished"
    shutil.copytree(run, unfinished)
    shutil.rmtree(unfinished / "pipeline")
    sample(set_of(tmp_path / "newest", unfinished, **FIRST))
    expected = arrays_of(tmp_path / "run")["arr_0"]
    for name in ("pipeline", "checkpoint", "newest"):
        assert (arrays_of(tmp_path / name)["arr_0"] == expected).all()
    # The weights of the last step are others than their average.
    from safetensors.torch import load_file

    last = load_file(run / "checkpoint-2" / "model.safetensors")
    average = load_pipeline(str(run / "checkpoint-2"), torch.float32).transformer.state_dict()
    assert any(not torch.equal(last[name], average[name]) for name in last)


def test_a_checkpoint_has_the_numbers_of_the_pipeline_in_half_precision(run):
    pipeline, checkpoint = (
        load_pipeline(str(run / name), torch.bfloat16).transformer.state_dict()
        for name in ("pipeline", "checkpoint-2")
    )
    for name, tensor in pipeline.items():
        assert checkpoint[name].dtype == tensor.dtype and torch.equal(checkpoint[name], tensor)
    # Mixing matrices stay in float32.
    assert {tensor.dtype for tensor in pipeline.values()} == {torch.float32, torch.bfloat16}


def test_a_fresh_process_loads_what_was_saved(run, tmp_path):
    """As the documents say: after this import; that of a class-conditional run by its class."""
    dit = mhla_gen.inject(tiny_dit_pipeline(), MHLAConfig(layout=(2, 2)))
    dit.save_pretrained(tmp_path / "dit")
    # Seconds of walking what is imported, now and at the end.
    code = (
        "import gc; gc.disable()\n"
        "import sys, mhla_gen\n"
        "from diffusers import DiffusionPipeline\n"
        "dit = DiffusionPipeline.from_pretrained(sys.argv[1])\n"
        "pipe = mhla_gen.ClassConditionalPipeline.from_pretrained(sys.argv[2])\n"
        "for p in (dit, pipe): print(type(p).__name__, type(p.transformer).__name__)\n"
        "gc.freeze()"
    )
    folders = str(tmp_path / "dit"), str(run / "pipeline")
    done = subprocess.run([sys.executable, "-c", code, *folders], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [
        *("DiTPipeline", "MHLADiTTransformer2DModel"),
        *("ClassConditionalPipeline", "MHLADiTTransformer2DModel"),
    ]


def test_an_empty_folder_holds_no_pipeline(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"neither a saved pipeline \(model_index\.json\)"):
        load_pipeline(str(tmp_path / "empty"), torch.float32)
    (tmp_path / "empty" / "model_index.json").write_text('{"_class_name": "MoonPipeline"}')
    with pytest.raises(ValueError, match="has no pipeline 'MoonPipeline'"):
        load_pipeline(str(tmp_path / "empty"), torch.float32)


@pytest.mark.parametrize("path", ["./typo", "../typo", "runs/typo", "typo", "runs/file"])
def test_a_misspelt_path_is_not_looked_for_on_the_hub(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "file").write_text("no folder")
    monkeypatch.setattr(
        saved_pipeline, "_downloaded", lambda name: pytest.fail(f"asked for {name}")
    )
    with pytest.raises(FileNotFoundError, match=f"{path}: there is no such folder"):
        load_pipeline(path, torch.float32)


@pytest.mark.parametrize("converted", [False, True])
def test_a_pipeline_of_diffusers_with_and_without_mhla(converted, tmp_path):
    pipe = tiny_dit_pipeline()
    pipe.register_to_config(id2label={"0": "tench, Tinca tinca", "7": "cock"})
    if converted:
        mhla_gen.inject(pipe, MHLAConfig(layout=(2, 2)))
    pipe.save_pretrained(tmp_path / "dit")
    config = set_of(
        tmp_path / "set",
        tmp_path / "dit",
        classes=["tinca tinca", "cock"],
        samples_per_class=1,
        guidance_channels=3,
        scheduler="DDPMScheduler",
        scheduler_options={"clip_sample": False},
    )
    sample(config)
    arrays = arrays_of(tmp_path / "set")
    assert arrays["labels"].tolist() == [0, 7] and arrays["arr_0"].shape == (2, 64, 64, 3)
    made = json.loads((tmp_path / "set" / "manifest.json").read_text())
    # The model learned its variance, and this scheduler can use it.
    assert made["scheduler"]["variance_type"] == "learned_range"
    assert ("mhla" in made["transformer"]) == converted and made["vae"]["class"] == "AutoencoderKL"


def test_a_name_on_the_hub_is_found_in_its_cache(tmp_path, monkeypatch):
    """The cache as the hub's client lays it out; what is missing from it is asked for in vain."""
    snapshot = tmp_path / "hub" / "models--someone--digits" / "snapshots" / "0123"
    tiny_pipeline(class_names=["a", "b", "c"]).save_pretrained(snapshot)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text("0123")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    pipe = load_pipeline("someone/digits", torch.float32)
    assert type(pipe).__name__ == "ClassConditionalPipeline" and pipe.class_names == ["a", "b", "c"]
    assert type(pipe.transformer).__name__ == "MHLADiTTransformer2DModel"
    wanted = "^pipeline=someone/letters is not a folder here, and the hub has no such"
    with pytest.raises(FileNotFoundError, match=wanted):
        load_pipeline("someone/letters", torch.float32)


@pytest.mark.parametrize("name", ["README.md", "samples.png"])
def test_a_card_takes_the_place_of_nothing(name, tmp_path):
    pipe = tmp_path / "pipe"
    tiny_pipeline().save_pretrained(pipe)
    (pipe / name).write_text("mine")
    with pytest.raises(OccupiedError, match=rf"{name} is not a .* of ours"):
        sample(set_of(tmp_path / "set", pipe, card=True, **FIRST))
    assert (pipe / name).read_text() == "mine" and not (tmp_path / "set").exists()


def test_a_card_has_settings_and_a_picture(tmp_path):
    pipe = tmp_path / "pipe"
    tiny_pipeline(class_names=["a", "b", "c"]).save_pretrained(pipe)
    sample(set_of(tmp_path / "set", pipe, guidance_scale=3.0, card=True, **FIRST))
    card = ModelCard.load(pipe / "README.md")
    assert card.data.library_name == "diffusers" and "mhla" in card.data.tags
    assert "| guidance scale | 3.0 |" in card.text and "layout [2, 2]" in card.text
    assert (pipe / "samples.png").read_bytes() == (tmp_path / "set" / "samples.png").read_bytes()
    ClassConditionalPipeline.from_pretrained(pipe)
    # A finished set writes the card again; one of somebody else stays.
    sample(set_of(tmp_path / "set", pipe, guidance_scale=3.0, card=True, **FIRST))
    (pipe / "README.md").write_text("# My model")
    with pytest.raises(FileExistsError, match="not a card of ours"):
        sample(set_of(tmp_path / "other", pipe, card=True, **FIRST))
    assert not (tmp_path / "other").exists()
    with pytest.raises(ValueError, match="card=true needs a saved pipeline in a folder"):
        sample(set_of(tmp_path / "other", "someone/digits", card=True))


class Brightness(torch.nn.Module):
    """Features that need no file: mean and spread of the colours."""

    def forward(self, images):
        x = images.float().flatten(2)
        return torch.cat([x.mean(2), x.std(2)], 1)


@pytest.fixture
def scoring(tmp_path):
    torch.jit.script(Brightness()).save(tmp_path / "brightness.pt")
    rng = np.random.default_rng(0)
    np.savez(tmp_path / "real.npz", arr_0=rng.integers(0, 256, (40, 64, 64, 3), np.uint8))
    features = FeaturesConfig(
        extractor="torchscript",
        trust=True,
        weights=str(tmp_path / "brightness.pt"),
        cache_dir=str(tmp_path / "cache"),
        device="cpu",
    )
    return EvaluateConfig(
        reference=str(tmp_path / "real.npz"), metrics=("fd", "precision"), features=features
    )


def test_scores_while_sampling_are_those_of_the_finished_set(scoring, tmp_path):
    pipe = tiny_dit_pipeline()
    pipe.scheduler = DDIMScheduler()
    pipe.save_pretrained(tmp_path / "pipe")
    options = {"num_samples": 22, "model_batch_size": 8, "evaluate": scoring}
    sample(set_of(tmp_path / "kept", tmp_path / "pipe", **options))
    sample(set_of(tmp_path / "gone", tmp_path / "pipe", keep_samples=False, **options))
    from dataclasses import replace

    later = replace(scoring, samples=str(tmp_path / "kept"), out=str(tmp_path / "later.json"))
    evaluate(later)
    expected = json.loads((tmp_path / "later.json").read_text())["metrics"]
    for name in ("kept", "gone"):
        found = json.loads((tmp_path / name / "metrics.json").read_text())["metrics"]
        for metric in ("fd", "precision"):
            assert found[metric]["value"] == pytest.approx(expected[metric]["value"], rel=1e-6)
            assert found[metric]["protocol"] == expected[metric]["protocol"]
    left = {path.name for path in (tmp_path / "gone").iterdir()}
    assert left == {"config.yaml", "manifest.json", "metrics.json", "samples.png"}


def test_a_comparison_that_cannot_be_is_refused_before_sampling(scoring, tmp_path):
    tiny_pipeline().save_pretrained(tmp_path / "pipe")
    config = set_of(tmp_path / "set", tmp_path / "pipe", num_samples=30, evaluate=scoring)
    with pytest.raises(ValueError, match="image size: samples 8 × 8, reference 64 × 64"):
        sample(config)
    assert not (tmp_path / "set").exists()


def test_weights_of_a_variant_only_are_named_with_how_to_load_them(tmp_path, monkeypatch):
    pipe = tiny_pipeline()
    pipe.save_pretrained(tmp_path / "fp16", variant="fp16")
    pipe.save_pretrained(tmp_path / "parts", variant="fp16", max_shard_size="3KB")
    pipe.save_pretrained(tmp_path / "both", variant="fp16")
    pipe.save_pretrained(tmp_path / "both")
    message = r'only as a variant, diffusion_pytorch_model\.fp16.*variant="fp16"'
    for name in ("fp16", "parts"):
        for load in (lambda p: load_pipeline(p, torch.float32), load_transformer):
            with pytest.raises(ValueError, match=message) as error:
                load(str(tmp_path / name))
            assert "\n" not in str(error.value)
    monkeypatch.setenv("HOME", str(tmp_path))
    load_pipeline("~/both", torch.float32)
    mhla_gen.MHLADiTTransformer2DModel.from_pretrained("~/both/transformer")
