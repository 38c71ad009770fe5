"""Training: objectives, initial weights, optimizer rules, and runs that go on exactly."""

import json
import math
from dataclasses import replace

import pytest
import torch
from commands import interrupted
from diffusers.training_utils import EMAModel
from ranks import torchrun
from tiny import tiny_dit
from torch.utils._pytree import keystr, tree_flatten_with_path

import mhla_gen
from mhla_gen.config import MHLAConfig, ModelConfig, TrainConfig, save_config
from mhla_gen.training import (
    build_model,
    build_optimizer,
    initialize_dit,
    keep_mixing_in_range,
    parameter_groups,
    rehearse,
    train,
)
from mhla_gen.training.conditioning import ClassLabels
from mhla_gen.training.ema import WeightAverage
from mhla_gen.training.loop import Run
from mhla_gen.training.objectives import FlowMatching
from mhla_gen.training.optim import mixing_matrices
from mhla_gen.training.randomness import step_randomness
from mhla_gen.training.run_folder import checkpoints
from mhla_gen.training.saved_tensors import SavedTensors
from mhla_gen.training.step import ObjectiveLosses, noised
from mhla_gen.training.training_run import build_run

TINY = ModelConfig(
    mhla=MHLAConfig(layout=(2, 2)),
    num_layers=2,
    num_attention_heads=2,
    attention_head_dim=8,
)


def tiny_run(folder, **changes):
    settings = {
        "output_dir": str(folder),
        "model": TINY,
        "max_steps": 6,
        "batch_size": 8,
        "warmup_steps": 1,
        "mixed_precision": "fp32",
        "checkpoint_every": 0,
        "log_every": 2,
        "report_to": "none",
        "sample_every": 0,
    } | changes
    return TrainConfig(**settings)


def trained(config):
    """Weights of the saved pipeline's transformer."""
    train(config)
    return trained_weights(config.output_dir)


def trained_weights(folder):
    pipeline = mhla_gen.ClassConditionalPipeline.from_pretrained(f"{folder}/pipeline")
    return pipeline.transformer.state_dict()


def log_of(folder):
    lines = (folder / "log.jsonl").read_text().splitlines()
    return [(line["step"], line["loss"]) for line in map(json.loads, lines)]


def state_of(checkpoint):
    """Every number in a checkpoint: raw weights, optimizer, average, learning rate, by kind."""
    kinds = {path.name.split(".")[0].split("-")[0] for path in checkpoint.glob("*.safetensors")}
    found = {kind: SavedTensors(checkpoint, kind).all() for kind in kinds}
    state = json.loads((checkpoint / "state.json").read_text())
    return found | {"state": state | {"random": len(state["random"])}}


def assert_same_state(first, second):
    """Two checkpoints agree bit for bit in raw weights, optimizer and average."""
    states = [state_of(first), state_of(second)]
    leaves = [dict(tree_flatten_with_path(state)[0]) for state in states]
    assert leaves[0].keys() == leaves[1].keys()
    for path, one in leaves[0].items():
        other = leaves[1][path]
        same = one.equal(other) if isinstance(one, torch.Tensor) else one == other
        assert same, f"{keystr(path)} differs"
    names = " ".join(keystr(path) for path in leaves[0])
    for part in ("model", "optimizer", "exp_avg_sq", "average", "last_lr"):
        assert part in names, f"no {part} in {first}"


def assert_same(first, second):
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_convolutions_add_in_a_fixed_order_in_a_step_only(tmp_path):
    run, seen = build_run(tiny_run(tmp_path)), []
    run.model.register_full_backward_hook(
        lambda *_: seen.append(torch.backends.cudnn.deterministic)
    )
    run.step(0, next(run.batches(0, 1)))
    assert seen == [True] and not torch.backends.cudnn.deterministic


