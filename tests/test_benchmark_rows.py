"""Benchmarks write rows one by one, go on where they ended, and print their tables."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def load(monkeypatch):
    """Load a script as Python does when it is run."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))

    def loaded(name, *arguments):
        spec = importlib.util.spec_from_file_location(
            f"benchmark_{name}", BENCHMARKS / f"{name}.py"
        )
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        # However busy this machine is, no row is left out.
        words = [f"{name}.py", *map(str, arguments), "--seconds", "100000"]
        monkeypatch.setattr(sys, "argv", words)
        return module

    yield loaded
    sys.modules.pop("rows", None)


def test_rows_are_written_one_by_one_and_not_measured_twice(load, tmp_path, capsys):
    rows, out = load("rows"), tmp_path / "out.json"
    parser, measured = rows.make_parser("Numbers.", seconds=100_000), []
    parser.add_argument("--tiny", action="store_true")

    def measure(case):
        if out.exists():
            assert len(json.loads(out.read_text())["rows"]) == case["n"] - 1
        measured.append(case["n"])
        if case["n"] == 2:
            raise torch.OutOfMemoryError
        if case["n"] == 3 and measured.count(3) == 1:
            raise RuntimeError("interrupted")
        return {"square": case["n"] ** 2}

    def run(*options):
        arguments = parser.parse_args([str(out), *options])
        rows.measure_rows(arguments, [{"n": n} for n in (1, 2, 3)], measure, str)
        return json.loads(out.read_text())

    with pytest.raises(RuntimeError):
        run()
    run("--seconds", "-1")
    assert "left out" in capsys.readouterr().out
    report = run()
    assert measured == [1, 2, 3, 3]
    assert report["rows"] == [
        {"n": 1, "square": 1},
        {"n": 2, "error": "out of memory"},
        {"n": 3, "square": 9},
    ]
    assert report["torch"] == torch.__version__ and report["device"]
    assert report["options"] == {"tiny": False}
    with pytest.raises(
        SystemExit, match=r"other options \(tiny: found False, asked for True\); ch"
    ):
        run("--tiny")
    run("--tiny", "--table")
    # As an earlier version wrote it.
    out.write_text(json.dumps({key: report[key] for key in report if key != "options"}))
    with pytest.raises(SystemExit, match=r"tiny: found None, asked for False"):
        run()
    out.write_text(json.dumps(report | {"device": "another"}))
    with pytest.raises(SystemExit, match="was measured on another"):
        run()
    run("--table")


def test_linformer_table_has_the_papers_numbers_beside_ours(load, tmp_path, capsys):
    script = load("linformer_table", tmp_path / "out.json", "--tokens", "512")
    script.main()
    printed = capsys.readouterr().out
    assert "| times faster, n | k = 128 | k = 256 |" in printed
    assert "(1.5)" in printed and "(1.7)" in printed
    (row,) = json.loads((tmp_path / "out.json").read_text())["rows"]
    faster = row["projected"][0]["against_plain"]["faster"]
    assert faster == row["softmax"]["plain"]["ms"] / row["projected"][0]["linformer"]["ms"]


def test_generation_and_streaming_are_measured(load, tmp_path, capsys):
    pytest.importorskip("transformers")
    out = tmp_path / "language.json"
    options = (out, "--tiny", "--lengths", 300, "--steps", 1, "--batches", 1, 2)
    load("language_speed", *options).main()
    mhla, window = (json.loads(out.read_text())["rows"][n] for n in (1, 2))
    assert mhla["cache_mib"] < window["cache_mib"] and mhla["batch_2"]["tokens_per_s"] > 0
    assert capsys.readouterr().out.count("| 300 |") == 3
    out = tmp_path / "stream.json"
    load("stream_speed", out, "--tiny", "--chunks", 3, "--steps", 1).main()
    mhla, softmax = (row["chunks"] for row in json.loads(out.read_text())["rows"])
    assert mhla[0]["state_gib"] == mhla[2]["state_gib"]
    assert softmax[0]["state_gib"] < softmax[2]["state_gib"]
    assert "| softmax, GiB kept |" in capsys.readouterr().out
