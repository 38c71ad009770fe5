"""Softmax attention runs on the kernels that are allowed, also where other code is on disk."""

from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend
from torch.profiler import ProfilerActivity, profile

from mhla_gen.bench import model
from mhla_gen.bench.measure import training_kernels_of
from mhla_gen.config import BenchConfig
from mhla_gen.runtime.softmax_kernels import compile_settings, leave_out_cudnn, softmax_on
from mhla_gen.training.softmax import avoid_faulty_softmax


@pytest.fixture(autouse=True)
def as_before():
    enabled = torch.backends.cuda.cudnn_sdp_enabled()
    with compile_settings.patch(cache_key_tag=""):
        yield
    torch.backends.cuda.enable_cudnn_sdp(enabled)
    torch.compiler.reset()


def runs_on_flash(query):
    """Whether attention does, newly compiled."""
    torch.compiler.reset()

    def attend(query):
        return F.scaled_dot_product_attention(query, query, query)

    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        torch.compile(attend, fullgraph=True)(query)
    names = [event.key for event in profiler.key_averages()]
    assert any("scaled_dot_product" in name or "mm" in name for name in names)
    return any("flash" in name for name in names)


def test_what_is_on_disk_was_compiled_for_the_same_kernels(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    query = torch.randn(1, 2, 16, 8)
    for kernel in (SDPBackend.FLASH_ATTENTION, SDPBackend.MATH, SDPBackend.FLASH_ATTENTION):
        with softmax_on(kernel):
            assert runs_on_flash(query) == (kernel == SDPBackend.FLASH_ATTENTION)
        assert compile_settings.cache_key_tag == ""


def test_code_compiled_before_cudnn_was_left_out_is_not_taken(tmp_path, monkeypatch):
    """On a CPU flash attention stands in for cuDNN's, which it does not have."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    query = torch.randn(1, 2, 16, 8)
    assert runs_on_flash(query)
    leave_out_cudnn()
    assert not torch.backends.cuda.cudnn_sdp_enabled()
    flash = torch.backends.cuda.flash_sdp_enabled()
    try:
        torch.backends.cuda.enable_flash_sdp(False)
        assert not runs_on_flash(query)
    finally:
        torch.backends.cuda.enable_flash_sdp(flash)


def test_a_tag_of_a_user_stays():
    compile_settings.cache_key_tag = "mine"
    with softmax_on(SDPBackend.MATH):
        assert compile_settings.cache_key_tag == "mine softmax on MATH"
    leave_out_cudnn()
    assert compile_settings.cache_key_tag == "mine softmax without cuDNN"


@pytest.mark.parametrize(
    ("method", "lengths", "kinds", "generation", "kept"),
    [
        ("softmax", {256, 512}, 1, 9, True),
        # As Wan's clips of 480 × 832 pixels, whose tokens also read captions.
        ("fused", {32760, 512}, 1, 9, False),
        ("softmax", {32760, 512}, 1, 8, True),
        ("softmax_cudnn", {32760, 512}, 1, 9, True),
        ("softmax", {256}, 2, 9, False),
        ("fused", set(), 2, 9, True),
    ],
)
def test_a_benchmark_trains_on_the_kernels_that_training_takes(
    method, lengths, kinds, generation, kept, monkeypatch, capsys
):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (generation, 0))
    torch.backends.cuda.enable_cudnn_sdp(True)
    gpu = torch.device("cuda")
    with training_kernels_of(method, lengths, kinds, gpu):
        assert torch.backends.cuda.cudnn_sdp_enabled() == kept
        assert torch.backends.cuda.flash_sdp_enabled()
    assert torch.backends.cuda.cudnn_sdp_enabled()
    assert ("trains without cuDNN's" in capsys.readouterr().out) == (not kept)
    if method != "softmax_cudnn":
        avoid_faulty_softmax(lengths, kinds, gpu)
        assert torch.backends.cuda.cudnn_sdp_enabled() == kept


@pytest.mark.parametrize(("method", "lengths"), [("softmax", {8, 512}), ("blockwise", {8, 512})])
def test_a_benchmark_sees_the_lengths_of_a_model(method, lengths, monkeypatch):
    """Wan's tokens attend to a caption of 512, whatever replaces their own attention."""
    seen = []

    def note(method, lengths, kinds, device):
        seen.append((lengths, kinds, device.type))
        return nullcontext()

    monkeypatch.setattr(model, "training_kernels_of", note)
    config = BenchConfig(
        subject="model", model="wan", grids=[[2, 2, 2]], methods=[method], num_layers=1,
        compile=True, checkpointing=False, dtype="float32", device="cpu",
    )  # fmt: skip
    monkeypatch.setattr(model, "compile_blocks", lambda _: seen.append("compiled"))
    (row,) = model.bench_model(config, torch.device("cpu"))
    assert "error" not in row and row["train_ms"] > 0
    assert seen == ["compiled", (lengths, 1, "cpu")]
