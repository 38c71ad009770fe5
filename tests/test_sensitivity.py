"""`mhla-gen inspect sensitivity`: which layers can be replaced at what price."""

import json
from dataclasses import replace

import pytest
import torch
import yaml
from PIL import Image
from tiny import tiny_dit, tiny_dit_pipeline, tiny_wan

import mhla_gen
from mhla_gen import MHLAConfig
from mhla_gen.cli import main
from mhla_gen.config import DataConfig, ModelConfig, SensitivityConfig, load_config
from mhla_gen.distillation import relative_error
from mhla_gen.files.saved import DamagedFileError
from mhla_gen.inspection.sensitivity import DISTILLED_NAME, sensitivity
from mhla_gen.inspection.sensitivity_plan import plan_by_count, plan_by_error
from mhla_gen.inspection.sensitivity_scan import LAYERS_NAME, Scan


@pytest.fixture(scope="module")
def softmax(tmp_path_factory):
    """Folders of tiny softmax models."""
    torch.manual_seed(0)
    root = tmp_path_factory.mktemp("softmax")
    tiny_dit(in_channels=1, patch_size=1).save_pretrained(root / "dit")
    tiny_wan().save_pretrained(root / "wan")
    tiny_dit_pipeline().save_pretrained(root / "pipeline")
    return root


def settings(softmax, folder, kind="dit", **changes):
    values = {
        "model": str(softmax / kind),
        "output_dir": str(folder),
        "mhla": MHLAConfig(layout=(3, 3)),
        "timesteps": (100, 900),
        "num_inputs": 3,
    } | changes
    if kind == "wan":
        values |= {"grid": [3, 5, 6], "mhla": MHLAConfig(layout=(2, 2, 4))}
    return SensitivityConfig(**values)


def results(folder):
    return json.loads((folder / "sensitivity.json").read_text())


@pytest.mark.parametrize(("kind", "exact"), [("dit", 0.0), ("wan", 0.0), ("dit", 0.4)])
def test_the_error_of_a_layer_is_that_of_a_model_with_this_layer_replaced(
    tmp_path, softmax, kind, exact
):
    config = settings(softmax, tmp_path / "scan", kind, softmax_layers=1)
    if exact:
        tiles = {"exact_tile": (2, 2), "exact_window": (1, 1), "exact_top": 2}
        config = replace(config, mhla=replace(config.mhla, exact=exact, **tiles))
    sensitivity(config)
    found = results(tmp_path / "scan")
    base = (tiny_dit if kind == "dit" else tiny_wan)(
        **({"in_channels": 1, "patch_size": 1} if kind == "dit" else {})
    )
    base = type(base).from_pretrained(softmax / kind).eval()
    inputs = Scan.prepare(config).inputs

    def error(layers):
        made = mhla_gen.MHLADiTTransformer2DModel if kind == "dit" else None
        made = made or mhla_gen.MHLAWanTransformer3DModel
        hybrid = made.from_base(base, replace(config.mhla, layers=layers)).eval()
        with torch.no_grad():
            errors = [
                relative_error(hybrid(**item.arguments).sample, base(**item.arguments).sample)
                for item in inputs
            ]
        return float(torch.cat(errors).mean())

    assert [row["layer"] for row in found["layers"]] == [0, 1, 2]
    for row in found["layers"]:
        assert row["output_error"] == pytest.approx(error([row["layer"]]), rel=1e-4)
        times = row["by_timestep"]
        assert list(times) == ["100", "900"]
        assert sum(times.values()) / 2 == pytest.approx(row["output_error"])
        assert row["layer_error"] > 0
    plan = found["plan"]
    worst = max(found["layers"], key=lambda row: row["output_error"])["layer"]
    assert plan["softmax_layers"] == [worst]
    assert plan["joint_error"] == pytest.approx(error(plan["mhla_layers"]), rel=1e-4)
    with Image.open(tmp_path / "scan/sensitivity.png") as picture:
        assert min(picture.size) > 200


def test_a_plan_is_a_setting_of_training(tmp_path, softmax):
    sensitivity(settings(softmax, tmp_path / "scan", softmax_layers=2))
    plan = results(tmp_path / "scan")["plan"]
    written = yaml.safe_load((tmp_path / "scan/plan.yaml").read_text())
    assert written["model"]["mhla"]["layers"] == plan["mhla_layers"]
    config = load_config(overrides=[plan["override"]], schema=mhla_gen.config.TrainConfig)
    assert config.model == ModelConfig(mhla=MHLAConfig(layers=plan["mhla_layers"]))
    # Or all are converted, and the worst alone have exact pairs.
    overrides = ["model.mhla.exact=0.25", plan["exact_override"]]
    mhla = load_config(overrides=overrides, schema=mhla_gen.config.TrainConfig).model.mhla
    model = mhla_gen.inject(tiny_dit(num_layers=3), replace(mhla, layout=(2, 2)))
    shares = [row.exact for row in mhla_gen.summary(model)]
    assert [i for i, share in enumerate(shares) if share] == plan["softmax_layers"]


