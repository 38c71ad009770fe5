"""The fused kernels against the float64 definition: through Triton's interpreter without a GPU.

The interpreter multiplies bfloat16 wrongly, so bfloat16 is tested on a GPU only; its two forms of
storage (float16 summaries with scales, or float32 ones) run here with float16 inputs.
"""

import math

import pytest
import tiny
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from mhla_gen import MHLAConfig, inject
from mhla_gen.ops import fused as fused_module
from mhla_gen.ops import (
    fused_limits,
    linear_attention,
    locality_mixing,
    mhla,
    resolve_implementation,
)
from mhla_gen.ops.blockwise import blockwise_mhla
from mhla_gen.ops.fused import fused_mhla
from mhla_gen.ops.naive import naive_mhla

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.float16] + [torch.bfloat16] * torch.cuda.is_available()
# float32 errors below this are a matter of the order of summation, for either implementation: there
# are sums of up to 300 tokens and of 72 channels, one after the other, and the rounding of n
# additions is about sqrt(n) * 1e-7.
ROUNDING = {torch.float32: 3e-6, torch.float16: 0.0, torch.bfloat16: 0.0}


def make(
    grid,
    layout,
    dtype=torch.float32,
    *,
    heads=2,
    head_dim=16,
    value_dim=16,
    batch=1,
    per_head=False,
    rotary=True,
    **options,
):
    """Inputs as views of one projection, and the options of a call."""
    seq_len, num_blocks = math.prod(grid), math.prod(layout)
    projected = torch.randn(
        batch, seq_len, heads, 2 * head_dim + value_dim, dtype=dtype, device=DEVICE
    )
    q, k, v = projected.split([head_dim, head_dim, value_dim], dim=-1)
    tables = None
    if rotary:
        angles = 6 * torch.rand(seq_len, head_dim // 2, device=DEVICE)
        tables = angles.cos(), angles.sin()
    defaults = {"feature_map": "relu", "normalize": True, "causal": False, "eps": 1e-6}
    options = defaults | {"grid": grid, "layout": layout, "rotary": tables} | options
    return (
        q,
        k,
        v,
        torch.rand(*(heads,) * per_head, num_blocks, num_blocks, device=DEVICE),
    ), options


def outputs_and_gradients(function, inputs, options, dtype=None):
    """Output and all four gradients, computed from the inputs in `dtype`."""
    options = dict(options)
    if dtype is not None:
        inputs = [x.to(dtype) for x in inputs]
        if options["rotary"] is not None:
            options["rotary"] = tuple(table.to(dtype) for table in options["rotary"])
    inputs = [x.detach().requires_grad_() for x in inputs]
    out = function(*inputs, **options)
    generator = torch.Generator().manual_seed(1)
    grad = torch.randn(out.shape, generator=generator).to(out)
    # What blockwise and the kernels get is rounded; the definition gets the same numbers.
    grad = grad.to(torch.bfloat16).to(out.dtype)
    return out, *torch.autograd.grad(out, inputs, grad)


def errors(actual, expected):
    return [
        ((a.double() - e).norm() / e.norm()).item() for a, e in zip(actual, expected, strict=True)
    ]


def assert_accurate(inputs, options, **form):
    """At most twice the error of blockwise in the same dtype.

    The gradient of a float32 mixing matrix holds what 16-bit products of its inputs leave.
    """
    dtype = inputs[0].dtype
    expected = outputs_and_gradients(naive_mhla, inputs, options, torch.float64)
    blockwise = errors(outputs_and_gradients(blockwise_mhla, inputs, options), expected)
    actual = errors(outputs_and_gradients(fused_mhla, inputs, options | form), expected)
    for found, allowed in zip(actual[:4], blockwise[:4], strict=True):
        assert found <= 2 * max(allowed, ROUNDING[dtype]), (actual, blockwise)
    # Where weights are normalised, scaling all of a matrix changes nothing: its gradient is what is
    # left of terms that cancel, and float32 is off by 2e-5 of that in either implementation.
    cancels = dtype == torch.float32 and options["normalize"]
    rounding = 1e-4 if cancels else max(torch.finfo(dtype).eps, ROUNDING[dtype])
    assert actual[4] <= 2 * max(rounding, blockwise[4])


@pytest.fixture
def poisoned():
    """Fresh memory holds NaN, so that an element nobody wrote is found."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


FORMS = pytest.mark.parametrize("attention_form", [False, True], ids=["linear", "attention"])


@FORMS
@pytest.mark.parametrize("dtype", DTYPES)
def test_ragged_video_with_rotary(poisoned, dtype, attention_form):
    inputs, options = make((3, 5, 7), (2, 2, 3), dtype)
    assert_accurate(inputs, options, use_attention_form=attention_form)


@FORMS
@pytest.mark.parametrize(
    ("feature_map", "head_dim", "value_dim", "changes"),
    [
        ("softplus", 36, 20, {"per_head": True}),
        ("elu+1", 20, 36, {"rotary": False}),
        ("squared_relu", 16, 24, {"normalize": False}),
        ("identity", 24, 16, {"normalize": False, "per_head": True}),
    ],
)
def test_options(poisoned, feature_map, head_dim, value_dim, changes, attention_form):
    inputs, options = make(
        (5, 7), (2, 3), head_dim=head_dim, value_dim=value_dim, feature_map=feature_map, **changes
    )
    assert_accurate(inputs, options, use_attention_form=attention_form)


@FORMS
@pytest.mark.parametrize("rotary", [False, True])
def test_sequences_of_whole_tiles(poisoned, rotary, attention_form):
    inputs, options = make((8, 16), (2, 2), head_dim=20, value_dim=20, heads=1, rotary=rotary)
    assert_accurate(inputs, options, use_attention_form=attention_form)


@pytest.mark.parametrize("rotary", [False, True])
def test_blocks_longer_than_a_tile_of_pieces(rotary):
    sizes = {"heads": 1, "head_dim": 72, "value_dim": 72, "rotary": rotary}
    inputs, options = make((9, 16), (1, 2), torch.float16, **sizes)
    expected = outputs_and_gradients(naive_mhla, inputs, options, torch.float64)
    form = {"use_attention_form": False, "stored": torch.float16}
    actual = outputs_and_gradients(fused_mhla, inputs, options | form)
    # Operands are rounded to float16 once or twice, by half of its eps; eight times that.
    assert max(errors(actual, expected)) < 8 * torch.finfo(torch.float16).eps


# Of the second piece of a value, 33 and 65 channels use one column; 79 leave one, and 80 none.
@pytest.mark.parametrize(
    ("head_dim", "value_dim", "rotary"),
    [
        (36, 33, False),
        (16, 65, False),
        (16, 79, False),
        (16, 80, False),
        (72, 72, False),
        # Key sums are not of the rotated features.
        (72, 72, True),
    ],
)
def test_key_sums_in_a_spare_column(poisoned, head_dim, value_dim, rotary):
    # Blocks are not full, and φ(0) is not 0.
    sizes = {"heads": 1, "head_dim": head_dim, "value_dim": value_dim}
    inputs, options = make(
        (5, 7), (2, 3), torch.float16, **sizes, rotary=rotary, feature_map="elu+1"
    )
    expected = outputs_and_gradients(naive_mhla, inputs, options, torch.float64)
    form = {"use_attention_form": False, "stored": torch.float16}
    actual = outputs_and_gradients(fused_mhla, inputs, options | form)
    # As above, with more room: a token too many in a sum is off by a tenth.
    assert max(errors(actual, expected)) < 32 * torch.finfo(torch.float16).eps


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_half_precision_scores_take_any_mixing(scale):
    inputs, options = make((8, 16), (2, 2), torch.float16, heads=1)
    inputs = *inputs[:3], inputs[3] * scale
    form = {"use_attention_form": True, "stored": torch.float16}
    options["eps"] = 0.0
    expected = outputs_and_gradients(naive_mhla, inputs, options, torch.float64)
    actual = outputs_and_gradients(fused_mhla, inputs, options | form)
    # Gradients of queries, keys and values need bfloat16's range where mixing is far from 1.
    some = 4 if scale == 1.0 else 1
    assert max(errors(actual[:some], expected[:some])) < 8 * torch.finfo(torch.float16).eps


@pytest.mark.parametrize("scale", [1e-6, 1.0, 300.0])
def test_float16_summaries_neither_overflow_nor_vanish(scale):
    inputs, options = make((5, 7), (2, 3), torch.float16, normalize=False)
    q, k, v, mixing = inputs
    inputs = q, (k * 0.1).half(), (v * scale).half(), mixing
    expected = outputs_and_gradients(naive_mhla, inputs, options, torch.float64)
    form = {"use_attention_form": False, "stored": torch.float16}
    actual = outputs_and_gradients(fused_mhla, inputs, options | form)
    # Operands are rounded to float16 once or twice, by half of its eps; eight times that. What
    # overflows or vanishes is off by all there is.
    few = 8 * torch.finfo(torch.float16).eps
    assert errors(actual[:1], expected[:1])[0] < (0.05 if scale < 1 else few)
    assert errors(actual[3:4], expected[3:4])[0] < few


def test_one_long_block_is_cut_into_parts(poisoned):
    inputs, options = make((300,), (1,), heads=1, rotary=False, normalize=False)
    assert_accurate(inputs, options, use_attention_form=False)
    q, k, v, _ = inputs
    expected = linear_attention(q, k, v, implementation="blockwise")
    if DEVICE == "cuda":
        actual = linear_attention(q, k, v, implementation="fused")
        torch.testing.assert_close(actual, expected)


@FORMS
def test_repeated_runs_are_bit_equal(attention_form):
    inputs, options = make((4, 9), (2, 2), torch.float16)
    options["use_attention_form"] = attention_form
    first = outputs_and_gradients(fused_mhla, inputs, options)
    second = outputs_and_gradients(fused_mhla, inputs, options)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@FORMS
def test_opcheck(attention_form):
    (q, k, v, mixing), options = make((6,), (2,), heads=1)
    inputs = [x.detach().clone().requires_grad_() for x in (q, k, v, mixing)]
    operator = fused_module.attention_mhla if attention_form else fused_module.linear_mhla
    cos, sin = options["rotary"]
    arguments = (*inputs, cos, sin, [6], [2], "relu", True, 1e-6, torch.float32)
    torch.library.opcheck(operator, arguments)


@FORMS
def test_operators_are_seen_by_whoever_watches(attention_form):
    inputs, options = make((6,), (2,), heads=1)
    options["use_attention_form"] = attention_form
    name = "mhla_gen.attention_mhla" if attention_form else "mhla_gen.linear_mhla"
    seen = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            seen.append(str(function))
            return function(*args, **(kwargs or {}))

    with torch.no_grad():
        alone = fused_mhla(*inputs, **options)
        with Watch():
            watched = fused_mhla(*inputs, **options)
    assert torch.equal(alone, watched)
    assert f"{name}.default" in seen
    trained = fused_mhla(*(x.detach().requires_grad_() for x in inputs), **options)
    assert torch.equal(trained, alone) and trained.requires_grad


@FORMS
def test_frozen_mixing_has_no_gradient(attention_form):
    inputs, options = make((4, 5), (2, 2))
    options["use_attention_form"] = attention_form
    *expected, _ = outputs_and_gradients(fused_mhla, inputs, options)
    tokens = [x.detach().requires_grad_() for x in inputs[:3]]
    out = fused_mhla(*tokens, inputs[3], **options)
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    gradients = torch.autograd.grad(out, tokens, grad.to(out).bfloat16().to(out.dtype))
    assert all(torch.equal(a, e) for a, e in zip((out, *gradients), expected, strict=True))


def assert_compiles(tensors, **options):
    def attend(*tensors):
        return mhla(*tensors, **options)

    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    for run in (attend, compiled):
        inputs = [x.detach().clone().requires_grad_() for x in tensors]
        out = run(*inputs)
        gradients = torch.autograd.grad(out.square().sum(), inputs)
        if run is attend:
            expected = out, *gradients
    for actual, reference in zip((out, *gradients), expected, strict=True):
        torch.testing.assert_close(actual, reference)
    with torch.no_grad():
        torch.testing.assert_close(compiled(*tensors), attend(*tensors))


def test_compiles_into_one_graph():
    tensors, _ = make((4, 5), (2, 2))
    assert_compiles(tensors, grid=(4, 5), layout=(2, 2), implementation="fused")


def test_activation_checkpointing():
    inputs, options = make((4, 5), (2, 2))
    expected = outputs_and_gradients(fused_mhla, inputs, options)

    def attend(*inputs, **options):
        return checkpoint(lambda *x: fused_mhla(*x, **options), *inputs, use_reentrant=False)

    actual = outputs_and_gradients(attend, inputs, options)
    assert all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True))


@pytest.mark.parametrize("family", ["dit", "wan"])
def test_models_run_with_the_kernels(family):
    if family == "dit":
        model, inputs = tiny.tiny_dit(num_layers=1), tiny.dit_inputs(side=5, batch=1)
    else:
        model = tiny.tiny_wan(num_layers=1)
        inputs = tiny.wan_inputs(frames=2, height=6, width=10)
    inputs = {name: x.to(DEVICE) for name, x in inputs.items()}
    outputs = []
    state = None
    for implementation in ("blockwise", "fused"):
        layout = (2, 2) if family == "dit" else (1, 2, 3)
        config = MHLAConfig(layout=layout, implementation=implementation)
        copy = type(model).from_config(model.config).to(DEVICE).eval()
        inject(copy, config)
        state = copy.state_dict() if state is None else state
        copy.load_state_dict(state)
        with torch.no_grad():
            outputs.append(copy(**inputs).sample)
    torch.testing.assert_close(outputs[1], outputs[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"head_dim": 136}, "up to 128"),
        ({"dtype": torch.float64}, "float32, float16 and bfloat16"),
    ],
)
def test_unsupported_calls_say_why(changes, message):
    inputs, options = make((6,), (2,), **changes)
    with pytest.raises(ValueError, match=message):
        mhla(*inputs, implementation="fused", **options)


def test_trainable_rotary_is_refused():
    inputs, options = make((6,), (2,))
    options["rotary"] = tuple(table.requires_grad_() for table in options["rotary"])
    with pytest.raises(ValueError, match="rotary"):
        mhla(*inputs, implementation="fused", **options)


def test_no_cuda_is_an_error(monkeypatch):
    monkeypatch.setattr(fused_limits, "INTERPRETED", False)
    inputs, options = make((6,), (2,))
    with pytest.raises(ValueError, match="CUDA"):
        mhla(*(x.cpu() for x in inputs), implementation="fused", **options | {"rotary": None})


def test_auto_takes_the_kernels_where_they_run():
    assert resolve_implementation("auto") == "blockwise"
    assert resolve_implementation("auto", device="cuda") == "fused"
    assert resolve_implementation("auto", device="cuda", head_dim=256) == "blockwise"


def test_kernels_are_not_taken_where_they_would_lose_tangents():
    inputs, options = make((6,), (2,), heads=1)
    query, *others = inputs
    asked = []

    def run(query):
        asked.append(resolve_implementation("auto", device="cuda"))
        return mhla(query, *others, implementation="fused", **options)

    for transform in (
        lambda: torch.func.jvp(run, (query,), (query,)),
        lambda: torch.func.grad(lambda x: run(x).sum())(query),
        lambda: torch.vmap(run)(query.unsqueeze(0)),
    ):
        with pytest.raises(ValueError, match=r"outside of torch\.func"):
            transform()
    with torch.autograd.forward_ad.dual_level(), pytest.raises(ValueError, match="forward-mode"):
        run(torch.autograd.forward_ad.make_dual(query, query))
    assert asked == ["blockwise"] * 4 and resolve_implementation("auto", device="cuda") == "fused"


@pytest.mark.gpu
@pytest.mark.parametrize("head_dim", [32, 60, 64, 72, 80, 96, 128])
@FORMS
def test_head_sizes_on_gpu(poisoned, head_dim, attention_form):
    inputs, options = make((5, 12, 14), (2, 3, 3), torch.bfloat16, head_dim=head_dim, value_dim=72)
    assert_accurate(inputs, options, use_attention_form=attention_form)


@pytest.mark.gpu
@pytest.mark.parametrize("side", [16, 32, 48])
@FORMS
def test_the_shapes_of_dit_on_gpu(poisoned, side, attention_form):
    options = {"batch": 4, "heads": 16, "head_dim": 72, "value_dim": 72, "rotary": False}
    inputs, options = make((side, side), (4, 4), torch.bfloat16, **options)
    assert_accurate(inputs, options, use_attention_form=attention_form)


@pytest.mark.gpu
@FORMS
def test_repeated_launches_on_gpu(attention_form):
    """What was compiled for one call serves no other that needs more."""
    inputs, options = make((12, 14), (3, 3), torch.bfloat16, head_dim=64, value_dim=64)
    options["use_attention_form"] = attention_form
    q, k, v, mixing = (x.contiguous() for x in inputs)
    shifted = [q.new_empty(x.numel() + 1)[1:].view(x.shape).copy_(x) for x in (q, k, v)]
    per_head = mixing.expand(2, -1, -1).contiguous()
    expected = outputs_and_gradients(fused_mhla, (q, k, v, mixing), options)
    transposed = mixing.mT.contiguous().mT
    for tokens, matrix in (
        ((q, k, v), mixing),
        ((q, k, v), transposed),
        (shifted, mixing),
        (inputs[:3], mixing),
    ):
        actual = outputs_and_gradients(fused_mhla, (*tokens, matrix), options)
        # Layouts, and with them the order of sums, may differ.
        assert max(errors(actual, expected)) < torch.finfo(torch.bfloat16).eps
    out, *_ = outputs_and_gradients(fused_mhla, (q, k, v, per_head), options)
    assert torch.equal(out, expected[0])
    out, *_ = outputs_and_gradients(fused_mhla, (q, k, v, mixing), options | {"eps": 100.0})
    assert errors([out], expected[:1])[0] > 0.1


@pytest.mark.gpu
def test_many_tokens_on_gpu(poisoned):
    inputs, options = make((256, 256), (8, 8), torch.bfloat16, head_dim=64, value_dim=64, heads=1)
    assert_accurate(inputs, options)


@pytest.mark.gpu
def test_more_than_two_billion_elements_on_gpu():
    heads, dim, seq_len = 8, 128, 4096
    batch = 2**31 // (3 * heads * dim * seq_len) + 2
    projected = torch.randn(
        batch, seq_len, heads, 3 * dim, dtype=torch.bfloat16, device="cuda"
    )  # fmt: skip
    mixing = locality_mixing((8, 8)).cuda()
    options = {"grid": (64, 64), "layout": (8, 8), "implementation": "fused"}
    out = mhla(*projected.chunk(3, dim=-1), mixing, **options)
    last = mhla(*projected[-1:].contiguous().chunk(3, dim=-1), mixing, **options)
    assert torch.equal(out[-1:], last)


@pytest.mark.gpu
@FORMS
def test_cuda_graph(attention_form):
    inputs, options = make((12, 14), (3, 3), torch.bfloat16, head_dim=72, value_dim=72)
    options["use_attention_form"] = attention_form
    with torch.no_grad():
        expected = fused_mhla(*inputs, **options)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = fused_mhla(*inputs, **options)
        out.zero_()
        graph.replay()
    assert torch.equal(out, expected)


@pytest.mark.gpu
def test_inductor_on_gpu():
    (q, k, v, mixing), options = make((12, 14), (3, 3), torch.bfloat16)
    compiled = torch.compile(lambda *x: fused_mhla(*x, **options) * 2, fullgraph=True)
    torch.testing.assert_close(
        compiled(q, k, v, mixing), fused_mhla(q, k, v, mixing, **options) * 2
    )
