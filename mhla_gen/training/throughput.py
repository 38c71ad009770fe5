"""Operations of a training step, and the peak of a device."""

import copy
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
)
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from mhla_gen.data import Batch
from mhla_gen.models import MHLA
from mhla_gen.training.conditioning import Conditioning

_UNKNOWN_SHAPES = (DataDependentOutputException, DynamicOutputShapeException)
# Dense bfloat16 TFLOP/s with float32 sums, from the makers' data sheets, by part of the name that
# PyTorch reports. SXM and PCIe boards of one name differ; PCIe and NVL are listed first.
_PEAK_TFLOPS = {
    "B200": 2250,
    "H200": 989,
    "H100 PCIe": 756,
    "H100 NVL": 835,
    "H100": 989,
    "A100": 312,
    "A10G": 70,
    "L40S": 362,
    "L4": 121,
    "RTX 4090": 165,
    "RTX 5090": 210,
}


def peak_flops(device: torch.device, mixed_precision: str) -> float | None:
    """Operations per second on a device's data sheet; None if unknown.

    Args:
        device: A GPU, or another device, of which nothing is known.
        mixed_precision: bf16; nothing is known of others.
    """
    if device.type != "cuda" or mixed_precision != "bf16":
        return None
    return specified_flops(torch.cuda.get_device_name(device))


def specified_flops(name: str) -> float | None:
    """Dense bfloat16 operations per second of a GPU by name; None if not in the table."""
    found = (peak for part, peak in _PEAK_TFLOPS.items() if re.search(rf"\b{part}\b", name))
    peak = next(found, None)
    return None if peak is None else 1e12 * peak


def step_flops(
    model: nn.Module, conditioning: Conditioning, sample: Batch, shape: tuple[int, ...]
) -> int | None:
    """Operations of training on one sample: those of the forward pass, three times.

    Matrix products, attention and convolutions are counted, a multiplication and an addition as
    two, on tensors without values; MHLA as its PyTorch form computes it. What gradient
    checkpointing repeats is not counted: it is no use to the model.

    Args:
        model: Not yet compiled or shared among processes.
        conditioning: How it is called.
        sample: A batch of one.
        shape: `(channels, (frames,) height, width)` of the sample.

    Returns:
        Operations; None for a model whose shapes depend on values, such as those of a mask.
    """
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    # Some models remember tables by size, which must not be tables without values.
    model = copy.deepcopy(model, {id(tensor): tensor for tensor in tensors.values()})
    # Plain products in place of kernels, which are not counted on every device.
    # A condition may have tensors of its own.
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    with fake, torch.no_grad(), sdpa_kernel(SDPBackend.MATH), _plain_mhla(model):
        weights = {name: torch.empty(t.shape, dtype=t.dtype) for name, t in tensors.items()}
        batch = {name: torch.empty(1, *t.shape[1:], dtype=t.dtype) for name, t in sample.items()}

        def call(*args: Any, **kwargs: Any) -> Any:
            return torch.func.functional_call(model, weights, args, kwargs)

        counter = FlopCounterMode(display=False)
        with suppress(*_UNKNOWN_SHAPES), counter:
            conditioning.predict(
                call,
                torch.empty(1, *shape),
                torch.empty(1),
                batch,
                torch.empty(1, dtype=torch.bool),
            )
            return 3 * counter.get_total_flops()
    return None


@contextmanager
def _plain_mhla(model: nn.Module) -> Iterator[None]:
    """Let MHLA layers run in PyTorch, whose operations can be counted."""
    layers = [module for module in model.modules() if isinstance(module, MHLA)]
    configs = [layer.config for layer in layers]
    for layer, config in zip(layers, configs, strict=True):
        layer.config = replace(config, implementation="blockwise")
    try:
        yield
    finally:
        for layer, config in zip(layers, configs, strict=True):
            layer.config = config
