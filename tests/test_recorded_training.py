"""Recorded training passes leave the gradients of the model, summed and averaged as its own."""

import socket
import sys

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from accelerate.state import AcceleratorState, PartialState
from ranks import torchrun
from tape import stand_in
from test_training import TINY, assert_same, tiny_run, trained, trained_weights
from tiny import tiny_dit
from torch.nn.parallel import DistributedDataParallel

import mhla_gen
from mhla_gen.errors import UserError
from mhla_gen.runtime.compiling import compile_blocks
from mhla_gen.runtime.recomputing import draws, recompute_activations
from mhla_gen.runtime.recorded_training import RecordedTraining, forget_recordings
from mhla_gen.training import training_run
from mhla_gen.training.log import read_log
from mhla_gen.training.loop import run_to_end
from mhla_gen.training.training_run import build_run


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


def a_dit(attention="mhla"):
    torch.manual_seed(0)
    model = tiny_dit(attention_head_dim=16)
    if attention == "mhla":
        mhla_gen.inject(model, mhla_gen.MHLAConfig(layout=(2, 2), conv=True, gate=True))
    # diffusers' own label dropout would draw.
    for module in model.modules():
        if hasattr(module, "dropout_prob"):
            module.dropout_prob = 0.0
    return model.train()


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


def test_recomputed_activations_lead_to_the_same_gradients():
    """With dropout too, whose numbers are then kept."""
    for dropout in (0.0, 0.3):
        model = tiny_dit(dropout=dropout).train()
        assert draws(model)
        for module in model.modules():
            if hasattr(module, "dropout_prob"):
                module.dropout_prob = 0.0
        assert draws(model) == (dropout > 0)
        found = []
        for recompute in (False, True):
            if recompute:
                recompute_activations(model)
            model.zero_grad()
            torch.manual_seed(1)
            model(**inputs_of(model, 2, "cpu"))[0].square().mean().backward()
            found.append({n: p.grad.clone() for n, p in model.named_parameters()})
        for name, gradient in found[0].items():
            torch.testing.assert_close(found[1][name], gradient, msg=name)


def gradients(model, forward, batches, seed, shared=None):
    """Of the sum of the losses of several micro-batches, and the output of the last."""
    model.zero_grad()
    for number, batch in enumerate(batches):
        if shared is not None:
            shared.require_backward_grad_sync = number == len(batches) - 1
        output = forward(**inputs_of(model, batch, model.device, seed + number))[0]
        output.square().mean().backward()
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return found | {"output": output.detach().clone()}


def assert_equal_gradients(model, launched, recorded, shared=None, seed=0):
    """Of single batches and of sums, also of other sizes, while the weights change."""
    state = torch.cuda.get_rng_state()
    gradients(model, recorded, (4,), 0, shared)
    assert torch.equal(torch.cuda.get_rng_state(), state)
    cases = [(4,), (3,), (3, 4), (4, 4, 4), (4,), (4, 3, 4), (3, 4), (4, 4)]
    for number, batches in enumerate(cases):
        found = gradients(model, recorded, batches, seed + 10 * number, shared)
        expected = gradients(model, launched, batches, seed + 10 * number, shared)
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            message = f"{name} of {batches}"
            torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-5, msg=message)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1.01)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there it records")
@pytest.mark.parametrize("recompute", [False, True])
def test_tapes_in_place_of_graphs_lead_to_the_gradients_of_the_model(recompute, monkeypatch):
    stand_in(monkeypatch.setattr)
    model = a_dit()
    if recompute:
        recompute_activations(model)
    recorded = RecordedTraining(model, model.forward)
    assert_equal_gradients(model, model.forward, recorded)
    (tapes,) = [x for x in recorded._recordings.values() if x]
    assert len(tapes) == 2 and all(tape._forward.calls for tape in tapes)
    forget_recordings()
    assert not any(recorded._recordings.values())
    assert_equal_gradients(model, model.forward, recorded)


