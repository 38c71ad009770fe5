"""Train, sample and score the arms of the comparison in docs/evidence.md, one after another.

    python experiments/evidence/evidence_run.py DATA OUT [--plan PLAN.yaml] [key=value ...]

DATA is an npz file with `arr_0` and `labels` (experiments/emoji_dataset.py makes one), or a folder
with one sub-folder of images a class. OUT gets one JSON file and one picture for each arm as soon
as it is done; arms that are there are not run again, so the same command resumes an interrupted
comparison. Any number of processes may work on one OUT, on one GPU or several
(CUDA_VISIBLE_DEVICES): each takes the next arm that nobody has. With --seconds 500 no arm is begun
that would not end in that time.
Speeds are measured apart, by evidence_speed.py. key=value changes the training of all arms,
see experiments/evidence/base.yaml.
"""

import argparse
import fcntl
import gc
import json
import platform
import shutil
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from evidence_measure import held_out_loss, layer_statistics, mixing_statistics
from evidence_plan import PLAN, Run, read_plan
from evidence_scores import Judge, Real
from PIL import Image

from mhla_gen.config import TrainConfig
from mhla_gen.files import written_whole
from mhla_gen.media.pictures import centre_crop
from mhla_gen.runtime.devices import resolve_device
from mhla_gen.sampling import ClassConditionalPipeline, generate
from mhla_gen.training import train
from mhla_gen.training.log import LOG_NAME, read_log
from mhla_gen.version import __version__

_SIDE = 64
# One image in sixteen is held out.
_HELD_OUT = 16
_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
_INSPECTED = 2
_REAL_NAME = "real.json"


