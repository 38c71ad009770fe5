"""MHLA for the vision classifiers of timm: ViT and DeiT, with a class token or average pooling.

Class token, registers and distillation token are prefix tokens: they lie off the grid of patches
and are few. A prefix query reads all tokens by softmax; a patch reads the prefix tokens exactly, as
keys off its grid, beside MHLA over the grid, under one weight. So both kinds of queries read all
keys, at a cost that stays linear in patches. Without prefix tokens MHLA is all there is.
"""

import math
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

try:
    import timm
    from timm.layers import Attention, PatchDropout
    from timm.models import checkpoint, filter_pretrained_cfg, get_model_args
    from timm.models.deit import VisionTransformerDistilled
    from timm.models.vision_transformer import VisionTransformer
except ImportError as error:
    raise ImportError(
        "vision classifiers need timm 1.0.31 or newer: pip install 'mhla_gen[vision]'"
    ) from error

from mhla_gen.config import AttentionConfig, attention_from_dict
from mhla_gen.config.fields import expand_home
from mhla_gen.errors import MissingError, UserError
from mhla_gen.files import write_json, write_tensors
from mhla_gen.files.saved import naming_damage, read_json
from mhla_gen.models.additions import AddedAttention
from mhla_gen.models.family import Family
from mhla_gen.models.surgery import change_class, new_modules, placed_beside, settle

CONFIG_NAME, WEIGHTS_NAME = "config.json", "model.safetensors"


class VisionFamily(Family):
    """timm's ViTs: grids of patches, maybe behind prefix tokens.

    Args:
        num_prefix: Prefix tokens of the model.
    """

    base_class = VisionTransformer
    rank = 2
    layers = ("blocks.*.attn",)

    def __init__(self, num_prefix: int):
        # What `Family` calls text are keys off the grid, whatever they stand for.
        self.text_length = num_prefix  # type: ignore[misc]

    def reads_text(self, attention: Any) -> bool:
        """Whether there are prefix tokens."""
        return self.text_length > 0

    def sizes(self, model: Any) -> tuple[int, int, int]:
        """Heads, channels of a head, channels of the layer's input."""
        attention = model.blocks[0].attn
        return attention.num_heads, attention.head_dim, attention.qkv.in_features

    def native_grid(self, model: Any) -> tuple[int, ...]:
        """Patches along both sides at the size that the model was built for or set to."""
        return tuple(model.patch_embed.grid_size)

    def output_projection(self, attention: Any) -> nn.Module:
        """The layer's last linear map."""
        return attention.proj


