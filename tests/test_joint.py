"""Attention over text and image together: a layer against its definition, masks, softmax."""

import copy
import inspect
import math

import pytest
import torch
import torch.nn.functional as F
from diffusers import ContextParallelConfig, FirstBlockCacheConfig, TaylorSeerCacheConfig
from diffusers.models.embeddings import apply_rotary_emb
from diffusers.models.transformers.transformer_qwenimage import apply_rotary_emb_qwen
from families import FAMILIES, cast, naive_layer, output, run, two_inputs
from tiny import disturb
from tiny_joint import flux_inputs, qwen_image_inputs, tiny_flux, tiny_qwen_image, z_image_inputs

import mhla_gen
from mhla_gen import MHLAConfig
from mhla_gen.models.joint import JointFamily

JOINT = [name for name, (_, _, c, _) in FAMILIES.items() if isinstance(c.family, JointFamily)]
# The token grid of the second of two sizes, and further layers that differ from the second one.
GRIDS = {
    "cogvideox": (2, 7, 5),
    "flux": (7, 3),
    "flux2": (7, 3),
    "hunyuan_video": (2, 7, 5),
    "hunyuan_video15": (2, 14, 10),
    "mochi": (2, 7, 5),
    "qwen_image": (7, 3),
    "sd3": (7, 3),
    "z_image": (7, 3),
}
LAYERS = [(name, 1) for name in GRIDS] + [("flux", 0), ("flux2", 0), ("hunyuan_video", 0)]


def turned(x, angles):
    """Interleaved pairs times complex angles `[batch or 1, length, heads or 1, head_dim / 2]`."""
    pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(pairs * angles).flatten(-2)


def rotation(name, x, call, text):
    """As diffusers rotates tokens of this kind."""
    num_image = math.prod(GRIDS[name])
    if name == "sd3":
        return x
    if name == "qwen_image":
        return apply_rotary_emb_qwen(x, call["image_rotary_emb"][int(text)], use_real=False)
    if name == "z_image":
        angles = call["freqs_cis"][0].unsqueeze(2)
        return turned(x, angles[:, num_image:] if text else angles[:, :num_image])
    cos, sin = call["image_rotary_emb"][:2]
    if name == "mochi":
        return x if text else turned(x, torch.complex(cos, sin)[None])
    if name in ("flux", "flux2"):
        num_text = len(cos) - num_image
        rows = slice(0, num_text) if text else slice(num_text, None)
        cos, sin = cos[rows], sin[rows]
    elif text:
        return x
    return apply_rotary_emb(x, (cos, sin), sequence_dim=1)


def projections(attention, states, text):
    """Queries, keys and values of image or of text tokens."""
    if hasattr(attention, "to_qkv_mlp_proj"):
        size = 3 * attention.inner_dim
        projected = attention.to_qkv_mlp_proj(states)[..., :size].chunk(3, dim=-1)
        norms = attention.norm_q, attention.norm_k
    elif text and getattr(attention, "add_q_proj", None) is not None:
        layers = attention.add_q_proj, attention.add_k_proj, attention.add_v_proj
        projected = [layer(states) for layer in layers]
        norms = attention.norm_added_q, attention.norm_added_k
    else:
        projected = [layer(states) for layer in (attention.to_q, attention.to_k, attention.to_v)]
        norms = attention.norm_q, attention.norm_k
    query, key, value = (x.unflatten(2, (attention.heads, -1)) for x in projected)
    return norms[0](query), norms[1](key), value


def softmax(query, key, value, mask):
    scores = torch.einsum("bqhd,bkhd->bhqk", query, key) / math.sqrt(query.shape[-1])
    scores = scores.masked_fill(~mask[:, None, None], -torch.inf)
    return torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), value)


def text_mask(name, call, num_image, text):
    mask = call.get("encoder_hidden_states_mask", call.get("attention_mask"))
    if mask is None:
        return torch.ones(text.shape[:2], dtype=torch.bool)
    return mask.bool().flatten(1)[:, -text.shape[1] :]


