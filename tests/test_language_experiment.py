"""The comparison of language models runs, goes on where it ended, and is drawn."""

import importlib.util
import json
from pathlib import Path

import pytest

pytest.importorskip("transformers")
SCRIPT = Path(__file__).parents[1] / "experiments" / "language.py"


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("language_experiment", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_arms_are_trained_once_measured_and_drawn(script, tmp_path, capsys):
    sizes = script.TINY._replace(hidden_size=16, heads=1, layers=1, steps=1, more_steps=1)
    script.run(tmp_path, sizes, seeds=1, seconds=-1)
    assert "are over" in capsys.readouterr().out
    script.run(tmp_path, sizes, seeds=1, seconds=100)
    written = {path: path.stat().st_mtime_ns for path in (tmp_path / "arms").iterdir()}
    script.run(tmp_path, sizes, seeds=1, seconds=100)
    assert written == {path: path.stat().st_mtime_ns for path in (tmp_path / "arms").iterdir()}
    report = json.loads((tmp_path / "language.json").read_text())
    assert len(report["arms"]) == 10
    for arm in report["arms"]:
        assert len(arm["by_position"]) == len(arm["by_given"]) == sizes.held_out
        assert all(0 < x < 9 for row in arm["by_position"] + arm["by_given"] for x in row)
    at_once = {a["arm"]: a["at_once"]["by_position"] for a in report["arms"] if a["converted"]}
    softmax = next(a for a in report["arms"] if a["arm"] == "softmax" and not a["converted"])
    assert at_once["softmax"] == softmax["by_position"] != at_once["mhla"]
    table = script.tables(report)
    assert table.count("| mhla + window |") == 2
    pytest.importorskip("matplotlib")
    script.draw(report, tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 1000


def test_held_out_text_is_not_trained_on(script):
    text, held_out, _ = script.read_text()
    windows = script.held_out_windows(held_out, script.Sizes(), "cpu")
    assert windows.shape[1] == 8193 and len(windows) > 20
    assert len({row.tobytes() for row in windows.numpy()}) == len(windows)
    assert all(bytes(row) not in bytes(text) for row in windows[:10].numpy())
