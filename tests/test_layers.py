"""A layer of each family computes what the definition says, with diffusers' layer around it."""

import inspect

import pytest
import torch
from diffusers.models.embeddings import apply_rotary_emb
from diffusers.models.transformers import transformer_ltx, transformer_ltx2
from families import FAMILIES, cast, naive_layer, run, two_inputs
from tiny import (
    disturb,
    dit_inputs,
    pixart_inputs,
    tiny_dit,
    tiny_pixart,
    tiny_wan,
    wan_inputs,
)
from tiny_wan_variants import ltx2_inputs, tiny_ltx2

import mhla_gen
import mhla_gen.ops
from mhla_gen import MHLAConfig
from mhla_gen.ops.feature_maps import rotate
from mhla_gen.ops.naive import naive_mhla


def test_wan_layer_with_52_columns_equals_the_definition():
    model = mhla_gen.inject(tiny_wan(), MHLAConfig(layout=(3, 5, 10), conv=False, gate=False))
    attention, seen = model.blocks[1].attn1, {}
    attention.register_forward_hook(lambda _, args, out: seen.update(args=args, out=out))
    inputs = wan_inputs(frames=5, height=10, width=104)  # tokens: 5 × 5 × 52
    run(model.double(), cast(inputs, torch.float64))
    hidden_states, _, _, (cos, sin, carrier) = seen["args"]
    assert carrier.shape == (5, 5, 52, 0)
    query = attention.norm_q(attention.to_q(hidden_states)).unflatten(2, (2, 12))
    key = attention.norm_k(attention.to_k(hidden_states)).unflatten(2, (2, 12))
    value = attention.to_v(hidden_states).unflatten(2, (2, 12))
    out = naive_mhla(
        query, key, value, attention.mhla.mixing, grid=(5, 5, 52), layout=(3, 5, 10),
        feature_map="relu", rotary=(cos[0, :, 0, 0::2], sin[0, :, 0, 1::2]), normalize=True,
        causal=False, eps=1e-6,
    )  # fmt: skip
    expected = attention.to_out[0](out.flatten(2))
    torch.testing.assert_close(seen["out"], expected, rtol=1e-9, atol=1e-12)


def per_head(attention, hidden_states):
    heads = (attention.heads, -1)
    return [
        project(hidden_states).unflatten(2, heads)
        for project in (attention.to_q, attention.to_k, attention.to_v)
    ]


def normalized_per_head(attention, hidden_states):
    query, key, value = per_head(attention, hidden_states)
    return attention.norm_q(query), attention.norm_k(key), value


def across_heads(attention, hidden_states):
    heads = (attention.heads, -1)
    query = attention.norm_q(attention.to_q(hidden_states)).unflatten(2, heads)
    key = attention.norm_k(attention.to_k(hidden_states)).unflatten(2, heads)
    return query, key, attention.to_v(hidden_states).unflatten(2, heads)


def kandinsky5_projections(attention, hidden_states):
    heads = (attention.num_heads, -1)
    query = attention.query_norm(attention.to_query(hidden_states).unflatten(2, heads))
    key = attention.key_norm(attention.to_key(hidden_states).unflatten(2, heads))
    return query, key, attention.to_value(hidden_states).unflatten(2, heads)


def unrotated(x, call):
    return x


def wan_rotation(x, call):
    cos, sin, _ = call["rotary_emb"]
    return rotate(x, (cos[0, :, 0, 0::2], sin[0, :, 0, 1::2]))


def hunyuan_dit_rotation(x, call):
    cos, sin, _ = call["image_rotary_emb"]
    return apply_rotary_emb(x, (cos, sin), sequence_dim=1).double()


def ltx_rotation(x, call):
    cos, sin, _ = call["image_rotary_emb"]
    return transformer_ltx.apply_rotary_emb(x.flatten(2), (cos, sin)).view_as(x).double()


def ltx2_rotation(x, call):
    rotated = transformer_ltx2.apply_interleaved_rotary_emb(
        x.flatten(2), call["query_rotary_emb"][:2]
    )
    return rotated.view_as(x).double()


def cosmos_rotation(x, call):
    cos, sin, _ = call["image_rotary_emb"]
    rotated = apply_rotary_emb(x, (cos, sin), use_real_unbind_dim=-2, sequence_dim=1)
    return rotated.double()


def kandinsky5_rotation(x, call):
    return (call["rotary_emb"] * x.unflatten(-1, (-1, 1, 2))).sum(-1).flatten(-2)