def test_an_interrupted_scan_goes_on_and_a_finished_one_answers_for_other_budgets(
    tmp_path, softmax, monkeypatch
):
    straight = settings(softmax, tmp_path / "straight", distill_steps=2)
    sensitivity(straight)
    stopped = replace(straight, output_dir=str(tmp_path / "stopped"))
    whole, measured = Scan.error_of, []

    def error_of(self, layers):
        if len(measured) == 2:
            raise KeyboardInterrupt
        measured.append(layers)
        return whole(self, layers)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Scan, "error_of", error_of)
        sensitivity(stopped)
    file = tmp_path / "stopped" / LAYERS_NAME
    file.write_text(file.read_text() + '{"layer": 2, "name"')
    sensitivity(stopped)
    assert results(tmp_path / "straight") == results(tmp_path / "stopped")

    def refuse(self, layers):
        assert len(layers) > 1, "a layer was measured again"
        return whole(self, layers)

    monkeypatch.setattr(Scan, "error_of", refuse)
    sensitivity(replace(stopped, softmax_layers=1))
    assert len(results(tmp_path / "stopped")["plan"]["mhla_layers"]) == 2


def test_layers_that_were_damaged_may_learn_again(tmp_path, softmax):
    scan = settings(softmax, tmp_path / "scan", distill_steps=2)
    sensitivity(scan)
    file = tmp_path / "scan" / DISTILLED_NAME
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(DamagedFileError, match=r"remove it to let the layers learn again"):
        sensitivity(replace(scan, softmax_layers=1))
    file.unlink()
    sensitivity(replace(scan, softmax_layers=1))


def test_distilled_layers_have_smaller_errors(tmp_path, softmax):
    plain = settings(softmax, tmp_path / "plain")
    sensitivity(plain)
    changes = {"distill_steps": 30, "distill_batch_size": 8, "learning_rate": 1e-2}
    sensitivity(replace(plain, output_dir=str(tmp_path / "distilled"), **changes))
    pairs = zip(*(results(tmp_path / n)["layers"] for n in ("plain", "distilled")), strict=True)
    assert all(after["layer_error"] < before["layer_error"] for before, after in pairs)


def test_real_images_are_taken_where_they_are_given(tmp_path, softmax):
    pipeline = mhla_gen.ClassConditionalPipeline(
        transformer=type(tiny_dit()).from_pretrained(softmax / "dit"),
        scheduler=mhla_gen_scheduler(),
    )
    pipeline.save_pretrained(tmp_path / "model")
    data = DataConfig(source="digits")
    config = settings(softmax, tmp_path / "scan", model=str(tmp_path / "model"), data=data)
    sensitivity(replace(config, distill_steps=1))
    assert results(tmp_path / "scan")["facts"]["of"] == "digits"


def mhla_gen_scheduler():
    from diffusers import FlowMatchEulerDiscreteScheduler

    return FlowMatchEulerDiscreteScheduler()


def test_other_weights_and_other_settings_are_refused(tmp_path, softmax):
    tiny_dit(in_channels=1, patch_size=1).save_pretrained(tmp_path / "model")
    config = settings(softmax, tmp_path / "scan", model=str(tmp_path / "model"))
    sensitivity(config)
    with pytest.raises(FileExistsError, match="other settings"):
        sensitivity(replace(config, num_inputs=4))
    other = tiny_dit(in_channels=1, patch_size=1)
    torch.nn.init.normal_(other.proj_out_2.weight)
    other.save_pretrained(tmp_path / "model")
    with pytest.raises(FileExistsError, match="other weights"):
        sensitivity(config)


def test_refusals_come_before_anything_is_written(tmp_path, softmax):
    config = settings(softmax, tmp_path / "scan")
    mhla_gen.inject(tiny_dit(), MHLAConfig(layout=(2, 2))).save_pretrained(tmp_path / "mhla")
    for match, changes in {
        "already": {"model": str(tmp_path / "mhla")},
        "softmax_layers must be below 3": {"softmax_layers": 3},
        "more blocks": {"mhla": MHLAConfig(layout=(9, 9))},
        "needs a model": {"model": None},
        "pipeline folder": {"data": DataConfig(source="digits")},
    }.items():
        with pytest.raises(ValueError, match=match):
            sensitivity(replace(config, **changes))
    with pytest.raises(ValueError, match="two budgets"):
        replace(config, softmax_layers=1, max_error=0.1)
    assert not (tmp_path / "scan").exists()


def test_the_command_has_two_words(tmp_path, softmax, capsys):
    arguments = [str(softmax / "dit"), f"output_dir={tmp_path / 'scan'}", "mhla.layout=[2,2]"]
    assert main(["inspect", "sensitivity", *arguments, "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert "3 layers on 20 inputs, of tokens 8 × 8 = 64, the model's own size, and write" in said
    assert not (tmp_path / "scan").exists()
    assert main(["inspect", "sensitivity", *arguments, "num_inputs=1", "softmax_layers=1"]) == 0
    said = capsys.readouterr().out
    assert "stay softmax: 'model.mhla.layers=[" in said
    assert "with model.mhla.exact: 'model.mhla.exact_layers=[" in said
    # A folder is still what `inspect` alone takes.
    assert main(["inspect", str(softmax / "dit"), "--dry-run"]) == 0


def test_plans_keep_the_worst_layers_or_fit_a_budget():
    errors = {0: 0.5, 1: 0.1, 3: 0.3, 7: 0.2}
    plan = plan_by_count(errors, 2)
    assert plan.softmax_layers == (0, 3) and plan.mhla_layers == (1, 7)
    assert plan.predicted_error == pytest.approx(0.3)
    assert plan.override == "model.mhla.layers=[1, 7]"
    assert plan_by_count(errors, 0).mhla_layers == (0, 1, 3, 7)
    assert plan_by_error(errors, 0.35).mhla_layers == (1, 7)
    assert plan_by_error(errors, 10).softmax_layers == ()
    with pytest.raises(ValueError, match="smallest error"):
        plan_by_error(errors, 0.05)
    with pytest.raises(ValueError, match="below 4"):
        plan_by_count(errors, 4)
