"""What the toolkit knows of a family of transformers.

A family is a table of what differs: where self-attention sits, what its grid is, and which
processors to set. What is the same for all is in `surgery.py`, `transformer.py`, `processors.py`.
"""

from collections.abc import Sequence
from typing import Any, ClassVar

from torch import nn


class Family:
    """One kind of diffusers transformer."""

    base_class: ClassVar[type]
    """The diffusers class that is converted."""
    rank: ClassVar[int]
    """Axes of the token grid."""
    layers: ClassVar[tuple[str, ...]]
    """Paths of the self-attention layers, in order; `*` stands for the number of a block."""
    bystander_layers: ClassVar[tuple[str, ...]] = ()
    """Paths of layers that are never converted but are handed the grid."""
    native: ClassVar[tuple[int, ...] | None] = None
    """The grid that `layout="auto"` is made for, if it is the same for every model."""
    stock_processor: ClassVar[type]
    """Processor class of an unconverted layer."""
    mhla_processor: ClassVar[type]
    """Processor class of an MHLA layer; stateless."""
    unconverted_processor: ClassVar[type]
    """Processor class of a layer that stays softmax inside a converted model."""
    replaced_modules: ClassVar[dict[str, tuple[type, type]]] = {}
    """Path of a module outside the layers → its stock class and the class it has in a converted
    model, which must have the same state; a last `*` stands for every block."""
    variants: ClassVar[tuple[type, ...]] = ()
    """Further softmax classes that are converted like `base_class`, with the same weights."""
    frame_causal: ClassVar[bool] = False
    """Whether layers can be causal over frames, the first axis of the grid."""
    shares_sequences: ClassVar[bool] = False
    """Whether MHLA layers take part in diffusers' context parallelism."""
    text_length: ClassVar[int]
    """Text tokens that the model's pipeline has by default, where layers read text, too."""
    stock_kind: ClassVar[str] = "softmax"
    """What an unconverted layer computes: softmax, or linear where the family does so itself."""

    def attentions(self, model: Any) -> list[tuple[str, Any]]:
        """Name and module of every self-attention layer, in order."""
        return _modules(model, self.layers)

    def bystanders(self, model: Any) -> list[tuple[str, Any]]:
        """Name and module of the layers that get `unconverted_processor`."""
        return _modules(model, self.bystander_layers)

    def reads_text(self, attention: Any) -> bool:
        """Whether a layer reads text tokens beside those of its grid."""
        return False

    def processors(self, attention: Any) -> tuple[type, type, type]:
        """Stock, MHLA and unconverted processor class of a layer."""
        return self.stock_processor, self.mhla_processor, self.unconverted_processor

    def replaced(self, model: Any) -> list[tuple[Any, type, type]]:
        """Modules outside the layers whose class changes: stock class, class when converted."""
        found = []
        for path, classes in self.replaced_modules.items():
            blocks, every, _ = path.partition(".*")
            module = model.get_submodule(blocks)
            found += [(one, *classes) for one in (module if every else [module])]
        return found

    def sizes(self, model: Any) -> tuple[int, int, int]:
        """Number of heads, channels per head, channels of the layer's input."""
        num_heads, head_dim = model.config.num_attention_heads, model.config.attention_head_dim
        return num_heads, head_dim, num_heads * head_dim

    def native_grid(self, model: Any) -> tuple[int, ...]:
        """`native`, or patches along both sides at the model's own resolution."""
        if self.native is not None:
            return self.native
        side = model.config.sample_size // model.config.patch_size
        return side, side

    def arguments(self, model: Any, given: dict[str, Any]) -> dict[str, Any]:
        """What the model's own `forward` takes, from what a caller gives by name.

        A family overrides it to hand the grid to its layers.
        """
        return given

    def output_projection(self, attention: Any) -> nn.Module:
        """The layer's last linear map, which unlike the input projections is never fused."""
        return attention.to_out[0]

    def settings(self, model: Any) -> dict[str, Any]:
        """What the MHLA class must be saved with, besides `mhla` and the arguments of its base."""
        return {}

    def softmax_class(self, model: Any) -> type:
        """The class that `model` has without its MHLA layers."""
        return self.base_class


def _modules(model: Any, paths: tuple[str, ...]) -> list[tuple[str, Any]]:
    layers: dict[str, list[str]] = {}
    for path in paths:
        blocks, _, layer = path.partition(".*.")
        layers.setdefault(blocks, []).append(layer)
    return [
        (f"{blocks}.{i}.{name}", block.get_submodule(name))
        for blocks, names in layers.items()
        for i, block in enumerate(model.get_submodule(blocks))
        for name in names
        # A model may have the layer in some of its blocks only.
        if getattr(block, name, None) is not None
    ]


def patch_grid(sizes: Sequence[int], patch_size: int | Sequence[int]) -> tuple[int, ...]:
    """Tokens along each axis of latents of these sizes, with one patch size or one per axis."""
    patches = [patch_size] * len(sizes) if isinstance(patch_size, int) else patch_size
    return tuple(length // patch for length, patch in zip(sizes, patches, strict=True))
