"""MHLA in timm's vision classifiers: its definition, one set of weights for all sizes, saving."""

import copy
import itertools
import math
from pathlib import Path

import pytest
import timm
import torch
from timm.optim import create_optimizer_v2
from tiny import tiny_wan

import mhla_gen
from mhla_gen import CausalMHLAConfig, LinformerConfig, MHLAConfig, MHLAVisionTransformer
from mhla_gen.training import keep_mixing_in_range

SIZES = {"depth": 2, "embed_dim": 24, "num_heads": 2, "num_classes": 5}
# The grid is 5 × 7, behind 0 to 4 prefix tokens.
SMALL = {**SIZES, "img_size": (20, 28), "patch_size": 4}
HEADS = {
    "average": ("deit_tiny_patch16_224", {"class_token": False, "global_pool": "avg"}),
    "class": ("deit_tiny_patch16_224", {}),
    "distilled": ("deit_tiny_distilled_patch16_224", {}),
    "registers": ("vit_small_patch16_224", {"reg_tokens": 3, "qk_norm": True}),
}
KINDS = {
    "mhla": MHLAConfig(layout=(2, 3)),
    "linear": MHLAConfig(layout=(1, 1), conv=False, gate=False),
    "exact": MHLAConfig(exact=0.3),
    "tiles alone": MHLAConfig(exact=0.3, linear=False),
    "hybrid": MHLAConfig(layout=(2, 3), layers="1/2"),
    "linformer": LinformerConfig(projected_len=(2, 3)),
}


def softmax_model(head, **changes):
    torch.manual_seed(0)
    name, arguments = HEADS[head]
    model = timm.create_model(name, **{**SMALL, **arguments, **changes}).eval()
    return disturbed(model)


