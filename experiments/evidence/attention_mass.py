"""How much of a softmax model's attention different choices of tiles capture, without training.

    python experiments/evidence/attention_mass.py DATA PIPELINE OUT.json

PIPELINE is a class-conditional pipeline of the comparison with softmax attention, such as
OUT/exact/work/teacher-teacher-s0/pipeline. Measured on held-out images at several noise levels, for
every layer and head: the share of softmax's weights inside the tiles (`mass`), and the squared
distance between the outputs of the tiles alone and of softmax, relative to the squared norm of the
latter (`error`). `rule` is how further tiles are chosen: by the product of the means of group and
tile (`mean`, as in `tile_attention`), by the largest product of the means of any tile of the group
and the tile (`largest`), or by the softmax weights themselves (`weights`, the upper bound).
"""

import argparse
import json
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import Any

import torch
from evidence_data import load_real
from evidence_measure import to_samples
from torch import Tensor

from mhla_gen.files import write_json
from mhla_gen.ops.auto_tiles import auto_tiles
from mhla_gen.ops.partition import block_slots
from mhla_gen.ops.tiles import (
    TileLayout,
    Tiling,
    tile_lists,
    tile_share,
    tiling,
    window_tiles,
)
from mhla_gen.pipelines.class_conditional import ClassConditionalPipeline
from mhla_gen.runtime.devices import device_name, resolve_device

RULES = ("mean", "largest", "weights")


def layouts(grid: tuple[int, int], share: float) -> dict[str, TileLayout]:
    """Layouts of about one share of pairs: tiles, groups and windows of several sizes."""
    found = {"auto": auto_tiles(grid, share)}
    for tile, group in (
        ((4, 4), (1, 1)),
        ((4, 4), (2, 2)),
        ((2, 4), (4, 2)),
        ((2, 2), (2, 2)),
        ((2, 2), (4, 4)),
        ((8, 8), (1, 1)),
    ):
        for window in (0, 1, 3, 5, 7, 9):
            for top in (False, True):
                placed = tiling(grid, tile, (window, window), 0, group)
                left = round(share * placed.num_tiles) - placed.window_size
                if left < 0 or (top and left == 0) or (not top and window == 0):
                    continue
                name = f"{tile[0]}x{tile[1]} group {group[0]}x{group[1]} window {window}"
                name += f" top {left}" if top else ""
                found[name] = TileLayout(tile, group, (window, window), left if top else 0)
    return found


def chosen(
    rule: str, query: Tensor, key: Tensor, weights: Tensor, tokens: tuple[Tensor, Tensor],
    placed: Tiling,
) -> Tensor:  # fmt: skip
    """Tiles of every group `[groups, list]`; `weights` `[groups, tiles]` are softmax's sums."""
    groups, tiles = tokens
    mean_key = _means(key, tiles, placed.num_tiles)
    if rule == "mean":
        mean_query = _means(query, groups, placed.num_groups)
        return tile_lists(mean_query[None, None], mean_key[None, None], placed)[0, 0]
    if rule == "largest":
        products = _means(query, tiles, placed.num_tiles) @ mean_key.T
        of_tiles = torch.empty(placed.num_tiles, dtype=torch.int64, device=query.device)
        of_tiles[tiles] = groups
        scores = torch.full_like(weights, float("-inf"))
        scores.scatter_reduce_(0, of_tiles[:, None].expand_as(products), products, "amax")
    else:
        scores = weights
    near = window_tiles(placed, query.device)
    order = scores.scatter(-1, near, float("-inf")).argsort(dim=-1, descending=True, stable=True)
    return torch.cat((near, order[:, : placed.top]), dim=-1)


def _means(x: Tensor, boxes: Tensor, count: int) -> Tensor:
    sums = x.new_zeros(count, x.shape[-1]).index_add_(0, boxes, x)
    return sums / boxes.bincount(minlength=count)[:, None]


