"""`mhla-gen bench` on a CPU: rows, files, and where MHLA overtakes softmax."""

import json
import re
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tape import Tape, stand_in
from torch.utils._python_dispatch import TorchDispatchMode

import mhla_gen.bench.ops
from mhla_gen import ops
from mhla_gen.bench import benchmark
from mhla_gen.bench.benchmark import find_crossover
from mhla_gen.bench.model import bench_model
from mhla_gen.bench.ops import Case, attention, settings_of
from mhla_gen.bench.profiles import kind_of, unused_time
from mhla_gen.cli import main
from mhla_gen.config import BenchConfig, ConfigError, load_config


@pytest.fixture(autouse=True)
def briefly(monkeypatch):
    """Times are taken as ever, for a shorter while."""
    monkeypatch.setattr("mhla_gen.bench.measure._CPU_SECONDS", 0.01)


@pytest.fixture
def clock(monkeypatch):
    """A clock that goes on by a millisecond with every operation, so that more work is slower."""

    class Clock(TorchDispatchMode):
        now = 0.0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.now += 1e-3
            return func(*args, **kwargs or {})

    with Clock() as mode:
        own = SimpleNamespace(perf_counter=lambda: mode.now)
        monkeypatch.setattr("mhla_gen.bench.measure.time", own)
        yield mode


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("apply_kernel", "MHLA"),
        (
            "void at::native::multi_tensor_apply_kernel<FusedOptimizerTensorListMetadata<4>",
            "optimizer",
        ),
        ("triton_poi_fused_linear_mhla_backward_mul_sigmoid_view_12", "fused elementwise"),
        ("void cudnn::fusion::compute_dot_do_o<true>(void const*", "softmax attention"),
        ("nvjet_sm90_tst_192x192_64x4_2x1_v_bz_coopB_bias_TNN", "products"),
        ("conv_frames_kernel", "depthwise convolution"),
        ("void at::native::reduce_kernel<128, 4>", "others"),
        # Averages of weights; two halves of a layer are combined out of place.
        ("aten::lerp_", "optimizer"),
        ("aten::lerp", "others"),
    ],
)
def test_kernels_are_told_apart_by_their_names(name, kind):
    assert kind_of(name) == kind


def test_each_of_our_kernels_has_a_kind():
    kinds = {"tile": "exact tiles", "depthwise": "depthwise convolution", "adamw": "optimizer"}
    for path in (Path(ops.__file__).parent / "kernels").glob("*.py"):
        kind = kinds.get(path.stem.partition("_")[0], "MHLA")
        for name in re.findall(r"def (\w+_kernel)\(", path.read_text()):
            assert kind_of(name) == kind, name


def test_operators_are_measured_side_by_side(tmp_path, capsys):
    settings = ["grids=[[3,4],[4,4]]", "num_heads=1", "head_dim=8", "device=cpu"]
    assert main(["bench", "ops", f"output_dir={tmp_path}", *settings]) == 0
    result = json.loads((tmp_path / "bench.json").read_text())
    assert (tmp_path / "bench.png").stat().st_size > 0
    assert {"device", "torch", "command", "date"} <= set(result)
    assert [(row["tokens"], row["method"]) for row in result["rows"]] == [
        (tokens, method)
        for tokens in (12, 16)
        for method in ("softmax", "linear", "blockwise", "blockwise exact=0.125")
    ]
    for row in result["rows"]:
        assert row["forward_ms"] > 0 and row["train_ms"] > 0 and row["forward_ratio"] > 0
    assert result["dtype"] == "float32"
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith("measuring ops: softmax, linear, ") and "; 3×4, 4×4 tokens" in said[0]


