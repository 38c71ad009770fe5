"""MHLA for the vision classifiers of timm: ViT and DeiT, with a class token or average pooling.

Class token, registers and distillation token are prefix tokens: a few tokens off the patch grid.
Prefix queries attend to all tokens by softmax. Patches attend to the prefix tokens exactly, as keys
off the grid, and to the grid by MHLA; one weight combines the two. So all queries read all keys, at
a cost linear in the number of patches. Without prefix tokens there is only MHLA.
"""

from pathlib import Path
from typing import Any, ClassVar

import torch
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
from mhla_gen.models.saved_class import check_saved_class
from mhla_gen.models.settling import settle
from mhla_gen.models.surgery import change_class, new_modules, placed_beside
from mhla_gen.models.vision_layers import (
    MHLAVisionAttention,
    SoftmaxVisionAttention,
    VisionFamily,
)

CONFIG_NAME, WEIGHTS_NAME = "config.json", "model.safetensors"
# The arguments of `create` in a config.
BUILT_FROM = ("architecture", "model_args", "mhla", "pretrained_cfg")


class MHLAVisionMixin(nn.Module):
    """What `MHLAVisionTransformer` adds to timm's class: passing the grid, saving, loading."""

    # Defined by timm's classes, which follow this mixin in the bases.
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
        """As timm's, but without gradient checkpointing."""
        grid = self._grid(x, attn_mask, kwargs.pop("is_causal", False))
        return super().forward_intermediates(x, *args, attn_mask=grid, **kwargs)  # type: ignore[misc]

    def _grid(self, images: Tensor, attn_mask: Tensor | None, is_causal: bool) -> Tensor:
        if attn_mask is not None or is_causal:
            raise UserError("MHLA layers take no attention mask and are not causal")
        return images.new_empty((*self.patch_embed.dynamic_feat_size(images.shape[-2:]), 0))

    def no_weight_decay(self) -> set[str]:
        """Names of timm and of the mixing matrices, which weight decay would pull to zero."""
        mixing = {n for n, _ in self.named_parameters() if n.endswith(".mhla.mixing")}
        return set(super().no_weight_decay()) | mixing  # type: ignore[misc]

    def save_pretrained(self, folder: str | Path) -> None:
        """Write weights, timm's description of the model and the settings of MHLA.

        Args:
            folder: Where to write `model.safetensors` and `config.json`; existing files are
                replaced.

        Raises:
            ValueError: If the model does not come from `timm.create_model`, which records the
                model's arguments, or has other weights than a model with these arguments.
            OSError: If the files cannot be written.
        """
        folder = Path(expand_home("folder", str(folder)))
        source: dict[str, Any] = getattr(self, "pretrained_cfg", {})
        if "architecture" not in source:
            raise UserError(
                "build the model with timm.create_model, which keeps what it is built with, so "
                "that it can be saved; or save its state_dict yourself"
            )
        described = {
            "_class_name": type(self).__name__,
            "architecture": source["architecture"],
            "model_args": get_model_args(self),
            "pretrained_cfg": filter_pretrained_cfg(source, remove_source=True, remove_null=True),
            "mhla": self.mhla_config.to_dict(),
        }
        self._check_rebuilt(described)
        write_tensors(folder / WEIGHTS_NAME, self.state_dict())
        write_json(folder / CONFIG_NAME, described)

    def _check_rebuilt(self, described: dict[str, Any]) -> None:
        """Raise unless a model that is built from its description takes the weights of this one."""
        with torch.device("meta"):
            rebuilt = type(self).create(**{name: described[name] for name in BUILT_FROM})
        shapes = [
            {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
            for model in (self, rebuilt)
        ]
        for name in sorted(shapes[0].keys() | shapes[1].keys()):
            here, there = (found.get(name, "nothing") for found in shapes)
            if here != there:
                raise UserError(
                    f"{name} is {here}, but {there} in a {described['architecture']} that is built "
                    "again, so what is saved could not be loaded; change a head with "
                    "reset_classifier, merge adapters, or save the state_dict yourself"
                )

    @classmethod
    def create(
        cls,
        architecture: str,
        model_args: dict[str, Any],
        mhla: dict[str, Any],
        pretrained_cfg: dict[str, Any] | None = None,
    ) -> Any:
        """Create a model with new weights.

        Args:
            architecture: Name of the architecture in timm.
            model_args: Further arguments of `timm.create_model`.
            mhla: Values of an `MHLAConfig` or `LinformerConfig`.
            pretrained_cfg: timm's settings for preparing images; the architecture's if None.

        Raises:
            ValueError: If the architecture belongs to another class, or settings do not fit.
        """
        model = timm.create_model(architecture, pretrained_cfg=pretrained_cfg, **model_args)
        inject_vision(model, attention_from_dict(mhla))
        if not isinstance(model, cls):
            raise UserError(
                f"{architecture} is a {type(model).__name__}, not a {cls.__name__}; load it with "
                f"mhla_gen.{type(model).__name__}"
            )
        return model

    @classmethod
    def from_pretrained(cls, folder: str | Path, torch_dtype: torch.dtype | None = None) -> Any:
        """Load a model that `save_pretrained` wrote, in evaluation mode.

        Args:
            folder: Folder of the model.
            torch_dtype: Dtype of the weights; float32 if None. Mixing is always float32.

        Raises:
            FileNotFoundError: If there is no model.
            ValueError: If it has no MHLA settings, belongs to another class, or its weights do not
                fit the settings.
        """
        folder = Path(expand_home("folder", str(folder)))
        if not (folder / CONFIG_NAME).is_file():
            raise MissingError(f"{folder} has no model, because there is no {CONFIG_NAME}")
        described = read_json(folder / CONFIG_NAME, "save the model again")
        check_saved_class(cls, folder, described)
        if "mhla" not in described or "model_args" not in described:
            raise UserError(
                f"{folder} holds no MHLA settings; load it with timm.create_model("
                f"'local-dir:{folder}', pretrained=True) and convert it with mhla_gen.inject"
            )
        model = cls.create(**{name: described[name] for name in BUILT_FROM})
        with naming_damage(folder):
            model.load_state_dict(load_file(folder / WEIGHTS_NAME))
        if torch_dtype is not None:
            for name, parameter in model.named_parameters():
                if not name.endswith(".mhla.mixing"):
                    parameter.data = parameter.data.to(torch_dtype)
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


def vision_family(model: Any) -> VisionFamily:
    """The family of a model.

    Raises:
        ValueError: If the model cannot be converted.
    """
    if not isinstance(model, MHLAVisionMixin) and type(model) not in VISION_CLASSES:
        names = " and ".join(c.__name__ for c in VISION_CLASSES)
        inner = getattr(model, "model", None)
        hint = "; convert its .model" if type(inner) in VISION_CLASSES else ""
        raise UserError(
            f"of timm's models {names} (ViT and DeiT) can be converted, found a "
            f"{type(model).__name__}{hint}"
        )
    return VisionFamily(model.num_prefix_tokens)


def inject_vision(model: Any, config: AttentionConfig) -> Any:
    """Convert in place; see `mhla_gen.inject`."""
    family = vision_family(model)
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
    for _, attention in vision_family(model).attentions(model):
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
    """Why attention dropout prevents a model's conversion, or None if it does not."""
    for name in added:
        if rate := model.get_submodule(name).attn_drop.p:
            return (
                f"{name} drops {rate:g} of its attention weights in training, which MHLA does not "
                "have; set attn_drop_rate to 0"
            )
    return None
