"""Examples in documents run as they stand."""

import re
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, TrainingArguments

import mhla_gen

DOCS = Path(__file__).parents[1] / "docs"


def examples(page):
    """All snippets of Python on a page."""
    return re.findall(r"```python\n(.*?)```", (DOCS / page).read_text(), re.DOTALL)


def example(page, mentions):
    """The one snippet of Python on a page that mentions something."""
    (found,) = [snippet for snippet in examples(page) if mentions in snippet]
    return found


@pytest.mark.parametrize(("page", "count"), [("language.md", 5), ("linformer.md", 1)])
def test_the_examples_of_a_page_run_in_order(page, count, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    names = {}
    assert len(examples(page)) == count
    for snippet in examples(page):
        exec(snippet, names)
    # As the last one that concerns a model left it.
    assert ("MHLA" in type(names["model"]).__name__) == (page == "language.md")


def test_a_trainer_does_not_decay_the_weights_of_distances(tmp_path):
    names = {}
    exec(example("language.md", "class Undecayed"), names)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_hidden_layers=2, vocab_size=9))
    mhla_gen.inject(model, mhla_gen.CausalMHLAConfig())
    settings = TrainingArguments(str(tmp_path), weight_decay=0.1, use_cpu=True, report_to=[])
    optimizer = names["Undecayed"](model, settings).create_optimizer()
    decays = {id(p): g["weight_decay"] for g in optimizer.param_groups for p in g["params"]}
    found = {name: decays[id(p)] for name, p in model.named_parameters()}
    left_out = {name for name, decay in found.items() if decay == 0}
    assert left_out == {name for name in found if name.endswith("log_weights") or "norm" in name}


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