def boxes_of_tokens(placed: Tiling, device: torch.device) -> tuple[Tensor, Tensor]:
    """Group and tile of every token."""
    tiles = block_slots(placed.grid, placed.tiles, device)
    of_token = tiles.slots // tiles.tokens.shape[1]
    groups = block_slots(placed.tiles, placed.groups, device)
    return (groups.slots // groups.tokens.shape[1])[of_token], of_token


@torch.no_grad()
def projections(
    model: Any, images: Tensor, labels: Tensor, levels: Sequence[float]
) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Query, key and value `[tokens, head_dim]` of each head, image, noise level and layer."""
    kept: dict[str, list[Tensor]] = {"to_q": [], "to_k": [], "to_v": []}
    for block in model.transformer_blocks:
        attention = block.attn1
        for name in kept:
            getattr(attention, name).register_forward_hook(
                lambda _m, _i, out, n=name, h=attention.heads: kept[n].append(
                    out.float().unflatten(-1, (h, -1))
                )
            )
    generator = torch.Generator().manual_seed(0)
    for sigma in levels:
        noise = torch.randn(images.shape, generator=generator).to(images.device)
        times = torch.full((len(images),), 1000 * sigma, device=images.device)
        model((1 - sigma) * images + sigma * noise, timestep=times, class_labels=labels)
    return [
        (query[sample, :, head], key[sample, :, head], value[sample, :, head])
        for query, key, value in zip(*kept.values(), strict=True)
        for sample in range(len(images))
        for head in range(query.shape[2])
    ]


@torch.no_grad()
def measure(
    seen: Sequence[tuple[Tensor, Tensor, Tensor]], grid: tuple[int, int], shares: Sequence[float]
) -> list[dict[str, Any]]:
    """Rows of all layouts and rules: means over what `projections` found."""
    plans = [
        (share, name, layout, rule)
        for share in shares
        for name, layout in layouts(grid, share).items()
        for rule in RULES
        if layout.top or rule == "mean"
    ]
    sums = torch.zeros(len(plans), 2, dtype=torch.float64)
    for query, key, value in seen:
        weights = (query @ key.T * query.shape[-1] ** -0.5).softmax(-1)
        for row, (_, _, layout, rule) in enumerate(plans):
            sums[row] += torch.tensor(_captured(query, key, value, weights, grid, layout, rule))
    means = (sums / len(seen)).tolist()
    return [
        {
            "share": share,
            "layout": name,
            "pairs": round(_pairs(grid, layout), 4),
            "rule": rule,
            "mass": round(mass, 4),
            "error": round(error, 4),
        }
        for (share, name, layout, rule), (mass, error) in zip(plans, means, strict=True)
    ]


def _captured(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    weights: Tensor,
    grid: tuple[int, int],
    layout: TileLayout,
    rule: str,
) -> tuple[float, float]:
    """The mass and the error of one layout and rule in one head."""
    placed = tiling(grid, layout.tile, layout.window, layout.top, layout.group)
    groups, tiles = boxes_of_tokens(placed, query.device)
    by_tile = weights.new_zeros(len(query), placed.num_tiles).index_add_(1, tiles, weights)
    by_group = by_tile.new_zeros(placed.num_groups, placed.num_tiles)
    by_group.index_add_(0, groups, by_tile)
    lists = chosen(rule, query, key, by_group, (groups, tiles), placed)
    listed = torch.zeros_like(by_group, dtype=torch.bool).scatter_(1, lists, True)
    part = weights * listed[groups][:, tiles]
    mass = part.sum(-1, keepdim=True)
    whole = weights @ value
    error = (part @ value / mass - whole).square().sum() / whole.square().sum()
    return float(mass.mean()), float(error)


def _pairs(grid: tuple[int, int], layout: TileLayout) -> float:
    return tile_share(grid, layout.tile, layout.window, layout.top, layout.group)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print the rows, the least error first, and write them."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("pipeline", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--images", type=int, default=2)
    parser.add_argument("--shares", type=float, nargs="+", default=[0.05, 0.125])
    parser.add_argument("--levels", type=float, nargs="+", default=[0.25, 0.5, 0.75])
    options = parser.parse_args(arguments)
    device = resolve_device("auto")
    pipeline: Any = ClassConditionalPipeline.from_pretrained(str(options.pipeline)).to(device)
    model = pipeline.transformer.eval()
    images, labels = load_real(options.data).held_out()
    some = to_samples(images[: options.images], device)
    side = model.config.sample_size // model.config.patch_size
    classes = torch.from_numpy(labels[: options.images]).to(device)
    seen = projections(model, some, classes, options.levels)
    rows = measure(seen, (side, side), options.shares)
    for row in sorted(rows, key=lambda r: (r["share"], r["error"])):
        print(json.dumps(row))
    facts = {
        "command": "python experiments/evidence/attention_mass.py emoji64.npz PIPELINE OUT.json "
        f"--images {options.images} --levels {' '.join(map(str, options.levels))}",
        "date": date.today().isoformat(),
        "device": device_name(device),
        "images": options.images,
        "levels": options.levels,
        "rows": rows,
    }
    write_json(options.out, facts)


if __name__ == "__main__":
    main()
