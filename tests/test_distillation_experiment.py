"""`experiments/distillation.sh` in small: teacher, two students, a control, and one report."""

import importlib.util
import json
import os
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from diffusers import FlowMatchEulerDiscreteScheduler
from PIL import Image
from tiny import tiny_dit

from mhla_gen import ClassConditionalPipeline

ROOT = Path(__file__).parents[1]
ARMS = ("teacher", "mhla", "linear", "continued")


def shrunk(folder, **changes):
    """The shipped configs for digits, with a few steps each."""
    folder.mkdir()
    for arm in ARMS:
        values = yaml.safe_load((ROOT / f"experiments/distillation/digits/{arm}.yaml").read_text())
        values |= {"log_every": 2, "checkpoint_every": 5, "warmup_steps": 1, **changes}
        if arm in ("teacher", "continued"):
            values["max_steps"] = 60 if arm == "teacher" else 10
        else:
            for stage in values["distill"]["stages"]:
                stage["steps"] = 20
        (folder / f"{arm}.yaml").write_text(yaml.safe_dump(values))
    return folder


def run(configs, out, *arguments):
    environment = {
        **os.environ,
        "CONFIGS": str(configs),
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }
    command = ["bash", str(ROOT / "experiments/distillation.sh"), "digits", str(out), *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


def test_a_report_draws_again_what_has_changed(tmp_path):
    path = ROOT / "experiments/distillation/distillation_report.py"
    spec = importlib.util.spec_from_file_location("distillation_report", path)
    report = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(report)
    scheduler = FlowMatchEulerDiscreteScheduler()

    def drawn(shift, steps=1):
        torch.manual_seed(0)
        model = tiny_dit(num_layers=1)
        with torch.no_grad():
            model.proj_out_2.bias += shift
        pipeline = ClassConditionalPipeline(model, scheduler)
        pipeline.save_pretrained(tmp_path / "teacher" / "pipeline")
        options = Namespace(out=tmp_path, inference_steps=steps)
        arguments = (tmp_path, "teacher", "teacher", np.arange(3), torch.device("cpu"))
        return report.drawn(options, *arguments), (tmp_path / "teacher.npz").stat().st_mtime_ns

    first, again, retrained, finer = drawn(0.0), drawn(0.0), drawn(1.0), drawn(1.0, steps=2)
    assert again[1] == first[1] and np.array_equal(again[0], first[0])
    assert not np.array_equal(retrained[0], first[0])
    assert not np.array_equal(finer[0], retrained[0])


@pytest.mark.slow
def test_the_whole_comparison_runs_and_goes_on(tmp_path):
    configs, out = shrunk(tmp_path / "configs"), tmp_path / "out"
    first = run(configs, out)
    assert first.returncode == 0, first.stderr[-3000:]
    report = json.loads((out / "report/report.json").read_text())
    rows = {row["title"]: row for row in report["rows"]}
    assert [row["steps"] for row in rows.values()] == [60, 20, 40, 20, 40, 10]
    assert rows["softmax teacher"]["rms_to_teacher"] == 0 < rows["MHLA, layers"]["rms_to_teacher"]
    assert all(row["frechet_distance"] > 0 < row["minutes"] for row in rows.values())
    assert rows["softmax, trained further"]["added_parameters"] == 0
    for arm, title in (("mhla", "MHLA, layers"), ("linear", "linear, layers")):
        before, after = report["first_layer_errors"][arm], rows[title]["last_losses"]
        assert len(before) == 4 and all(after[name] < before[name] for name in before)
    with Image.open(out / "report/report.png") as picture:
        assert picture.width > picture.height
    assert "| MHLA, layers + output |" in first.stdout

    logs = {path: path.read_bytes() for path in out.rglob("log.jsonl")}
    assert len(logs) == 6
    second = run(configs, out)
    assert second.returncode == 0, second.stderr[-3000:]
    assert logs == {path: path.read_bytes() for path in out.rglob("log.jsonl")}


def test_a_missing_argument_is_named(tmp_path):
    missing = subprocess.run(
        ["bash", str(ROOT / "experiments/distillation.sh")], capture_output=True, text=True
    )
    assert (
        missing.returncode != 0
        and "usage: experiments/distillation.sh IMAGES OUT" in missing.stderr
    )
