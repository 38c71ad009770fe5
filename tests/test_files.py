"""Output files: whole or not at all, whoever else is writing."""

import os
import re
import shutil
import socket
import subprocess
import sys

import pytest

from mhla_gen.cli import main
from mhla_gen.config import DataConfig, EvaluateConfig, SampleConfig, TrainConfig
from mhla_gen.errors import NotWritableError
from mhla_gen.files import remove_leftovers, write_text, written_whole
from mhla_gen.files.saved import DamagedFileError, read_json
from mhla_gen.outputs.folders import check_replaceable, check_writable, differences, is_free
from mhla_gen.outputs.locks import claimed
from mhla_gen.training.log import read_log


def test_what_is_read_is_of_the_kind_that_was_written(tmp_path):
    path = tmp_path / "numbers.json"
    with pytest.raises(DamagedFileError, match=r"it is missing\); write it again"):
        read_json(path, "write it again")
    path.write_text("[1]")
    assert read_json(path, "", list) == [1]
    with pytest.raises(DamagedFileError, match="expected a dict, found a list"):
        read_json(path, "write it again")


def test_a_mount_point_is_not_replaced():
    with pytest.raises(NotWritableError, match="/ is a mount point"):
        check_replaceable("/")


def test_two_writers_of_one_file_do_not_meet(tmp_path):
    path = tmp_path / "numbers.json"
    with written_whole(path) as first:
        first.write_text("first")
        with written_whole(path) as second:
            assert second != first
            second.write_text("second")
        assert path.read_text() == "second"
    assert path.read_text() == "first" and [p.name for p in tmp_path.iterdir()] == [path.name]


def test_an_error_leaves_what_was_there(tmp_path):
    folder = tmp_path / "set"
    folder.mkdir()
    (folder / "a.txt").write_text("old")
    with pytest.raises(RuntimeError, match="disk"), written_whole(folder) as partial:
        partial.mkdir()
        (partial / "a.txt").write_text("half")
        raise RuntimeError("disk")
    assert (folder / "a.txt").read_text() == "old" and len(list(tmp_path.iterdir())) == 1
    with written_whole(folder) as partial:
        partial.mkdir()
        (partial / "b.txt").write_text("new")
    assert [p.name for p in folder.iterdir()] == ["b.txt"] and len(list(tmp_path.iterdir())) == 1


def test_links_stay_and_what_they_lead_to_is_written(tmp_path):
    big, here = tmp_path / "big", tmp_path / "here"
    (big / "folder").mkdir(parents=True)
    (big / "folder" / "old").touch()
    (big / "file").write_text("old")
    here.mkdir()
    for name in ("folder", "file", "new"):
        (here / name).symlink_to(big / name)
    for name in ("file", "new"):
        write_text(here / name, "more")
        assert (here / name).is_symlink() and (big / name).read_text() == "more"
    with written_whole(here / "folder") as partial:
        partial.mkdir()
        (partial / "more").touch()
    assert (here / "folder").is_symlink()
    assert [path.name for path in (big / "folder").iterdir()] == ["more"]
    # Nothing temporary is left on either side.
    assert len([*here.iterdir()]) == len([*big.iterdir()]) == 3


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no such names")
@pytest.mark.parametrize(
    "command",
    [
        ["train"],
        ["cache", "vae.path=."],
        ["sample", "pipeline=."],
        ["inspect", "."],
        ["inspect", "sensitivity", "."],
        ["convert", "source=x.safetensors"],
    ],
)
def test_an_output_folder_whose_name_is_no_utf_8_is_refused(command, tmp_path, capsys):
    folder = tmp_path / os.fsdecode(b"caf\xe9") / "out"
    assert main([*command, f"output_dir={folder}"]) == 2
    assert r"/caf\xe9/out is not valid UTF-8" in capsys.readouterr().err
    assert not folder.parent.exists()


def test_damaged_lines_of_a_log_cost_no_others(tmp_path, capsys):
    log = tmp_path / "log.jsonl"
    log.write_bytes(
        b'{"step": 1, "loss": 2.0}\n{"step": 2, "lo\n\xff\xfe\n[3]\n'
        b'{"step": 4, "a": "\xe2\x80\xa8"}\n{"s'
    )
    assert read_log(log) == [{"step": 1, "loss": 2.0}, {"step": 4, "a": "\u2028"}]
    assert f"{log} has 4 damaged lines" in capsys.readouterr().err


