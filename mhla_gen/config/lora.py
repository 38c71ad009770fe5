"""Settings of low-rank updates."""

from dataclasses import dataclass

from mhla_gen.config.fields import Count, Positive, Settings


@dataclass(frozen=True, kw_only=True)
class LoraSettings(Settings):
    """What model.trainable=lora updates beside MHLA."""

    lora_rank: Count = 32
    """model.trainable=lora: rank of the updates."""
    lora_alpha: Positive | None = None
    """model.trainable=lora: the updates are scaled by alpha / rank; None takes the rank."""
    lora_targets: tuple[str, ...] = ("to_q", "to_k", "to_v", "to_out.0", "net.0.proj", "net.2")
    """model.trainable=lora: which linear layers are updated, by the ends of their names."""
