"""Output gates of every kind, and linear layers that are computed in one product."""

import math

import pytest
import torch
import torch.nn.functional as F
from functorch.compile import make_boxed_func
from tiny import tiny_dit, tiny_wan
from tiny_joint import tiny_flux
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch.utils._python_dispatch import TorchDispatchMode

import mhla_gen
from mhla_gen import LinformerConfig, MHLAConfig
from mhla_gen.models.projections import products

GATES = [True, "head", 3]


class CountProducts(TorchDispatchMode):
    """How many matrix products of linear layers run."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func.overloadpacket in (torch.ops.aten.addmm, torch.ops.aten.mm)
        return func(*args, **(kwargs or {}))


def layer(gate, **options):
    config = MHLAConfig(layout=(2, 1), conv=False, gate=gate, **options)
    return mhla_gen.MHLA(2, 5, 7, config).double()


def inputs(seq_len=6):
    query, key, value = (torch.randn(2, seq_len, 2, 5).double() for _ in range(3))
    return query, key, value, torch.randn(2, seq_len, 7).double()


def randomised(module):
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_()
    return module


def factors(gate, hidden):
    """The definition: SiLU of the gate's linear map, `[batch, seq_len, channels]`."""
    if hasattr(gate, "up"):
        logits = hidden @ gate.down.weight.T @ gate.up.weight.T + gate.up.bias
    else:
        logits = hidden @ gate.weight.T + gate.bias
    if logits.shape[-1] == 2:
        logits = logits.repeat_interleave(5, dim=-1)
    return logits / (1 + torch.exp(-logits))


@pytest.mark.parametrize("setting", GATES)
def test_a_gate_is_silu_of_a_map_of_the_input(setting):
    gated, plain = randomised(layer(setting)), layer(False)
    plain.load_state_dict({k: v for k, v in gated.state_dict().items() if "gate" not in k})
    given = [x.requires_grad_() for x in inputs()]
    trained = [*given, *gated.gate.parameters()]
    actual = gated(*given, (3, 2))
    expected = plain(*given, (3, 2)) * factors(gated.gate, given[3])
    torch.testing.assert_close(actual, expected)
    direction = torch.randn_like(actual)
    for a, e in zip(
        torch.autograd.grad(actual, trained, direction),
        torch.autograd.grad(expected, trained, direction),
        strict=True,
    ):
        torch.testing.assert_close(a, e)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("setting", GATES)
def test_every_gate_starts_at_exactly_one(setting, dtype):
    gated, plain = layer(setting).to(dtype), layer(False).to(dtype)
    given = [x.to(dtype) for x in inputs()]
    assert torch.equal(gated(*given, (3, 2)), plain(*given, (3, 2)))


@pytest.mark.parametrize("setting", GATES)
def test_every_gate_learns(setting):
    gated = layer(setting)
    optimizer = torch.optim.SGD(gated.gate.parameters(), lr=0.1)
    starts = [p.detach().clone() for p in gated.gate.parameters()]
    for _ in range(2):
        gated(*inputs(), (3, 2)).square().sum().backward()
        optimizer.step()
    # The first factor of a low-rank gate moves once the second one has.
    assert all(
        not torch.equal(p, start) for p, start in zip(gated.gate.parameters(), starts, strict=True)
    )


def test_gates_have_the_size_that_is_asked_for():
    count = {s: sum(p.numel() for p in layer(s).gate.parameters()) for s in GATES}
    assert count == {True: 7 * 10 + 10, "head": 7 * 2 + 2, 3: 7 * 3 + 3 * 10 + 10}


@pytest.mark.parametrize("setting", ["head", 3])
@pytest.mark.parametrize("make", [tiny_dit, tiny_wan])
def test_a_converted_model_starts_as_without_a_gate_and_is_restored(make, setting, tmp_path):
    base = make()
    weights = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    rank = 2 if make is tiny_dit else 3
    config = MHLAConfig(layout=(2, 2, 2)[-rank:], gate=setting)
    model = mhla_gen.inject(base, config)
    assert model.mhla_config.gate == setting
    gates = [m.gate for m in model.modules() if isinstance(m, mhla_gen.MHLA)]
    for gate in gates:
        randomised(gate)
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    assert again.mhla_config == model.mhla_config
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name
    restored = mhla_gen.restore(model)
    assert {n: t.tolist() for n, t in restored.state_dict().items()} == {
        n: t.tolist() for n, t in weights.items()
    }


@pytest.mark.parametrize("wrong", [0, -1, 2.5, "full", None, "3"])
@pytest.mark.parametrize("config", [MHLAConfig, LinformerConfig])
def test_other_settings_of_a_gate_are_refused(config, wrong):
    with pytest.raises(ValueError, match="true, false, head or its rank"):
        config(gate=wrong)


def test_linformer_has_the_same_gates():
    config = LinformerConfig(projected_len=2, grid=(3, 2), conv=False, gate="head")
    gated = mhla_gen.models.linformer.Linformer(2, 5, 7, config).double()
    plain = gated(*inputs(), (3, 2))
    gated.gate.bias.data.fill_(math.inf)
    assert torch.isfinite(plain).all() and not torch.isfinite(gated(*inputs(), (3, 2))).any()


