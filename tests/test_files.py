"""Output files: whole or not at all, whoever else is writing."""

import subprocess
import sys

import pytest

from mhla_gen.files import check_writable, remove_partials, written_whole
from mhla_gen.training.log import read_log


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


def test_half_a_last_line_of_a_log_is_dropped(tmp_path):
    log = tmp_path / "log.jsonl"
    log.write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "lo')
    assert read_log(log) == [{"step": 1, "loss": 2.0}]


def test_what_a_kill_left_is_removed_and_nothing_else(tmp_path):
    kept = {".hidden", ".checkpoint-20.partial", "1.partial", "samples.npz", ".git"}
    for name in kept - {".git"}:
        (tmp_path / name).write_text("mine")
    (tmp_path / ".git").mkdir()
    program = f"""
import os
from mhla_gen.files import remove_partials, written_whole
with written_whole("{tmp_path}/a.png") as file, written_whole("{tmp_path}/b") as folder:
    file.write_text("half")
    folder.mkdir()
    (folder / "c").write_text("half")
    os.kill(os.getpid(), 9)
"""
    subprocess.run([sys.executable, "-c", program], check=False)
    assert len(list(tmp_path.iterdir())) == len(kept) + 2
    remove_partials(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == kept


@pytest.mark.parametrize("place", ["/proc/x", "/proc/x/y", "file/x"])
def test_a_place_that_takes_no_files_is_named(place, tmp_path):
    (tmp_path / "file").write_text("")
    folder = tmp_path / place
    with pytest.raises(PermissionError, match=rf"{folder} cannot be made: .* is not writable"):
        check_writable(folder)
    check_writable(tmp_path / "new" / "deep")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