# How diffusers computes queries, keys and values of a family, how it rotates them, and the token
# grid of the second of its two sizes.
LAYERS = {
    "dit": (per_head, unrotated, (7, 7)),
    "hunyuan_dit": (normalized_per_head, hunyuan_dit_rotation, (7, 3)),
    "kandinsky5": (kandinsky5_projections, kandinsky5_rotation, (2, 7, 5)),
    "ltx": (across_heads, ltx_rotation, (2, 14, 10)),
    "ltx2": (across_heads, ltx2_rotation, (2, 14, 10)),
    "pixart": (per_head, unrotated, (7, 3)),
    "sana": (across_heads, unrotated, (7, 3)),
    "sana_video": (across_heads, wan_rotation, (2, 7, 5)),
    **dict.fromkeys(
        ("skyreels_v2", "wan", "wan_animate", "wan_vace"), (across_heads, wan_rotation, (2, 7, 5))
    ),
    "cosmos": (normalized_per_head, cosmos_rotation, (2, 7, 5)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_equals_the_definition(name):
    make, _, mhla_class, layout = FAMILIES[name]
    model = mhla_gen.inject(make(), MHLAConfig(layout=layout, conv=False, gate=False))
    attention, call = mhla_class.family.attentions(disturb(model))[1][1], {}

    def remember(layer, args, kwargs):
        call.update(inspect.signature(layer.forward).bind(*args, **kwargs).arguments)
        call.update(call.pop("kwargs", {}) | call.pop("cross_attention_kwargs", {}))

    attention.register_forward_pre_hook(remember, with_kwargs=True)
    run(model, two_inputs(name)[1])
    with torch.no_grad():
        result = attention.double()(**cast(call, torch.float64))
        hidden_states = call["hidden_states"].double()
        projections, rotation, grid = LAYERS[name]
        query, key, value = projections(attention, hidden_states)
        mixing = attention.mhla.mixing
        out = naive_layer(query, key, value, mixing, grid, layout, lambda phi: rotation(phi, call))
        expected = mhla_class.family.output_projection(attention)(out.flatten(2))
    # The tables of angles, and LTX-Video's rotation, are float32.
    torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["sana", "sana_video"])
def test_sana_with_one_block_is_its_own_linear_attention(name):
    make, make_inputs, _, layout = FAMILIES[name]
    model, inputs = make(), make_inputs()
    before = run(model, inputs)
    mhla_gen.inject(model, MHLAConfig(layout=(1,) * len(layout), conv=False, gate=False))
    torch.testing.assert_close(run(model, inputs), before, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("perturbed", [{}, {"perturbation_mask": torch.tensor([0.5])}])
@pytest.mark.parametrize("rope_type", ["interleaved", "split"])
def test_ltx2_gates_and_perturbs_its_layers(rope_type, perturbed):
    gates = {"gated_attn": True, "audio_gated_attn": True, "perturbed_attn": True}
    model = tiny_ltx2(rope_type=rope_type, **gates)
    inputs = ltx2_inputs() | perturbed | {"spatio_temporal_guidance_blocks": [1]}
    before = run(model, inputs)
    config = MHLAConfig(layout=(1, 2, 2), exact=1, conv=False, gate=False, layers=[0, 1])
    mhla_gen.inject(model, config)
    torch.testing.assert_close(run(model, inputs), before)
    assert torch.equal(run(mhla_gen.restore(model), inputs), before)


@pytest.mark.parametrize("name", ["hunyuan_dit", "pixart"])
def test_fused_projections_keep_mhla(name):
    make, make_inputs, _, _ = FAMILIES[name]
    model, inputs = make(), make_inputs(12, 8)
    disturb(mhla_gen.inject(model, MHLAConfig(layout=(2, 2), layers="2/3")))
    before = run(model, inputs)
    model.fuse_qkv_projections()
    torch.testing.assert_close(run(model, inputs), before)
    model.unfuse_qkv_projections()
    assert torch.equal(run(model, inputs), before)


def test_pixart_keeps_other_arguments_of_its_layers(caplog):
    model = mhla_gen.inject(tiny_pixart(), MHLAConfig(layout=(2, 2), layers="2/3"))
    arguments = {"ip_adapter_masks": None}
    run(model, pixart_inputs() | {"cross_attention_kwargs": arguments})
    assert arguments == {"ip_adapter_masks": None} and not caplog.records


@pytest.mark.parametrize("options", [{}, {"image_dim": 20, "added_kv_proj_dim": 24}])
def test_wan_image_to_video_and_fused_projections(options):
    model = tiny_wan(**options)
    inputs = wan_inputs()
    if options:
        inputs["encoder_hidden_states"] = torch.randn(1, 512, 16)
        inputs["encoder_hidden_states_image"] = torch.randn(1, 9, 20)
    mhla_gen.inject(model, MHLAConfig(layout=(1, 2, 3), layers=[0, 2]))
    before = run(model, inputs)
    if not options:
        model.fuse_qkv_projections()
        torch.testing.assert_close(run(model, inputs), before)
        model.unfuse_qkv_projections()
    else:
        for block in model.blocks:
            block.attn1.fuse_projections()
    torch.testing.assert_close(run(model, inputs), before)


def test_dit_fused_projections():
    model, inputs = mhla_gen.inject(tiny_dit(), MHLAConfig(layout=(2, 2))), dit_inputs()
    before = run(model, inputs)
    for block in model.transformer_blocks:
        block.attn1.fuse_projections()
    torch.testing.assert_close(run(model, inputs), before)
