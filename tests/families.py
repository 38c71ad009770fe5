"""All families of transformers: tiny models, their inputs, and what tests do with both."""

import tiny
import tiny_joint
import tiny_wan_variants
import torch

import mhla_gen
from mhla_gen.ops.naive import naive_mhla

_TINY = vars(tiny) | vars(tiny_joint) | vars(tiny_wan_variants)
# Name of `tiny_NAME` and `NAME_inputs` → class, a layout.
_CLASSES = {
    "dit": (mhla_gen.MHLADiTTransformer2DModel, (2, 2)),
    "hunyuan_dit": (mhla_gen.MHLAHunyuanDiT2DModel, (2, 2)),
    "kandinsky5": (mhla_gen.MHLAKandinsky5Transformer3DModel, (1, 2, 3)),
    "ltx": (mhla_gen.MHLALTXVideoTransformer3DModel, (1, 2, 3)),
    "ltx2": (mhla_gen.MHLALTX2VideoTransformer3DModel, (1, 2, 3)),
    "pixart": (mhla_gen.MHLAPixArtTransformer2DModel, (2, 2)),
    "sana_video": (mhla_gen.MHLASanaVideoTransformer3DModel, (1, 2, 3)),
    "wan": (mhla_gen.MHLAWanTransformer3DModel, (1, 2, 3)),
    "cosmos": (mhla_gen.MHLACosmosTransformer3DModel, (1, 2, 3)),
    "sana": (mhla_gen.MHLASanaTransformer2DModel, (2, 2)),
    "skyreels_v2": (mhla_gen.MHLASkyReelsV2Transformer3DModel, (1, 2, 3)),
    "wan_animate": (mhla_gen.MHLAWanAnimateTransformer3DModel, (1, 2, 3)),
    "wan_vace": (mhla_gen.MHLAWanVACETransformer3DModel, (1, 2, 3)),
    "cogvideox": (mhla_gen.MHLACogVideoXTransformer3DModel, (1, 2, 3)),
    "flux": (mhla_gen.MHLAFluxTransformer2DModel, (2, 3)),
    "flux2": (mhla_gen.MHLAFlux2Transformer2DModel, (2, 3)),
    "hunyuan_video": (mhla_gen.MHLAHunyuanVideoTransformer3DModel, (1, 2, 3)),
    "hunyuan_video15": (mhla_gen.MHLAHunyuanVideo15Transformer3DModel, (1, 2, 3)),
    "mochi": (mhla_gen.MHLAMochiTransformer3DModel, (1, 2, 3)),
    "qwen_image": (mhla_gen.MHLAQwenImageTransformer2DModel, (2, 3)),
    "sd3": (mhla_gen.MHLASD3Transformer2DModel, (2, 2)),
    "z_image": (mhla_gen.MHLAZImageTransformer2DModel, (2, 3)),
}
# Name → tiny model, its inputs, its class, a layout.
FAMILIES = {
    name: (_TINY[f"tiny_{name}"], _TINY[f"{name}_inputs"], *rest) for name, rest in _CLASSES.items()
}
# Arguments of each family's inputs for two sizes that one set of weights must take.
TWO_SIZES = {
    "dit": ({"side": 8}, {"side": 14}),
    "hunyuan_dit": ({"height": 8, "width": 12}, {"height": 14, "width": 6}),
    "pixart": ({"height": 8, "width": 12}, {"height": 14, "width": 6}),
    "sd3": ({"height": 8, "width": 12}, {"height": 14, "width": 6}),
    "z_image": ({"height": 8, "width": 12}, {"height": 14, "width": 6}),
    **dict.fromkeys(
        ("flux", "flux2", "qwen_image", "sana"),
        ({"height": 4, "width": 6}, {"height": 7, "width": 3}),
    ),
}
TWO_CLIPS = ({"height": 10, "width": 14}, {"frames": 2, "height": 14, "width": 10})


def cast(inputs, dtype):
    if isinstance(inputs, dict):
        return {name: cast(value, dtype) for name, value in inputs.items()}
    if isinstance(inputs, list):
        return [cast(value, dtype) for value in inputs]
    floating = torch.is_tensor(inputs) and inputs.is_floating_point()
    return inputs.to(dtype) if floating else inputs


def run(model, inputs):
    with torch.no_grad():
        return output(model, inputs)


def output(model, inputs):
    sample = model(**inputs).sample
    return torch.stack(sample) if isinstance(sample, list) else sample


def two_inputs(name):
    """Inputs of two sizes that one set of weights must take."""
    return [FAMILIES[name][1](**sizes) for sizes in TWO_SIZES.get(name, TWO_CLIPS)]


def naive_layer(query, key, value, mixing, grid, layout, rotate):
    """The definition for relu, where the family's own function rotates the numerator's features."""

    def sums(query, key, value):
        return naive_mhla(
            query, key, value, mixing, grid=grid, layout=layout,
            feature_map="identity", rotary=None, normalize=False, causal=False, eps=0.0,
        )  # fmt: skip

    phi = [torch.relu(x) + 1e-6 for x in (query, key)]
    return sums(*map(rotate, phi), value) / (sums(*phi, torch.ones_like(value)) + 1e-6)
