"""What a run needs later is missed before its first step, at its start and when it is resumed."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
from test_training_runs import scores_of, tiny_run
from test_video import wan_run
from tiny import tiny_clip_cache

from mhla_gen.config import PreviewConfig, RunEvaluationConfig
from mhla_gen.training import rehearse, train


@pytest.fixture
def scored(tmp_path):
    """Settings of a run that is evaluated at its end."""
    evaluation = scores_of(tmp_path, num_real=100, num_inference_steps=1)
    return tiny_run(tmp_path / "run", max_steps=4, evaluate_every=4, evaluation=evaluation)


def changed(config, **changes):
    return replace(config, evaluation=replace(config.evaluation, **changes))


def features(config, **changes):
    return changed(config, features=replace(config.evaluation.features, **changes))


WRONG = {
    "no such reference": lambda c: (changed(c, reference="nowhere.npz"), "nowhere.npz"),
    "no such weights": lambda c: (features(c, weights="nowhere.pt"), "nowhere.pt"),
    "another metric": lambda c: (changed(c, metrics=("fid",)), "fid cannot be measured"),
    "too few samples": lambda c: (
        changed(c, samples=PreviewConfig(num_images=3)),
        "the samples hold 3 of the 20 images",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_an_evaluation_that_cannot_be_ends_the_run_at_its_start(name, scored, tmp_path):
    wrong, message = WRONG[name](scored)
    for start in (rehearse, train):
        with pytest.raises((ValueError, OSError), match=message):
            start(wrong)
    assert not (tmp_path / "run" / "log.jsonl").exists()


def test_images_of_another_size_are_no_reference(scored, tmp_path):
    np.savez(tmp_path / "real.npz", arr_0=np.zeros((100, 16, 16, 3), np.uint8))
    with pytest.raises(ValueError, match="image size: samples 8 × 8, reference 16 × 16"):
        train(scored)


def test_it_is_missed_where_a_run_is_resumed_too(scored, tmp_path):
    half = replace(scored, max_steps=2, checkpoint_every=2, resume="latest")
    train(half)
    (tmp_path / "real.npz").unlink()
    longer = replace(half, max_steps=4)
    with pytest.raises((ValueError, OSError), match=r"real\.npz"):
        train(longer)
    steps = [json.loads(line)["step"] for line in (tmp_path / "run" / "log.jsonl").open()]
    assert max(steps) == 2


def test_the_autoencoder_and_text_encoder_are_opened_first(tmp_path):
    cache = tiny_clip_cache(tmp_path / "clips", clips=1)
    config = wan_run(tmp_path / "run", cache, {"save_text_encoder": True})
    shutil.rmtree(cache.parent / "pipeline" / "text_encoder")
    with pytest.raises((ValueError, OSError), match="has no text_encoder"):
        train(config)
    shutil.rmtree(cache.parent / "pipeline" / "vae")
    with pytest.raises((ValueError, OSError), match="pipeline"):
        train(wan_run(tmp_path / "run", cache))
    assert not (tmp_path / "run" / "log.jsonl").exists()


def test_clips_are_not_evaluated(tmp_path, monkeypatch):
    cache = tiny_clip_cache(tmp_path / "clips", clips=1)
    evaluation = RunEvaluationConfig(reference=str(tmp_path / "real.npz"))
    config = wan_run(tmp_path / "run", cache, evaluate_every=1, evaluation=evaluation)
    with pytest.raises(ValueError, match="class-conditional models of images; leave it out"):
        train(config)
    monkeypatch.setattr("mhla_gen.training.parallel.is_wandb_available", lambda: False)
    with pytest.raises(ValueError, match="report_to=wandb needs the package wandb"):
        rehearse(wan_run(tmp_path / "run", cache, report_to="wandb"))


def test_nothing_disturbs_the_bar_of_a_run_on_clips(tmp_path, capfd, recwarn):
    """Wan in mixed precision, with a text encoder that is loaded and saved while it trains."""
    cache = tiny_clip_cache(tmp_path / "clips", clips=1)
    wan = {"save_text_encoder": True}
    config = wan_run(tmp_path / "run", cache, wan, mixed_precision="bf16", checkpoint_every=1)
    capfd.readouterr()
    train(config)
    said = capfd.readouterr().err
    before, _, bar = said.partition("training: 1 process on cpu")
    assert "Loading weights" not in bar and "Writing" not in bar and "Warning" not in before + bar
    assert not [w for w in recwarn if "Mismatch dtype" in str(w.message)]
    assert "clips/s" in bar and "images/s" not in bar
    lines = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").open()]
    assert lines[-1]["clips_per_second"] > 0 and "images_per_second" not in lines[-1]
