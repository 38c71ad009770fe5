"""The command line as a user meets it: real processes, real messages."""

import re
import subprocess
import sys
from itertools import permutations
from pathlib import Path

import pytest
import torch

from mhla_gen.cli import COMMANDS, main
from mhla_gen.config import SCHEMAS

ROOT = Path(__file__).parents[1]
# The other scripts in these folders measure something and have options of their own.
LAUNCHERS = [
    path
    for folder in ("train", "sample", "metrics")
    for path in (ROOT / folder).glob("*.py")
    if "from mhla_gen.cli import main" in path.read_text()
]


def test_commands_and_schemas_have_the_same_names():
    assert list(COMMANDS) == list(SCHEMAS)
    assert {path.stem for path in LAUNCHERS} == {"train", "sample", "evaluate", "reference"}


def test_help_names_every_command(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["--help"])
    text = capsys.readouterr().out
    for name, command in COMMANDS.items():
        assert re.search(rf"^ +{name}\b", text, re.MULTILINE) and command.summary[:20] in text


@pytest.mark.parametrize("name", COMMANDS)
def test_print_config_prints_a_config_that_loads(name, capsys, tmp_path):
    assert main([name, "--print-config"]) == 0
    file = tmp_path / "config.yaml"
    file.write_text(capsys.readouterr().out)
    assert main([name, str(file), "--print-config"]) == 0
    assert capsys.readouterr().out == file.read_text()


def test_flags_may_stand_anywhere(capsys):
    places = [
        ["train", *words] for words in permutations(("seed=3", "--print-config", "batch_size=8"))
    ]
    printed = set()
    for arguments in [*places, ["--print-config", "train", "seed=3", "batch_size=8"]]:
        assert main(arguments) == 0
        printed.add(capsys.readouterr().out)
    assert len(printed) == 1 and "seed: 3\n" in printed.pop()


@pytest.mark.parametrize("name", COMMANDS)
def test_an_unknown_key_is_one_line_and_a_failure(name, capsys):
    key = next(iter(SCHEMAS[name].__dataclass_fields__))
    assert main([name, f"{key}x=1"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and f"Did you mean: '{key}'" in error
    assert error.startswith(f"mhla-gen {name}: error: ")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_full_disk_is_one_line_with_the_remedy(monkeypatch, capsys):
    def fill(*_, **__):
        with Path("/dev/full").open("w") as file:
            file.write("1")

    monkeypatch.setattr("mhla_gen.cli.doctor.run", fill)
    assert main(["doctor"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "No space left" in error and "make room" in error


@pytest.mark.skipif(torch.cuda.is_available(), reason="asks for a device that is not there")
def test_a_missing_device_is_one_line(tmp_path, capsys):
    for command in ("bench", "sample"):
        folder = tmp_path / "pipe"
        folder.mkdir(exist_ok=True)
        (folder / "model_index.json").write_text("{}")
        key = "pipeline" if command == "sample" else "output_dir"
        assert main([command, f"{key}={folder}", "device=cuda"]) == 2
        assert "finds no CUDA device; use device=auto" in capsys.readouterr().err


def test_errors_have_no_traceback_in_a_real_process(tmp_path):
    command = [sys.executable, "-m", "mhla_gen.cli", "train", str(tmp_path / "none.yaml")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2 and "does not exist" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("launcher", LAUNCHERS, ids=lambda path: path.stem)
def test_every_launcher_starts(launcher, tmp_path):
    command = [sys.executable, str(launcher), "--help"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0 and "CONFIG.yaml" in done.stdout, done.stderr