def test_what_a_kill_left_is_removed_and_nothing_else(tmp_path):
    kept = {".hidden", ".checkpoint-20.partial", "1.partial", "samples.npz", ".git", ".tmpabcdef"}
    for name in kept - {".git"}:
        (tmp_path / name).write_text("mine")
    (tmp_path / ".git").mkdir()
    program = f"""
import os
from mhla_gen.files import remove_leftovers, written_whole
with written_whole("{tmp_path}/a.png") as file, written_whole("{tmp_path}/b") as folder:
    file.write_text("half")
    folder.mkdir()
    (folder / "c").write_text("half")
    remove_leftovers("{tmp_path}", alone=False)
    os.kill(os.getpid(), 9)
"""
    subprocess.run([sys.executable, "-c", program], check=False)
    assert len(list(tmp_path.iterdir())) == len(kept) + 2
    remove_leftovers(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == kept
    # What safetensors leaves goes where nobody else writes.
    remove_leftovers(tmp_path, alone=True)
    assert {path.name for path in tmp_path.iterdir()} == kept - {".tmpabcdef"}


def test_what_a_kill_left_beside_the_target_of_a_link_is_removed(tmp_path, monkeypatch):
    big, here = tmp_path / "big", tmp_path / "here"
    big.mkdir()
    here.mkdir()
    for name in ("file", "folder"):
        (here / name).symlink_to(big / name)
    # No link leads to this one.
    others = big / ".other.0000000f-1-0123abcd.partial"
    others.write_text("half", encoding="utf-8")
    program = f"""
import os
from mhla_gen.files import written_whole
with written_whole("{here}/file") as file, written_whole("{here}/folder") as folder:
    file.write_text("half")
    folder.mkdir()
    os.kill(os.getpid(), 9)
"""
    subprocess.run([sys.executable, "-c", program], check=False)
    assert len(list(big.iterdir())) == 3

    def refuse(*_, **__):
        raise PermissionError("it is another user's")

    with monkeypatch.context() as patch:
        patch.setattr(os, "unlink", refuse)
        remove_leftovers(here)
    assert any(path.name.startswith(".file.") for path in big.iterdir())
    listed, scan = [], os.scandir
    monkeypatch.setattr(os, "scandir", lambda folder: listed.append(folder) or scan(folder))
    remove_leftovers(here, alone=True)
    # One listing serves all links.
    assert listed == [here, big]
    monkeypatch.undo()
    assert [*big.iterdir()] == [others]
    assert {path.name for path in here.iterdir()} == {"file", "folder"}


def test_what_a_living_process_or_another_machine_writes_stays(tmp_path):
    with written_whole(tmp_path / "mine") as mine:
        mine.write_text("half")
        # A process that lives, on this machine; one of another machine; one of an old version.
        others = [mine.with_name(mine.name.replace(f"-{os.getpid()}-", f"-{os.getppid()}-"))]
        others += [tmp_path / ".a.0000000f-1-0123abcd.partial", tmp_path / ".config.yaml.1.partial"]
        for other in others:
            other.write_text("half")
        remove_leftovers(tmp_path)
        assert {*tmp_path.iterdir()} == {mine, *others}
        remove_leftovers(tmp_path, alone=True)
        assert {*tmp_path.iterdir()} == {mine, others[0]}


@pytest.mark.parametrize("stage", ["old set aside", "new in place"])
def test_a_folder_that_was_being_replaced_is_never_lost(stage, tmp_path):
    program = f"""
import os
from pathlib import Path
from mhla_gen import files
with files.written_whole("{tmp_path}/set") as partial:
    partial.mkdir()
    (partial / "old").write_text("")
real, calls = os.replace, []
def replace(source, target):
    real(source, target)
    calls.append(target)
    if len(calls) == {1 if stage == "old set aside" else 2}:
        os.kill(os.getpid(), 9)
os.replace = replace
with files.written_whole("{tmp_path}/set") as partial:
    partial.mkdir()
    (partial / "new").write_text("")
"""
    subprocess.run([sys.executable, "-c", program], check=False)
    remove_leftovers(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["set"]
    name = "old" if stage == "old set aside" else "new"
    assert [path.name for path in (tmp_path / "set").iterdir()] == [name]


def test_what_has_its_name_is_on_the_disk(tmp_path, monkeypatch):
    """Every file, then its folder, is flushed before the name; the name after it."""
    events, flushed, replaced = [], os.fsync, os.replace

    def fsync(descriptor):
        events.append(os.readlink(f"/proc/self/fd/{descriptor}").replace(str(tmp_path), ""))
        flushed(descriptor)

    def replace(source, target):
        events.append("named")
        replaced(source, target)

    monkeypatch.setattr("os.fsync", fsync)
    monkeypatch.setattr("os.replace", replace)
    with written_whole(tmp_path / "set") as partial:
        (partial / "sub").mkdir(parents=True)
        (partial / "sub" / "a").write_text("a")
    name = f"/{partial.name}"
    assert events == [f"{name}/sub/a", f"{name}/sub", name, "named", ""]


def test_a_full_disk_names_the_file(tmp_path):
    """A limit on the size of files is a full disk to a program."""
    program = f"""
import errno, resource, sys
import numpy as np, torch
from mhla_gen import files
from safetensors.torch import save_file
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
big = torch.zeros(10_000)
def saved_by_safetensors():
    with files.written_whole("{tmp_path}/x") as partial:
        save_file({{"big": big}}, partial)
def saved_by_torch():
    with files.written_whole("{tmp_path}/x") as partial:
        torch.save(big, partial)
def array():
    with files.written_whole("{tmp_path}/x") as partial, partial.open("wb") as file:
        np.save(file, big.numpy())
ways = [
    saved_by_safetensors, saved_by_torch, array,
    lambda: files.write_text("{tmp_path}/x", "a" * 2000),
    lambda: files.write_json("{tmp_path}/x", ["a" * 2000]),
    lambda: files.write_tensors("{tmp_path}/x", {{"big": big}}),
    lambda: files.write_lines("{tmp_path}/x", [{{"a": 1}}] * 1000),
    lambda: [files.append_line("{tmp_path}/x", "a" * 600) for _ in range(3)],
]
for way in ways:
    try:
        way()
    except files.WriteError as error:
        assert error.is_full and str(error).startswith("{tmp_path}/x cannot be written ("), error
    else:
        sys.exit(str(way))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


def test_a_folder_that_is_gone_is_not_made_again(tmp_path):
    folder = tmp_path / "out"
    for change in (shutil.rmtree, lambda path: path.rename(tmp_path / "moved")):
        said = f"{folder} was removed, moved or replaced"
        with pytest.raises(FileNotFoundError, match=said), claimed(folder):
            write_text(folder / "deep" / "a.txt", "a")
            change(folder)
            write_text(folder / "deep" / "b.txt", "b")
        assert not folder.exists()
    with claimed(folder):
        pass
    assert not folder.exists()


def test_two_commands_never_have_one_folder(tmp_path):
    folder = tmp_path / "out"
    with claimed(folder):
        with claimed(folder):
            pass
        program = (
            f"from mhla_gen.outputs.locks import claimed\nwith claimed('{folder}'): print('has it')"
        )
        second = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    who = rf"is writing to {folder} \(process {os.getpid()} on {socket.gethostname()} since "
    assert second.returncode == 1 and re.search(who, second.stderr), second.stderr
    assert not folder.exists()
    # A killed command keeps nothing.
    kill = program.replace("print('has it')", "__import__('os').kill(__import__('os').getpid(), 9)")
    subprocess.run([sys.executable, "-c", kill])
    assert [path.name for path in folder.iterdir()] == [".lock"] and is_free(folder)
    with claimed(folder):
        assert (folder / ".lock").exists()
    assert [*folder.iterdir()] == []


@pytest.mark.parametrize(
    "place, why",
    [
        ("/proc/x", "/proc is not writable"),
        ("/proc/x/y", "/proc is not writable"),
        ("file/x", "file is a file"),
        ("file", "file is a file"),
    ],
)
def test_a_place_that_takes_no_files_is_named(place, why, tmp_path):
    (tmp_path / "file").write_text("")
    folder = tmp_path / place
    with pytest.raises(PermissionError, match=rf"{folder} cannot be made: .*{why}"):
        check_writable(folder)
    check_writable(tmp_path / "new" / "deep")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_path_is_the_same_under_any_spelling(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "d").mkdir()
    (tmp_path / "link").symlink_to("d")

    def run(path, **more):
        return TrainConfig(data=DataConfig(source="folder", path=path, image_size=8, **more))

    for spelled in ("d/", "./d", "../" + tmp_path.name + "/d", str(tmp_path / "d"), "link"):
        assert differences(run("d"), run(spelled)) == []
    assert differences(run("d"), run("e")) == ["data.path: found d, asked for e"]
    # Only paths: a column of that name is a column.
    (change,) = differences(run("d", label_column="d"), run("d", label_column="./d"))
    assert change.startswith("data.label_column")
    sets = [EvaluateConfig(samples=samples) for samples in (["d", "e"], ["./d", "e/"], ["d"])]
    assert differences(*sets[:2]) == [] and differences(sets[0], sets[2])
    nested = [SampleConfig(evaluate=EvaluateConfig(reference=name)) for name in ("d", "./d/")]
    assert differences(*nested) == []


def test_an_error_is_noted_in_the_log_of_a_run(tmp_path):
    def fail(name):
        with pytest.raises(ZeroDivisionError), claimed(tmp_path / name):
            raise ZeroDivisionError("division by zero of caf\udce9")

    fail("none")
    assert not (tmp_path / "none").exists()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text("job: doctor\n")
    fail("run")
    fail("run")
    log = (tmp_path / "run" / "errors.log").read_text()
    assert (
        log.count("ZeroDivisionError: division by zero of caf\\udce9") == 2 and "Traceback" in log
    )