class MHLAVisionAttention(Attention):
    """timm's attention with MHLA over the grid of patches; its weights and dropout stay."""

    mhla: AddedAttention

    def forward(
        self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        """Project, attend, project; `[batch, prefix + patches, hidden_size]` in and out.

        Args:
            x: Tokens, the prefix first, patches in raster order.
            attn_mask: The grid, as the shape `(height, width, 0)` of an empty tensor.
            is_causal: False.

        Raises:
            ValueError: If the grid is missing, or a real mask is given.
        """
        grid = _grid_of(attn_mask, is_causal)
        query, key, value = self.qkv(x).unflatten(2, (3, self.num_heads, -1)).unbind(2)
        # Autocast may leave float32 behind a norm.
        query, key = self.q_norm(query).type_as(value), self.k_norm(key).type_as(value)
        first = x.shape[1] - math.prod(grid)
        if first == 0:
            out = self.mhla(query, key, value, x, grid)
        else:
            patches = [tokens[:, first:] for tokens in (query, key, value, x)]
            out = self.mhla(*patches, grid, extra=(key[:, :first], value[:, :first]))
            by_head = (tokens.transpose(1, 2) for tokens in (query[:, :first], key, value))
            prefix = F.scaled_dot_product_attention(*by_head).transpose(1, 2).flatten(2)
            out = torch.cat((prefix, out), dim=1)
        out = self.norm(out)
        if self.gate is not None:
            out = out * self.gate(x).sigmoid()
        return self.proj_drop(self.proj(out))


class SoftmaxVisionAttention(Attention):
    """timm's attention for layers that stay softmax but are handed the grid, too."""

    def forward(
        self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        """As timm's, over all tokens."""
        _grid_of(attn_mask, is_causal)
        return super().forward(x)


def _grid_of(carrier: Tensor | None, is_causal: bool) -> tuple[int, int]:
    if carrier is None or carrier.ndim != 3 or carrier.shape[-1] != 0 or is_causal:
        raise UserError(
            "MHLA layers take the token grid in place of an attention mask; call the model, its "
            "forward_features or its forward_intermediates, without mask and is_causal"
        )
    height, width, _ = carrier.shape
    return height, width


class MHLAVisionMixin(nn.Module):
    """What `MHLAVisionTransformer` adds to timm's class: the grid on its way, saving, loading."""

    # Of timm's classes, which this stands before.
    patch_embed: Any
    blocks: Any
    _pos_embed: Any
    grad_checkpointing: bool
    num_prefix_tokens: int

    softmax_class: ClassVar[type]
    mhla_config: AttentionConfig
    """The settings this model was converted with."""

    def forward_features(
        self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        """Images `[batch, channels, height, width]` to tokens after the last norm, as timm's."""
        grid = self._grid(x, attn_mask, is_causal)
        tokens = self.norm_pre(self._pos_embed(self.patch_embed(x)))  # type: ignore[operator]
        for block in self.blocks:
            if self.grad_checkpointing and torch.is_grad_enabled():
                tokens = checkpoint(block, tokens, grid)
            else:
                tokens = block(tokens, grid)
        return self.norm(tokens)  # type: ignore[operator]

    def forward_intermediates(
        self, x: Tensor, *args: Any, attn_mask: Tensor | None = None, **kwargs: Any
    ) -> Any:
        """As timm's; blocks are not recomputed in backward."""
        grid = self._grid(x, attn_mask, kwargs.pop("is_causal", False))
        return super().forward_intermediates(x, *args, attn_mask=grid, **kwargs)  # type: ignore[misc]

    def _grid(self, images: Tensor, attn_mask: Tensor | None, is_causal: bool) -> Tensor:
        if attn_mask is not None or is_causal:
            raise UserError("MHLA layers take no attention mask and are not causal")
        return images.new_empty((*self.patch_embed.dynamic_feat_size(images.shape[-2:]), 0))

    def no_weight_decay(self) -> set[str]:
        """Names of timm and those of mixing matrices, which decay would pull to zero."""
        mixing = {n for n, _ in self.named_parameters() if n.endswith(".mhla.mixing")}
        return set(super().no_weight_decay()) | mixing  # type: ignore[misc]

    def save_pretrained(self, folder: str | Path) -> None:
        """Write weights, timm's description of the model and the settings of MHLA.

        Args:
            folder: Gets `model.safetensors` and `config.json`; those that are there are replaced.

        Raises:
            ValueError: If the model does not come from `timm.create_model`, which keeps what it is
                built with.
            OSError: If it cannot be written.
        """
        folder = Path(expand_home("folder", str(folder)))
        source: dict[str, Any] = getattr(self, "pretrained_cfg", {})
        if "architecture" not in source:
            raise UserError(
                "build the model with timm.create_model, which keeps what it is built with, so "
                "that it can be saved; or save its state_dict yourself"
            )
        described = {
            "architecture": source["architecture"],
            "model_args": get_model_args(self),
            "pretrained_cfg": filter_pretrained_cfg(source, remove_source=True, remove_null=True),
            "mhla": self.mhla_config.to_dict(),
        }
        write_tensors(folder / WEIGHTS_NAME, self.state_dict())
        write_json(folder / CONFIG_NAME, described)

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> Any:
        """A model that `save_pretrained` wrote, in evaluation mode.

        Raises:
            FileNotFoundError: If there is none.
            ValueError: If it has no settings of MHLA, is of another class, or its weights do not
                belong to them.
        """
        folder = Path(expand_home("folder", str(folder)))
        if not (folder / CONFIG_NAME).is_file():
            raise MissingError(f"{folder} holds no model: it has no {CONFIG_NAME}")
        described = read_json(folder / CONFIG_NAME, "save the model again")
        if "mhla" not in described:
            raise UserError(
                f"{folder} holds no MHLA settings; load it with timm.create_model("
                f"'local-dir:{folder}', pretrained=True) and convert it with mhla_gen.inject"
            )
        model = timm.create_model(
            described["architecture"],
            pretrained_cfg=described["pretrained_cfg"],
            **described["model_args"],
        )
        inject_vision(model, attention_from_dict(described["mhla"]))
        if not isinstance(model, cls):
            raise UserError(f"{folder} holds a {type(model).__name__}, not a {cls.__name__}")
        with naming_damage(folder):
            model.load_state_dict(load_file(folder / WEIGHTS_NAME))
        return model.eval()


class MHLAVisionTransformer(MHLAVisionMixin, VisionTransformer):
    """timm's `VisionTransformer` with MHLA layers, made by `mhla_gen.inject`."""

    softmax_class = VisionTransformer


class MHLAVisionTransformerDistilled(MHLAVisionMixin, VisionTransformerDistilled):
    """timm's `VisionTransformerDistilled` with MHLA layers, made by `mhla_gen.inject`."""

    softmax_class = VisionTransformerDistilled


# Base class → the class it becomes.
VISION_CLASSES: dict[type, type] = {
    mhla_class.softmax_class: mhla_class
    for mhla_class in (MHLAVisionTransformer, MHLAVisionTransformerDistilled)
}


def family_of(model: Any) -> VisionFamily:
    """What the toolkit knows of a model.

    Raises:
        ValueError: If it is no model that can be converted.
    """
    if not isinstance(model, MHLAVisionMixin) and type(model) not in VISION_CLASSES:
        names = " and ".join(c.__name__ for c in VISION_CLASSES)
        raise UserError(
            f"of timm's models {names} (ViT and DeiT) can be converted, found a "
            f"{type(model).__name__}"
        )
    return VisionFamily(model.num_prefix_tokens)


def inject_vision(model: Any, config: AttentionConfig) -> Any:
    """Convert in place; see `mhla_gen.inject`."""
    family = family_of(model)
    if isinstance(model, MHLAVisionMixin):
        raise UserError("the model already has MHLA layers; call mhla_gen.restore on it first")
    _check_layers(family, model)
    config = settle(family, model, config)
    added = new_modules(family, model, config)
    if dropped := _dropout(model, added):
        raise UserError(dropped)
    for name, attention in family.attentions(model):
        if name in added:
            child = added[name].train(attention.training)
            attention.mhla = placed_beside(family.output_projection(attention), child)
        change_class(attention, MHLAVisionAttention if name in added else SoftmaxVisionAttention)
    change_class(model, VISION_CLASSES[type(model)])
    model.mhla_config = config
    return model


def restore_vision(model: Any) -> Any:
    """Undo `inject_vision`; see `mhla_gen.restore`."""
    if not isinstance(model, MHLAVisionMixin):
        raise UserError("the model has no MHLA layers to restore")
    for _, attention in family_of(model).attentions(model):
        if hasattr(attention, "mhla"):
            del attention.mhla
        change_class(attention, Attention)
    del model.mhla_config
    change_class(model, model.softmax_class)
    return model


def _check_layers(family: VisionFamily, model: Any) -> None:
    attentions = family.attentions(model)
    if len(attentions) != len(model.blocks):
        kind = type(model.blocks[0]).__name__
        raise UserError(f"blocks of the kind {kind} have no single attention layer to convert")
    for name, attention in attentions:
        if type(attention) is not Attention:
            raise UserError(
                f"{name} is a {type(attention).__name__}; only timm's Attention can be converted"
            )
    if isinstance(model.patch_drop, PatchDropout):
        raise UserError(
            "patch_drop_rate drops patches in training, and the others fill no grid; set it to 0"
        )


def _dropout(model: Any, added: dict[str, AddedAttention]) -> str | None:
    """Why dropout of attention weights keeps a model from being converted, or None."""
    for name in added:
        if rate := model.get_submodule(name).attn_drop.p:
            return (
                f"{name} drops {rate:g} of its attention weights in training, which MHLA does not "
                "have; set attn_drop_rate to 0"
            )
    return None
