"""Captions to embeddings by the text encoders of any family's pipeline."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import diffusers
import torch
from torch import Tensor, nn

from mhla_gen.calls import Call, call_class_of_pipeline
from mhla_gen.config import TextEncoderConfig
from mhla_gen.errors import UserError
from mhla_gen.files.digests import settings_digest, tensors_digest
from mhla_gen.files.saved import naming_damage
from mhla_gen.hub import locate, pipeline_index

_TEXT_PARTS = ("text_encoder", "tokenizer", "connectors", "processor")


class CaptionEncoder(NamedTuple):
    """The text encoders of a pipeline, called as it calls them."""

    call: Call
    max_sequence_length: int | None

    @torch.inference_mode()
    def embed(self, captions: Sequence[str]) -> list[dict[str, Tensor]]:
        """The tensors of each caption by the names of its family's `Call`, on the CPU."""
        if len(captions) > 1 and not self.call.batches:
            return [row for caption in captions for row in self.embed([caption])]
        found = self.call.embed(captions, self.max_sequence_length)
        rows = [
            {name: value[i].cpu() for name, value in found.items()} for i in range(len(captions))
        ]
        return [self.call.cut(row) for row in rows]

    def to(self, device: torch.device | str) -> None:
        """Move the encoders."""
        for part in text_parts(self.call.pipe).values():
            if isinstance(part, nn.Module):
                part.to(device)


def has_call(path: str | None) -> bool:
    """Whether a path is a pipeline whose own encoders are called; Wan's have a shorter way."""
    if path is None:
        return False
    kind = call_class_of_pipeline(pipeline_index(path).get("_class_name"))
    return kind is not None and not kind.pipeline.startswith(("Wan", "SkyReels"))


def load_caption_encoder(config: TextEncoderConfig) -> CaptionEncoder:
    """The text encoders of a pipeline for which `has_call` says so.

    Raises:
        FileNotFoundError: If there is nothing.
        ValueError: If it has no text encoder.
    """
    path = locate(str(config.path))
    kind = call_class_of_pipeline(pipeline_index(path)["_class_name"])
    assert kind is not None
    pipe = _without_transformer(path, getattr(torch, config.dtype))
    if getattr(pipe, "text_encoder", None) is None:
        raise UserError(f"text.path {path} has no text_encoder and tokenizer")
    for part in text_parts(pipe).values():
        if isinstance(part, nn.Module):
            part.eval().requires_grad_(False)
    return CaptionEncoder(kind(pipe), config.max_sequence_length)


def load_text_parts(path: str) -> dict[str, Any]:
    """Text encoders and tokenizers of a pipeline by name, float32."""
    return text_parts(_without_transformer(locate(path), torch.float32))


def text_parts(pipe: Any) -> dict[str, Any]:
    """The parts of a pipeline that captions go through."""
    parts = pipe.components.items()
    return {name: part for name, part in parts if name.startswith(_TEXT_PARTS) and part is not None}


def identity(encoder: CaptionEncoder, config: TextEncoderConfig) -> dict[str, Any]:
    """What determines the embedding of a caption; plain values for a fingerprint."""
    parts = text_parts(encoder.call.pipe)
    models = {name: part for name, part in parts.items() if isinstance(part, nn.Module)}
    tokenizers = {name: part for name, part in parts.items() if hasattr(part, "get_vocab")}
    return {
        "pipeline": encoder.call.pipeline,
        "weights": {n: tensors_digest(m.state_dict())[:32] for n, m in models.items()},
        "tokenizers": {n: settings_digest(t.get_vocab())[:32] for n, t in tokenizers.items()},
        "max_sequence_length": encoder.max_sequence_length,
        "dtype": config.dtype,
    }


def _without_transformer(path: str, dtype: torch.dtype) -> Any:
    index = pipeline_index(path)
    absent = {key: None for key, value in index.items() if value == [None, None]}
    absent |= {key: None for key in index if key.startswith("transformer")}
    if "safety_checker" in index:
        absent["safety_checker"] = None
    kind = getattr(diffusers, index["_class_name"])
    with naming_damage(path):
        return kind.from_pretrained(path, torch_dtype=dtype, **absent)
