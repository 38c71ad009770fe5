"""One HTML file with everything in it: no scripts, no other files, light and dark."""

import base64
from collections.abc import Sequence
from html import escape

from mhla_gen.inspection.examination import Examination
from mhla_gen.inspection.figures import Picture, mean

_STYLE = """
:root { color-scheme: light dark; --ink: #1b1f24; --paper: #ffffff; --soft: #57606a;
  --line: #d5dae0; --shade: #f4f6f8; --link: #0b61a4; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e9ee; --paper: #15181d; --soft: #a2abb6;
  --line: #353b44; --shade: #1e2229; --link: #6cb6ff; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.5rem clamp(1rem, 3vw, 2.5rem) 4rem; max-width: 84rem;
  color: var(--ink); background: var(--paper);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Liberation Sans", sans-serif; }
h1 { font-size: 1.7rem; line-height: 1.25; margin: 0 0 .3rem; overflow-wrap: anywhere; }
h2 { font-size: 1.3rem; margin: 2.8rem 0 .5rem; padding-top: .6rem;
  border-top: 1px solid var(--line); }
h3 { font-size: 1rem; margin: 0 0 .3rem; }
p, dl, ul { max-width: 46rem; }
a { color: var(--link); }
nav ul { display: flex; flex-wrap: wrap; gap: .2rem 1.4rem; padding: 0; list-style: none; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .15rem 1.2rem; }
dt, .soft, caption { color: var(--soft); } dd { margin: 0; overflow-wrap: anywhere; }
figure { margin: 0 0 1.6rem; overflow-x: auto; }
img { display: block; max-width: 100%; height: auto; }
.figures { display: grid; gap: 0 2rem;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 36rem), 1fr)); }
.scroll { overflow-x: auto; } .scroll:focus-visible { outline: 2px solid var(--link); }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .92rem; }
caption { text-align: left; padding-bottom: .4rem; }
th, td { padding: .25rem .9rem .25rem 0; text-align: right; white-space: nowrap; }
th.text, td.text { text-align: left; padding-left: .9rem; }
thead th { border-bottom: 1px solid var(--line); vertical-align: bottom; }
tbody tr:nth-child(even) { background: var(--shade); }
@media (max-width: 34rem) { dl { display: block; } dd { margin-bottom: .5rem; } }
@media print { .figures { display: block; } figure { break-inside: avoid; } }
"""

_ATTENTION_TEXT = """Row n of the attention weights says how much query token n, marked by a ring,
reads of every token. Weights are given in multiples of uniform attention: 1 reads all tokens alike.
Each picture, or row of frames, has its own scale up to its “max”; where weights are negative, as
after rotary embedding, red is positive, blue negative, white zero. Thin lines are block borders.
Linear and MHLA layers never form these weights; they are what the layer's output equals, before its
convolution, gate and output norm. Of a layer with an exact half the whole is shown first, weighed
by its gate, then each half."""

_MIXING_TEXT = """Row i of the mixing matrix says how much the queries of block i read of the
summary of every block. Beside or below the matrix, every row is a small picture of the block grid
at the place of its own block, which a dot marks where the layout is not too fine. Videos have one
such picture for every slice of query blocks in time; inside the small pictures the slices that are
read lie below each other."""

_DEFINITIONS = (
    (
        "Rank",
        "singular values of the attention weights above max(rows, tokens) · 2⁻²³ of the largest, "
        "NumPy's and PyTorch's default for float32. The paper (Zhang et al. 2026, "
        "arXiv:2601.07832, Fig. 3) does not give its threshold.",
    ),
    (
        "Effective rank",
        "exp of the entropy of the singular values' shares (Roy and Vetterli 2007): no threshold.",
    ),
    (
        "Entropy",
        "of each query's weights in nats, from 0 (one token is read) to log(tokens) (all alike). "
        "Weights of rotated or unnormalised layers are taken by their absolute share.",
    ),
)


