"""Tables and pictures of the comparison, from its results.

    python experiments/evidence/evidence_report.py RESULTS [--plan PLAN.yaml] [--page PAGE.md]

RESULTS holds the results of evidence_run.py, _speed.py and _probe.py; tables.md and the pictures
are written there. With --page the tables also replace the text of that page between the lines
`<!-- tables of PLAN -->` and `<!-- end of tables -->`; PLAN is the name of the plan, `arms`.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from evidence_exact import draw_shares, exact_tables
from evidence_figures import (
    draw_curves,
    draw_layers,
    draw_probe,
    draw_quality_and_speed,
    draw_samples,
)
from evidence_plan import PLAN, Plan
from evidence_table import (
    Group,
    against_control,
    cost_table,
    each,
    load_groups,
    markdown,
    quality_table,
)

from mhla_gen.files import write_text

_END = "<!-- end of tables -->"


def main(arguments: Sequence[str] | None = None) -> None:
    """Write tables and pictures."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("results", type=Path)
    parser.add_argument("--plan", type=Path, default=PLAN)
    parser.add_argument("--page", type=Path)
    options = parser.parse_args(arguments)
    folder: Path = options.results
    plan = Plan(options.plan)
    # The probe needs no arms, so it is drawn before arms are loaded.
    probes = [json.loads(path.read_bytes()) for path in sorted(folder.glob("probe-*.json"))]
    if probes:
        draw_probe(probes, folder / "probe.png")
    groups = load_groups(folder, plan)
    makers = {"exact": exact_tables, "mixing": mixing_tables, "losses": loss_tables}
    text = makers[plan.tables](plan, groups, folder)
    write_text(folder / "tables.md", text)
    if options.page:
        replace_tables(options.page, options.plan.stem, text)
    if plan.tables == "exact":
        draw_shares(plan, groups, folder / "shares.png")
    elif plan.tables == "mixing":
        draw_curves(groups, folder / "curves.png")
        draw_layers(groups, folder / "layers.png")
        draw_quality_and_speed(groups, folder / "quality-speed.png")
    if plan.tables != "losses":
        pictures: dict[str, list[Group]] = {}
        for group in groups:
            # Converted models are compared however long they were tuned, and taught or not.
            kind = plan.settings[group.setting].kind
            pictures.setdefault(kind if kind == "converted" else group.setting, []).append(group)
        for name, same in pictures.items():
            # Nine frames need more room than an image.
            size = (96, 8) if plan.settings[same[0].setting].kind == "clips" else ()
            draw_samples(same, folder, folder / f"samples-{name}.png", *size)
    print(text)


def mixing_tables(plan: Plan, groups: Sequence[Group], folder: Path) -> str:
    """All tables, and the same metrics of real images."""
    real: dict[str, Any] = json.loads((folder / "real.json").read_bytes())
    parts = []
    for setting in dict.fromkeys(group.setting for group in groups):
        same = [group for group in groups if group.setting == setting]
        first = same[0].results[0]
        seconds = {round(sum(r["seconds"].values())) for group in same for r in group.results}
        span = " to ".join(str(end) for end in sorted({min(seconds), max(seconds)}))
        parts += [
            f"**{first['tokens']} tokens**: {first['steps']} steps of {first['batch_size']} "
            f"images, {first['scores']['samples']} samples; {span} s an arm on one "
            f"{first['machine']['device']}.",
            quality_table(same, plan.control),
            cost_table(same),
        ]
    parts.append(
        f"Real images: two halves are {real['frechet_halves']:.1f} apart in Fréchet distance; of "
        f"those held out the classifier recognises {real['recognised_held_out']:.1%}."
    )
    return "\n\n".join(parts) + "\n"


def loss_tables(plan: Plan, groups: Sequence[Group], _: Path) -> str:
    """Held-out losses alone, of every seed and against the control's."""
    parts = []
    for setting in dict.fromkeys(group.setting for group in groups):
        same = [group for group in groups if group.setting == setting]
        first = same[0].results[0]
        rows = [
            [
                group.title,
                each(group.values("held_out", "mean"), ".5f"),
                against_control(group, same, plan.control),
            ]
            for group in same
        ]
        parts += [
            f"**{first['tokens']} tokens**: {first['steps']} steps of {first['batch_size']} images "
            f"on one {first['machine']['device']}.",
            markdown(("arm", "held-out loss", "against control"), rows),
        ]
    return "\n\n".join(parts) + "\n"


def replace_tables(page: Path, name: str, text: str) -> None:
    """Put the tables of a plan between its two markers in a page.

    Raises:
        ValueError: If the page lacks a marker.
    """
    begin = f"<!-- tables of {name} -->\n"
    before, found, rest = page.read_text(encoding="utf-8").partition(begin)
    if not found or _END not in rest:
        raise ValueError(f"{page} lacks the lines {begin.strip()} and {_END}")
    write_text(page, before + begin + text + _END + rest.split(_END, 1)[1])


if __name__ == "__main__":
    main()
