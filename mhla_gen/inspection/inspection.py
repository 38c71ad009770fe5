"""From settings to a folder with the page, its pictures and its numbers."""

import json
import math
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mhla_gen.config import InspectConfig, save_config
from mhla_gen.errors import OccupiedError, UserError
from mhla_gen.files import is_temporary, remove_leftovers, write_json, write_text, written_whole
from mhla_gen.inspection.examination import Examination, Focus, Layer, examine
from mhla_gen.inspection.figures import Picture, draw_statistics
from mhla_gen.inspection.grids import TokenGrid, query_tokens, statistics_rows, token_grid
from mhla_gen.inspection.inputs import Input, latent_shape, make_inputs
from mhla_gen.inspection.map_figures import draw_maps
from mhla_gen.inspection.mixing_figures import draw_mixing, draw_mixing_heads
from mhla_gen.inspection.page import build_page
from mhla_gen.inspection.subject import Subject, load_subject
from mhla_gen.outputs.folders import CONFIG_NAME, LOCK_NAME, check_replaceable, made_with
from mhla_gen.runtime.devices import resolve_device
from mhla_gen.version import __version__

PAGE_NAME = "index.html"
STATISTICS_NAME = "statistics.json"


def inspect(config: InspectConfig, dry_run: bool = False) -> Path:
    """Draw mixing matrices, attention maps, rank and entropy of a model into one page.

    A folder made with the same settings is drawn again, since the model may have changed.

    Args:
        config: Settings.
        dry_run: Load and check everything, say what would be drawn, and write nothing.

    Returns:
        The page.

    Raises:
        ValueError: If settings, models and data do not fit together.
        OSError: If a model or data are missing, or the output folder holds something else.
    """
    config.require_model()
    folder = Path(config.output_dir)
    if made_with(folder, config):
        _require_only_ours(folder)
    check_replaceable(folder)
    remove_leftovers(folder.resolve().parent)
    subjects = _load(config)
    chosen = token_grid(subjects["model"], config)
    grid = chosen.axes
    queries = query_tokens(config, grid)
    inputs = make_inputs(subjects["model"], config, grid)
    focus = Focus(
        grid=grid,
        queries=torch.tensor([int(np.ravel_multi_index(query, grid)) for query in queries]),
        rows=statistics_rows(config, grid),
        head=config.head,
    )
    facts = _facts(config, subjects, inputs, chosen, focus)
    if dry_run:
        print(f"would write {folder / PAGE_NAME}")
        print("\n".join(f"  {term}: {text}" for term, text in facts))
        return folder / PAGE_NAME
    print(f"inspecting {subjects['model'].source}: tokens {chosen}", flush=True)
    device = resolve_device(config.device)
    examinations = []
    for title, subject in subjects.items():
        subject.model.to(device)
        examinations.append(examine(title, subject, inputs, focus))
        # One model at a time on the device.
        subject.model.to("cpu")
    _write(folder, config, examinations, facts, focus, queries)
    print(f"wrote {folder / PAGE_NAME}")
    return folder / PAGE_NAME


def _require_only_ours(folder: Path) -> None:
    """Raise if a folder that will be replaced has files that this command did not write."""
    try:
        pictures = json.loads((folder / STATISTICS_NAME).read_bytes()).get("pictures")
    except (OSError, ValueError, AttributeError):
        pictures = None
    if pictures is None:
        # Of an earlier version, or damaged.
        pictures = [path.name for path in folder.glob("*.png")]
    ours = {PAGE_NAME, STATISTICS_NAME, CONFIG_NAME, LOCK_NAME, *pictures}
    others = sorted(path.name for path in folder.iterdir() if path.name not in ours)
    others = [name for name in others if not is_temporary(folder / name)]
    if others:
        raise OccupiedError(
            f"output_dir {folder} will be replaced, but has other files, such as "
            f"{others[0]}; move them away or choose another output_dir"
        )


def _load(config: InspectConfig) -> dict[str, Subject]:
    """The model and its teacher, checked against each other and against the settings."""
    assert config.model is not None
    dtype = getattr(torch, config.dtype)
    subjects = {"model": load_subject(config.model, config.component, dtype)}
    if config.teacher is not None:
        subjects["teacher"] = load_subject(config.teacher, config.component, dtype)
        _check_teacher(subjects["model"], subjects["teacher"])
    for subject in subjects.values():
        num_heads = subject.family.sizes(subject.model)[0]
        if config.head is not None and config.head >= num_heads:
            raise UserError(
                f"{subject.source} has heads 0…{num_heads - 1}, found head={config.head}"
            )
    return subjects


