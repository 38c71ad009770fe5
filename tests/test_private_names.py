"""Names that torch and Triton may change: each is broken here, and the result stays."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from mhla_gen.ops import fused, mhla
from mhla_gen.ops.kernels import compiled

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


class Counted(TorchDispatchMode):
    """Counts the calls of our operators that the dispatcher sees."""

    def __init__(self):
        super().__init__()
        self.calls = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls += str(func).startswith("mhla_gen.")
        return func(*args, **kwargs or {})


def attend(seq_len=12):
    torch.manual_seed(0)
    query, key, value = torch.randn(3, 1, seq_len, 2, 16, device=DEVICE)
    options = {"grid": (seq_len,), "layout": (2,), "implementation": "fused"}
    return mhla(query, key, value, torch.rand(2, 2, device=DEVICE), **options)


@pytest.mark.parametrize("change", ["gone", "another signature"])
@pytest.mark.parametrize("place", ["torch._C", "torch._C._functorch"])
@pytest.mark.parametrize("seq_len", [12, 600])
def test_without_torchs_private_names_the_dispatcher_is_asked(place, change, seq_len, monkeypatch):
    expected = attend(seq_len)
    assert not fused._intercepted()
    module, name = {
        "torch._C": (torch._C, "_len_torch_dispatch_stack"),
        "torch._C._functorch": (torch._C._functorch, "maybe_current_level"),
    }[place]
    if change == "gone":
        monkeypatch.delattr(module, name)
    else:
        monkeypatch.setattr(module, name, lambda argument: 0)
    assert fused._intercepted()
    asked = []
    for operator in ("linear_mhla", "attention_mhla"):
        original = getattr(fused, operator)
        monkeypatch.setattr(
            fused, operator, lambda *args, original=original: asked.append(1) or original(*args)
        )
    assert torch.equal(attend(seq_len), expected) and asked


def test_a_mode_or_a_transform_sees_our_operators():
    expected = attend()
    with Counted() as mode:
        found = attend()
    assert mode.calls == 1 and torch.equal(found, expected)
    inside = []
    torch.func.jvp(lambda x: inside.append(fused._intercepted()) or x, (expected,), (expected,))
    assert inside == [True]


class Kernel:
    """Stands for a kernel where there is no GPU to compile one for; notes how it was launched."""

    def __init__(self, compiles=True):
        self.compiles, self.ordinary, self.direct = compiles, [], []
        if compiles:
            self.arg_names = ["x", "n", "BLOCK"]

    def __getitem__(self, grid):
        def run(*args, **constants):
            self.ordinary.append((grid, args, constants))
            return Compiled(self)

        return run


class Compiled:
    def __init__(self, kernel):
        self.kernel = kernel

    def __getitem__(self, grid):
        return lambda *args: self.kernel.direct.append((grid, args))


def launches(kernel, count=3):
    x = torch.zeros(64)
    for _ in range(count):
        compiled.launch(kernel, (5,), [x], (64,), {"BLOCK": 16, "num_warps": 4})
    return len(kernel.ordinary), len(kernel.direct)


def test_a_kernel_is_launched_directly_from_the_second_time_on():
    kernel = Kernel()
    assert launches(kernel) == (1, 2)
    grid, (x, *rest) = kernel.direct[0]
    assert grid == (5, 1, 1) and x.shape == (64,) and rest == [64, 16]


@pytest.mark.parametrize("error", [TypeError, AttributeError])
def test_without_tritons_private_names_launches_are_ordinary(error, monkeypatch):
    def fail(self, grid):
        raise error("a release that launches otherwise")

    monkeypatch.setattr(Compiled, "__getitem__", fail)
    assert launches(Kernel()) == (3, 0)


def test_a_kernel_without_names_of_its_arguments_is_launched_ordinarily():
    assert launches(Kernel(compiles=False)) == (3, 0)


@pytest.mark.gpu
def test_broken_direct_launches_on_a_gpu_change_nothing(monkeypatch):
    from triton.compiler import CompiledKernel

    expected = attend(600)
    assert compiled._COMPILED
    monkeypatch.setattr(
        CompiledKernel, "__getitem__", lambda self, grid: (_ for _ in ()).throw(TypeError("other"))
    )
    for _ in range(2):
        assert torch.equal(attend(600), expected)
    assert None in compiled._COMPILED.values()
    compiled._COMPILED.clear()
