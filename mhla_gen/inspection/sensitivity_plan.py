"""Which layers stay softmax, for a budget."""

from collections.abc import Mapping
from dataclasses import dataclass

from mhla_gen.errors import UserError


@dataclass(frozen=True)
class Plan:
    """A division of the layers that were measured."""

    softmax_layers: tuple[int, ...]
    """They stay as they are."""
    mhla_layers: tuple[int, ...]
    """They are replaced."""
    predicted_error: float
    """Sum of the errors that each replaced layer causes alone."""

    @property
    def override(self) -> str:
        """The setting that makes a model of this plan."""
        return f"model.mhla.layers=[{', '.join(map(str, self.mhla_layers))}]"

    @property
    def exact_override(self) -> str | None:
        """The setting that instead converts all layers, with exact pairs in the worst ones alone.

        The plan has to come from MHLA without exact pairs. None if it keeps no layer.
        """
        if not self.softmax_layers:
            return None
        return f"model.mhla.exact_layers=[{', '.join(map(str, self.softmax_layers))}]"


def plan_by_count(errors: Mapping[int, float], softmax_layers: int) -> Plan:
    """Keep this many layers softmax, those with the largest errors.

    Raises:
        ValueError: If no layer is left to replace.
    """
    if softmax_layers >= len(errors):
        raise UserError(
            f"softmax_layers must be below {len(errors)}, the layers that were measured, "
            f"found {softmax_layers}"
        )
    order = sorted(errors, key=lambda layer: errors[layer])
    return _plan(errors, order[: len(errors) - softmax_layers])


def plan_by_error(errors: Mapping[int, float], max_error: float) -> Plan:
    """Replace as many layers as keep the sum of their errors within a budget.

    Raises:
        ValueError: If no layer fits.
    """
    replaced: list[int] = []
    for layer in sorted(errors, key=lambda layer: errors[layer]):
        if sum(errors[i] for i in (*replaced, layer)) > max_error:
            break
        replaced.append(layer)
    if not replaced:
        smallest = min(errors.values())
        raise UserError(
            f"max_error={max_error} is below the smallest error of a layer, {smallest:.3g}"
        )
    return _plan(errors, replaced)


def _plan(errors: Mapping[int, float], replaced: list[int]) -> Plan:
    kept = sorted(set(errors) - set(replaced))
    total = sum(errors[layer] for layer in replaced)
    return Plan(tuple(kept), tuple(sorted(replaced)), total)
