"""What the toolkit knows of a family of transformers.

A family says where self-attention sits, what its grid is, and which processors to set; what is the
same for all of them is in `surgery.py` and `transformer.py`.
"""

from abc import ABC, abstractmethod
from typing import Any, ClassVar

from torch import nn


class Family(ABC):
    """One kind of diffusers transformer."""

    base_class: ClassVar[type]
    """The diffusers class that is converted."""
    rank: ClassVar[int]
    """Axes of the token grid."""
    stock_processor: ClassVar[type]
    """Processor class of an unconverted layer."""
    mhla_processor: ClassVar[type]
    """Processor class of an MHLA layer; stateless."""
    unconverted_processor: ClassVar[type]
    """Processor class of a layer that stays softmax inside a converted model."""
    replaced_modules: ClassVar[dict[str, tuple[type, type]]] = {}
    """Path of a module outside the layers → its stock class and the class it has in a converted
    model, which must have the same state."""
    variants: ClassVar[tuple[type, ...]] = ()
    """Further softmax classes that are converted like `base_class`, with the same weights."""
    shares_sequences: ClassVar[bool] = False
    """Whether MHLA layers take part in diffusers' context parallelism."""
    stock_kind: ClassVar[str] = "softmax"
    """What an unconverted layer computes: softmax, or linear where the family does so itself."""

    @abstractmethod
    def attentions(self, model: Any) -> list[tuple[str, Any]]:
        """Name and module of every self-attention layer, in order."""

    @abstractmethod
    def sizes(self, model: Any) -> tuple[int, int, int]:
        """Heads, channels of a head, channels of the layer's input."""

    @abstractmethod
    def native_grid(self, model: Any) -> tuple[int, ...]:
        """The token grid that `layout="auto"` is made for."""

    def bystanders(self, model: Any) -> list[tuple[str, Any]]:
        """Layers that are never converted but are handed the grid: get `unconverted_processor`."""
        return []

    def output_projection(self, attention: Any) -> nn.Module:
        """The layer's last linear map, which unlike the input projections is never fused."""
        return attention.to_out[0]

    def settings(self, model: Any) -> dict[str, Any]:
        """What the MHLA class must be saved with, besides `mhla` and the arguments of its base."""
        return {}

    def softmax_class(self, model: Any) -> type:
        """The class that `model` has without its MHLA layers."""
        return self.base_class
