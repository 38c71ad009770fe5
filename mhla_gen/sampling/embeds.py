"""Text embeddings from a file, in place of prompts."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from mhla_gen.calls import call_class_of_pipeline
from mhla_gen.errors import MissingError, UserError

NEGATIVE = "negative_"


def embedded_names(pipeline: Any, guided: bool) -> dict[str, int]:
    """Tensors that a pipeline takes in place of prompts, and how many axes each has."""
    kind = call_class_of_pipeline(type(pipeline).__name__)
    if kind is None:
        rows = {"prompt_embeds": 3}
        return rows | ({f"{NEGATIVE}prompt_embeds": 3} if guided else {})
    call, config = kind(pipeline), pipeline.transformer.config
    texts = [row for row in kind.embedded(config).values() if row.name != "image_embeds"]
    rows = {row.name: 1 + (row.tokens is not None) + (row.channels is not None) for row in texts}
    # A pipeline with a scale of its own for that does not follow guidance_scale by it.
    if not guided or call.takes("true_cfg_scale"):
        return rows
    negative = {f"{NEGATIVE}{name}": axes for name, axes in rows.items()}
    first = next(iter(negative))
    return rows | (negative if call.takes(first) else {})


def read_embeds(path: str, num_prompts: int | None, names: Mapping[str, int]) -> dict[str, Tensor]:
    """Text embeddings from a safetensors file.

    Args:
        path: The file.
        num_prompts: How many prompts there are; None takes those of the file.
        names: As `embedded_names`.

    Raises:
        FileNotFoundError: If it is missing.
        ValueError: If it holds other tensors, or embeddings of another number of prompts.
    """
    if not Path(path).is_file():
        raise MissingError(f"prompt_embeds={path} is not a file")
    try:
        tensors = load_file(path)
    except SafetensorError as error:
        raise UserError(
            f"prompt_embeds={path} is not a complete safetensors file: {error}"
        ) from error
    num_prompts = num_prompts or len(tensors.get(next(iter(names)), ()))
    for key, axes in names.items():
        found = tensors.get(key, torch.empty(0))
        allowed = (1, num_prompts) if key.startswith(NEGATIVE) else (num_prompts,)
        if found.ndim != axes or len(found) not in allowed:
            sizes = {1: "", 2: ", channels", 3: ", tokens, text_dim"}[axes]
            raise UserError(
                f"{path}: {key} must be [{' or '.join(map(str, allowed))}{sizes}], "
                f"found {list(found.shape) if found.numel() else 'none'}"
            )
    return {key: tensors[key] for key in names}
