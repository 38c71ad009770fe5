"""Training of every family on captions: the loss falls, resuming is exact, LoRA, distillation."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from families import FAMILIES
from test_calls import DECODED
from tiny_calls import CALLED, called

import mhla_gen
from mhla_gen.calls import call_class
from mhla_gen.config import (
    DistillConfig,
    MHLAConfig,
    ModelConfig,
    ObjectiveConfig,
    PreviewConfig,
    SensitivityConfig,
    StageConfig,
    TrainConfig,
    TransformerConfig,
)
from mhla_gen.distillation.stages import stages_of
from mhla_gen.errors import UserError
from mhla_gen.inspection.sensitivity_scan import Scan
from mhla_gen.models.saved_transformer import load_transformer
from mhla_gen.training.build import build_task
from mhla_gen.training.log import read_log
from mhla_gen.training.loop import run_to_end
from mhla_gen.training.randomness import step_randomness
from mhla_gen.training.training_run import build_run

FAST = ("sd3", "hunyuan_video")
NAMES = [
    pytest.param(name, marks=() if name in FAST else pytest.mark.slow)
    for name in CALLED
    if name != "wan"
]
TARGETS = {
    "kandinsky5": ("to_query", "to_key", "to_value"),
    "z_image": ("to_q", "to_k", "to_v"),
}
# Of what these read beside text, nothing can be made up; and HunyuanDiT has learned places of text.
UNSEEN = ("wan_animate", "wan_vace", "hunyuan_dit")
NOISE_LEVELS = {"pixart": "epsilon", "hunyuan_dit": "v_prediction", "cogvideox": "v_prediction"}


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """Name → folder of its tiny softmax model, and captioned latents."""
    folder, found = tmp_path_factory.mktemp("bases"), {}

    def base(name):
        if name not in found:
            torch.manual_seed(0)
            model, _, data = called(name)
            model.save_pretrained(folder / name)
            found[name] = str(folder / name), data
        return found[name]

    return base


def settings(folder, name, **changes):
    objective = ObjectiveConfig()
    if name in NOISE_LEVELS:
        objective = ObjectiveConfig(name="ddpm", prediction=NOISE_LEVELS[name])
    values = {
        "output_dir": str(folder),
        "transformer": TransformerConfig(lora_rank=2),
        "model": ModelConfig(mhla=MHLAConfig(layout=FAMILIES[name][3])),
        "objective": objective,
        "max_steps": 3,
        "batch_size": 4,
        "learning_rate": 5e-3,
        "warmup_steps": 0,
        "mixed_precision": "fp32",
        "label_dropout": 0.25,
        "checkpoint_every": 0,
        "sample_every": 0,
        "log_every": 1,
        "report_to": "none",
    }
    return TrainConfig(**values | changes)


def model_of(path, name, **changes):
    return ModelConfig(mhla=MHLAConfig(layout=FAMILIES[name][3]), pretrained=path, **changes)


def finish(config, data, build=build_task):
    """Run to the end; the run, and the losses of its log."""
    run = build_run(config, build, data=data)
    run_to_end(run, "training")
    return run, [line["loss"] for line in read_log(Path(config.output_dir, "log.jsonl"))]


def mean_loss(run):
    """Of all samples, each with the same noise whenever this is asked."""
    options = {"seed": 99, "step": 0, "batch_size": 16}
    randomness = step_randomness(run.task.objective, **options)
    batch = run.data.read([i % len(run.data) for i in range(16)])
    model = run.accelerator.unwrap_model(run.model).eval()
    with torch.no_grad():
        return float(run.task.step_losses(model, batch, randomness)["loss"].mean())


@pytest.mark.parametrize("name", NAMES)
def test_the_loss_falls_and_a_killed_run_goes_on_exactly(name, bases, tmp_path):
    path, data = bases(name)
    config = settings(tmp_path / "whole", name, model=model_of(path, name), max_steps=6)
    run = build_run(config, data=data)
    before = mean_loss(run)
    run_to_end(run, "training")
    losses = [line["loss"] for line in read_log(tmp_path / "whole" / "log.jsonl")]
    assert mean_loss(run) < before
    half = replace(config, output_dir=str(tmp_path / "half"), max_steps=3, checkpoint_every=3)
    finish(half, data)
    assert finish(replace(half, max_steps=6, resume="latest"), data)[1] == losses
    saved = load_transformer(str(tmp_path / "half" / "pipeline"))
    assert type(saved) is FAMILIES[name][2]


@pytest.mark.parametrize("name", NAMES)
def test_low_rank_updates_and_mhla_learn_and_nothing_else(name, bases, tmp_path):
    path, data = bases(name)
    model = model_of(path, name, trainable="lora")
    targets = tuple(TARGETS.get(name, ("to_q", "to_k", "to_v")))
    config = settings(tmp_path, name, model=model, max_steps=2, ema_decay=0.0)
    config = replace(config, transformer=TransformerConfig(lora_rank=2, lora_targets=targets))
    run, _ = finish(config, data)
    trained = {n for n, p in run.model.named_parameters() if p.requires_grad}
    kinds = {".lora_" in n for n in trained}
    assert kinds == {True, False} and all(".lora_" in n or ".mhla." in n for n in trained)
    # What was learned, alone and on the base, is the model of the pipeline.
    adapted = mhla_gen.load_adapter(load_transformer(path), tmp_path)
    merged = load_transformer(str(tmp_path / "pipeline"))
    outputs = [predicted(run.task.conditioning, x.eval(), data) for x in (adapted, merged)]
    torch.testing.assert_close(*outputs, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", ["layers", "output"])
def test_a_stage_of_distillation_learns(name, kind, bases, tmp_path):
    path, data = bases(name)
    train = "mhla" if kind == "layers" else "all"
    rate = 5e-3 if kind == "layers" else 1e-3
    stage = StageConfig(kind=kind, steps=6, train=train, learning_rate=rate, ema_decay=0.0)
    config = settings(tmp_path, name, distill=DistillConfig(teacher=path, stages=(stage,)))
    (found,) = stages_of(config)
    run = build_run(found.config, found.task, data=data)
    run.model.train()
    before = stage_loss(run)
    run_to_end(run, found.title)
    run.model.train()
    assert stage_loss(run) < before
    teacher, student = load_transformer(path).state_dict(), run.model.state_dict()
    kept = [torch.equal(student[key], value) for key, value in teacher.items()]
    assert all(kept) == (kind == "layers")


def stage_loss(run):
    options = {"seed": 99, "step": 0, "batch_size": 4}
    randomness = step_randomness(run.task.objective, **options)
    with torch.no_grad():
        losses = run.task.step_losses(run.model, run.data.read(range(4)), randomness)
    return float(losses["loss"].mean())


def predicted(conditioning, model, data):
    batch = data.read([0, 1])
    times, dropped = torch.tensor([300.0, 700.0]), torch.tensor([True, False])
    with torch.no_grad():
        return conditioning.predict(model, batch["samples"], times, batch, dropped)


@pytest.mark.parametrize("name", [n for n in NAMES if n.values[0] not in UNSEEN])
def test_sensitivity_measures_every_layer(name, bases, tmp_path):
    path, data = bases(name)
    model = load_transformer(path)
    patch = call_class(model).patch(model.config)
    sizes = data.sample_shapes[0][1:]
    grid = tuple(n // p for n, p in zip(sizes, patch, strict=True))
    config = SensitivityConfig(
        model=path,
        grid=grid,
        timesteps=(500,),
        num_inputs=2,
        mhla=MHLAConfig(layout=FAMILIES[name][3]),
        device="cpu",
    )
    scan = Scan.prepare(config)
    assert scan.inputs[0].latents.shape[1:] == data.sample_shapes[0]
    errors = [scan.error_of([layer]) for layer in scan.layers]
    assert len(errors) == len(scan.layers) > 0 and all(error > 0 for error in errors)


# Mochi's pipeline decodes latents of 12 channels and no others.
DRAWN = {"mochi": {"in_channels": 12}}


@pytest.mark.parametrize("name", [n for n in NAMES if n.values[0] in DECODED])
def test_previews_are_drawn(name, tmp_path):
    torch.manual_seed(0)
    model, kind, data = called(name, **DRAWN.get(name, {}))
    model.save_pretrained(tmp_path / "base")
    vae = DECODED[name]()
    data.autoencoder = lambda: vae
    sizes = {
        "sana": (2, 3),
        "ltx": (2, 2, 3),
        "mochi": (2, 4, 6),
        "hunyuan_video15": (2, 2, 3),
    }.get(name)
    if sizes is not None:
        channels = data.sample_shapes[0][0]
        data.sample_shapes = ((channels, *sizes),)
        data.batch["samples"] = torch.randn(4, channels, *sizes)
    config = settings(tmp_path / "run", name, model=model_of(str(tmp_path / "base"), name))
    task = build_task(config, data)
    assert task.sampler is not None
    given = PreviewConfig(num_images=2, num_inference_steps=2, guidance_scale=2.0)
    found = task.sampler(task.pipeline(task.model), [0, 1], given)
    pixels = kind(task.pipeline(task.model)).sizes(data.batch["samples"])
    assert found.dtype == np.uint8 and found.shape == (2, *pixels, 3)


@pytest.mark.parametrize(
    ("sizes", "said"),
    [
        ({"num_layers": "x"}, "integer"),
        ({"in_channels": -1}, "negative dimension"),
        ({"attention_head_dim": 7}, "divisible by 2"),
        ({"layers": 2}, "unexpected keyword argument 'layers'"),
    ],
)
def test_sizes_that_diffusers_cannot_build_are_refused(sizes, said):
    model, _, data = called("sd3")
    given = {name: value for name, value in model.config.items() if not name.startswith("_")}
    config = TrainConfig(
        model=ModelConfig(attention="softmax"),
        transformer=TransformerConfig(name=type(model).__name__, sizes=given | sizes),
    )
    with pytest.raises(UserError, match=f"sizes do not fit SD3Transformer2DModel: .*{said}"):
        build_task(config, data)
