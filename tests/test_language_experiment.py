"""The comparison of language models runs, goes on where it ended, and is drawn."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest

pytest.importorskip("transformers")
SCRIPT = Path(__file__).parents[1] / "experiments" / "language.py"


@pytest.fixture(scope="module")
def script():
    # As Python does when the script is run.
    sys.path.insert(0, str(SCRIPT.parent))
    spec = importlib.util.spec_from_file_location("language_experiment", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    sys.path.remove(str(SCRIPT.parent))
    for name in ("language_models", "language_tables", "language_text"):
        sys.modules.pop(name)


def test_arms_are_trained_once_measured_and_drawn(script, tmp_path, capsys):
    sizes = script.SIZES["tiny"]._replace(hidden_size=16, heads=1, layers=1, steps=1, more_steps=1)
    script.run(tmp_path, sizes, seeds=1, seconds=-1)
    assert "are over" in capsys.readouterr().out
    script.run(tmp_path, sizes, seeds=1, seconds=100_000)
    written = (tmp_path / "language.json").read_text()
    script.run(tmp_path, sizes, seeds=1, seconds=100_000)
    assert written == (tmp_path / "language.json").read_text()
    report = json.loads(written)
    assert len(report["arms"]) == 10
    for arm in report["arms"]:
        assert len(arm["by_position"]) == len(arm["by_given"]) == sizes.held_out
        assert all(0 < x < 9 for row in arm["by_position"] + arm["by_given"] for x in row)
    at_once = {a["arm"]: a["at_once"]["by_position"] for a in report["arms"] if a["converted"]}
    softmax = next(a for a in report["arms"] if a["arm"] == "softmax" and not a["converted"])
    assert at_once["softmax"] == softmax["by_position"] != at_once["mhla"]
    table = script.tables(report)
    assert table.count("| MHLA + window |") == 2
    pytest.importorskip("matplotlib")
    script.draw(report, tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 1000


def test_a_run_goes_on_from_its_one_file(script, tmp_path):
    """An interrupted run, of which only the JSON came back, ends as one that was not."""
    sizes = script.SIZES["tiny"]._replace(hidden_size=16, heads=1, layers=1, steps=2, more_steps=1)
    script.run(tmp_path, sizes, seeds=1, seconds=100_000)
    whole = json.loads((tmp_path / "language.json").read_text())
    (tmp_path / script.PRETRAINED).unlink()
    kept = whole | {"arms": whole["arms"][:-2]}
    (tmp_path / "language.json").write_text(json.dumps(kept))
    script.run(tmp_path, sizes, seeds=1, seconds=100_000)
    resumed = json.loads((tmp_path / "language.json").read_text())
    assert [{**arm, "seconds": 0} for arm in resumed["arms"]] == [
        {**arm, "seconds": 0} for arm in whole["arms"]
    ]


def test_results_of_other_settings_are_refused_before_anything_is_written(script, tmp_path):
    sizes = script.SIZES["tiny"]
    script.run(tmp_path, sizes, seeds=1, seconds=-1)
    before = (tmp_path / "language.json").read_bytes()
    with pytest.raises(SystemExit, match=r"other settings \(sizes.steps: found .*asked for 99\)"):
        script.run(tmp_path, sizes._replace(steps=99), seeds=1, seconds=100_000)
    assert [path.name for path in tmp_path.iterdir()] == ["language.json"]
    assert (tmp_path / "language.json").read_bytes() == before
    # A start whose settings nobody knows.
    (tmp_path / "language.json").rename(tmp_path / script.PRETRAINED)
    with pytest.raises(SystemExit, match="remove it"):
        script.run(tmp_path, sizes, seeds=1, seconds=100_000)
    assert [path.name for path in tmp_path.iterdir()] == [script.PRETRAINED]


def test_held_out_text_is_not_trained_on(script):
    text, held_out, _ = script.read_text()
    windows = script.held_out_windows(held_out, 8193, 96)
    assert windows.shape[1] == 8193 and len(windows) > 20
    assert len({row.tobytes() for row in windows}) == len(windows)
    assert all(bytes(row) not in bytes(text) for row in windows[:10])