@pytest.mark.parametrize("shape", [(1, 4, 4), (2, 3, 4, 5)])
def test_the_path_runs_from_sample_to_noise(shape):
    samples, noise = torch.randn(2, 3, *shape)
    assert torch.equal(FlowMatching().noisy(samples, noise, torch.zeros(3)), samples)
    assert torch.equal(FlowMatching().noisy(samples, noise, torch.ones(3)), noise)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_the_velocity_takes_the_scheduler_to_the_sample(shift):
    objective = FlowMatching(shift=shift)
    samples, noise = torch.randn(2, 3, 1, 4, 4)
    scheduler = objective.scheduler()
    scheduler.set_timesteps(7)
    sample = noise
    for t in scheduler.timesteps:
        sample = scheduler.step(objective.velocity(samples, noise), t, sample).prev_sample
    torch.testing.assert_close(sample, samples)


def test_the_loss_is_zero_for_a_perfect_model_and_sees_dropped_labels():
    objective = FlowMatching()
    batch = {"samples": torch.randn(64, 1, 4, 4), "labels": torch.zeros(64, dtype=torch.long)}
    randomness = step_randomness(objective, seed=0, step=0, batch_size=64, dropout=0.5)
    seen = {}

    def perfect(noisy, timestep, class_labels, return_dict):
        seen["labels"], seen["timesteps"] = class_labels, timestep
        return (randomness.noise((1, 4, 4)) - batch["samples"],)

    losses = ObjectiveLosses(objective, ClassLabels(10))(perfect, batch, randomness)["loss"]
    assert losses.shape == (64,) and not losses.any()
    assert torch.equal(seen["labels"] == 10, randomness.dropped)
    assert 10 < randomness.dropped.sum() < 54
    assert torch.equal(seen["timesteps"], randomness.times * 1000)


def test_randomness_is_a_function_of_seed_and_step():
    def drawn(**changes):
        arguments = {"seed": 0, "step": 5, "batch_size": 4, "flip": True} | changes
        return step_randomness(FlowMatching(), **arguments)

    first, again = drawn(), drawn()
    assert torch.equal(first.noise((1, 8, 8)), again.noise((1, 8, 8)))
    assert torch.equal(first.times, again.times)
    for other in (drawn(step=6), drawn(seed=1)):
        assert not torch.equal(first.times, other.times)
        assert not torch.equal(first.noise((1, 8, 8)), other.noise((1, 8, 8)))
    rows = slice(1, 3)
    assert torch.equal(first.part(rows).noise((8, 8)), first.noise((8, 8))[rows])
    assert not torch.equal(first.noise((8, 8)), first.latent_noise((8, 8)))
    many = drawn(batch_size=1000, dropout=0.2)
    noise = many.noise((5, 5))
    assert abs(noise.mean()) < 0.02 and abs(noise.std() - 1) < 0.02
    assert abs(many.dropped.float().mean() - 0.2) < 0.05
    assert abs(many.flipped.float().mean() - 0.5) < 0.05


def test_latents_are_drawn_from_the_distribution_of_the_image_or_its_mirror():
    randomness = step_randomness(FlowMatching(), seed=0, step=0, batch_size=6, flip=True)
    mean, std = torch.randn(6, 2, 3, 3), torch.rand(6, 2, 3, 3)
    noise, flipped = randomness.latent_noise((2, 3, 3)), randomness.flipped.view(-1, 1, 1, 1)
    assert flipped.any() and not flipped.all()
    batch = {"mean": mean, "std": std, "mean_flipped": -mean, "std_flipped": 2 * std}
    expected = torch.where(flipped, -mean + 2 * std * noise, mean + std * noise)
    assert torch.equal(noised(batch, randomness, FlowMatching()).samples, expected)
    mirrored = torch.where(flipped, mean.flip(-1), mean)
    found = noised({"samples": mean}, randomness, FlowMatching())
    assert torch.equal(found.samples, mirrored)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_sigmas_are_logit_normal_and_shifted(shift):
    generator = torch.Generator().manual_seed(0)
    sigmas = FlowMatching(logit_mean=1.0, shift=shift).draw_times(20000, generator)
    # In the logit, a shift by s adds log s.
    logits = sigmas.logit() - math.log(shift)
    assert abs(logits.mean() - 1) < 0.03 and abs(logits.std() - 1) < 0.03


