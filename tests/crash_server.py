"""Runs commands in forks of one process, and kills them at a given write or moment.

Started by `crashes.py`, which talks to it in JSON lines. Forking saves the seconds that importing
and first uses take, so that hundreds of kills take minutes.
"""

import gc
import importlib
import io
import json
import os
import resource
import signal
import sys
import threading
import traceback
from pathlib import Path

import PIL.Image
import torch

# Calls of Python that change a file or a folder, as audit events name them.
_CHANGES = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.link", "shutil.rmtree"}


def _paths(event, arguments):
    """The files that a call is about to change."""
    if event == "open":
        path, mode, flags = arguments
        writes = bool(flags & (os.O_WRONLY | os.O_RDWR)) or any(c in (mode or "") for c in "wax+")
        return [path] if writes else []
    return list(arguments[:2]) if event in _CHANGES else []


def _watch(folder, kill_at, counted):
    """Count calls that change something in a folder, and die before number `kill_at`."""

    def hook(event, arguments):
        for path in _paths(event, arguments):
            if isinstance(path, bytes):
                path = os.fsdecode(path)
            if not isinstance(path, str | os.PathLike) or not str(path).startswith(folder):
                continue
            os.write(counted, b".")
            hook.count += 1
            if hook.count == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
            return

    hook.count = 0
    sys.addaudithook(hook)


def _child(job, output, counted):
    from mhla_gen.cli import main

    for descriptor in (1, 2):
        os.dup2(output, descriptor)
    sys.stdout = os.fdopen(1, "w", closefd=False)
    sys.stderr = os.fdopen(2, "w", closefd=False)
    if job.get("limit"):
        resource.setrlimit(resource.RLIMIT_FSIZE, (job["limit"], resource.RLIM_INFINITY))
    sys.argv = ["mhla-gen", *job["arguments"]]
    _watch(job["folder"], job.get("kill_at"), counted)
    if job.get("kill_after") is not None:
        timer = threading.Timer(job["kill_after"], os.kill, (os.getpid(), signal.SIGKILL))
        timer.daemon = True
        timer.start()
    try:
        status = main(job["arguments"])
    except SystemExit as error:
        status = error.code
    except BaseException:
        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(int(status or 0))


def _run(job):
    # Pipes: a limit on the size of files is none on them.
    (output, to_output), (counted, to_counted) = os.pipe(), os.pipe()
    child = os.fork()
    if child == 0:
        _child(job, to_output, to_counted)
    os.close(to_output)
    os.close(to_counted)
    with os.fdopen(output, "rb") as said, os.fdopen(counted, "rb") as changes:
        text = said.read().decode(errors="replace")
        count = len(changes.read())
    _, status = os.waitpid(child, 0)
    return {"status": os.waitstatus_to_exitcode(status), "output": text, "changes": count}


def _import_all():
    """Import what the commands do."""
    for name in (
        "cli.commands",
        "conversion.conversion",
        "data.caching.build",
        "distillation.stages",
        "evaluation.evaluation",
        "evaluation.features",
        "inspection.inspection",
        "inspection.sensitivity",
        "sampling.sampling",
        "sampling.saved_pipeline",
        "training.loop",
    ):
        importlib.import_module(f"mhla_gen.{name}")
    for name in ("diffusers.guiders", "matplotlib.figure", "sklearn.datasets"):
        importlib.import_module(name)
    PIL.Image.init()


def _fill_caches():
    """Do what is slow the first time: count a model's operations, and draw a picture."""
    from diffusers import DiTTransformer2DModel
    from matplotlib.figure import Figure

    from mhla_gen import MHLAConfig, inject
    from mhla_gen.training.conditioning import ClassLabels
    from mhla_gen.training.throughput import step_flops

    model = DiTTransformer2DModel(1, 8, in_channels=1, num_layers=1, sample_size=8)
    inject(model, MHLAConfig(layout=(2, 2)))
    step_flops(model, ClassLabels(10), {"labels": torch.zeros(1, dtype=torch.long)}, (1, 8, 8))
    figure = Figure(layout="constrained")
    axes = figure.add_subplot(title="a title", xlabel="a label", yscale="log")
    figure.colorbar(axes.imshow([[1, 2], [3, 4]], extent=(1, 3, 1, 300)))
    figure.savefig(io.BytesIO())


def _serve():
    # Without the garbage collector, which would walk all of it in every fork, and so copy it.
    gc.disable()
    _import_all()
    _fill_caches()
    gc.freeze()
    gc.enable()
    # Several files of features of a few images.
    sys.modules["mhla_gen.evaluation.features"].CHUNK = 8
    print("ready", flush=True)
    for line in sys.stdin:
        print(json.dumps(_run(json.loads(line))), flush=True)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))
    _serve()
