"""Linformer: its definition in float64, what one set of weights takes, and what is refused."""

import copy
import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from families import FAMILIES, cast, output, run, two_inputs
from tiny import disturb, dit_inputs, tiny_dit, tiny_wan

import mhla_gen
from mhla_gen import LinformerConfig, MHLAConfig
from mhla_gen.bench.ops import bench_ops
from mhla_gen.config import BenchConfig, ConfigError, ModelConfig, TrainConfig, load_config
from mhla_gen.models.additions import Inputs
from mhla_gen.models.linformer import coverage
from mhla_gen.ops import linformer_attention
from mhla_gen.training import parameter_groups
from mhla_gen.training.dit import build_model
from mhla_gen.training.optim import train_only_mhla
from mhla_gen.training.pretrained import load_pretrained

GRID, HEADS, DIM = (5, 7), 2, 4
LINEAR = [
    {"sharing": sharing, "projected_len": length}
    for sharing in ("none", "headwise", "key_value", "layerwise")
    for length in (6, (2, 3))
]
WINDOWS = [
    {"projection": projection, "projected_len": length}
    for projection in ("mean_pool", "max_pool", "conv")
    for length in (6, (2, 3))
]
WINDOWS += [
    {"projection": "conv", "projected_len": 6, "sharing": sharing}
    for sharing in ("none", "key_value")
]
BY_AXIS = [options for options in LINEAR + WINDOWS if options["projected_len"] != 6]


def layer(**options):
    config = LinformerConfig(grid=GRID, conv=False, gate=False, **options)
    model = mhla_gen.models.Linformer(HEADS, DIM, HEADS * DIM, config).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, dtype=torch.float64))
    return model


def tokens(grid, batch=2):
    shape = (3, batch, math.prod(grid), HEADS, DIM)
    return torch.randn(shape, dtype=torch.float64).unbind()


def defined_matrix(projection, grid, head):
    """E of one head, `[projected, tokens]`, from the weights of a linear projection."""
    matrices = [w[head] if w.ndim == 3 else w for w in projection.weights]
    if len(matrices) == 1:
        return matrices[0][:, : math.prod(grid)]
    resampled = []
    for weight, length in zip(matrices, grid, strict=True):
        columns = weight.shape[-1]
        rows = torch.zeros(len(weight), length, dtype=weight.dtype)
        for column, place in itertools.product(range(columns), range(length)):
            overlap = min((column + 1) / columns, (place + 1) / length) - max(
                column / columns, place / length
            )
            rows[:, place] += weight[:, column] * max(overlap, 0) * columns
        resampled.append(rows)
    return torch.kron(*resampled)


def defined_windows(projection, x, along, head):
    """Projected tokens of one head, `x [tokens, dim]`, window by window."""
    x = x.reshape(*along, -1)
    sides = projection.window
    corners = itertools.product(
        *(range(0, length, side) for length, side in zip(along, sides, strict=True))
    )
    found = []
    for corner in corners:
        window = tuple(slice(a, a + side) for a, side in zip(corner, sides, strict=True))
        piece = x[window]
        tokens = piece.flatten(0, -2)
        if projection.kind == "mean_pool":
            found.append(tokens.mean(0))
        elif projection.kind == "max_pool":
            found.append(tokens.amax(0))
        else:
            weight = projection.weight[head % len(projection.weight)].movedim(0, -1)
            there = weight[tuple(slice(side) for side in piece.shape[:-1])]
            found.append((there.flatten(0, -2) * tokens).sum(0))
    return torch.stack(found)


def defined(model, q, k, v, grid):
    """Linformer head by head and sample by sample, one equation a line."""
    along = grid if model.config.by_axis else (math.prod(grid),)
    out = torch.empty_like(q)
    for b, h in itertools.product(range(len(q)), range(HEADS)):
        projected = []
        for projection, x in zip(model.projections(), (k[b, :, h], v[b, :, h]), strict=True):
            if model.config.projection == "linear":
                projected.append(defined_matrix(projection, grid, h) @ x)
            else:
                projected.append(defined_windows(projection, x, along, h))
        scores = q[b, :, h] @ projected[0].T / math.sqrt(DIM)
        out[b, :, h] = scores.softmax(-1) @ projected[1]
    return out.flatten(2)


