"""`experiments/captioned.py` in small: two arms, resumed, and never mixed with other settings."""

import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import pytest

SCRIPT = Path(__file__).parents[1] / "experiments" / "captioned.py"


@pytest.fixture
def run(monkeypatch, tmp_path):
    # As Python does when the script is run.
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    spec = importlib.util.spec_from_file_location("captioned", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    images = np.random.default_rng(0).integers(0, 256, (32, 16, 16, 3), dtype=np.uint8)
    classes = [f"{name}/{style}" for name in ("sun", "moon", "star", "rain") for style in "ab"]
    np.savez(tmp_path / "emoji.npz", arr_0=images, labels=np.arange(32) % 8, classes=classes)
    small = ["--pixels", "16", "--heads", "1", "--layers", "1", "--sample-steps", "1"]
    small += ["batch_size=2", "mixed_precision=fp32", "warmup_steps=1", "compile=none"]

    def ran(*arguments):
        command = ["captioned.py", str(tmp_path / "emoji.npz"), str(tmp_path / "out")]
        monkeypatch.setattr(sys, "argv", [*command, *small, *arguments])
        module.main()
        return json.loads((tmp_path / "out" / "captioned.json").read_text())

    yield ran
    sys.modules.pop("captioned_data")


def test_arms_are_trained_once_and_have_one_set_of_settings(run, tmp_path):
    found = run("--steps", "2", "--arms", "sd3-mhla")
    assert found["arms"].keys() == {"sd3-mhla"} and found["steps"] == 2
    again = run("--steps", "2", "--arms", "sd3-mhla", "wan-mhla")
    assert again["arms"]["sd3-mhla"] == found["arms"]["sd3-mhla"]
    losses = ("held_out_loss", "held_out_loss_other_caption", "held_out_loss_no_caption")
    assert all(np.isfinite(row[name]) for row in again["arms"].values() for name in losses)
    assert "wan-mhla" in (tmp_path / "out" / "captioned.md").read_text()
    with pytest.raises(SystemExit, match=r"\(steps: found 2, asked for 3\); choose another"):
        run("--steps", "3", "--arms", "sd3-mhla")
