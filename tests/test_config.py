"""Reading configs: every shipped file loads, and mistakes are named."""

import dataclasses
import json
import math
from pathlib import Path
from typing import Literal, get_args, get_origin

import pytest

from mhla_gen.config import (
    SCHEMAS,
    ConfigError,
    DistillConfig,
    DoctorConfig,
    EvaluateConfig,
    MHLAConfig,
    SampleConfig,
    TrainConfig,
    WanConfig,
    load_config,
    save_config,
)
from mhla_gen.config.fields import Range, kind_of, kinds_of
from mhla_gen.config.reading import put_override
from mhla_gen.errors import UserError

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "configs"
ODD_TEXTS = (
    *("0123", "off", "no", "12:30:00", "1984", "1e3", "null ", "a: b", "runs/try #3", "@home"),
    *("${x}", r"\${x}", r"a\\${b", "???", r"\???", "[a cat", "a, b]", "{x", "'quoted", '"'),
    *("山", "\u2028", "\x85x", "x\ty", "two\nlines", "-", "&a", "*a", "!tag", "|", ">", "? x"),
    *("<<", "=", "", " x ", "a=b", "%d"),
)
# Plans of the comparison's runs are no configs; tests/test_evidence.py reads them.
EVIDENCE = ROOT / "experiments" / "evidence"
PLANS = {*EVIDENCE.glob("*.yaml")} - {EVIDENCE / "base.yaml"}
CONFIGS = sorted({*FOLDER.rglob("*.yaml"), *(ROOT / "experiments").rglob("*.yaml")} - PLANS)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_shipped_config_loads_and_round_trips(path, tmp_path):
    config = load_config(path)
    save_config(config, tmp_path / "again.yaml")
    assert load_config(tmp_path / "again.yaml") == config


def test_there_are_shipped_configs():
    assert CONFIGS


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["layot=[2]"], "there is no setting layot; did you mean layout?"),
        (["zebra=1"], "no setting zebra; --print-config shows all"),
        (["conv=maybe"], "must be true or false"),
        (["causal_frames=None"], "causal_frames=None is written causal_frames=null"),
        (["layout=[0]"], "positive block counts"),
        (["layout=[2,2,2,2]"], "1 to 3 positive block counts"),
        (["layout=big"], '"auto" or'),
        (["layers=3/2"], "fraction like"),
        (["layers=[]"], "empty or with duplicates"),
        (["layers=[1,1]"], "empty or with duplicates"),
        (["layers=[-1]"], "list of indices"),
        (["conv_kernel_size=4"], "odd and positive"),
        (["mixing_init=random"], "mixing_init must be one of locality, uniform, found 'random'"),
        (["conv"], "written key=value"),
    ],
)
def test_mistakes_are_named(overrides, message):
    with pytest.raises(ConfigError) as error:
        load_config(None, overrides, MHLAConfig)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_all_settings_of_a_similar_name_are_named():
    with pytest.raises(ConfigError) as error:
        load_config(None, ["learnin_rate=1"], TrainConfig)
    near = "learning_rate, mhla_learning_rate or mixing_learning_rate?"
    assert str(error.value) == f"there is no setting learnin_rate; did you mean {near}"


def test_overrides_beat_the_file_which_beats_the_defaults(tmp_path):
    file = tmp_path / "config.yaml"
    file.write_text("layout: [4, 4]\nconv: false\n")
    config = load_config(file, ["layout=[2,3]"], MHLAConfig)
    assert config == MHLAConfig(layout=(2, 3), conv=False)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- 1\n- 2\n", "mapping"),
        ("a: [1\n", "not valid YAML"),
        ("job: dance\n", "must start with job"),
        ("steps: 3\n", "must start with job"),
    ],
)
def test_files_that_are_no_config(tmp_path, text, message):
    file = tmp_path / "config.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=message):
        load_config(file)


