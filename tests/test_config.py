"""Reading configs: every shipped file loads, and mistakes are named."""

import dataclasses
import typing
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from mhla_gen.config import (
    SCHEMAS,
    ConfigError,
    MHLAConfig,
    TrainConfig,
    load_config,
    save_config,
)

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "configs"
# Plans of the comparison's runs are no configs; tests/test_evidence.py reads them.
PLANS = {ROOT / "experiments" / "evidence" / name for name in ("arms.yaml", "long.yaml")}
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
        (["layot=[2]"], "Did you mean: 'layout'"),
        (["zebra=1"], "--print-config shows all keys"),
        (["conv=maybe"], "not a valid bool"),
        (["layout=[0]"], "positive block counts"),
        (["layout=[2,2,2,2]"], "1 to 3 positive block counts"),
        (["layout=big"], '"auto" or'),
        (["layers=3/2"], "fraction like"),
        (["layers=[]"], "empty or with duplicates"),
        (["layers=[1,1]"], "empty or with duplicates"),
        (["layers=[-1]"], "list of indices"),
        (["conv_kernel_size=4"], "odd and positive"),
        (["mixing_init=random"], "expected one of"),
        (["conv"], "written key=value"),
    ],
)
def test_mistakes_are_named(overrides, message):
    with pytest.raises(ConfigError) as error:
        load_config(None, overrides, MHLAConfig)
    assert message in str(error.value) and "\n" not in str(error.value)


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
    """YAML reads no, on and yes as booleans, so they are no names for a choice."""
    for field in dataclasses.fields(schema):
        if typing.get_origin(field.type) is typing.Literal:
            for choice in typing.get_args(field.type):
                given = OmegaConf.create()
                given.merge_with_dotlist([f"{field.name}={choice}"])
                assert given[field.name] == choice


def test_retired_settings_are_dropped_where_off_and_refused_where_on(tmp_path):
    old = tmp_path / "config.yaml"
    text = "job: train\nmodel:\n  mhla:\n    {}\n"
    old.write_text(text.format("content_mixing: false"))
    assert load_config(old).model.mhla == MHLAConfig()
    for line, remedy in (
        ("content_mixing: true", "content_mixing=true is no longer supported .* train again"),
        ("mixing_init: multiscale", "found 'multiscale'.* write locality"),
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
        with pytest.raises(ConfigError, match="key convert is called distill now"):
            load_config(*arguments, TrainConfig)
    # A run that a former release trained plainly can be resumed.
    file.write_text("job: train\nconvert: null\n")
    assert load_config(file) == TrainConfig()