def compared(model, grid):
    inputs = [x.requires_grad_() for x in tokens(grid)]
    learned = [*inputs, *model.parameters()]
    hidden = torch.zeros(2, math.prod(grid), HEADS * DIM, dtype=torch.float64)
    out, expected = model(*inputs, hidden, grid), defined(model, *inputs, grid)
    torch.testing.assert_close(out, expected)
    seed = torch.randn_like(out)
    got = torch.autograd.grad(out, learned, seed, retain_graph=True)
    torch.testing.assert_close(got, torch.autograd.grad(expected, learned, seed))


@pytest.mark.parametrize("options", LINEAR + WINDOWS, ids=str)
def test_equals_its_definition_with_all_gradients(options):
    compared(layer(**options), GRID)


@pytest.mark.parametrize("options", LINEAR + WINDOWS, ids=str)
def test_a_smaller_grid_too(options):
    compared(layer(**options), (3, 4))


@pytest.mark.parametrize("options", BY_AXIS, ids=str)
def test_projections_of_each_axis_take_larger_grids(options):
    compared(layer(**options), (6, 9))


def test_projected_tokens_that_no_token_enters_have_no_weight():
    model = layer(projected_len=5).double()
    model.reset_parameters()
    q, k, v = tokens((2, 7))
    hidden = torch.zeros(2, 14, HEADS * DIM, dtype=torch.float64)
    # Two of the five means of seven tokens are full; no others are there.
    means = [x.unflatten(1, (2, 7)).mean(2).transpose(1, 2) for x in (k, v)]
    expected = F.scaled_dot_product_attention(q.transpose(1, 2), *means)
    torch.testing.assert_close(model(q, k, v, hidden, (2, 7)), expected.transpose(1, 2).flatten(2))


def test_masked_keys_are_keys_that_are_not_there():
    q, k, v = tokens((3, 4))
    e, f = torch.randn(2, HEADS, 5, 12, dtype=torch.float64)
    e[:, 3:, :8] = f[:, 3:, :8] = 0
    mask = torch.arange(12).expand(2, -1) < torch.tensor([[12], [8]])
    out = linformer_attention(q, k, v, e, f, mask=mask)
    whole = linformer_attention(q[:1], k[:1], v[:1], e, f)
    cut = linformer_attention(q[1:], k[1:, :8], v[1:, :8], e[:, :3, :8], f[:, :3, :8])
    torch.testing.assert_close(out, torch.cat((whole, cut)))
    k[1, 8:], v[1, 8:] = torch.nan, torch.inf
    torch.testing.assert_close(linformer_attention(q, k, v, e, f, mask=mask), out)


def test_coverage_shares_every_column():
    for columns, length in ((5, 5), (5, 3), (3, 7), (1, 4)):
        shares = coverage(columns, length, torch.empty(0, dtype=torch.float64))
        torch.testing.assert_close(shares.sum(1), torch.ones(columns, dtype=torch.float64))
    assert torch.equal(coverage(4, 4, torch.empty(0)), torch.eye(4))


