"""Two GPUs train as one does: with recorded passes under DDP, and with shards under FSDP2."""

import os
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist
from test_training import tiny_run, trained, trained_weights
from torch.nn.parallel import DistributedDataParallel

from mhla_gen.runtime.processes import part_processes
from mhla_gen.runtime.recorded_training import RecordedTraining
from mhla_gen.training.loop import run_to_end
from mhla_gen.training.parallel import whole
from mhla_gen.training.training_run import build_run

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs"),
]


def settings(folder, parts, **changes):
    return tiny_run(
        folder, compile="regional", gradient_accumulation_steps=parts, max_steps=12, **changes
    )


@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("parallelism", ["ddp", "fsdp"])
def test_two_gpus_train_as_one(parallelism, parts, tmp_path):
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command = [*start, __file__, str(tmp_path / "two"), parallelism, str(parts)]
    # A group that hangs is ended by torchrun, which a killed torchrun would leave behind.
    with subprocess.Popen(command, env=os.environ) as process:
        try:
            expected = trained(settings(tmp_path / "one", parts, cuda_graphs=False))
            assert process.wait(150) == 0
        except BaseException:
            process.terminate()
            raise
    found = trained_weights(tmp_path / "two")
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-3, atol=1e-4, msg=name)


def train_together(folder, parallelism, parts):
    """Train, and look whether all processes have the same weights."""
    recorded = True if parallelism == "ddp" else None
    run = build_run(settings(folder, parts, parallelism=parallelism, cuda_graphs=recorded))
    recorded = run.model.forward
    run_to_end(run, "training")
    if parallelism == "ddp":
        assert isinstance(run.model, DistributedDataParallel)
        assert isinstance(recorded, RecordedTraining)
        # Of the first micro-batch of a step, if it has two, and of the last one, which averages.
        counts = [len(recorded._recordings[averages]) for averages in (False, True)]
        assert counts == [parts - 1, 1]
    for parameter in map(whole, run.model.parameters()):
        first = parameter.detach().clone()
        dist.broadcast(first, 0)
        assert torch.equal(first, parameter)


if __name__ == "__main__":
    train_together(sys.argv[1], sys.argv[2], int(sys.argv[3]))
    part_processes()
