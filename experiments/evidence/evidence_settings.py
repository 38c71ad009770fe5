"""Whether results are of the settings that a plan asks for."""

import json
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from evidence_plan import Run

from mhla_gen.config import MHLAConfig, TrainConfig
from mhla_gen.models.exact import exact_share, tile_layout

# Settings, and groups of them, that change no result: where files are, and what else is written.
_ASIDE = {
    *("output_dir", "data.path", "resume", "unpickle_checkpoint", "report_to", "log_every"),
    *("checkpoint_every", "keep_checkpoints", "sample_every", "samples"),
    *("evaluate_every", "evaluation"),
}
# What changes the speed alone.
_SPEED = {
    *("compile", "cuda_graphs", "one_pass", "parallelism", "gradient_checkpointing"),
    "model.mhla.implementation",
}
_TILES = ("exact_tile", "exact_group", "exact_window", "exact_top")


def stated(run: Run, config: TrainConfig) -> dict[str, Any]:
    """The settings of a run as its result keeps them: with the tiles that were picked."""
    mhla = with_tiles(config.model.mhla, run.grid)
    return asdict(replace(config, model=replace(config.model, mhla=mhla)))


def with_tiles(config: MHLAConfig, grid: tuple[int, ...]) -> MHLAConfig:
    """The same attention with the tiles of this grid as settings."""
    if not config.has_tiles:
        return config
    return replace(config, **dict(zip(_TILES, tile_layout(config, grid), strict=True)))


def require_settings(
    out: Path, runs: Sequence[Run], overrides: Sequence[str], samples: Mapping[str, int]
) -> None:
    """Raise unless the results of runs are of the settings that these have now.

    A setting that is newer than a result had its default there; one that is gone is not compared.
    Of the tiles that were picked for them, older results tell only the share of pairs.

    Args:
        out: Folder of the results, of which any may be missing.
        runs: Of the plan.
        overrides: Changes to the training settings of all runs.
        samples: Number of samples for each kind of runs.

    Raises:
        SystemExit: If a result is of other settings.
    """
    for run in runs:
        path = out / f"{run.name}.json"
        if not path.is_file():
            continue
        result, config = json.loads(path.read_bytes()), run.config(*overrides)
        found = _settings(result["config"])
        wanted = _settings(stated(run, config))
        if run.setting.kind == "converted":
            # Tuned until the last point, whatever max_steps says.
            del wanted["max_steps"]
            wanted |= {"points": list(run.setting.points), "taught": _listed(run.setting.taught)}
            found |= {"points": [point["steps"] for point in result["points"]]}
            found |= {"taught": result["taught"]}
        mhla, converts = config.model.mhla, config.model.attention in ("mhla", "linear")
        if converts and mhla.layers == mhla.exact_layers == "all" and "pairs" in result:
            wanted["pairs"] = exact_share(mhla, run.grid)
            found["pairs"] = result["pairs"]
        if "scores" in result:
            wanted["--samples"] = samples[run.setting.kind]
            found["--samples"] = result["scores"]["samples"]
        _require(path, found, wanted, _ASIDE | _SPEED)


def require_speeds(out: Path, runs: Sequence[Run], overrides: Sequence[str]) -> None:
    """The same for speeds, of which older ones do not say their settings."""
    for run in runs:
        path = out / f"{run.speed_name}.json"
        result = json.loads(path.read_bytes()) if path.is_file() else {}
        if "config" in result:
            wanted = _settings(stated(run, run.config(*overrides)))
            _require(path, _settings(result["config"]), wanted, _ASIDE)


def require_attention(
    path: Path, found: dict[str, Any] | str, wanted: dict[str, Any] | str
) -> None:
    """The same for the settings of an attention, or the name of one without settings."""
    both = isinstance(found, dict) and isinstance(wanted, dict)
    defaults = {"attention": asdict(MHLAConfig()) if both else None}
    _require(path, *(_flat({"attention": one}, defaults) for one in (found, wanted)), ())


def _settings(values: dict[str, Any]) -> dict[str, Any]:
    return _flat(values, asdict(TrainConfig()))


def _flat(values: dict[str, Any], defaults: dict[str, Any], group: str = "") -> dict[str, Any]:
    """All settings by name, those that are missing with their defaults, as JSON has them.

    What has no settings of its own by default, such as the options of an optimizer, is one value.
    """
    flat: dict[str, Any] = {}
    for name, default in defaults.items():
        value = values.get(name, default)
        if default and isinstance(default, dict):
            flat |= _flat(value, default, f"{group}{name}.")
        else:
            flat[f"{group}{name}"] = _listed(value)
    return flat


def _listed(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _require(
    path: Path, found: dict[str, Any], wanted: dict[str, Any], ignored: Collection[str]
) -> None:
    for name, value in wanted.items():
        parts = name.split(".")
        if any(".".join(parts[: n + 1]) in ignored for n in range(len(parts))):
            continue
        other = found.get(name)
        unknown = other is None and name.rpartition(".")[2] in _TILES
        close = isinstance(value, float) and other is not None and math.isclose(value, other)
        if not (unknown or close or value == other):
            raise SystemExit(
                f"{path} is of {name}={json.dumps(other)}, not {json.dumps(value)}, "
                "which is asked for now; rename or remove this result to have it computed again"
            )
