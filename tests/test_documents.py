"""Examples in documents run as they stand."""

import re
from pathlib import Path

import torch

DOCS = Path(__file__).parents[1] / "docs"


def example(page, mentions):
    """The one snippet of Python on a page that mentions something."""
    snippets = re.findall(r"```python\n(.*?)```", (DOCS / page).read_text(), re.DOTALL)
    (found,) = [snippet for snippet in snippets if mentions in snippet]
    return found


def test_a_training_script_keeps_mixing_in_range_and_does_not_decay_it():
    code = example("models.md", "keep_mixing_in_range(")
    # Steps so large that they would leave the range.
    assert "lr=1e-4" in code
    names = {}
    exec(code.replace("lr=1e-4", "lr=1.0"), names)
    matrices = [p for n, p in names["model"].named_parameters() if n.endswith(".mixing")]
    assert len(matrices) == 2
    for matrix in matrices:
        assert matrix.min() >= 0 and matrix.max() <= 1
        assert ((matrix == 0) | (matrix == 1)).any()
    decays = {id(p): g["weight_decay"] for g in names["groups"] for p in g["params"]}
    assert all(decays[id(matrix)] == 0 for matrix in matrices)
    assert torch.isfinite(names["loss"])