@pytest.mark.parametrize("attention", ["softmax", "linear", "mhla"])
def test_a_new_model_predicts_zero_and_its_blocks_are_the_identity(attention):
    model = build_model(replace(TINY, attention=attention), (1, 8, 8), num_classes=10)
    images, t, y = torch.randn(2, 1, 8, 8), torch.tensor([3.0, 900.0]), torch.tensor([1, 10])
    assert not model(images, timestep=t, class_labels=y).sample.any()
    tokens = model.pos_embed(images)
    block = model.transformer_blocks[1]
    assert torch.equal(block(tokens, timestep=t, class_labels=y), tokens)


def test_every_block_starts_with_the_same_conditioning():
    model = build_model(TINY, (1, 8, 8), num_classes=3)
    t, y = torch.tensor([10.0]), torch.tensor([2])
    embedded = [
        block.norm1.emb(t, y, hidden_dtype=torch.float32) for block in model.transformer_blocks
    ]
    assert embedded[0].any() and torch.equal(embedded[0], embedded[1])


def test_labels_are_not_dropped_inside_the_model():
    model = tiny_dit()
    initialize_dit(model)
    model.train()
    embedder = model.transformer_blocks[0].norm1.emb.class_embedder
    labels = torch.zeros(1000, dtype=torch.long)
    assert (embedder(labels) == embedder(labels)[:1]).all()


def test_mhla_parts_keep_their_own_start():
    model = build_model(TINY, (1, 8, 8), num_classes=3)
    layer = model.transformer_blocks[0].attn1.mhla
    assert not layer.gate.weight.any() and not layer.conv.weight.any()
    assert torch.equal(layer.mixing, mhla_gen.ops.locality_mixing((2, 2)))


def test_the_control_differs_in_the_mixing_only():
    mhla, linear = (
        {k: v.shape for k, v in build_model(m, (1, 8, 8), 3).state_dict().items()}
        for m in (TINY, replace(TINY, attention="linear"))
    )
    assert mhla.keys() == linear.keys()
    assert {k for k in mhla if mhla[k] != linear[k]} == {k for k in mhla if k.endswith(".mixing")}


def test_a_patch_that_does_not_tile_the_image_is_refused():
    with pytest.raises(ValueError, match="does not divide the image size 8"):
        build_model(replace(TINY, patch_size=3), (1, 8, 8), num_classes=3)


def test_sizes_that_have_no_places_on_two_axes_are_refused():
    with pytest.raises(ValueError, match=r"multiple of 4, .* found 2 × 7"):
        build_model(replace(TINY, attention_head_dim=7), (1, 8, 8), num_classes=3)


def test_every_trained_parameter_is_in_one_group_and_mixing_has_no_decay():
    model = build_model(TINY, (1, 8, 8), num_classes=3)
    decayed, others = parameter_groups(model, weight_decay=0.1)
    everything = [id(p) for group in (decayed, others) for p in group["params"]]
    assert sorted(everything) == sorted(id(p) for p in model.parameters() if p.requires_grad)
    free = {id(p) for p in others["params"]}
    table = model.transformer_blocks[0].norm1.emb.class_embedder.embedding_table.weight
    assert others["weight_decay"] == 0 and decayed["weight_decay"] == 0.1
    assert {id(p) for p in mixing_matrices(model)} | {id(table)} <= free


def test_mixing_stays_in_range_whoever_steps_the_optimizer():
    model = build_model(TINY, (1, 8, 8), num_classes=3)
    optimizer = build_optimizer(model, learning_rate=10.0, weight_decay=0.0)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    for matrix in mixing_matrices(model):
        assert matrix.min() == 0 and matrix.max() == 1
    assert model.proj_out_2.weight.abs().max() > 1

    plain = torch.optim.SGD(model.parameters(), lr=10.0)
    keep_mixing_in_range(plain, model)
    plain.step()
    assert all(m.min() >= 0 and m.max() <= 1 for m in mixing_matrices(model))