def build_page(
    examinations: Sequence[Examination],
    facts: Sequence[tuple[str, str]],
    statistics: Picture,
    mixing: Sequence[Picture],
    maps: Sequence[Picture],
) -> str:
    """The page.

    Args:
        examinations: The model, and its teacher if there is one.
        facts: What was inspected and how, as terms and descriptions.
        statistics: Curves of rank and entropy.
        mixing: Heat maps of mixing matrices; may be empty.
        maps: Attention maps, one picture per layer.
    """
    title = f"Attention of {examinations[0].subject.source}"
    parts = [
        f"<h1>{_breakable(title)}</h1>",
        '<nav aria-label="Sections"><ul>',
        '<li><a href="#statistics">Rank and entropy</a></li>',
        '<li><a href="#mixing">Mixing matrices</a></li>',
        '<li><a href="#maps">Attention maps</a></li>',
        "</ul></nav>",
        _facts(facts),
        '<h2 id="statistics">Rank and entropy</h2>',
        "<p>Lines are means over heads and inputs, bands run from the lowest head to the "
        "highest.</p>",
        _figure(statistics),
        _table(examinations),
        _facts(_DEFINITIONS),
        '<h2 id="mixing">Mixing matrices</h2>',
        _section(_MIXING_TEXT, mixing, "The model has no layer with more than one block."),
        '<h2 id="maps">Attention maps</h2>',
        _section(_ATTENTION_TEXT, maps, ""),
    ]
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(parts)
        + "\n</main>\n</body>\n</html>\n"
    )


def _section(text: str, pictures: Sequence[Picture], otherwise: str) -> str:
    if not pictures:
        return f"<p>{escape(otherwise)}</p>"
    figures = "\n".join(_figure(picture) for picture in pictures)
    return f'<p>{escape(text)}</p>\n<div class="figures">\n{figures}\n</div>'


def _figure(picture: Picture) -> str:
    light, dark = (_data_url(picture.png[theme]) for theme in ("light", "dark"))
    width, height = picture.size
    # On a narrow screen a figure is scrolled before its text is too small to read.
    return (
        f'<figure id="{picture.name}"><h3>{escape(picture.title)}</h3><picture>'
        f'<source media="(prefers-color-scheme: dark)" srcset="{dark}">'
        f'<img src="{light}" alt="{escape(picture.alt)}" width="{width}" height="{height}" '
        f'style="min-width: {3 * width // 4}px"></picture></figure>'
    )


def _data_url(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode("ascii")


def _facts(facts: Sequence[tuple[str, str]]) -> str:
    rows = "".join(f"<dt>{escape(term)}</dt><dd>{_breakable(text)}</dd>" for term, text in facts)
    return f"<dl>{rows}</dl>"


def _breakable(text: str) -> str:
    """Text in which long paths break between folders."""
    return escape(text).replace("/", "/<wbr>")


def _table(examinations: Sequence[Examination]) -> str:
    """Numbers of every layer; the model's columns, then the teacher's."""
    quantities = {"rank": "rank", "effective_rank": "effective rank", "entropy": "entropy"}
    groups = "".join(
        f'<th colspan="5" scope="colgroup" class="text">{escape(seen.title)}</th>'
        for seen in examinations
    )
    heads = '<th scope="col" class="text">attention</th><th scope="col" class="text">blocks</th>'
    heads += "".join(f'<th scope="col">{title}</th>' for title in quantities.values())
    lines = []
    for index in sorted({i for seen in examinations for i in seen.layers}):
        cells = "".join(_cells(seen, index, list(quantities)) for seen in examinations)
        lines.append(f'<tr><th scope="row">{index}</th>{cells}</tr>')
    means = "".join(
        '<td class="text"></td><td></td>'
        + "".join(f"<td>{mean(seen, quantity):.2f}</td>" for quantity in quantities)
        for seen in examinations
    )
    lines.append(f'<tr><th scope="row">mean</th>{means}</tr>')
    return (
        '<div class="scroll" tabindex="0" role="region" aria-label="Numbers of every layer">'
        "<table><caption>Means over heads and inputs.</caption><thead>"
        f'<tr><td></td>{groups}</tr><tr><th scope="col">layer</th>{heads * len(examinations)}</tr>'
        f"</thead><tbody>{''.join(lines)}</tbody></table></div>"
    )


def _cells(seen: Examination, index: int, quantities: Sequence[str]) -> str:
    layer = seen.layers.get(index)
    if layer is None:
        return '<td class="text" colspan="5">not looked at</td>'
    blocks = "×".join(map(str, layer.layout)) if layer.layout else "–"
    numbers = "".join(f"<td>{layer.per_head(q).mean():.2f}</td>" for q in quantities)
    return f'<td class="text">{layer.kind}</td><td class="text">{blocks}</td>{numbers}'