def test_an_interrupted_measurement_goes_on_with_the_same_settings(tmp_path, capsys, monkeypatch):
    folder = tmp_path / "bench"
    command = ["bench", "ops", "grids=[[3,4],[4,4]]", "num_heads=1", "head_dim=8", "device=cpu"]
    whole, calls = mhla_gen.bench.ops._measure, []

    def interrupted(*arguments):
        calls.append(arguments)
        if len(calls) == 6:
            raise KeyboardInterrupt
        return whole(*arguments)

    monkeypatch.setattr("mhla_gen.bench.ops._measure", interrupted)
    assert main([*command, f"output_dir={folder}"]) == 130
    assert "mhla-gen bench: interrupted" in capsys.readouterr().err
    monkeypatch.undo()
    first = json.loads((folder / "bench.json").read_text())
    assert len(first["rows"]) == 5 and not (folder / "bench.png").exists()
    # Refused before anything is written: other settings, and rows of another version of torch.
    before = [path.read_bytes() for path in folder.iterdir()]
    for more, said in ((["num_heads=2"], "num_heads: found 1, asked for 2"), ([], "torch: found")):
        if not more:
            monkeypatch.setattr(torch, "__version__", "2.0")
        assert main([*command, *more, f"output_dir={folder}"]) == 2
        assert f"a measurement with other settings ({said}" in capsys.readouterr().err
    monkeypatch.undo()
    assert [path.read_bytes() for path in folder.iterdir()] == before
    # From where it is now, under another name.
    moved = folder.rename(tmp_path / "moved")
    assert main([*command, f"output_dir={moved}", "--dry-run"]) == 0
    assert "all but 5 rows" in capsys.readouterr().out
    assert main([*command, f"output_dir={moved}"]) == 0
    rows = json.loads((moved / "bench.json").read_text())["rows"]
    assert rows[:5] == first["rows"] and len(rows) == 8 and (moved / "bench.png").exists()
    # The softmax that others are compared with was measured before the interruption.
    assert rows[5]["forward_ratio"] == rows[4]["forward_ms"] / rows[5]["forward_ms"]
    assert main([*command, f"output_dir={moved}"]) == 0
    assert json.loads((moved / "bench.json").read_text())["rows"] == rows
    assert "has 8 rows already" in capsys.readouterr().out


def test_rows_of_a_model_that_are_there_are_left_out():
    settings = {"subject": "model", "grids": [[2, 2], [4, 4]], "num_layers": 1, "dtype": "float32"}
    config = BenchConfig(**settings, methods=["softmax", "naive"], backward=False)
    (row,) = bench_model(config, torch.device("cpu"), 3)
    assert (row["grid"], row["method"]) == ((4, 4), "naive") and row["forward_ms"] > 0


def test_a_share_is_measured_with_and_without_the_linear_half(tmp_path, capsys):
    both = "blockwise exact=0.1 exact_tile=[2,2] exact_window=[1,1] exact_top=1"
    methods = ["softmax", "blockwise", both, f"{both} linear=false", "naive exact=1"]
    settings = ["grids=[[8,8]]", "num_heads=1", "head_dim=8", "backward=false", "rotary=true"]
    assert main(["bench", "ops", f"output_dir={tmp_path}", f"methods={methods}", *settings]) == 0
    rows = json.loads((tmp_path / "bench.json").read_text())["rows"]
    assert not any("error" in row for row in rows)
    assert [row["exact"] for row in rows] == [1.0, 0.0, 0.125, 0.125, 1.0]
    said, *table = capsys.readouterr().out.splitlines()[:7]
    assert said.startswith("measuring ops: softmax, blockwise")
    assert "12.5%" in table[3] and len({len(line) for line in table}) == 1
    folder = tmp_path / "wrong"
    assert main(["bench", "ops", f"output_dir={folder}", 'methods=["auto exact=2"]']) == 2
    assert "exact must be in [0, 1]" in capsys.readouterr().err and not folder.exists()


def test_a_model_is_measured_with_every_attention(tmp_path, clock):
    methods = ["softmax", "linear", "blockwise conv=false gate=false"]
    methods += ["blockwise exact=0.3 exact_tile=[2,2] exact_top=0", "auto layers=1/2 exact=1"]
    settings = ["grids=[[4,4]]", "num_layers=2", f"methods={methods}"]
    assert main(["bench", "model", f"output_dir={tmp_path}", *settings]) == 0
    rows = json.loads((tmp_path / "bench.json").read_text())["rows"]
    assert [row["method"] for row in rows] == methods
    assert all(row["train_ms"] > row["forward_ms"] > 0 for row in rows)
    assert [row["exact"] for row in rows] == [1.0, 0.0, 0.0, 0.25, 1.0]