def _check_teacher(model: Subject, teacher: Subject) -> None:
    if type(model.family) is not type(teacher.family):
        raise UserError(
            f"model and teacher must be of one family, found a {type(model.model).__name__} and a "
            f"{type(teacher.model).__name__}"
        )
    grid = model.family.native_grid(model.model)
    sizes = [
        {
            "layers": len(subject.family.attentions(subject.model)),
            "latent shape": latent_shape(subject.model, grid),
            "classes": getattr(subject.model.config, "num_embeds_ada_norm", None),
            "text channels": getattr(subject.model.config, "text_dim", None),
        }
        for subject in (model, teacher)
    ]
    for name in sizes[0]:
        if sizes[0][name] != sizes[1][name]:
            raise UserError(
                f"model and teacher must take the same inputs and have as many layers; {name}: "
                f"{sizes[0][name]} and {sizes[1][name]}"
            )


def _facts(
    config: InspectConfig,
    subjects: dict[str, Subject],
    inputs: list[Input],
    chosen: TokenGrid,
    focus: Focus,
) -> list[tuple[str, str]]:
    """What was inspected and how, for the head of the page."""
    facts = []
    for title, subject in subjects.items():
        millions = sum(p.numel() for p in subject.model.parameters()) / 1e6
        kind = type(subject.model).__name__
        facts.append((title, f"{subject.source}, {kind}, {millions:.1f} M parameters"))
    rows = len(focus.rows)
    measured = "all queries" if rows == _seq_len(focus) else f"{rows} queries drawn at random"
    shown = "; ".join(item.title for item in inputs[:4])
    which = "mean over heads" if config.head is None else f"head {config.head}"
    more = f"; and {len(inputs) - 4} more" if len(inputs) > 4 else ""
    return [
        *facts,
        ("tokens", str(chosen)),
        ("inputs", shown + more),
        ("rank and entropy", f"of {measured}, each head, averaged over all inputs ({len(inputs)})"),
        ("attention maps", f"of the first input, {which}"),
        ("made with", f"mhla_gen {__version__}, torch {torch.__version__}"),
    ]


def _write(
    folder: Path,
    config: InspectConfig,
    examinations: list[Examination],
    facts: list[tuple[str, str]],
    focus: Focus,
    queries: list[tuple[int, ...]],
) -> None:
    missing = examinations[0].missing
    if missing:
        facts = [*facts, ("not examined", f"{', '.join(missing)}: neither softmax nor MHLA")]
    statistics = draw_statistics(examinations, len(focus.rows), _seq_len(focus))
    mixing = _mixing(examinations[0])
    maps = [
        draw_maps(index, _views(examinations, index), queries, focus.grid)
        for index in examinations[0].layers
    ]
    page = build_page(examinations, facts, statistics, mixing, maps)
    with written_whole(folder) as partial:
        partial.mkdir()
        names = []
        for picture in (statistics, *mixing, *maps):
            names.append(f"{picture.name}.png")
            (partial / names[-1]).write_bytes(picture.png["light"])
        write_json(partial / STATISTICS_NAME, _numbers(examinations, facts, names))
        write_text(partial / PAGE_NAME, page)
        save_config(replace(config, output_dir=str(folder)), partial / CONFIG_NAME)


def _views(examinations: list[Examination], index: int) -> dict[str, Layer]:
    """A layer of the model and of its teacher, with their halves, by title."""
    views: dict[str, Layer] = {}
    for seen in examinations:
        if index in seen.layers:
            views |= seen.layers[index].views(seen.title)
    return views


def _mixing(seen: Examination) -> list[Picture]:
    """Heat maps of every layer with more than one block."""
    pictures = []
    for index, layer in seen.layers.items():
        if layer.mixing is None or layer.mixing.shape[-1] == 1:
            continue
        pictures.append(draw_mixing(index, layer))
        if layer.mixing.ndim == 3:
            pictures.append(draw_mixing_heads(index, layer))
    return pictures


def _numbers(
    examinations: list[Examination], facts: list[tuple[str, str]], pictures: list[str]
) -> dict[str, Any]:
    """Rank and entropy of every layer, input and head."""
    return {
        "facts": dict(facts),
        "pictures": pictures,
        **{
            seen.title: [
                {
                    "layer": index,
                    "name": layer.name,
                    "kind": layer.kind,
                    "layout": layer.layout,
                    "rank_bound": layer.rank_bound,
                    "exact_weight": layer.exact_weight,
                    "inputs": [[asdict(head) for head in heads] for heads in layer.statistics],
                }
                for index, layer in seen.layers.items()
            ]
            for seen in examinations
        },
    }


def _seq_len(focus: Focus) -> int:
    return math.prod(focus.grid)