def test_gradients_set_after_the_forward_pass_are_refused(monkeypatch):
    """They would be added to: the recorded pass does not look at them."""
    stand_in(monkeypatch.setattr)
    model = a_dit()
    recorded = RecordedTraining(model, model.forward)
    inputs = inputs_of(model, 4, "cpu")
    recorded(**inputs)[0].square().mean().backward()
    loss = recorded(**inputs)[0].square().mean()
    model.zero_grad()
    with pytest.raises(RuntimeError, match="call zero_grad before the forward pass"):
        loss.backward()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there it records")
def test_two_processes_average_gradients_inside_a_tape():
    torchrun(2, __file__)


def average_inside_a_tape():
    stand_in(setattr)
    model = a_dit()
    shared = DistributedDataParallel(model, gradient_as_bucket_view=True, broadcast_buffers=False)
    launched = shared.forward
    shared.forward = RecordedTraining(shared, launched)
    # Each process has samples of its own.
    assert_equal_gradients(model, launched, shared, shared, seed=1000 * dist.get_rank())
    recordings = shared.forward._recordings
    assert [len(recordings[averages]) for averages in (False, True)] == [2, 2]
    found = [p.grad.clone() for p in model.parameters()]
    for mine, gradient in zip(found, model.parameters(), strict=True):
        dist.broadcast(gradient.grad, 0)
        assert torch.equal(mine, gradient.grad)


@pytest.mark.gpu
# Gradients are compared in full float32.
@pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores")
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("attention", ["softmax", "mhla"])
def test_recorded_gradients_are_those_of_the_model(attention, compiled, recompute):
    model = a_dit(attention).cuda()
    if recompute:
        recompute_activations(model)
    if compiled:
        compile_blocks(model)
    recorded = RecordedTraining(model, model.forward)
    assert_equal_gradients(model, model.forward, recorded)
    assert sum(map(len, recorded._recordings.values())) == 2
    model.eval()
    with torch.no_grad():
        inputs = inputs_of(model, 4, "cuda")
        torch.testing.assert_close(recorded(**inputs), model(**inputs), rtol=0, atol=0)


class Softmax(torch.nn.Module):
    """Stock attention of queries, keys and values that train, `[1, length, 4, dim]`."""

    def __init__(self, queries, keys, dim, dtype):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        shapes = [(1, length, 4, dim) for length in (queries, keys, keys)]
        values = (torch.randn(shape, generator=generator).to(dtype) for shape in shapes)
        self.tokens = torch.nn.ParameterList(map(torch.nn.Parameter, values))

    def forward(self):
        return F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in self.tokens))


@pytest.mark.gpu
@pytest.mark.parametrize("dim", [72, 128])
@pytest.mark.parametrize("lengths", [(64, 64), (144, 144), (576, 576), (32, 512), (512, 576)])
def test_recorded_softmax_of_lengths_that_fill_no_tile(lengths, dim):
    """On a Hopper GPU torch takes cuDNN's kernels, which handle 128 queries at once.

    Some releases of cuDNN read past the last query, which goes unnoticed between other tensors, but
    not at the end of a recording's memory.
    """
    exact = Softmax(*lengths, dim, torch.float64)
    exact().square().mean().backward()
    model = Softmax(*lengths, dim, torch.bfloat16).cuda()
    recorded = RecordedTraining(model, model.forward)
    for _ in range(5):
        model.zero_grad()
        recorded().float().square().mean().backward()
        for x, y in zip(model.tokens, exact.tokens, strict=True):
            assert (x.grad.cpu().double() - y.grad).norm() < 0.02 * y.grad.norm()
    assert recorded.replays


def part_processes_of_test():
    forget_recordings()
    dist.destroy_process_group()


