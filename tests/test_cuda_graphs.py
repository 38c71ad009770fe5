"""Recorded forward passes compute what the model computes, whatever it is called with."""

import pytest
import torch
from tiny import tiny_dit_pipeline

import mhla_gen
from mhla_gen.runtime.compiling import compile_blocks
from mhla_gen.runtime.cuda_graphs import RecordedForward


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
    assert capsys.readouterr().out.count("no memory left for CUDA graphs") == 1
