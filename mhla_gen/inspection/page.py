"""One self-contained HTML file, without scripts, in light and dark."""

import base64
from collections.abc import Sequence

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape

from mhla_gen.inspection.examination import Examination
from mhla_gen.inspection.figures import Picture, mean

_QUANTITIES = ("rank", "effective_rank", "entropy")

_DEFINITIONS = (
    (
        "Rank",
        "singular values of the attention weights above max(rows, tokens) · 2⁻²³ of the largest, "
        "NumPy's and PyTorch's default for float32. The paper (Zhang et al. 2026, "
        "arXiv:2601.07832, Fig. 3) does not give its threshold.",
    ),
    (
        "Effective rank",
        "exp of the entropy of the normalised singular values (Roy and Vetterli 2007).",
    ),
    (
        "Entropy",
        "of each query's weights in nats, from 0 (a single token) to log(tokens) (uniform). "
        "For rotated or unnormalised layers, normalised absolute weights are used.",
    ),
)


def build_page(
    examinations: Sequence[Examination],
    facts: Sequence[tuple[str, str]],
    statistics: Picture,
    mixing: Sequence[Picture],
    maps: Sequence[Picture],
) -> str:
    """The page, as `page.html` beside this module lays it out.

    Args:
        examinations: The model, and its teacher if there is one.
        facts: What was inspected and how, as terms and descriptions.
        statistics: Curves of rank and entropy.
        mixing: Heat maps of mixing matrices; may be empty.
        maps: Attention maps, one picture per layer.
    """
    loader = PackageLoader("mhla_gen.inspection", "")
    pages = Environment(
        loader=loader, autoescape=True, undefined=StrictUndefined, keep_trailing_newline=True
    )
    pages.filters |= {"breakable": _breakable, "data_url": _data_url}
    return pages.get_template("page.html").render(
        title=f"Attention of {examinations[0].subject.source}",
        about=facts,
        statistics=statistics,
        examinations=examinations,
        layers=sorted({index for seen in examinations for index in seen.layers}),
        quantities=_QUANTITIES,
        mean=mean,
        definitions=_DEFINITIONS,
        mixing=mixing,
        maps=maps,
    )


def _data_url(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode("ascii")


def _breakable(text: str) -> Markup:
    """Text in which long paths break between folders."""
    return escape(text).replace("/", Markup("/<wbr>"))
