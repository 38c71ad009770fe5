"""All families of transformers: tiny models, their inputs, and what tests do with both."""

import torch
from tiny import (
    dit_inputs,
    hunyuan_dit_inputs,
    kandinsky5_inputs,
    ltx_inputs,
    pixart_inputs,
    sana_video_inputs,
    tiny_dit,
    tiny_hunyuan_dit,
    tiny_kandinsky5,
    tiny_ltx,
    tiny_pixart,
    tiny_sana_video,
    tiny_wan,
    wan_inputs,
)
from tiny_joint import (
    cogvideox_inputs,
    flux2_inputs,
    flux_inputs,
    hunyuan_video15_inputs,
    hunyuan_video_inputs,
    mochi_inputs,
    qwen_image_inputs,
    sd3_inputs,
    tiny_cogvideox,
    tiny_flux,
    tiny_flux2,
    tiny_hunyuan_video,
    tiny_hunyuan_video15,
    tiny_mochi,
    tiny_qwen_image,
    tiny_sd3,
    tiny_z_image,
    z_image_inputs,
)
from tiny_wan_variants import (
    cosmos_inputs,
    ltx2_inputs,
    sana_inputs,
    skyreels_v2_inputs,
    tiny_cosmos,
    tiny_ltx2,
    tiny_sana,
    tiny_skyreels_v2,
    tiny_wan_animate,
    tiny_wan_vace,
    wan_animate_inputs,
    wan_vace_inputs,
)

from mhla_gen import (
    MHLACogVideoXTransformer3DModel,
    MHLACosmosTransformer3DModel,
    MHLADiTTransformer2DModel,
    MHLAFlux2Transformer2DModel,
    MHLAFluxTransformer2DModel,
    MHLAHunyuanDiT2DModel,
    MHLAHunyuanVideo15Transformer3DModel,
    MHLAHunyuanVideoTransformer3DModel,
    MHLAKandinsky5Transformer3DModel,
    MHLALTX2VideoTransformer3DModel,
    MHLALTXVideoTransformer3DModel,
    MHLAMochiTransformer3DModel,
    MHLAPixArtTransformer2DModel,
    MHLAQwenImageTransformer2DModel,
    MHLASanaTransformer2DModel,
    MHLASanaVideoTransformer3DModel,
    MHLASD3Transformer2DModel,
    MHLASkyReelsV2Transformer3DModel,
    MHLAWanAnimateTransformer3DModel,
    MHLAWanTransformer3DModel,
    MHLAWanVACETransformer3DModel,
    MHLAZImageTransformer2DModel,
)

# Name → tiny model, its inputs, its class, a layout.
FAMILIES = {
    "dit": (tiny_dit, dit_inputs, MHLADiTTransformer2DModel, (2, 2)),
    "hunyuan_dit": (tiny_hunyuan_dit, hunyuan_dit_inputs, MHLAHunyuanDiT2DModel, (2, 2)),
    "kandinsky5": (tiny_kandinsky5, kandinsky5_inputs, MHLAKandinsky5Transformer3DModel, (1, 2, 3)),
    "ltx": (tiny_ltx, ltx_inputs, MHLALTXVideoTransformer3DModel, (1, 2, 3)),
    "ltx2": (tiny_ltx2, ltx2_inputs, MHLALTX2VideoTransformer3DModel, (1, 2, 3)),
    "pixart": (tiny_pixart, pixart_inputs, MHLAPixArtTransformer2DModel, (2, 2)),
    "sana_video": (
        tiny_sana_video,
        sana_video_inputs,
        MHLASanaVideoTransformer3DModel,
        (1, 2, 3),
    ),
    "wan": (tiny_wan, wan_inputs, MHLAWanTransformer3DModel, (1, 2, 3)),
    "cosmos": (tiny_cosmos, cosmos_inputs, MHLACosmosTransformer3DModel, (1, 2, 3)),
    "sana": (tiny_sana, sana_inputs, MHLASanaTransformer2DModel, (2, 2)),
    "skyreels_v2": (
        tiny_skyreels_v2,
        skyreels_v2_inputs,
        MHLASkyReelsV2Transformer3DModel,
        (1, 2, 3),
    ),
    "wan_animate": (
        tiny_wan_animate,
        wan_animate_inputs,
        MHLAWanAnimateTransformer3DModel,
        (1, 2, 3),
    ),
    "wan_vace": (tiny_wan_vace, wan_vace_inputs, MHLAWanVACETransformer3DModel, (1, 2, 3)),
    "cogvideox": (tiny_cogvideox, cogvideox_inputs, MHLACogVideoXTransformer3DModel, (1, 2, 3)),
    "flux": (tiny_flux, flux_inputs, MHLAFluxTransformer2DModel, (2, 3)),
    "flux2": (tiny_flux2, flux2_inputs, MHLAFlux2Transformer2DModel, (2, 3)),
    "hunyuan_video": (
        tiny_hunyuan_video,
        hunyuan_video_inputs,
        MHLAHunyuanVideoTransformer3DModel,
        (1, 2, 3),
    ),
    "hunyuan_video15": (
        tiny_hunyuan_video15,
        hunyuan_video15_inputs,
        MHLAHunyuanVideo15Transformer3DModel,
        (1, 2, 3),
    ),
    "mochi": (tiny_mochi, mochi_inputs, MHLAMochiTransformer3DModel, (1, 2, 3)),
    "qwen_image": (tiny_qwen_image, qwen_image_inputs, MHLAQwenImageTransformer2DModel, (2, 3)),
    "sd3": (tiny_sd3, sd3_inputs, MHLASD3Transformer2DModel, (2, 2)),
    "z_image": (tiny_z_image, z_image_inputs, MHLAZImageTransformer2DModel, (2, 3)),
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