@pytest.fixture
def one_process(tmp_path):
    torch.cuda.set_device(0)
    dist.init_process_group("nccl", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    part_processes_of_test()


@pytest.mark.gpu
# Launched passes, which recorded ones are compared with, are on the default stream.
@pytest.mark.filterwarnings("ignore:The AccumulateGrad node's stream does not match")
@pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores")
@pytest.mark.parametrize("recompute", [False, True])
def test_gradients_are_averaged_inside_a_recording(recompute, one_process):
    """By NCCL in a group of one: what a recording has to hold is the same for any number."""
    model = a_dit().cuda()
    if recompute:
        recompute_activations(model)
    compile_blocks(model)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        shared = DistributedDataParallel(
            model, device_ids=[0], gradient_as_bucket_view=True, broadcast_buffers=False
        )
    torch.cuda.current_stream().wait_stream(stream)
    launched = shared.forward
    shared.forward = RecordedTraining(shared, launched, stream)

    assert_equal_gradients(model, launched, shared, shared)
    recordings = shared.forward._recordings
    assert [len(recordings[averages]) for averages in (False, True)] == [2, 2]


@pytest.mark.gpu
@pytest.mark.parametrize("parts, one_pass", [(1, False), (2, None)])
def test_a_recorded_run_resumes_exactly_and_equals_one_that_is_not(parts, one_pass, tmp_path):
    def run(name, **changes):
        options = {
            "max_steps": 8,
            "compile": "regional",
            "checkpoint_every": 4,
            "sample_every": 4,
            "gradient_accumulation_steps": parts,
            "gradient_checkpointing": parts > 1,
            "one_pass": one_pass,
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


def averaged_run(folder, **changes):
    """A run whose gradients accelerate's DistributedDataParallel averages, recorded."""
    run = build_run(tiny_run(folder, gradient_accumulation_steps=2, **changes))
    recorded = run.model.forward
    assert isinstance(run.model, DistributedDataParallel)
    assert isinstance(recorded, RecordedTraining)
    run_to_end(run, "training")
    # Of the first micro-batch of a step, and of the second one, which averages.
    assert [len(recorded._recordings[averages]) for averages in (False, True)] == [1, 1]


def assert_close_weights(folder, expected):
    averaged = trained_weights(folder)
    assert averaged.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(averaged[name], value, rtol=1e-3, atol=1e-4, msg=name)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there it records")
def test_a_run_of_two_processes_computes_the_same_with_tapes(tmp_path):
    plain = trained(tiny_run(tmp_path / "plain"))
    torchrun(2, __file__, tmp_path / "shared")
    assert_close_weights(tmp_path / "shared", plain)


@pytest.mark.parametrize(
    ("changes", "needs"),
    [
        ({}, "a GPU, found cpu"),
        ({"compile": "none"}, "compile=regional, found none"),
    ],
)
def test_recording_is_refused_where_it_is_wanted_but_not_possible(changes, needs, tmp_path):
    if not changes and torch.cuda.is_available():
        pytest.skip("there it records")
    settings = {"compile": "regional", "cuda_graphs": True, **changes}
    with pytest.raises(UserError, match=f"cuda_graphs=true needs {needs}; leave cuda_graphs out"):
        build_run(tiny_run(tmp_path / "run", **settings))
    # Nothing was begun, and without it such a run trains.
    assert not (tmp_path / "run").exists()
    settings["cuda_graphs"] = None
    forward = build_run(tiny_run(tmp_path / "run", **settings)).model.forward
    assert not isinstance(forward, RecordedTraining)


def run_with_tapes(folder):
    stand_in(setattr)
    training_run.can_record = lambda *_: True
    averaged_run(folder)


@pytest.mark.gpu
def test_a_run_that_averages_gradients_is_recorded_and_computes_the_same(tmp_path, monkeypatch):
    plain = trained(tiny_run(tmp_path / "plain", compile="regional", cuda_graphs=False))
    AcceleratorState._reset_state(reset_partial_state=True)
    port = ephemeral_port()
    launched = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "LOCAL_WORLD_SIZE": 1}
    for name, value in (launched | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}).items():
        monkeypatch.setenv(name, str(value))
    # accelerate would not share the model of a process that is alone.
    monkeypatch.setattr(PartialState, "use_distributed", True)
    try:
        averaged_run(tmp_path / "shared", compile="regional", cuda_graphs=True)
    finally:
        part_processes_of_test()
    assert_close_weights(tmp_path / "shared", plain)


def ephemeral_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


if __name__ == "__main__":
    if len(sys.argv) > 1:
        run_with_tapes(sys.argv[1])
    else:
        dist.init_process_group("gloo")
        average_inside_a_tape()
    dist.destroy_process_group()
