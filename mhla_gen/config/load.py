"""Read and write configs: dataclass defaults, then a YAML file, then `key=value` overrides."""

import copy
import dataclasses
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from mhla_gen.config.checks import is_list, is_mapping
from mhla_gen.config.data import CacheConfig
from mhla_gen.config.evaluation import EvaluateConfig, ReferenceConfig
from mhla_gen.config.fields import Settings, Text, expand_home, in_group, kind_of, kinds_of
from mhla_gen.config.inspection import InspectConfig, SensitivityConfig
from mhla_gen.config.meanings import explained
from mhla_gen.config.reading import ConfigError, check_shapes, put_override, read_yaml, write_yaml
from mhla_gen.config.retired import without_retired
from mhla_gen.config.sampling import SampleConfig
from mhla_gen.config.tools import BenchConfig, ConvertConfig, DoctorConfig
from mhla_gen.config.training import QuickstartConfig, TrainConfig
from mhla_gen.files import write_text

# Command name → its settings. A config file's `job` is one of these names.
SCHEMAS: dict[str, type] = {
    "quickstart": QuickstartConfig,
    "train": TrainConfig,
    "cache": CacheConfig,
    "sample": SampleConfig,
    "evaluate": EvaluateConfig,
    "reference": ReferenceConfig,
    "inspect": InspectConfig,
    "inspect sensitivity": SensitivityConfig,
    "convert": ConvertConfig,
    "bench": BenchConfig,
    "doctor": DoctorConfig,
}

_UNFIT = (OmegaConfBaseException, ValueError)
# What OmegaConf says of a key that it does not know, and of a value that is none of the choices.
_UNKNOWN = re.compile(r"Key '.*' not in '.*?'(\. Did you mean(?: one of)?: '(?P<near>.*)'\?)?$")
_CHOICE = re.compile(r"Invalid value (?P<found>.*), expected one of \[(?P<choices>.*)\]$")
_ALL_KEYS = "--print-config shows all of them"


def load_config(
    path: str | Path | None = None, overrides: Sequence[str] = (), schema: type | None = None
) -> Any:
    """Read a config: defaults, then the file, then the overrides.

    Args:
        path: YAML file, or None for the defaults of `schema`.
        overrides: `key=value` strings; nested keys with dots, lists as `[1, 2]`.
        schema: Dataclass to read. By default the one that the file's `job` names.

    Returns:
        A frozen dataclass, `schema`.

    Raises:
        ConfigError: If the file is missing or is no YAML mapping, its job is another one, a key is
            unknown, or a value does not fit.
    """
    if path is not None:
        path = Path(expand_home("the config file", path))
    values = {} if path is None else _read_yaml(path, schema)
    job = values.pop("job", None)
    if schema is None:
        if not isinstance(job, str) or job not in SCHEMAS:
            raise ConfigError(
                f"{path or 'a config'} must start with job: {' | '.join(SCHEMAS)}; found {job!r}"
            )
        schema = SCHEMAS[job]
    given = copy.deepcopy(values)
    for override in overrides:
        put_override(given, override, schema)
    try:
        return _structured(schema, given)
    except _UNFIT as error:
        where = "" if path is None else f"{_at_fault(path, values, schema)}: "
        raise ConfigError(f"{where}{_in_one_line(error)}") from error


def save_config(config: Settings, path: str | Path) -> None:
    """Write a config as YAML that `load_config` reads back, `job` first."""
    write_text(path, to_yaml(config))


def to_yaml(config: Settings, comments: bool = False) -> str:
    """The resolved config as YAML, `job` first; `comments` say what each setting means."""
    settings = explained(config) if comments else write_yaml(dataclasses.asdict(config))
    return f"job: {_job_of(type(config))}\n{settings}"


def _structured(schema: type, values: dict[str, Any]) -> Any:
    # A frozen dataclass is read-only once structured: all values are merged in at once.
    values = without_retired(values)
    check_shapes(values, schema)
    merged = OmegaConf.merge(OmegaConf.structured(schema), values)
    plain = OmegaConf.to_container(merged, resolve=True, throw_on_missing=True)
    return _built(plain, schema)


def _built(value: Any, annotation: Any, key: str = "") -> Any:
    """A plain value, with a dataclass in place of each mapping that its annotation asks for.

    OmegaConf's own dataclasses are not used, because their messages do not name the whole key.
    """
    kind = kind_of(annotation)
    if value == "" and (text := kind.mark(Text)) and text.path:
        # For example from a shell variable that is not set.
        raise ConfigError(f"{key} is empty; write . for the current folder")
    if isinstance(kind.base, type) and dataclasses.is_dataclass(kind.base) and is_mapping(value):
        schema: type = kind.base
        group = f"{key}." if key else ""
        kinds = kinds_of(schema)
        parts = {name: _built(part, kinds[name], f"{group}{name}") for name, part in value.items()}
        with in_group(group):
            return schema(**parts)
    if is_list(value):
        return [_built(part, kind.element, f"{key}[{i}]") for i, part in enumerate(value)]
    return value


def _at_fault(path: Path, values: dict[str, Any], schema: type) -> str:
    """Where the setting is that does not fit."""
    try:
        _structured(schema, values)
    except _UNFIT:
        return str(path)
    return f"{path} with the given overrides"


def _read_yaml(path: Path, schema: type | None) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise ConfigError(
            f"config file {path} does not exist; the shipped ones are in the repository's configs/"
        ) from None
    except IsADirectoryError:
        raise ConfigError(
            f"config file {path} is a folder; give a folder as a setting, KEY={path}"
        ) from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not valid YAML: it is not UTF-8 text") from error
    try:
        # Which settings these are stands in the file itself.
        job = read_yaml(text, None).get("job")
        if schema is None:
            schema = SCHEMAS.get(job) if isinstance(job, str) else None
        elif job is not None and (not isinstance(job, str) or SCHEMAS.get(job) is not schema):
            raise ConfigError(f"is a config for `mhla-gen {job}`, not for {_job_of(schema)}")
        return read_yaml(text, schema)
    except ConfigError as error:
        raise ConfigError(f"{path} {error}") from error


def _in_one_line(error: Exception) -> str:
    # OmegaConf appends lines such as full_key and object_type; the key helps, the rest does not.
    lines = str(error).splitlines() or [type(error).__name__]
    key = next((line.split(":", 1)[1].strip() for line in lines if "full_key:" in line), "")
    if unknown := _UNKNOWN.match(lines[0]):
        parent, dot, _ = key.rpartition(".")
        if not (near := unknown["near"]):
            return f"there is no setting {key}; {_ALL_KEYS}"
        *others, last = (f"{parent}{dot}{name}" for name in near.split("', '"))
        meant = f"{', '.join(others)} or {last}" if others else last
        return f"there is no setting {key}; did you mean {meant}?"
    if choice := _CHOICE.match(lines[0]):
        choices = choice["choices"].replace("'", "")
        return f"{key} must be one of {choices}, found {choice['found']}"
    return f"{lines[0]} (key {key})" if key and key not in lines[0] else lines[0]


def _job_of(schema: type) -> str:
    return next((job for job, known in SCHEMAS.items() if known is schema), schema.__name__)