@pytest.mark.parametrize("biases", [(True, True, True), (False,) * 3, (True, False, True)])
@pytest.mark.parametrize("sizes", [(3, 5, 4), (64, 32, 32)])
def test_one_product_equals_several(sizes, biases):
    layers = [nn.Linear(6, n, bias).double() for n, bias in zip(sizes, biases, strict=True)]
    given = torch.randn(2, 5, 6).double().requires_grad_()
    with CountProducts() as counted:
        actual = products(layers, given)
    assert counted.count == 1
    expected = [each(given) for each in layers]
    trained = [given, *(p for each in layers for p in each.parameters())]
    directions = [torch.randn_like(e) for e in expected]
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e)
    for a, e in zip(
        torch.autograd.grad(actual, trained, directions),
        torch.autograd.grad(expected, trained, directions),
        strict=True,
    ):
        torch.testing.assert_close(a, e)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("used", [[1], [0, 2], []])
def test_outputs_that_are_not_used_have_no_gradient(used, compiled):
    layers = [nn.Linear(6, size).double() for size in (3, 5, 4)]
    given = torch.randn(2, 6).double().requires_grad_()

    def joined(given):
        return products(layers, given)

    run = torch.compile(joined, fullgraph=True, backend="aot_eager") if compiled else joined
    losses = [
        sum((outputs[index].square().sum() for index in used), given.sum())
        for outputs in (run(given), [layer(given) for layer in layers])
    ]
    trained = [given, *(p for layer in layers for p in layer.parameters())]
    gradients = [torch.autograd.grad(loss, trained, materialize_grads=True) for loss in losses]
    for actual, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(actual, expected)


def test_one_product_has_second_derivatives():
    layers = [nn.Linear(3, size).double() for size in (2, 3)]
    given = torch.randn(2, 3).double().requires_grad_()

    def cubes(given):
        return torch.cat(products(layers, given), dim=-1) ** 3

    assert torch.autograd.gradgradcheck(cubes, given)
    per_row = torch.vmap(torch.func.jacrev(cubes))(given)
    whole = torch.autograd.functional.jacobian(cubes, given)
    torch.testing.assert_close(per_row, torch.stack([whole[i, :, i] for i in range(2)]))


def test_compiled_code_puts_gradients_side_by_side():
    called = []

    def keep(graph, _):
        called.extend(node.target for node in graph.graph.nodes)
        return make_boxed_func(graph)

    layers = [nn.Linear(3, size) for size in (2, 3)]
    backend = aot_autograd(fw_compiler=keep, bw_compiler=keep)
    run = torch.compile(lambda x: products(layers, x), fullgraph=True, backend=backend)
    torch.cat(run(torch.randn(2, 3)), dim=-1).sum().backward()
    assert torch.ops.mhla_gen.join_columns.default in called


class Doubled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def hooked():
    layer = nn.Linear(6, 3)
    layer.register_forward_hook(lambda module, args, out: 2 * out)
    return layer


def replaced():
    layer = nn.Linear(6, 3)
    layer.forward = lambda x: 2 * F.linear(x, layer.weight, layer.bias)
    return layer


def half_trained():
    layer = nn.Linear(6, 3)
    layer.weight.requires_grad_(False)
    return layer


@pytest.mark.parametrize("make", [lambda: Doubled(6, 3), hooked, replaced, half_trained])
def test_layers_that_are_not_plain_are_called(make):
    layers = [nn.Linear(6, 3), make()]
    given = torch.randn(2, 6)
    with CountProducts() as counted:
        actual = products(layers, given)
    assert counted.count == 2
    for a, each in zip(actual, layers, strict=True):
        assert torch.equal(a, each(given))


@pytest.mark.parametrize("gate", [False, *GATES])
@pytest.mark.parametrize("exact", [0.0, 0.5])
def test_queries_keys_values_and_gates_are_one_product(gate, exact):
    model = mhla_gen.inject(tiny_dit(), MHLAConfig(layout=(2, 2), gate=gate, exact=exact))
    attention = model.transformer_blocks[0].attn1
    hidden = torch.randn(2, 16, attention.to_q.in_features)
    with CountProducts() as counted:
        attention(hidden)
    # The output projection; the second factor of a gate.
    assert counted.count == 2 + (gate == 3)


def test_image_tokens_of_a_joint_layer_are_one_product():
    model = mhla_gen.inject(tiny_flux(), MHLAConfig(layout=(2, 2), gate="head"))
    attention = model.transformer_blocks[0].attn
    image, text = (torch.randn(1, n, attention.to_q.in_features) for n in (24, 5))
    with CountProducts() as counted:
        attention(image, text, image_rotary_emb=None, grid=(4, 6))
    # Of the text three, and an output projection each.
    assert counted.count == 1 + 3 + 2


def test_adapters_of_projections_count():
    peft = pytest.importorskip("peft")
    model = mhla_gen.inject(tiny_dit(), MHLAConfig(layout=(2, 2)))
    attention = model.transformer_blocks[0].attn1
    hidden = torch.randn(2, 16, attention.to_q.in_features)
    before = attention(hidden)
    model.add_adapter(
        peft.LoraConfig(r=2, target_modules=["to_k", "mhla.gate"], init_lora_weights=False)
    )
    assert not torch.allclose(attention(hidden), before)
    model.disable_adapters()
    torch.testing.assert_close(attention(hidden), before)
