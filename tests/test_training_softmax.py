"""Where cuDNN's softmax attention may fault, a training does without it."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from test_training import TINY, tiny_run

from mhla_gen.runtime.softmax_kernels import AttentionLengths, compile_settings
from mhla_gen.training import training_run
from mhla_gen.training.build import build_task
from mhla_gen.training.softmax import avoid_faulty_softmax
from mhla_gen.training.training_run import build_run

GPU = torch.device("cuda")


@pytest.fixture(autouse=True)
def as_before():
    enabled = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(True)
    with compile_settings.patch(cache_key_tag=""):
        yield
    torch.backends.cuda.enable_cudnn_sdp(enabled)


def test_lengths_are_those_of_queries_and_keys():
    query, key = torch.randn(1, 2, 3, 8), torch.randn(1, 2, 5, 8)
    with AttentionLengths() as lengths:
        found = F.scaled_dot_product_attention(query, key, value=key)
        F.scaled_dot_product_attention(value=query, key=query, query=key)
        torch.randn(7, 7).softmax(-1)
    assert lengths.found == {3, 5}
    torch.testing.assert_close(found, F.scaled_dot_product_attention(query, key, key))


@pytest.mark.parametrize(
    ("lengths", "kinds", "generation", "device", "kept"),
    [
        ({256, 1024}, 1, 9, GPU, True),
        (set(), 2, 9, GPU, True),
        ({256, 576}, 1, 9, GPU, False),
        ({256}, 2, 9, GPU, False),
        (None, 1, 9, GPU, False),
        ({576}, 2, 8, GPU, True),
        ({576}, 2, 9, torch.device("cpu"), True),
    ],
)
def test_cudnn_stays_out_on_hopper_alone(
    lengths, kinds, generation, device, kept, monkeypatch, capsys
):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (generation, 0))
    for _ in range(2):
        avoid_faulty_softmax(lengths, kinds, device)
        assert torch.backends.cuda.cudnn_sdp_enabled() == kept
        assert (compile_settings.cache_key_tag == "") == kept
    assert capsys.readouterr().out.count("without cuDNN") == (not kept)


@pytest.mark.parametrize(("attention", "expected"), [("softmax", {16}), ("mhla", set())])
def test_a_run_looks_at_the_lengths_of_its_softmax(attention, expected, tmp_path, monkeypatch):
    given = []
    monkeypatch.setattr(training_run, "avoid_faulty_softmax", lambda *args: given.append(args))
    run = build_run(tiny_run(tmp_path, model=replace(TINY, attention=attention)))
    assert given == [(expected, 1, run.accelerator.device)]


@pytest.mark.parametrize("why", ["captions differ", "a mask has values"])
def test_lengths_that_one_sample_does_not_show_are_unknown(why, tmp_path, monkeypatch):
    given = []
    monkeypatch.setattr(training_run, "avoid_faulty_softmax", lambda *args: given.append(args))
    if why == "a mask has values":
        # What it returns for such a model.
        monkeypatch.setattr(training_run, "step_flops", lambda *_: None)

    def build(config, data):
        return replace(build_task(config, data), any_length=why == "captions differ")

    build_run(tiny_run(tmp_path, model=replace(TINY, attention="softmax")), build)
    assert [lengths for lengths, *_ in given] == [None]