def main(arguments: Sequence[str] | None = None) -> None:
    """Run what is missing of the plan."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--plan", type=Path, default=PLAN)
    parser.add_argument("--work", type=Path, help="scratch folder; OUT/work by default")
    parser.add_argument("--seconds", type=float, default=float("inf"))
    parser.add_argument("--samples", type=int, default=4096)
    parser.add_argument("--sampling-steps", type=int, default=25)
    options = parser.parse_intermixed_args(arguments)
    began = time.perf_counter()
    runs = read_plan(options.plan)
    comparison = Comparison(options)
    for run in runs:
        comparison.settings(run)  # a wrong one is found before anything is read or trained
    comparison.prepare()
    spent: dict[int, float] = {}
    failed = []
    for run in runs:
        left = options.seconds - (time.perf_counter() - began)
        # The first run of a size compiles kernels; the next ones take less than it.
        if left < 1.05 * spent.get(run.tokens, 0):
            continue
        with claimed(comparison.work / f"{run.name}.lock") as ours:
            if not ours or (options.out / f"{run.name}.json").is_file():
                continue
            started = time.perf_counter()
            try:
                comparison.run(run)
            except Exception:
                # One arm that cannot be trained must not cost the others.
                traceback.print_exc()
                failed.append(run.name)
                continue
            spent[run.tokens] = time.perf_counter() - started
            print(f"{run.name}: {spent[run.tokens]:.1f} s", flush=True)
    if failed:
        raise SystemExit(f"no result for {', '.join(failed)}; the errors are above")


@contextmanager
def claimed(path: Path) -> Iterator[bool]:
    """Whether this process alone has the file; the system takes it back from one that dies."""
    with path.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True


class Comparison:
    """Data, judge and folders that all arms share.

    Args:
        options: Of the command line.
    """

    def __init__(self, options: argparse.Namespace):
        self.options = options
        self.out: Path = options.out
        self.work: Path = options.work or options.out / "work"
        self.train_file = self.work / "train.npz"
        self.device = resolve_device("auto")

    def settings(self, run: Run) -> TrainConfig:
        """All settings of one training."""
        return run.config(
            *self.options.overrides,
            f"data.path={self.train_file}",
            f"output_dir={self.work / run.name}",
            "report_to=none",
            "sample_every=0",
        )

    def prepare(self) -> None:
        """Read the real images, write the training part, and get the judge ready."""
        self.work.mkdir(parents=True, exist_ok=True)
        self.real = load_real(self.options.data)
        images, labels = self.real.training()
        with written_whole(self.train_file) as partial, partial.open("wb") as file:
            np.savez(file, arr_0=images, labels=labels)
        self.judge = Judge(self.real, self.device)
        write_json(self.out / _REAL_NAME, self.judge.score_real())

    def run(self, run: Run) -> None:
        """Train one model, measure it, and write its result."""
        folder = self.work / run.name
        # Half a run of an interrupted comparison.
        shutil.rmtree(folder, ignore_errors=True)
        gc.collect()
        config = self.settings(run)
        began = time.perf_counter()
        saved = train(config, title=run.name)
        seconds = {"train": time.perf_counter() - began}
        pipeline: Any = ClassConditionalPipeline.from_pretrained(saved).to(self.device)
        log = read_log(folder / LOG_NAME)
        result = {
            "name": run.name,
            "arm": run.arm,
            "title": run.title,
            "tokens": run.tokens,
            "seed": run.seed,
            "parameters": sum(p.numel() for p in pipeline.transformer.parameters()),
            "steps": config.max_steps,
            "batch_size": config.batch_size,
            "curve": [[line["step"], round(line["loss"], 6)] for line in log],
            **self._measure(run, pipeline, seconds),
        }
        result["seconds"] = {name: round(value, 1) for name, value in seconds.items()}
        result["config"] = asdict(config)
        result["machine"] = machine(self.device)
        write_json(self.out / f"{run.name}.json", result)
        shutil.rmtree(folder)

    def _measure(self, run: Run, pipeline: Any, seconds: dict[str, float]) -> dict[str, Any]:
        model, (images, labels) = pipeline.transformer, self.real.held_out()
        began = time.perf_counter()
        # One label of a real image each, so that classes are as frequent as they are there.
        wanted = np.resize(self.real.labels, self.options.samples)
        batch_size = 512 if run.tokens == 256 else 256
        steps = self.options.sampling_steps
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
            samples = generate(
                pipeline,
                wanted,
                seed=0,
                batch_size=batch_size,
                num_inference_steps=steps,
                guidance_scale=1.0,
                title=f"{run.name} samples",
            )
        seconds["sample"] = time.perf_counter() - began
        self._draw(run, samples, wanted)
        began = time.perf_counter()
        measured = {
            "held_out": held_out_loss(model, images, labels, self.device),
            "scores": self.judge.score(samples, wanted),
            "layers": layer_statistics(
                model, images[:_INSPECTED], labels[:_INSPECTED], self.device
            ),
            "mixing": mixing_statistics(model),
        }
        seconds["score"] = time.perf_counter() - began
        return measured

    def _draw(self, run: Run, samples: np.ndarray, labels: np.ndarray) -> None:
        """The first sample of every class in one row: the same noise in every arm."""
        classes = range(len(self.real.class_names))
        firsts = [samples[labels == c][0] for c in classes if (labels == c).any()]
        with written_whole(self.out / f"{run.name}.png") as partial:
            Image.fromarray(np.concatenate(firsts, axis=1)).save(partial, format="png")


def load_real(path: Path) -> Real:
    """Real images with the held-out ones last.

    Args:
        path: An npz file with `arr_0` and `labels`, or a folder with one sub-folder a class.

    Raises:
        FileNotFoundError: If there are no images.
        ValueError: If the file lacks an array.
    """
    if path.is_dir():
        images, labels, names = _read_folder(path)
    elif path.is_file():
        with np.load(path, allow_pickle=False) as arrays:
            missing = {"arr_0", "labels"} - set(arrays)
            if missing:
                raise ValueError(f"{path} lacks {', '.join(sorted(missing))}")
            images, labels = arrays["arr_0"], arrays["labels"]
            names = [str(name) for name in arrays["classes"]] if "classes" in arrays else []
    else:
        raise FileNotFoundError(f"{path} is no npz file and no folder of class folders")
    names = names or [str(c) for c in range(int(labels.max()) + 1)]
    held_out = np.arange(len(images)) % _HELD_OUT == _HELD_OUT - 1
    order = np.argsort(held_out, kind="stable")
    return Real(images[order], labels[order], tuple(names), int((~held_out).sum()))


def _read_folder(path: Path) -> tuple[np.ndarray, np.ndarray, list[str]]:
    names = sorted(folder.name for folder in path.iterdir() if folder.is_dir())
    images, labels = [], []
    for label, name in enumerate(names):
        for file in sorted((path / name).iterdir()):
            if file.suffix.lower() in _SUFFIXES:
                with Image.open(file) as image:
                    images.append(np.asarray(centre_crop(image.convert("RGB"), _SIDE)))
                labels.append(label)
    if not images:
        raise FileNotFoundError(f"{path} has no images in sub-folders, one a class")
    order = np.random.default_rng(0).permutation(len(images))
    return np.stack(images)[order], np.asarray(labels, np.int64)[order], names


def machine(device: torch.device) -> dict[str, str]:
    """What a result was found on, with what, and when."""
    name = torch.cuda.get_device_name() if device.type == "cuda" else platform.processor()
    return {
        "device": name or device.type,
        "torch": torch.__version__,
        "mhla_gen": __version__,
        "date": time.strftime("%Y-%m-%d"),
    }


def write_json(path: Path, value: Any) -> None:
    """Write a result, whole or not at all."""
    with written_whole(path) as partial:
        partial.write_text(json.dumps(value, indent=1) + "\n")


if __name__ == "__main__":
    main()