def disturbed(model):
    """Everything learned moved, so that nothing is an identity or zero any more."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.add_(0.2 * noise.to(parameter.dtype))
        for module in model.modules():
            if getattr(module, "mixing", None) is not None:
                module.mixing.abs_()
    return model


def images(height=20, width=28, batch=2):
    generator = torch.Generator().manual_seed(2)
    return torch.randn(batch, 3, height, width, generator=generator)


def blocks_of(grid, layout):
    """The block of every token, in raster order: block b of an axis starts at b * n // l."""
    places = []
    for length, count in zip(grid, layout, strict=True):
        starts = [b * length // count for b in range(count)]
        places.append([sum(start <= i for start in starts) - 1 for i in range(length)])
    return [r * layout[1] + c for r, c in itertools.product(*places)]


def defined(attention, x, grid):
    """The layer token by token: softmax for prefix queries, Eq. 4 and exact prefix for patches."""
    first, child = x.shape[1] - math.prod(grid), attention.mhla
    out = torch.zeros_like(x)
    by_kind = attention.qkv(x).chunk(3, dim=-1)
    block = blocks_of(grid, child.config.layout)
    hidden = x[:, first:]
    weight = child.combine.to_share(hidden).sigmoid() if child.combine is not None else None
    for h in range(attention.num_heads):
        channels = slice(h * attention.head_dim, (h + 1) * attention.head_dim)
        q, k, v = (part[..., channels] for part in by_kind)
        softmax = (q @ k.mT / math.sqrt(attention.head_dim)).softmax(-1) @ v
        phi_q, phi_k = (t[:, first:].relu() + 1e-6 for t in (q, k))
        pairs = (phi_q @ phi_k.mT) * child.mixing[block][:, block]
        patches = pairs @ v[:, first:] / (pairs.sum(-1, keepdim=True) + child.config.eps)
        if first:
            scores = q[:, first:] @ k[:, :first].mT / math.sqrt(attention.head_dim)
            a = weight[..., h : h + 1]
            patches = a * (scores.softmax(-1) @ v[:, :first]) + (1 - a) * patches
        out[..., channels] = torch.cat((softmax[:, :first], patches), dim=1)
    image = by_kind[2][:, first:].mT.unflatten(2, grid)
    padded = torch.nn.functional.pad(image, (1, 1, 1, 1))
    windows = padded.unfold(2, 3, 1).unfold(3, 3, 1)
    convolved = torch.einsum("bchwij,cij->bchw", windows, child.conv.weight[:, 0])
    convolved = convolved.flatten(2).mT + child.conv.bias
    gate = torch.nn.functional.silu(child.gate(hidden))
    out = torch.cat((out[:, :first], (out[:, first:] + convolved) * gate), dim=1)
    return attention.proj(out)


@pytest.mark.parametrize("first", [0, 1, 4])
def test_a_layer_equals_its_definition_with_all_gradients(first):
    head = {0: "average", 1: "class", 4: "registers"}[first]
    model = softmax_model(head, qk_norm=False)
    mhla_gen.inject(model, MHLAConfig(layout=(2, 3)))
    attention = disturbed(model).double().blocks[0].attn
    attention.mhla.mixing.data = attention.mhla.mixing.data.double()
    x = torch.randn(2, first + 35, 24, dtype=torch.float64, requires_grad=True)
    learned = [x, *attention.parameters()]
    out, expected = attention(x, torch.empty(5, 7, 0)), defined(attention, x, (5, 7))
    torch.testing.assert_close(out, expected)
    seed = torch.randn_like(out)
    got = torch.autograd.grad(out, learned, seed, retain_graph=True)
    torch.testing.assert_close(got, torch.autograd.grad(expected, learned, seed))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("head", HEADS)
def test_every_kind_is_saved_loaded_and_restored_bit_for_bit(head, kind, tmp_path):
    model, x = softmax_model(head), images()
    before, state = model(x), copy.deepcopy(model.state_dict())
    assert mhla_gen.inject(model, KINDS[kind]) is model
    with torch.no_grad():
        converted = disturbed(model)(x)
    assert (converted - before).abs().max() > 1e-3
    rows = mhla_gen.summary(model)
    assert [row.converted for row in rows] == [kind != "hybrid", True]
    model.save_pretrained(tmp_path)
    loaded = getattr(mhla_gen, type(model).__name__).from_pretrained(tmp_path)
    assert torch.equal(loaded(x), converted)
    assert loaded.mhla_config == model.mhla_config
    assert torch.equal(copy.deepcopy(model)(x), converted)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if name in state:
                tensor.copy_(state[name])
    assert type(mhla_gen.restore(model)) is type(softmax_model(head))
    assert model.state_dict().keys() == state.keys() and torch.equal(model(x), before)


@pytest.mark.parametrize("head", HEADS)
def test_all_pairs_exactly_is_the_softmax_model(head):
    model, x = softmax_model(head), images()
    before = model(x)
    mhla_gen.inject(model, MHLAConfig(exact=1.0))
    torch.testing.assert_close(model(x), before)


@pytest.mark.parametrize("head", ["average", "class"])
@pytest.mark.parametrize("kind", ["mhla", "exact", "linformer"])
def test_224_384_and_512_pixels_with_the_same_weights(head, kind):
    sizes = {"img_size": 224, "patch_size": 16}
    model = softmax_model(head, **sizes, dynamic_img_size=True)
    mhla_gen.inject(model, KINDS[kind])
    disturbed(model)
    for side in (384, 512):
        x = images(side, side, batch=1)
        resized = softmax_model(head, **sizes)
        mhla_gen.inject(resized, KINDS[kind]).load_state_dict(model.state_dict())
        resized.set_input_size((side, side))
        with torch.no_grad():
            assert model.forward_features(x).shape[1] == (side // 16) ** 2 + (head == "class")
            # timm resamples positions: at each call, or once.
            torch.testing.assert_close(model(x), resized(x))
    assert model(images(240, 400, batch=1)).isfinite().all()


def test_a_resized_model_is_saved_with_its_size(tmp_path):
    model = mhla_gen.inject(softmax_model("class"), MHLAConfig(layout=(2, 3)))
    model.set_input_size((24, 36))
    model.reset_classifier(7)
    model.save_pretrained(tmp_path)
    x = images(24, 36)
    assert torch.equal(MHLAVisionTransformer.from_pretrained(tmp_path)(x), model(x))


@pytest.mark.parametrize("head", HEADS)
def test_weights_that_could_not_be_loaded_are_not_saved(head, tmp_path):
    saved = mhla_gen.inject(softmax_model(head), MHLAConfig(layout=(2, 3)))
    other_head, other_depth, adapted = (copy.deepcopy(saved) for _ in range(3))
    other_head.head = torch.nn.Linear(24, 9)
    other_depth.prune_intermediate_layers([0])
    adapted.blocks[0].mlp.fc1.extra = torch.nn.Linear(3, 3)
    for model, name in (
        (other_head, r"head\.bias is \(9,\), but \(5,\)"),
        (other_depth, r"blocks\.1\.\S+ is nothing, but \("),
        (adapted, r"fc1\.extra\.bias is \(3,\), but nothing"),
    ):
        with pytest.raises(ValueError, match=rf"{name}.* could not be loaded; .*reset_classifier"):
            model.save_pretrained(tmp_path / "refused")
    assert not (tmp_path / "refused").exists()
    state = torch.get_rng_state()
    saved.save_pretrained(tmp_path)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_feature_extractor_of_timm_takes_mhla_inside():
    features = timm.create_model(
        "deit_tiny_patch16_224", features_only=True, out_indices=(0, 1), **SMALL
    )
    with pytest.raises(ValueError, match=r"found a FeatureGetterNet; convert its \.model"):
        mhla_gen.inject(features)
    mhla_gen.inject(features.model, MHLAConfig(layout=(2, 3)))
    maps = features.eval()(images())
    expected = features.model.forward_intermediates(images(), intermediates_only=True)
    assert len(maps) == 2 and all(map(torch.equal, maps, expected))


def test_checkpointing_changes_nothing():
    model = mhla_gen.inject(softmax_model("class"), MHLAConfig(layout=(2, 3)))
    wanted = list(model.parameters())
    plain = torch.autograd.grad(model(images()).square().sum(), wanted)
    model.set_grad_checkpointing()
    model(images()).square().sum().backward()
    torch.testing.assert_close([p.grad for p in wanted], list(plain), rtol=0, atol=0)


def test_intermediate_features_are_those_of_the_forward_pass():
    model = mhla_gen.inject(softmax_model("registers"), MHLAConfig(layout=(2, 3), layers=[1]))
    last, features = model.forward_intermediates(images())
    assert torch.equal(last, model.forward_features(images()))
    assert [tuple(f.shape) for f in features] == [(2, 24, 5, 7)] * 2
    (found,) = model.get_intermediate_layers(images(), reshape=True)
    assert torch.equal(found, features[1])


@pytest.mark.parametrize("kind", ["mhla", pytest.param("exact", marks=pytest.mark.slow)])
def test_the_whole_model_compiles_as_one_graph(kind):
    torch._dynamo.reset()
    model = mhla_gen.inject(softmax_model("class", depth=1), KINDS[kind])
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(images()), model(images()))
    with pytest.raises(ValueError, match="compiled"):
        mhla_gen.inject(torch.compile(softmax_model("class")), MHLAConfig())


def test_autocast_and_half_precision_stay_near():
    model = mhla_gen.inject(softmax_model("registers"), MHLAConfig(layout=(2, 3)))
    whole = model(images())
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(model(images()).float(), whole, rtol=0.1, atol=0.1)
    model.bfloat16()
    torch.testing.assert_close(model(images().bfloat16()).float(), whole, rtol=0.1, atol=0.1)


def test_timms_optimizer_leaves_mixing_alone_but_for_its_steps():
    model = mhla_gen.inject(softmax_model("average"), MHLAConfig(layout=(2, 3)))
    matrices = [p for n, p in model.named_parameters() if n.endswith(".mixing")]
    optimizer = create_optimizer_v2(model, opt="adamw", lr=1.0, weight_decay=0.1)
    keep_mixing_in_range(optimizer, model)
    decays = {id(p): g["weight_decay"] for g in optimizer.param_groups for p in g["params"]}
    assert [decays[id(p)] for p in matrices] == [0, 0] and 0.1 in decays.values()
    model(images()).square().sum().backward()
    optimizer.step()
    assert all(p.min() >= 0 and p.max() <= 1 for p in matrices)


def test_timms_script_goes_on_from_its_checkpoint_with_the_average_too(tmp_path):
    """The order of timm's train.py: convert, optimize, average, save; convert, optimize, resume."""

    def begin():
        model = mhla_gen.inject(softmax_model("average"), MHLAConfig(layout=(2, 3)))
        optimizer = create_optimizer_v2(model, opt="adamw", lr=1e-3, weight_decay=0.1)
        keep_mixing_in_range(optimizer, model)
        return model, optimizer

    def step(model, optimizer):
        loss = torch.nn.functional.cross_entropy(model.train()(images()), torch.tensor([0, 1]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    model, optimizer = begin()
    average = timm.utils.ModelEmaV3(model, decay=0.5)
    step(model, optimizer)
    average.update(model)
    saver = timm.utils.CheckpointSaver(
        model, optimizer, model_ema=average, checkpoint_dir=tmp_path, recovery_dir=tmp_path
    )
    saver.save_checkpoint(0, metric=1.0)
    resumed, its_optimizer = begin()
    last = str(tmp_path / "last.pth.tar")
    timm.models.resume_checkpoint(resumed, last, optimizer=its_optimizer, log_info=False)
    step(model, optimizer)
    step(resumed, its_optimizer)
    for name, tensor in resumed.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name]), name
    timm.models.load_checkpoint(resumed, last, use_ema=True)
    assert torch.equal(resumed.eval()(images()), average.module.eval()(images()))


def test_layer_wise_rates_of_timm_reach_what_was_added():
    model = mhla_gen.inject(softmax_model("class"), MHLAConfig(layout=(2, 3)))
    optimizer = create_optimizer_v2(model, opt="adamw", lr=1.0, layer_decay=0.5)
    scale = {id(p): g["lr_scale"] for g in optimizer.param_groups for p in g["params"]}
    first, second = (scale[id(block.attn.mhla.mixing)] for block in model.blocks)
    assert first == second / 2


def test_low_rank_updates_of_peft_train_beside_what_was_added():
    peft = pytest.importorskip("peft")
    model = mhla_gen.inject(softmax_model("class"), MHLAConfig(layout=(2, 3)))
    before = model(images())
    updates = peft.LoraConfig(target_modules=["qkv"], modules_to_save=["mhla"])
    trained = peft.get_peft_model(model, updates)
    torch.testing.assert_close(trained(images()), before)
    trained(images()).square().sum().backward()
    learned = [name for name, p in trained.named_parameters() if p.grad is not None]
    assert any(".qkv.lora_B." in name for name in learned)
    assert any(".mhla.modules_to_save." in name for name in learned)
    assert not any(".mlp." in name for name in learned)


@pytest.mark.parametrize(
    ("change", "config", "message"),
    [
        ({}, CausalMHLAConfig(), "takes MHLAConfig or LinformerConfig"),
        ({}, MHLAConfig(layout=(2, 2, 2)), "2-D token grid"),
        ({}, MHLAConfig(layout=(6, 7)), "more blocks than the model's own token grid"),
        ({}, MHLAConfig(layers=[2]), "layers 0 to 1"),
        ({}, LinformerConfig(projected_len=36), "more than the tokens"),
        ({"attn_drop_rate": 0.1}, MHLAConfig(), "set attn_drop_rate to 0"),
        ({"patch_drop_rate": 0.1}, MHLAConfig(), "patch_drop_rate"),
        ({"attn_layer": "diff"}, MHLAConfig(), "only timm's Attention"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_changes(change, config, message):
    model = softmax_model("class", **change)
    classes = [type(m) for m in model.modules()]
    with pytest.raises(ValueError, match=message):
        mhla_gen.inject(model, config)
    assert [type(m) for m in model.modules()] == classes


def test_other_models_and_calls_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"ViT and DeiT.*found a ResNet"):
        mhla_gen.inject(timm.create_model("resnet10t"))
    with pytest.raises(ValueError, match="found a ResNet"):
        mhla_gen.summary(timm.create_model("resnet10t"))
    parallel = timm.create_model("vit_small_patch16_18x2_224", **SMALL)
    with pytest.raises(ValueError, match="no single attention layer"):
        mhla_gen.inject(parallel)
    model = softmax_model("class")
    with pytest.raises(ValueError, match="no MHLA layers"):
        mhla_gen.restore(model)
    with pytest.raises(ValueError, match="no MHLA settings"):
        timm.models.save_for_hf(model, tmp_path / "softmax", safe_serialization=True)
        MHLAVisionTransformer.from_pretrained(tmp_path / "softmax")
    tiny_wan().save_pretrained(tmp_path / "wan")
    with pytest.raises(ValueError, match="WanTransformer3DModel, not MHLAVisionTransformer"):
        MHLAVisionTransformer.from_pretrained(tmp_path / "wan")
    with pytest.raises(FileNotFoundError, match=r"no config\.json"):
        MHLAVisionTransformer.from_pretrained(tmp_path)
    mhla_gen.inject(model, MHLAConfig(layout=(2, 3), layers=[0]))
    with pytest.raises(ValueError, match="already has MHLA"):
        mhla_gen.inject(model, MHLAConfig())
    with pytest.raises(ValueError, match="adapters are for models of diffusers"):
        mhla_gen.save_adapter(model, tmp_path)
    with pytest.raises(ValueError, match="token grid"):
        model.blocks(torch.randn(2, 36, 24))
    with pytest.raises(ValueError, match="no attention mask"):
        model.forward_features(images(), attn_mask=torch.ones(36, 36, dtype=torch.bool))
    model.save_pretrained(tmp_path / "mhla")
    with pytest.raises(
        ValueError, match=r"Distilled; load it with mhla_gen\.MHLAV\w+\.from_pretrained$"
    ):
        mhla_gen.MHLAVisionTransformerDistilled.from_pretrained(tmp_path / "mhla")
    (tmp_path / "mhla" / "model.safetensors").write_bytes(b"1234")
    with pytest.raises(ValueError, match=r"model\.safetensors"):
        MHLAVisionTransformer.from_pretrained(tmp_path / "mhla")
    made_by_hand = timm.models.VisionTransformer(**SMALL)
    mhla_gen.inject(made_by_hand, MHLAConfig(layout=(2, 3)))
    with pytest.raises(ValueError, match=r"timm\.create_model"):
        made_by_hand.save_pretrained(tmp_path / "hand")
    assert not (tmp_path / "hand").exists()


def test_the_example_of_the_document_runs(tmp_path, monkeypatch):
    page = Path(__file__).parents[1] / "docs" / "classification.md"
    code = page.read_text().split("```python\n")[1].split("```")[0]
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(code, names)
    assert [tuple(logits.shape) for logits in names["logits"]] == [(1, 1000)] * 3
    loaded = MHLAVisionTransformer.from_pretrained("deit-mhla")
    assert [row.layout for row in mhla_gen.summary(loaded)] == [(4, 4)] * 12
