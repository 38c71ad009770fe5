"""Benchmarks share GPUs: they time in turns, start as there is room, and end in time."""

import json
import multiprocessing
import os
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def benchmarks(monkeypatch):
    """Modules that the scripts import, by name."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    before = set(sys.modules)
    yield __import__
    for name in set(sys.modules) - before:
        if Path(getattr(sys.modules[name], "__file__", None) or "").parent == BENCHMARKS:
            del sys.modules[name]


def compile_and_time(turns, name, locks, log):
    def note(what):
        with log.open("a") as file:
            file.write(json.dumps([time.monotonic(), name, what, len(locks)]) + "\n")

    for _ in range(3):
        with turns(*locks) as alone:
            note("compiles")
            time.sleep(0.01)
            note("waits")
            with alone():
                note("times")
                time.sleep(0.01)
                note("waits")


def test_a_benchmark_times_while_nothing_else_uses_its_gpus(benchmarks, tmp_path):
    turns = benchmarks("sharing").turns
    first, second = tmp_path / "gpu-0.lock", tmp_path / "gpu-1.lock"
    uses = {"a": [first], "b": [second], "c": [first, second], "d": [first, second], "e": [first]}
    fork = multiprocessing.get_context("fork")
    started = [
        fork.Process(target=compile_and_time, args=(turns, name, locks, tmp_path / "log"))
        for name, locks in uses.items()
    ]
    for process in started:
        process.start()
    for process in started:
        # Processes that wait for each other would never end.
        process.join(120)
        assert process.exitcode == 0
    busy = {}
    for _, name, what, _ in sorted(map(json.loads, (tmp_path / "log").read_text().splitlines())):
        busy[name] = what
        for timing in (name for name, what in busy.items() if what == "times"):
            others = {n for n in busy if n != timing and set(uses[n]) & set(uses[timing])}
            assert all(busy[other] == "waits" for other in others), busy


def share_and_fail(turns, rank, folder, how):
    """Two benchmarks, one after the other, in two processes of which the second one fails."""
    store = dist.FileStore(str(folder / "store"), 2)
    dist.init_process_group("gloo", rank=rank, world_size=2, store=store)
    said = []
    for number in range(2):
        try:
            with turns(folder / "gpu.lock") as alone:
                fails = rank == 1 and number == 0
                if fails and how == "ends":
                    os._exit(1)
                assert not (fails and how == "before")
                with alone():
                    assert not (fails and how == "within")
        except (AssertionError, RuntimeError) as error:
            said.append(f"{number}: {type(error).__name__}: {error}".splitlines()[0])
            if how == "ends":
                break
    (folder / f"{rank}").write_text("\n".join(said))
    os._exit(0)


@pytest.mark.parametrize("how", ["before", "within", "ends"])
def test_a_process_that_fails_is_not_waited_for(how, benchmarks, tmp_path, monkeypatch):
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    turns = benchmarks("sharing").turns
    fork = multiprocessing.get_context("fork")
    started = [
        fork.Process(target=share_and_fail, args=(turns, rank, tmp_path, how)) for rank in (0, 1)
    ]
    for process in started:
        process.start()
    for process in started:
        process.join(120)
        assert process.exitcode is not None
    reason = "ended" if how == "ends" else "failed; its error is above"
    said = (tmp_path / "0").read_text().splitlines()
    assert said[0].startswith(
        f"0: FailedElsewhereError: another process of this benchmark {reason}"
    )
    # Both go on with the next one, and nothing fails there.
    assert len(said) == 1
    if how != "ends":
        failed = (tmp_path / "1").read_text().splitlines()
        assert len(failed) == 1 and failed[0].startswith("0: AssertionError")


@pytest.fixture
def jobs(benchmarks, tmp_path):
    """The module, and a function that makes jobs of small scripts."""
    module = benchmarks("jobs")

    def make(name, code, gpus=1, gib=1.0):
        path = tmp_path / f"{name}.py"
        path.write_text("import json, os, sys, time\n" + code)
        return module.Job(name, str(path), ("said",), gpus, gib)

    return module, make


ROW = "json.dump({'rows': [{'argv': sys.argv[2:]}]}, open(sys.argv[1], 'w'))\n"


def run(module, jobs, folder, host=None, seconds=120, limit=120):
    found = {}
    host = host or module.Host(2, 10, 8)
    module.run_jobs(
        jobs, host, folder, seconds, limit, lambda job, rows: found.update({job.name: rows})
    )
    return found


def test_jobs_give_their_rows_and_say_why_they_failed(jobs, tmp_path):
    module, make = jobs
    good = replace(make("good", "assert os.environ['A'] == 'b=c'\n" + ROW), variables=("A=b=c",))
    bad = make("bad", ROW + "print('noise', file=sys.stderr)\nraise ValueError('too small')\n")
    found = run(module, [good, bad], tmp_path)
    ((row,), (kept, error)) = found["good"], found["bad"]
    assert row["argv"] == [*kept["argv"][:2], row["argv"][2]]
    assert row["argv"][:2] == ["said", "--locks"] and row["argv"][2].endswith(".lock")
    assert error["error"] == "ValueError: too small"
    # Rows of an earlier try are not those of one that measures nothing.
    again = run(module, [make("bad", "raise ValueError('too large')\n")], tmp_path)
    assert [row.get("error") for row in again["bad"]] == ["ValueError: too large"]


def test_a_job_that_hangs_is_ended_and_the_next_one_runs(jobs, tmp_path, monkeypatch):
    module, make = jobs
    hangs = make("hangs", ROW + "time.sleep(1000)\n", gib=10)
    rows = tmp_path / "hangs.json"

    def later():
        """The time; once there are rows it is later than any limit."""
        written = rows.is_file() and rows.stat().st_size
        return time.perf_counter() + (1000 if written else 0)

    monkeypatch.setattr(module, "time", SimpleNamespace(perf_counter=later, sleep=time.sleep))
    found = run(
        module, [hangs, make("next", ROW, gib=10)], tmp_path, module.Host(1, 10, 8), seconds=2000
    )
    assert [row.get("error") for row in found["hangs"]] == [None, "did not end in time"]
    assert "error" not in found["next"][0]


def test_nothing_begins_after_the_time_and_what_runs_is_ended(jobs, tmp_path):
    module, make = jobs
    many = [make(f"job{n}", "time.sleep(100)", gib=10) for n in range(4)]
    found = run(module, many, tmp_path, seconds=1)
    assert sorted(found) == ["job0", "job1"]
    assert all(rows[0]["error"] == "did not end in time" for rows in found.values())


def test_jobs_take_the_gpus_with_most_memory_left(jobs):
    module, make = jobs
    host = module.Host(2, 10, 3)
    one, two, large = (
        make("one", "", gib=4),
        make("two", "", gpus=2, gib=5),
        make("large", "", 1, 99),
    )
    assert host.take(one) == [0] and host.take(two) == [0, 1]
    assert host.take(two) is None and host.take(one) == [1]
    # There is memory for a fourth, but no core.
    small = make("small", "", gib=0.5)
    assert host.take(small) is None
    host.give_back(one, [0])
    assert host.take(small) == [0]
    for job, gpus in ((small, [0]), (one, [1]), (two, [0, 1])):
        assert host.take(large) is None
        host.give_back(job, gpus)
    assert host.take(large) == [0]


def test_no_job_joins_those_that_may_be_ready(jobs, monkeypatch):
    module, make = jobs
    now = [0.0]
    monkeypatch.setattr(module, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    host, one, two = module.Host(3, 10, 9), make("one", "", gib=2), make("two", "", gpus=2, gib=2)
    assert host.take(one) == [0] and host.take(two) == [1, 2]
    now[0] = 30
    assert host.take(one) is None
    host.give_back(one, [0])
    # Though the others have more memory left.
    assert host.take(one) == [0] == host.take(one) and host.take(two) is None
    host.give_back(two, [1, 2])
    assert host.take(two) == [1, 2]


def test_jobs_see_gpus_of_those_that_the_host_shows(jobs, tmp_path, monkeypatch):
    module, make = jobs
    code = "row = {'seen': os.environ['CUDA_VISIBLE_DEVICES']}\n"
    code += "json.dump({'rows': [row]}, open(sys.argv[1], 'w'))\n"
    for shown, seen in (("2,5", ["2", "5"]), (None, ["0", "1"])):
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        if shown:
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", shown)
        found = run(module, [make(name, code, gib=6) for name in ("a", "b")], tmp_path)
        assert sorted(row["seen"] for (row,) in found.values()) == seen


def test_softmax_has_a_kernel_where_training_keeps_cudnn_out(benchmarks, monkeypatch):
    steps = benchmarks("steps")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    before = torch.backends.cuda.cudnn_sdp_enabled(), torch.backends.cuda.math_sdp_enabled()
    with steps.attention_kernel("softmax"):
        torch.backends.cuda.enable_cudnn_sdp(False)
        assert torch.backends.cuda.flash_sdp_enabled()
        assert not torch.backends.cuda.math_sdp_enabled()
    assert before == (
        torch.backends.cuda.cudnn_sdp_enabled(),
        torch.backends.cuda.math_sdp_enabled(),
    )


@pytest.mark.parametrize("graphs", [[], ["--no-cuda-graphs"]])
def test_steps_that_cannot_be_recorded_are_timed_too(graphs, benchmarks, tmp_path):
    """Under FSDP2, without torch.compile, on a CPU: training refuses to record these."""
    small = ["--models", "DiT-S/8", "--num-layers=1", "--batch-size=2", "--precision=fp32"]
    how = ["--pixels=256", "--attention=mhla", "--compile=none", "--seconds=0.01", *graphs]
    benchmarks("train_speed").main([str(tmp_path / "out.json"), *small, *how])
    (row,) = json.loads((tmp_path / "out.json").read_bytes())["rows"]
    assert "error" not in row and row["images_per_second"] > 0
    assert row["recorded"] is False


def test_speeds_are_compared_with_one_gpu_and_missing_rows_are_known(benchmarks, tmp_path, capsys):
    scaling = benchmarks("scaling")
    facts = {"attention": "mhla", "pixels": 512, "model": "DiT-XL/2"}
    rows = [
        {"part": "dit-ddp", "gpus": 1, "images_per_second": 100.0, **facts},
        {"part": "dit-ddp", "gpus": 2, "images_per_second": 190.0, **facts},
        {"part": "dit-ddp", "gpus": 2, "error": "did not end in time", **facts},
        {"part": "dit-fsdp", "gpus": 2, "images_per_second": 180.0, **facts},
        {"part": "features", "gpus": 1, "error": "out of memory"},
        {
            "part": "samples",
            "attention": "mhla",
            "gpus": 1,
            "images_per_second": 9.0,
            "sha256": "a",
        },
        {
            "part": "samples",
            "attention": "mhla",
            "gpus": 2,
            "images_per_second": 18.0,
            "sha256": "b",
        },
    ]
    _, ddp, _, fsdp, *_ = scaling.compared(rows)
    assert (ddp["times"], ddp["share"]) == (1.9, 0.95)
    assert (fsdp["times"], fsdp["share"]) == (1.8, 0.9)
    path = tmp_path / "scaling.json"
    path.write_text(json.dumps({"rows": rows, "device": "another", "torch": "1"}))
    scaling.main([str(path), "--table"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[2].startswith("| DiT-XL/2, 512 px, DDP | MHLA | 100/s | 190/s, 1.90× |")
    assert any(x.startswith("| DiT-XL/2, 512 px, FSDP2 | MHLA |  | 180/s, 1.80× |") for x in lines)
    assert any("other bytes" in line for line in lines if line.startswith("| samples"))
    parts = ["dit-ddp", "dit-fsdp", "features"]
    left = list(scaling.missing(SimpleNamespace(parts=parts, names=["*"]), [1, 2], rows))
    few = SimpleNamespace(parts=parts, names=["features-1", "dit-fsdp-softmax-*"])
    assert set(scaling.missing(few, [1, 2], rows)) == {
        (scaling.Case("features"), 1),
        (scaling.Case("dit-fsdp", "softmax", 512), 2),
        (scaling.Case("dit-fsdp", "softmax", 256), 2),
    }
    assert (scaling.Case("features"), 1) in left
    plain = [case for case, _ in left if not case.variable]
    assert not [case for case in plain if case.attention == "mhla" and case.pixels == 512]
    assert (scaling.Case("dit-fsdp", "mhla", 256), 1) not in left
    assert [gpus for case, gpus in left if case.variable == "NCCL_MAX_CTAS=8"] == [2, 2]
    with pytest.raises(SystemExit, match="was measured on another"):
        scaling.main([str(path)])
