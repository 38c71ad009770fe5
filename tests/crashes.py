"""Commands on tiny data, what they promise to leave, and ways to disturb them."""

import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from other_code import HEADS, dit_state
from PIL import Image
from tiny import tiny_autoencoder, tiny_dit

from mhla_gen import ClassConditionalPipeline

SERVER = Path(__file__).with_name("crash_server.py")


class Server:
    """Runs commands; see crash_server.py."""

    def __init__(self):
        self.counts = Counter()
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_CBWR": "AUTO,STRICT"}
        environment["PYTHONPATH"] = str(SERVER.parents[1])
        self._process = subprocess.Popen(
            [sys.executable, str(SERVER)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=environment,
        )
        assert self._process.stdout is not None and self._process.stdin is not None
        assert self._process.stdout.readline() == "ready\n"

    def run(self, arguments, folder, **disturbance):
        """Run `mhla-gen` with these arguments.

        Args:
            arguments: Of the command line.
            folder: Below which changes are counted.
            disturbance: `kill_at`, the number of a change; `kill_after`, seconds; `limit`, bytes
                that a file may have.

        Returns:
            `status`, negative if killed, `output`, and `changes`, how many there were.
        """
        job = {"arguments": [*map(str, arguments)], "folder": str(folder), **disturbance}
        self._process.stdin.write(json.dumps(job) + "\n")
        self._process.stdin.flush()
        done = json.loads(self._process.stdout.readline())
        ends = {0: "ended well", 2: "ended with a sentence", -9: "were killed"}
        self.counts[ends.get(done["status"], "ended in a traceback")] += 1
        return done

    def close(self):
        self._process.stdin.close()
        self._process.wait()


@dataclass
class Command:
    """A command, its folder, and what it promises to leave there."""

    name: str
    arguments: list
    root: Path
    """Everything that it writes lies below."""
    result: object
    """Takes `root`; what must be equal however often it was disturbed."""
    counts: dict = field(default_factory=dict)

    def run(self, server, **disturbance):
        return server.run(self.arguments, self.root, **disturbance)

    def clear(self):
        shutil.rmtree(self.root, ignore_errors=True)
        self.root.mkdir()


def bytes_below(folder, *patterns):
    """Content of files by their path in the folder."""
    paths = sorted({path for pattern in patterns for path in folder.rglob(pattern)})
    return {str(p.relative_to(folder)): p.read_bytes() for p in paths if p.is_file()}


def trained(root):
    run = root / "run"
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    log = [{k: v for k, v in line.items() if k != "images_per_second"} for line in lines]
    pipeline = bytes_below(run / "pipeline", "*.safetensors", "*.json")
    return pipeline, bytes_below(run, "checkpoint-6/*.safetensors"), log


def cached(root):
    return bytes_below(root / "cache", "*.safetensors", "index.json")


def drawn(root):
    made = json.loads((root / "set" / "manifest.json").read_text())
    facts = {key: made[key] for key in ("sha256", "identity", "bytes", "num_images")}
    return bytes_below(root / "set", "samples.npz", "images/*.png", "samples.jsonl"), facts


def measured(root):
    return json.loads((root / "out" / "metrics.json").read_text())["metrics"]


def make_commands(root):
    """train, cache, sample and evaluate, each with a folder of its own below `root`.

    `sample` draws from the run of `train`, which has to be there.
    """
    rng = np.random.default_rng(0)
    for label in ("ant", "bee"):
        folder = root / "images" / label
        folder.mkdir(parents=True)
        for number in range(5):
            image = rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)
            Image.fromarray(image).save(folder / f"{number}.png")
    torch.manual_seed(0)
    tiny_autoencoder().save_pretrained(root / "vae")
    for name in ("made", "real"):
        np.savez(root / f"{name}.npz", arr_0=rng.integers(0, 256, (20, 8, 8, 3), dtype=np.uint8))
    network = torch.jit.script(Brightness())
    network.save(str(root / "brightness.pt"))
    small = [
        "model.patch_size=4", "model.num_layers=1", "model.num_attention_heads=1",
        "model.attention_head_dim=8", "batch_size=8", "max_steps=6", "checkpoint_every=2",
        "log_every=2", "sample_every=3", "samples.num_images=2", "samples.num_inference_steps=1",
        "mixed_precision=fp32", "report_to=none", "resume=latest", "warmup_steps=1",
    ]  # fmt: skip
    folders = {name: root / name for name in ("train", "cache", "sample", "evaluate")}
    for folder in folders.values():
        folder.mkdir()
    return {
        "train": Command(
            "train",
            ["train", f"output_dir={folders['train']}/run", *small],
            folders["train"],
            trained,
        ),
        "cache": Command(
            "cache",
            ["cache", f"output_dir={folders['cache']}/cache", "data.source=folder",
             f"data.path={root}/images", "data.image_size=16", f"vae.path={root}/vae",
             "chunk_size=3", "num_workers=1"],
            folders["cache"],
            cached,
        ),
        "sample": Command(
            "sample",
            ["sample", f"{folders['train']}/run", f"output_dir={folders['sample']}/set",
             "num_samples=6", "model_batch_size=2", "num_inference_steps=2",
             "formats=[npz,png]", "device=cpu"],
            folders["sample"],
            drawn,
        ),
        "evaluate": Command(
            "evaluate",
            ["evaluate", f"samples={root}/made.npz", f"reference={root}/real.npz",
             "metrics=[fd,precision]", "features.extractor=torchscript", "features.trust=true",
             f"features.weights={root}/brightness.pt", "jackknife_groups=4",
             f"features.cache_dir={folders['evaluate']}/features",
             f"out={folders['evaluate']}/out/metrics.json"],
            folders["evaluate"],
            measured,
        ),
    }  # fmt: skip


