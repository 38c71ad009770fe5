"""The folder of a measurement: whether it may be written to, and which rows it has already.

Nothing here needs torch: folders are checked before it loads.
"""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mhla_gen.config import BenchConfig
from mhla_gen.errors import OccupiedError
from mhla_gen.files.saved import read_json
from mhla_gen.outputs.folders import check_writable, differing_values

RESULTS_NAME, PICTURE_NAME = "bench.json", "bench.png"
# What another run of the same command may change.
_FREE = ("command", "date")
_REMEDY = "choose another one or move it away"


def check_output_dir(config: BenchConfig) -> None:
    """Raise unless the folder can be written, and holds no measurement with other settings.

    Raises:
        FileExistsError: If it holds one; settings that differ are named.
        PermissionError: If it cannot be written.
    """
    folder = Path(config.output_dir)
    found = _read(folder)
    if found is not None:
        # Results of earlier versions do not have them.
        settings = found.get("settings")
        if settings is None:
            raise OccupiedError(f"output_dir {folder} contains an earlier measurement; {_REMEDY}")
        _refuse(folder, differing_values(settings, plain_settings(config), ("output_dir",)))
    check_writable(folder)


def earlier_rows(folder: Path, facts: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows of a measurement that was interrupted; none if there is no measurement.

    Args:
        folder: A folder that `check_output_dir` accepts.
        facts: What the rows to come will be measured by: settings, device, versions.

    Raises:
        FileExistsError: If its rows were measured by others, naming them.
    """
    found = _read(folder)
    if found is None:
        return []
    rows = found.pop("rows", [])
    _refuse(folder, differing_values(found, facts, (*_FREE, "settings.output_dir")))
    return [row | {"grid": tuple(row["grid"])} for row in rows]


def plain_settings(config: BenchConfig) -> dict[str, Any]:
    """The settings of a measurement as its results have them."""
    return json.loads(json.dumps(asdict(config)))


def _read(folder: Path) -> dict[str, Any] | None:
    path = folder / RESULTS_NAME
    if not path.is_file():
        return None
    return read_json(path, "move it away, or choose another output_dir")


def _refuse(folder: Path, changes: list[str]) -> None:
    if changes:
        raise OccupiedError(
            f"output_dir {folder} contains a measurement with other settings "
            f"({'; '.join(changes)}); {_REMEDY}"
        )
