"""Recorded passes compute what the model computes, whatever it is called with."""

import pytest
import torch
from test_training import TINY, assert_same, tiny_run, trained
from tiny import tiny_dit, tiny_dit_pipeline

import mhla_gen
from mhla_gen.runtime.compiling import compile_blocks
from mhla_gen.runtime.cuda_graphs import RecordedForward, RecordedTraining
from mhla_gen.training.log import read_log
from mhla_gen.training.training_run import build_run


def test_calls_without_a_gpu_are_not_recorded():
    model = torch.nn.Linear(3, 2)
    x = torch.randn(4, 3)
    recorded = RecordedForward(model.forward)
    with torch.no_grad():
        for _ in range(4):
            torch.testing.assert_close(recorded(x), model(x), rtol=0, atol=0)
    recorded(x).sum().backward()
    assert model.weight.grad is not None


@pytest.mark.gpu
@pytest.mark.parametrize("compiled", [False, True])
def test_a_recorded_pass_gives_the_same_bits(compiled):
    model = (
        mhla_gen.inject(tiny_dit_pipeline().transformer, mhla_gen.MHLAConfig(layout=(2, 2)))
        .cuda()
        .eval()
    )
    tolerance = {"rtol": 0, "atol": 0}
    if compiled:
        compile_blocks(model)
        # For timesteps that are not dense other code is compiled, which rounds otherwise.
        tolerance = {"rtol": 1e-5, "atol": 1e-5}
    recorded = RecordedForward(model.forward)

    def inputs(batch):
        side = model.config.sample_size
        generator = torch.Generator("cuda").manual_seed(batch)
        return {
            "hidden_states": torch.randn(
                batch, model.config.in_channels, side, side, device="cuda", generator=generator
            ),
            # Not dense, as the pipeline's.
            "timestep": torch.tensor(500.0 + batch, device="cuda").expand(batch),
            "class_labels": torch.arange(batch, device="cuda") % 2,
            "return_dict": False,
        }

    with torch.no_grad():
        # More shapes than are kept, each often enough to be recorded.
        for batch in (2, 3, 2, 3, 2, 3, 2, 5, 5, 5, 5, 2):
            found = recorded(**inputs(batch))[0]
            again = recorded(**inputs(batch))[0]
            torch.testing.assert_close(again, found, rtol=0, atol=0)
            torch.testing.assert_close(found, model(**inputs(batch))[0], **tolerance)
        model.proj_out_2.bias.add_(1)
        torch.testing.assert_close(recorded(**inputs(2))[0], model(**inputs(2))[0], **tolerance)


@pytest.mark.gpu
def test_without_memory_for_a_recording_steps_are_launched(capsys):
    def forward(x):
        if torch.cuda.is_current_stream_capturing():
            raise torch.OutOfMemoryError("no memory")
        return x + 1

    recorded = RecordedForward(forward)
    with torch.no_grad():
        for number in range(6):
            x = torch.full((3,), float(number), device="cuda")
            torch.testing.assert_close(recorded(x), x + 1, rtol=0, atol=0)
    assert capsys.readouterr().out.count("no memory to record") == 1


def inputs_of(model, batch, device, seed=0):
    side = model.config.sample_size
    generator = torch.Generator().manual_seed(seed)
    samples = torch.randn(batch, model.config.in_channels, side, side, generator=generator)
    return {
        "hidden_states": samples.to(device),
        "timestep": (torch.arange(batch) * 7 + seed).to(device),
        "class_labels": (torch.arange(batch) % 3).to(device),
        "return_dict": False,
    }


def test_passes_without_gradients_are_the_models_own():
    model = tiny_dit()
    recorded = RecordedTraining(model, model.forward)
    inputs = inputs_of(model, 2, "cpu")
    with torch.no_grad():
        torch.testing.assert_close(recorded(**inputs), model(**inputs), rtol=0, atol=0)
    # In evaluation mode a gradient is the model's own, too: explaining a model is no training.
    recorded(**inputs)[0].sum().backward()
    assert model.proj_out_2.bias.grad is not None


@pytest.mark.skipif(torch.cuda.is_available(), reason="there it records")
def test_without_a_gpu_a_run_records_nothing(tmp_path):
    run = build_run(tiny_run(tmp_path, compile="regional"))
    assert not isinstance(run.model.forward, RecordedTraining)


@pytest.mark.gpu
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("attention", ["softmax", "mhla"])
def test_recorded_gradients_are_those_of_the_model(attention, compiled):
    torch.manual_seed(0)
    model = tiny_dit(attention_head_dim=16)
    if attention == "mhla":
        mhla_gen.inject(model, mhla_gen.MHLAConfig(layout=(2, 2), conv=True, gate=True))
    model.cuda().train()
    # diffusers' own label dropout would draw.
    for module in model.modules():
        if hasattr(module, "dropout_prob"):
            module.dropout_prob = 0.0
    if compiled:
        compile_blocks(model)
    recorded = RecordedTraining(model, model.forward)

    def passes(forward, batch, seed):
        model.zero_grad()
        output = forward(**inputs_of(model, batch, "cuda", seed))[0]
        output.square().mean().backward()
        grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        return grads | {"output": output.detach().clone()}

    state = torch.cuda.get_rng_state()
    passes(recorded, 4, 0)
    assert torch.equal(torch.cuda.get_rng_state(), state)
    # The recorded batch anew, another batch, and the first again with other weights.
    for batch, seed in ((4, 1), (3, 2), (4, 3)):
        found, expected = passes(recorded, batch, seed), passes(model.forward, batch, seed)
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-5, msg=name)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1.01)
    model.eval()
    with torch.no_grad():
        inputs = inputs_of(model, 4, "cuda")
        torch.testing.assert_close(recorded(**inputs), model(**inputs), rtol=0, atol=0)


@pytest.mark.gpu
def test_a_recorded_run_resumes_exactly_and_equals_one_that_is_not(tmp_path):
    def run(name, **changes):
        options = {
            "max_steps": 8,
            "compile": "regional",
            "checkpoint_every": 4,
            "sample_every": 4,
            **changes,
        }
        config = tiny_run(tmp_path / name, model=TINY, **options)
        return trained(config), read_log(tmp_path / name / "log.jsonl")

    straight, lines = run("straight")
    run("stopped", max_steps=4)
    resumed, _ = run("stopped", resume="latest")
    assert_same(straight, resumed)
    _, others = run("launched", cuda_graphs=False)
    for line, other in zip(lines, others, strict=True):
        assert line["loss"] == pytest.approx(other["loss"], rel=1e-4)
