"""The interpreter of Triton that tests hasten computes what it did."""

import pytest
import test_fused
import test_tile_fused
import torch

from mhla_gen.ops.fused import fused_mhla

triton, interpreter = map(pytest.importorskip, ("triton", "interpreter"))

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are not interpreted")


def computed():
    """Outputs and gradients of the kernels of both halves."""
    torch.manual_seed(0)
    inputs, options = test_fused.make((3, 5, 7), (2, 2, 3), torch.float16)
    tensors, tiles = test_tile_fused.make(test_tile_fused.SMALL, extra=2, heads=1, batch=1)
    return (
        *test_fused.outputs_and_gradients(fused_mhla, inputs, options),
        *test_tile_fused.outputs_and_gradients(tensors, tiles, "fused", torch.float32),
    )


@pytest.mark.skipif(not triton.__version__.startswith(interpreter.KNOWN), reason="not hastened")
def test_hastened_it_computes_the_same(monkeypatch):
    hastened, private = computed(), triton.runtime.interpreter
    for name in ("_patch_lang", "_get_np_dtype"):
        monkeypatch.setattr(private, name, getattr(private, name).__wrapped__)
    assert all(map(torch.equal, hastened, computed()))


def test_a_release_that_is_not_known_stays_as_it_is(monkeypatch):
    private = triton.runtime.interpreter
    before = private._patch_lang
    monkeypatch.delattr(private, "_get_np_dtype")
    monkeypatch.setattr(triton, "__version__", "4.0.0")
    interpreter.hasten()
    assert private._patch_lang is before