def test_the_operator_refuses():
    q, k, v = tokens((3, 4))
    e = torch.randn(5, 12, dtype=torch.float64)
    with pytest.raises(ValueError, match="cannot be causal"):
        linformer_attention(q, k, v, e, causal=True)
    with pytest.raises(ValueError, match="mask must be bool of shape"):
        linformer_attention(q, k, v, e, mask=torch.ones(2, 11, dtype=torch.bool))
    with pytest.raises(ValueError, match="must project to the 5 tokens of key_projection, found 3"):
        linformer_attention(q, k, v, e, e[..., :3, :])
    with pytest.raises(ValueError, match="at least one row"):
        linformer_attention(q, k, v, e[:0])
    with pytest.raises(ValueError, match="one matrix or"):
        linformer_attention(q, k, v, e.expand(HEADS + 1, 5, 12))
    with pytest.raises(ValueError, match="in a floating dtype"):
        linformer_attention(q, k, v, e.long())
    # Batches and heads of one would be read by every sample and head.
    for wrong in (k[:1], k[:, :, :1], k[..., :2], k.float(), k[0]):
        with pytest.raises(ValueError, match=r"(must|share)"):
            linformer_attention(q, wrong, v, e)
        with pytest.raises(ValueError, match=r"(must|share)"):
            linformer_attention(q, wrong, wrong, e)


@pytest.mark.parametrize("name", FAMILIES)
def test_save_load_and_restore_are_exact(name, tmp_path):
    make, make_inputs, mhla_class, layout = FAMILIES[name]
    model, inputs = make(), make_inputs()
    before, keys = run(model, inputs), model.state_dict().keys()
    mhla_gen.inject(model, LinformerConfig(projected_len=layout, layers="2/3", sharing="layerwise"))
    rows = [row for row in mhla_gen.summary(model) if row.converted]
    assert {(row.kind, row.implementation, row.exact) for row in rows} == {("linformer", "sdpa", 0)}
    disturb_added(model)
    assert not torch.equal(run(model, inputs), before)
    model.save_pretrained(tmp_path)
    loaded = mhla_class.from_pretrained(tmp_path)
    assert torch.equal(run(loaded, inputs), run(model, inputs))
    assert loaded.mhla_config == model.mhla_config
    mhla_gen.restore(model)
    assert torch.equal(run(model, inputs), before)
    assert keys == model.state_dict().keys()


@pytest.mark.parametrize("options", LINEAR + WINDOWS, ids=str)
@pytest.mark.parametrize("name", ["dit", "wan"])
def test_every_kind_in_a_model(name, options, tmp_path):
    make, make_inputs, mhla_class, layout = FAMILIES[name]
    model, inputs = make(), make_inputs()
    length = options["projected_len"] if options["projected_len"] == 6 else layout
    mhla_gen.inject(model, LinformerConfig(**options | {"projected_len": length}))
    disturb(model)
    model.save_pretrained(tmp_path)
    assert torch.equal(run(mhla_class.from_pretrained(tmp_path), inputs), run(model, inputs))


@pytest.mark.parametrize("name", ["dit", "wan", "flux", "ltx"])
def test_as_many_keys_as_tokens_are_softmax(name):
    make, make_inputs, _, _ = FAMILIES[name]
    model, inputs = make().double(), cast(make_inputs(), torch.float64)
    before = run(model, inputs)
    grid = grid_of(model, inputs, len(FAMILIES[name][3]))
    mhla_gen.inject(model, LinformerConfig(projected_len=math.prod(grid), grid=grid))
    torch.testing.assert_close(run(model, inputs), before, rtol=1e-6, atol=1e-6)


def grid_of(model, inputs, rank):
    """The token grid that these inputs have."""
    twin, grids = copy.deepcopy(model), []
    mhla_gen.inject(twin, MHLAConfig(layout=(1,) * rank))
    child = next(module for module in twin.modules() if isinstance(module, mhla_gen.MHLA))
    child.register_forward_pre_hook(lambda _, args: grids.append(args[4]))
    run(twin, inputs)
    return tuple(grids[0])


@pytest.mark.parametrize("name", ["dit", "wan", "flux"])
def test_one_set_of_weights_takes_two_sizes(name):
    make, _, _, layout = FAMILIES[name]
    model = make()
    mhla_gen.inject(model, LinformerConfig(projected_len=layout))
    disturb(model)
    for inputs in two_inputs(name):
        assert run(model, inputs).isfinite().all()


