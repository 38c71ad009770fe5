"""A model is found by its folder, by the run that made it, or by its name on the hub."""

from pathlib import Path

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from huggingface_hub import constants
from tiny import tiny_dit, tiny_dit_pipeline

import mhla_gen
from mhla_gen import MHLAConfig
from mhla_gen.cli import main
from mhla_gen.config import AutoencoderConfig, DistillConfig, ModelConfig, TrainConfig
from mhla_gen.data.autoencoder import load_autoencoder
from mhla_gen.distillation.stages import check_teacher
from mhla_gen.hub import find, locate_part, pipeline_index
from mhla_gen.inspection.subject import load_subject
from mhla_gen.models.saved_transformer import load_transformer
from mhla_gen.sampling.saved_pipeline import load_pipeline
from mhla_gen.training import build_model


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """What a finished run of train leaves: config.yaml and a pipeline of pixels."""
    folder = tmp_path_factory.mktemp("runs") / "softmax"
    model = tiny_dit(in_channels=1, patch_size=1, num_layers=2)
    pipeline = mhla_gen.ClassConditionalPipeline(model, FlowMatchEulerDiscreteScheduler())
    pipeline.save_pretrained(folder / "pipeline")
    (folder / "config.yaml").write_text("max_steps: 2\n")
    return folder


def places(run):
    return [run, run / "pipeline"]


def test_a_run_means_its_pipeline(run):
    for place in places(run):
        assert find(str(place)) == str(run / "pipeline")
        assert pipeline_index(str(place))["_class_name"] == "ClassConditionalPipeline"
    assert find(str(run / "pipeline" / "transformer")) == str(run / "pipeline" / "transformer")
    assert pipeline_index(str(run / "pipeline" / "transformer")) == {}
    assert find("owner/name.with-marks_2") == "owner/name.with-marks_2"
    assert find(str(run.parent)) is None


def test_every_taker_of_a_model_takes_a_run(run, tmp_path):
    expected = load_transformer(str(run / "pipeline" / "transformer")).state_dict()
    for place in map(str, places(run)):
        subject = load_subject(place, "transformer", torch.float32)
        assert subject.source == str(run / "pipeline" / "transformer") and subject.scheduler
        config = ModelConfig(pretrained=place, mhla=MHLAConfig(layout=(2, 2)))
        for model in (
            subject.model,
            load_pipeline(place, torch.float32).transformer,
            build_model(config, (1, 8, 8), 10),
        ):
            found = model.state_dict()
            assert all(torch.equal(found[key], expected[key]) for key in expected)
        check_teacher(TrainConfig(distill=DistillConfig(teacher=place)))
        scan = ["inspect", "sensitivity", place, "mhla.layout=[2,2]", "num_inputs=1", "--dry-run"]
        assert main([*scan, f"output_dir={tmp_path / 'scan'}"]) == 0


def test_an_export_takes_a_run_and_names_what_it_found(run, tmp_path, capsys):
    arguments = ["convert", "direction=export", "--dry-run", f"output_dir={tmp_path / 'out'}"]
    for place in places(run):
        # diffusers' frequencies are not the original's: this far it came.
        assert main([*arguments, f"source={place}"]) == 2
        assert "the model embeds timesteps at diffusers' frequencies" in capsys.readouterr().err
    assert main([*arguments, "source=someone/dit"]) == 2
    assert "is not a folder: an export takes that of a model" in capsys.readouterr().err


@pytest.mark.parametrize("path", ["./typo", "../typo", "runs/typo", "typo", "runs/file", "a/b/c"])
def test_a_misspelt_path_is_refused_without_asking_the_hub(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("runs").mkdir()
    Path("runs/file").write_text("no folder")
    for take in (
        find,
        load_transformer,
        lambda path: load_autoencoder(AutoencoderConfig(path=path)),
        lambda path: load_subject(path, "transformer", torch.float32),
    ):
        with pytest.raises(FileNotFoundError, match=f"^{path}: there is no such folder"):
            take(path)


def test_a_part_that_a_pipeline_lacks_is_named(run, tmp_path):
    with pytest.raises(ValueError, match=r"pipeline has no vae; it has scheduler, transformer$"):
        load_autoencoder(AutoencoderConfig(path=str(run)))
    with pytest.raises(ValueError, match="has no transformer_2; it has scheduler, transformer"):
        load_transformer(str(run), "transformer_2")
    tiny_dit_pipeline().save_pretrained(tmp_path)
    assert locate_part(str(tmp_path), "vae") == (str(tmp_path), {"subfolder": "vae"})
    assert locate_part(str(tmp_path / "vae"), "vae") == (str(tmp_path / "vae"), {})


def test_models_on_the_hub_are_looked_into_by_name(run, tmp_path, monkeypatch, capsys):
    """The cache as the hub's client lays it out; what is missing from it is asked for in vain."""
    commit = "0123456789" * 4
    snapshot = tmp_path / "hub" / "models--someone--digits" / "snapshots" / commit
    snapshot.parent.mkdir(parents=True)
    snapshot.symlink_to(run / "pipeline")
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text(commit)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    for command in (["inspect"], ["inspect", "sensitivity", "mhla.layout=[2,2]"]):
        options = ["num_inputs=1", "--dry-run", f"output_dir={tmp_path / 'out'}"]
        assert main([*command, "model=someone/digits", *options]) == 0
        assert main([*command, "model=someone/letters", *options]) == 2
    said = capsys.readouterr()
    assert "model: someone/digits/transformer, DiTTransformer2DModel" in said.out
    assert "would measure 2 layers" in said.out
    errors = [line for line in said.err.splitlines() if "error:" in line]
    assert len(errors) == 2 and all(
        "someone/letters is not a folder here" in line for line in errors
    )
