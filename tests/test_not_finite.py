"""A model that gives NaN or infinity: sampling stops and names the sample, training goes on."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from test_training import tiny_run
from tiny import tiny_wan_pipeline
from tiny_sampling import set_of, tiny_pipeline

import mhla_gen.sampling.contact_sheet
import mhla_gen.training.previews
from mhla_gen.config import PreviewConfig, SampleConfig
from mhla_gen.errors import NotFiniteError
from mhla_gen.sampling import sample
from mhla_gen.training import train


def spoiled(pipe, value, label=None):
    """A pipeline whose model gives `value` in one place, for one class only if there is a label."""
    inner = pipe.transformer.forward

    def forward(*args, **kwargs):
        output = inner(*args, **kwargs)
        rows = slice(None) if label is None else kwargs["class_labels"] == label
        output[0][rows, ..., 0, 0] = value
        return output

    pipe.transformer.forward = forward
    return pipe


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_a_sample_set_stops_at_the_first_bad_sample(value, tmp_path, monkeypatch):
    tiny_pipeline(class_names=("ant", "bee\n", "cat")).save_pretrained(tmp_path / "pipe")
    load = mhla_gen.ClassConditionalPipeline.from_pretrained
    monkeypatch.setattr(
        mhla_gen.ClassConditionalPipeline,
        "from_pretrained",
        lambda *args, **kwargs: spoiled(load(*args, **kwargs), value, label=1),
    )
    config = set_of(tmp_path / "set", tmp_path / "pipe", samples_per_class=2, model_batch_size=2)
    for _ in range(2):
        with pytest.raises(NotFiniteError, match=r"sample 2 \(bee, seed \d+\) is not finite"):
            sample(config)
        assert not (tmp_path / "set" / "samples.npz").exists()
    monkeypatch.undo()
    # What was drawn before stays, and the set is completed by a model that can.
    sample(config)
    assert (tmp_path / "set" / "samples.npz").exists()


def test_a_weight_that_is_nan_stops_a_set_of_prompts(tmp_path):
    pipe = tiny_wan_pipeline(text=True)
    with torch.no_grad():
        next(pipe.vae.decoder.parameters()).view(-1)[0] = torch.nan
    pipe.save_pretrained(tmp_path / "pipe")
    config = SampleConfig(
        pipeline=str(tmp_path / "pipe"),
        output_dir=str(tmp_path / "set"),
        prompts="a cat",
        **{"height": 32, "width": 48, "num_frames": 5, "num_inference_steps": 1},
    )
    with pytest.raises(NotFiniteError, match=r"sample 0 \(a cat, seed"):
        sample(config)


def broken(*args, **kwargs):
    raise RuntimeError("no\nfont")


def test_a_picture_that_cannot_be_drawn_costs_no_samples(tmp_path, monkeypatch, capsys):
    tiny_pipeline().save_pretrained(tmp_path / "pipe")
    monkeypatch.setattr("mhla_gen.sampling.sample_files.contact_sheet", broken)
    config = set_of(tmp_path / "set", tmp_path / "pipe", samples_per_class=1, card=True)
    sample(config)
    said = capsys.readouterr().err
    assert "contact sheet could not be drawn (RuntimeError: no font); the samples are" in said
    assert (tmp_path / "set" / "manifest.json").exists()
    assert not (tmp_path / "set" / "samples.png").exists()
    assert "![samples]" not in (tmp_path / "pipe" / "README.md").read_text()


def test_a_preview_that_cannot_be_drawn_costs_no_training(tmp_path, monkeypatch, capsys):
    shown = {"sample_every": 2, "samples": PreviewConfig(num_images=2, num_inference_steps=1)}
    plain = tiny_run(tmp_path / "plain", sample_every=0)
    train(plain)
    monkeypatch.setattr(mhla_gen.training.previews, "tiled", broken)
    train(replace(plain, output_dir=str(tmp_path / "run"), **shown))
    assert "preview of step 2 could not be drawn (RuntimeError: no font)" in capsys.readouterr().err
    monkeypatch.undo()
    # Nor one whose samples are not finite; and the model trains on in its training mode.
    call = mhla_gen.ClassConditionalPipeline.__call__

    def with_nan(*args, **kwargs):
        found = call(*args, **kwargs)
        found.images[1, 0, 0] = np.nan
        return found

    monkeypatch.setattr(mhla_gen.ClassConditionalPipeline, "__call__", with_nan)
    train(replace(plain, output_dir=str(tmp_path / "nan"), **shown))
    assert "sample 1 of the EMA weights is not finite" in capsys.readouterr().err
    weights = [
        (tmp_path / name / "pipeline/transformer/diffusion_pytorch_model.safetensors").read_bytes()
        for name in ("plain", "run", "nan")
    ]
    assert weights[0] == weights[1] == weights[2]
