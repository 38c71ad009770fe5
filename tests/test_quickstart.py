"""The quickstart in small: every file it promises, twice the same; the whole one is slow."""

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mhla_gen import ClassConditionalPipeline
from mhla_gen.cli import main
from mhla_gen.config import MHLAConfig, ModelConfig, QuickstartConfig, load_config
from mhla_gen.data.arrays import digits
from mhla_gen.evaluation import evaluate
from mhla_gen.evaluation.nearest import closest_pairs
from mhla_gen.quickstart import quickstart
from mhla_gen.quickstart.quickstart import evaluation, score_real, training_seconds
from mhla_gen.quickstart.report import next_commands
from mhla_gen.sampling import generate
from mhla_gen.sampling.sample_files import write_samples

PROMISED = [
    "config.yaml",
    "loss.png",
    "manifest.json",
    "metrics.json",
    "mixing.png",
    "pipeline",
    "samples.npz",
    "samples.png",
]


def tiny(folder):
    model = ModelConfig(
        num_layers=1, num_attention_heads=2, attention_head_dim=8, mhla=MHLAConfig(layout=(2, 2))
    )
    return QuickstartConfig(
        output_dir=str(folder),
        model=model,
        max_steps=4,
        batch_size=16,
        samples_per_class=7,
        num_inference_steps=2,
    )


def samples(folder):
    with np.load(folder / "samples.npz") as arrays:
        return arrays["arr_0"], arrays["labels"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("quickstart") / "run"
    quickstart(tiny(folder))
    return folder


def test_it_leaves_what_it_promises_and_twice_the_same(finished, tmp_path, capsys):
    folder = tmp_path / "run"
    quickstart(tiny(folder))
    printed = capsys.readouterr().out
    assert set(PROMISED) <= {path.name for path in folder.iterdir()}
    images, labels = samples(folder)
    assert images.shape == (70, 8, 8, 1) and images.dtype == np.uint8
    assert labels.tolist() == [c for c in range(10) for _ in range(7)]
    assert (samples(finished)[0] == images).all()
    for name in ("samples.png", "loss.png", "mixing.png"):
        assert np.asarray(Image.open(folder / name)).std() > 1
    assert load_config(folder / "config.yaml") == tiny(folder)

    metrics = json.loads((folder / "metrics.json").read_text())
    for arm in ("mhla", "linear"):
        assert 0 <= metrics[arm]["class_accuracy"] <= 1 and metrics[arm]["frechet_distance"] > 0
        assert f"{metrics[arm]['frechet_distance']:.2f}" in printed
    assert "linear attention, one block" in printed

    pipe = ClassConditionalPipeline.from_pretrained(folder / "pipeline")
    again = generate(
        pipe, labels, seed=0, batch_size=100, num_inference_steps=2, guidance_scale=1.5
    )
    assert (again == images).all()


def test_a_finished_one_is_shown_again_and_foreign_folders_are_refused(finished, tmp_path, capsys):
    config = tiny(finished)
    written = (finished / "samples.npz").stat().st_mtime_ns
    quickstart(config)
    assert "nothing was run" in capsys.readouterr().out
    assert (finished / "samples.npz").stat().st_mtime_ns == written
    with pytest.raises(FileExistsError, match="seed: found 0, asked for 1"):
        quickstart(replace(config, seed=1))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("precious")
    with pytest.raises(FileExistsError, match="did not write"):
        quickstart(replace(config, output_dir=str(tmp_path / "mine")))


def test_an_interrupted_one_goes_on_to_the_same_end(finished, tmp_path, monkeypatch):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(sys.modules[quickstart.__module__], "evaluate", interrupt)
        with pytest.raises(KeyboardInterrupt):
            quickstart(tiny(tmp_path / "parts"))
    assert not (tmp_path / "parts" / "metrics.json").exists()
    quickstart(tiny(tmp_path / "parts"))
    assert (samples(tmp_path / "parts")[0] == samples(finished)[0]).all()


def test_the_time_of_a_training_counts_what_came_before_an_interruption():
    log = [{"step": 10, "images_per_second": 40.0}, {"step": 15, "images_per_second": 20.0}]
    assert training_seconds(log, batch_size=8) == pytest.approx(10 * 8 / 40 + 5 * 8 / 20)


def test_a_dry_run_writes_nothing(tmp_path, capsys):
    quickstart(tiny(tmp_path / "run"), dry_run=True)
    text = capsys.readouterr().out
    assert "mhla model" in text and "linear model" in text and not (tmp_path / "run").exists()


def words_of(command):
    """What a shell makes of a command."""
    asked = ["sh", "-c", f"printf '%s\\0' {command}"]
    return subprocess.run(asked, capture_output=True, text=True, check=True).stdout.split("\0")[:-1]


def test_the_next_commands_are_real(finished, tmp_path, monkeypatch):
    """Read by a real shell, and run here: that programs start is tested with the command line."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    *commands, loading = map(words_of, next_commands(folder, 4))
    for (program, *words), setting in zip(
        commands, ("num_inference_steps=1", "max_steps=4"), strict=True
    ):
        assert Path(shutil.which(program)).samefile(Path(sys.executable).with_name("mhla-gen"))
        assert main([*words, setting]) == 0
    python, flag, code = loading
    assert Path(shutil.which(python)).samefile(sys.executable) and flag == "-c"
    exec(code, {})
    assert (tmp_path / "run-more" / "samples.png").is_file()
    assert (tmp_path / "run-longer" / "pipeline").is_dir()
    assert (tmp_path / "seven.png").is_file()


def test_scores_know_copies_noise_and_the_real_thing(tmp_path):
    real = digits()
    rng = np.random.default_rng(0)
    some = rng.choice(len(real), 200, replace=False)
    write_samples(tmp_path / "real.npz", [real.images], real.images.shape, real.labels)
    made = {
        "copies": real.images[some],
        "noise": rng.integers(0, 256, (200, 8, 8, 1), dtype=np.uint8),
    }
    scores = {}
    for name, images in made.items():
        (tmp_path / name).mkdir()
        write_samples(tmp_path / name / "samples.npz", [images], images.shape, real.labels[some])
        results = evaluate(evaluation(tiny(tmp_path), tmp_path / name))
        scores[name] = {result.metric: result.value for result in results}
    copies, noise = scores["copies"], scores["noise"]
    assert copies["copies"] == 1.0 and copies["accuracy"] > 0.95
    assert noise["copies"] == 0 and noise["accuracy"] < 0.3
    assert noise["fd"] > 10 * copies["fd"]
    pixels = torch.from_numpy(real.images.reshape(len(real), -1) / 255)
    distances = closest_pairs(pixels, real.labels)
    assert len(distances) == 10 and all(distance > 0 for distance in distances.values())
    baseline = score_real(real, 20, seed=0)
    assert baseline["frechet_distance_halves"] < baseline["frechet_distance_same_size"] < 1
    assert baseline["class_accuracy"] > 0.97


@pytest.mark.slow
def test_the_whole_quickstart_learns_the_digits(tmp_path):
    quickstart(QuickstartConfig(output_dir=str(tmp_path / "run")))
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert metrics["mhla"]["class_accuracy"] >= 0.9
    assert metrics["mhla"]["copy_share"] <= 0.02
    assert torch.isfinite(torch.tensor(metrics["mhla"]["frechet_distance"]))
