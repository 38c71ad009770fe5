"""The comparison of docs/evidence.md: its plan, its data, its numbers; a whole tiny one is slow."""

import argparse
import importlib
import json
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

ROOT = Path(__file__).parent.parent
EVIDENCE = ROOT / "experiments" / "evidence"
RESULTS = ROOT / "docs" / "results"


@pytest.fixture(autouse=True)
def scripts(monkeypatch):
    """Scripts of experiments/ import each other as Python does when one of them is run."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    monkeypatch.syspath_prepend(str(EVIDENCE))
    yield importlib.import_module
    for name in [
        name for name in sys.modules if name.startswith(("evidence_", "emoji_", "moving_", "steps"))
    ]:
        del sys.modules[name]


@pytest.mark.parametrize("name", ["arms", "exact", "gates", "long", "small"])
def test_every_run_of_a_plan_is_a_valid_training(scripts, name):
    plan = scripts("evidence_plan").Plan(EVIDENCE / f"{name}.yaml")
    configs = {run.name: run.config() for run in plan.runs}
    assert len(configs) == len(plan.runs)
    controls = {run.setting.name: run for run in reversed(plan.runs) if run.arm == plan.control}
    for run in plan.runs:
        config = configs[run.name]
        assert config.seed == run.seed
        assert np.prod(run.grid) == run.tokens
        if run.setting.kind == "new":
            assert (64 // config.model.patch_size) ** 2 == run.tokens
        # The control did the same work.
        control = configs[controls[run.setting.name].name] if run.setting.name in controls else None
        if control is not None:
            for name in ("max_steps", "batch_size", "learning_rate", "ema_decay"):
                assert getattr(config, name) == getattr(control, name)
            for name in ("patch_size", "num_layers", "num_attention_heads", "attention_head_dim"):
                assert getattr(config.model, name) == getattr(control.model, name)
        if run.setting.taught is not None:
            assert run.config(*run.setting.taught, "distill.teacher=x").distill is not None
    for run in plan.speed:
        assert run.config().batch_size > 0
    assert set(plan.probe) <= set(scripts("evidence_probe").ARMS)


def test_results_of_settings_that_are_gone_are_shown_but_not_run_again(scripts):
    plan = scripts("evidence_plan").Plan(EVIDENCE / "exact.yaml")
    assert plan.past and not {run.name for run in plan.past} & {run.name for run in plan.runs}
    for run in plan.past:
        assert (ROOT / "docs" / "results" / "exact" / f"{run.name}.json").is_file()
        with pytest.raises(ValueError, match="no longer supported"):
            run.config()


def test_arms_differ_from_their_control_as_their_titles_say(scripts):
    configs = {run.arm: run.config() for run in scripts("evidence_plan").Plan().runs}
    control, default = configs["linear-conv-gate"].model, configs["mhla-conv-gate"].model
    assert control.mhla == default.mhla and (control.attention, default.attention) == (
        "linear",
        "mhla",
    )
    assert configs["uniform"].model.mhla.mixing_init == "uniform"
    assert not configs["frozen"].model.mhla.mixing_learnable
    assert configs["blocks-64"].model.mhla.layout == (8, 8)
    own, shared = configs["mixing-lr-10"].mixing_learning_rate, configs["mhla"].learning_rate
    assert own == pytest.approx(10 * shared)


def test_a_wrong_line_of_the_plan_is_named(scripts, tmp_path):
    text = (EVIDENCE / "arms.yaml").read_text()
    for line, message in (
        ("nothing 256 0", "'nothing 256 0'"),
        ("mhla 256 0 los", "'mhla 256 0 los'"),
        ("mhla 256 0", "more than once"),
    ):
        (tmp_path / "arms.yaml").write_text(text.replace("order:\n", f"order:\n  - {line}\n"))
        with pytest.raises(ValueError, match=message):
            assert scripts("evidence_plan").Plan(tmp_path / "arms.yaml").runs


def fake_package(folder: Path, style: str, colour: tuple[int, ...]) -> Path:
    pictures = folder / "img" / style / "64"
    pictures.mkdir(parents=True)
    emoji = []
    for number, category in enumerate(["Objects", "Objects", "Flags", "Component"]):
        drawn = {"image": f"{number}.png", "category": category, f"has_img_{style}": True}
        Image.new("RGBA", (64, 64), (*colour, 255 if number else 0)).save(pictures / drawn["image"])
        emoji.append(drawn)
    emoji[0]["skin_variations"] = {
        "A": {"image": "1.png", f"has_img_{style}": True},
        "B": {"image": "missing.png", f"has_img_{style}": False},
    }
    (folder / "emoji.json").write_text(json.dumps(emoji))
    return folder


def test_data_set_from_packages(scripts, tmp_path):
    script = scripts("emoji_dataset")
    first = fake_package(tmp_path / "a", "google", (200, 0, 0))
    second = fake_package(tmp_path / "b", "twitter", (0, 0, 200))
    out = tmp_path / "emoji.npz"
    script.main([str(out), f"noto={first}", f"twemoji={second}"])
    with np.load(out) as arrays:
        images, labels, classes = arrays["arr_0"], arrays["labels"], arrays["classes"]
    assert classes.tolist() == ["Flags/noto", "Flags/twemoji", "Objects/noto", "Objects/twemoji"]
    assert np.bincount(labels).tolist() == [1, 1, 3, 3]
    assert images.shape == (8, 64, 64, 3) and images.dtype == np.uint8
    # One transparent image a package is white; the others have their colour.
    colours = [tuple(image[0, 0].tolist()) for image in images]
    assert colours.count((255, 255, 255)) == 2 and colours.count((200, 0, 0)) == 3
    with pytest.raises(FileNotFoundError, match="unpacked emoji-datasource package"):
        script.main([str(out), f"noto={tmp_path}"])


def test_real_images_from_a_folder_and_from_a_file(scripts, tmp_path):
    load = scripts("evidence_data").load_real
    for name, colour in (("a", "red"), ("b", "blue")):
        (tmp_path / "images" / name).mkdir(parents=True)
        for number in range(10):
            Image.new("RGB", (80, 70), colour).save(tmp_path / "images" / name / f"{number}.png")
    real = load(tmp_path / "images")
    assert real.images.shape == (20, 64, 64, 3) and real.class_names == ("a", "b")
    assert real.num_train == 19 and len(real.held_out()[0]) == 1
    red = real.images[:, 0, 0, 0] > 200
    assert (red == (real.labels == 0)).all()
    np.savez(tmp_path / "x.npz", arr_0=real.images, labels=real.labels)
    again = load(tmp_path / "x.npz")
    assert again.class_names == ("0", "1") and again.num_train == 19
    with pytest.raises(FileNotFoundError, match="nowhere"):
        load(tmp_path / "nowhere")


def test_an_arm_is_claimed_by_one_process_at_a_time(scripts, tmp_path):
    claimed = scripts("evidence_data").claimed
    path = tmp_path / "arm.lock"
    with claimed(path) as first, claimed(path) as second:
        assert first and not second
    with claimed(path) as again:
        assert again


def test_the_long_plan_trains_the_same_arms_longer(scripts):
    plan = scripts("evidence_plan").Plan
    short = {run.name: run.config() for run in plan().runs}
    for run in plan(EVIDENCE / "long.yaml").runs:
        config = run.config()
        assert config.max_steps > short[run.name].max_steps
        assert replace(config, max_steps=short[run.name].max_steps) == short[run.name]


def test_noise_levels_are_quantiles_of_what_training_draws(scripts):
    levels = scripts("evidence_measure").noise_levels(8)
    drawn = torch.randn(200_000).sigmoid()
    shares = (drawn[:, None] < levels).float().mean(0)
    torch.testing.assert_close(shares, (torch.arange(8) + 0.5) / 8, rtol=0, atol=5e-3)


def test_held_out_loss_of_known_models(scripts):
    measure = scripts("evidence_measure")
    images = np.full((5, 8, 8, 3), 255, np.uint8)
    labels = np.zeros(5, np.int64)
    device = torch.device("cpu")

    def exact(noisy, timestep, class_labels, return_dict):
        sigma = timestep.view(-1, 1, 1, 1) / 1000
        return ((noisy - 1) / sigma,)  # (noise - x) where x is 1 everywhere

    def zero(noisy, timestep, class_labels, return_dict):
        return (torch.zeros_like(noisy),)

    found = measure.held_out_loss(exact, images, labels, device, batch_size=2)
    assert found["mean"] < 1e-6 and len(found["by_level"]) == 8 and len(found["per_image"]) == 5
    found = measure.held_out_loss(zero, images, labels, device, batch_size=2)
    assert found["mean"] == pytest.approx(2.0, rel=0.1)  # variance of the noise, plus 1
    assert found["mean"] == pytest.approx(np.mean(found["per_image"]), rel=1e-4)


def test_nearest_distances(scripts):
    nearest = scripts("evidence_scores").nearest_distances
    points = torch.rand(40, 12)
    expected = torch.cdist(points, points) / 12**0.5
    # The root of what 12 float32 squares leave when they cancel: (12 * 6e-8)**0.5 at worst, and
    # distances of others are hundreds of times as large.
    assert (nearest(points, points) < 4e-3).all()
    torch.testing.assert_close(
        nearest(points, points, skip_self=True),
        (expected + torch.eye(40)).amin(dim=1),
        rtol=1e-3,
        atol=1e-4,
    )
    torch.testing.assert_close(
        nearest(points + 10, points), expected.new_full((40,), 10.0), rtol=0.1, atol=0
    )


def result(arm, seed, losses):
    return {"arm": arm, "seed": seed, "tokens": 256, "held_out": {"per_image": losses}}


def test_difference_pairs_seeds_and_images(scripts):
    table = scripts("evidence_table")
    control = table.Group("c", "c", "256", [result("c", s, [1.0, 2.0, 3.0]) for s in (0, 1)])
    arm = table.Group(
        "x", "x", "256", [result("x", 0, [1.2, 2.2, 3.2]), result("x", 2, [9.0, 9.0, 9.0])]
    )
    elsewhere = table.Group("c", "c", "1024", [result("c", 2, [1.0, 2.0, 3.0])])
    found = table.difference(arm, [control, elsewhere, arm], "c")
    # Images differ in difficulty but all lose 0.2: without pairing the error would be large.
    assert found.relative == pytest.approx(0.1) and found.error < 1e-9
    assert found.by_seed == [pytest.approx(0.1)]
    assert table.difference(arm, [arm], "c") is None


@pytest.mark.parametrize("task", ["anywhere", "near"])
def test_probe_asks_for_what_is_on_the_grid(scripts, task):
    probe = scripts("evidence_probe")
    generator = torch.Generator().manual_seed(0)
    samples = probe.make_samples(32, task, 6, generator)
    is_pair, is_query = samples.values < probe._VALUES, samples.values == probe._VALUES
    assert (is_pair.sum(1) == 32).all() and (is_query.sum(1) == 8).all()
    assert (samples.keys[~(is_pair | is_query)] == 0).all()
    for b in range(6):
        for cell, answer in zip(samples.queries[b].tolist(), samples.answers[b], strict=True):
            same = (samples.keys[b] == samples.keys[b, cell]).all(-1) & is_pair[b]
            (place,) = same.nonzero().flatten().tolist()
            assert samples.values[b, place] == answer
            away = max(abs(place // 12 - cell // 12), abs(place % 12 - cell % 12))
            assert task == "anywhere" or away <= 3


def test_probes_of_another_length_are_refused(scripts, tmp_path):
    probe = scripts("evidence_probe")
    (tmp_path / "probe-mhla-near-s0.json").write_text('{"steps": 800}', encoding="utf-8")
    with pytest.raises(SystemExit, match="of --steps 800, not 60; choose another folder"):
        probe.main([str(tmp_path), "--steps", "60"])
    assert not (tmp_path / "work").exists()


def test_a_probe_of_another_attention_is_refused(scripts, tmp_path):
    probe = scripts("evidence_probe")
    path = tmp_path / "probe-exact-cells-near-s0.json"
    found = {"arm": "exact-cells", "steps": 800, "attention": probe.stated("exact-cells")}
    path.write_text(json.dumps(found))
    probe.require_settings(tmp_path, 800)
    for name, value in (("exact_top", 12), ("exact_group", [2, 2])):
        changed = found | {"attention": found["attention"] | {name: value}}
        path.write_text(json.dumps(changed))
        with pytest.raises(SystemExit, match=rf"of attention\.{name}={re.escape(str(value))}, not"):
            probe.main([str(tmp_path)])
    path.write_text(json.dumps(found | {"arm": "softmax"}))
    with pytest.raises(SystemExit, match='not "softmax"'):
        probe.main([str(tmp_path)])


SAMPLES = {"new": 1024, "converted": 1024, "clips": 512}


def changed_result(source, path, change):
    """A copy of a result whose settings `change` alters in place."""
    found = json.loads(source.read_bytes())
    change(found)
    path.write_text(json.dumps(found))


@pytest.mark.parametrize(
    ("name", "folder", "samples"),
    [
        ("exact", "exact", 1024), ("gates", "gates", 1024), ("small", "small", 1024),
        ("arms", "evidence", 2048), ("long", "evidence-long", 2048),
    ],
)  # fmt: skip
def test_the_results_of_a_plan_are_of_its_settings(scripts, name, folder, samples):
    plan, out = scripts("evidence_plan").Plan(EVIDENCE / f"{name}.yaml"), RESULTS / folder
    assert any((out / f"{run.name}.json").is_file() for run in plan.runs)
    settings = scripts("evidence_settings")
    settings.require_settings(out, plan.runs, [], SAMPLES | {"new": samples})
    settings.require_speeds(out, plan.speed, [])


@pytest.mark.parametrize(
    ("name", "setting", "change"),
    [
        ("exact-5-4096-s0", "learning_rate=0.001, not 0.0006",
         lambda r: r["config"].update(learning_rate=1e-3)),
        ("exact-5-4096-s0", "max_steps=400, not 800", lambda r: r["config"].update(max_steps=400)),
        ("exact-5-4096-s0", "model.mhla.exact=0.02",
         lambda r: r["config"]["model"]["mhla"].update(exact=0.02)),
        ("exact-5-4096-s0", "pairs=0.06", lambda r: r.update(pairs=0.06)),
        ("exact-5-4096-s0", 'optimizer_options={"eps": 0.001}, not {}',
         lambda r: r["config"].update(optimizer_options={"eps": 1e-3})),
        ("exact-5-4096-s0", 'transformer={"lora_rank": 8}, not null',
         lambda r: r["config"].update(transformer={"lora_rank": 8})),
        ("exact-12-4096-s0", "model.mhla.exact_group=[1, 1], not [2, 2]",
         lambda r: r["config"]["model"]["mhla"].update(exact_group=[1, 1])),
        # The tiles that `auto_tiles` picks for this arm.
        ("single-12-4096-s0", "model.mhla.exact_window=[3, 3], not [5, 5]",
         lambda r: r["config"]["model"]["mhla"].update(exact_window=[3, 3])),
        ("groups-5-4096-s0", "--samples=64, not 1024", lambda r: r["scores"].update(samples=64)),
        ("layers-5-4096-s0", 'model.mhla.exact_layers="all", not "1/3"',
         lambda r: r["config"]["model"]["mhla"].pop("exact_layers")),
        ("exact-12-converted-s0", "points=[0, 100], not [0, 100, 400]",
         lambda r: r["points"].pop()),
        ("exact-12-learned-taught-rest-s0", "taught=null", lambda r: r.update(taught=None)),
    ],
)  # fmt: skip
def test_a_result_of_other_settings_is_refused_before_anything_is_trained(
    scripts, tmp_path, name, setting, change
):
    changed_result(RESULTS / "exact" / f"{name}.json", tmp_path / f"{name}.json", change)
    command = [str(tmp_path / "no.npz"), str(tmp_path), "--plan", str(EVIDENCE / "exact.yaml")]
    message = re.escape(f"{name}.json is of {setting}") + ".*; rename or remove this result"
    for script in ("evidence_run", "evidence_launch"):
        with pytest.raises(SystemExit, match=message):
            scripts(script).main(command)
    assert not (tmp_path / "work").exists()


def test_settings_that_change_no_number_may_differ(scripts, tmp_path):
    def change(found):
        found["config"] |= {"output_dir": "elsewhere", "cuda_graphs": True, "compile": "none"}
        found["config"]["data"]["path"] = "elsewhere.npz"
        found["title"] = "another"

    changed_result(RESULTS / "exact" / "mhla-4096-s0.json", tmp_path / "mhla-4096-s0.json", change)
    plan = scripts("evidence_plan").Plan(EVIDENCE / "exact.yaml")
    scripts("evidence_settings").require_settings(tmp_path, plan.runs, ["resume=never"], SAMPLES)


def test_a_result_names_the_tiles_that_were_picked(scripts, tmp_path):
    """Else it would look like those of another rule for the same share of pairs."""
    settings = scripts("evidence_settings")
    runs = {run.arm: run for run in scripts("evidence_plan").Plan(EVIDENCE / "exact.yaml").runs}
    single, shared = runs["single-12"], runs["exact-12"]
    config = settings.stated(single, single.config())
    assert config["model"]["mhla"]["exact_window"] == (5, 5)
    made = {"config": config, "pairs": 0.125}
    (tmp_path / f"{shared.name}.json").write_text(json.dumps(made))
    with pytest.raises(SystemExit, match=r"exact_group=\[1, 1\], not \[2, 2\]"):
        settings.require_settings(tmp_path, [shared], [f"seed={single.seed}"], SAMPLES)


def test_a_speed_of_other_settings_is_refused(scripts, tmp_path):
    settings = scripts("evidence_settings")
    run = scripts("evidence_plan").Plan(EVIDENCE / "exact.yaml").speed[0]
    found = {"config": settings.stated(run, run.config())}
    (tmp_path / f"{run.speed_name}.json").write_text(json.dumps(found))
    settings.require_speeds(tmp_path, [run], ["output_dir=elsewhere"])
    command = [str(tmp_path), "--plan", str(EVIDENCE / "exact.yaml"), "compile=none"]
    with pytest.raises(SystemExit, match='json is of compile="regional", not "none"'):
        scripts("evidence_speed").main(command)
    with pytest.raises(SystemExit, match='json is of compile="regional", not "none"'):
        scripts("evidence_launch").main([str(tmp_path / "no.npz"), *command])


@pytest.mark.parametrize("arm", ["softmax", "mhla-conv-gate"])
def test_probe_learns(scripts, arm):
    probe = scripts("evidence_probe")
    probe.NUM_PAIRS = (4,)
    found = probe.probe(arm, "near", steps=60, seed=0, device=torch.device("cpu"))
    assert set(found["accuracy"]) == {4} and found["accuracy"][4] > 1.5 * found["chance"]


def save_images(path, count):
    """A file of noise whose colour says its class."""
    labels = np.arange(count) % 3
    images = np.random.default_rng(0).integers(0, 255, (count, 64, 64, 3), dtype=np.uint8)
    images[..., 0] = (labels * 100)[:, None, None]
    np.savez(path, arr_0=images, labels=labels)
    return str(path)


def save_plan(path, name, *lines):
    """A plan of the comparison with another order."""
    text = (EVIDENCE / f"{name}.yaml").read_text().split("order:")[0]
    path.write_text(text + "order:\n" + "".join(f"  - {line}\n" for line in lines))
    return str(path)


TINY = ("--samples", "24", "--sampling-steps", "2", "batch_size=4", "warmup_steps=1")
# What is converted brings its own.
SIZES = ("model.num_layers=1", "model.num_attention_heads=1")


@pytest.mark.slow
def test_a_tiny_comparison_from_data_to_page(scripts, tmp_path):
    pytest.importorskip("efficientnet_lite_pytorch")
    data = save_images(tmp_path / "data.npz", 64)
    lines = ["linear-conv-gate 256 0", "uniform 256 0", "softmax 1024 0"]
    plan = save_plan(tmp_path / "arms.yaml", "arms", *lines)
    out = tmp_path / "out"
    command = [data, str(out), "--plan", plan, *TINY, *SIZES, "max_steps=3"]
    run = scripts("evidence_run")
    with pytest.warns(match="samples for 1280 dimensions"):
        run.main(command)
    made = {path.name: path.stat().st_mtime_ns for path in out.glob("*-s0.json")}
    assert sorted(made) == [
        "linear-conv-gate-256-s0.json", "softmax-1024-s0.json", "uniform-256-s0.json"
    ]  # fmt: skip
    found = json.loads((out / "uniform-256-s0.json").read_text())
    assert found["scores"]["samples"] == 24 and len(found["layers"]) == 1
    assert (
        found["curve"][-1][0] == 3 and found["config"]["model"]["mhla"]["mixing_init"] == "uniform"
    )
    # What is there is not run again.
    run.main(command)
    assert made == {path.name: path.stat().st_mtime_ns for path in out.glob("*-s0.json")}
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- tables of arms -->\nold\n<!-- end of tables -->\nafter\n")
    speed = {"images_per_second": 12.0}
    (out / "speed-uniform-256.json").write_text(json.dumps({"train": speed, "sample": speed}))
    scripts("evidence_report").main([str(out), "--plan", plan, "--page", str(page)])
    text = page.read_text()
    assert "old" not in text and "uniform start" in text and text.endswith("after\n")
    for name in ("curves", "layers", "quality-speed", "samples-256", "samples-1024"):
        assert (out / f"{name}.png").stat().st_size > 1000


@pytest.mark.slow
def test_tiny_conversions_go_on_where_they_were_stopped(scripts, tmp_path):
    data = save_images(tmp_path / "data.npz", 32)
    plan = save_plan(
        tmp_path / "exact.yaml",
        "exact",
        "teacher teacher 0 loss",
        "teacher converted 0 loss",
        "exact-5-learned taught-rest 0 loss",
    )
    text = Path(plan).read_text().replace("points: [0, 100, 400]", "points: [0, 2, 60]")
    small = text.replace("patch_size=1", "patch_size=8").replace("[8,8]", "[2,2]")
    small = small.replace("steps: 200", "steps: 3").replace(
        "max_steps=1600", "max_steps=4, " + ", ".join(SIZES)
    )
    Path(plan).write_text(small)
    command = [data, "--plan", plan, *TINY, "compile=none", "log_every=1"]
    run = scripts("evidence_run")

    def results(out):
        """Of all runs, but for times."""
        made = [json.loads(path.read_text()) for path in sorted(out.glob("*-s0.json"))]
        return [{k: r.get(k) for k in ("name", "points", "held_out", "curve")} for r in made]

    straight, stopped = tmp_path / "straight", tmp_path / "stopped"
    run.main([*command[:1], str(straight), *command[1:]])
    log = stopped / "work" / "exact-5-learned-taught-rest-s0" / "log.jsonl"
    script = [sys.executable, str(EVIDENCE / "evidence_run.py"), data, str(stopped), *command[1:]]
    with subprocess.Popen(script) as process:
        while process.poll() is None and not (log.is_file() and len(log.read_text()) > 500):
            time.sleep(0.02)
        process.terminate()
    assert not (stopped / "exact-5-learned-taught-rest-s0.json").is_file()
    run.main([*command[:1], str(stopped), *command[1:]])
    found = results(straight)
    assert results(stopped) == found
    # Lost weights are trained again for the runs that start from them, but not measured again.
    teacher = straight / "teacher-teacher-s0.json"
    written = teacher.stat().st_mtime_ns
    shutil.rmtree(straight / "work")
    (straight / "teacher-converted-s0.json").unlink()
    run.main([*command[:1], str(straight), *command[1:]])
    assert teacher.stat().st_mtime_ns == written and results(straight) == found
    table = scripts("evidence_report")
    table.main([str(stopped), "--plan", plan])
    assert "only what is new" in (stopped / "tables.md").read_text()


def test_a_stop_waits_for_a_measurement(scripts, tmp_path):
    def end(*_: object) -> None:
        raise AssertionError("the measurement was interrupted")

    shop = scripts("evidence_shop").Workshop(argparse.Namespace(out=tmp_path, work=None))
    before = signal.signal(signal.SIGTERM, end)
    try:
        with shop.measuring():
            signal.raise_signal(signal.SIGTERM)
            assert shop.stopped
        assert signal.getsignal(signal.SIGTERM) is end
    finally:
        signal.signal(signal.SIGTERM, before)


@pytest.mark.slow
def test_tiny_clips_from_data_to_table(scripts, tmp_path):
    pytest.importorskip("efficientnet_lite_pytorch")
    data = save_images(tmp_path / "data.npz", 64)
    plan = save_plan(tmp_path / "exact.yaml", "exact", "clips-12 clips 0")
    counts = ["--clips", "8", "--held-out-clips", "2", "--clip-samples", "16"]
    command = [data, str(tmp_path / "out"), "--plan", plan, *TINY, *SIZES, *counts]
    with pytest.warns(match="samples for 256 dimensions"):
        scripts("evidence_run").main([*command, "max_steps=2", "batch_size=2", "compile=none"])
    found = json.loads((tmp_path / "out" / "clips-12-clips-s0.json").read_text())
    assert found["tokens"] == 9216 and found["pairs"] == pytest.approx(0.125, abs=0.01)
    assert len(found["held_out"]["per_image"]) == 2 and found["scores"]["samples"] == 16


def test_frames_and_mosaics_of_clips_are_inverse(scripts):
    clips = scripts("evidence_clips")
    mosaics = torch.randn(2, 3, 12, 12)
    frames = clips.frames_of(mosaics)
    assert frames.shape == (2, 3, 9, 4, 4)
    assert torch.equal(frames[:, :, 5], mosaics[:, :, 4:8, 8:12])
    assert torch.equal(clips.mosaic_of(frames), mosaics)


def test_clips_of_moving_images_follow_their_rule(scripts):
    moving = scripts("moving_emoji")
    images = np.full((32, 64, 64, 3), 255, np.uint8)
    images[:, 16:48, 16:48] = 0
    images[:16, 16:48, 16:48, 0] = 200  # the first half is red, and of class 0
    labels, held_out = np.repeat([0, 1], 16), np.arange(32) % 16 == 15
    made = moving.make_data(images, labels, held_out, 20, 6)
    again = moving.make_data(images, labels, held_out, 20, 6)
    assert made["arr_0"].shape == (26, 96, 96, 3) and made["num_train"] == 20
    assert all(np.array_equal(made[name], again[name]) for name in made)
    # A clip shows emoji of its class on white, and they move.
    for mosaic, label in zip(made["arr_0"], made["labels"], strict=True):
        dark = mosaic[mosaic[..., 1] < 20]
        assert len(dark) and (dark[:, 0] > 150).all() == (label == 0)
    frames = made["arr_0"].reshape(26, 3, 32, 3, 32, 3).swapaxes(2, 3).reshape(26, 9, 32, 32, 3)
    assert (np.abs(np.diff(frames.astype(int), axis=1)).max(axis=(1, 2, 3, 4)) > 100).all()
    motion = moving.draw_motion(100, np.random.default_rng(0))
    for places in (motion.rows, motion.columns):
        assert places.min() >= 0 and places.max() <= moving.SIDE
        assert np.abs(np.diff(places)).max() <= 2.5 + 1e-9


def test_converted_models_are_compared_seed_by_seed(scripts):
    table, exact = scripts("evidence_table"), scripts("evidence_exact")

    def run(seed, losses, taught=None):
        points = [
            {"steps": steps, "held_out": {"mean": loss, "per_image": [loss, loss]}}
            for steps, loss in losses.items()
        ]
        return {"seed": seed, "points": points, "taught": taught, "pairs": 1.0}

    def group(arm, setting, *results):
        return table.Group(arm, arm, setting, list(results))

    taught = ["distill.stages=[{kind: layers, steps: 9, train: mhla}]"]
    text = exact.converted_table(
        [
            # The second seed of the teacher has a shorter run than the first, which was repeated.
            group("teacher", "converted", run(0, {0: 9.0, 400: 9.0}), run(1, {0: 1.5, 400: 1.0})),
            group("teacher", "converted-more", run(0, {0: 2.5, 400: 2.0, 600: 1.0})),
            group("half", "converted", run(0, {0: 4.0, 400: 2.1}), run(1, {0: 3.0, 400: 1.03})),
            group("half", "taught", run(1, {0: 2.5, 400: 1.02}, taught)),
        ]
    )
    rows = [[cell.strip() for cell in line.split("|")[3:-1]] for line in text.splitlines()[2:]]
    assert rows == [
        ["no", "2.5000, 1.5000", "2.0000, 1.0000", "1.0000", "the control", "the control"],
        ["no", "4.0000, 3.0000", "2.1000, 1.0300", "–", "+4.0% ± 0.0% (+5.0%, +3.0%)", "–"],
        ["only what is new", "2.5000", "1.0200", "–", "+2.0% ± 0.0%", "–"],
    ]


@pytest.mark.parametrize(
    ("name", "results", "tables", "page"),
    [
        ("arms", "evidence", "mixing_tables", "mixing"),
        ("gates", "gates", "loss_tables", "mixing"),
        ("exact", "exact", "exact_tables", "evidence"),
        ("small", "small", "exact_tables", "distillation"),
    ],
)
def test_the_page_has_the_tables_of_the_results(name, results, tables, page, scripts):
    report = scripts("evidence_report")
    folder = ROOT / "docs" / "results" / results
    plan = scripts("evidence_plan").Plan(EVIDENCE / f"{name}.yaml")
    text = getattr(report, tables)(plan, report.load_groups(folder, plan), folder)
    assert text == (folder / "tables.md").read_text()
    assert text in (ROOT / "docs" / f"{page}.md").read_text()
