"""The description of a family of transformers.

A family lists what differs between models: where self-attention is, what its grid is, and which
processors to set. What all models share is in `settling.py`, `surgery.py`, `transformer.py` and
`processors.py`.
"""

from collections.abc import Sequence
from typing import Any, ClassVar

from torch import nn


class Family:
    """One kind of diffusers transformer."""

    base_class: ClassVar[type]
    """The diffusers class that is converted."""
    rank: ClassVar[int]
    """Number of axes of the token grid."""
    layers: ClassVar[tuple[str, ...]]
    """Paths of the self-attention layers, in order; `*` stands for a block's index."""
    bystander_layers: ClassVar[tuple[str, ...]] = ()
    """Paths of layers that are never converted but receive the grid."""
    native: ClassVar[tuple[int, ...] | None] = None
    """The grid for which `layout="auto"` is resolved, if it is the same for every model."""
    stock_processor: ClassVar[type]
    """Processor class of an unconverted layer."""
    mhla_processor: ClassVar[type]
    """Processor class of an MHLA layer; stateless."""
    unconverted_processor: ClassVar[type]
    """Processor class of a layer that stays softmax inside a converted model."""
    replaced_modules: ClassVar[dict[str, tuple[type, type]]] = {}
    """Path of a module outside the layers → its stock class and its class in a converted model,
    which must have the same state; a final `*` stands for every block."""
    variants: ClassVar[tuple[type, ...]] = ()
    """Other softmax classes with the same weights, which are converted like `base_class`."""
    frame_causal: ClassVar[bool] = False
    """Whether layers can be causal over frames, the first axis of the grid."""
    shares_sequences: ClassVar[bool] = False
    """Whether MHLA layers support diffusers' context parallelism."""
    text_length: ClassVar[int]
    """The pipeline's default number of text tokens, where layers also read text."""
    stock_kind: ClassVar[str] = "softmax"
    """The attention of an unconverted layer: softmax, or linear in families built that way."""

    def attentions(self, model: Any) -> list[tuple[str, Any]]:
        """Name and module of every self-attention layer, in order."""
        return _modules(model, self.layers)

    def bystanders(self, model: Any) -> list[tuple[str, Any]]:
        """Name and module of the layers that get `unconverted_processor`."""
        return _modules(model, self.bystander_layers)

    def reads_text(self, attention: Any) -> bool:
        """Whether a layer reads text tokens besides those of its grid."""
        return False

    def processors(self, attention: Any) -> tuple[type, type, type]:
        """A layer's stock processor, MHLA processor and unconverted processor classes."""
        return self.stock_processor, self.mhla_processor, self.unconverted_processor

    def replaced(self, model: Any) -> list[tuple[Any, type, type]]:
        """Modules outside the layers whose class changes, with their stock and converted class."""
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
        """The arguments of the model's own `forward`, from a caller's keyword arguments.

        Families override this to pass the grid to their layers.
        """
        return given

    def output_projection(self, attention: Any) -> nn.Module:
        """The layer's last linear map, which is never fused, unlike the input projections."""
        return attention.to_out[0]

    def settings(self, model: Any) -> dict[str, Any]:
        """Settings to save with the MHLA class, besides `mhla` and its base class's arguments."""
        return {}

    def softmax_class(self, model: Any) -> type:
        """The class of `model` without its MHLA layers."""
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
        # A model may have the layer in only some of its blocks.
        if getattr(block, name, None) is not None
    ]


def patch_grid(sizes: Sequence[int], patch_size: int | Sequence[int]) -> tuple[int, ...]:
    """Tokens along each axis of latents of these sizes, with one patch size or one per axis."""
    patches = [patch_size] * len(sizes) if isinstance(patch_size, int) else patch_size
    return tuple(length // patch for length, patch in zip(sizes, patches, strict=True))