def test_mixing_can_have_a_learning_rate_of_its_own():
    model = mhla_gen.inject(tiny_dit(), MHLAConfig(layout=(2, 2)))
    groups = parameter_groups(model, 0.1, mixing_learning_rate=0.5)
    everything = [id(p) for group in groups for p in group["params"]]
    assert sorted(everything) == sorted(id(p) for p in model.parameters())
    matrices = mixing_matrices(model)
    assert {id(p) for p in groups[2]["params"]} == {id(m) for m in matrices}
    before = [m.detach().clone() for m in matrices]
    optimizer = build_optimizer(model, 1e-3, 0.0, mixing_learning_rate=0.05)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    weight = model.proj_out_2.weight.detach().clone()
    optimizer.step()
    # AdamW's first step is its learning rate.
    torch.testing.assert_close(weight - model.proj_out_2.weight, torch.full_like(weight, 1e-3))
    for matrix, old in zip(matrices, before, strict=True):
        torch.testing.assert_close(matrix, (old - 0.05).clamp(0, 1))
    softmax = parameter_groups(tiny_dit(), 0.1, mixing_learning_rate=0.5)
    assert len(softmax) == 2


@pytest.mark.parametrize("mixing_rate", [None, 0.5])
def test_what_mhla_adds_can_have_a_learning_rate_of_its_own(mixing_rate):
    model = mhla_gen.inject(tiny_dit(), MHLAConfig(layout=(2, 2), exact=0.3))
    groups = parameter_groups(model, 0.1, mixing_rate, mhla_learning_rate=0.2)
    rates = {id(p): (g.get("lr"), g["weight_decay"]) for g in groups for p in g["params"]}
    assert len(rates) == len(list(model.parameters()))
    for name, parameter in model.named_parameters():
        rate = None
        if ".mhla." in name:
            rate = mixing_rate if name.endswith("mixing") and mixing_rate else 0.2
        undecayed = parameter.ndim < 2 or name.endswith(("mixing", "embedding_table.weight"))
        assert rates[id(parameter)] == (rate, 0.0 if undecayed else 0.1), name


def test_the_average_is_that_of_diffusers():
    model = tiny_dit()
    model.pos_embed.requires_grad_(False)
    ours, theirs = WeightAverage(model, 0.9), EMAModel(model.parameters(), decay=0.9)
    for _ in range(12):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * parameter.requires_grad)
        ours.step(model.parameters())
        theirs.step(model.parameters())
    assert ours.cur_decay_value == theirs.cur_decay_value
    # Twelve steps with two roundings each, of numbers up to 15: 24 * 6e-8 * 15.
    torch.testing.assert_close(ours.shadow_params, theirs.shadow_params, rtol=1e-5, atol=2.2e-5)


@pytest.mark.parametrize("attention", ["softmax", "linear", "mhla"])
def test_a_run_learns_and_its_pipeline_reloads(attention, tmp_path):
    config = tiny_run(
        tmp_path / "run",
        model=replace(TINY, attention=attention),
        max_steps=40,
        batch_size=32,
        learning_rate=3e-3,
        log_every=10,
        ema_decay=0.5,
    )
    weights = trained(config)
    losses = [loss for _, loss in log_of(tmp_path / "run")]
    assert losses[-1] < 0.9 * losses[0]
    assert any(key.endswith(".mixing") for key in weights) == (attention != "softmax")
    assert not list(tmp_path.glob("run/.*"))


def test_the_same_seed_gives_the_same_weights_and_another_seed_others(tmp_path):
    first, again, other = (
        trained(tiny_run(tmp_path / name, seed=seed))
        for name, seed in (("a", 0), ("b", 0), ("c", 1))
    )
    assert_same(first, again)
    assert not torch.equal(first["proj_out_2.weight"], other["proj_out_2.weight"])


