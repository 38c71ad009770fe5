"""The command line as a user meets it: real processes, real messages."""

import os
import re
import subprocess
import sys
from itertools import pairwise, permutations
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch

from mhla_gen.cli import COMMANDS, main
from mhla_gen.config import SCHEMAS
from mhla_gen.errors import MissingError, UserError, shortened

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
    lines = file.read_text().splitlines()
    assert lines[0] == f"job: {name}" and lines[1].startswith("# ")
    for before, line in pairwise(lines[1:]):
        if re.match(r" *\w+:", line):
            assert before.lstrip().startswith("# "), line
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
    assert error.count("\n") == 1 and f"no setting {key}x; did you mean {key}?" in error
    assert error.startswith(f"mhla-gen {name}: error: ")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_full_disk_is_one_line_with_the_remedy(monkeypatch, capsys):
    def fill(*_, **__):
        with Path("/dev/full").open("w") as file:
            file.write("1")

    monkeypatch.setattr("mhla_gen.cli.commands.doctor", fill)
    assert main(["doctor"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "No space left" in error and "free some space" in error


@pytest.mark.parametrize(
    "allocate",
    [
        lambda: torch.empty(2**50),
        lambda: torch.empty(2**31, 2**31, 2**31),
        lambda: np.empty(2**50),
    ],
)
def test_what_fits_no_memory_is_one_line_with_the_remedy(allocate, monkeypatch, capsys):
    monkeypatch.setattr("mhla_gen.cli.commands.doctor", lambda *_, **__: allocate())
    assert main(["doctor"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "out of memory; lower batch_size" in error


def test_a_long_value_is_shown_by_its_ends(capsys):
    value = "[" + ", ".join(map(str, range(9000))) + "]"
    assert main(["train", f"model.mhla.layers={value}", f"max_steps={value}"]) == 2
    error = capsys.readouterr().err
    assert len(error) < 1300 and error.startswith("mhla-gen train: error: max_steps ")
    assert " … " in error and "8998, 8999]" in error
    # Line by line, and nothing of what is short.
    lines = f"files:\n{'a' * 1200}\n{'b' * 1201}"
    assert shortened(lines) == f"files:\n{'a' * 1200}\n{'b' * 800} … {'b' * 400}"


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


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["trian"], "there is no command trian; did you mean train?"),
        (["dance"], "there is no command dance; the commands are quickstart, train"),
        (["train", "--seed", "3"], "written key=value: seed=3 instead of --seed"),
        (["train", "--seed=3"], "written key=value: seed=3 instead of --seed=3"),
        (["train", "--max-steps", "3"], "written key=value: max_steps=3 instead of --max-steps"),
        (["train", "--data.path=d"], "written key=value: data.path=d instead of"),
        (["train", "--max_stps", "3"], "written key=value: max_steps=3 instead of"),
        (["train", "--config", "a.yaml"], "without a flag: mhla-gen train a.yaml"),
        (["train", "-c", "a.yaml"], "without a flag: mhla-gen train a.yaml"),
        (["train", "--dryrun"], "there is no flag --dryrun"),
        (["sample", "--guidance_scale"], "written key=value: guidance_scale=… instead of"),
    ],
)
def test_words_of_other_command_lines_are_answered_with_ours(words, said, capsys):
    assert main(words) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1


def test_a_folder_may_have_an_equals_sign(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "lr=1e-4").mkdir()
    (tmp_path / "seed=1").mkdir()
    for word, line in (
        ("lr=1e-4", "pipeline: lr=1e-4"),
        (str(tmp_path / "lr=2"), f"pipeline: {tmp_path}/lr=2"),
        ("seed=1", "seed: 1"),
    ):
        assert main(["sample", word, "--print-config"]) == 0
        assert line in capsys.readouterr().out.splitlines()
    assert main(["sample", "lr=2"]) == 2
    assert "there is no setting lr; " in capsys.readouterr().err


def test_faults_of_the_program_keep_their_traceback(monkeypatch, capsys):
    for error in (ValueError("bug"), TypeError("bug"), FileNotFoundError(2, "gone", "x")):
        monkeypatch.setattr("mhla_gen.cli.commands.doctor", Mock(side_effect=error))
        with pytest.raises(type(error)):
            main(["doctor"])
    for error in (UserError("said"), PermissionError(13, "said", "x"), MissingError("said")):
        monkeypatch.setattr("mhla_gen.cli.commands.doctor", Mock(side_effect=error))
        assert main(["doctor"]) == 2
        said = capsys.readouterr().err
        assert "said" in said and said.count("\n") == 1
        monkeypatch.setenv("MHLA_GEN_TRACEBACK", "1")
        with pytest.raises(type(error)):
            main(["doctor"])
        monkeypatch.delenv("MHLA_GEN_TRACEBACK")


def test_errors_for_users_are_of_our_own_class():
    """Others keep their traceback; those of ops are about arguments of a call."""
    own = re.compile(r"raise (ValueError|FileNotFoundError|FileExistsError|PermissionError)\(")
    for path in (ROOT / "mhla_gen").rglob("*.py"):
        if "ops" not in path.relative_to(ROOT).parts:
            found = own.search(path.read_text())
            assert not found, f"{path}: raise a class of mhla_gen.errors, found {found[0]}"


def test_processors_are_prepared_unless_the_user_has(tmp_path):
    code = (
        "import os, sys; from mhla_gen.cli import main; main(['doctor', '--print-config']);"
        "print(os.environ['MKL_CBWR'], os.environ['OMP_WAIT_POLICY'], 'torch' in sys.modules)"
    )
    plain = {k: v for k, v in os.environ.items() if k not in ("MKL_CBWR", "OMP_WAIT_POLICY")}
    given = {"MKL_CBWR": "COMPATIBLE", "OMP_WAIT_POLICY": "active"}
    for settings, expected in (({}, "AUTO,STRICT passive"), (given, "COMPATIBLE active")):
        command = [sys.executable, "-c", code]
        done = subprocess.run(command, env=plain | settings, capture_output=True, text=True)
        # They are read when torch is loaded.
        assert done.stdout.splitlines()[-1] == f"{expected} False", done.stderr
    code = "import sys, mhla_gen.cli; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
