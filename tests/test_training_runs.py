"""What a run survives and shows: signals, full disks, NaN, other models, previews, its log."""

import json
import math
import os
import pickle
import re
import resource
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from commands import finish, launch
from diffusers import FlowMatchEulerDiscreteScheduler
from PIL import Image
from ranks import torchrun
from test_training import (
    TINY,
    assert_same,
    assert_same_state,
    log_of,
    tiny_run,
    trained,
)
from tiny import tiny_autoencoder, tiny_dit

import mhla_gen
from mhla_gen.cli import main
from mhla_gen.config import (
    AutoencoderConfig,
    CacheConfig,
    DataConfig,
    DistillConfig,
    MHLAConfig,
    ModelConfig,
    ObjectiveConfig,
    PreviewConfig,
    RunEvaluationConfig,
    StageConfig,
    save_config,
)
from mhla_gen.config.evaluation import FeaturesConfig
from mhla_gen.data.arrays import digits
from mhla_gen.data.caching.build import build_cache
from mhla_gen.errors import UserError
from mhla_gen.runtime.compiling import compile_model, repeated_blocks
from mhla_gen.sampling.saved_pipeline import load_pipeline
from mhla_gen.training import rehearse, train
from mhla_gen.training.checkpoints import load_latest, save_checkpoint
from mhla_gen.training.conditioning import ClassLabels
from mhla_gen.training.log import mean_by_timestep, read_log
from mhla_gen.training.previews import mixing_picture, tiled
from mhla_gen.training.run_folder import checkpoints, pipeline_steps
from mhla_gen.training.stopping import Stopped
from mhla_gen.training.throughput import specified_flops, step_flops
from mhla_gen.training.training_run import build_run


def wait_for(path, process):
    # A log is empty until all processes have done a step.
    while not path.exists() or not path.stat().st_size:
        assert process.poll() is None, process.communicate()[1]
        try:
            process.wait(0.05)
        except subprocess.TimeoutExpired:
            continue


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_is_answered_by_a_checkpoint(number, tmp_path, monkeypatch, capsys):
    config = tiny_run(tmp_path / "stopped", max_steps=8)
    step = mhla_gen.training.loop.Run.step

    def signalled(run, done, parts):
        if done == 2:
            os.kill(os.getpid(), number)
        return step(run, done, parts)

    handlers = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with monkeypatch.context() as patch:
        patch.setattr(mhla_gen.training.loop.Run, "step", signalled)
        with pytest.raises(Stopped, match=rf"{number.name} after step 3; wrote .*checkpoint-3"):
            train(config)
        save_config(replace(config, output_dir=str(tmp_path / "again")), tmp_path / "run.yaml")
        assert main(["train", str(tmp_path / "run.yaml")]) == 130
        said = capsys.readouterr().err
        assert f"stopped by {number.name} after step 3" in said
        assert "the same command with resume=latest resumes" in said
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == handlers
    assert list(checkpoints(tmp_path / "stopped")) == [3]
    straight = trained(tiny_run(tmp_path / "straight", max_steps=8))
    assert_same(straight, trained(replace(config, resume="latest")))


@pytest.mark.slow
def test_a_signal_to_the_launcher_stops_both_processes(tmp_path):
    config = tiny_run(tmp_path / "run", max_steps=100_000, log_every=1)
    save_config(config, tmp_path / "run.yaml")
    process = launch("train", tmp_path / "run.yaml", processes=2)
    wait_for(tmp_path / "run" / "log.jsonl", process)
    process.send_signal(signal.SIGTERM)
    _, errors = finish(process, fails=True)
    (done,) = checkpoints(tmp_path / "run")
    assert f"stopped by SIGTERM after step {done}" in errors
    assert "training: 2 processes on cpu" in errors
    further = "resume=latest", f"max_steps={done + 1}"
    finish(launch("train", tmp_path / "run.yaml", *further, processes=2))


