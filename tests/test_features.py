"""Focused linear attention and MALA as kinds of MHLA, against their float64 definitions."""

import contextlib

import pytest
import torch
from families import FAMILIES, run
from tiny import disturb
from torch.overrides import TorchFunctionMode

import mhla_gen
from mhla_gen import MHLAConfig
from mhla_gen.models.features import WHOLE_HEAD_MAPS, focused
from mhla_gen.ops import FEATURE_MAPS

GRID, HEADS, DIM = (5, 7), 2, 8


def layer(**options):
    settings = {"layout": (1, 1), "conv": False, "gate": False, "eps": 0.0}
    return mhla_gen.MHLA(HEADS, DIM, HEADS * DIM, MHLAConfig(**settings | options)).double()


def tokens():
    return [x.requires_grad_() for x in torch.randn(3, 2, 35, HEADS, DIM, dtype=torch.float64)]


def compared(model, defined):
    inputs = tokens()
    learned = [*inputs, *model.parameters()]
    hidden = torch.zeros(2, 35, HEADS * DIM, dtype=torch.float64)
    out = model(*inputs, hidden, GRID)
    expected = defined(*(x.transpose(1, 2) for x in inputs)).transpose(1, 2).flatten(2)
    torch.testing.assert_close(out, expected)
    seed = torch.randn_like(out)
    options = {"allow_unused": True, "materialize_grads": True}
    got = torch.autograd.grad(out, learned, seed, retain_graph=True)
    wanted = torch.autograd.grad(expected, learned, seed, **options)
    # With one block the mixing matrix is a factor that the denominator takes out again.
    torch.testing.assert_close(got[:3], wanted[:3])


class WideAsOnCuda(TorchFunctionMode):
    """Widens what autocast computes in float32 on CUDA, but not on a CPU."""

    NAMES = ("softmax", "softplus", "pow", "__pow__", "exp", "expm1", "norm", "rms_norm", "rsqrt")

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func.__name__ in self.NAMES:
            args = [
                x.float() if isinstance(x, torch.Tensor) and x.dtype == torch.bfloat16 else x
                for x in args
            ]
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("exact", [0.0, 0.3])
@pytest.mark.parametrize("feature_map", [*FEATURE_MAPS, *WHOLE_HEAD_MAPS])
def test_layers_keep_the_dtype_of_autocast(feature_map, exact, device):
    config = MHLAConfig(
        layout=(2, 2), feature_map=feature_map, learned_features=True, output_norm=True,
        magnitude=True, exact=exact,
    )  # fmt: skip
    model = mhla_gen.MHLA(HEADS, DIM, HEADS * DIM, config).to(device)
    tensors = torch.randn(3, 2, 35, HEADS, DIM, device=device, dtype=torch.bfloat16)
    wide = WideAsOnCuda() if device == "cpu" else contextlib.nullcontext()
    with torch.autocast(device, torch.bfloat16), wide:
        out = model(*tensors, tensors[0].flatten(2), GRID)
    assert out.dtype == torch.bfloat16
    out.float().square().sum().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_focused_linear_attention_equals_its_definition():
    def phi(x):
        r = x.clamp_min(0) + 1e-6
        return r**3 * r.norm(dim=-1, keepdim=True) / (r**3).norm(dim=-1, keepdim=True)

    def defined(q, k, v):
        weights = phi(q) @ phi(k).mT
        return weights / weights.sum(-1, keepdim=True) @ v

    compared(layer(feature_map="focused"), defined)


def test_mala_equals_its_definition():
    def phi(x):
        return torch.where(x > 0, x + 1, x.exp())

    def defined(q, k, v):
        scale = DIM**-0.5 / q.shape[2]
        products = scale * phi(q) @ phi(k).mT
        total = products.sum(-1, keepdim=True)
        weights = (1 + 1 / total) * products - total / q.shape[2]
        torch.testing.assert_close(weights.sum(-1), torch.ones_like(weights[..., 0]))
        return weights @ v

    compared(layer(feature_map="elu+1", magnitude=True), defined)


def test_elu_plus_one_is_positive_everywhere_and_smooth_at_zero():
    x = torch.tensor([-80.0, -20.0, -0.5, 0.0, 0.5, 1e30], requires_grad=True)
    found = FEATURE_MAPS["elu+1"](x)
    (slope,) = torch.autograd.grad(found.sum(), x)
    assert (found > 0).all() and found[-1] == 1e30
    exact = x.detach().double().clamp(max=0).exp()
    torch.testing.assert_close(slope.double(), exact, rtol=1e-6, atol=0)
    torch.testing.assert_close(found[:4].double(), exact[:4], rtol=1e-6, atol=0)
    assert found[4] == 1.5


def test_focused_keeps_the_length_and_stands_any_scale():
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        x = torch.tensor([[-3.0, -1, -2, -5], [1e-3, 2e-3, 0, -1], [50, 20, -10, 1]], dtype=dtype)
        out = focused(x)
        assert out.isfinite().all() and out.dtype == dtype
        length = (x.double().clamp_min(0) + 1e-6).norm(dim=-1)
        torch.testing.assert_close(out.double().norm(dim=-1), length, rtol=2e-2, atol=1e-6)


@pytest.mark.parametrize(
    "options", [{"feature_map": "focused"}, {"feature_map": "elu+1", "magnitude": True}], ids=str
)
@pytest.mark.parametrize("name", ["dit", "wan"])
def test_models_save_load_and_restore(name, options, tmp_path):
    make, make_inputs, mhla_class, layout = FAMILIES[name]
    model, inputs = make(), make_inputs()
    before = run(model, inputs)
    mhla_gen.inject(model, MHLAConfig(layout=layout, **options))
    for parameter_name, parameter in model.named_parameters():
        if ".mhla." in parameter_name:
            parameter.data.add_(0.1 * torch.rand_like(parameter))
    assert not torch.equal(run(model, inputs), before)
    model.save_pretrained(tmp_path)
    assert torch.equal(run(mhla_class.from_pretrained(tmp_path), inputs), run(model, inputs))
    mhla_gen.restore(model)
    assert torch.equal(run(model, inputs), before)


def test_magnitude_is_refused_where_it_means_nothing():
    with pytest.raises(ValueError, match="magnitude needs normalize=true"):
        MHLAConfig(magnitude=True, normalize=False)
    for options in ({"exact": 1.0}, {"exact": 0.2, "linear": False}):
        with pytest.raises(ValueError, match="magnitude needs MHLA's half"):
            MHLAConfig(magnitude=True, **options)
    model = mhla_gen.inject(FAMILIES["dit"][0](), MHLAConfig(layout=(2, 2), magnitude=True))
    disturb(model)
    child = next(module for module in model.modules() if isinstance(module, mhla_gen.MHLA))
    q, k, v = torch.randn(3, 1, 16, 2, 8)
    with pytest.raises(ValueError, match=r"magnitude=true cannot share"):
        child(q, k, v, q.flatten(2), (4, 4), group=object())
