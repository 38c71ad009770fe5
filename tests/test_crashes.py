"""Killed at any write, on a full disk, with damaged files: restarts go on, and results are right.

A few cases of each run with the other tests; `make test-crash` runs all of them, and CRASH_TESTS=N
at most N of each.
"""

import itertools
import os
import random
import shutil
import sys

import pytest
from crashes import Server, is_one_sentence, make_commands, make_more_commands

NAMES = ["train", "cache", "sample", "evaluate"]
MORE = ["distill", "reference", "convert", "inspect", "scan"]
FULL = "CRASH_TESTS" in os.environ
MOST = int(os.environ.get("CRASH_TESTS", "0").replace("all", "1000000"))
# Files whose loss or change costs no result: they only tell, or are made again.
_TELL = ("log.jsonl", "previews", "samples.png", "quarantine.jsonl", "errors.log")


@pytest.fixture(scope="module")
def server():
    server = Server()
    yield server
    server.close()
    # Past pytest, which shows nothing of tests that pass.
    print("\ncommands that were run:", dict(server.counts), file=sys.__stdout__)


@pytest.fixture(scope="module")
def commands(server, tmp_path_factory):
    """Each with what an undisturbed run leaves, and how many changes it makes."""
    root = tmp_path_factory.mktemp("crash")
    commands = make_commands(root) | make_more_commands(root)
    for command in commands.values():
        done = command.run(server)
        assert done["status"] == 0, done["output"]
        command.expected = command.result(command.root)
        command.changes = done["changes"]
        command.finished = shutil.copytree(
            command.root, command.root.with_name(f"{command.name}-1")
        )
    return commands