@pytest.mark.parametrize("lr_scheduler", ["cosine", "constant_with_warmup"])
def test_a_run_that_was_stopped_goes_on_exactly(lr_scheduler, tmp_path):
    changes = {"max_steps": 12, "checkpoint_every": 4, "lr_scheduler": lr_scheduler}
    straight = trained(tiny_run(tmp_path / "straight", **changes))

    stopped = tiny_run(tmp_path / "stopped", **changes)
    with interrupted(Run, "step", after=7):
        train(stopped)
    assert list(checkpoints(tmp_path / "stopped")) == [4]
    assert_same(straight, trained(replace(stopped, resume="latest")))
    assert log_of(tmp_path / "stopped") == log_of(tmp_path / "straight")
    assert_same_state(*(tmp_path / n / "checkpoint-12" for n in ("straight", "stopped")))


def test_a_line_of_the_log_knows_the_steps_before_a_resume(tmp_path):
    changes = {"checkpoint_every": 5, "log_every": 4, "max_steps": 11}
    train(tiny_run(tmp_path / "straight", **changes))
    stopped = tiny_run(tmp_path / "stopped", **changes)
    with interrupted(Run, "step", after=7):
        train(stopped)
    train(replace(stopped, resume="latest"))
    straight, resumed = (
        [
            {key: value for key, value in json.loads(line).items() if key != "images_per_second"}
            for line in (tmp_path / name / "log.jsonl").read_text().splitlines()
        ]
        for name in ("straight", "stopped")
    )
    assert straight == resumed and [line["step"] for line in straight] == [4, 8, 11]


def test_micro_batches_make_the_same_step_to_rounding(tmp_path):
    whole = trained(tiny_run(tmp_path / "a", max_steps=3))
    parts = trained(tiny_run(tmp_path / "b", max_steps=3, gradient_accumulation_steps=4))
    for key in whole:
        torch.testing.assert_close(whole[key], parts[key], atol=2e-5, rtol=0)


def test_bf16_trains_and_keeps_float32_weights(tmp_path):
    config = tiny_run(tmp_path / "a", mixed_precision="bf16", gradient_checkpointing=True)
    assert all(w.dtype == torch.float32 for w in trained(config).values())


def test_old_checkpoints_are_removed(tmp_path):
    train(tiny_run(tmp_path / "a", checkpoint_every=1, keep_checkpoints=2))
    assert list(checkpoints(tmp_path / "a")) == [5, 6]


def test_folders_are_refused_with_the_remedy(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("precious")
    with pytest.raises(FileExistsError, match="is not a training run"):
        train(tiny_run(tmp_path / "mine", resume="latest"))

    config = tiny_run(tmp_path / "a", max_steps=1)
    train(config)
    with pytest.raises(FileExistsError, match="resume=latest"):
        train(config)
    with pytest.raises(FileExistsError, match=r"learning_rate: found 0\.0003, asked for 0\.1"):
        train(replace(config, learning_rate=0.1, resume="latest"))


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path):
    config = tiny_run(tmp_path / "a", learning_rate=1e30, max_steps=20, max_grad_norm=1e30)
    with pytest.raises(ValueError, match=r"loss of step .* is not finite"):
        train(config)


def test_a_batch_that_cannot_be_divided_is_refused(tmp_path):
    with pytest.raises(ValueError, match="must be a multiple of 3"):
        train(tiny_run(tmp_path / "a", gradient_accumulation_steps=3))
    assert not (tmp_path / "a").exists()


def test_a_rehearsal_writes_nothing(tmp_path):
    summary = rehearse(tiny_run(tmp_path / "a"))
    assert "1797 images of 10 classes" in summary and not (tmp_path / "a").exists()


def test_two_processes_train_as_one(tmp_path):
    train(tiny_run(tmp_path / "one"))
    save_config(tiny_run(tmp_path / "two"), tmp_path / "run.yaml")
    said = torchrun(2, "-m", "mhla_gen.cli", "train", tmp_path / "run.yaml")
    assert "Warning" not in said
    one, two = (dict(log_of(tmp_path / name)) for name in ("one", "two"))
    assert two == pytest.approx(one, rel=1e-5)
