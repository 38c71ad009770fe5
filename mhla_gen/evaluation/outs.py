"""Which files `evaluate` and `reference` may write over; checked before torch is loaded."""

import json
from pathlib import Path

from mhla_gen.evaluation.errors import EvaluationError
from mhla_gen.evaluation.npz import npz_keys
from mhla_gen.outputs.folders import check_output_file


def check_report(path: str | Path) -> None:
    """Raise unless `evaluate` may write its numbers to a file.

    Raises:
        FileExistsError: If something else is there.
        PermissionError: If it cannot be written.
    """
    check_output_file("out", path, _is_report)


def check_statistics(path: str | Path) -> None:
    """Raise unless `reference` may write statistics to a file.

    Raises:
        FileExistsError: If something else is there, such as images, or statistics of other code.
        PermissionError: If it cannot be written.
    """
    check_output_file("out", path, _is_statistics)


def _is_report(path: Path) -> bool:
    try:
        values = json.loads(path.read_bytes())
    except ValueError:
        return False
    return isinstance(values, dict) and "metrics" in values


def _is_statistics(path: Path) -> bool:
    try:
        return {"count", "protocol"} <= npz_keys(path)
    except EvaluationError:
        return False