@pytest.mark.parametrize(("name", "number"), LAYERS)
def test_a_layer_equals_the_definition(name, number):
    make, _, mhla_class, layout = FAMILIES[name]
    grid = GRIDS[name]
    num_image = math.prod(grid)
    model = mhla_gen.inject(make(), MHLAConfig(layout=layout, conv=False, gate=False))
    attention, call = mhla_class.family.attentions(disturb(model))[number][1], {}
    ends = {}

    def remember(layer, args, kwargs):
        call.update(inspect.signature(layer.forward).bind(*args, **kwargs).arguments)
        call.update(call.pop("kwargs", {}) | call.pop("cross_attention_kwargs", {}))

    attention.register_forward_pre_hook(remember, with_kwargs=True)
    run(model, two_inputs(name)[1])
    # What the layer computes before it projects back.
    processor = attention.processor
    for kind in ("image", "text"):
        hook = {"image": "project_back", "text": "project_text_back"}[kind]
        setattr(processor, hook, lambda _, out, kind=kind: ends.__setitem__(kind, out) or out)
    if name == "flux2" and number == 1:
        processor.join = lambda image, text: (
            ends.update(image=image, text=text) or torch.cat((text, image), dim=1)
        )
    with torch.no_grad():
        attention.double()(**cast(call, torch.float64))
        image = call["hidden_states"].double()
        text = call.get("encoder_hidden_states")
        if text is None and name == "z_image":
            image, text = image[:, :num_image], image[:, num_image:]
        elif text is None:
            image, text = image[:, -num_image:], image[:, :-num_image]
        text = text.double()
        query, key, value = projections(attention, image, text=False)
        text_query, text_key, text_value = projections(attention, text, text=True)
        mask = text_mask(name, call, num_image, text)
        turn = [rotation(name, x, call, text=False).double() for x in (query, key)]
        text_turn = [rotation(name, x, call, text=True).double() for x in (text_query, text_key)]

        def rotate(phi):
            return rotation(name, phi, call, text=False).double()

        linear = naive_layer(query, key, value, attention.mhla.mixing, grid, layout, rotate)
        exact = softmax(turn[0], text_turn[1], text_value, mask)
        share = attention.mhla.combine.to_share(image).sigmoid().unsqueeze(-1)
        all_valid = torch.ones(image.shape[:2], dtype=torch.bool)
        expected = softmax(
            text_turn[0],
            torch.cat((text_turn[1], turn[1]), dim=1),
            torch.cat((text_value, value), dim=1),
            torch.cat((mask, all_valid), dim=1),
        )
        if name in ("mochi", "hunyuan_video15"):
            expected = expected * mask[..., None, None]
    # diffusers rotates in float32.
    combined = (share * exact + (1 - share) * linear).flatten(2)
    torch.testing.assert_close(ends["image"], combined, rtol=1e-5, atol=2e-6)
    torch.testing.assert_close(ends["text"], expected.flatten(2), rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("name", JOINT)
def test_tiles_that_cover_the_grid_are_softmax(name):
    make, make_inputs, _, layout = FAMILIES[name]
    model, inputs = make().double(), cast(make_inputs(), torch.float64)
    expected = run(model, inputs)
    tiles = {"exact": 0.9, "exact_tile": layout, "exact_window": (99,) * len(layout)}
    config = MHLAConfig(layout=layout, linear=False, conv=False, gate=False, **tiles)
    mhla_gen.inject(model, config)
    torch.testing.assert_close(run(model, inputs), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "argument", "padding"),
    [
        ("qwen_image", "encoder_hidden_states", (5, 7)),
        ("hunyuan_video", "encoder_hidden_states", (5, 7)),
        ("hunyuan_video15", "encoder_hidden_states", (5, 7)),
        ("hunyuan_video15", "encoder_hidden_states_2", (3, 4)),
        ("mochi", "encoder_hidden_states", (5, 7)),
    ],
)
def test_padded_text_is_read_by_nobody(name, argument, padding):
    make, make_inputs, _, layout = FAMILIES[name]
    model = disturb(mhla_gen.inject(make(), MHLAConfig(layout=layout)))
    inputs = make_inputs()
    before = run(model, inputs)[:1]
    text = inputs[argument].clone()
    text[0, slice(*padding)] = 9.0
    assert torch.equal(run(model, inputs | {argument: text})[:1], before)
    text[0, padding[0] - 1] = 9.0
    assert not torch.allclose(run(model, inputs | {argument: text})[:1], before)


