"""The softmax teacher of a student, and which weights the two share."""

import copy
from collections.abc import Collection
from typing import Any, Literal

from mhla_gen.errors import UserError
from mhla_gen.models.additions import AddedAttention
from mhla_gen.models.surgery import swap_processor
from mhla_gen.models.transformer import MHLATransformerMixin

Trained = Literal["mhla", "attention", "all"]
"""What a stage trains: the parts that MHLA adds, the whole attention layers that have them, or
every weight."""


def mhla_attentions(student: MHLATransformerMixin) -> dict[str, Any]:
    """The attention layers of a student that are MHLA, by name, in order.

    Raises:
        ValueError: If it has none.
    """
    layers = student.family.attentions(student)
    found = {
        name: layer
        for name, layer in layers
        if isinstance(getattr(layer, "mhla", None), AddedAttention)
    }
    if not found:
        raise UserError("the student has no MHLA layers; convert it with mhla_gen.inject first")
    return found


def trained_names(student: Any, trained: Trained) -> set[str]:
    """Names of the parameters that a stage trains.

    Mixing matrices that the config freezes stay frozen.
    """
    layers = mhla_attentions(student)
    prefixes = {
        "mhla": tuple(f"{name}.mhla." for name in layers),
        "attention": tuple(f"{name}." for name in layers),
        "all": ("",),
    }[trained]
    frozen = {
        f"{name}.mhla.mixing"
        for name, layer in layers.items()
        if layer.mhla.mixing is not None and not layer.mhla.config.mixing_learnable
    }
    names = (name for name, _ in student.named_parameters())
    return {name for name in names if name.startswith(prefixes)} - frozen


def train_only(student: Any, names: Collection[str]) -> None:
    """Enable gradients for these parameters only."""
    for name, parameter in student.named_parameters():
        parameter.requires_grad_(name in names)


def softmax_twin(student: Any, copied: Collection[str] = ()) -> Any:
    """The softmax model inside a student, as a separate model that shares its weights.

    It takes the same inputs as the student, is frozen, and costs the memory of `copied` alone.

    Args:
        student: An MHLA model whose projections are still the softmax model's.
        copied: Parameters that will be trained, so that the twin needs the values they have now.

    Returns:
        A model whose parameters are the student's own, except copies of those in `copied`.
    """
    kept = dict(student.named_parameters()) | dict(student.named_buffers())
    shared = {id(value): value for name, value in kept.items() if name not in copied}
    # What deepcopy finds in its memo it takes as the copy.
    twin = copy.deepcopy(student, shared)
    for _, attention in twin.family.attentions(twin):
        if hasattr(attention, "mhla"):
            del attention.mhla
        swap_processor(attention, twin.family.processors(attention)[2])
    own = dict(twin.named_parameters())
    for name in copied:
        if name in own:
            own[name].requires_grad_(False)
    return twin.eval()
