"""Captions to embeddings, as diffusers' Wan and PixArt pipelines make them."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from diffusers.pipelines.wan.pipeline_wan import prompt_clean
from diffusers.utils import is_ftfy_available
from torch import Tensor

from mhla_gen.config import TextEncoderConfig
from mhla_gen.errors import UserError
from mhla_gen.files.digests import settings_digest, tensors_digest
from mhla_gen.files.saved import naming_damage
from mhla_gen.hub import locate, pipeline_index

ENCODERS = {"t5": "T5EncoderModel", "umt5": "UMT5EncoderModel"}

# What Wan was trained with.
_LENGTH = 512


class TextEncoder(NamedTuple):
    """A T5 or UMT5 encoder with its tokenizer."""

    model: Any
    tokenizer: Any
    max_sequence_length: int

    @torch.inference_mode()
    def embed(self, captions: Sequence[str]) -> list[dict[str, Tensor]]:
        """`prompt_embeds` without padding, `[tokens, text_dim]`, of each caption, on the CPU.

        Source:
            diffusers 0.42, `WanPipeline._get_t5_prompt_embeds`; a model gets them padded with
            zeros to `max_sequence_length`.
        """
        tokens = self.tokenizer(
            [prompt_clean(caption) for caption in captions],
            padding="max_length",
            max_length=self.max_sequence_length,
            truncation=True,
            return_tensors="pt",
        )
        mask = tokens.attention_mask.to(self.model.device)
        hidden = self.model(tokens.input_ids.to(self.model.device), mask).last_hidden_state
        lengths = tokens.attention_mask.sum(1).tolist()
        rows = zip(hidden, lengths, strict=True)
        return [{"prompt_embeds": states[:n].cpu()} for states, n in rows]

    def to(self, device: torch.device | str) -> None:
        """Move the encoder."""
        self.model.to(device)


def load_text_encoder(config: TextEncoderConfig) -> TextEncoder:
    """The encoder and tokenizer of a pipeline.

    Raises:
        FileNotFoundError: If there is nothing.
        ValueError: If it is no pipeline, or its encoder is of another kind.
    """
    import transformers

    path = locate(str(config.path))
    if not pipeline_index(path):
        raise UserError(
            f"text.path {path} must be a pipeline with the folders text_encoder and tokenizer"
        )
    try:
        settings = transformers.AutoConfig.from_pretrained(path, subfolder="text_encoder")
        tokenizer = transformers.AutoTokenizer.from_pretrained(path, subfolder="tokenizer")
    except (OSError, ValueError) as error:
        line = str(error).splitlines()[0]
        raise UserError(f"text.path {path} has no text_encoder and tokenizer: {line}") from error
    if settings.model_type not in ENCODERS:
        raise UserError(
            f"text.path {path} has a text encoder of type {settings.model_type}; "
            f"supported are {', '.join(ENCODERS)}"
        )
    kind = getattr(transformers, ENCODERS[settings.model_type])
    dtype = getattr(torch, config.dtype)
    with naming_damage(path):
        model = kind.from_pretrained(path, subfolder="text_encoder", dtype=dtype)
    length = config.max_sequence_length or _LENGTH
    return TextEncoder(model.eval().requires_grad_(False), tokenizer, length)


def identity(encoder: TextEncoder, config: TextEncoderConfig) -> dict[str, Any]:
    """What determines the embedding of a caption; plain values for a fingerprint."""
    vocabulary = encoder.tokenizer.get_vocab()
    return {
        "class": type(encoder.model).__name__,
        "weights": tensors_digest(encoder.model.state_dict())[:32],
        "tokenizer": settings_digest(vocabulary)[:32],
        # prompt_clean mends broken characters where this package is installed.
        "ftfy": is_ftfy_available(),
        "max_sequence_length": encoder.max_sequence_length,
        "dtype": config.dtype,
    }