def test_a_missing_file_and_a_file_of_another_job(tmp_path):
    with pytest.raises(ConfigError, match="does not exist"):
        load_config(tmp_path / "none.yaml")
    first, second = list(SCHEMAS)[:2]
    file = tmp_path / "config.yaml"
    file.write_text(f"job: {first}\n")
    with pytest.raises(ConfigError, match=f"a config for `mhla-gen {first}`"):
        load_config(file, schema=SCHEMAS[second])


@pytest.mark.parametrize("schema", SCHEMAS.values(), ids=SCHEMAS)
def test_every_choice_can_be_typed_as_an_override(schema):
    for name, kind in kinds_of(schema).items():
        if get_origin(kind.base) is Literal:
            for choice in get_args(kind.base):
                values = {}
                put_override(values, f"{name}={choice}", schema)
                assert values == {name: choice}


def test_retired_settings_are_dropped_where_off_and_refused_where_on(tmp_path):
    old = tmp_path / "config.yaml"
    text = "job: train\nmodel:\n  mhla:\n    {}\n"
    old.write_text(text.format("content_mixing: false"))
    assert load_config(old).model.mhla == MHLAConfig()
    old.write_text(text.format("combine: gate"))
    assert load_config(old).model.mhla == MHLAConfig()
    for line, remedy in (
        ("content_mixing: true", "content_mixing=true is no longer supported .* train again"),
        ("mixing_init: multiscale", "found 'multiscale'.* write locality"),
        ("combine: projection", "combine=projection is no longer supported .* train again"),
    ):
        old.write_text(text.format(line))
        with pytest.raises(ConfigError, match=remedy):
            load_config(old)
    with pytest.raises(ConfigError, match="no longer supported"):
        load_config(None, ["content_mixing=true"], MHLAConfig)


def test_mhla_settings_round_trip_through_a_dict():
    config = MHLAConfig(layout=[3, 5], layers=[2, 0], output_norm=True)
    assert config.layers == (0, 2)
    assert MHLAConfig.from_dict(config.to_dict()) == config


def test_a_renamed_key_is_refused_with_its_new_name(tmp_path):
    file = tmp_path / "old.yaml"
    file.write_text("job: train\nconvert:\n  teacher: somewhere\n")
    for arguments in ((file, ()), (None, ["convert.teacher=somewhere"])):
        with pytest.raises(ConfigError, match="key convert is now called distill"):
            load_config(*arguments, TrainConfig)
    # A run that a former release trained plainly can be resumed.
    file.write_text("job: train\nconvert: null\n")
    assert load_config(file) == TrainConfig()


def kinds_below(schema, seen=()):
    """Every setting of a config and of the configs inside it: class, name and kind."""
    for name, kind in kinds_of(schema).items():
        yield schema, name, kind
        for inner in (kind, kind_of(kind.element)):
            if dataclasses.is_dataclass(inner.base) and inner.base not in seen:
                yield from kinds_below(inner.base, (*seen, inner.base))


ALL_KINDS = {
    f"{schema.__name__}.{name}": (schema, name, kind)
    for top in SCHEMAS.values()
    for schema, name, kind in kinds_below(top)
}
NUMBERS = {name: found for name, found in ALL_KINDS.items() if found[2].base in (int, float)}


def least_settings(schema):
    """What a config needs to be made at all."""
    return {
        DistillConfig: {"teacher": "folder"},
    }.get(schema, {})


def make(schema, **given):
    return schema(**{**least_settings(schema), **given})


def test_every_number_of_every_config_has_a_range():
    for where, (_, _, kind) in ALL_KINDS.items():
        for inner in (kind, kind_of(kind.element)):
            assert inner.base not in (int, float) or inner.mark(Range), where
    assert len(NUMBERS) > 80


