"""Settings of the model that is trained."""

from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from mhla_gen.config.checks import check_choice
from mhla_gen.config.fields import Count, Depth, FilePath, Positive, Settings
from mhla_gen.config.linformer import LinformerConfig
from mhla_gen.config.mhla import MHLAConfig
from mhla_gen.errors import UserError


class DiTSizes(NamedTuple):
    """Sizes of a DiT; the hidden size is heads × channels of a head."""

    patch_size: int
    num_layers: int
    num_attention_heads: int
    attention_head_dim: int


# Peebles and Xie 2023, arXiv:2212.09748, Table 1.
PRESETS: dict[str, DiTSizes] = {
    f"DiT-{name}/{patch_size}": DiTSizes(patch_size, num_layers, heads, head_dim)
    for name, num_layers, heads, head_dim in (
        ("S", 12, 6, 64),
        ("B", 12, 12, 64),
        ("L", 24, 16, 64),
        ("XL", 28, 16, 72),
    )
    for patch_size in (2, 4, 8)
}


@dataclass(frozen=True, kw_only=True)
class ModelConfig(Settings, prefix="model."):
    """A diffusion transformer and its kind of self-attention.

    Raises:
        ValueError: If a value is out of its range.
    """

    attention: Literal["softmax", "gated_softmax", "linear", "mhla", "linformer"] = "mhla"
    """Kind of attention. linear (MHLA with one block) and gated_softmax are controls with the same
    convolution and gate as mhla."""
    mhla: MHLAConfig = field(default_factory=MHLAConfig)
    """Settings of mhla, and of linear and gated_softmax, which override the layout and exact."""
    linformer: LinformerConfig = field(default_factory=LinformerConfig)
    """Settings of linformer."""
    preset: str = "DiT-S/2"
    """Sizes of a new model: DiT-S, DiT-B, DiT-L or DiT-XL, with patches of /2, /4 or /8."""
    patch_size: Count | None = None
    """Side of a token in pixels or latents; None takes the preset's, as for the next three."""
    num_layers: Depth | None = None
    """Transformer blocks."""
    num_attention_heads: Count | None = None
    """Heads per block; the hidden size is heads × attention_head_dim."""
    attention_head_dim: Count | None = None
    """Channels per head."""
    pretrained: FilePath | None = None
    """Start from this model, with its sizes, instead of a new one: a folder written by
    `save_pretrained`, of a transformer or a pipeline, a finished run, or a name on the Hugging Face
    hub. A softmax model gets the kind of attention chosen here."""
    new_classes: bool = False
    """Give a pretrained model new labels for the classes of the data; each starts as the null
    class."""
    trainable: Literal["all", "mhla", "lora"] = "all"
    """mhla trains only what MHLA added to the layers; lora trains that and low-rank updates of the
    linear layers (Wan only; see wan.lora_rank)."""

    def __post_init__(self):
        super().__post_init__()
        check_choice("model.preset", self.preset, tuple(PRESETS))
        for name in DiTSizes._fields:
            if getattr(self, name) is not None and self.pretrained is not None:
                raise UserError(
                    f"model.{name} cannot be set with model.pretrained, which has its own sizes"
                )
        if self.new_classes and self.pretrained is None:
            raise UserError(
                "model.new_classes needs model.pretrained: a new model has the classes of the "
                "data, and a teacher has to know them before it teaches"
            )
        if self.trainable == "mhla" and self.attention == "softmax":
            raise UserError("model.trainable=mhla trains nothing with model.attention=softmax")
        if self.mhla.causal_frames is not None and self.attention in ("softmax", "linformer"):
            raise UserError(
                f"model.attention={self.attention} reads later frames; with "
                "model.mhla.causal_frames use mhla, with model.mhla.exact=1 for softmax"
            )
        if self.trainable != "all" and self.new_classes:
            raise UserError(
                f"model.new_classes would never be trained with model.trainable={self.trainable}"
            )

    @property
    def sizes(self) -> DiTSizes:
        """Those of the preset, with overrides."""
        preset = PRESETS[self.preset]
        given = {name: getattr(self, name) for name in DiTSizes._fields}
        return preset._replace(**{k: v for k, v in given.items() if v is not None})


@dataclass(frozen=True, kw_only=True)
class LoraSettings(Settings):
    """What model.trainable=lora updates beside MHLA."""

    lora_rank: Count = 32
    """model.trainable=lora: rank of the updates."""
    lora_alpha: Positive | None = None
    """model.trainable=lora: the updates are scaled by alpha / rank; None takes the rank."""
    lora_targets: tuple[str, ...] = ("to_q", "to_k", "to_v", "to_out.0", "net.0.proj", "net.2")
    """model.trainable=lora: which linear layers are updated, by the ends of their names."""
