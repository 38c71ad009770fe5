"""GELU in the matrix product before it."""

import functools

import pytest
import torch
from tiny import CountsForms, dit_inputs, tiny_dit, tiny_wan, wan_inputs
from torch.nn.functional import gelu, linear

from mhla_gen.runtime import linear_gelu as joined
from mhla_gen.runtime.compiling import compile_blocks

OPERATOR = torch.ops.mhla_gen.linear_gelu.default


def make_inputs(dtype, device="cpu"):
    sizes = (2, 5, 24), (40, 24), (40,)
    return tuple(torch.randn(*size, dtype=dtype, device=device) for size in sizes)


def test_the_operator_is_a_product_and_gelu():
    inputs = make_inputs(torch.float64)
    expected = gelu(linear(*inputs), approximate="tanh")
    torch.testing.assert_close(joined.linear_gelu(*inputs), expected)
    torch.library.opcheck(OPERATOR, make_inputs(torch.float32))


@pytest.fixture
def compiled(monkeypatch):
    """Compiles a model, of which torch generates no code, and joins on the CPU, too."""
    torch._dynamo.reset()
    counter = CountsForms()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=counter))

    def compiled(model):
        joined.join_gelu(model, ["cpu"])
        compile_blocks(model)
        return counter

    return compiled


def joins(counter):
    nodes = (node for graph in counter.graphs for node in graph.graph.nodes)
    return sum(node.target in (OPERATOR, OPERATOR.overloadpacket) for node in nodes)


@pytest.mark.parametrize(("make", "inputs"), [(tiny_dit, dit_inputs), (tiny_wan, wan_inputs)])
def test_compiled_blocks_without_gradients_join_gelu(make, inputs, compiled):
    model, batch = make(num_layers=1).eval(), inputs()
    with torch.no_grad():
        expected = model(**batch, return_dict=False)[0]
    counter = compiled(model)
    with torch.no_grad():
        torch.testing.assert_close(model(**batch, return_dict=False)[0], expected)
    assert joins(counter) == 1
    # Backward needs what GELU reads.
    model(**batch, return_dict=False)[0].square().mean().backward()
    assert joins(counter) == 1


class Adapted(torch.nn.Linear):
    """As an adapter's layer."""


@pytest.mark.parametrize(
    "change", [None, "hook", "class", "dtype", "autocast", "gradients", "device"]
)
def test_only_plain_layers_join(change, monkeypatch):
    calls = []
    monkeypatch.setattr(joined, "linear_gelu", lambda x, *_: calls.append(1) or x)
    model = tiny_dit(num_layers=1)
    joined.join_gelu(model, ["cuda" if change == "device" else "cpu"])
    module = model.transformer_blocks[0].ff.net[0]
    if change == "hook":
        module.proj.register_forward_hook(lambda *_: None)
    elif change == "class":
        module.proj.__class__ = Adapted
    elif change == "dtype":
        module.proj.double()
        module.proj.forward = lambda x: x
    elif change == "autocast":
        monkeypatch.setattr(torch, "is_autocast_enabled", lambda *_: True)
    with torch.set_grad_enabled(change == "gradients"):
        module(torch.randn(2, 4, module.proj.in_features))
    assert calls == [1] * (change is None)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_operator_on_a_gpu(dtype):
    inputs = make_inputs(dtype, "cuda")
    expected = gelu(linear(*(x.double() for x in inputs)), approximate="tanh")
    actual = joined.linear_gelu(*inputs).double()
    assert (actual - expected).norm() < 4 * torch.finfo(dtype).eps * expected.norm()