@pytest.mark.parametrize(
    "setting",
    [
        ("train", "model.mhla.gate", "{}"),
        ("train", "model.mhla.layout", "[{}, 1]"),
        ("train", "model.linformer.gate", "{}"),
        ("train", "model.linformer.projected_len", "{}"),
        ("sample", "batch_size", "{}"),
    ],
)
def test_settings_of_several_kinds_take_no_larger_numbers_than_others(setting):
    job, key, form = setting
    load_config(None, [f"{key}={form.format(2**31 - 1)}"], SCHEMAS[job])
    with pytest.raises(UserError, match=rf"^{key}"):
        load_config(None, [f"{key}={form.format(2**31)}"], SCHEMAS[job])


@pytest.mark.parametrize(
    ("job", "key"),
    [
        ("train", "data.image_size"),
        ("sample", "height"),
        ("sample", "width"),
        ("sample", "evaluate.size"),
        ("reference", "size"),
    ],
)
def test_no_image_has_a_side_that_libraries_cannot_count(job, key):
    with pytest.raises(UserError, match=rf"^{key} must be in \[1, 65535\], found 2147483647"):
        load_config(None, [f"{key}={2**31 - 1}"], SCHEMAS[job])


@pytest.mark.parametrize(
    ("job", "key", "most"),
    [
        ("train", "model.num_layers", 1000),
        ("train", "wan.num_layers", 1000),
        ("bench", "num_layers", 1000),
        ("cache", "num_workers", 1024),
        ("evaluate", "features.num_workers", 1024),
        ("inspect", "num_inputs", 10_000),
    ],
)
def test_what_is_made_one_by_one_has_a_limit(job, key, most):
    with pytest.raises(UserError, match=rf"^{key} must be in \[[01], {most}\], found {most + 1}"):
        load_config(None, [f"{key}={most + 1}"], SCHEMAS[job])


@pytest.mark.parametrize("key", ["num_layers", "n_refiner_layers", "num_visual_blocks"])
def test_a_new_transformer_of_any_class_has_a_limited_depth(key):
    given = ["transformer.name=SD3Transformer2DModel", f"transformer.sizes.{key}=1000000000"]
    with pytest.raises(UserError, match=rf"transformer.sizes.{key} must be in \[0, 1000\], found"):
        load_config(None, given, SCHEMAS["train"])


@pytest.mark.parametrize("where", NUMBERS)
def test_numbers_outside_their_range_are_refused(where):
    schema, name, kind = NUMBERS[where]
    limits = kind.mark(Range)
    wrong = [math.nan, math.inf, -math.inf, True, "1", 2**400 if kind.base is int else 1e400]
    if limits.low > -math.inf:
        wrong += [limits.low - 1] + [limits.low] * limits.open_low
    if limits.high < math.inf:
        wrong += [limits.high + 1] + [limits.high] * limits.open_high
    if kind.base is int:
        wrong.append(limits.low + 0.5)
    for value in wrong:
        with pytest.raises(UserError, match=rf"\b{name} must be"):
            make(schema, **{name: value})


def keys_below(schema, group=""):
    """Every setting that an override reaches: its whole key and its kind."""
    for name, kind in kinds_of(schema).items():
        yield f"{group}{name}", kind
        if dataclasses.is_dataclass(kind.base):
            yield from keys_below(kind.base, f"{group}{name}.")


@pytest.mark.parametrize("job", SCHEMAS)
def test_mistakes_are_named_by_the_whole_key(job):
    for key, kind in keys_below(SCHEMAS[job]):
        if (limits := kind.mark(Range)) is None:
            continue
        given = [f"{key}={limits.low - 1 if kind.base is int else 'nan'}"]
        if key.startswith("distill."):
            given.append("distill.teacher=folder")
        with pytest.raises(ConfigError) as found:
            load_config(None, given, SCHEMAS[job])
        assert str(found.value).startswith(f"{key} must be"), key