def test_layerwise_is_one_matrix_and_the_others_are_counted():
    counts = {}
    for sharing in ("none", "headwise", "key_value", "layerwise"):
        model = tiny_dit()
        options = {"projected_len": 4, "conv": False, "gate": False}
        mhla_gen.inject(model, LinformerConfig(sharing=sharing, **options))
        counts[sharing] = sum(row.added_parameters for row in mhla_gen.summary(model))
    matrix = 4 * 16
    assert counts == {
        "none": 3 * 2 * 2 * matrix,
        "headwise": 3 * 2 * matrix,
        "key_value": 3 * matrix,
        "layerwise": matrix,
    }


def test_each_layer_may_have_its_length():
    model = tiny_dit()
    mhla_gen.inject(model, LinformerConfig(projected_len_by_layer=[8, (2, 2)], layers=[0, 2]))
    shapes = {k: tuple(v.shape) for k, v in model.state_dict().items() if "key_projection" in k}
    assert sorted(shapes.values()) == [(2, 4), (2, 4), (8, 16)]
    assert run(model, dit_inputs()).isfinite().all()


def test_every_parameter_learns_and_only_added_ones_where_asked():
    model = tiny_dit()
    mhla_gen.inject(model, LinformerConfig(projected_len=4, sharing="layerwise"))
    disturb(model)
    train_only_mhla(model)
    output(model, dit_inputs()).square().sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == (".mhla." in name)
        if ".mhla." in name:
            assert parameter.grad is not None and parameter.grad.abs().max() > 0, name
    grouped = [id(p) for group in parameter_groups(model, 0.1) for p in group["params"]]
    assert sorted(grouped) == sorted(id(p) for p in model.parameters() if p.requires_grad)


def test_projections_of_a_layer_on_another_device_are_refused():
    model = mhla_gen.inject(tiny_dit(), LinformerConfig(projected_len=4, sharing="layerwise"))
    first, second = (block.attn1.mhla for block in model.transformer_blocks[:2])
    second.to("meta")
    x = torch.empty(1, 16, second.num_heads, second.head_dim, device="meta")
    with pytest.raises(ValueError, match="another layer, which are sharded or on another device"):
        second._begin(Inputs(x, x, x, (), (4, 4), None, None, None))
    first.to("meta")
    assert second._begin(Inputs(x, x, x, (), (4, 4), None, None, None))().shape == x.shape


def test_adapters_carry_it(tmp_path):
    model, inputs = tiny_wan(), FAMILIES["wan"][1]()
    base = {k: v.clone() for k, v in model.state_dict().items()}
    mhla_gen.inject(model, LinformerConfig(projected_len=6, sharing="layerwise"))
    disturb_added(model)
    mhla_gen.save_adapter(model, tmp_path)
    other = tiny_wan()
    other.load_state_dict(base)
    before = run(other, inputs)
    mhla_gen.load_adapter(other, tmp_path)
    assert torch.equal(run(other, inputs), run(model, inputs))
    mhla_gen.unload_adapter(other)
    assert torch.equal(run(other, inputs), before)