def distilled(root):
    run = root / "run"
    weights = bytes_below(run / "pipeline", "*.safetensors")
    logs = [[json.loads(line) for line in file.open()] for file in sorted(run.rglob("log.jsonl"))]
    return weights, [[line["loss"] for line in log] for log in logs]


def reference(root):
    with np.load(root / "out" / "reference.npz") as file:
        return {name: file[name].tobytes() for name in file.files}


def converted(root):
    return bytes_below(root / "out", "*.safetensors", "*.json", "*.yaml", "*.pt")


def inspected(root):
    return bytes_below(root / "out", "*.png", "statistics.json", "*.yaml")


def scanned(root):
    return bytes_below(root / "out", "sensitivity.json", "layers.jsonl", "*.yaml", "*.safetensors")


def make_more_commands(root):
    """distill, reference, convert, inspect and scan, as `make_commands`, whose files they read."""
    torch.manual_seed(0)
    softmax = tiny_dit(in_channels=1, patch_size=1, num_layers=2)
    pipeline = ClassConditionalPipeline(
        transformer=softmax, scheduler=FlowMatchEulerDiscreteScheduler()
    )
    pipeline.save_pretrained(root / "teacher")
    torch.save(dit_state(), root / "dit.pt")
    folders = {name: root / name for name in ("distill", "reference", "convert", "inspect", "scan")}
    for folder in folders.values():
        folder.mkdir()
    return {
        "distill": Command(
            "distill",
            ["train", f"output_dir={folders['distill']}/run", f"distill.teacher={root}/teacher",
             "distill.stages=[{kind: layers, steps: 3}, {kind: output, steps: 3}]",
             "model.mhla.layout=[2,2]", "batch_size=4", "warmup_steps=1", "mixed_precision=fp32",
             "checkpoint_every=2", "log_every=1", "sample_every=0", "report_to=none",
             "resume=latest"],
            folders["distill"],
            distilled,
        ),
        "reference": Command(
            "reference",
            ["reference", f"data={root}/real.npz", "features.extractor=torchscript",
             "features.trust=true", f"features.weights={root}/brightness.pt", "keep_images=7",
             f"features.cache_dir={folders['reference']}/features",
             f"out={folders['reference']}/out/reference.npz"],
            folders["reference"],
            reference,
        ),
        "convert": Command(
            "convert",
            ["convert", f"source={root}/dit.pt", f"num_attention_heads={HEADS}",
             f"output_dir={folders['convert']}/out"],
            folders["convert"],
            converted,
        ),
        "inspect": Command(
            "inspect",
            ["inspect", f"{root}/teacher", f"output_dir={folders['inspect']}/out", "num_inputs=1",
             "max_rows=8", "device=cpu"],
            folders["inspect"],
            inspected,
        ),
        "scan": Command(
            "scan",
            ["inspect", "sensitivity", f"{root}/teacher", f"output_dir={folders['scan']}/out",
             "num_inputs=1", "timesteps=[500]", "distill_steps=2", "softmax_layers=1",
             "mhla.layout=[2,2]", "device=cpu"],
            folders["scan"],
            scanned,
        ),
    }  # fmt: skip


class Brightness(torch.nn.Module):
    """Features that need no weights: mean and spread of the colours."""

    def forward(self, images):
        x = images.float().flatten(2)
        return torch.cat([x.mean(2), x.std(2)], 1)


def is_one_sentence(output, *names):
    """Whether a command ended with one line that names one of these, and no traceback."""
    errors = [line for line in output.splitlines() if ": error: " in line]
    return len(errors) == 1 and "Traceback" not in output and any(n in errors[0] for n in names)