@pytest.mark.parametrize(
    "override, message",
    [
        ("model.mhla.exact_tile=[4]", "model.mhla.exact_tile needs model.mhla.exact between"),
        ("model.mhla.linear=false", "model.mhla.linear=false with model.mhla.exact=0 leaves no"),
        ("model.mhla.layers=9/2", 'model.mhla.layers must be "all"'),
        ("model.linformer.gate=x", "model.linformer.gate must be true"),
        ("one_pass=maybe", "one_pass must be true, false or null, found 'maybe'"),
        ("evaluation.metrics=[fod]", "evaluation.metrics must be one of"),
    ],
)
def test_checks_of_several_settings_say_whole_keys_too(override, message):
    with pytest.raises(ConfigError) as found:
        load_config(None, [override], TrainConfig)
    assert str(found.value).startswith(message)


@pytest.mark.parametrize(
    "where", [w for w, f in ALL_KINDS.items() if get_origin(f[2].base) is Literal]
)
def test_choices_are_checked_in_python_too(where):
    schema, name, _ = ALL_KINDS[where]
    with pytest.raises(UserError, match=rf"{name} must be one of"):
        make(schema, **{name: "neither"})


@pytest.mark.parametrize("text", ODD_TEXTS)
def test_a_text_setting_keeps_what_was_typed(text, tmp_path):
    for key in ("output_dir", "pipeline", "negative_prompt", "prompts", "scheduler"):
        if not text and key in ("output_dir", "pipeline"):
            with pytest.raises(ConfigError, match=f"{key} is empty; write"):
                load_config(None, [f"{key}="], SampleConfig)
            continue
        config = load_config(None, [f"{key}={text}"], SampleConfig)
        assert getattr(config, key) == text
        save_config(config, tmp_path / "again.yaml")
        assert load_config(tmp_path / "again.yaml") == config
    config = load_config(None, [f"lora_targets=[{json.dumps(text)}, off, 0123]"], WanConfig)
    assert config.lora_targets == (text, "off", "0123")


def test_files_keep_what_was_typed_too(tmp_path):
    file = tmp_path / "config.yaml"
    file.write_text(
        "job: sample\noutput_dir: 0123\npipeline: 12:30:00\nnegative_prompt: no\n"
        "prompts: [off, 1e3]\nclasses: [8, tabby cat, 007]\nfps: 08\nscheduler:\nimage: ~\n"
    )
    config = load_config(file)
    assert (config.output_dir, config.pipeline, config.negative_prompt) == (
        "0123",
        "12:30:00",
        "no",
    )
    assert config.prompts == ("off", "1e3") and config.classes == (8, "tabby cat", "007")
    assert config.fps == 8 and config.scheduler is None and config.image is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("job: train\nseed: 1\nseed: 2\n", "has the key seed twice, the second in line 3"),
        ("job: train\ndata:\n  path: a\n  path: b\n", "key data.path twice, the second in line 4"),
        ("job: train\nseed: [1\n", "not valid YAML: .*, in line"),
        ("job: train\n\tseed: 1\n", "not valid YAML: .*, in line 2"),
        ("job: train\nseed: @1\n", "not valid YAML: .*, in line 2"),
        ("job: train\nseed: \x00\n", "not valid YAML"),
        ("job: train\na: &a [*a]\n", "contains itself, in line 2"),
        ("job: train\na: " + "[" * 3000, "nested too deeply"),
        ("job: train\na: " + "[" * 100 + "]" * 100, "nested too deeply"),
        ("job: train\nseed: !!python/name:os.system\n", "unknown tag"),
        ("job: [train]\n", "must start with job"),
        ("? [1, 2]\n: 3\n", "key that is not a word"),
        ("job: train\n---\njob: train\n", "not valid YAML"),
        ("", "mapping"),
    ],
)
def test_yaml_mistakes_are_one_sentence(tmp_path, text, message):
    file = tmp_path / "config.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=message) as error:
        load_config(file)
    assert "\n" not in str(error.value) and str(file) in str(error.value)


