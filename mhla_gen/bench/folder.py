"""The folder of a measurement: whether it may be written to. It is asked before torch loads."""

from pathlib import Path

from mhla_gen.errors import OccupiedError
from mhla_gen.outputs.folders import check_writable

RESULTS_NAME, PICTURE_NAME = "bench.json", "bench.png"


def check_output_dir(folder: str | Path) -> None:
    """Raise unless the folder can be written and holds no measurement.

    Raises:
        FileExistsError: If it holds one.
        PermissionError: If it cannot be written.
    """
    if (Path(folder) / RESULTS_NAME).exists():
        raise OccupiedError(
            f"output_dir {folder} contains an earlier measurement; choose another one or move "
            "it away"
        )
    check_writable(folder)
