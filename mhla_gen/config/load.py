"""Read and write configs: dataclass defaults, then a YAML file, then `key=value` overrides."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from mhla_gen.config.data import CacheConfig
from mhla_gen.config.evaluation import EvaluateConfig, ReferenceConfig
from mhla_gen.config.inspection import InspectConfig, SensitivityConfig
from mhla_gen.config.retired import without_retired
from mhla_gen.config.sampling import SampleConfig
from mhla_gen.config.tools import BenchConfig, ConvertConfig, DoctorConfig
from mhla_gen.config.training import QuickstartConfig, TrainConfig

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

_UNFIT = (OmegaConfBaseException, ValueError, TypeError)


class ConfigError(ValueError):
    """A config file or an override that does not fit; the message is one sentence for the user."""


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
    values = {} if path is None else _read_yaml(Path(path))
    job = values.pop("job", None)
    if schema is None:
        if job not in SCHEMAS:
            raise ConfigError(
                f"{path or 'a config'} must start with job: {' | '.join(SCHEMAS)}; found {job!r}"
            )
        schema = SCHEMAS[job]
    elif job is not None and SCHEMAS.get(job) is not schema:
        raise ConfigError(f"{path} is a config for `mhla-gen {job}`, not for {_job_of(schema)}")
    for override in overrides:
        if "=" not in override:
            raise ConfigError(f"overrides are written key=value, found {override!r}")
    try:
        return _structured(schema, values, overrides)
    except _UNFIT as error:
        where = _at_fault(path, values, schema)
        raise ConfigError(f"{where}: {_first_line(error)}") from error


def save_config(config: Any, path: str | Path) -> None:
    """Write a config as YAML that `load_config` reads back, `job` first."""
    path = Path(path)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    partial.write_text(to_yaml(config))
    os.replace(partial, path)


def to_yaml(config: Any) -> str:
    """The resolved config as YAML, `job` first."""
    return f"job: {_job_of(type(config))}\n" + OmegaConf.to_yaml(OmegaConf.structured(config))


def _structured(schema: type, values: dict[str, Any], overrides: Sequence[str]) -> Any:
    # Overrides go into the file's values: a frozen dataclass is read-only once structured.
    given = OmegaConf.create(values)
    given.merge_with_dotlist(list(overrides))
    plain: Any = OmegaConf.to_container(given)
    given = OmegaConf.create(without_retired(plain))
    return OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(schema), given))


def _at_fault(path: str | Path | None, values: dict[str, Any], schema: type) -> str:
    """Where a setting stands that does not fit."""
    if path is None:
        return "the overrides"
    try:
        _structured(schema, values, ())
    except _UNFIT:
        return str(path)
    return f"{path} with the overrides"


def _read_yaml(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ConfigError(f"config file {path} does not exist")
    try:
        values = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not valid YAML: {_first_line(error)}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path} must hold a mapping of keys to values")
    return values


def _first_line(error: Exception) -> str:
    # OmegaConf appends lines such as full_key and object_type; the key helps, the rest does not.
    lines = str(error).splitlines() or [type(error).__name__]
    key = next((line.split(":", 1)[1].strip() for line in lines if "full_key:" in line), "")
    message = f"{lines[0]} (key {key})" if key and key not in lines[0] else lines[0]
    unknown = " not in " in message and "Did you mean" not in message
    return f"{message}; --print-config shows all keys" if unknown else message


def _job_of(schema: type) -> str:
    return next((job for job, known in SCHEMAS.items() if known is schema), schema.__name__)