def contents_of(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_full_disk_leaves_the_last_checkpoint(tmp_path):
    config = tiny_run(tmp_path / "a")
    run = build_run(config)
    Path(config.output_dir).mkdir()
    save_checkpoint(run, 2)
    before = contents_of(tmp_path / "a" / "checkpoint-2")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    # No file may be longer than this: every writer gets a real error in the midst of its work.
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        with pytest.raises(
            OSError,
            match=r"checkpoint-4 cannot be written .* MB are free .* checkpoint, .*checkpoint-2",
        ):
            save_checkpoint(run, 4)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert list(checkpoints(tmp_path / "a")) == [2] and len(list((tmp_path / "a").iterdir())) == 1
    after = contents_of(tmp_path / "a" / "checkpoint-2")
    assert after == before and load_latest(run) == 2


def test_a_checkpoint_is_replaced_without_a_moment_without_one(tmp_path, monkeypatch):
    run = build_run(tiny_run(tmp_path / "a"))
    (tmp_path / "a").mkdir()
    save_checkpoint(run, 2)
    mark = tmp_path / "a" / "checkpoint-2" / "run.json"
    mark.write_text(mark.read_text() + "\n")
    first = mark.read_text()
    replace_path = os.replace

    def stopped(source, target):
        if Path(target).name == "checkpoint-2" and source.name.endswith(".partial"):
            raise KeyboardInterrupt
        replace_path(source, target)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(os, "replace", stopped)
        save_checkpoint(run, 2)
    # The one that was set aside is back, and what else was left is gone.
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["checkpoint-2"]
    assert load_latest(run) == 2 and mark.read_text() == first
    save_checkpoint(run, 2)
    assert mark.read_text() == first.removesuffix("\n")
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["checkpoint-2"]


def test_half_a_checkpoint_is_never_taken(tmp_path, monkeypatch):
    run = build_run(tiny_run(tmp_path / "a", keep_checkpoints=1))
    (tmp_path / "a").mkdir()
    save_checkpoint(run, 2)

    def killed(path, **_):
        (path / "model.safetensors").unlink()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("mhla_gen.files.temporary.shutil.rmtree", killed)
        save_checkpoint(run, 4)
    assert list(checkpoints(tmp_path / "a")) == [4]
    assert len(list((tmp_path / "a").iterdir())) == 2
    assert load_latest(run) == 4
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["checkpoint-4"]


@pytest.mark.parametrize(("checkpoint_every", "last"), [(0, "no checkpoint"), (1, "checkpoint-2")])
def test_what_is_not_finite_is_named(checkpoint_every, last, tmp_path, monkeypatch):
    config = tiny_run(tmp_path / "a", checkpoint_every=checkpoint_every, log_every=5)
    images = digits()
    step = mhla_gen.training.loop.Run.step

    def poisoned(run, number, parts):
        if number == 2:
            parts[0]["samples"][5] = torch.nan
        return step(run, number, parts)

    monkeypatch.setattr(mhla_gen.training.loop.Run, "step", poisoned)
    name = images.describe(build_run(config).order.micro_batch(2)[5])
    message = rf"loss of step 3 is not finite for {name}; .*{last}; start again in another output"
    with pytest.raises(ValueError, match=message):
        train(config)
    assert max(checkpoints(tmp_path / "a"), default=2) == 2


def test_a_checkpoint_of_another_model_is_refused_by_name(tmp_path):
    config = tiny_run(tmp_path / "a", max_steps=2, checkpoint_every=2)
    train(config)
    other = build_run(replace(config, model=replace(TINY, num_layers=1)))
    message = r"checkpoint-2 is a checkpoint of another model \(transformer_blocks\.1.*nothing"
    with pytest.raises(ValueError, match=message):
        load_latest(other)
    wider = build_run(replace(config, model=replace(TINY, attention_head_dim=4)))
    with pytest.raises(ValueError, match=r"found \[16\], the model has \[8\]"):
        load_latest(wider)


def change(facts, **changes):
    """Change facts in a file, by their names: any digits may stand in a digest, too."""
    facts.write_text(json.dumps(json.loads(facts.read_text()) | changes))


def test_data_that_changed_are_refused(tmp_path):
    config = tiny_run(tmp_path / "a", max_steps=2, checkpoint_every=2)
    train(config)
    change(tmp_path / "a" / "checkpoint-2" / "run.json", num_samples=1800)
    with pytest.raises(ValueError, match="trained on 1800 samples, but the data are 1797"):
        train(replace(config, resume="latest", max_steps=3))


def test_a_finished_run_is_not_run_again_and_can_be_extended(tmp_path, capsys):
    # Shorter than checkpoint_every, and no multiple of it.
    for steps, every in ((3, 20), (5, 2)):
        folder = tmp_path / str(every)
        settings = {"checkpoint_every": every, "log_every": 1, "resume": "latest"}
        config = tiny_run(folder, max_steps=steps, **settings)
        train(config)
        assert max(checkpoints(folder)) == steps
        before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
        assert main(["train", str(folder / "config.yaml")]) == 0
        printed = capsys.readouterr()
        assert f"all {steps} steps are done; nothing was run" in printed.err
        assert f"mhla-gen sample {folder / 'pipeline'}" in printed.out
        assert before == {path: path.stat().st_mtime_ns for path in folder.rglob("*")}

        weights = trained(replace(config, max_steps=8))
        straight = tiny_run(tmp_path / f"straight-{every}", max_steps=8, **settings)
        assert_same(weights, trained(straight))
        assert log_of(folder) == log_of(tmp_path / f"straight-{every}")
        # Killed before it saved the pipeline, of which that of fewer steps is still there.
        change(folder / "pipeline" / "run.json", step=steps)
        weights_file = folder / "pipeline" / "transformer" / "diffusion_pytorch_model.safetensors"
        whole = weights_file.read_bytes()
        weights_file.write_bytes(b"old")
        train(replace(config, max_steps=8))
        assert weights_file.read_bytes() == whole
        with pytest.raises(
            FileExistsError, match=r"has already done 8 steps, more than max_steps=7"
        ):
            train(replace(config, max_steps=7))


def test_a_run_without_checkpoints_is_finished_too(tmp_path, capsys):
    config = tiny_run(tmp_path / "a", max_steps=1, resume="latest")
    train(config)
    assert not checkpoints(tmp_path / "a")
    train(config)
    assert "already finished" in capsys.readouterr().err


def test_broken_images_are_listed_in_the_folder_of_the_run(tmp_path):
    for name in ("ant", "bee"):
        (tmp_path / "images" / name).mkdir(parents=True)
        for i in range(12):
            Image.new("RGB", (8, 8), (i, 0, 0)).save(tmp_path / "images" / name / f"{i:02d}.png")
    for i in range(11):
        (tmp_path / "images" / "bee" / f"{i:02d}.png").write_text("junk")
    data = DataConfig(source="folder", path=str(tmp_path / "images"), image_size=8)
    train(tiny_run(tmp_path / "run", data=data))
    lines = (tmp_path / "run" / "quarantine.jsonl").read_text().splitlines()
    assert len(lines) == 11 and "bee/00.png" in json.loads(lines[0])["name"]


def test_a_run_stopped_before_its_previews_makes_them_when_it_goes_on(tmp_path):
    samples = PreviewConfig(num_images=2, num_inference_steps=2)
    config = tiny_run(
        tmp_path / "run", max_steps=2, checkpoint_every=2, sample_every=2, samples=samples
    )
    train(config)
    previews = sorted((tmp_path / "run" / "previews").iterdir())
    before = [path.read_bytes() for path in previews]
    assert len(before) == 2
    for path in previews:
        path.unlink()
    shutil.rmtree(tmp_path / "run" / "pipeline")
    train(replace(config, resume="latest"))
    assert [path.read_bytes() for path in previews] == before
    for path in previews:
        path.write_bytes(b"seen")
    shutil.rmtree(tmp_path / "run" / "pipeline")
    train(replace(config, resume="latest"))
    assert {path.read_bytes() for path in previews} == {b"seen"}


@pytest.mark.parametrize("objective", ["flow_matching", "ddpm"])
def test_previews_do_not_touch_the_training(objective, tmp_path):
    settings = {"objective": ObjectiveConfig(name=objective), "ema_decay": 0.5}
    plain = trained(tiny_run(tmp_path / "plain", **settings))
    shown = tiny_run(
        tmp_path / "shown",
        **settings,
        sample_every=3,
        samples=PreviewConfig(num_images=5, num_inference_steps=2, batch_size=3),
        report_to="tensorboard",
    )
    assert_same(plain, trained(shown))
    assert log_of(tmp_path / "plain") == log_of(tmp_path / "shown")
    previews = tmp_path / "shown" / "previews"
    names = [f"{kind}-{step:07d}.png" for kind in ("mixing", "samples") for step in (3, 6)]
    assert sorted(path.name for path in previews.iterdir()) == names
    assert Image.open(previews / names[2]).size == (28, 18)
    assert list((tmp_path / "shown" / "tensorboard").glob("events*"))


def test_latents_become_pictures_in_the_end(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (12, 16, 16, 3), dtype=np.uint8)
    np.savez(tmp_path / "images.npz", arr_0=pixels, labels=np.arange(12) % 3)
    tiny_autoencoder().save_pretrained(tmp_path / "vae")
    data = DataConfig(source="npz", path=str(tmp_path / "images.npz"), horizontal_flip=True)
    vae = AutoencoderConfig(path=str(tmp_path / "vae"))
    cache = tmp_path / "cache"
    build_cache(CacheConfig(output_dir=str(cache), data=data, vae=vae, device="cpu"))
    config = tiny_run(
        tmp_path / "run",
        data=DataConfig(source="cache", path=str(cache), horizontal_flip=True),
        model=replace(TINY, patch_size=1),
        objective=ObjectiveConfig(name="ddpm"),
        sample_every=6,
        samples=PreviewConfig(num_images=3, num_inference_steps=2),
    )
    saved = mhla_gen.ClassConditionalPipeline.from_pretrained(train(config))
    assert saved.transformer.config.out_channels == 2 * saved.transformer.config.in_channels
    images = saved([0, 2], num_inference_steps=2, output_type="np").images
    assert images.shape == (2, 16, 16, 3) and np.isfinite(images).all()
    assert Image.open(tmp_path / "run" / "previews" / "samples-0000006.png").size == (34, 34)
    (tmp_path / "vae").rename(tmp_path / "moved")
    with pytest.raises((ValueError, FileNotFoundError), match="vae"):
        train(replace(config, output_dir=str(tmp_path / "other")))


class Means(torch.nn.Module):
    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        return pixels.float().mean((2, 3))


def scores_of(folder, num_real, num_inference_steps):
    """Evaluation of a run on digits, by the means of their channels."""
    np.savez(folder / "real.npz", arr_0=digits().images[:num_real])
    torch.jit.script(Means()).save(str(folder / "means.pt"))
    return RunEvaluationConfig(
        reference=str(folder / "real.npz"),
        metrics=("fd",),
        samples=PreviewConfig(num_images=20, num_inference_steps=num_inference_steps),
        features=FeaturesConfig(
            extractor="torchscript",
            trust=True,
            weights=str(folder / "means.pt"),
            cache_dir=str(folder / "features"),
        ),
    )


def test_samples_are_scored_in_between(tmp_path):
    evaluation = scores_of(tmp_path, num_real=200, num_inference_steps=2)
    train(tiny_run(tmp_path / "run", evaluate_every=3, evaluation=evaluation))
    for step in (3, 6):
        folder = tmp_path / "run" / "evaluations" / f"{step:07d}"
        metrics = json.loads((folder / "metrics.json").read_text())
        samples = np.load(folder / "samples.npz")["arr_0"]
        # Three equal channels, so the distance of two normal distributions along one line.
        grey = [pixels.mean((1, 2, 3)) for pixels in (samples, digits().images[:200])]
        means, stds = ([f(values) for values in grey] for f in (np.mean, partial(np.std, ddof=1)))
        expected = 3 * ((means[0] - means[1]) ** 2 + (stds[0] - stds[1]) ** 2)
        assert metrics["metrics"]["fd"]["value"] == pytest.approx(expected, rel=1e-4)
        assert len(samples) == 20
    with pytest.raises(ValueError, match=r"needs evaluation\.reference"):
        tiny_run(tmp_path / "other", evaluate_every=3)


def test_a_line_of_the_log_says_what_happened(tmp_path):
    train(tiny_run(tmp_path / "a"))
    lines = read_log(tmp_path / "a" / "log.jsonl")
    assert [line["step"] for line in lines] == [2, 4, 6]
    for line in lines:
        assert line["grad_norm"] > 0 and line["images_per_second"] > 0
        assert set(line["loss_by_timestep"]) <= {f"{t:03d}" for t in range(0, 1000, 100)}


def test_the_speed_is_that_of_steps_alone(tmp_path, monkeypatch):
    clock = SimpleNamespace(now=0)

    def takes(seconds, call):
        def timed(*arguments):
            clock.now += seconds
            return call(*arguments)

        return timed

    own = SimpleNamespace(perf_counter=lambda: clock.now)
    monkeypatch.setattr("mhla_gen.training.log.time", own)
    step = takes(2, mhla_gen.training.loop.Run.step)
    monkeypatch.setattr(mhla_gen.training.loop.Run, "step", step)
    previews = takes(100, lambda run, done: None)
    monkeypatch.setattr("mhla_gen.training.loop.write_previews", previews)
    train(tiny_run(tmp_path, max_steps=3, log_every=3, sample_every=1, batch_size=4))
    (line,) = read_log(tmp_path / "log.jsonl")
    # Three steps of four images, of two seconds each; two previews came before the line.
    assert line["images_per_second"] == 4 / 2 and clock.now == 3 * 2 + 3 * 100


def test_losses_are_noted_by_timestep():
    losses, timesteps = torch.tensor([1.0, 2.0, 4.0, 8.0]), torch.tensor([0, 99.9, 100, 1000])
    assert mean_by_timestep(losses, timesteps) == {"000": 1.5, "100": 4.0, "900": 8.0}


def test_pictures_show_every_matrix_and_image():
    matrices = [np.eye(4), np.full((4, 4), 0.5), np.zeros((4, 4))]
    picture = mixing_picture(matrices)
    assert picture.shape == (130, 130, 3) and picture.dtype == np.uint8
    assert (picture[66:, :64] == picture[66, 0]).all() and (picture[66:, 66:] == 255).all()
    grey = tiled([np.full((3, 5, 1), 7, np.uint8)] * 2)
    assert grey.shape == (3, 12, 3) and (grey[:, :5] == 7).all()


@pytest.mark.parametrize("attention", ["softmax", "mhla"])
def test_operations_are_counted(attention):
    model = tiny_dit(num_layers=2)
    n, d, m = 16, 16, 4
    inner = 2 * (4 * n * n * d)
    if attention == "mhla":
        mhla_gen.inject(model, mhla_gen.MHLAConfig(layout=(2, 2), conv=False, gate=False))
        inner = 2 * (2 * n * d * 8 * 2 + 2 * m * m * 2 * 8 * 8)
    before = {name: p.clone() for name, p in model.named_parameters()}
    shape, sample = (4, 8, 8), {"labels": torch.zeros(3, dtype=torch.long)}
    counted = step_flops(model, ClassLabels(10), sample, shape)
    per_token = 2 * (4 * d * d + 8 * d * d)
    embedder = 2 * (256 * d + d * d)
    per_image = 3 * embedder + 2 * 2 * d * 6 * d + 2 * d * 2 * d
    patches = 2 * n * (4 * 4 * d) * 2
    expected = 3 * (2 * n * per_token + inner + per_image + patches)
    # Two forms of MHLA's sums differ by what they cost, which is little here.
    assert counted == pytest.approx(expected, rel=0 if attention == "softmax" else 0.1)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_only_mhla_is_trained_if_asked(tmp_path):
    tiny_dit(in_channels=1).save_pretrained(tmp_path / "model")
    model = replace(TINY, num_layers=None, num_attention_heads=None, attention_head_dim=None)
    model = replace(model, pretrained=str(tmp_path / "model"), trainable="mhla")
    weights = trained(tiny_run(tmp_path / "run", model=model, ema_decay=0.0))
    base = tiny_dit().from_pretrained(tmp_path / "model").state_dict()
    assert all(torch.equal(weights[key], base[key]) for key in base)
    assert any(weights[key].any() for key in weights if key.endswith("mhla.gate.weight"))
    adapted = mhla_gen.load_adapter(
        tiny_dit().from_pretrained(tmp_path / "model"), tmp_path / "run"
    )
    assert all(torch.equal(value, weights[key]) for key, value in adapted.state_dict().items())


@pytest.mark.parametrize("how", ["regional", "whole"])
def test_regional_compiles_each_block_and_whole_the_model(how, monkeypatch):
    model, compiled = tiny_dit(), []

    def compile(function, **_):
        compiled.append(type(function.__self__).__name__)
        return function

    monkeypatch.setattr(torch, "compile", compile)
    compile_model(model, how)
    assert repeated_blocks(model) == ("BasicTransformerBlock",)
    blocks = ["BasicTransformerBlock"] * 3
    assert compiled == (blocks if how == "regional" else ["DiTTransformer2DModel"])


@pytest.mark.slow
def test_a_compiled_run_learns_the_same(tmp_path):
    plain = log_of(Path(trained_folder(tmp_path / "plain", "none")))
    compiled = log_of(Path(trained_folder(tmp_path / "compiled", "regional")))
    assert [loss for _, loss in compiled] == pytest.approx([loss for _, loss in plain], rel=1e-4)


def trained_folder(folder, how):
    train(tiny_run(folder, compile=how, sample_every=3, samples=PreviewConfig(num_images=2)))
    return folder


def test_a_rehearsal_says_what_to_expect(tmp_path):
    summary = rehearse(tiny_run(tmp_path / "a", report_to="tensorboard"))
    for part in ("M trained", "GFLOP per sample", "s per step of 8", "take about"):
        assert part in summary
    assert not (tmp_path / "a").exists()


def test_a_rehearsal_on_a_cpu_times_the_batch_of_the_run_if_that_takes_seconds(
    tmp_path, monkeypatch
):
    config = tiny_run(tmp_path / "a", batch_size=256, gradient_accumulation_steps=2)
    # Whatever a step takes on this machine, it is affordable; below it never is.
    monkeypatch.setattr("mhla_gen.training.rehearsal._AFFORDED", math.inf)
    summary = rehearse(config)
    seconds = float(re.search(r"([\d.]+) s per step of 256", summary)[1])
    hours, minutes, rest = map(int, re.search(r"about (\d+):(\d+):(\d+)", summary).groups())
    total = 3600 * hours + 60 * minutes + rest
    expected = seconds * config.max_steps
    # The seconds are said to three digits, so to 0.5 %, the total to whole seconds.
    assert abs(total - expected) < 0.6 + 0.006 * expected
    monkeypatch.setattr("mhla_gen.training.rehearsal._AFFORDED", 0.0)
    assert "s per step of 8;" in rehearse(config)


@pytest.mark.parametrize("stages", [(), pytest.param(("layers", "output"), marks=pytest.mark.slow)])
def test_two_processes_rehearse_as_one(stages, tmp_path, capsys):
    config = tiny_run(tmp_path / "run", batch_size=4)
    if stages:
        mhla_gen.ClassConditionalPipeline(
            transformer=tiny_dit(in_channels=1, patch_size=1),
            scheduler=FlowMatchEulerDiscreteScheduler(),
        ).save_pretrained(tmp_path / "teacher")
        distillation = DistillConfig(
            teacher=str(tmp_path / "teacher"),
            stages=[StageConfig(kind=kind, steps=2) for kind in stages],
        )
        model = ModelConfig(mhla=MHLAConfig(layout=(2, 2)))
        config = replace(config, model=model, distill=distillation)
    save_config(config, tmp_path / "run.yaml")
    assert main(["train", str(tmp_path / "run.yaml"), "--dry-run"]) == 0
    alone = capsys.readouterr().out
    together = torchrun(2, "-m", "mhla_gen.cli", "train", tmp_path / "run.yaml", "--dry-run")
    first, second = (
        [float(loss) for loss in re.findall(r"first loss ([\d.]+)", said)]
        for said in (alone, together)
    )
    # Said once, of the batch of both.
    assert len(second) == len(stages or "1") == together.count("per step of 4")
    assert second == pytest.approx(first, abs=2e-4)
    assert not (tmp_path / "run").exists()


def test_the_table_of_devices_takes_whole_names():
    assert specified_flops("NVIDIA H100 80GB HBM3") == 989e12
    assert specified_flops("NVIDIA H100 PCIe") == 756e12
    assert specified_flops("NVIDIA A100-SXM4-80GB") == 312e12
    assert specified_flops("NVIDIA L40") is None and specified_flops("NVIDIA L4") == 121e12


@pytest.mark.skipif(find_spec("wandb") is not None, reason="needs a tracker that is missing")
def test_a_tracker_that_is_missing_is_named(tmp_path):
    with pytest.raises(ValueError, match="report_to=wandb needs the package wandb"):
        train(tiny_run(tmp_path / "a", report_to="wandb"))


@pytest.mark.skipif(find_spec("wandb") is None, reason="needs wandb")
def test_wandb_gets_curves_and_pictures_and_does_not_touch_the_training(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    plain = trained(tiny_run(tmp_path / "plain"))
    previews = {"sample_every": 3, "samples": PreviewConfig(num_images=2, num_inference_steps=2)}
    assert_same(plain, trained(tiny_run(tmp_path / "shown", report_to="wandb", **previews)))
    assert log_of(tmp_path / "plain") == log_of(tmp_path / "shown")
    (run,) = (tmp_path / "shown" / "wandb").glob("offline-run-*")
    assert [path.stat().st_size > 0 for path in run.glob("run-*.wandb")] == [True]
    pictures = [path.name.split("_")[0] for path in run.rglob("media/images/*.png")]
    assert sorted(pictures) == ["mixing", "mixing", "samples", "samples"]


def test_processes_that_do_not_know_each_other_are_refused(tmp_path, monkeypatch):
    # What a launcher sets; on a CPU accelerate ignores it unless it is told to use the CPU.
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="2 processes were started but accelerate sees 1"):
        train(tiny_run(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_sharing_a_model_needs_processes(tmp_path):
    with pytest.raises(ValueError, match="splits a model among processes, found only one"):
        train(tiny_run(tmp_path / "a", parallelism="fsdp"))


@pytest.mark.slow
@pytest.mark.parametrize("parallelism", ["ddp", "fsdp"])
def test_two_processes_train_and_resume_as_one(parallelism, tmp_path):
    exact = {"exact": 0.3, "exact_tile": (2, 2), "exact_top": 1, "learned_features": True}
    settings = {
        "model": replace(TINY, mhla=replace(TINY.mhla, **exact)),
        "mhla_learning_rate": 1e-3,
        "max_steps": 6,
        "checkpoint_every": 3,
        "log_every": 3,
        "gradient_accumulation_steps": 2,
        "sample_every": 2,
        "samples": PreviewConfig(num_images=3, num_inference_steps=2),
        "ema_decay": 0.5,
    }
    one = trained(tiny_run(tmp_path / "one", **settings))
    save_config(
        tiny_run(tmp_path / "two", **settings, parallelism=parallelism, resume="latest"),
        tmp_path / "run.yaml",
    )
    finish(launch("train", tmp_path / "run.yaml", processes=2))
    folder = tmp_path / "two"
    whole = mhla_gen.ClassConditionalPipeline.from_pretrained(folder / "pipeline")
    two = whole.transformer.state_dict()
    for key in one:
        torch.testing.assert_close(two[key], one[key], atol=2e-5, rtol=0)
    lines = [read_log(path / "log.jsonl") for path in (tmp_path / "one", folder)]
    for own, other in zip(*lines, strict=True):
        assert other["loss"] == pytest.approx(own["loss"], rel=1e-5)
        assert other["loss_by_timestep"] == pytest.approx(own["loss_by_timestep"], rel=1e-4)
    # Killed after step 3, as far as its folder can tell.
    for path in (folder / "checkpoint-6", folder / "pipeline"):
        path.rename(tmp_path / path.name)
    finish(launch("train", tmp_path / "run.yaml", processes=2))
    resumed = mhla_gen.ClassConditionalPipeline.from_pretrained(folder / "pipeline")
    assert_same(two, resumed.transformer.state_dict())
    assert_same_state(tmp_path / "checkpoint-6", folder / "checkpoint-6")


@pytest.mark.slow
def test_a_run_that_was_killed_goes_on_exactly(tmp_path):
    settings = {"max_steps": 40, "checkpoint_every": 20, "log_every": 3, "ema_decay": 0.9}
    # Large enough a batch that the signal comes long before the last step.
    settings |= {"batch_size": 1024, "resume": "latest"}
    for name in ("straight", "killed"):
        save_config(tiny_run(tmp_path / name, **settings), tmp_path / f"{name}.yaml")
    finish(launch("train", tmp_path / "straight.yaml"))
    process = launch("train", tmp_path / "killed.yaml")
    wait_for(tmp_path / "killed" / "checkpoint-20", process)
    process.send_signal(signal.SIGKILL)
    assert process.wait(60) == -signal.SIGKILL
    folders = tmp_path / "straight", tmp_path / "killed"
    assert list(checkpoints(folders[1])) == [20] and not (folders[1] / "pipeline").exists()
    finish(launch("train", tmp_path / "killed.yaml"))
    for step in (20, 40):
        assert_same_state(*(folder / f"checkpoint-{step}" for folder in folders))
    pipelines = [
        mhla_gen.ClassConditionalPipeline.from_pretrained(folder / "pipeline").transformer
        for folder in folders
    ]
    assert_same(*(model.state_dict() for model in pipelines))
    logs = [read_log(folder / "log.jsonl") for folder in folders]
    for line in (*logs[0], *logs[1]):
        del line["images_per_second"]
    assert logs[0] == logs[1] and [line["step"] for line in logs[0]] == [*range(3, 40, 3), 40]


@pytest.mark.slow
def test_a_shared_checkpoint_of_another_model_is_refused_by_name(tmp_path):
    config = tiny_run(tmp_path / "a", max_steps=2, checkpoint_every=2, parallelism="fsdp")
    save_config(config, tmp_path / "run.yaml")
    finish(launch("train", tmp_path / "run.yaml", processes=2))
    # Its settings say so too, and are asked first.
    (tmp_path / "a" / "config.yaml").unlink()
    other = replace(config, model=replace(TINY, num_layers=1), resume="latest", max_steps=3)
    save_config(other, tmp_path / "a" / "config.yaml")
    save_config(other, tmp_path / "run.yaml")
    _, errors = finish(launch("train", tmp_path / "run.yaml", processes=2), fails=True)
    assert "checkpoint-2 is a checkpoint of another model (trans" in errors
    assert "transformer_blocks.1.attn1.mhla.conv.weight: found [16, 1, 3, 3]" in errors


@pytest.mark.slow
def test_shared_and_whole_models_compute_in_the_same_arithmetic(tmp_path):
    losses = {}
    for precision, parallelism in (("bf16", "ddp"), ("bf16", "fsdp"), ("fp32", "fsdp")):
        folder = tmp_path / f"{precision}-{parallelism}"
        config = tiny_run(folder, mixed_precision=precision, parallelism=parallelism)
        save_config(config, tmp_path / "run.yaml")
        finish(launch("train", tmp_path / "run.yaml", processes=2))
        losses[precision, parallelism] = log_of(folder)
    assert losses["bf16", "ddp"] == losses["bf16", "fsdp"] != losses["fp32", "fsdp"]


@pytest.mark.gpu
@pytest.mark.parametrize("how", ["none", "regional"])
def test_a_run_on_a_gpu_learns_in_bf16(how, tmp_path):
    model = replace(TINY, attention_head_dim=16)
    config = tiny_run(
        tmp_path / "a",
        model=model,
        max_steps=40,
        batch_size=64,
        learning_rate=3e-3,
        mixed_precision="bf16",
        compile=how,
        sample_every=20,
        log_every=10,
    )
    train(config)
    lines = read_log(tmp_path / "a" / "log.jsonl")
    assert lines[-1]["loss"] < 0.9 * lines[0]["loss"] and lines[-1]["memory_gib"] > 0


@pytest.fixture(scope="module")
def two_checkpoints(tmp_path_factory):
    """A run with checkpoints of steps 2 and 4, and how to go on with it."""
    config = tiny_run(tmp_path_factory.mktemp("run") / "a", max_steps=4, checkpoint_every=2)
    train(config)
    shutil.rmtree(Path(config.output_dir) / "pipeline")
    return replace(config, resume="latest", max_steps=5)


CHECKPOINT_FILES = [
    "average.safetensors",
    "config.yaml",
    "model.safetensors",
    "optimizer.safetensors",
    "run.json",
    "state.json",
]


def test_nothing_of_a_checkpoint_is_a_pickle(two_checkpoints):
    folder = Path(two_checkpoints.output_dir) / "checkpoint-4"
    assert sorted(path.name for path in folder.iterdir() if path.is_file()) == CHECKPOINT_FILES
    for path in filter(Path.is_file, folder.rglob("*")):
        with pytest.raises((pickle.UnpicklingError, KeyError, ValueError, EOFError)):
            pickle.loads(path.read_bytes())


@pytest.mark.parametrize("damage", ["halved", "emptied", "missing", "changed"])
@pytest.mark.parametrize("name", CHECKPOINT_FILES)
def test_a_damaged_checkpoint_is_named_and_so_is_a_whole_one(
    name, damage, two_checkpoints, tmp_path
):
    """One sentence, by training and by sampling; training goes on from the older one if asked."""
    root = tmp_path / "a"
    shutil.copytree(two_checkpoints.output_dir, root)
    run = build_run(replace(two_checkpoints, output_dir=str(root)))
    folder = root / "checkpoint-4"
    content = (folder / name).read_bytes()
    if damage == "missing":
        (folder / name).unlink()
    elif damage == "changed" and name == "run.json":
        (folder / name).write_bytes(content.replace(b'"sha256": "', b'"sha256": "0', 1))
    else:
        middle = len(content) // 2
        changed = content[:middle] + bytes(8) + content[middle + 8 :]
        made = {"halved": content[:middle], "emptied": b"", "changed": changed}
        (folder / name).write_bytes(made[damage])
    with pytest.raises(UserError) as caught:
        load_latest(run)
    said = str(caught.value)
    assert f"{folder / name} is " in said or (name == "run.json" and damage == "changed"), said
    # The name of the test's folder says damaged, too.
    reason = said.replace(str(tmp_path), "")
    assert "is damaged" in reason or "missing" in reason
    assert (
        f"resume=whole resumes from the newest intact checkpoint, {root / 'checkpoint-2'}" in said
    )
    run.config = replace(run.config, resume="whole")
    assert load_latest(run) == 2
    assert list(checkpoints(root)) == [2] and (root / "damaged-checkpoint-4").is_dir()


@pytest.mark.parametrize("damage", ["halved", "emptied", "missing"])
def test_a_damaged_pipeline_is_named_and_no_other_takes_its_place(
    damage, two_checkpoints, tmp_path
):
    shutil.copytree(two_checkpoints.output_dir, tmp_path / "a")
    newest = tmp_path / "a" / "checkpoint-4" / "pipeline"
    for path in [p for p in newest.rglob("*") if p.is_file() and p.name != "sampling.json"]:
        content = path.read_bytes()
        if damage == "missing":
            path.unlink()
        else:
            path.write_bytes(content[: len(content) // 2] if damage == "halved" else b"")
        with pytest.raises((UserError, FileNotFoundError)) as caught:
            load_pipeline(str(tmp_path / "a"), torch.float32)
        where = path if damage != "missing" else tmp_path / "a"
        assert str(where) in str(caught.value), caught.value
        path.write_bytes(content)
    load_pipeline(str(tmp_path / "a"), torch.float32)


def test_an_empty_checkpoint_is_no_progress(two_checkpoints, tmp_path):
    config = replace(two_checkpoints, output_dir=str(tmp_path / "a"), max_steps=6)
    shutil.copytree(two_checkpoints.output_dir, config.output_dir)
    (tmp_path / "a" / "checkpoint-500").mkdir()
    assert list(checkpoints(tmp_path / "a")) == [2, 4]
    train(config)
    assert pipeline_steps(tmp_path / "a") == 6


def test_checkpoints_of_earlier_versions_are_unpickled_on_request_only(two_checkpoints, tmp_path):
    """They were accelerate's: what it writes and loads is the reference."""
    config = replace(two_checkpoints, output_dir=str(tmp_path / "a"))
    shutil.copytree(two_checkpoints.output_dir, config.output_dir)
    train(config)
    expected = load_pipeline(f"{config.output_dir}/pipeline", torch.float32)
    shutil.rmtree(config.output_dir)
    shutil.copytree(two_checkpoints.output_dir, config.output_dir)
    run = build_run(config)
    assert load_latest(run) == 4
    old = tmp_path / "a" / "checkpoint-4"
    shutil.rmtree(old)
    ema, recent = run.ema, run.recent
    run.accelerator.register_for_checkpointing(run.learning_rate, ema, recent)
    run.accelerator.save_state(str(old))
    (old / "run.json").write_text(json.dumps({"step": 4, "num_samples": 1797}))
    save_config(config, old / "config.yaml")
    with pytest.raises(UserError, match=r"contains pickles.*unpickle_checkpoint=true"):
        train(config)
    train(replace(config, unpickle_checkpoint=True))
    found = load_pipeline(f"{config.output_dir}/pipeline", torch.float32)
    assert_same(expected.transformer.state_dict(), found.transformer.state_dict())


def test_two_trainings_never_share_a_folder(two_checkpoints, capsys):
    folder = two_checkpoints.output_dir
    program = "print('has it', flush=True); input()"
    program = f"from mhla_gen.outputs.locks import claimed\nwith claimed({folder!r}): {program}"
    command, pipe = [sys.executable, "-c", program], subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True) as other:
        assert other.stdout is not None and other.stdout.readline() == "has it\n"
        code = main(["train", f"{folder}/config.yaml", "resume=latest", "max_steps=9"])
        other.communicate("\n")
    assert (code, other.returncode) == (2, 0)
    said = f"another command is writing to {folder} (process {other.pid} on "
    assert said in capsys.readouterr().err