def disturb_added(model):
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".mhla." in name:
                parameter.add_(0.1 * torch.randn_like(parameter))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"projected_len": 0}, "at least 1"),
        ({"projected_len": "all"}, "must be a whole number"),
        ({"projected_len": True}, "must be a whole number"),
        ({"projection": "mean_pool", "sharing": "none"}, "no weights to share"),
        ({"sharing": "layerwise", "projected_len_by_layer": [4]}, "one projected_len"),
        ({"projected_len_by_layer": 4}, "must be a list"),
        ({"conv_kernel_size": 2}, "odd"),
        ({"sharing": "some"}, "sharing must be one of"),
    ],
)
def test_settings_that_do_not_fit(options, message):
    with pytest.raises(ValueError, match=message):
        LinformerConfig(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"projected_len": 17}, "take at most 16"),
        ({"projected_len": (5, 4)}, r"take at most \(4, 4\)"),
        ({"projected_len": (1, 2, 3)}, "needs 2 entries"),
        ({"projected_len": 4, "grid": (4,)}, "needs 2 entries"),
        ({"projected_len_by_layer": [4, 4]}, "each of 3 converted layers, found 2"),
        ({"projected_len": 4, "layers": [5]}, "layers 0 to 2"),
    ],
)
def test_models_that_do_not_fit_stay_as_they_are(options, message):
    model = tiny_dit()
    keys = set(model.state_dict())
    with pytest.raises(ValueError, match=message):
        mhla_gen.inject(model, LinformerConfig(**options))
    assert set(model.state_dict()) == keys and type(model) is type(tiny_dit())


def test_longer_sequences_are_refused():
    model = tiny_dit()
    mhla_gen.inject(model, LinformerConfig(projected_len=4))
    with pytest.raises(ValueError, match="for at most 16 tokens, found 49"):
        run(model, dit_inputs(side=14))
    mhla_gen.restore(model)
    mhla_gen.inject(model, LinformerConfig(projected_len=4, grid=(7, 7)))
    assert run(model, dit_inputs(side=14)).isfinite().all()
    assert run(model, dit_inputs(side=8)).isfinite().all()


def test_sequences_are_not_shared_among_processes():
    from diffusers import ContextParallelConfig

    model = mhla_gen.inject(tiny_wan(), LinformerConfig(projected_len=6))
    with pytest.raises(NotImplementedError, match="Linformer's attention cannot share"):
        model.enable_parallelism(config=ContextParallelConfig(ring_degree=2))
    child = next(m for m in model.modules() if isinstance(m, mhla_gen.models.Linformer))
    q, k, v = (torch.randn(1, 6, 2, 12) for _ in range(3))
    with pytest.raises(ValueError, match="cannot share a sequence"):
        child(q, k, v, q.flatten(2), (1, 2, 3), group=object())


def test_it_stands_in_the_bench():
    methods = ["linformer projected_len=4", "linformer projected_len=[2,2]", "linformer"]
    config = BenchConfig(methods=methods, grids=[[4, 4]], num_heads=2, head_dim=8, dtype="float32")
    *fits, longer = bench_ops(config, torch.device("cpu"))
    assert all(row["train_ms"] > 0 and row["exact"] == 0 for row in fits)
    assert "more than the tokens" in longer["error"]
    with pytest.raises(ValueError, match="for subject=ops"):
        BenchConfig(subject="model", methods=["linformer"])


def test_training_configs_have_it(tmp_path):
    linformer = "model.attention=linformer"
    config = load_config(None, [linformer, "model.linformer.projected_len=[2, 2]"], TrainConfig)
    assert config.model.linformer.projected_len == (2, 2)
    sizes = {"patch_size": 2, "num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 8}
    asked = LinformerConfig(projected_len=4)
    model = build_model(ModelConfig(attention="linformer", linformer=asked, **sizes), (3, 8, 8), 10)
    assert {row.kind for row in mhla_gen.summary(model)} == {"linformer"}
    model.save_pretrained(tmp_path)
    again = load_pretrained(ModelConfig(attention="linformer", pretrained=str(tmp_path)))
    assert again.mhla_config == model.mhla_config
    with pytest.raises(ValueError, match=r"set model\.attention=linformer"):
        load_pretrained(ModelConfig(attention="mhla", pretrained=str(tmp_path)))
    with pytest.raises(ConfigError, match="linformer reads later frames"):
        load_config(None, [linformer, "model.mhla.causal_frames=3"], TrainConfig)
    with pytest.raises(ConfigError, match="not possible with parallelism=fsdp"):
        load_config(
            None, [linformer, "model.linformer.sharing=layerwise", "parallelism=fsdp"], TrainConfig
        )
