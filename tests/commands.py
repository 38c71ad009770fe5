"""Commands in processes of their own, and work that is stopped on the way."""

import contextlib
import os
import subprocess
import sys

import pytest


def launch(command, *arguments, processes=1, threads=1):
    """Start `mhla-gen COMMAND ARGUMENTS` on a CPU."""
    python = [sys.executable]
    if processes > 1:
        python += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    alone = {"OMP_NUM_THREADS": str(threads), "ACCELERATE_USE_CPU": "true"}
    alone["CUDA_VISIBLE_DEVICES"] = ""
    return subprocess.Popen(
        [*python, "-m", "mhla_gen.cli", command, *map(str, arguments)],
        env=os.environ | alone,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def finish(process, fails=False):
    """What it prints and what it complains of."""
    printed, errors = process.communicate(timeout=1000)
    assert bool(process.returncode) == fails, errors
    return printed, errors


@contextlib.contextmanager
def interrupted(owner, method, after):
    """A block that KeyboardInterrupt ends when `method` was called `after` times; the calls."""
    whole, calls = getattr(owner, method), []

    def stop(self, *args, **options):
        if len(calls) == after:
            raise KeyboardInterrupt
        calls.append(args)
        return whole(self, *args, **options)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(owner, method, stop)
        yield calls
