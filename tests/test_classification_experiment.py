"""`experiments/classification` in small: a run learns, and the table says what runs found."""

import json
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from mhla_gen.files.digests import file_digest

EXPERIMENT = Path(__file__).parents[1] / "experiments" / "classification"


@pytest.fixture
def scripts(monkeypatch):
    """Scripts of experiments/ import each other as Python does when one of them is run."""
    monkeypatch.syspath_prepend(str(EXPERIMENT))
    import classification_run
    import classification_table

    yield classification_run, classification_table
    for name in ("classification_run", "classification_model", "classification_table"):
        sys.modules.pop(name)


@pytest.fixture
def stripes(tmp_path):
    """Images of two classes: bars across, or upright."""
    labels = np.arange(64) // 3 % 2
    images = np.full((64, 64, 64, 3), 255, dtype=np.uint8)
    images[:, ::8] = 0
    images[labels == 1] = images[labels == 1].swapaxes(1, 2)
    np.savez(tmp_path / "data.npz", arr_0=images, labels=labels)
    return str(tmp_path / "data.npz")


def test_a_run_learns_and_scores_held_out_images_at_its_sizes(scripts, stripes):
    run, _ = scripts
    job = run.Job("mhla-conv-gate", 0, stripes, 8, 12, 1, 0, time.time() + 1e6)
    found = run.train(job)
    assert found["train_loss"] < 0.6
    assert run.train(job._replace(deadline=0.0)) is None
    # Linformer has matrices for one size.
    other = run.train(job._replace(arm="linformer", epochs=1))
    for right, sides in ((found["right"], {"64", "96", "128"}), (other["right"], {"64"})):
        assert right.keys() == sides
        assert all(len(digits) == 16 for digits in right.values())


def test_results_of_other_settings_or_images_are_refused(scripts, stripes, tmp_path, monkeypatch):
    run, _ = scripts
    result = tmp_path / "result.json"

    def resumed(*options):
        command = ["run", stripes, str(result), "--processes", "1", "--arms", "mhla", *options]
        monkeypatch.setattr(sys, "argv", [*command, "--seconds", "-1"])
        run.main()

    settings = {"epochs": 30, "batch": 256, "depth": 1, "limit": 0, "data": file_digest(stripes)}
    kept = {"settings": settings, "speed": {}, "runs": {}, **run.machine()}
    result.write_text(json.dumps(kept), encoding="utf-8")
    resumed("--depth", "1")
    with pytest.raises(SystemExit, match=r"\(depth: found 1, asked for 2\); choose another file"):
        resumed("--depth", "2")
    with np.load(stripes) as arrays:
        np.savez(stripes, arr_0=255 - arrays["arr_0"], labels=arrays["labels"])
    with pytest.raises(SystemExit, match=r"\(data: found \w{12}, asked for \w{12}\)"):
        resumed("--depth", "1")
    assert json.loads(result.read_bytes()) == kept


def test_the_table_pairs_images_and_leaves_out_what_is_missing(scripts):
    _, tables = scripts
    runs = {
        f"{arm}-s{seed}": {"arm": arm, "parameters": 5_400_000, "right": {"64": digits}}
        for arm, both in (("softmax", ("1100", "1110")), ("mhla", ("1110", "1111")))
        for seed, digits in enumerate(both)
    }
    speed = {"linear": [{"forward_images_per_second": 1e4, "training_images_per_second": 3e3}]}
    header, _, softmax, linear, mhla = tables.table({"runs": runs, "speed": speed}).splitlines()
    assert "held-out top-1" in header
    assert "| 62.5 ± 46.9 | - | 50.0, 75.0 |" in softmax and softmax.endswith("| 72.2 |")
    assert "| - | - | - | - | - | - | 10,000 / 3,000 |" in linear
    # One image in four gains a half twice: 0, 0, ½, ½ more.
    assert "| 87.5 ± 24.5 | 25.0 ± 28.3 | 75.0, 100.0 |" in mhla