def test_a_small_file_cannot_stand_for_a_large_one(tmp_path):
    file = tmp_path / "config.yaml"
    lines = ["job: train", "a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 9)]
    file.write_text("\n".join(lines))
    with pytest.raises(ConfigError, match="more than 100000 values"):
        load_config(file)


def test_yaml_merge_keys_work(tmp_path):
    file = tmp_path / "config.yaml"
    file.write_text(
        "job: evaluate\nfeatures: &f {batch_size: 3, dtype: float64}\nmetrics: [fid]\n"
        "samples: [a]\nreference: b\n"
    )
    assert load_config(file).features.batch_size == 3


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["metrics=[fid,is"], "metrics=.fid,is is not valid YAML"),
        (["metrics=fid"], "metrics must be a list"),
        (["out=[1]", "out.a=3"], "out takes one value"),
        (["samples=[[a]]"], r"samples.0. takes one value"),
        (["skip_corrupt=2"], "true or false"),
        (["seed=1.5"], "seed"),
        (["seed=12:30:00"], "seed"),
        (["seed[0]=1"], "seed"),
        (["metrics.a=1"], "metrics"),
        (["features=3"], "features is a group of settings, such as features.extractor"),
        (["features="], "features"),
        (["=3"], "written key=value"),
        (["--seed=3"], "written key=value"),
        (["size=nan"], "size"),
    ],
)
def test_overrides_that_do_not_fit(overrides, message):
    with pytest.raises(ConfigError, match=message) as error:
        load_config(None, overrides, EvaluateConfig)
    assert "\n" not in str(error.value)


def test_overrides_reach_into_lists_and_mappings(tmp_path):
    file = tmp_path / "config.yaml"
    file.write_text("teacher: t\nstages:\n- {kind: layers}\n- {kind: output, steps: 7}\n")
    config = load_config(file, ["stages[1].steps=9", "stages[0].train=mhla"], DistillConfig)
    assert [stage.steps for stage in config.stages] == [1000, 9]
    assert config.stages[0].train == "mhla"
    with pytest.raises(ConfigError, match="has 2 entries"):
        load_config(file, ["stages[2].steps=9"], DistillConfig)
    options = ["scheduler_options={flow_shift: 3.0}", "scheduler_options.use_flow_sigmas=true"]
    config = load_config(None, options, SampleConfig)
    assert config.scheduler_options == {"flow_shift": 3.0, "use_flow_sigmas": True}


def test_home_is_expanded_in_every_path(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    config = load_config(
        None, ["samples=~/a", "reference=[~/b, c~d]", "features.weights=~/w"], EvaluateConfig
    )
    assert config.samples == (f"{tmp_path}/a",) and config.reference == (f"{tmp_path}/b", "c~d")
    assert config.features.weights == f"{tmp_path}/w"
    assert config.features.cache_dir.startswith(str(tmp_path))
    assert SampleConfig(output_dir="~").output_dir == str(tmp_path)
    with pytest.raises(UserError, match="no home folder ~nobody-of-that-name"):
        SampleConfig(output_dir="~nobody-of-that-name/x")
    (tmp_path / "c.yaml").write_text("job: doctor\n")
    assert load_config("~/c.yaml") == DoctorConfig()


def settings_in(schema):
    """Each class of settings in a config, itself included."""
    yield schema
    for kind in kinds_of(schema).values():
        for part in (kind.base, kind_of(kind.element).base):
            if isinstance(part, type) and dataclasses.is_dataclass(part):
                yield from settings_in(part)


@pytest.mark.parametrize("value", ["{}", "{a: 1}", "[]", "[[-3]]", "-1", "true"])
def test_a_value_of_another_shape_is_taken_or_refused_in_words(value):
    refused = 0
    for schema in {part for job in SCHEMAS.values() for part in settings_in(job)}:
        for name in kinds_of(schema):
            # Anything else but a refusal would end in a traceback.
            try:
                load_config(None, [f"{name}={value}"], schema)
            except UserError as error:
                refused += 1
                assert "\n" not in str(error)
    assert refused > 100
