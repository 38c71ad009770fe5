"""Distillation by stages: a teacher in a folder becomes an MHLA model in another, exactly again."""

import shutil
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import tiny
import torch
from commands import finish, interrupted, launch
from diffusers import FlowMatchEulerDiscreteScheduler
from safetensors.torch import load_file

import mhla_gen
from mhla_gen.cli import main
from mhla_gen.config import (
    DataConfig,
    DistillConfig,
    MHLAConfig,
    ModelConfig,
    StageConfig,
    TrainConfig,
    WanConfig,
    load_config,
    save_config,
)
from mhla_gen.data import load_data
from mhla_gen.distillation import OutputLosses, distill, softmax_twin
from mhla_gen.inspection.subject import load_subject
from mhla_gen.sampling.saved_pipeline import load_pipeline
from mhla_gen.training.log import read_log
from mhla_gen.training.loop import Run
from mhla_gen.training.objectives import FlowMatching
from mhla_gen.training.randomness import step_randomness
from mhla_gen.training.step import ObjectiveLosses

LAYERS = StageConfig(kind="layers", steps=4, train="mhla", learning_rate=1e-2, ema_decay=0.5)
OUTPUT = StageConfig(kind="output", steps=4, learning_rate=1e-3, ema_decay=0.5)


def digits_dit(**changes):
    sizes = {"in_channels": 1, "patch_size": 1, "num_layers": 2} | changes
    return tiny.tiny_dit(**sizes)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """Folder of a softmax pipeline for digits."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("teacher")
    pipeline = mhla_gen.ClassConditionalPipeline(
        transformer=digits_dit(), scheduler=FlowMatchEulerDiscreteScheduler()
    )
    pipeline.save_pretrained(folder)
    return folder


def settings(folder, teacher, *stages, **changes):
    values = {
        "output_dir": str(folder),
        "model": ModelConfig(mhla=MHLAConfig(layout=(3, 3))),
        "distill": DistillConfig(teacher=str(teacher), stages=list(stages)),
        "batch_size": 8,
        "warmup_steps": 1,
        "mixed_precision": "fp32",
        "checkpoint_every": 2,
        "log_every": 1,
    } | changes
    return TrainConfig(**values)


def weights(folder, *parts):
    return load_file(
        Path(folder, *parts, "pipeline/transformer/diffusion_pytorch_model.safetensors")
    )


def same(first, second):
    return first.keys() == second.keys() and all(first[k].equal(second[k]) for k in first)


def files(folder):
    return {p: p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_two_stages_leave_a_pipeline_a_log_per_layer_and_the_teacher(tmp_path, teacher):
    before = files(teacher)
    layers = replace(LAYERS, steps=20, train="attention")
    folder = distill(settings(tmp_path / "run", teacher, layers, OUTPUT, batch_size=32))
    pipeline = mhla_gen.ClassConditionalPipeline.from_pretrained(folder)
    assert isinstance(pipeline.transformer, mhla_gen.MHLADiTTransformer2DModel)
    assert same(pipeline.transformer.state_dict(), weights(tmp_path, "run"))
    assert same(weights(tmp_path, "run"), weights(tmp_path, "run/stage-2-output"))
    assert files(teacher) == before

    first = read_log(tmp_path / "run/stage-1-layers/log.jsonl")
    names = [f"transformer_blocks.{i}.attn1" for i in range(2)]
    assert [line["step"] for line in first] == list(range(1, 21))
    assert all(first[0][name] > first[-1][name] > 0 for name in names)
    mean = sum(first[0][name] for name in names) / 2
    assert first[0]["loss"] == pytest.approx(mean, rel=1e-5)
    last = read_log(tmp_path / "run/stage-2-output/log.jsonl")[-1]
    parts = last["objective_loss"] + last["teacher_distance"]
    assert last["loss"] == pytest.approx(parts, rel=1e-5) and last["teacher_distance"] > 0


@pytest.mark.parametrize("trained", ["mhla", "attention"])
def test_the_layer_stage_moves_attention_layers_alone(tmp_path, teacher, trained):
    distill(settings(tmp_path / "run", teacher, replace(LAYERS, train=trained)))
    original = load_file(teacher / "transformer/diffusion_pytorch_model.safetensors")
    found = weights(tmp_path, "run")
    moved = {name for name in original if not found[name].equal(original[name])}
    assert all(".attn1." in name for name in moved)
    assert bool(moved) is (trained == "attention")
    fresh = mhla_gen.inject(digits_dit(), MHLAConfig(layout=(3, 3))).state_dict()
    added = set(found) - set(original)
    assert added and all(not found[n].equal(fresh[n]) for n in added if "norm" not in n)


def test_what_mhla_adds_learns_at_a_rate_of_its_own(tmp_path, teacher):
    stage = replace(LAYERS, steps=1, learning_rate=1e-6, mhla_learning_rate=1e-2, ema_decay=0.0)
    stage = replace(stage, train="attention", layer_error="token", warmup_steps=0)
    model = ModelConfig(mhla=MHLAConfig(layout=(3, 3), exact=0.4, exact_tile=(2, 2)))
    distill(settings(tmp_path / "run", teacher, stage, model=model))
    found = weights(tmp_path, "run")
    fresh = mhla_gen.inject(digits_dit(), model.mhla).state_dict()
    original = load_file(teacher / "transformer/diffusion_pytorch_model.safetensors")
    for name, start in (fresh | original).items():
        moved = (found[name] - start).abs().max().item()
        # AdamW's first step is its learning rate.
        expected = 1e-2 if ".mhla." in name else 1e-6 if ".attn1." in name else 0.0
        # Mixing is clipped; keys have no bias that softmax notices.
        if not name.endswith((".mixing", ".to_k.bias")):
            assert moved == pytest.approx(expected, rel=0.05, abs=1e-7), name


@pytest.mark.parametrize("steps_before", [1, 3, 4, 7])
def test_an_interrupted_distillation_resumes_exactly(tmp_path, teacher, steps_before):
    stages = (replace(LAYERS, train="attention"), OUTPUT)
    distill(settings(tmp_path / "straight", teacher, *stages))
    config = settings(tmp_path / "stopped", teacher, *stages)
    with interrupted(Run, "step", steps_before):
        distill(config)
    distill(replace(config, resume="latest"))
    for stage in ("stage-1-layers", "stage-2-output"):
        straight, stopped = tmp_path / "straight" / stage, tmp_path / "stopped" / stage
        assert same(weights(straight), weights(stopped))
        for name in ("model.safetensors", "optimizer.safetensors"):
            saved = [folder / "checkpoint-4" / name for folder in (straight, stopped)]
            assert saved[0].read_bytes() == saved[1].read_bytes(), name
        logs = [read_log(folder / "log.jsonl") for folder in (straight, stopped)]
        for line in (*logs[0], *logs[1]):
            del line["images_per_second"]
        assert logs[0] == logs[1]


def test_a_finished_distillation_is_not_run_again(tmp_path, teacher, monkeypatch, capsys):
    config = settings(tmp_path / "run", teacher, LAYERS, OUTPUT)
    distill(config)
    expected = weights(tmp_path, "run")
    monkeypatch.setattr(Run, "step", lambda *_: pytest.fail("a step was run"))
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")}
    assert main(["train", str(tmp_path / "run" / "config.yaml"), "resume=latest"]) == 0
    printed = capsys.readouterr()
    assert "run is already finished: all stages are done; nothing was run" in printed.err
    assert f"mhla-gen sample {tmp_path / 'run' / 'pipeline'}" in printed.out
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")}

    # Killed before the last pipeline was copied.
    shutil.rmtree(tmp_path / "run" / "pipeline")
    distill(replace(config, resume="latest"))
    assert "stage 2 of 2, output: already finished" in capsys.readouterr().err
    assert same(weights(tmp_path, "run"), expected)

    shutil.rmtree(tmp_path / "run" / "stage-1-layers")
    distill(replace(config, resume="latest"))
    (tmp_path / "run/pipeline/transformer/diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"diffusion_pytorch_model\.safetensors"):
        distill(replace(config, resume="latest"))
    shutil.rmtree(tmp_path / "run" / "pipeline")
    shutil.rmtree(tmp_path / "run" / "stage-2-output" / "pipeline" / "transformer")
    with pytest.raises(ValueError, match=r"stage-2-output/pipeline"):
        distill(replace(config, resume="latest"))
    with pytest.raises(FileExistsError, match="resume=latest"):
        distill(config)
    other = replace(config.distill, stages=[LAYERS])
    with pytest.raises(FileExistsError, match="other settings"):
        distill(replace(config, distill=other, resume="latest"))


def test_a_checkpoint_of_a_stage_can_be_looked_into_and_sampled(tmp_path, teacher):
    with interrupted(Run, "step", after=3):
        distill(settings(tmp_path / "run", teacher, LAYERS))
    stage = tmp_path / "run/stage-1-layers"
    pipeline = load_pipeline(str(stage), torch.float32)
    assert isinstance(pipeline.transformer, mhla_gen.MHLADiTTransformer2DModel)
    subject = load_subject(str(stage), "transformer", torch.float32)
    assert same(subject.model.state_dict(), pipeline.transformer.state_dict())


def test_the_output_stage_starts_where_the_layer_stage_ended(tmp_path, teacher):
    stages = (LAYERS, replace(OUTPUT, learning_rate=1e-30, train="mhla"))
    distill(settings(tmp_path / "run", teacher, *stages))
    first, second = (weights(tmp_path, "run", f"stage-{s}") for s in ("1-layers", "2-output"))
    assert all(torch.allclose(first[name], second[name], atol=1e-6) for name in first)


def run_by_two(config, file, **outcome):
    save_config(config, file)
    return finish(launch("train", file, processes=2), **outcome)


def assert_same_losses(folders, stage):
    parts = ("objective_loss", "teacher_distance", "transformer_blocks")
    for one, two in zip(*(read_log(f / stage / "log.jsonl") for f in folders), strict=True):
        losses = {k: v for k, v in one.items() if k == "loss" or k.startswith(parts)}
        assert len(losses) == 3
        assert {k: two[k] for k in losses} == pytest.approx(losses, rel=1e-4)


@pytest.mark.slow
def test_two_processes_distill_as_one(tmp_path, teacher):
    folders = tmp_path / "one", tmp_path / "two"
    config = settings(folders[0], teacher, replace(LAYERS, train="attention"), OUTPUT)
    distill(config)
    run_by_two(replace(config, output_dir=str(folders[1])), tmp_path / "two.yaml")
    assert_same_losses(folders, "stage-1-layers")
    assert_same_losses(folders, "stage-2-output")


@pytest.mark.slow
def test_the_output_stage_runs_in_parts_and_the_layer_stage_says_that_it_cannot(tmp_path, teacher):
    folders = tmp_path / "one", tmp_path / "parts"
    config = settings(folders[0], teacher, OUTPUT, sample_every=0)
    distill(config)
    config = replace(config, output_dir=str(folders[1]), parallelism="fsdp")
    run_by_two(config, tmp_path / "parts.yaml")
    assert_same_losses(folders, "stage-1-output")
    first = load_pipeline(str(folders[0] / "pipeline"), torch.float32).transformer
    for name, value in load_pipeline(
        str(folders[1] / "pipeline"), torch.float32
    ).transformer.named_parameters():
        torch.testing.assert_close(value, first.get_parameter(name), rtol=1e-4, atol=1e-5)

    layers = replace(config.distill, stages=[LAYERS])
    config = replace(config, output_dir=str(tmp_path / "layers"), distill=layers)
    _, errors = run_by_two(config, tmp_path / "layers.yaml", fails=True)
    assert "cannot run under FSDP" in errors
    assert not (tmp_path / "layers").exists()


def test_linear_attention_goes_through_the_same_stages(tmp_path, teacher):
    model = ModelConfig(attention="linear")
    folder = distill(settings(tmp_path / "run", teacher, LAYERS, OUTPUT, model=model))
    pipeline = mhla_gen.ClassConditionalPipeline.from_pretrained(folder)
    assert {row.kind for row in mhla_gen.summary(pipeline)} == {"linear"}


def test_softmax_layers_of_a_hybrid_are_not_compared(tmp_path, teacher):
    model = ModelConfig(mhla=MHLAConfig(layout=(2, 2), layers=[1]))
    distill(settings(tmp_path / "run", teacher, LAYERS, model=model))
    (line, *_) = read_log(tmp_path / "run/stage-1-layers/log.jsonl")
    assert [name for name in line if name.startswith("transformer")] == [
        "transformer_blocks.1.attn1"
    ]


def test_a_rehearsal_tries_each_stage_and_writes_nothing(tmp_path, teacher, capsys):
    config = settings(tmp_path / "run", teacher, LAYERS, OUTPUT)
    save_config(config, tmp_path / "config.yaml")
    assert load_config(tmp_path / "config.yaml") == config
    assert main(["train", str(tmp_path / "config.yaml"), "--dry-run"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("stage 1 of 2, layers: 1797 images")
    assert lines[1].startswith("stage 2 of 2, output: 1797 images")
    assert not (tmp_path / "run").exists()


def test_what_does_not_fit_is_named(tmp_path, teacher):
    config = settings(tmp_path / "run", teacher, LAYERS)

    def refused(match, **changes):
        with pytest.raises((ValueError, FileNotFoundError), match=match):
            distill(replace(config, **changes))
        assert not list(tmp_path.iterdir())

    def with_teacher(model, name):
        model.save_pretrained(tmp_path.parent / name)
        return replace(config.distill, teacher=str(tmp_path.parent / name))

    refused("no such folder", distill=replace(config.distill, teacher="no/such/folder"))
    refused("found softmax", model=ModelConfig(attention="softmax"))
    refused("leave model.pretrained out", model=ModelConfig(pretrained=str(teacher)))
    refused("leave model.trainable out", model=ModelConfig(trainable="mhla"))
    converted = mhla_gen.inject(digits_dit(), MHLAConfig(layout=(2, 2)))
    refused("has MHLA layers", distill=with_teacher(converted, "converted"))
    other = digits_dit(in_channels=3, sample_size=12, num_embeds_ada_norm=7)
    refused(
        "in_channels is 3.*sample_size is 12.*num_embeds_ada_norm is 7",
        distill=with_teacher(other, "other"),
    )
    wan = with_teacher(tiny.tiny_wan(), "wan")
    refused("but class labels need a DiT", distill=wan, model=ModelConfig())


def test_the_student_of_another_run_is_refused(tmp_path, teacher):
    student = mhla_gen.inject(digits_dit(num_layers=3), MHLAConfig(layout=(3, 3)))
    student.save_pretrained(tmp_path / "student")
    distillation = DistillConfig(
        teacher=str(teacher), stages=[OUTPUT], start=str(tmp_path / "student")
    )
    config = replace(settings(tmp_path / "run", teacher, OUTPUT), distill=distillation)
    with pytest.raises(ValueError, match="num_layers: found 3, asked for 2"):
        distill(config)


@pytest.mark.parametrize(
    ("values", "match"),
    [
        ({"teacher": None}, "distill.teacher"),
        ({"stages": []}, "at least one stage"),
        ({"stages": [OUTPUT, LAYERS]}, "layers must come before output"),
    ],
)
def test_distillations_that_make_no_sense_are_refused(values, match):
    with pytest.raises(ValueError, match=match):
        DistillConfig(**{"teacher": "folder"} | values)


@pytest.mark.parametrize(
    ("values", "match"),
    [
        ({"kind": "layers", "train": "all"}, "trains mhla or attention"),
        ({"steps": 0}, "steps"),
        ({"teacher_weight": -1.0}, "teacher_weight"),
        ({"kind": "layer"}, "kind"),
    ],
)
def test_stages_that_make_no_sense_are_refused(values, match):
    with pytest.raises(ValueError, match=match):
        StageConfig(**values)


def test_a_wan_goes_through_the_stages_on_clips_of_several_shapes(tmp_path):
    cache = tiny.tiny_clip_cache(tmp_path / "clips")
    base = tiny.tiny_wan(num_layers=2)
    base.save_pretrained(tmp_path / "wan")
    config = settings(
        tmp_path / "run",
        tmp_path / "wan",
        replace(LAYERS, steps=6),
        OUTPUT,
        data=DataConfig(source="cache", path=str(cache)),
        model=ModelConfig(mhla=MHLAConfig(layout=(2, 2, 2))),
        wan=WanConfig(),
        batch_size=4,
        gradient_accumulation_steps=2,
        sample_every=0,
    )
    shapes = load_data(config.data).sample_shapes
    assert len({shape[1:] for shape in shapes}) == 3
    folder = distill(config)
    made = mhla_gen.MHLAWanTransformer3DModel.from_pretrained(folder, subfolder="transformer")
    assert {row.kind for row in mhla_gen.summary(made)} == {"mhla"}
    first = read_log(tmp_path / "run/stage-1-layers/log.jsonl")
    names = [f"blocks.{i}.attn1" for i in range(2)]
    assert all(first[0][name] > 0 for name in names)
    distilled = load_file(
        tmp_path / "run/stage-1-layers/pipeline/transformer/diffusion_pytorch_model.safetensors"
    )
    assert all(distilled[name].equal(value) for name, value in base.state_dict().items())


@dataclass(frozen=True)
class Text:
    """Calls a Wan with the embedded text of the batch."""

    def predict(self, model, noisy, timesteps, batch, dropped):
        text = torch.where(dropped[:, None, None], 0.0, batch["prompt_embeds"])
        return model(noisy, timestep=timesteps, encoder_hidden_states=text).sample


def test_a_video_student_learns_from_data_and_from_its_teacher():
    objective = FlowMatching()
    base = tiny.tiny_wan()
    student = mhla_gen.inject(base, MHLAConfig(layout=(2, 2, 4))).train()
    names = {name for name, _ in student.named_parameters()}
    teacher = softmax_twin(student, names)
    batch = {"samples": torch.randn(2, 16, 3, 10, 12), "prompt_embeds": torch.randn(2, 7, 16)}
    randomness = step_randomness(objective, seed=0, step=0, batch_size=2, dropout=0.5)
    losses = OutputLosses(objective, Text(), teacher, 3.0, torch.no_grad)
    found = losses(student, batch, randomness)
    plain = ObjectiveLosses(objective, Text())(student, batch, randomness)["loss"]
    assert torch.equal(found["objective_loss"], plain) and found["teacher_distance"].min() > 0
    torch.testing.assert_close(found["loss"], plain + 3 * found["teacher_distance"])
    found["loss"].sum().backward()
    assert all(p.grad is None for p in teacher.parameters())
    assert all(p.grad is not None for p in student.parameters())
    assert not losses(teacher, batch, randomness)["teacher_distance"].any()