def test_a_profile_adds_up_to_the_step(tmp_path, capsys):
    settings = ["grids=[[4,4]]", "num_layers=1", "methods=[blockwise]", "profile=true"]
    assert main(["bench", "model", f"output_dir={tmp_path}", *settings]) == 0
    (row,) = json.loads((tmp_path / "bench.json").read_text())["rows"]
    for step in ("forward", "train"):
        found = row[f"{step}_kernels"]
        assert found["ms"] == pytest.approx(sum(found["kinds"].values()), abs=0.01)
        assert found["kinds"]["products"] > 0
        times = [kernel["ms"] for kernel in found["kernels"]]
        assert times == sorted(times, reverse=True)
    assert "aten::addmm" in capsys.readouterr().out
    with pytest.raises(ConfigError, match="profile is for subject=model"):
        load_config(None, ["profile=true"], BenchConfig)


def test_time_in_which_no_kernel_computes_is_communication_or_nothing():
    computing = [(10.0, 20.0, False), (12.0, 15.0, False), (30.0, 31.0, False), (20.0, 22.0, False)]
    found = unused_time([*computing, (18.0, 25.0, True), (24.0, 28.0, True), (40.0, 41.0, True)])
    # Messages alone from 22 to 28 and from 40 on; nothing from 28 to 30 and from 31 to 40.
    assert found == {"step_ms": 31.0, "communication_alone_ms": 7.0, "idle_ms": 11.0}
    assert unused_time(computing) == {
        "step_ms": 21.0,
        "communication_alone_ms": 0.0,
        "idle_ms": 8.0,
    }
    assert not any(unused_time([]).values())


KINDS = {
    "softmax": 1.0,
    "softmax_causal": 1.0,
    "linear feature_map=focused": 0.0,
    "linear feature_map=elu+1 magnitude=true": 0.0,
    "blockwise feature_map=softmax learned_features=true": 0.0,
    # A window of 3 × 3 tokens and two more, of 35.
    "blockwise exact=0.3 exact_tile=[1,1] exact_window=[3,3] exact_top=2 feature_map=softmax": 11
    / 35,
    "linformer projected_len=9": 0.0,
    "linformer projected_len=[2,3]": 0.0,
    "causal block_size=4": 0.0,
    # 8 · 35 - 28 of the 35 · 36 / 2 pairs whose key is not later.
    "causal block_size=4 window=8": 252 / 630,
}


def test_every_kind_stands_in_one_table_and_one_picture(tmp_path):
    settings = ["grids=[[5,7]]", "num_heads=2", "head_dim=8", f"methods={list(KINDS)}"]
    assert main(["bench", "ops", f"output_dir={tmp_path}", *settings]) == 0
    rows = json.loads((tmp_path / "bench.json").read_text())["rows"]
    assert not [row["error"] for row in rows if "error" in row]
    assert {row["method"]: row["exact"] for row in rows} == pytest.approx(KINDS)
    assert all(row["train_ms"] > 0 for row in rows)
    # A method is compared with softmax over the same pairs.
    for row in rows:
        causal = row["method"].split()[0] in ("softmax_causal", "causal")
        other = next(r for r in rows if r["method"] == ("softmax_causal" if causal else "softmax"))
        assert row["causal"] == causal
        assert row["forward_ratio"] == pytest.approx(other["forward_ms"] / row["forward_ms"])


