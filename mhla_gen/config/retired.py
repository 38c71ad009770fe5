"""Settings that earlier versions had: dropped where they were off, refused where they were on."""

from collections.abc import Mapping
from typing import Any

from mhla_gen.config.checks import is_mapping
from mhla_gen.errors import UserError

_CONTENT_MIXING = (
    "content_mixing=true is no longer supported (it was no better than the plain matrix, see "
    "docs/mixing.md); leave it out and train again"
)
_MULTISCALE = (
    "mixing_init must be locality or uniform, found 'multiscale', which is no longer supported; "
    "write locality: a saved model keeps its matrices"
)
_COMBINE = (
    "combine={} is no longer supported (it was no better than the gate, see docs/evidence.md); "
    "leave it out and train again"
)
_CONVERT = "the key convert is now called distill; rename it"


def without_retired(values: Mapping[str, Any]) -> dict[str, Any]:
    """Settings, nested or not, as this version knows them.

    Raises:
        UserError: If one that no longer exists was in use; the message says what to do.
    """
    kept: dict[str, Any] = {}
    for key, value in values.items():
        if key == "mixing_init" and value == "multiscale":
            raise UserError(_MULTISCALE)
        if key == "content_mixing":
            if value is not False:
                raise UserError(_CONTENT_MIXING)
        elif key == "combine":
            if value != "gate":
                raise UserError(_COMBINE.format(value))
        elif key == "convert":
            if value is not None:
                raise UserError(_CONVERT)
        else:
            kept[key] = without_retired(value) if is_mapping(value) else value
    return kept