def chosen(cases, few):
    """All of them, or a few that are spread over them."""
    cases, few = list(cases), MOST if FULL else few
    if len(cases) <= few:
        return cases
    return [cases[i * (len(cases) - 1) // (few - 1)] for i in range(few)]


@pytest.fixture(autouse=True)
def whole_training(request):
    """`sample` draws from a finished run, which other tests disturb."""
    yield
    commands = request.getfixturevalue("commands")
    for command in commands.values():
        restore(command)


def restore(command):
    shutil.rmtree(command.root, ignore_errors=True)
    shutil.copytree(command.finished, command.root)


def require_right(command, server, what):
    """The same command, given again, ends well and with the right result."""
    done = command.run(server)
    assert done["status"] == 0, f"{command.name} after {what}: {done['output']}"
    assert command.result(command.root) == command.expected, f"{command.name} after {what}"
    # A stage that is finished is not opened again.
    left = [p for p in command.root.rglob(".*") if p.name not in (".work", ".lock")]
    assert not left, f"{command.name} after {what} leaves {left}"


@pytest.mark.parametrize("name", NAMES + MORE)
def test_killed_before_any_change(name, commands, server, record_property):
    """Every write, rename and removal once; at some, the restart is killed there, too."""
    command = commands[name]
    cases = chosen(range(1, command.changes + 1), 3 if name in NAMES else 2)
    assert command.changes > 10
    for number in cases:
        command.clear()
        for _ in range(1 + number % 2):
            done = command.run(server, kill_at=number)
            assert done["status"] in (-9, 0), done["output"]
        require_right(command, server, f"a kill before change {number}")
    record_property("kills", len(cases))


@pytest.mark.parametrize("name", NAMES + MORE * FULL)
def test_killed_at_random_moments(name, commands, server):
    command, pick = commands[name], random.Random(name)
    for _ in range(min(20, MOST) if FULL else 1):
        command.clear()
        moments = [pick.random() * 3 for _ in range(3)]
        for moment in moments:
            command.run(server, kill_after=moment)
        require_right(command, server, f"kills after {moments}")


@pytest.mark.parametrize("name", NAMES + MORE * FULL)
def test_a_disk_that_is_full(name, commands, server):
    """No file may be longer than this: the first one, or only the largest, does not fit."""
    command = commands[name]
    sizes = {path.stat().st_size for path in command.finished.rglob("*") if path.is_file()}
    for size in chosen(sorted(sizes), 2):
        command.clear()
        done = command.run(server, limit=max(size - 1, 1))
        assert done["status"] in (0, 2), done["output"]
        said = "cannot be written (File too large"
        assert done["status"] == 0 or is_one_sentence(done["output"], said), done["output"]
        require_right(command, server, f"files of at most {size - 1} bytes")


@pytest.mark.skipif(not FULL or os.geteuid() != 0, reason="mounts a file system")
@pytest.mark.parametrize("name", NAMES + MORE)
def test_a_file_system_that_fills_up(name, commands, server):
    command = commands[name]
    need = sum(path.stat().st_size for path in command.finished.rglob("*") if path.is_file())
    for part in range(1, 9):
        command.clear()
        size = max(4096, need * part // 8)
        if os.system(f"mount -t tmpfs -o size={size} tmpfs {command.root}"):
            pytest.skip("file systems cannot be mounted here")
        try:
            done = command.run(server)
            assert done["status"] in (0, 2), done["output"]
            said = "cannot be written (No space left"
            assert done["status"] == 0 or is_one_sentence(done["output"], said), done["output"]
            assert not os.system(f"mount -o remount,size=100m {command.root}")
            require_right(command, server, f"a disk of {size} bytes")
        finally:
            os.system(f"umount {command.root}")


def damaged(content, how):
    return content[: len(content) // 2] if how == "halved" else b""


def states(command, server):
    """Folders as they are when all is done, and when a command was killed on its way."""
    yield "finished", lambda: restore(command)
    for part in (2, 3):

        def killed(part=part):
            command.clear()
            command.run(server, kill_at=command.changes * part // 4)

        yield f"killed at {part}/4", killed


@pytest.mark.parametrize("how", ["halved", "emptied", "missing"])
@pytest.mark.parametrize("name", NAMES + MORE * FULL)
def test_damaged_outputs(name, how, commands, server):
    """The same command again: the right result, or one sentence that names what is wrong."""
    command = commands[name]
    for state, make in itertools.islice(states(command, server), 3 if FULL else 1):
        make()
        files = sorted(p.relative_to(command.root) for p in command.root.rglob("*") if p.is_file())
        files = [p for p in files if not any(part in str(p) for part in _TELL)]
        for file in chosen(files, 2):
            make()
            path = command.root / file
            if not path.is_file():
                continue
            content = path.read_bytes()
            path.unlink()
            if how != "missing":
                path.write_bytes(damaged(content, how))
            done = command.run(server)
            about = f"{name}, {state}, {file} {how}: {done['output']}"
            if done["status"] == 0:
                assert result_without_log(command) == without_log(command.expected), about
            else:
                folders = {str(p) for p in path.parents if p.is_relative_to(command.root)}
                named = {str(path), *folders} - {str(command.root)}
                assert done["status"] == 2 and is_one_sentence(done["output"], *named), about


def without_log(result):
    return result[0] if isinstance(result, tuple) else result


def result_without_log(command):
    return without_log(command.result(command.root))


@pytest.mark.parametrize("how", ["halved", "emptied", "missing"])
def test_sampling_from_damaged_runs(how, commands, server):
    train, command = commands["train"], commands["sample"]
    places = ["run/pipeline", "run/checkpoint-6/pipeline"]
    for place in places:
        files = sorted(p for p in (train.finished / place).rglob("*") if p.is_file())
        for file in chosen(files, 2):
            restore(train)
            if place != places[0]:
                shutil.rmtree(train.root / places[0])
            path = train.root / file.relative_to(train.finished)
            path.unlink()
            if how != "missing":
                path.write_bytes(damaged(file.read_bytes(), how))
            command.clear()
            done = command.run(server)
            about = f"{path} {how}: {done['output']}"
            if done["status"] == 0:
                assert result_without_log(command) == without_log(command.expected), about
            else:
                named = {str(p) for p in path.parents if p.is_relative_to(train.root / "run")}
                said = is_one_sentence(done["output"], str(path), *named)
                assert done["status"] == 2 and said, about