@pytest.mark.parametrize("name", ["qwen_image", "mochi"])
def test_a_caption_that_is_masked_whole_leaves_the_image_alone(name):
    make, make_inputs, _, layout = FAMILIES[name]
    model = disturb(mhla_gen.inject(make(), MHLAConfig(layout=layout))).double()
    inputs = cast(make_inputs(batch=2), torch.float64)
    mask = next(key for key in inputs if key.endswith("_mask"))
    inputs[mask] = torch.tensor([[0] * 7, [1] * 7])
    found = output(model, inputs)
    found.square().mean().backward()
    assert found.isfinite().all()
    grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert all(grad.isfinite().all() for grad in grads.values())
    text = inputs["encoder_hidden_states"].clone()
    text[0] = 9.0
    other = output(model, inputs | {"encoder_hidden_states": text})
    # Mochi pools the caption beside attention, so that its own model reads padding there.
    if name != "mochi":
        assert torch.equal(other[0], found[0])
    assert torch.equal(other[1], found[1])
    # The sample beside it is what it is alone.
    alone = {key: value[1:] for key, value in inputs.items()}
    torch.testing.assert_close(output(model, alone)[0], found[1], rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("name", JOINT)
def test_image_and_text_read_each_other(name):
    make, make_inputs, _, layout = FAMILIES[name]
    model, inputs = mhla_gen.inject(make(), MHLAConfig(layout=layout)), make_inputs()
    text = inputs.get("encoder_hidden_states", inputs.get("cap_feats"))
    for tensor in text if isinstance(text, list) else [text]:
        tensor.requires_grad_()
    output(model, inputs).square().mean().backward()
    grads = [tensor.grad for tensor in (text if isinstance(text, list) else [text])]
    assert all(grad.abs().max() > 0 for grad in grads)


def test_z_image_takes_texts_of_several_lengths():
    make, _, _, layout = FAMILIES["z_image"]
    model = disturb(mhla_gen.inject(make(), MHLAConfig(layout=layout))).double()
    inputs = cast(z_image_inputs(), torch.float64)
    both = run(model, inputs)
    for number in range(2):
        one = {name: value[number : number + 1] for name, value in inputs.items()}
        torch.testing.assert_close(run(model, one)[0], both[number], rtol=1e-5, atol=1e-6)


def test_two_images_in_one_sequence_are_refused():
    flux, inputs = mhla_gen.inject(tiny_flux(), MHLAConfig(layout=(2, 2))), flux_inputs()
    reference = inputs["img_ids"].clone()
    reference[:, 0] = 1
    two = {
        "hidden_states": inputs["hidden_states"].repeat(1, 2, 1),
        "img_ids": torch.cat((inputs["img_ids"], reference)),
    }
    with pytest.raises(ValueError, match="one image per sequence"):
        run(flux, inputs | two)
    with pytest.raises(ValueError, match="fill a grid: found 24 tokens for 3×7"):
        run(flux, inputs | {"joint_attention_kwargs": {"grid": (3, 7)}})
    qwen, inputs = (
        mhla_gen.inject(tiny_qwen_image(), MHLAConfig(layout=(2, 2))),
        qwen_image_inputs(),
    )
    with pytest.raises(ValueError, match="one image per sequence"):
        run(qwen, inputs | {"img_shapes": [[(1, 2, 6), (1, 2, 6)]] * 2})
    make, make_inputs, _, layout = FAMILIES["z_image"]
    model, inputs = mhla_gen.inject(make(), MHLAConfig(layout=layout)), make_inputs()
    with pytest.raises(ValueError, match="one size in a batch"):
        run(model, inputs | {"x": [inputs["x"][0], inputs["x"][1][..., :6]]})


def test_weight_of_text_starts_at_its_share_of_tokens():
    model = mhla_gen.inject(tiny_flux(), MHLAConfig(layout=(2, 2)))
    assert model.mhla_config.exact_start == pytest.approx(512 / (512 + 4096))
    combine = model.transformer_blocks[0].attn.mhla.combine
    share = combine.to_share(torch.randn(1, 3, 24)).sigmoid()
    assert F.mse_loss(share, torch.full_like(share, 1 / 9)) < 1e-12


@pytest.mark.parametrize("name", ["flux", "hunyuan_video", "qwen_image"])
@pytest.mark.parametrize(
    "cache",
    [
        FirstBlockCacheConfig(threshold=0.15),
        TaylorSeerCacheConfig(cache_interval=2, disable_cache_before_step=1, max_order=0),
    ],
)
def test_caches_skip_what_they_skip_of_the_stock_model(name, cache):
    make, make_inputs, _, layout = FAMILIES[name]
    stock, inputs = make(), make_inputs()
    ours = copy.deepcopy(stock)
    mhla_gen.inject(ours, MHLAConfig(layout=layout, exact=1, conv=False, gate=False))
    steps = [inputs | {"hidden_states": inputs["hidden_states"] * x} for x in (1, 0.9, 0.8)]
    plain = [run(stock, step) for step in steps]
    results = []
    for model in (stock, ours):
        model.enable_cache(copy.deepcopy(cache))
        with model.cache_context("cond"):
            results.append([run(model, step) for step in steps])
    for expected, found in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
    assert not torch.allclose(results[0][1], plain[1], atol=1e-4)


def test_sequences_with_text_are_not_shared():
    model = mhla_gen.inject(tiny_flux(), MHLAConfig(layout=(2, 2)))
    with pytest.raises(NotImplementedError, match=r"FluxTransformer2DModel.*restore"):
        model.enable_parallelism(config=ContextParallelConfig(ring_degree=2))
