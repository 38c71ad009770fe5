"""Recorded forward passes compute what the model computes, whatever it is called with."""

import gc
import weakref

import pytest
import torch
from tape import stand_in
from tiny import tiny_dit_pipeline
from tiny_joint import flux_inputs, tiny_flux

import mhla_gen
from mhla_gen.runtime import cuda_graphs
from mhla_gen.runtime.compiling import compile_blocks
from mhla_gen.runtime.cuda_graphs import RecordedForward, recording


def test_calls_without_a_gpu_are_not_recorded():
    model = torch.nn.Linear(3, 2)
    x = torch.randn(4, 3)
    recorded = RecordedForward(model.forward)
    with torch.no_grad():
        for _ in range(4):
            torch.testing.assert_close(recorded(x), model(x), rtol=0, atol=0)
    recorded(x).sum().backward()
    assert model.weight.grad is not None


@pytest.mark.skipif(torch.cuda.is_available(), reason="there it records")
def test_tapes_in_place_of_graphs_give_what_the_model_gives(monkeypatch):
    """Arguments in dicts too, for more shapes than are kept."""
    stand_in(monkeypatch.setattr)
    monkeypatch.setattr(cuda_graphs, "_on_gpu", lambda _: True)
    model = mhla_gen.inject(tiny_flux(), mhla_gen.MHLAConfig(layout=(2, 2)))
    calls = []
    recorded = RecordedForward(lambda **inputs: calls.append(1) or model(**inputs))
    with torch.no_grad():
        for number, size in enumerate([(4, 6), (6, 4), (3, 5)] * 2 + [(3, 5)] * 4):
            inputs = flux_of_noise(*size, seed=number)
            found = recorded(**inputs)[0]
            torch.testing.assert_close(found, model(**inputs)[0], rtol=0, atol=0)
    # Three shapes in turn are not recorded; of five calls in a row, two are replayed.
    assert len(calls) == 10 - 2


def flux_of_noise(height, width, seed, device="cpu"):
    """Noise for a tiny Flux, with the grid: a recording cannot read it from `img_ids`."""
    inputs = flux_inputs(height, width)
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(inputs["hidden_states"].shape, generator=generator)
    inputs = inputs | {"hidden_states": noise, "return_dict": False}
    inputs = {k: v.to(device) if torch.is_tensor(v) else v for k, v in inputs.items()}
    return inputs | {"joint_attention_kwargs": {"grid": (height, width)}}


@pytest.mark.gpu
@pytest.mark.parametrize("compiled", [False, True])
def test_a_recorded_pass_of_text_and_image_gives_the_same(compiled):
    config = mhla_gen.MHLAConfig(layout=(2, 2), exact=0.3)
    model = mhla_gen.inject(tiny_flux(), config).cuda().eval()
    tolerance = {"rtol": 0, "atol": 0}
    if compiled:
        compile_blocks(model)
        tolerance = {"rtol": 1e-5, "atol": 1e-5}
    recorded = RecordedForward(model.forward)
    with torch.no_grad():
        for number, size in enumerate([(4, 6), (3, 5)] * 4):
            inputs = flux_of_noise(*size, seed=number, device="cuda")
            torch.testing.assert_close(recorded(**inputs)[0], model(**inputs)[0], **tolerance)


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


class Owner:
    """Of a recording, in a cycle that only garbage collection ends."""

    def __init__(self, destroyed):
        self.itself, self.graph = self, torch.cuda.CUDAGraph()
        weakref.finalize(self, destroyed.append, True)


def collected_garbage_does_not_break_off_a_recording(device):
    destroyed, threshold = [], gc.get_threshold()
    owner = Owner(destroyed)
    with recording(owner.graph):
        torch.zeros(1, device=device)
    del owner
    gc.set_threshold(1)
    try:
        with recording(torch.cuda.CUDAGraph()):
            before = len(destroyed)
            Owner(destroyed)
            kept = [[torch.zeros(1, device=device)] for _ in range(9)]
            after = len(destroyed)
    finally:
        gc.set_threshold(*threshold)
    assert len(kept) == 9 and before == after == 1 and gc.isenabled()
    gc.collect()
    assert len(destroyed) == 2


@pytest.mark.skipif(torch.cuda.is_available(), reason="there it records")
def test_no_recording_is_destroyed_while_another_is_made(monkeypatch):
    stand_in(monkeypatch.setattr)
    collected_garbage_does_not_break_off_a_recording("cpu")


@pytest.mark.gpu
def test_no_recording_is_destroyed_while_another_is_made_on_a_gpu():
    collected_garbage_does_not_break_off_a_recording("cuda")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there it records")
def test_a_recording_that_is_broken_off_leaves_its_stream(monkeypatch):
    current = ["before"]

    class Stream:
        def __init__(self, chosen):
            self.chosen = chosen

        def __enter__(self):
            self.before, current[0] = current[0], self.chosen

        def __exit__(self, *_):
            current[0] = self.before

    class Graph(Stream):
        """Like torch's, which ends the recording, then leaves its stream."""

        def __init__(self, *_, **__):
            super().__init__("of the recording")

        def __exit__(self, *_):
            raise RuntimeError("operation failed due to a previous error during capture")

    stand_in(monkeypatch.setattr)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: current[0])
    monkeypatch.setattr(torch.cuda, "stream", Stream)
    monkeypatch.setattr(torch.cuda, "graph", Graph)
    with pytest.raises(RuntimeError, match="previous error"), recording(torch.cuda.CUDAGraph()):
        pass
    assert current == ["before"]


@pytest.mark.gpu
# The recording is broken off before anything is in it.
@pytest.mark.filterwarnings("ignore:The CUDA Graph is empty")
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
    assert capsys.readouterr().out.count("no memory left for CUDA graphs") == 1