@pytest.mark.parametrize("method", ["linear feature_map=focused", "linformer projected_len=6"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_row_runs_what_models_run(method, dtype):
    case = Case(2, 2, (5, 7), 8, (2, 3), True)
    inputs = torch.randn(3, 2, 35, 2, 8).to(dtype)
    out = attention(method, case, dtype, torch.device("cpu"))(*inputs)
    assert out.shape == inputs.shape[1:] and out.dtype == dtype and out.isfinite().all()


@pytest.mark.slow
def test_a_model_of_text_and_image_is_measured(tmp_path):
    methods = ["softmax", "blockwise exact=0.3 exact_tile=[2,2] exact_top=0"]
    settings = ["model=flux", "grids=[[8,6]]", "num_layers=1", f"methods={methods}"]
    settings += ["backward=false", "dtype=bfloat16"]
    assert main(["bench", "model", f"output_dir={tmp_path}", *settings]) == 0
    rows = json.loads((tmp_path / "bench.json").read_text())["rows"]
    assert all(row["forward_ms"] > 0 for row in rows)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there it records")
def test_recorded_steps_need_a_gpu(tmp_path, capsys):
    folder = tmp_path / "bench"
    settings = ["grids=[[4,4]]", "num_layers=1", "cuda_graphs=true"]
    assert main(["bench", "model", f"output_dir={folder}", *settings]) == 2
    assert "cuda_graphs=true needs a GPU, found none" in capsys.readouterr().err
    assert not folder.exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there it records")
def test_recorded_steps_are_timed_as_they_are_replayed(monkeypatch, clock):
    """With tapes in place of CUDA graphs: one pass to sample, and a forward and a backward one."""
    stand_in(monkeypatch.setattr)
    monkeypatch.setattr("mhla_gen.runtime.cuda_graphs._on_gpu", lambda _: True)
    replays = Counter()
    replay = Tape.replay

    def counted(tape):
        replays[tape] += 1
        replay(tape)

    monkeypatch.setattr(Tape, "replay", counted)
    settings = ["grids=[[2,2]]", "num_layers=1", "methods=[blockwise]", "cuda_graphs=true"]
    settings += ["dtype=float32"]
    config = load_config(None, ["subject=model", *settings], BenchConfig)
    (row,) = bench_model(config, torch.device("cpu"))
    assert "error" not in row and row["train_ms"] > row["forward_ms"] > 0
    assert len(replays) == 3 and min(replays.values()) >= 3


def test_nothing_is_measured_after_a_fault_of_the_device(monkeypatch):
    """It would fail as well, and who reads the rows would blame the method."""

    def fault(*_):
        raise RuntimeError("an illegal memory access was encountered")

    monkeypatch.setattr("mhla_gen.bench.model._prepare", fault)
    monkeypatch.setattr(torch.cuda, "synchronize", fault)
    rows = bench_model(BenchConfig(subject="model", dtype="float32"), torch.device("cuda"))
    with pytest.raises(RuntimeError, match="illegal memory access"):
        next(rows)


@pytest.mark.gpu
@pytest.mark.parametrize("model", ["dit", "flux", "wan"])
def test_steps_of_models_are_recorded(tmp_path, model):
    # Wan's lengths are multiples of 128: at others it would train without cuDNN's softmax.
    grid = {"dit": [16, 16], "flux": [8, 16], "wan": [2, 8, 8]}[model]
    methods = ["softmax", "fused exact=0.3"]
    settings = [f"model={model}", f"grids=[{grid}]", "num_layers=1", f"methods={methods}"]
    for recorded in ("false", "true"):
        folder = tmp_path / recorded
        more = [f"cuda_graphs={recorded}", "compile=true", "profile=true"]
        assert main(["bench", "model", f"output_dir={folder}", *settings, *more]) == 0
    launched, rows = (
        json.loads((tmp_path / name / "bench.json").read_text())["rows"]
        for name in ("false", "true")
    )
    assert not [row["error"] for row in launched + rows if "error" in row]
    for row, slow in zip(rows, launched, strict=True):
        assert 0 < row["forward_ms"] < 1.1 * slow["forward_ms"] and row["train_ms"] > 0
        # A tensor of over a MiB gets a block that is up to a MiB larger; of such tiny models, one
        # or two of these are the peak.
        bound = {"rel": 0.05, "abs": 2 / 1024}
        assert row["forward_peak_gib"] == pytest.approx(slow["forward_peak_gib"], **bound)


def test_a_method_that_cannot_run_is_part_of_the_result(tmp_path):
    settings = ["grids=[[3,3]]", "num_heads=1", "head_dim=200", "methods=[fused,naive]"]
    assert main(["bench", "ops", f"output_dir={tmp_path}", *settings]) == 0
    row, other = json.loads((tmp_path / "bench.json").read_text())["rows"]
    assert "up to 128" in row["error"] and "error" not in other


@pytest.mark.parametrize("subject", ["ops", "model"])
def test_kernels_of_a_gpu_are_no_row_of_a_cpu(subject, tmp_path, capsys):
    settings = [
        "methods=[softmax_cudnn,softmax_flash]", "num_layers=1", "grids=[[2,2]]", "device=cpu",
        "num_heads=1", "head_dim=8", "backward=false",
    ]  # fmt: skip
    assert main(["bench", subject, f"output_dir={tmp_path}", *settings]) == 0
    cudnn, flash = json.loads((tmp_path / "bench.json").read_text())["rows"]
    # torch has flash attention for CPUs, too.
    assert "forward_ms" not in cudnn and flash["forward_ms"] > 0
    assert cudnn["error"] == "softmax_cudnn needs a CUDA GPU, found cpu; use softmax"
    assert cudnn["error"] in capsys.readouterr().out


def test_models_run_on_the_kernels_that_a_method_names(monkeypatch):
    used = []
    attend = torch.nn.functional.scaled_dot_product_attention

    def watched(*args, **kwargs):
        used.append(torch.backends.cuda.math_sdp_enabled())
        return attend(*args, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", watched)
    settings = {"subject": "model", "grids": [[2, 2]], "num_layers": 1, "dtype": "float32"}
    for method, math_too in (("softmax", True), ("softmax_flash", False)):
        used.clear()
        config = BenchConfig(**settings, methods=[method], backward=False)
        (row,) = bench_model(config, torch.device("cpu"))
        assert "error" not in row and set(used) == {math_too}


def test_crossover_lies_between_the_sizes_where_the_order_changes():
    rows = [
        {"tokens": tokens, "method": method, "forward_ms": ms}
        for tokens, softmax, ours in ((100, 1.0, 2.0), (400, 8.0, 4.0))
        for method, ms in (("softmax", softmax), ("fused", ours))
    ]
    assert find_crossover(rows) == pytest.approx(200.0)
    assert find_crossover(rows[:2]) is None
    others = ("linear feature_map=focused", "linformer", "causal", "softmax_causal")
    faster = [{"tokens": 100, "method": m, "forward_ms": 0.1} for m in others]
    faster[-1]["causal"] = True
    faster.append({"tokens": 100, "method": "fused exact=0.5", "exact": 1.0, "forward_ms": 0.1})
    assert find_crossover(rows + faster) == pytest.approx(200.0)


@pytest.mark.parametrize(
    ("times", "said"),
    [
        ((2.0, 0.5), "MHLA is faster than softmax on this device from 200 tokens on"),
        ((2.0, 1.5), "softmax is faster on this device, 100 to 400 tokens"),
        ((0.9, 0.5), "MHLA is faster on this device, 100 to 400 tokens"),
    ],
)
def test_bench_says_from_which_size_on_mhla_pays(monkeypatch, tmp_path, capsys, times, said):
    rows = [
        {"tokens": tokens, "method": method, "heads": 2, "forward_ms": ms, "train_ms": ms}
        for tokens, ours in zip((100, 400), times, strict=True)
        for method, ms in (("softmax", 1.0), ("fused", ours), ("linear", 0.1))
    ]
    monkeypatch.setattr(benchmark, "bench_ops", lambda config, device, done: iter(rows))
    benchmark.bench(BenchConfig(output_dir=str(tmp_path), device="cpu"))
    lines = capsys.readouterr().out.splitlines()
    assert [f"forward: {said}", f"forward and backward: {said}"] == lines[-3:-1]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("grids=everything", "squares"),
        ("methods=[performer]", "methods must be one of"),
        ("methods=fast", 'methods must be "auto" or a list'),
        ("num_heads=0", "num_heads"),
        ('methods=["fused conv=false"]', "subject=ops"),
        ('methods=["linear exact=0.1"]', "subject=ops"),
        ('methods=["softmax_causal exact=0.1"]', "for MHLA"),
        ('methods=["softmax exact=0.1"]', "for MHLA"),
        ("compile=all", "compile"),
        ("cuda_graphs=true", "cuda_graphs is for subject=model"),
    ],
)
def test_mistakes_are_named(override, message):
    with pytest.raises(ConfigError, match=message):
        load_config(None, [override], BenchConfig)


def test_a_mistake_in_a_method_names_it():
    with pytest.raises(ConfigError, match=r"methods: exact must .*, in 'fused exact=2'"):
        settings_of("fused exact=2")


def test_a_measurement_in_which_every_row_fails_ends_in_an_error(tmp_path, capsys):
    given = [f"output_dir={tmp_path}/bench", "grids=[[4,4]]", "methods=[blockwise]", "device=cpu"]
    assert main(["bench", "ops", *given, "layout=[9,9]"]) == 2
    printed = capsys.readouterr()
    assert "must have 1 to 4 blocks" in printed.out and "nothing could be measured" in printed.err
    # So the same folder takes the next attempt.
    assert main(["bench", "ops", *given, "layout=[2,2]"]) == 0
