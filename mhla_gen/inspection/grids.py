"""The token grid that a model is inspected on, and the tokens of it that are looked at.

The grid is the one asked for, that of the model's run, or the model's own.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
from accelerate import init_empty_weights
from diffusers.models.transformers.dit_transformer_2d import DiTTransformer2DModel
from torch import Tensor

from mhla_gen.calls import call_class
from mhla_gen.config import InputsConfig, InspectConfig
from mhla_gen.errors import UserError
from mhla_gen.hub import pipeline_index
from mhla_gen.inspection.subject import Subject
from mhla_gen.models.family import patch_grid
from mhla_gen.sampling.own_settings import settings_of_run


@dataclass(frozen=True)
class TokenGrid:
    """Tokens along each axis, and where these numbers come from."""

    axes: tuple[int, ...]
    origin: str

    def __str__(self) -> str:
        return f"{' × '.join(map(str, self.axes))} = {math.prod(self.axes)}, {self.origin}"


def token_grid(subject: Subject, config: InputsConfig) -> TokenGrid:
    """The grid that the model is inspected on.

    Raises:
        ValueError: If the grid asked for does not fit the model.
    """
    native = subject.family.native_grid(subject.model)
    if config.grid is None:
        return _of_run(subject) or TokenGrid(native, "the model's own size")
    if len(config.grid) != len(native):
        raise UserError(
            f"grid needs {len(native)} entries for a {type(subject.model).__name__}, "
            f"found {list(config.grid)}"
        )
    if isinstance(subject.model, DiTTransformer2DModel) and len(set(config.grid)) > 1:
        raise UserError(f"DiT's token grid is square, found grid={list(config.grid)}")
    return TokenGrid(config.grid, "as grid asks")


def _of_run(subject: Subject) -> TokenGrid | None:
    """That of a run's samples; None if no run saved the model, or it saved no size."""
    # A DiT has one size, and its pipeline takes no other.
    if isinstance(subject.model, DiTTransformer2DModel):
        return None
    saved = settings_of_run(Path(subject.place)) if Path(subject.place).is_dir() else {}
    kind = call_class(subject.model)
    names = ("num_frames", "height", "width")[-kind.rank :]
    if not saved.keys() >= set(names):
        return None
    sizes = tuple(saved[name] for name in names)
    call = kind(kind.assemble(subject.model, **_autoencoder(subject.place)))
    axes = patch_grid(call.latent_sizes(sizes), call.patch(subject.model.config))
    pixels = " × ".join(map(str, sizes[-2:]))
    clip = f"{sizes[0]} frames of " if kind.rank == 3 else ""
    return TokenGrid(axes, f"the size of its run, {clip}{pixels} pixels")


def _autoencoder(place: str) -> Mapping[str, Any]:
    """A pipeline's autoencoder without weights: pipelines read their compression from it."""
    _, name = pipeline_index(place).get("vae") or (None, None)
    if name is None:
        return {}
    kind = getattr(diffusers, name)
    with init_empty_weights():
        return {"vae": kind.from_config(kind.load_config(place, subfolder="vae"))}


def query_tokens(config: InspectConfig, grid: tuple[int, ...]) -> list[tuple[int, ...]]:
    """Positions of the tokens whose maps are drawn; by default a corner, two quarters, the middle.

    Raises:
        ValueError: If a position is not on the grid.
    """
    if config.queries == "auto":
        # The frame, if there is one, is the middle one throughout: frames are compared beside it.
        places = [(0.0, 0.0), (0.25, 0.25), (0.5, 0.5), (0.75, 0.25)]
        tokens = [
            tuple(int(n * p) for n, p in zip(grid[-2:], place, strict=False)) for place in places
        ]
        return list(dict.fromkeys((*(n // 2 for n in grid[:-2]), *token) for token in tokens))
    for position in config.queries:
        if len(position) != len(grid) or any(p >= n for p, n in zip(position, grid, strict=True)):
            raise UserError(f"queries must lie on the token grid {grid}, found {list(position)}")
    return list(config.queries)


def statistics_rows(config: InspectConfig, grid: tuple[int, ...]) -> Tensor:
    """Queries for rank and entropy, int64, sorted: all of them, or `max_rows` at random."""
    seq_len = math.prod(grid)
    if seq_len <= config.max_rows:
        return torch.arange(seq_len)
    generator = torch.Generator().manual_seed(config.seed)
    return torch.randperm(seq_len, generator=generator)[: config.max_rows].sort().values
