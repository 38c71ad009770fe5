"""Softmax attention by torch: its definition, and how its backward pass gets gradients."""

import math

import pytest
import torch
from families import FAMILIES, output
from tiny import disturb
from torch.utils._python_dispatch import TorchDispatchMode

import mhla_gen
from mhla_gen import MHLAConfig
from mhla_gen.ops.softmax import softmax_attention, with_contiguous_gradient


def tokens(*lengths, dtype=torch.float64):
    return [torch.randn(2, n, 3, 8, dtype=dtype).requires_grad_() for n in lengths]


def by_definition(query, key, value, mask):
    scores = torch.einsum("bqhd,bkhd->bhqk", query, key) / math.sqrt(query.shape[-1])
    return torch.einsum("bhqk,bkhd->bqhd", scores.masked_fill(~mask, -math.inf).softmax(-1), value)


@pytest.mark.parametrize("kind", ["all", "mask", "causal"])
def test_outputs_and_gradients_are_those_of_the_definition(kind):
    query, key, value = tokens(5, 7, 7)
    mask = torch.ones(2, 1, 5, 7, dtype=torch.bool)
    given = {}
    if kind == "mask":
        mask = torch.rand(2, 1, 5, 7) < 0.7
        mask[..., 0] = True
        given["mask"] = mask
    elif kind == "causal":
        mask = mask.tril()
        given["is_causal"] = True
    results = []
    for out in (
        softmax_attention(query, key, value, **given),
        by_definition(query, key, value, mask),
    ):
        # As a layer that joins outputs with others does: gradients are a slice.
        joined = torch.cat((out.flatten(2), torch.ones(2, 5, 4)), dim=2)
        loss = (joined * torch.linspace(-1, 1, joined[0].numel()).view(5, -1)).sum()
        results.append((out, *torch.autograd.grad(loss, (query, key, value))))
    torch.testing.assert_close(*results, rtol=1e-12, atol=1e-12)


def test_functional_gradients_and_compiled_code_are_the_same():
    query, key, value = tokens(5, 7, 7)

    def loss(query):
        return softmax_attention(query, key, value).square().sum()

    (expected,) = torch.autograd.grad(loss(query), query)
    run = torch.compile(loss, fullgraph=True, backend="aot_eager")
    (compiled,) = torch.autograd.grad(run(query), query)
    for found in (compiled, torch.func.grad(loss)(query)):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


class Gradients(TorchDispatchMode):
    """Collects how gradients of attention's outputs lie, as `[batch, seq_len, heads, dim]`."""

    def __init__(self):
        super().__init__()
        self.contiguous = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if "scaled_dot_product" in name and name.endswith("backward"):
            self.contiguous.append(args[0].transpose(1, 2).is_contiguous())
        return func(*args, **(kwargs or {}))


def gradients_of(model, inputs):
    with Gradients() as found:
        output(model.train(), inputs).square().sum().backward()
    return found.contiguous


@pytest.mark.parametrize("exact", [0, 0.3, 1])
@pytest.mark.parametrize("name", ["flux", "flux2"])
def test_gradients_of_all_layers_lie_in_one_piece(name, exact):
    """Two kinds of blocks slice different tensors; cuDNN would take one plan for both."""
    make, inputs, _, layout = FAMILIES[name]
    assert not all(gradients_of(make(), inputs())), "stock blocks no longer show what is prevented"
    model = disturb(mhla_gen.inject(make(), MHLAConfig(layout=layout, exact=exact)))
    found = gradients_of(model, inputs())
    assert found and all(found)


@pytest.mark.gpu
def test_cudnn_reads_each_gradient_as_it_lies():
    """After a plan was made for a gradient that is a slice, as FLUX's single blocks have."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    make = {"dtype": torch.bfloat16, "device": "cuda"}
    query, key, value = (
        torch.randn(1, n, 24, 128, **make).requires_grad_() for n in (512, 640, 640)
    )
    slope = torch.randn(1, 512, 15360, **make)
    found = {}
    for backend in (SDPBackend.CUDNN_ATTENTION, SDPBackend.MATH):
        with sdpa_kernel(backend):
            for width in (15360, 3072):
                out = softmax_attention(query, key, value).flatten(2)
                joined = torch.cat((out, out.new_ones(1, 512, width - 3072)), dim=2)
                loss = (joined * slope[..., :width]).sum()
                found[backend, width] = torch.autograd.grad(loss, (query, key, value))
    for width in (15360, 3072):
        for got, expected in zip(
            found[SDPBackend.CUDNN_ATTENTION, width], found[SDPBackend.MATH, width], strict=True
        ):
            # A few roundings to bfloat16 of what is summed; a wrong layout is wrong by all of it.
            assert (got - expected).norm() < 0.03 * expected.norm()


def test_without_gradients_nothing_is_added():
    (out,) = tokens(3)
    with torch.no_grad():
        assert with_contiguous_gradient(out) is out
