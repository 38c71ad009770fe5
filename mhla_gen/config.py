"""Every setting of the toolkit: frozen dataclasses, and `load_config` to read them.

A config file is YAML whose first key, `job`, names the command it belongs to. Values come from the
dataclass, then the file, then `key=value` overrides; a key that no dataclass has is an error.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException


class ConfigError(ValueError):
    """A config file or an override that does not fit; the message is one sentence for the user."""


@dataclass(frozen=True, kw_only=True)
class MHLAConfig:
    """How a transformer's self-attention is replaced.

    Raises:
        ValueError: If a value is out of its range.
    """

    layout: Any = "auto"
    """Blocks along each axis of the token grid, such as (4, 4), or "auto" (see `auto_layout`)."""
    layers: Any = "all"
    """Which layers: "all", a list of indices, or a fraction such as "2/3": every third stays
    softmax."""
    feature_map: str = "relu"
    """φ: relu, squared_relu, elu+1, softplus or identity."""
    normalize: bool = True
    """Divide by the denominator."""
    conv: bool = True
    """Add a depthwise convolution of V on the token grid; it starts at zero."""
    conv_kernel_size: int = 3
    """Odd width of that convolution along every axis, in tokens."""
    gate: bool = True
    """Multiply the output by SiLU of a projection of the layer's input; it starts at one."""
    output_norm: bool = False
    """RMS-normalise the output of every head."""
    mixing_per_head: bool = False
    """One mixing matrix per head instead of one per layer."""
    mixing_init: Literal["locality", "uniform"] = "locality"
    """Initial mixing matrix."""
    mixing_learnable: bool = True
    """Train the mixing matrix; frozen otherwise."""
    eps: float = 1e-6
    """Added to the denominator."""
    implementation: str = "auto"
    """Which code runs, see `mhla_gen.ops.mhla`."""

    def __post_init__(self):
        object.__setattr__(self, "layout", _normalize_layout(self.layout))
        object.__setattr__(self, "layers", _normalize_layers(self.layers))
        if self.conv_kernel_size < 1 or self.conv_kernel_size % 2 == 0:
            raise ValueError(
                f"conv_kernel_size must be odd and positive, found {self.conv_kernel_size}"
            )
        _check_choice("mixing_init", self.mixing_init, ("locality", "uniform"))

    def to_dict(self) -> dict[str, Any]:
        """Plain values for a JSON config; `MHLAConfig(**d)` reads them back."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}


def _normalize_layout(layout: Any) -> Any:
    if isinstance(layout, str) and layout == "auto":
        return layout
    message = f'layout must be "auto" or 1 to 3 positive block counts, found {layout!r}'
    if not isinstance(layout, Sequence) or isinstance(layout, str) or not 1 <= len(layout) <= 3:
        raise ValueError(message)
    if any(not isinstance(n, int) or isinstance(n, bool) or n < 1 for n in layout):
        raise ValueError(message)
    return tuple(layout)


def _normalize_layers(layers: Any) -> Any:
    message = f'layers must be "all", a list of indices or a fraction like "2/3", found {layers!r}'
    if isinstance(layers, str):
        if layers == "all":
            return layers
        part, slash, whole = layers.partition("/")
        if not (slash and part.isdecimal() and whole.isdecimal() and 0 < int(part) <= int(whole)):
            raise ValueError(message)
        return layers
    if not isinstance(layers, Sequence):
        raise ValueError(message)
    if any(not isinstance(i, int) or isinstance(i, bool) or i < 0 for i in layers):
        raise ValueError(message)
    if not layers or len(set(layers)) != len(layers):
        raise ValueError(message + " (empty or with duplicates)")
    return tuple(sorted(layers))


def _check_choice(name: str, value: Any, choices: Sequence[Any]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(str, choices))}, found {value!r}")


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
        # Overrides go into the file's values: a frozen dataclass is read-only once structured.
        given = OmegaConf.create(values)
        given.merge_with_dotlist(list(overrides))
        return OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(schema), given))
    except (OmegaConfBaseException, ValueError, TypeError) as error:
        where = "the overrides" if path is None else str(path)
        raise ConfigError(f"{where}: {_first_line(error)}") from error


def save_config(config: Any, path: str | Path) -> None:
    """Write a config as YAML that `load_config` reads back, `job` first."""
    Path(path).write_text(to_yaml(config))


def to_yaml(config: Any) -> str:
    """The resolved config as YAML, `job` first."""
    return f"job: {_job_of(type(config))}\n" + OmegaConf.to_yaml(OmegaConf.structured(config))


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
    return f"{lines[0]} (key {key})" if key and key not in lines[0] else lines[0]


def _job_of(schema: type) -> str:
    return next((job for job, known in SCHEMAS.items() if known is schema), schema.__name__)


# Command name → its settings. A config file's `job` is one of these names.
SCHEMAS: dict[str, type] = {}
