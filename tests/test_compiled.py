"""What inductor makes of the operators in a compiled block."""

import re

import pytest
import torch
import torch.nn.functional as F
from torch._inductor.utils import fresh_cache, run_fw_bw_and_get_code

from mhla_gen.ops import depthwise_conv, mhla

GRID = (4, 6)
CHANNELS = 32


def block(hidden, projections, mixing, weight, bias, *, conv):
    query, key, value = (F.linear(hidden, each).unflatten(2, (2, -1)) for each in projections)
    options = {"grid": GRID, "layout": (2, 2), "implementation": "fused"}
    out = mhla(query, key, value, mixing, **options).flatten(2)
    return out + depthwise_conv(value.flatten(2), weight, bias, grid=GRID, implementation=conv)


def compiled_code(conv):
    """Code of the forward and of the backward pass."""
    inputs = [torch.randn(2, 24, CHANNELS), torch.randn(3, CHANNELS, CHANNELS), torch.rand(4, 4)]
    inputs += [torch.randn(CHANNELS, 1, 3, 3), torch.randn(CHANNELS)]
    inputs = [x.requires_grad_() for x in inputs]
    compiled = torch.compile(block, fullgraph=True)
    with fresh_cache():
        result, codes = run_fw_bw_and_get_code(lambda: compiled(*inputs, conv=conv))
    expected = block(*inputs, conv=conv)
    torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-4)
    return codes


def copied(code, operator, start):
    """Tensors from the one at `start` on that an operator reads from no product, input or view."""
    (arguments,) = re.findall(rf"mhla_gen\.{operator}\.default\((.*)\)", code)
    read = re.findall(r"\b(?:buf\d+|[a-z]\w*_\d+)\b", arguments.split("None")[0])
    products = re.findall(r"extern_kernels\.\w+\(.*out=(buf\d+)\)", code)
    return [name for name in read[start:] if name.startswith("buf") and name not in products]


@pytest.mark.slow
@pytest.mark.parametrize("conv", ["fused", "torch"])
def test_tokens_are_read_where_projections_leave_them(conv):
    forward, backward = compiled_code(conv)
    # torch's convolution asks for channels last, and inductor gives that to all tensors of 4 axes.
    found = copied(forward, "attention_mhla", 0) + copied(backward, "attention_mhla_backward", 1)
    assert bool(found) == (conv == "torch"), found
